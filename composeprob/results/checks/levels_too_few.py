"""Levels that are too far apart for the evidence."""

from __future__ import annotations

from composeprob import tuning
from composeprob.findings import Code, Finding
from composeprob.results.checks.check import Check
from composeprob.results.ended import EndedRun


class LevelsTooFew(Check):
    """Ask whether the discretisation error of the log-evidence is large."""

    code = Code.LEVELS_TOO_FEW
    withholds = False  # it concerns the evidence alone, whose error has it
    unless_said = True
    meaning = "the discretisation error of log Z is more than 2 nats"

    def ask(self, run: EndedRun) -> list[Finding]:
        return self.findings(run.trust.discretisation)

    def findings(self, error: float) -> list[Finding]:
        """Findings on a discretisation error in nats."""
        if not error > tuning.FINDINGS.levels_error:
            return []
        text = (
            f"The discretisation error of log Z is about {error:.2g} (estimated by "
            "using every other level). Compile with more levels (schedule=)."
        )
        return [self.finding(text)]
