"""Renoising as a kernel at every level, and by one factor: invariance from exact draws,
mutants that must fail, costs, adapted heights and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob import tuning
from composeprob.errors import CapabilityError, InvalidValueError
from composeprob.samplers.layout import Layout
from composeprob.samplers.moves import Transitions
from composeprob.samplers.random import key_of, words_of
from composeprob.samplers.renoise import Renoising, Stop
from composeprob.samplers.renoise_kernel import RenoiseKernel
from refusals import refused
from sampling.test_renoise import (
    FINE,
    LEVELS,
    MEANS,
    SDS,
    SHARES,
    modes,
    score_of,
    scores,
    two_modes,
)
from sampling.test_renoise import moved as moved_at_target
from sampling_cases import (
    Calls,
    Counted,
    both,
    normal,
    run,
    single,
    squared,
)
from zscores import assert_agrees, assert_disagrees, z_scores

N = 4000
LEVEL = 4  # log-SNR 1.6 of 8 … −8


def noise(schedule, level):
    """The variance of the noise in y = x/α."""
    return float(schedule.sigma[level] / schedule.alpha[level]) ** 2


def draws(schedule, level, n=N, mean=None, sd=None):
    """Exact draws of y of the two modes under noise, times a Gaussian under the same
    noise if there is one."""
    s = noise(schedule, level)
    variance = SDS**2 + s
    shares = SHARES
    means = MEANS
    if mean is not None:
        other = sd**2 + s
        gap = (MEANS - mean) ** 2 / (variance + other)
        shares = SHARES * np.exp(-0.5 * gap) / np.sqrt(variance + other)
        shares = shares / shares.sum()
        means = (MEANS * other + mean * variance) / (variance + other)
        variance = variance * other / (variance + other)
    rng = np.random.default_rng(0)
    which = rng.choice(2, n, p=shares)
    return means[which] + np.sqrt(variance[which]) * rng.standard_normal(n)


def moved(density, kernel, y, level=LEVEL, number=8):
    """Return points after so many transitions of each chain at a level, and their mean
    acceptance."""
    moves = Transitions.resolved(kernel, 1, density)
    setting = (moves.untuned(len(y)), density.schedule.at(level))
    words, _ = words_of(jax.random.key(0), len(y))

    @jax.jit  # traced anew each time, so that mutants are seen
    def chains(words, points):
        def chain(words, v):
            evaluation = Layout.of_density(density).evaluate(density, v, level)
            particle = moves.start(words, v, evaluation)

            def move(i, carry):
                particle, total = carry
                key = key_of(words, i)
                particle, info = moves.step(density, True, setting, key, particle)
                return particle, total + info.acceptance[0]

            start = (particle, jnp.zeros(()))
            particle, total = jax.lax.fori_loop(0, number, move, start)
            return particle.position[0], total / number

        return jax.vmap(chain)(words, points)

    points = jnp.asarray(y, jnp.float32)[:, None]
    ends, acceptance = chains(jnp.asarray(words), points)
    return np.asarray(ends, float), float(np.mean(acceptance))


def fixed(height, factor=None):
    return RenoiseKernel(height, factor=factor)


def test_a_noisy_level_is_left_invariant_by_inexact_steps(monkeypatch):
    density = cp.compile(single, two_modes())
    y = draws(LEVELS, LEVEL)
    many = draws(LEVELS, LEVEL, n=400_000)
    ends, acceptance = moved(density, fixed(8.0), y)
    assert_agrees(scores(many, ends))
    assert 0.3 < acceptance < 0.98
    monkeypatch.setattr(Renoising, "log_edge", lambda *_: jnp.zeros(()))
    ends, _ = moved(density, fixed(8.0), y)
    assert_disagrees(scores(many, ends))


def product():
    return cp.compile(both, two_modes(), normal(0.5, 1.0, LEVELS))


@pytest.mark.parametrize("factor", ["f", "g"])
def test_steps_of_one_factor_leave_a_product_invariant(factor, monkeypatch):
    y = draws(LEVELS, LEVEL, mean=0.5, sd=1.0)
    many = draws(LEVELS, LEVEL, n=400_000, mean=0.5, sd=1.0)
    ends, acceptance = moved(product(), fixed(8.0, factor), y)
    assert_agrees(scores(many, ends))
    assert 0.1 < acceptance < 0.98
    monkeypatch.setattr(Renoising, "log_edge", lambda *_: jnp.zeros(()))
    ends, _ = moved(product(), fixed(8.0, factor), y)
    assert_disagrees(scores(many, ends))


FINER = cp.Schedule.log_snr(121, -8.0, 8.0)


def score_of_modes():
    """The noise of the two modes, as a network predicts it."""

    def network(x, log_snr):
        alpha = jnp.sqrt(jax.nn.sigmoid(log_snr))
        sigma = jnp.sqrt(jax.nn.sigmoid(-log_snr))
        total = (alpha * SDS) ** 2 + sigma**2
        away = x - alpha * MEANS
        logs = jnp.log(SHARES) - 0.5 * jnp.log(total) - 0.5 * away**2 / total
        return sigma * jnp.sum(jax.nn.softmax(logs) * away / total)

    return cp.Diffusion(
        network,
        FINER,
        event_shape=(),
        parameterization="epsilon",
        time="log_snr",
    )


def test_a_score_beside_a_log_density_is_weighed_by_that(monkeypatch):
    density = cp.compile(both, score_of_modes(), normal(0.5, 1.0, FINER))
    assert "energy" not in density.capabilities
    y = draws(FINER, 48, mean=0.5, sd=1.0)
    many = draws(FINER, 48, n=400_000, mean=0.5, sd=1.0)
    ends, acceptance = moved(density, fixed(1.0, "f"), y, level=48)
    assert_agrees(scores(many, ends))
    assert 0.2 < acceptance < 0.98
    stop = Renoising.stop

    def alone(self, v, rung):
        found: Stop = stop(self, v, rung)
        return found._replace(others=jnp.zeros(()))

    monkeypatch.setattr(Renoising, "stop", alone)
    ends, _ = moved(density, fixed(1.0, "f"), y, level=48)
    assert_disagrees(scores(many, ends))


def test_powers_of_scores_turn_along_constant_exponents():
    tracked = cp.compile(squared, score_of(-1.0, 0.8))
    assert tracked.tracks
    sd = np.sqrt((0.8**2 + noise(FINE, 0)) / 2)
    y = -1 + sd * np.random.default_rng(0).standard_normal(N)
    expected = {"mean": -1.0, "square": sd**2}

    def moments(y):
        return {"mean": y, "square": (y + 1) ** 2}

    fitted = cp.Renoise(2).adapt(y[:64, None].astype(np.float32), tracked)
    assert fitted.ladder.untracked is not None
    ends, acceptance = moved_at_target(tracked.untracked(), y, number=6)
    assert_agrees(z_scores(moments(ends), expected))
    assert 0.2 < acceptance < 0.95
    # The rate of growing exponents lacks what only chains with weights carry.
    ends, _ = moved_at_target(tracked, y, number=6)
    assert_disagrees(z_scores(moments(ends), expected))


def test_the_height_adapts_and_a_transition_costs_its_steps():
    calls = Calls()
    energy = cp.Energy(Counted(calls), LEVELS, event_shape=(2,))
    density = cp.compile(single, normal(jnp.zeros(2), 1.0, LEVELS) * energy)

    def counted(steps):
        calls.reset()
        sampler = cp.AnnealedMCMC(cp.Renoise(), steps)
        result = run(density, chains=32, sampler=sampler)
        return calls.run, result

    one, first = counted(1)
    two, second = counted(2)
    each = 2 * tuning.RENOISE.steps * density.num_levels
    assert second.evaluations - first.evaluations == each
    assert two - one == each
    # The noisiest level has no level above it, and its chains stay.
    heights = np.asarray(second.levels["step_size"])
    assert heights.max() <= tuning.RENOISE.highest * 1.001
    assert heights.max() > 2.0


def test_chains_that_all_begin_in_one_mode_cross():
    density = cp.compile(single, two_modes())
    sampler = cp.AnnealedMCMC(cp.Renoise(), 4)
    result = run(density, chains=1000, sampler=sampler)
    right = np.mean(result["x"] > 0)
    assert abs(right - 0.7) < 4 * np.sqrt(0.21 / 1000)
    assert "Renoise()" in result.about.sampler


def test_rungs_at_one_level_are_one_place():
    """Some rungs of a turn that is less than four levels above are the same."""
    levels = cp.Schedule.log_snr(30, -8.0, 8.0)
    density = cp.compile(single, cp.Analytic(modes(SHARES, MEANS, SDS), levels))
    # Above it there is one level more, so that three of five rungs are doubles.
    level = 28
    y = draws(levels, level)
    many = draws(levels, level, n=400_000)
    ends, acceptance = moved(density, fixed(0.5), y, level=level, number=2)
    assert_agrees(scores(many, ends))
    assert acceptance > 0.7


@cp.program
def beside(f):
    import numpyro

    z = cp.sample("z", dist.Normal(0.0, 1.0))
    x = cp.sample("x", f)
    numpyro.factor("w", -0.5 * (x - z) ** 2)


def test_it_moves_a_block_beside_other_kernels():
    density = cp.compile(beside, two_modes())
    kernel = cp.Gibbs({"x": cp.Renoise(), "z": cp.HMC(0.5)})
    result = run(density, chains=1000, sampler=cp.AnnealedMCMC(kernel, 3))
    # Without z the weight is N(x; 0, 2).
    gap = np.exp(-0.5 * MEANS**2 / (SDS**2 + 2)) / np.sqrt(SDS**2 + 2)
    share = SHARES * gap / np.sum(SHARES * gap)
    right = np.mean(result["x"] > 0)
    assert abs(right - share[1]) < 0.08
    assert result.acceptance.shape[1] == 2


@cp.program
def refusing(f, g):
    cp.sample("x", f * g)


def test_it_is_refused_in_words():
    scores_alone = cp.compile(refusing, score_of(0.0, 1.0), score_of(1.0, 1.0))
    values = cp.compile(refusing, two_modes(), normal(0.5, 1.0, LEVELS))
    latents = cp.compile(beside, two_modes())

    def run_with(density, kernel):
        sampler = cp.AnnealedMCMC(kernel, 1)
        run(density, sampler=sampler)

    unknown = cp.Renoise(factor="prior")
    refused(lambda: run_with(values, unknown), InvalidValueError, fix="factor")
    by_one = cp.Renoise(factor="f")
    refused(lambda: run_with(scores_alone, by_one), CapabilityError, facts="score")
    refused(lambda: run_with(latents, cp.Renoise()), CapabilityError, fix="Gibbs")
    refused(lambda: cp.SMC(cp.Renoise(7)), InvalidValueError, fix="steps_per_level=7")
    outside = cp.Renoise(levels=(20.0, 30.0))
    refused(lambda: run_with(values, outside), InvalidValueError)


def test_only_levels_in_the_range_are_turned_at():
    density = cp.compile(single, two_modes())
    kernel = RenoiseKernel(8.0, within=(-1.0, 1.0)).resolved(("x",), density)
    log_snr = np.asarray(LEVELS.log_snr)
    for level in (0, 3, 9):
        at = kernel.under(density, density.schedule.at(level))
        rungs = np.asarray(at.ladder(jnp.asarray(8.0)).levels)
        assert rungs[0] == level
        assert (np.diff(rungs) >= 0).all()
        if log_snr[level] < -1:
            assert (rungs == level).all()
        else:
            assert -1 <= log_snr[rungs[-1]] <= 1
