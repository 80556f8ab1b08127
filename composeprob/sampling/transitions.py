"""Kernel transitions of all chains at one level, with step sizes adapted across chains."""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Evaluation, Target
from composeprob.kernels import Adaptive, Kernel, KernelState, adapt, mean_acceptance, resolve, scaled_step
from composeprob.sampling.base import Records
from composeprob.schedule import Schedule

FEW = 16
"""Number of chains at which the gain of adaptation is halved."""


def rescaled(state: KernelState, static: frozenset[str], unit: Array) -> KernelState:
    """The same chain with its static sites measured in ``unit``: z → z/unit, ∇_z → unit·∇_z.

    Noised sites live at the level's scale σ_k, static ones at a scale that does not change with the level. A step
    h_k ∝ σ_k^p suits both when static sites are measured in units of 1/σ_k.
    """
    if not static:
        return state
    position = {name: x / unit if name in static else x for name, x in state.position.items()}
    evaluation = in_units(state.evaluation, static, unit)
    return dataclasses.replace(state, position=position, evaluation=evaluation)


def in_units(evaluation: Evaluation, static: frozenset[str], unit: Array) -> Evaluation:
    """The evaluation with the scores of static sites per ``unit``."""
    score = {name: s * unit if name in static else s for name, s in evaluation.score.items()}
    return dataclasses.replace(evaluation, score=score)


class Transitions(eqx.Module):
    """A kernel with its number of transitions a level; numbers resolved for one schedule.

    Attributes:
        kernel: the kernel, its step size an array (K,) or `Adaptive`.
        count: transitions a level whose acceptance is recorded.
        static: static sites whose step does not shrink with the level's noise; empty where the user gave step sizes.
    """

    kernel: Kernel
    count: int = eqx.field(static=True)
    static: frozenset[str] = eqx.field(static=True)

    @classmethod
    def resolved(cls, kernel: Kernel, count: int, density: AnnealedDensity) -> Transitions:
        """Check the step sizes against the schedule, before anything is compiled."""
        steps = resolve(kernel.step_size, density.schedule, kernel)
        static: frozenset[str] = frozenset()
        if not isinstance(kernel.step_size, Adaptive):
            is_step = lambda node: node is kernel.step_size  # noqa: E731
            kernel = eqx.tree_at(lambda k: k.step_size, kernel, steps, is_leaf=is_step)
        else:
            static = frozenset(name for name, site in density.sites.items() if site.kind == "static")
        return cls(kernel, count, static)

    @property
    def total(self) -> int:
        """Transitions a level, adapting ones included."""
        step_size = self.kernel.step_size
        return self.count + (step_size.warmup if isinstance(step_size, Adaptive) else 0)

    @property
    def evaluations(self) -> int:
        """Evaluations a level and chain of `run`."""
        return self.total * self.kernel.evaluations_per_step

    def first_log_scale(self) -> Array:
        """log c where the run starts."""
        step_size = self.kernel.step_size
        return step_size.log_scale if isinstance(step_size, Adaptive) else jnp.zeros(())

    def run(
        self,
        keys: Array,
        states: KernelState,
        target: Target,
        schedule: Schedule,
        level: Array,
        log_scale: Array,
        records: Records,
    ) -> tuple[KernelState, Array, Records]:
        """All transitions of one level.

        Args:
            keys: this level's key of every chain, (N,).
            states: every chain's state, evaluated under ``target``.
            target: the level's density.
            schedule, level: where we are.
            log_scale: log c as the neighbouring level left it.
            records: written at ``level``.
        """
        sigma, n = schedule.at(level).sigma, keys.shape[0]
        unit, warmup = 1.0 / sigma, self.total - self.count

        def scaled_target(position: Any) -> Evaluation:
            if not self.static:
                return target(position)
            own = {name: u * unit if name in self.static else u for name, u in position.items()}
            return in_units(target(own), self.static, unit)

        def transition(i: Array, carry: Any) -> Any:
            states, log_scale, acceptance, steps, non_finite, error = carry
            rule: Any = self.kernel.step_size
            adaptive = isinstance(rule, Adaptive)
            step_size = scaled_step(log_scale, sigma, self.kernel) if adaptive else rule[level]
            own = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
            states, info = jax.vmap(self.kernel.step, (0, 0, None, None))(own, states, scaled_target, step_size)
            mean = mean_acceptance(info.acceptance)
            counted = i >= warmup
            if adaptive:
                gain = rule.gain * n / (n + FEW)  # the mean of few chains is mostly noise
                moved = adapt(log_scale, mean, rule.target(self.kernel), gain)
                log_scale = jnp.where(counted, log_scale, moved) if warmup else moved
            acceptance = acceptance + jnp.where(counted, mean, 0.0)
            steps = steps + jnp.where(counted, step_size, 0.0)
            # Weighted by the acceptance: the mean over accepted moves, without the noise of which were accepted.
            errors = jnp.where(info.acceptance > 0, info.acceptance * info.quadrature_error, 0.0)
            error = error + jnp.where(counted, jnp.mean(errors), 0.0)
            return states, log_scale, acceptance, steps, non_finite + jnp.sum(info.non_finite, dtype=jnp.int32), error

        zero = jnp.zeros(())
        states = rescaled(states, self.static, unit)
        start = (states, log_scale, zero, zero, jnp.zeros((), jnp.int32), zero)
        states, log_scale, acceptance, steps, bad, error = jax.lax.fori_loop(0, self.total, transition, start)
        states = rescaled(states, self.static, 1.0 / unit)
        records = Records(
            records.acceptance.at[level].set(acceptance / self.count),
            records.step_size.at[level].set(steps / self.count),
            records.ess,
            records.non_finite.at[level].add(bad),
            records.quadrature_error.at[level].set(error / acceptance),
        )
        return states, log_scale, records
