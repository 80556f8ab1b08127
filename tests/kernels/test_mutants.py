"""Negative controls: each known defect, planted in the real kernel, must fail the check that the real one passes."""

import jax
import jax.numpy as jnp
import pytest

from composeprob import pytree
from composeprob.kernels import HMC, MALA, KernelState
from composeprob.kernels import hmc as hmc_module
from composeprob.kernels.metropolis import metropolis
from kernel_chains import from_exact_draws, start, transitions
from targets import evaluate, two_modes
from zscores import assert_agrees, assert_disagrees, z_scores


class WrongVarianceMALA(MALA):
    """The proposal's variance 2h taken for h² in the ratio: 2·ss² where 4·ss belongs."""

    def step(self, key, state, target, step_size):
        key_propose, key_accept = jax.random.split(key)
        new = self.propose(key_propose, state, target, step_size)
        x, s, y, t = state.position, state.evaluation.score, new.position, new.evaluation.score
        forth, back = jnp.sum((y - x - step_size * s) ** 2), jnp.sum((x - y - step_size * t) ** 2)
        log_ratio = new.evaluation.log_density - state.evaluation.log_density
        return metropolis(key_accept, log_ratio + (forth - back) / (2 * step_size**2), new, state)


class NoHastingsMALA(MALA):
    """The target's ratio alone, as if the proposal were symmetric."""

    def step(self, key, state, target, step_size):
        key_propose, key_accept = jax.random.split(key)
        new = self.propose(key_propose, state, target, step_size)
        return metropolis(key_accept, new.evaluation.log_density - state.evaluation.log_density, new, state)


class SharedNoiseMALA(MALA):
    """One scalar noise for the whole vector."""

    def propose(self, key, state, target, step_size):
        drifted = pytree.axpy(step_size, state.evaluation.score, state.position)
        position = drifted + jnp.sqrt(2 * step_size) * jax.random.normal(key)
        return KernelState(position, target(position))


class DoubledNoiseMALA(MALA):
    """Noise of 2h where √(2h) belongs."""

    def propose(self, key, state, target, step_size):
        noise = pytree.normal_like(key, state.position)
        position = state.position + step_size * state.evaluation.score + 2 * step_size * noise
        return KernelState(position, target(position))


class UnadjustedMALA(MALA):
    """Accepts always: the ULA that calls itself MALA."""

    def step(self, key, state, target, step_size):
        key_propose, key_accept = jax.random.split(key)
        return metropolis(key_accept, jnp.zeros(()), self.propose(key_propose, state, target, step_size), state)


class StaleMALA(MALA):
    """Keeps what it cached when the level changes."""

    def relevel(self, state, target):
        return state


class StaleHMC(HMC):
    """Keeps what it cached when the level changes."""

    def relevel(self, state, target):
        return state


LAW = two_modes(2)


def check(kernel):
    """The check of test_invariance.py, shorter: still enough to find every mutant by a wide margin."""
    return from_exact_draws(kernel, LAW, num_chains=5_000, num_transitions=40, num_draws=10)


@pytest.mark.parametrize("kernel", [MALA(0.15), HMC(0.6)], ids=repr)
def test_the_real_kernels_pass(kernel):
    assert_agrees(check(kernel).scores)


@pytest.mark.parametrize(
    "mutant",
    [WrongVarianceMALA(0.15), NoHastingsMALA(0.15), SharedNoiseMALA(0.15), DoubledNoiseMALA(0.15),
     UnadjustedMALA(0.15)],
    ids=lambda m: type(m).__name__,
)  # fmt: skip
def test_mutants_of_mala_fail(mutant):
    assert_disagrees(check(mutant).scores)


def test_hmc_without_kinetic_term_fails(monkeypatch):
    kernel = HMC(0.6)
    monkeypatch.setattr(hmc_module, "log_joint", lambda state: state.evaluation.log_density)
    assert_disagrees(check(kernel).scores)


def test_hmc_without_momentum_flip_fails(monkeypatch):
    kernel = HMC(0.7, num_leapfrog=2, damping=0.9)
    assert_agrees(check(kernel).scores)
    monkeypatch.setattr(hmc_module, "flip", lambda state: state)
    assert_disagrees(check(kernel).scores)


def test_hmc_with_one_noise_for_all_elements_fails(monkeypatch):
    monkeypatch.setattr(
        pytree, "normal_like", lambda key, x: jax.tree.map(lambda leaf: jax.random.normal(key) + 0 * leaf, x)
    )
    assert_disagrees(check(HMC(0.6)).scores)


def relevelled(kernel):
    """z-scores after chains that are exact draws of a level arrive from a wider one and make a few transitions."""
    wide, narrow = evaluate(two_modes(2, sds=(0.9, 0.8)).log_density), evaluate(LAW.log_density)
    key_draw, key_init, key_run = jax.random.split(jax.random.key(5), 3)
    states = start(kernel, wide, key_init, LAW.draw(key_draw, 10_000))
    states = jax.jit(jax.vmap(lambda state: kernel.relevel(state, narrow)))(states)
    states, _ = transitions(kernel, narrow, key_run, states, kernel.step_size, 2)
    return z_scores(jax.jit(jax.vmap(LAW.statistics))(states.position), LAW.expected)


@pytest.mark.parametrize(
    ("real", "stale"),
    [(MALA(0.15), StaleMALA(0.15)), pytest.param(HMC(0.5), StaleHMC(0.5), marks=pytest.mark.slow)],
    ids=repr,
)
def test_a_stale_cache_after_a_change_of_level_fails(real, stale):
    assert_agrees(relevelled(real))
    assert_disagrees(relevelled(stale))
