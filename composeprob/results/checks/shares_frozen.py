"""Mode proportions that path weights or log-densities contradict."""

from __future__ import annotations

from composeprob.findings import Code, Finding
from composeprob.results.checks.check import Check, Need
from composeprob.results.ended import EndedRun


class SharesFrozen(Check):
    """Ask whether something contradicts the proportions of the chains, or nothing
    supports them, as `composeprob.results.support` found when the run ended."""

    code = Code.SHARES_FROZEN
    withholds = True
    of_numbers = True
    meaning = (
        "mode proportions are unreliable: path weights, or log-densities of separated "
        "groups, contradict them"
    )
    needs = frozenset({Need.LEVEL_0})

    def ask(self, run: EndedRun) -> list[Finding]:
        return [self.finding(defect) for defect in run.proportions.defects]
