"""Few chains without weights, of factors whose log-densities only weights know."""

from __future__ import annotations

import math

from composeprob import tuning
from composeprob.findings import Code, Finding
from composeprob.results.checks.check import Check, Need
from composeprob.results.ended import EndedRun


class FewUntracked(Check):
    """Ask whether independent chains of powers or quotients of learned factors are so
    few that all of them may have missed a mode.

    A chain chooses its mode where noise is wide, and the exponent counts there as it
    does at level 0. That makes light modes lighter, and narrow ones, whose height only
    little noise shows, lighter still. Barriers are found between chains alone, so that
    no check sees a mode without any.
    """

    code = Code.MODES_UNREACHED
    withholds = True
    meaning = (
        "fewer than 16 chains of a power or quotient of learned factors have no "
        "weights, and may all have missed a mode"
    )
    needs = frozenset({Need.LEVEL_0})
    unless_said = True

    def ask(self, run: EndedRun) -> list[Finding]:
        fewest = tuning.MANY_CHAINS.tracked
        # Replicas come from the noisiest level again and again.
        swapped = not math.isnan(run.trust.round_trips)
        if swapped or not run.untracked or run.num_chains >= fewest:
            return []
        text = (
            f"The {run.num_chains} chains have no weights, and the modes of a power or "
            "quotient of learned factors have another share at level 0 than where the "
            "chains chose theirs. So few may all have missed a mode. Try num_chains="
            f"{fewest}, which are weighted by default."
        )
        return [self.finding(text)]
