"""What kernels share that move by another kernel: on a part of the sites, or in other coordinates."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import equinox as eqx

from composeprob.kernels.base import Kernel, State


class Wrapper(Kernel[State]):
    """A kernel around another one, whose step sizes, blocks and costs are its own.

    Attributes:
        kernel: what moves.
    """

    step_size: None = eqx.field(default=None, init=False)  # type: ignore[assignment]
    kernel: Kernel

    @property
    def requires(self) -> frozenset[str]:
        return self.kernel.requires

    @property
    def evaluations_per_step(self) -> int:
        return self.kernel.evaluations_per_step

    @property
    def integrates_score(self) -> bool:
        return self.kernel.integrates_score

    @property
    def blocks(self) -> tuple[tuple[str, ...], ...]:
        return self.kernel.blocks

    @property
    def parts(self) -> tuple[Kernel, ...]:
        return self.kernel.parts

    @property
    def optimal_acceptance(self) -> float | None:
        return self.kernel.optimal_acceptance

    @property
    def scale_exponent(self) -> int:
        return self.kernel.scale_exponent

    @property
    def reversal(self) -> Self:
        return dataclasses.replace(self, kernel=self.kernel.reversal)

    def with_steps(self, steps: Sequence[Any]) -> Self:
        return dataclasses.replace(self, kernel=self.kernel.with_steps(steps))
