"""What watches a run on its way down the levels: is it to be given up, and do its factors agree anywhere?"""

from __future__ import annotations

import time
import warnings
from typing import TYPE_CHECKING

import jax
import numpy as np

from composeprob import tuning
from composeprob.density.overlap import check, check_evaluations, in_question
from composeprob.results.status import fewest_families
from composeprob.runtime.progress import Report
from composeprob.runtime.record import Fold
from composeprob.samplers.spread import from_first_process

if TYPE_CHECKING:
    from composeprob.runtime.stages import State


class FewAncestors(Exception):
    """SMC's chains have become copies of few, at a level where something else can still be done."""

    def __init__(self, distinct: int, effective: float, level: int):
        super().__init__(f"{distinct} first ones, some so much more than others that they are worth {effective:.1f},")
        self.level = level


class GiveUp:
    """Raises `FewAncestors`, once the run is saved, where too few of the first chains have descendants."""

    def __call__(self, state: State, report: Report) -> None:
        visits = state.visits
        if not int(visits.made):
            return
        run, level = state.run, int(visits.visited()[-1])
        n, variance = len(run.ancestors), float(run.evidence_variance)
        effective = 1.0 / (variance * (n - 1) / n + 1 / n)
        if effective < fewest_families(n):
            if state.checkpoints is not None:
                state.checkpoints.finish(state)
            raise FewAncestors(int(np.asarray(run.records.ancestors)[level]), effective, level)


class PilotRun:
    """Sends a few chains ahead by `density.check`, once, if the run turns out to be long, and warns of what they find.

    The run's own samples answer the same question better, at its end and with nothing to compile but that. A run of
    seconds waits for them: compiling the pilot run would take as long as it does. How long a level takes is known
    after the second stretch, as the first one compiles. Samples do not depend on it. Where it would take more than
    `tuning.CHECKS.share` of the run's evaluations there is none.

    Args:
        state: of the run, prepared.
    """

    def __init__(self, state: State):
        density, first, visits = state.request.density, state.first, state.first + 1
        if state.request.pace is not None:
            visits = min(visits, tuning.CHECKS.fewest_chosen)
        evaluations = state.request.num_chains * state.sampler.evaluations(first, visits)
        self.began: tuple[float, int] | None = None
        most = tuning.CHECKS.share * evaluations
        self.due = first > 0 and in_question(density) and check_evaluations(density) <= most

    def __call__(self, state: State, report: Report) -> None:
        if not self.due or report.doing:
            return
        now, level = time.monotonic(), int(state.visits.visited()[-1])
        if self.began is None or level >= self.began[1]:
            self.began = now, level
            return
        began, above = self.began
        self.due = False
        (long,) = from_first_process(int(level * (now - began) / (above - level) >= tuning.CHECKS.long_seconds))
        if long:
            for finding in check(
                state.request.density, jax.random.fold_in(state.request.key, np.uint32(Fold.PILOT)), tuning.PILOT.chains
            ):
                warnings.warn(f"{finding.message} The run goes on; Ctrl-C ends it.", stacklevel=2)
