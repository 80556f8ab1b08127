"""Regions that hold another share of the chains than of importance samples."""

from __future__ import annotations

from composeprob.findings import Code, Finding
from composeprob.results.checks.modes_unreached import ByImportance
from composeprob.results.ended import EndedRun


class SharesByImportance(ByImportance):
    """Ask whether regions have the shares that importance samples estimate."""

    code = Code.SHARES_FROZEN
    withholds = True
    meaning = (
        "a region holds another share of the chains than importance samples estimate"
    )
    unless_said = True

    def ask(self, run: EndedRun) -> list[Finding]:
        text = self.unlike(run).shares
        return [self.finding(text)] if text else []
