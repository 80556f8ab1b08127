"""Probability that the run over every other level found, and this one did not."""

from __future__ import annotations

import math

from composeprob import tuning
from composeprob.findings import Code, Finding
from composeprob.results.checks.check import Check
from composeprob.results.ended import EndedRun


class MassMissing(Check):
    """Ask whether the run over every other level, which estimates the discretisation
    error, found far more probability than this run.

    Both have the same number of chains. A mode that one of them missed is missing in
    its evidence, and its means are those of the other modes.
    """

    code = Code.LEVELS_TOO_FEW
    withholds = True
    meaning = (
        "the run over every other level found more than e² times as much probability, "
        "so that this one misses most of it"
    )

    def ask(self, run: EndedRun) -> list[Finding]:
        return self.findings(run.trust.missing)

    def findings(self, missing: float) -> list[Finding]:
        """Findings on the nats by which log Z over every other level is greater."""
        if not missing > tuning.FINDINGS.levels_error:
            return []
        times = f"e^{missing:.2g}"
        if missing < 5:
            times = f"{math.exp(missing):.2g}"
        text = (
            f"The run over every other level found {times} times as much probability "
            f"as this one (log Z is greater by {missing:.2g}): this run misses most of "
            "it, such as a mode that few chains reach. Compile with more levels "
            "(schedule=), or try more chains."
        )
        return [self.finding(text)]
