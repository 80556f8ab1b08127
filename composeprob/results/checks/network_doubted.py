"""Networks that the compiler doubted."""

from __future__ import annotations

from composeprob.findings import Code, Finding
from composeprob.results.checks.check import Check
from composeprob.results.ended import EndedRun


class NetworkDoubted(Check):
    """Ask whether the compiler found a network whose score suits none of the
    parameterizations."""

    code = Code.NETWORK_DOUBTED
    withholds = True
    meaning = "a network's score does not suit its parameterization"

    def ask(self, run: EndedRun) -> list[Finding]:
        return [self.finding(doubt) for doubt in run.density.graph.doubts]
