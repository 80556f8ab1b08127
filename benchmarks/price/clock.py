"""Times of programs that take turns, so that whatever else the machine does hits all of
them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

CLOCKS: dict[str, Callable[[], float]] = {
    "wall": time.perf_counter,
    "processor": time.process_time,
}
"""Seconds that pass, and seconds in which this process computes: the same on an idle
machine of one core; on a busy one only the second tells what a program costs."""


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one program: one number a repeat, divided by what the program did."""

    seconds: np.ndarray

    @property
    def median(self) -> float:
        """Their median."""
        return float(np.median(self.seconds))


def alternate(
    programs: dict[str, tuple[Callable[[], Any], float]], repeats: int, clock: str
) -> dict[str, Times]:
    """Run every program once to compile it, then all of them in turn, forwards and
    backwards.

    Args:
        programs: ``{name: (program, units)}``: a program returns arrays, which are
            waited for; units are how many transitions (or evaluations) it makes.
        repeats: how many times each is measured.
        clock: a name in `CLOCKS`.
    """
    now = CLOCKS[clock]
    for program, _ in programs.values():
        jax.block_until_ready(program())
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for repeat in range(repeats):
        for name in list(programs)[:: 1 if repeat % 2 == 0 else -1]:
            program, units = programs[name]
            began = now()
            jax.block_until_ready(program())
            seconds[name].append((now() - began) / units)
    return {name: Times(np.asarray(values)) for name, values in seconds.items()}


def ratio(one: Times, other: Times) -> tuple[float, float]:
    """The ratio of two medians, and its standard error from the scatter of the repeats'
    own ratios.

    The error is that of a median, 1.25·s/√n, with s a robust standard deviation (1.48
    median absolute deviations).
    """
    own = one.seconds / other.seconds
    spread = 1.4826 * np.median(np.abs(own - np.median(own)))
    return one.median / other.median, float(1.2533 * spread / np.sqrt(len(own)))
