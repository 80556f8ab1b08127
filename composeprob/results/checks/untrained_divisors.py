"""Programs that divide by a network where it was never trained."""

from __future__ import annotations

from composeprob.findings import Code, Finding
from composeprob.results.checks.no_overlap import Agreement
from composeprob.results.ended import EndedRun


class UntrainedDivisors(Agreement):
    """Ask whether the program divides by networks at samples on which they were not
    trained: weights and steps take them for distributions, so errors mislead."""

    code = Code.NETWORK_DOUBTED
    withholds = True
    meaning = "the program divides by a network where it was never trained"

    def ask(self, run: EndedRun) -> list[Finding]:
        divisors = []
        for finding in self.findings(run):
            if finding.divides and finding.factor is not None:
                divisors.append(finding.factor)
        if not divisors:
            return []
        text = (
            f"Weights and steps treat {', '.join(divisors)} as distributions under "
            "noise. Networks are distributions only where they were trained (see "
            "OUT_OF_TRAINING): mode proportions and means may be far off, and no error "
            "is given."
        )
        return [self.finding(text)]
