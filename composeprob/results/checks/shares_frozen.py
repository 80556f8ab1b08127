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
    meaning = (
        "mode proportions are unreliable: path weights, log-densities of separated "
        "groups, or the two halves of the chains contradict them; or nothing supports "
        "them, of modes whose log-densities can be compared"
    )
    needs = frozenset({Need.LEVEL_0, Need.NUMBERS})

    def ask(self, run: EndedRun) -> list[Finding]:
        defect = run.proportions.defect
        return [self.finding(defect)] if defect else []
