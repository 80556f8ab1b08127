"""Replica exchange: swaps leave every level's law what it is, and modes come down in
their proportions."""

import dataclasses

import blackjax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import composeprob as cp
from composeprob.errors import CapabilityError, InvalidValueError, WrongTypeError
from composeprob.samplers.layout import Layout
from composeprob.samplers.replica_exchange import Swap, distinct_levels
from composeprob.samplers.run import begin
from composeprob.samplers.step import Step
from refusals import refused
from sampling_cases import SCHEDULE, both, modes, normal, single, slow
from targets import product_of_normals
from zscores import LIMIT, assert_agrees, assert_disagrees, z_scores

CHAINS = 4096
LEVELS = np.array([3, 9, 12, 20])
MEAN, VARIANCE, OTHER = 1.2, 0.3, 2.0
KERNELS = {
    "MALA": cp.MALA(lambda s: 0.2 * s.sigma**2),
    "HMC": cp.HMC(lambda s: 0.5 * s.sigma, num_leapfrog=3),
    "BlackJAX": cp.BlackJAX(blackjax.mala, lambda s: 0.2 * s.sigma**2),
}


@pytest.fixture(scope="module")
def density():
    """N(1.2, 0.3) times N(0, 2): at level k their noised laws' product."""
    return cp.compile(
        both, normal(MEAN, np.sqrt(VARIANCE)), normal(0.0, np.sqrt(OTHER))
    )


def law(level):
    """Return mean and variance of π_k."""
    noise = SCHEDULE.at(level)
    mean, variance, _ = product_of_normals(
        noise.alpha, noise.sigma, [MEAN, 0.0], np.sqrt([VARIANCE, OTHER])
    )
    return mean, variance


def laws(levels):
    """Return means and variances at all of these levels, (L,) each."""
    return np.array([law(level) for level in levels]).T


def sweeping(transits=True):
    """Return a function to the run after one sweep, or after its swaps alone; compiled
    anew for each test, as laws in it are replaced by wrong ones."""

    def swept(sampler, density, run):
        phases = sampler.phases(density, run)
        carry = phases.phase((run, phases.blank(run)))

        def same_turn(carry):
            return transits & (carry[0].visits.turns == run.visits.turns)

        run, _ = jax.lax.while_loop(same_turn, phases.phase, carry)
        return run

    return eqx.filter_jit(swept)


def standard(run, density):
    """Return standardised positions of every rung's replica, (chains, L)."""
    levels = np.asarray(run.visits.levels)
    means, variances = laws(levels)
    x = np.asarray(run.chains.position)[:, :, 0] * np.asarray(SCHEDULE.alpha)[levels]
    return (x - means) / np.sqrt(variances)


def exact(density, sampler, odd=0, levels=LEVELS):
    """Return a sampler, and a run of it whose replicas are exact draws of the levels,
    with its next sweep even or odd."""
    sampler = sampler.prepare(density)
    begun = begin(jax.random.key(1), CHAINS, sampler.visits(density, None))
    run = sampler.start(begun, density, len(SCHEDULE.alpha) - 1)
    means, variances = laws(levels)
    noise = np.random.default_rng(2).normal(size=(CHAINS, len(levels)))
    x = means + np.sqrt(variances) * noise
    points = jnp.asarray(x / np.asarray(SCHEDULE.alpha)[levels])[:, :, None]
    rungs = jnp.asarray(levels)
    layout = Layout.of_density(density)
    terms = sampler.needs_terms(density)

    @jax.jit
    @jax.vmap
    def evaluate(ensemble):
        at_level = jax.vmap(lambda v, k: layout.evaluate(density, v, k, terms))
        return at_level(ensemble, rungs)

    chains = dataclasses.replace(
        run.chains, position=points, evaluation=evaluate(points)
    )
    # After 50 sweeps of the last round.
    turns = jnp.int32(run.visits.first_sample + odd)
    visits = dataclasses.replace(run.visits, levels=rungs, previous=rungs, turns=turns)
    return sampler, dataclasses.replace(run, chains=chains, visits=visits)


def after_a_swap(density, odd, swap, levels=LEVELS):
    """Return `standard` after one swap from exact draws, a flag for each replica that
    swapped, (chains, L), and the probabilities of swaps."""
    sampler, run = exact(
        density, cp.ReplicaExchange(KERNELS["MALA"], len(levels), swap), odd, levels
    )
    after = sweeping(transits=False)(sampler, density, run)
    swapped = standard(after, density) != standard(run, density)
    return standard(after, density), swapped, np.asarray(after.visits.probability)[:, 0]


def moments(z):
    """Return z-scores of the means and squares of every rung."""
    values = {}
    expected = {}
    for j, x in enumerate(z.T):
        values |= {f"mean of rung {j}": x, f"square of rung {j}": x**2}
        expected |= {f"mean of rung {j}": 0.0, f"square of rung {j}": 1.0}
    return z_scores(values, expected)


@pytest.mark.parametrize("odd", [0, 1])
def test_swaps_by_energies_leave_every_level_what_it_is(density, odd):
    z, swapped, probability = after_a_swap(density, odd, "energy")
    assert_agrees(moments(z))
    lower = [1] if odd else [0, 2]
    for low in lower:
        assert np.all(swapped[:, low] == swapped[:, low + 1])
        assert np.mean(swapped[:, low]) == pytest.approx(probability[low], abs=0.05)
        assert probability[low] > 0.1
    others = [j for j in range(4) if j not in lower]
    assert np.all(probability[others] == 0)
    if odd:
        assert not np.any(swapped[:, [0, 3]])


def test_without_the_law_of_the_bridge_a_swap_is_wrong(density, monkeypatch):
    monkeypatch.setattr(Step, "log_density", lambda self, moved, y, g: jnp.zeros(()))
    assert_disagrees(moments(after_a_swap(density, 0, "energy")[0]))


def test_swaps_by_path_weights_are_right_where_levels_are_near(density):
    near = np.array([9, 10, 11, 12])
    z, _, probability = after_a_swap(density, 0, "feynman_kac", near)
    assert np.abs(z.mean(0)).max() < 0.08
    assert np.abs(z.var(0) - 1).max() < 0.12
    assert np.mean(probability[[0, 2]]) > 0.8


def test_path_weights_of_the_wrong_sign_are_found_out(density, monkeypatch):
    half = Swap.half_log_ratio

    def wrong(self, *arguments):
        return -3 * half(self, *arguments)

    monkeypatch.setattr(Swap, "half_log_ratio", wrong)
    z, *_ = after_a_swap(density, 0, "feynman_kac", np.array([9, 12, 14, 17]))
    assert max(np.abs(z.mean(0)).max(), np.abs(z.var(0) - 1).max()) > 0.12


@pytest.mark.parametrize("kernel", [slow("MALA"), "HMC", "BlackJAX"])
def test_sweeps_leave_every_level_what_it_is(density, kernel):
    sampler, run = exact(
        density, cp.ReplicaExchange(KERNELS[kernel], len(LEVELS), "energy")
    )
    before = standard(run, density)
    sweep = sweeping()
    for _ in range(3):
        run = sweep(sampler, density, run)
    z = standard(run, density)
    assert_agrees(moments(z))
    assert np.all(np.mean(z != before, axis=0) > 0.5)
    assert np.all(np.asarray(run.visits.probability[:, 1:]) > 3 * 0.3)
    # Replicas carry the evaluation of their rung's density.
    rungs = run.visits.levels
    positions = {"x": run.chains.position[..., 0] * SCHEDULE.alpha[rungs]}
    expected = jax.vmap(jax.vmap(density.log_density), (0, None))(positions, rungs)
    np.testing.assert_allclose(
        run.chains.evaluation.log_density, expected, rtol=1e-4, atol=1e-3
    )


def test_trips_of_replicas(density):
    """A replica has come from the top once it is at level 0 and was on the top rung
    since it last was there."""
    sampler, run = exact(
        density, cp.ReplicaExchange(KERNELS["MALA"], len(LEVELS), "energy")
    )
    flags = jnp.tile(jnp.array([False, True, False, True]), (CHAINS, 1))
    flagged = dataclasses.replace(run.chains, from_top=flags)
    run = dataclasses.replace(run, chains=flagged)
    after = sweeping(transits=False)(sampler, density, run)
    swapped = standard(after, density) != standard(run, density)
    new = np.asarray(after.chains.from_top)
    np.testing.assert_array_equal(
        np.asarray(after.chains.trips), np.outer(swapped[:, 0], [1, 0, 0, 0])
    )
    np.testing.assert_array_equal(new[:, 1], ~swapped[:, 0])
    np.testing.assert_array_equal(new[:, 2], swapped[:, 2])
    assert not np.any(new[:, 0])
    assert np.all(new[:, 3])


@pytest.mark.parametrize("kernel", ["HMC", "blocks"])
def test_the_density_is_evaluated_in_one_place(kernel):
    """Way down, sweeps and kernels are a loop around one evaluation, however many
    blocks there are."""
    energy = cp.Energy(
        lambda x, k: -0.5 * x**2 - 1e-6 * jax.lax.lgamma(x + 9.0),
        SCHEDULE,
        event_shape=(),
    )

    @cp.program
    def pair():
        return cp.sample("x", energy), cp.sample("y", normal())

    density = cp.compile(pair)
    kernels = {
        **KERNELS,
        "blocks": cp.Gibbs({"x": KERNELS["HMC"], "y": KERNELS["MALA"]}),
    }
    sampler = cp.ReplicaExchange(kernels[kernel], 4, "feynman_kac", sweeps=8)
    sampler = sampler.prepare(density)
    run = begin(jax.random.key(0), 8, sampler.visits(density, None))
    run = sampler.start(run, density, len(SCHEDULE.alpha) - 1)
    traced = jax.make_jaxpr(lambda run: sampler.advance(run, density, 32))(run)
    assert str(traced).count("digamma") == 1


def test_shares_of_modes_and_what_is_recorded():
    """Two narrow modes far apart, times a Gaussian."""
    target = cp.compile(
        both,
        cp.Analytic(modes([0.25, 0.75], [-1.0, 1.0], 0.1), SCHEDULE),
        normal(0.5, 1.0),
    )
    sampler = cp.ReplicaExchange(num_levels=8, sweeps=80)
    result = cp.infer(
        target,
        jax.random.key(0),
        num_chains=64,
        sampler=sampler,
        draws=60,
        progress=False,
    )
    means = np.array([-1.0, 1.0])
    masses = np.array([0.25, 0.75]) * np.exp(-0.5 * (means - 0.5) ** 2 / 1.01)
    exact = masses[1] / masses.sum()
    shares = np.mean(np.asarray(result["x"]) > 0, axis=1)
    assert abs(shares.mean() - exact) < LIMIT * shares.std(ddof=1) / 8
    assert result.status.ok
    assert result["x"].shape == (64, 60)
    assert result.levels["log_snr"].shape == (8,)
    assert result.levels["swaps"].shape == (8,)
    assert result.acceptance.shape == (8,)
    np.testing.assert_allclose(
        result.levels["log_snr"][[0, -1]],
        np.asarray(SCHEDULE.log_snr)[[0, -1]],
        atol=1e-4,
    )
    assert np.isnan(result.levels["swaps"][-1])
    assert np.all(result.levels["swaps"][:-1] > 0.1)
    assert result.about.round_trips > 1.0
    assert result.evaluations == (8 + 80 + 3 + 60) * 8 * 2
    assert f"{result.about.round_trips:.3g} round trips" in str(result.summary())


def test_ensembles_are_not_checked_for_chains_that_crossed():
    """The points of an ensemble, (L, D), taken for those of a chain, made a run end in
    an error of shapes."""
    law = modes([0.5, 0.5], [[-3.0, -3.0], [3.0, 3.0]], [0.3, 0.1])
    density = cp.compile(single, cp.Analytic(law, SCHEDULE) ** 2)
    sampler = cp.ReplicaExchange(num_levels=4, sweeps=4)
    result = cp.infer(
        density,
        jax.random.key(0),
        num_chains=20,
        sampler=sampler,
        draws=2,
        progress=False,
    )
    assert not result.status.has("shares_frozen")


@pytest.mark.parametrize("seed", [*range(4), *(slow(i) for i in range(4, 20))])
def test_rungs_are_different_levels_with_both_ends_among_them(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 12))
    levels = int(rng.integers(12, 40))
    wanted = np.sort(rng.integers(0, levels, count))
    distinct = np.asarray(distinct_levels(jnp.asarray(wanted, jnp.int32), levels))
    assert distinct[0] == 0
    assert distinct[-1] == levels - 1
    assert np.all(np.diff(distinct) > 0)


def test_refusals(density):
    for options in (
        {"swap": "weights"},
        {"num_levels": 1},
        {"sweeps": 3},
        {"kernel": cp.MALA(metric="full")},
    ):
        refused(lambda: cp.ReplicaExchange(**options), InvalidValueError)
    refused(lambda: cp.ReplicaExchange("mala"), WrongTypeError)
    score = cp.Diffusion(
        lambda x, t: -x,
        SCHEDULE,
        event_shape=(),
        parameterization="score",
        time="log_snr",
    )
    score_only = cp.compile(both, score, normal())

    def running(density, **options):
        sampler = cp.ReplicaExchange(**options)
        key = jax.random.key(0)
        return lambda: cp.infer(density, key, num_chains=4, sampler=sampler)

    refused(
        running(density, num_levels=40),
        InvalidValueError,
    )
    refused(running(score_only, swap="energy"), CapabilityError)
    refused(running(score_only), CapabilityError)
