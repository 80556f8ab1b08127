"""Negative controls: each known defect, planted in the real kernel, must fail the check that the real one passes."""

import jax
import jax.numpy as jnp
import pytest
from jax.scipy.special import log_ndtr

from composeprob.kernels import HMC, MALA, KernelState
from composeprob.kernels import hamiltonian as hmc_module
from composeprob.kernels.metropolis import metropolis
from kernel_chains import from_exact_draws, start, transitions
from sampling_cases import slow
from targets import evaluate, two_modes
from zscores import assert_agrees, assert_disagrees, z_scores


class WrongVarianceMALA(MALA):
    """The proposal's variance 2h taken for h² in the ratio: 2·ss² where 4·ss belongs."""

    def finish(self, trajectory, evaluation):
        state, new, h = trajectory.start, KernelState(trajectory.position, evaluation), trajectory.step_size
        x, s, y, t = state.position, state.evaluation.score, new.position, new.evaluation.score
        forth, back = jnp.sum((y - x - h * s) ** 2), jnp.sum((x - y - h * t) ** 2)
        log_ratio = new.evaluation.log_density - state.evaluation.log_density
        log_uniform = log_ndtr(trajectory.spare_noise[0])
        return metropolis(log_uniform, log_ratio + (forth - back) / (2 * h**2), new, state)


class NoHastingsMALA(MALA):
    """The target's ratio alone, as if the proposal were symmetric."""

    def finish(self, trajectory, evaluation):
        state, new = trajectory.start, KernelState(trajectory.position, evaluation)
        log_ratio = new.evaluation.log_density - state.evaluation.log_density
        return metropolis(log_ndtr(trajectory.spare_noise[0]), log_ratio, new, state)


class SharedNoiseMALA(MALA):
    """One scalar noise for the whole vector."""

    def propose(self, noise, state, step_size):
        return super().propose(jnp.full_like(noise, noise[0]), state, step_size)


class DoubledNoiseMALA(MALA):
    """Noise of 2h where √(2h) belongs."""

    def propose(self, noise, state, step_size):
        return state.position + step_size * state.evaluation.score + 2 * step_size * noise


class UnadjustedMALA(MALA):
    """Accepts always: the ULA that calls itself MALA."""

    def finish(self, trajectory, evaluation):
        new = KernelState(trajectory.position, evaluation)
        return metropolis(jnp.asarray(-1.0), jnp.zeros(()), new, trajectory.start)


class SharedNoiseHMC(HMC):
    """One scalar noise for the whole momentum."""

    def begin(self, noise, state, step_size):
        return super().begin(noise.at[:2].set(noise[0]), state, step_size)


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
    """The check of test_invariance.py, shorter: still enough to find every mutant by a wide margin."""
    return from_exact_draws(kernel, LAW, num_chains=5_000, num_transitions=40, num_draws=10)


@pytest.mark.parametrize("kernel", [MALA(0.15), HMC(0.6)], ids=repr)
def test_the_real_kernels_pass(kernel):
    assert_agrees(check(kernel).scores)


MUTANTS = WrongVarianceMALA, NoHastingsMALA, SharedNoiseMALA, DoubledNoiseMALA, UnadjustedMALA, SharedNoiseHMC


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_fail(mutant):
    assert_disagrees(check(mutant(0.15 if issubclass(mutant, MALA) else 0.6)).scores)


def test_hmc_without_kinetic_term_fails(monkeypatch):
    kernel = HMC(0.6)
    monkeypatch.setattr(hmc_module, "log_joint", lambda state: state.evaluation.log_density)
    assert_disagrees(check(kernel).scores)


def test_hmc_without_momentum_flip_fails(monkeypatch):
    kernel = HMC(0.7, num_leapfrog=2, damping=0.9)
    assert_agrees(check(kernel).scores)
    monkeypatch.setattr(hmc_module, "flip", lambda state: state)
    assert_disagrees(check(kernel).scores)


def relevelled(kernel):
    """z-scores after chains that are exact draws of a level arrive from a wider one and make a few transitions."""
    wide, narrow = evaluate(two_modes(2, sds=(0.9, 0.8)).log_density), evaluate(LAW.log_density)
    key_draw, key_init, key_run = jax.random.split(jax.random.key(5), 3)
    states = start(kernel, wide, key_init, LAW.draw(key_draw, 10_000))
    states = jax.jit(jax.vmap(lambda state: kernel.relevel(state, narrow)))(states)
    states, _ = transitions(kernel, narrow, key_run, states, kernel.step_size, 2)
    return z_scores(jax.jit(jax.vmap(LAW.statistics))(states.position), LAW.expected)


@pytest.mark.parametrize(("real", "stale"), [(MALA(0.15), StaleMALA(0.15)), slow(HMC(0.5), StaleHMC(0.5))], ids=repr)
def test_a_stale_cache_after_a_change_of_level_fails(real, stale):
    assert_agrees(relevelled(real))
    assert_disagrees(relevelled(stale))
