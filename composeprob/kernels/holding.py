"""Any kernel on a part of the position: the other sites are held where they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import equinox as eqx
import jax.numpy as jnp
from jax import Array

from composeprob.density.evaluation import Evaluation, Position, Target
from composeprob.kernels.base import Info, KernelState
from composeprob.kernels.wrapper import Wrapper


class HeldState(KernelState):
    """The whole position and its evaluation, and the state of the kernel that moves a part of it."""

    inner: KernelState


class Holding(Wrapper[HeldState]):
    """Moves the other sites by a kernel; it leaves π(x | held) invariant, and what is held has the law it came with.

    Samplers use it for latents that the normaliser of a factor depends on, which must keep their prior draws.

    Args:
        kernel: moves the other sites.
        held: names of the sites that stay.
    """

    held: frozenset[str] = eqx.field(static=True)

    def __repr__(self) -> str:
        return repr(self.kernel)

    def check_sites(self, names: Iterable[str]) -> None:
        self.kernel.check_sites([name for name in names if name not in self.held])

    def init(self, key: Array, position: Position, target: Target) -> HeldState:
        return self._whole(self.kernel.init(key, self._free(position), self._part(target, position)), position)

    def relevel(self, state: HeldState, target: Target) -> HeldState:
        return self._whole(self.kernel.relevel(self._inner(state), self._part(target, state.position)), state.position)

    def step(self, key: Array, state: HeldState, target: Target, step_size: Array) -> tuple[HeldState, Info]:
        part = self._part(target, state.position)
        inner, info = self.kernel.step(key, self._inner(state), part, step_size)
        return self._whole(inner, state.position), info

    def _free(self, values: Position) -> Position:
        return {name: value for name, value in values.items() if name not in self.held}

    def _free_evaluation(self, evaluation: Evaluation) -> Evaluation:
        return dataclasses.replace(evaluation, score=self._free(evaluation.score))

    def _part(self, target: Target, position: Position) -> Target:
        """The density of the other sites, given those held."""
        held = {name: position[name] for name in self.held}
        return lambda free: self._free_evaluation(target({**free, **held}))

    def _inner(self, state: HeldState) -> KernelState:
        """The inner kernel's state where the whole one is now: a driver may have moved it."""
        evaluation = self._free_evaluation(state.evaluation)
        return dataclasses.replace(state.inner, position=self._free(state.position), evaluation=evaluation)

    def _whole(self, inner: KernelState, position: Position) -> HeldState:
        held = {name: position[name] for name in self.held}
        still = {name: jnp.zeros_like(value) for name, value in held.items()}
        evaluation = dataclasses.replace(inner.evaluation, score={**inner.evaluation.score, **still})
        return HeldState({**inner.position, **held}, evaluation, inner)
