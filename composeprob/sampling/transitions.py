"""Kernel transitions of all chains at one level, with step sizes adapted across chains."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from composeprob.density.evaluation import Target
from composeprob.kernels import Adaptive, Kernel, KernelState, adapt, mean_acceptance, resolve, scaled_step
from composeprob.sampling.base import Records
from composeprob.schedule import Schedule


class Transitions(eqx.Module):
    """A kernel with its number of transitions a level; numbers resolved for one schedule.

    Attributes:
        kernel: the kernel, its step size an array (K,) or `Adaptive`.
        count: transitions a level whose acceptance is recorded.
    """

    kernel: Kernel
    count: int = eqx.field(static=True)

    @classmethod
    def resolved(cls, kernel: Kernel, count: int, schedule: Schedule) -> Transitions:
        """Check the step sizes against the schedule, before anything is compiled."""
        steps = resolve(kernel.step_size, schedule, kernel)
        if not isinstance(kernel.step_size, Adaptive):
            is_step = lambda node: node is kernel.step_size  # noqa: E731
            kernel = eqx.tree_at(lambda k: k.step_size, kernel, steps, is_leaf=is_step)
        return cls(kernel, count)

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
        adaptive = self.kernel.step_size if isinstance(self.kernel.step_size, Adaptive) else None
        fixed = None if adaptive else self.kernel.step_size[level]  # type: ignore[index]
        warmup = self.total - self.count

        def transition(i: Array, carry: Any) -> Any:
            states, log_scale, acceptance, steps, non_finite = carry
            step_size = fixed if adaptive is None else scaled_step(log_scale, schedule.at(level).sigma, self.kernel)
            own = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
            states, info = jax.vmap(self.kernel.step, (0, 0, None, None))(own, states, target, step_size)
            mean = mean_acceptance(info.acceptance)
            counted = i >= warmup
            if adaptive is not None:
                moved = adapt(log_scale, mean, adaptive.target(self.kernel), adaptive.gain)
                log_scale = jnp.where(counted, log_scale, moved) if warmup else moved
            acceptance = acceptance + jnp.where(counted, mean, 0.0)
            steps = steps + jnp.where(counted, step_size, 0.0)
            return states, log_scale, acceptance, steps, non_finite + jnp.sum(info.non_finite, dtype=jnp.int32)

        zero = jnp.zeros(())
        start = (states, log_scale, zero, zero, jnp.zeros((), jnp.int32))
        states, log_scale, acceptance, steps, bad = jax.lax.fori_loop(0, self.total, transition, start)
        records = Records(
            records.acceptance.at[level].set(acceptance / self.count),
            records.step_size.at[level].set(steps / self.count),
            records.ess,
            records.non_finite.at[level].set(bad),
        )
        return states, log_scale, records
