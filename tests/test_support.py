"""Shares of modes that rest on nothing are named, and those that rest on weights, paths
or moves are not."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob import tuning
from composeprob.compiler.pipeline import lowered
from composeprob.results.geometry import components, neighbours
from composeprob.runtime import outcome
from composeprob.runtime.outcome import alike, effective
from sampling_cases import both, modes, single, squared

FIRST_ORDER = cp.ReverseStep(order=1, control="none")

LEVELS = cp.Schedule.log_snr(60)


def two(d, shares, sds):
    """Modes at ±1 in each of d numbers."""
    means = jnp.stack([-jnp.ones(d), jnp.ones(d)])
    return cp.Analytic(modes(shares, means, sds), LEVELS)


def narrow():
    """Squared, the narrow mode holds 0.999."""
    return two(10, [0.5, 0.5], [0.5, 0.25])


@pytest.fixture(scope="module")
def wrong():
    """By constant exponents chains keep the half that noisy levels give the narrow
    mode."""
    return lowered(squared, (narrow(),), {}, growing=False)


@pytest.fixture(scope="module")
def frozen(wrong):
    return run(wrong, INDEPENDENT)


INDEPENDENT = cp.AnnealedMCMC(cp.HMC(cp.Adaptive()), 5, cp.ReverseStep(control="none"))
"""What a default run of 64 chains begins with."""


def run(density, sampler=None, **options):
    return cp.infer(
        density,
        jax.random.key(0),
        num_chains=64,
        sampler=sampler,
        progress=False,
        **options,
    )


def on_the_left(result):
    return np.mean(np.asarray(result["x"]).reshape(64, -1).mean(1) < 0)


def plane(sd=1.0):
    return cp.Analytic(dist.Normal(jnp.zeros(2), sd).to_event(1), LEVELS)


def test_chains_apart_in_shares_that_rest_on_nothing_are_named(frozen):
    assert 0.2 < on_the_left(frozen) < 0.8  # 0.001 by quadrature
    assert frozen.status.has("shares_frozen")
    assert "rest on nothing" in frozen.status.message
    assert "2 groups" in frozen.status.message
    assert np.isnan(frozen.mean(lambda s: s["x"][0]).error)


def test_weights_that_are_worth_too_few_chains_to_mend_shares_support_none(
    wrong, monkeypatch
):
    """7 of 64: more than a tenth, and fewer than what a mended share takes."""
    monkeypatch.setattr(outcome, "effective", lambda _: 7.0)
    assert run(wrong, INDEPENDENT).status.has("shares_frozen")


def test_modes_of_a_score_alone_are_apart_though_neighbours_connect_them():
    """Eight modes in six numbers, squared, with some eight of 64 chains each: fewer
    than neighbours that are asked."""
    means = jnp.asarray(
        np.sign(np.random.default_rng(0).normal(size=(8, 6))), jnp.float32
    )
    law = cp.Analytic(
        modes(jnp.full(8, 1 / 8), means, jnp.linspace(0.5, 0.2, 8)), LEVELS
    )

    def score(x, level):
        return law.evaluate(x, LEVELS.at(level), {})[1]

    scored = cp.Diffusion(
        score, LEVELS, event_shape=(6,), parameterization="score", time="level"
    )
    kernel = cp.MALA(cp.Adaptive(), log_ratio=cp.LineIntegral(5, "simpson", 0.1))
    density = lowered(squared, (scored,), {}, growing=False)
    result = run(density, cp.AnnealedMCMC(kernel, 3, reverse_step=FIRST_ORDER))
    assert (
        components(neighbours(np.asarray(result["x"]), tuning.SHARES.linked), 64).max()
        == 0
    )
    assert result.status.has("shares_frozen")
    assert "Their shares rest on nothing" in result.status.message


def test_paths_with_growing_exponents_mend_the_shares():
    result = run(cp.compile(squared, narrow()))
    assert 0.2 < on_the_left(result) < 0.8
    wide = result.probability(lambda s: s["x"].mean() < 0)
    assert abs(wide.value - 2.0**-10) < min(4 * wide.error, 0.004)
    assert (
        wide.error < 0.1
    )  # where weights are worth 10 chains it is the error of few families
    assert "mend the shares of modes" in result.reason
    assert result.status.ok


def test_by_default_chains_that_weigh_one_another_on_close_levels_take_their_place(
    wrong, frozen
):
    result = run(wrong)
    assert result.status.ok
    assert on_the_left(result) < 0.05  # 0.001 by quadrature
    noise = (LEVELS.sigma[0] / LEVELS.alpha[0]) ** 2
    squares = [
        -5 * np.log(4 * np.pi * (sd**2 + noise)) + np.log(0.25) for sd in (0.5, 0.25)
    ]
    assert (
        abs(result.log_evidence - np.logaddexp(*squares))
        < 4 * result.log_evidence_error
        < 1
    )
    assert (
        "independent chains, corrected by HMC; but the chains lay apart"
        in result.reason
    )
    assert frozen.evaluations < result.evaluations <= 6.1 * frozen.evaluations
    assert (
        result.evaluations - frozen.evaluations == len(result.levels["log_snr"]) * 16
    )  # 1.3 times as many at most


def test_chains_on_levels_that_the_user_gave_stay_on_them(wrong):
    result = run(wrong, levels=np.asarray(LEVELS.log_snr))
    assert result.about.sampler.startswith("AnnealedMCMC")
    assert result.status.has("shares_frozen")


def row_and_column(n=7):
    """One 1 in every row and column: invalid places are 25 nats lower, or more."""
    cells = np.arange(n * n).reshape(n, n)
    line = cp.Analytic(modes(jnp.full(n, 1 / n), jnp.eye(n), 0.1), LEVELS)
    return cp.window(line, (n * n,), over=np.concatenate([cells, cells.T]))


def test_places_that_break_a_constraint_hold_nothing():
    def valid(x):
        ones = np.asarray(x).reshape(-1, 7, 7) > 0.5
        return np.mean((ones.sum(1) == 1).all(1) & (ones.sum(2) == 1).all(1))

    density = cp.compile(single, row_and_column())
    assert valid(run(density, INDEPENDENT)["x"]) < 0.9
    result = run(density)
    assert valid(result["x"]) == 1.0
    assert "took its place" in result.reason


def test_chains_apart_whose_paths_weigh_alike_are_not_named():
    """A vague second factor weighs the modes anew, by little at any level."""
    result = run(
        cp.compile(both, two(2, [0.5, 0.5], [0.2, 0.2]), plane(8.0)), INDEPENDENT
    )
    assert 0.3 < on_the_left(result) < 0.7
    assert result.status.ok


def test_chains_that_global_moves_lead_across_are_not_named():
    result = run(cp.compile(squared, two(1, [0.5, 0.5], [0.3, 0.1])))
    share = 1 / (1 + 0.3 / 0.1)
    assert abs(on_the_left(result) - share) < 4 * np.sqrt(share * (1 - share) / 64)
    assert result.status.ok


def test_what_weights_are_worth():
    rng = np.random.default_rng(0)
    assert effective(np.zeros(10)) == pytest.approx(10)
    assert effective(np.array([0.0, -np.inf, np.nan, -800.0])) == pytest.approx(1)
    assert alike(rng.normal(size=64))
    assert not alike(4 * rng.normal(size=64))
    assert not alike(np.full(64, np.nan))
