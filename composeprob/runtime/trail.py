"""Keeps where the chains are on their way down the levels, for `Result.descent`."""

from __future__ import annotations

import numpy as np

from composeprob.density.annealed import AnnealedDensity
from composeprob.errors import InvalidValueError
from composeprob.results.descent import Descent
from composeprob.runtime.compiled import read
from composeprob.samplers.base import Run, Sampler
from composeprob.samplers.spread import host


class Trail:
    """Frames of one run: before its first level, after every so many of them, and at level 0.

    Args:
        every: how many levels from one frame to the next.

    Raises:
        InvalidValueError: no whole number of at least 1.
    """

    def __init__(self, every: object):
        if not isinstance(every, (int, np.integer)) or isinstance(every, bool) or every < 1:
            raise InvalidValueError(
                f"keep_path must be a whole number of levels, at least 1; got {every!r}.",
                fix="pass 1 to keep every level.",
            )
        self.every = int(every)
        self.frames: list[tuple[int, np.ndarray, dict[str, np.ndarray]]] = []

    def at_most(self, size: int, made: int) -> int:
        """How many levels may be visited in a row after ``made`` of them, so that no frame is missed."""
        return min(size, self.every - made % self.every)

    def add(self, run: Run, sampler: Sampler, density: AnnealedDensity, first: int) -> None:
        """Keeps a frame, where one is due."""
        visits = host(run.visits)
        made = int(visits.made)
        if made % self.every and not visits.arrived:
            return
        level = int(visits.visited()[-1]) if made else first
        values = run.spread.cut(host(read(run.spread, density, sampler.positions(run))))
        self.frames.append((level, run.spread.cut(host(run.log_weights)), values))

    def descent(self, log_snr: np.ndarray) -> Descent | None:
        """All frames; None where there are none. ``log_snr`` is that of the density's levels."""
        if not self.frames:
            return None
        levels, log_weights, values = zip(*self.frames, strict=True)
        samples = {name: np.stack([each[name] for each in values]) for name in values[0]}
        return Descent(np.asarray(levels), log_snr[np.asarray(levels)], np.stack(log_weights), samples)
