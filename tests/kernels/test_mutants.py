"""Negative controls: each known defect, planted in the real kernel, must fail the check
that the real one passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import log_ndtr

from composeprob.kernels import HMC, MALA, KernelState, LineIntegral
from composeprob.kernels import hamiltonian as hmc_module
from composeprob.kernels.langevin import log_proposal_ratio
from composeprob.kernels.metropolis import metropolis
from composeprob.samplers.funnels import SelfTuning
from kernel_chains import from_exact_draws, start, transitions
from sampling_cases import slow
from targets import evaluate, two_modes
from zscores import assert_agrees, assert_disagrees, z_scores


class WrongRatioMALA(MALA):
    """Accepts by the ratio that a mutant states."""

    def finish(self, trajectory, evaluation):
        state = trajectory.start
        new = KernelState(trajectory.position, evaluation)
        log_ratio = self.wrong_ratio(state, new, trajectory.step_size)
        return metropolis(log_ndtr(trajectory.spare_noise[0]), log_ratio, new, state)


def target_ratio(state, new):
    return new.evaluation.log_density - state.evaluation.log_density


class NoHastingsMALA(WrongRatioMALA):
    """The target's ratio alone, as if the proposal were symmetric."""

    def wrong_ratio(self, state, new, h):
        return target_ratio(state, new)


class WrongVarianceMALA(WrongRatioMALA):
    """The proposal's variance 2h taken for h² in the ratio: squares over 2·h² where 4·h
    belongs."""

    def wrong_ratio(self, state, new, h):
        x = state.position
        y = new.position
        forth = jnp.sum((y - x - h * state.evaluation.score) ** 2)
        back = jnp.sum((x - y - h * new.evaluation.score) ** 2)
        return target_ratio(state, new) + (forth - back) / (2 * h**2)


class HalfMetricMALA(WrongRatioMALA):
    """Proposes in a metric and accepts as if there were none."""

    def wrong_ratio(self, state, new, h):
        return target_ratio(state, new) + log_proposal_ratio(state, new, h)


class UnadjustedMALA(WrongRatioMALA):
    """Accepts always: the ULA that calls itself MALA."""

    def wrong_ratio(self, state, new, h):
        return jnp.asarray(1e6)


class DriftMetricMALA(MALA):
    """Takes the metric for the drift and not for the noise."""

    def propose(self, noise, state, step_size):
        drift = self.metric.forth(self.metric.back(state.evaluation.score))
        return state.position + step_size * drift + jnp.sqrt(2 * step_size) * noise


class SharedNoiseMALA(MALA):
    """One scalar noise for the whole vector."""

    def propose(self, noise, state, step_size):
        return super().propose(jnp.full_like(noise, noise[0]), state, step_size)


class DoubledNoiseMALA(MALA):
    """Noise of 2h where √(2h) belongs."""

    def propose(self, noise, state, step_size):
        drift = step_size * state.evaluation.score
        return state.position + drift + 2 * step_size * noise


class SharedNoiseHMC(HMC):
    """One scalar noise for the whole momentum."""

    def begin(self, noise, state, step_size):
        return super().begin(noise.at[:2].set(noise[0]), state, step_size)


class UncorrectedSteps(SelfTuning):
    """Steps whose law depends on the position, accepted as if it did not."""

    def log_step_ratio(self, trajectory, proposed):
        return 0.0


class Stale:
    """Keeps what it cached when the level changes."""

    def relevel(self, state, target):
        return state


class StaleMALA(Stale, MALA):
    pass


class StaleHMC(Stale, HMC):
    pass


LAW = two_modes(2)


def check(kernel):
    """Make the check of test_invariance.py, shorter: still enough to find every mutant
    by a wide margin."""
    return from_exact_draws(
        kernel, LAW, num_chains=5_000, num_transitions=40, num_draws=10
    )


BY_SCORE = LineIntegral(9, "simpson")
MATRIX = np.array([[1.5, 0.8], [0.8, 0.7]])
REAL = (
    MALA(0.15),
    HMC(0.6),
    MALA(0.2, metric=MATRIX),
    HMC(0.6, metric=MATRIX),
    SelfTuning(0.5),
    SelfTuning(0.5, log_ratio=BY_SCORE),
)
"""Like those of test_invariance.py they move, at steps at which some proposals are
rejected."""


@pytest.mark.parametrize("kernel", REAL, ids=repr)
def test_the_real_kernels_pass(kernel):
    run = check(kernel)
    assert_agrees(run.scores)
    assert run.moved > 0.3
    assert 0.3 < run.acceptance < 0.95


MALAS = (
    NoHastingsMALA,
    WrongVarianceMALA,
    SharedNoiseMALA,
    DoubledNoiseMALA,
    UnadjustedMALA,
)
MUTANTS = (
    *(mutant(0.15) for mutant in MALAS),
    *(mutant(0.2, metric=MATRIX) for mutant in (HalfMetricMALA, DriftMetricMALA)),
    SharedNoiseHMC(0.6),
    UncorrectedSteps(0.5),
    UncorrectedSteps(0.5, log_ratio=BY_SCORE),
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: type(mutant).__name__)
def test_mutants_fail(mutant):
    assert_disagrees(check(mutant).scores)


def test_hmc_without_kinetic_term_fails(monkeypatch):
    kernel = HMC(0.6)
    monkeypatch.setattr(
        hmc_module, "log_joint", lambda state: state.evaluation.log_density
    )
    assert_disagrees(check(kernel).scores)


def test_hmc_without_momentum_flip_fails(monkeypatch):
    kernel = HMC(0.7, num_leapfrog=2, damping=0.9)
    assert_agrees(check(kernel).scores)
    monkeypatch.setattr(hmc_module, "flip", lambda state: state)
    assert_disagrees(check(kernel).scores)


def relevelled(kernel):
    """Return z-scores after chains that are exact draws of a level arrive from a wider
    one and make a few transitions."""
    wide = evaluate(two_modes(2, sds=(0.9, 0.8)).log_density)
    narrow = evaluate(LAW.log_density)
    key_draw, key_init, key_run = jax.random.split(jax.random.key(5), 3)
    states = start(kernel, wide, key_init, LAW.draw(key_draw, 10_000))
    states = jax.jit(jax.vmap(lambda state: kernel.relevel(state, narrow)))(states)
    states, _ = transitions(kernel, narrow, key_run, states, kernel.step_size, 2)
    return z_scores(jax.jit(jax.vmap(LAW.statistics))(states.position), LAW.expected)


@pytest.mark.parametrize(
    ("real", "stale"),
    [(MALA(0.15), StaleMALA(0.15)), slow(HMC(0.5), StaleHMC(0.5))],
    ids=repr,
)
def test_a_stale_cache_after_a_change_of_level_fails(real, stale):
    assert_agrees(relevelled(real))
    assert_disagrees(relevelled(stale))
