"""Path weights of independent chains: annealed importance sampling, and a finding where
it disagrees with the chains."""

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
from composeprob.results import support
from composeprob.results.shares import (
    _largest_move,
    path_weight_dependence,
    weightless,
)
from composeprob.runtime import stages
from messages import check_finding, check_wording
from sampling_cases import both, measured, modes, normal, single, weighed

FIRST_ORDER = cp.ReverseStep(order=1, control="none")

LEVELS = cp.Schedule.log_snr(100)
CHAINS = 500


def ended(monkeypatch, density, sampler, key=0, num_chains=CHAINS):
    """A result, and log W of its chains' paths."""
    states = []
    summarised = stages.summarised

    def watched(state, *rest):
        states.append(state)
        return summarised(state, *rest)

    monkeypatch.setattr(stages, "summarised", watched)
    result = cp.infer(
        density,
        jax.random.key(key),
        num_chains=num_chains,
        sampler=sampler,
        progress=False,
    )
    return result, np.asarray(states[-1].run.without_copies.path_weights)


def log_mean(log_weights):
    return logsumexp(log_weights) - np.log(len(log_weights))


def two_modes(shares, means, sds):
    return cp.Analytic(modes(shares, means, sds), LEVELS)


THREE_APART = two_modes([0.3, 0.7], [-3.0, 3.0], [0.3, 0.3])
BY_SCORES = cp.AnnealedMCMC(
    cp.MALA(cp.Adaptive(), log_ratio=cp.LineIntegral()), 1, reverse_step=FIRST_ORDER
)
"""A sampler whose paths have weights without an energy."""


def assert_draws_have_the_finding(density):
    """Draws have equal weights, so that nothing corrects their shares."""
    drawn = cp.infer(
        density,
        jax.random.key(0),
        num_chains=CHAINS,
        sampler=BY_SCORES,
        draws=1,
        progress=False,
    )
    check_finding(drawn.status, "shares_frozen")
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

    def posterior(x):
        return norm.pdf(x, 1, 0.5) * norm.pdf(x) * norm.pdf(0.0, np.sin(x), 0.2)

    exact = quad(posterior, -2, 5, limit=200)[0]
    # Its standard error is 0.03; the discretisation error is 0.2, and the wrong sign of
    # the step's ratio costs 2.5.
    assert abs(log_mean(log_weights) - np.log(exact)) < 0.3
    assert 0.8 < log_weights.std() < 1.6


@cp.program
def latent_with_two_modes(sign):
    """|b| is measured well, b itself hardly."""
    b = cp.sample("b", modes([0.3, 0.7], [-3.0, 3.0], 0.5))
    cp.observe("size", dist.Normal(jnp.abs(b), 0.05), 3.0)
    cp.observe("side", dist.Normal(b, 3.0), 3.0 * sign)


def test_latents_alone_have_weights_of_their_starting_points(monkeypatch):
    """Each chain begins at one of 16 draws of the prior, so on a side by other shares
    than those of the posterior."""
    density = cp.compile(latent_with_two_modes, jnp.float32(1.0))
    sampler = cp.AnnealedMCMC(cp.HMC(cp.Adaptive(warmup=200), num_leapfrog=8), 100)
    result, log_weights = ended(monkeypatch, density, sampler, num_chains=1000)
    # Evidence of each side: its share of the prior times both likelihoods.
    of_size = norm.pdf(3, 3, np.hypot(0.5, 0.05))
    left = 0.3 * of_size * norm.pdf(3, -3, np.hypot(3, 0.05))
    right = 0.7 * of_size * norm.pdf(3, 3, np.hypot(3, 0.05))
    exact = left / (left + right)
    assert abs(log_mean(log_weights) - np.log(left + right)) < 0.1
    is_left = np.asarray(result["b"]) < 0
    weighted = np.exp(log_weights - logsumexp(log_weights)) @ is_left
    assert abs(weighted - exact) < 0.06
    assert abs(float(np.mean(is_left)) - exact) > 0.05  # so these weights correct it
    assert result.status.ok
    assert "path weights" in result.reason
    np.testing.assert_allclose(result._genealogy.weights @ is_left, weighted, rtol=1e-5)
    moved = cp.infer(density, jax.random.key(0), num_chains=1000, progress=False)
    assert moved.status.ok
    assert abs(np.mean(moved["b"] < 0) - exact) < 0.04


def test_path_weights_correct_shares_without_an_energy(monkeypatch):
    """Modes at ±3, which a second factor reweights; above level 0 it reweights them
    otherwise."""
    density = cp.compile(both, THREE_APART, normal(1.0, 2.0, LEVELS))
    result, _ = ended(monkeypatch, density, BY_SCORES)
    held = 0.7 * np.exp(-0.5) / (0.7 * np.exp(-0.5) + 0.3 * np.exp(-2))
    assert abs(np.mean(np.asarray(result["x"]) > 0) - held) > 0.05
    assert result.status.ok
    assert "path weights" in result.reason
    corrected = result.probability(lambda x: x["x"] > 0)
    assert abs(corrected.value - held) < 4 * corrected.error
    assert corrected.error < 0.05
    assert_draws_have_the_finding(density)


def test_chains_caught_at_no_probability_have_weight_0(monkeypatch):
    """Modes at ±3, of which a second factor leaves the right one; noisy levels lead a
    few of 500 chains to the left, too few for a regression on path weights to show
    it."""
    density = cp.compile(
        both, two_modes([0.8, 0.2], [-3.0, 3.0], [0.3, 0.3]), normal(3.0, 0.5, LEVELS)
    )
    result, _ = ended(monkeypatch, density, BY_SCORES)
    caught = np.asarray(result["x"]) < 0
    assert 1 <= caught.sum() <= 0.02 * CHAINS
    np.testing.assert_array_equal(np.isneginf(result.log_weights), caught)
    assert f"; {caught.sum()} separated chains" in result.reason
    square = result.mean(lambda x: (x["x"] - 3) ** 2)
    exact = 1 / (0.3**-2 + 0.5**-2)
    assert result.status.ok
    assert abs(square.value - exact) < 4 * square.error < exact
    assert_draws_have_the_finding(density)
    monkeypatch.setattr(
        support.shares, "weightless", lambda _, paths: np.zeros(len(paths), bool)
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
def test_chains_of_no_weight_are_separated_ones_of_low_path_weight(law, n):
    rng = np.random.default_rng(0)
    for _ in range(5):
        x = LAWS[law](rng, n)
        paths = 5 * rng.normal(size=n)
        few = np.arange(n) < 1 + n // 50
        assert not weightless({"x": x}, paths).any()
        assert not weightless({"x": x}, -10 * rng.exponential(size=n)).any()
        away = x + 30 * few[:, None] * x.std(0)
        low = paths - few * rng.normal(120, 20, size=n)
        # A mode that is far away, whatever the width of log W.
        assert not weightless({"x": away}, 4 * paths).any()
        # Chains that forget.
        assert not weightless({"x": x}, np.where(few, low, paths)).any()
        np.testing.assert_array_equal(weightless({"x": away}, low), few)


def test_chains_that_forget_have_no_finding(monkeypatch):
    """The path weights differ as much, but are independent of where chains end."""
    density = cp.compile(
        both, two_modes([0.3, 0.7], [-1.0, 1.0], [0.6, 0.6]), normal(1.0, 2.0, LEVELS)
    )
    sampler = cp.AnnealedMCMC(cp.HMC(cp.Adaptive()), 5, reverse_step=FIRST_ORDER)
    for key in range(3):
        result, log_weights = ended(monkeypatch, density, sampler, key)
        assert result.status.ok
        assert log_weights.std() > 0.2


def test_weights_that_are_independent_of_positions_give_no_finding():
    rng = np.random.default_rng(0)
    for d in (1, 3, 40, 800):
        for n in (64, 500):
            modes = rng.integers(0, 2, (n, 1)) * 8
            for spread in (0.5, 8.0):
                sites = {
                    "x": rng.normal(size=(n, d)) + modes,
                    "s": rng.exponential(size=n),
                }
                assert not path_weight_dependence(
                    sites, spread * rng.normal(size=n) ** 3
                )


@pytest.mark.parametrize("scale", [1.0, 4.0, 20.0])
def test_weights_of_unequal_variance_give_no_finding(scale):
    """E[W | x] = 1 everywhere, and log W falls with x as its variance grows: by half of
    it."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        x = rng.normal(size=2000)
        variance = scale / (1 + np.exp(-x))
        assert not path_weight_dependence(
            {"x": x}, rng.normal(-0.5 * variance, np.sqrt(variance))
        )


@pytest.mark.parametrize("d", [1, 30])
def test_the_message_states_how_far_weights_would_move_a_mean(d):
    """log W adds up over entries, and says of each that its mean is off by 0.6 of its
    spread."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1000, d))
    log_w = 0.6 * x.sum(1) + rng.normal(size=1000)
    text = path_weight_dependence({"x": x}, log_w)
    assert 0.45 < float(re.search(r"would move by \+([\d.]+) of", text)[1]) < 0.85


def test_the_message_states_the_share_of_a_group_where_no_mean_moves():
    """Four corners, of which two opposite ones have e² times the weight."""
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 2, (1000, 2))
    x = 4.0 * corners + 0.1 * rng.normal(size=(1000, 2))
    on_diagonal = corners[:, 0] == corners[:, 1]
    log_w = 2.0 * on_diagonal + 0.3 * rng.normal(size=1000)
    text = path_weight_dependence({"x": x}, log_w)
    held, expected = map(float, re.findall(r"([\d.]+)%", text))
    # About 2e²/(e² + 1) or 2/(e² + 1).
    assert 1.4 < expected / held < 3 or 0.15 < expected / held < 0.4


def test_few_or_broken_weights_are_not_judged():
    x = np.random.default_rng(0).normal(size=500)
    assert path_weight_dependence({"x": x}, x)
    assert not path_weight_dependence({"x": x[:30]}, x[:30])
    assert not path_weight_dependence(
        {"x": x}, np.where(np.arange(500) % 10 == 0, -np.inf, x)
    )
    assert not path_weight_dependence({"x": np.zeros(500)}, x)
    assert not path_weight_dependence({"x": x}, np.zeros(500))
    assert not path_weight_dependence(
        {"x": np.where(x > 3, np.nan, x), "y": np.full(500, np.inf)}, x
    )


def test_summed_scores_have_the_finding(monkeypatch):
    """Two Gaussians, of which reverse diffusion gives a mean that is off by a third of
    a spread, and the weights of its paths say so; their mean is the evidence over the
    product of two N(0, 1), where paths begin."""
    f = normal(1.0, 0.5, LEVELS)
    g = normal(-1.0, 1.0, LEVELS)
    result, log_weights = ended(
        monkeypatch, cp.compile(both, f, g), cp.Ancestral(), num_chains=100_000
    )
    mean = 0.6
    spread = np.sqrt(0.2)
    off = (mean - float(np.mean(result["x"]))) / spread
    assert abs(off) > 0.3
    exact = norm.logpdf(2, 0, np.sqrt(1.25)) - norm.logpdf(0, 0, np.sqrt(2))
    assert abs(log_mean(log_weights) - exact) < 0.2
    message = check_finding(result.status, "shares_frozen")
    assert "cp.SMC()" in message
    (move,) = re.findall(r" ([+-][\d.]+) ", message)
    assert float(move) * off > 0


@pytest.mark.parametrize("eta", [1.0, 0.0])
def test_reverse_diffusion_of_one_model_has_no_finding(monkeypatch, eta):
    density = cp.compile(single, THREE_APART, schedule=cp.Schedule.log_snr(200))
    result, log_weights = ended(monkeypatch, density, cp.Ancestral(eta))
    assert result.status.ok
    assert np.ptp(log_weights) == 0
    assert not np.isnan(result.mean(lambda x: x["x"]).error)


def test_blas_has_one_thread_in_a_run(monkeypatch):
    threads = []

    def measure(state):
        for library in threadpool_info():
            if library["user_api"] == "blas":
                threads.append(library["num_threads"])

    monkeypatch.setattr(stages, "STAGES", [measure, *stages.STAGES])
    ended(monkeypatch, cp.compile(single, THREE_APART), cp.Ancestral())
    assert set(threads) <= {1}


def test_a_step_through_a_wall_has_no_weight(monkeypatch):
    """It is not made: the weight of such a chain is NaN, and where many are there is no
    finding."""
    density = cp.compile(
        weighed, normal(schedule=LEVELS), lambda x: jnp.where(x > 0.2, 0.0, -jnp.inf)
    )
    sampler = cp.AnnealedMCMC(cp.MALA(cp.Adaptive()), 2, reverse_step=FIRST_ORDER)
    result, log_weights = ended(monkeypatch, density, sampler)
    assert np.isnan(log_weights).mean() > 0.05
    assert result.status.ok


def test_large_moves_by_weights_do_not_overflow():
    """Warnings are errors here: the ratio of weights of two groups can be too large for
    a number. All of the weight is at +1, one standard deviation from the mean."""
    left = np.arange(400) % 2 == 0
    x = np.where(left, -1.0, 1.0)
    groups = np.stack([left, ~left], 1)
    log_w = np.where(left, -2000.0, 2000.0)
    text = _largest_move(["x"], x[:, None], groups, log_w)
    assert re.search(r"\bx\b.*\+1\.00", text)
    check_wording(text)


@pytest.mark.parametrize("scale", [1.0, 10.0, 1e6])
def test_the_shift_that_a_finding_states_is_within_the_samples_range(scale):
    """Cov(x, log W) is 10⁶ standard deviations where log W varies by as much."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 1))
    log_w = scale * (x[:, 0] + 0.1 * rng.normal(size=500))
    text = path_weight_dependence({"x": x}, log_w)
    (moved,) = re.findall(r"would move by ([+-][\d.]+) of its", text)
    units = (x - x.mean()) / x.std()
    assert 0.8 < float(moved) <= units.max() + 0.01
