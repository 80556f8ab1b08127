"""What the ways weigh that independent chains came: annealed importance sampling, and a
finding where it disagrees."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy.integrate import quad
from scipy.special import logsumexp
from scipy.stats import norm
from threadpoolctl import threadpool_info

import composeprob as cp
from composeprob.results.shares import _most_moved, uneven_paths, weightless
from composeprob.runtime import outcome, stages
from sampling_cases import both, measured, modes, normal, single, weighed

FIRST_ORDER = cp.ReverseStep(order=1, control="none")

LEVELS = cp.Schedule.log_snr(100)
CHAINS = 500


def ended(monkeypatch, density, sampler, key=0, num_chains=CHAINS):
    """A result, and log W of its chains' paths."""
    seen, summarised = [], stages.summarised
    monkeypatch.setattr(
        stages,
        "summarised",
        lambda state, *rest: (seen.append(state), summarised(state, *rest))[1],
    )
    result = cp.infer(
        density,
        jax.random.key(key),
        num_chains=num_chains,
        sampler=sampler,
        progress=False,
    )
    return result, np.asarray(seen[-1].run.without_copies.path_weights)


def two_modes(shares, means, sds):
    return cp.Analytic(modes(shares, means, sds), LEVELS)


THREE_APART = two_modes([0.3, 0.7], [-3.0, 3.0], [0.3, 0.3])
BY_SCORES = cp.AnnealedMCMC(
    cp.MALA(cp.Adaptive(), log_ratio=cp.LineIntegral()), 1, reverse_step=FIRST_ORDER
)
"""Whose paths are weighed without an energy."""


def assert_draws_are_named(density, words):
    """Draws all weigh the same, so that nothing mends their shares."""
    drawn = cp.infer(
        density,
        jax.random.key(0),
        num_chains=CHAINS,
        sampler=BY_SCORES,
        draws=1,
        progress=False,
    )
    assert drawn.status.has("shares_frozen")
    assert words in drawn.status.message
    assert np.isnan(drawn.mean(lambda x: x["x"]).error)


@pytest.mark.parametrize(
    "kernel",
    [cp.HMC(cp.Adaptive()), cp.MALA(0.05, log_ratio=cp.LineIntegral())],
    ids=repr,
)
def test_the_mean_weight_is_the_evidence(monkeypatch, kernel):
    f, g = normal(1.0, 0.5, LEVELS), normal(0.0, 1.0, LEVELS)
    density = cp.compile(
        measured, f * g, lambda x: dist.Normal(jnp.sin(x), 0.2), jnp.float32(0.0)
    )
    sampler = cp.AnnealedMCMC(kernel, 1, reverse_step=FIRST_ORDER)
    _, log_weights = ended(monkeypatch, density, sampler, num_chains=2000)
    exact = quad(
        lambda x: norm.pdf(x, 1, 0.5) * norm.pdf(x) * norm.pdf(0.0, np.sin(x), 0.2),
        -2,
        5,
        limit=200,
    )[0]
    # Its standard error is 0.03; the levels' distance is worth 0.2, and the wrong sign
    # of the step's ratio 2.5.
    assert abs(logsumexp(log_weights) - np.log(len(log_weights)) - np.log(exact)) < 0.3
    assert 0.8 < log_weights.std() < 1.6


@cp.program
def latent_with_two_modes(sign):
    """|b| is seen well, b itself hardly."""
    b = cp.sample("b", modes([0.3, 0.7], [-3.0, 3.0], 0.5))
    cp.observe("size", dist.Normal(jnp.abs(b), 0.05), 3.0)
    cp.observe("side", dist.Normal(b, 3.0), 3.0 * sign)


def test_latents_alone_are_weighed_by_where_they_began(monkeypatch):
    """Each chain begins at one of 16 draws of the prior, so at a side by other shares
    than those of the posterior."""
    density = cp.compile(latent_with_two_modes, jnp.float32(1.0))
    sampler = cp.AnnealedMCMC(cp.HMC(cp.Adaptive(warmup=200), num_leapfrog=8), 100)
    result, log_weights = ended(monkeypatch, density, sampler, num_chains=1000)
    seen = 0.5 * (
        norm.pdf(3, 3, np.hypot(0.5, 0.05)) + norm.pdf(3, 3, np.hypot(0.5, 0.05))
    )
    left, right = (
        w * seen * norm.pdf(3, 3 * m, np.hypot(3, 0.05))
        for w, m in ((0.3, -1), (0.7, 1))
    )
    assert (
        abs(logsumexp(log_weights) - np.log(len(log_weights)) - np.log(left + right))
        < 0.1
    )
    found = float(np.mean(result["b"] < 0))
    weighed = np.exp(log_weights - logsumexp(log_weights)) @ (
        np.asarray(result["b"]) < 0
    )
    assert abs(weighed - left / (left + right)) < 0.06
    assert abs(found - left / (left + right)) > 0.05  # so these weights mend the shares
    assert result.status.ok
    assert "mend the shares" in result.reason
    np.testing.assert_allclose(
        result._families.weights @ (np.asarray(result["b"]) < 0), weighed, rtol=1e-5
    )
    moved = cp.infer(density, jax.random.key(0), num_chains=1000, progress=False)
    assert moved.status.ok
    assert abs(np.mean(moved["b"] < 0) - left / (left + right)) < 0.04


def test_weights_of_paths_mend_frozen_shares_where_no_energy_is_known(monkeypatch):
    """Modes at ±3, which a second factor weighs anew; above level 0 it weighs them
    otherwise."""
    density = cp.compile(both, THREE_APART, normal(1.0, 2.0, LEVELS))
    result, _ = ended(monkeypatch, density, BY_SCORES)
    held = 0.7 * np.exp(-0.5) / (0.7 * np.exp(-0.5) + 0.3 * np.exp(-2))
    assert abs(np.mean(np.asarray(result["x"]) > 0) - held) > 0.05
    assert result.status.ok
    assert "mend the shares" in result.reason
    mended = result.probability(lambda x: x["x"] > 0)
    assert abs(mended.value - held) < 4 * mended.error
    assert mended.error < 0.05
    assert_draws_are_named(density, "weighed")


def test_chains_caught_where_nothing_is_weigh_nothing(monkeypatch):
    """Modes at ±3, of which a second factor leaves the right one; noisy levels lead a
    few of 500 chains to the left, too few for their paths to show that shares depend on
    these."""
    density = cp.compile(
        both, two_modes([0.8, 0.2], [-3.0, 3.0], [0.3, 0.3]), normal(3.0, 0.5, LEVELS)
    )
    result, _ = ended(monkeypatch, density, BY_SCORES)
    caught = np.asarray(result["x"]) < 0
    assert 1 <= caught.sum() <= 0.02 * CHAINS
    np.testing.assert_array_equal(np.isneginf(result.log_weights), caught)
    assert f"{caught.sum()} of them, which lie apart" in result.reason
    square, exact = result.mean(lambda x: (x["x"] - 3) ** 2), 1 / (0.3**-2 + 0.5**-2)
    assert result.status.ok
    assert abs(square.value - exact) < 4 * square.error < exact
    assert_draws_are_named(density, "there is nothing")
    monkeypatch.setattr(
        outcome.shares, "weightless", lambda _, paths: np.zeros(len(paths), bool)
    )
    kept, _ = ended(monkeypatch, density, BY_SCORES)
    assert kept.status.ok
    assert kept.mean(lambda x: (x["x"] - 3) ** 2).value > 2 * exact


LAWS = {
    "15 numbers": lambda rng, n: rng.normal(size=(n, 15)),
    "64 numbers": lambda rng, n: rng.normal(size=(n, 64)),
    "heavy tails": lambda rng, n: rng.standard_t(3, size=(n, 3)),
    "exponential": lambda rng, n: rng.exponential(size=(n, 5)),
    "small mode": lambda rng, n: (
        0.1 * rng.normal(size=(n, 4))
        + np.where(rng.uniform(size=(n, 1)) < 0.03, 5.0, -5.0)
    ),
    "ring": lambda rng, n: (
        np.exp(2j * np.pi * rng.uniform(size=n)).view(float).reshape(n, 2)
    ),
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("n", [40, 128, 1000])
def test_chains_that_weigh_nothing_are_those_that_lie_apart(law, n):
    rng = np.random.default_rng(0)
    for _ in range(5):
        x = LAWS[law](rng, n)
        paths, few = 5 * rng.normal(size=n), np.arange(n) < 1 + n // 50
        assert not weightless({"x": x}, paths).any()
        assert not weightless({"x": x}, -10 * rng.exponential(size=n)).any()
        away = x + 30 * few[:, None] * x.std(0)
        low = paths - few * rng.normal(120, 20, size=n)
        assert not weightless(
            {"x": away}, 4 * paths
        ).any()  # a mode that is far away, whatever the width of log W
        assert not weightless(
            {"x": x}, np.where(few, low, paths)
        ).any()  # chains that forget
        np.testing.assert_array_equal(weightless({"x": away}, low), few)


def test_chains_that_forget_are_not_named(monkeypatch):
    """The paths' weights differ as much, but where chains end has nothing to do with
    them."""
    density = cp.compile(
        both, two_modes([0.3, 0.7], [-1.0, 1.0], [0.6, 0.6]), normal(1.0, 2.0, LEVELS)
    )
    sampler = cp.AnnealedMCMC(cp.HMC(cp.Adaptive()), 5, reverse_step=FIRST_ORDER)
    for key in range(3):
        result, log_weights = ended(monkeypatch, density, sampler, key)
        assert result.status.ok
        assert log_weights.std() > 0.2


def test_weights_that_know_nothing_of_where_chains_are_name_nothing():
    rng = np.random.default_rng(0)
    for d in (1, 3, 40, 800):
        for n in (64, 500):
            modes = rng.integers(0, 2, (n, 1)) * 8
            for spread in (0.5, 8.0):
                sites = {
                    "x": rng.normal(size=(n, d)) + modes,
                    "s": rng.exponential(size=n),
                }
                assert not uneven_paths(sites, spread * rng.normal(size=n) ** 3)


@pytest.mark.parametrize("scale", [1.0, 4.0, 20.0])
def test_weights_that_scatter_more_in_places_name_nothing(scale):
    """E[W | x] = 1 everywhere, and log W falls with x as its variance grows: by half of
    it."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        x = rng.normal(size=2000)
        variance = scale / (1 + np.exp(-x))
        assert not uneven_paths(
            {"x": x}, rng.normal(-0.5 * variance, np.sqrt(variance))
        )


@pytest.mark.parametrize("d", [1, 30])
def test_what_weights_would_move_is_told(d):
    """log W adds up over entries, and says of each that its mean is off by 0.6 of its
    spread."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1000, d))
    ((code, text),) = uneven_paths({"x": x}, 0.6 * x.sum(1) + rng.normal(size=1000))
    assert code == "shares_frozen"
    assert 0.45 < float(re.search(r"would move by \+([\d.]+) of", text)[1]) < 0.85


def test_a_group_whose_mean_is_that_of_the_rest_is_told():
    """Four corners, of which two opposite ones weigh e² times as much: no mean
    moves."""
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 2, (1000, 2))
    x = 4.0 * corners + 0.1 * rng.normal(size=(1000, 2))
    gain = 2.0 * (corners[:, 0] == corners[:, 1]) + 0.3 * rng.normal(size=1000)
    ((_, text),) = uneven_paths({"x": x}, gain)
    held, should = (float(part) for part in re.findall(r"([\d.]+)%", text))
    assert (
        1.4 < should / held < 3 or 0.15 < should / held < 0.4
    )  # about 2e²/(e² + 1) or 2/(e² + 1)


def test_few_or_broken_weights_are_not_judged():
    x = np.random.default_rng(0).normal(size=500)
    assert uneven_paths({"x": x}, x)
    assert not uneven_paths({"x": x[:30]}, x[:30])
    assert not uneven_paths({"x": x}, np.where(np.arange(500) % 10 == 0, -np.inf, x))
    assert not uneven_paths({"x": np.zeros(500)}, x)
    assert not uneven_paths({"x": x}, np.zeros(500))
    assert not uneven_paths(
        {"x": np.where(x > 3, np.nan, x), "y": np.full(500, np.inf)}, x
    )


def test_summed_scores_are_named(monkeypatch):
    """Two Gaussians, of which reverse diffusion gives a mean that is off by a third of
    a spread, and the weights of its paths say so; their mean is the evidence over the
    product of two N(0, 1), where paths begin."""
    f, g = normal(1.0, 0.5, LEVELS), normal(-1.0, 1.0, LEVELS)
    result, log_weights = ended(
        monkeypatch, cp.compile(both, f, g), cp.Ancestral(), num_chains=100_000
    )
    mean, spread = 0.6, np.sqrt(0.2)
    off = (mean - float(np.mean(result["x"]))) / spread
    assert abs(off) > 0.3
    exact = norm.logpdf(2, 0, np.sqrt(1.25)) - norm.logpdf(0, 0, np.sqrt(2))
    assert abs(logsumexp(log_weights) - np.log(len(log_weights)) - exact) < 0.2
    assert result.status.has("shares_frozen")
    assert "cp.SMC()" in result.status.message
    told = float(re.search(r"would move by ([+-][\d.]+) of", result.status.message)[1])
    assert told * off > 0


@pytest.mark.parametrize("eta", [1.0, 0.0])
def test_reverse_diffusion_of_one_model_is_not_named(monkeypatch, eta):
    density = cp.compile(single, THREE_APART)
    result, log_weights = ended(monkeypatch, density, cp.Ancestral(eta))
    assert result.status.ok
    assert np.ptp(log_weights) == 0
    assert not np.isnan(result.mean(lambda x: x["x"]).error)


def test_blas_has_one_thread_in_a_run(monkeypatch):
    seen = []
    monkeypatch.setattr(
        stages, "STAGES", [lambda _: seen.append(threadpool_info()), *stages.STAGES]
    )
    ended(monkeypatch, cp.compile(single, THREE_APART), cp.Ancestral())
    assert {
        library["num_threads"] for library in seen[0] if library["user_api"] == "blas"
    } <= {1}


def test_a_step_through_a_wall_weighs_nothing_that_is_known(monkeypatch):
    """It is not made: such a chain has no weight, and where many have none nothing is
    said."""
    density = cp.compile(
        weighed, normal(schedule=LEVELS), lambda x: jnp.where(x > 0.2, 0.0, -jnp.inf)
    )
    result, log_weights = ended(
        monkeypatch,
        density,
        cp.AnnealedMCMC(cp.MALA(cp.Adaptive()), 2, reverse_step=FIRST_ORDER),
    )
    assert np.isnan(log_weights).mean() > 0.05
    assert result.status.ok


def test_what_weights_move_is_told_without_overflow():
    """Warnings are errors here: the ratio of weights of two groups can be too large for
    a number."""
    left = np.arange(400) % 2 == 0
    x = np.where(left, -1.0, 1.0)
    text = _most_moved(
        ["x"], x[:, None], np.stack([left, ~left], 1), np.where(left, -2000.0, 2000.0)
    )
    assert "the mean of x would move by +2000.00" in text
