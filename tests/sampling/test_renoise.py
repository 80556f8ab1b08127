"""Renoising moves: invariance from exact draws, modes that they cross, what they cost,
and the rungs where they turn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob import tuning
from composeprob.errors import CapabilityError, InvalidValueError
from composeprob.samplers import renoise
from composeprob.samplers.layout import Layout
from composeprob.samplers.random import stream, words_of
from composeprob.samplers.renoise import (
    Renoising,
    accept,
    chosen_turns,
    ladder_of,
)
from composeprob.samplers.renoise_finisher import Renoise
from refusals import refused
from sampling_cases import (
    Calls,
    Counted,
    both,
    learned,
    modes,
    normal,
    run,
    single,
    weighed,
)
from zscores import assert_agrees, assert_disagrees, z_scores

LEVELS = cp.Schedule.log_snr(11, -8.0, 8.0)  # rungs 1.6 apart: steps are inexact
SHARES = np.array([0.3, 0.7])
MEANS = np.array([-2.0, 2.0])
SDS = np.array([1.0, 0.3])
NOISE = float(LEVELS.sigma[0] / LEVELS.alpha[0])
N = 4000


def two_modes():
    return cp.Analytic(modes(SHARES, MEANS, SDS), LEVELS)


def draws(shares=SHARES, means=MEANS, sds=SDS, n=N):
    """Exact draws of y = x/α at level 0."""
    rng = np.random.default_rng(0)
    which = rng.choice(len(shares), n, p=shares)
    width = np.sqrt(np.asarray(sds) ** 2 + NOISE**2)
    return means[which] + width[which] * rng.standard_normal(n)


def tilted(n=N):
    """Exact draws under the further weight of a slope, by rejection."""
    y = draws(n=8 * n)
    kept = np.random.default_rng(1).uniform(size=len(y)) < jax.nn.sigmoid(3 * y)
    return y[kept][:n]


def moved(density, y, number=12, seed=0):
    """Return points after so many moves of each chain, and their mean acceptance."""
    points = jnp.asarray(y, jnp.float32)[:, None]
    ladder, share = ladder_of(np.asarray(points), density)
    turns = jnp.asarray(chosen_turns(share, np.ones(len(share)), number))
    words, _ = words_of(jax.random.key(seed), len(y))

    @jax.jit
    def chains(words, points):
        renoising = Renoising(density, Layout.of_density(density), ladder)

        def chain(words, v):
            def move(i, carry):
                state, total = carry
                here = stream(words, i)
                proposed, log_ratio = renoising.propose(here, state, turns[i])
                state, info = accept(here, proposed, state, log_ratio)
                return state, total + info.acceptance

            start = (renoising.state(v), jnp.zeros(()))
            state, total = jax.lax.fori_loop(0, number, move, start)
            return state.position[0], total / number

        return jax.vmap(chain)(words, points)

    ends, acceptance = chains(jnp.asarray(words), points)
    return np.asarray(ends, float), float(np.mean(acceptance))


def statistics(y):
    return {
        "right": (y > 0).astype(float),
        "peak": (np.abs(y - 2) < 0.3).astype(float),
        "between": (np.abs(y) < 1).astype(float),
        "mean": y,
        "square": y**2,
    }


def scores(before, after):
    """z-scores of statistics after the moves, against those of many exact draws."""
    exact = {name: values.mean() for name, values in statistics(before).items()}
    return z_scores(statistics(after), exact)


def log_weight(x):
    return jax.nn.log_sigmoid(3 * x)


CLOSED_FORMS = {
    "two modes": (lambda: cp.compile(single, two_modes()), draws),
    "and a weight": (lambda: cp.compile(weighed, two_modes(), log_weight), tilted),
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_closed_forms_are_left_invariant_by_inexact_steps(name):
    make, exact = CLOSED_FORMS[name]
    ends, acceptance = moved(make(), exact())
    assert_agrees(scores(exact(n=400_000), ends))
    assert 0.3 < acceptance < 0.9


def test_without_the_ratio_of_the_steps_they_are_not(monkeypatch):
    zero = jnp.zeros(())
    monkeypatch.setattr(Renoising, "log_quotient", lambda *_: zero)
    ends, acceptance = moved(cp.compile(single, two_modes()), draws())
    assert acceptance == 1.0
    assert_disagrees(scores(draws(n=400_000), ends))


def test_without_the_rest_of_the_density_they_are_not(monkeypatch):
    zero = jnp.zeros(())
    monkeypatch.setattr(Renoising, "log_rest", lambda *_: zero)
    density = cp.compile(weighed, two_modes(), log_weight)
    ends, _ = moved(density, tilted())
    assert_disagrees(scores(tilted(n=400_000), ends))


def test_with_one_way_alone_in_the_ratio_they_are_not(monkeypatch):
    excursion = Renoising.excursion

    def one_way(self, words, state, turn):
        found = excursion(self, words, state, turn)
        return found._replace(log_steps=0.5 * found.log_steps)

    monkeypatch.setattr(Renoising, "excursion", one_way)
    ends, _ = moved(cp.compile(single, two_modes()), draws())
    assert_disagrees(scores(draws(n=400_000), ends))


FINE = cp.Schedule.log_snr(61, -8.0, 8.0)


def score_of(mean, sd):
    """The score of a normal law as a network that predicts noise."""

    def network(x, log_snr):
        alpha = jnp.sqrt(jax.nn.sigmoid(log_snr))
        sigma = jnp.sqrt(jax.nn.sigmoid(-log_snr))
        return sigma * (x - alpha * mean) / (alpha**2 * sd**2 + sigma**2)

    return learned(network, "epsilon", FINE, shape=())


def test_products_of_scores_are_weighed_by_their_rate(monkeypatch):
    density = cp.compile(both, score_of(-1.0, 0.8), score_of(1.5, 1.0))
    assert "energy" not in density.capabilities
    noise = float(FINE.sigma[0] / FINE.alpha[0])
    precisions = 1 / (np.array([0.8, 1.0]) ** 2 + noise**2)
    mean = precisions @ np.array([-1.0, 1.5]) / precisions.sum()
    sd = precisions.sum() ** -0.5
    exact = mean + sd * np.random.default_rng(0).standard_normal(N)

    def moments(y):
        return {"mean": y, "square": (y - mean) ** 2}

    expected = {"mean": mean, "square": sd**2}
    ends, acceptance = moved(density, exact)
    assert_agrees(z_scores(moments(ends), expected))
    assert 0.2 < acceptance < 0.95
    monkeypatch.setattr(Renoising, "log_edge", lambda *_: jnp.zeros(()))
    ends, _ = moved(density, exact)
    assert_disagrees(z_scores(moments(ends), expected))


def test_chains_that_all_begin_in_one_mode_cross():
    density = cp.compile(single, two_modes())
    sampler = cp.AnnealedMCMC(cp.MALA(0.05), 1, then=cp.Renoise(20))
    renoised, acceptance = moved(density, np.full(N, -2.0), number=20)
    assert abs(np.mean(renoised > 0) - 0.7) < 4 * np.sqrt(0.21 / N)
    assert acceptance > 0.3
    result = run(density, chains=400, sampler=sampler)
    assert abs(np.mean(result["x"] > 0) - 0.7) < 4 * np.sqrt(0.21 / 400)
    assert result.about.global_acceptance > 0.3
    assert "then Renoise(20)" in result.about.sampler


def test_moves_from_much_noise_make_ancestors_of_nearly_all_chains():
    density = cp.compile(single, two_modes())

    def finished(then):
        sampler = cp.SMC(steps_per_level=1, weights="density", then=then)
        return run(density, 1, chains=400, sampler=sampler)

    none = finished(())
    moves = finished(cp.Renoise(20))
    near = finished(cp.Renoise(20, levels=(4.0, 8.0)))
    assert len(np.unique(moves._genealogy.index)) > 350
    np.testing.assert_array_equal(near._genealogy.index, none._genealogy.index)
    assert near.about.global_acceptance > 0.9


def test_they_cost_an_evaluation_a_step():
    calls = Calls()
    energy = cp.Energy(Counted(calls), LEVELS, event_shape=(2,))
    density = cp.compile(single, normal(jnp.zeros(2), 1.0, LEVELS) * energy)

    def counted(then):
        calls.reset()
        sampler = cp.AnnealedMCMC(cp.MALA(0.1), 1, then=then)
        result = run(density, chains=16, sampler=sampler)
        return calls.run, result.evaluations

    calls_without, evaluations_without = counted(())
    calls_with, evaluations_with = counted(cp.Renoise(3))
    # A call serves all chains at once; all 16 are pilots.
    assert calls_with - calls_without == evaluations_with - evaluations_without


def test_rungs_are_chosen_by_what_is_renewed_and_accepted():
    renewed = np.array([0.0, 0.1, 0.5, 1.0])
    acceptance = np.array([1.0, 1.0, 0.8, 0.1])
    turns = chosen_turns(renewed, acceptance, 600)
    counts = np.bincount(turns, minlength=4)
    gain = renewed * acceptance
    expected = 0.9 * gain / gain.sum() + 0.1 * np.array([0, 1, 1, 1]) / 3
    np.testing.assert_allclose(counts / 600, expected, atol=0.002)
    # Where nothing is accepted all rungs are tried.
    nothing = chosen_turns(renewed, np.zeros(4), 600)
    np.testing.assert_array_equal(np.bincount(nothing), [0, 200, 200, 200])


def test_turns_lie_in_the_given_range():
    density = cp.compile(single, two_modes())
    points = np.asarray(draws(n=64), np.float32)[:, None]
    fitted = Renoise(30, levels=(-3, 4)).adapt(points, density)
    rungs = np.asarray(fitted.ladder.levels)[fitted.ladder.turns]
    log_snr = np.asarray(LEVELS.log_snr)[rungs]
    assert log_snr.min() >= -3
    assert log_snr.max() <= 4


def test_the_widths_of_reverse_steps_are_those_of_a_gaussian():
    density = cp.compile(single, normal(0.5, 0.7, LEVELS))
    y = draws(np.ones(1), np.array([0.5]), np.array([0.7]))
    ladder, _ = ladder_of(np.asarray(y, np.float32)[:, None], density)
    s = np.asarray(LEVELS.sigma / LEVELS.alpha, float)[np.asarray(ladder.levels)] ** 2
    exact = (0.49 + s[:-1]) / (0.49 + s[1:])
    found = np.asarray(ladder.narrowing)[1:, 0]
    few = tuning.RENOISE.pilots
    np.testing.assert_allclose(1 - found, 1 - exact, rtol=5 * np.sqrt(2 / few))


def test_a_move_forgets_a_chain_only_beyond_the_distance_of_its_modes():
    numbers = 24
    axis = np.ones(numbers) / np.sqrt(numbers)
    rng = np.random.default_rng(0)
    side = rng.choice([-3.0, 3.0], 512)
    points = side[:, None] * axis + 0.5 * rng.standard_normal((512, numbers))
    law = cp.Analytic(modes([0.5, 0.5], [-3 * axis, 3 * axis], [0.5, 0.5]), LEVELS)
    ladder, share = ladder_of(points.astype(np.float32), cp.compile(single, law))
    s = np.asarray(LEVELS.sigma / LEVELS.alpha, float)[np.asarray(ladder.levels)] ** 2
    forgets = np.asarray(ladder.renews) > 0
    # 9 from the modes and 0.25 of each: a tenth of it is kept at s = 9 · 9.25.
    np.testing.assert_array_equal(forgets, s > 9 * 9.25)
    # An entry alone has less, and would forget sooner.
    assert (share[~forgets] > 0.9).any()


def test_few_pilots_know_the_widths_where_noise_alone_is_left():
    levels = cp.Schedule.log_snr(24, -10.0, 10.0)
    narrow = cp.Analytic(dist.Normal(jnp.zeros(3), 0.03).to_event(1), levels)
    density = cp.compile(single, narrow)
    y = 0.03 * np.random.default_rng(0).standard_normal((64, 3))
    ladder, _ = ladder_of(np.asarray(y, np.float32), density)
    s = np.asarray(levels.sigma / levels.alpha, float)[np.asarray(ladder.levels)] ** 2
    noisy = s[:-1] > 100 * 0.03**2
    exact = (0.03**2 + s[:-1]) / (0.03**2 + s[1:])
    found = np.asarray(ladder.narrowing)[1:]
    assert noisy.sum() > 5
    ratio = found[noisy] / exact[noisy, None]
    np.testing.assert_allclose(ratio, 1.0, atol=0.1)


@cp.program
def latent(law):
    cp.sample("z", law)


def test_it_is_refused_where_it_can_do_nothing():
    without_noise = cp.compile(latent, dist.Normal(0.0, 1.0))
    density = cp.compile(single, two_modes())
    sampler = cp.AnnealedMCMC(cp.MALA(), 1, then=Renoise())
    refused(lambda: run(without_noise, sampler=sampler), CapabilityError)
    outside = cp.AnnealedMCMC(cp.MALA(), 1, then=Renoise(levels=(20.0, 30.0)))
    refused(lambda: run(density, sampler=outside), InvalidValueError)
    refused(lambda: Renoise(0), InvalidValueError)
    refused(lambda: Renoise(levels=(0.0, np.nan)), InvalidValueError)
    assert repr(Renoise(5, levels=(-3.0, 1.0))) == "Renoise(5, levels=(-3.0, 1.0))"


def test_a_population_without_a_finite_point_is_left_alone():
    density = cp.compile(single, two_modes())
    points = np.full((8, 1), np.nan, np.float32)
    assert Renoise().adapt(points, density) is None
    assert dataclasses.is_dataclass(renoise.Ladder)
