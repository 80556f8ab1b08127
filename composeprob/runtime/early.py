"""A warning early in a long run: whether the factors agree anywhere, asked before the run's own chains can tell."""

from __future__ import annotations

import time
import warnings

import jax
from jax import Array

from composeprob.density.annealed import AnnealedDensity
from composeprob.density.overlap import PILOTS, check, check_evaluations, in_question
from composeprob.samplers.base import Run
from composeprob.samplers.spread import agreed

EARLY = 2**31 - 8
"""Folded into the run's key for the chains that are sent ahead."""
LONG = 60.0
"""Seconds that a run must have before it, for its user to be better told now than at its end."""


class Early:
    """Called with the run after each stretch of levels: asks `density.check` once, if the run turns out to be long.

    The run's own samples answer the same question better, at its end and with nothing to compile but that. A run of
    seconds waits for them: compiling the chains that are sent ahead would take as long as it does. How long a level
    takes is known after the second stretch, as the first one compiles. Samples do not depend on it.

    Args:
        density: of the run.
        key: of the run.
        first: the level where its chains start.
        evaluations: of the composed density, over all chains and levels.
        share: of them that asking may take; where it would take more nothing is asked.
    """

    def __init__(self, density: AnnealedDensity, key: Array, first: int, evaluations: int, share: float):
        self.density, self.key = density, key
        self.seen: tuple[float, int] | None = None
        self.due = first > 0 and in_question(density) and check_evaluations(density) <= share * evaluations

    def __call__(self, run: Run) -> None:
        if not self.due or not int(run.visits.made):
            return
        now, level = time.monotonic(), int(run.visits.visited()[-1])
        if self.seen is None or level >= self.seen[1]:
            self.seen = now, level
            return
        began, above = self.seen
        self.due = False
        (long,) = agreed(int(level * (now - began) / (above - level) >= LONG))
        if long:
            for finding in check(self.density, jax.random.fold_in(self.key, EARLY), PILOTS):
                warnings.warn(f"{finding.message} The run goes on; Ctrl-C ends it.", stacklevel=2)
