"""Populations that still drift at level 0."""

from __future__ import annotations

from composeprob.findings import Code, Finding
from composeprob.results.checks.check import Check
from composeprob.results.ended import EndedRun


class Unsettled(Check):
    """Ask whether the warm-up at level 0 ended before the population had settled."""

    code = Code.UNSETTLED
    withholds = True
    meaning = (
        "the population still drifted, or latents were still correlated with their "
        "earlier values, when the warm-up at level 0 ended"
    )

    def ask(self, run: EndedRun) -> list[Finding]:
        return self.of(run.trust.drift)

    def of(self, drift: float) -> list[Finding]:
        """Findings on a drift, in standard deviations; 0 without."""
        if drift == 0.0:
            return []
        text = (
            "The warm-up at level 0 ended while the population still drifted: its last "
            "block changed a mean or a width, or left latents correlated with their "
            f"earlier values, by {drift:.2g} standard deviations. Go on with draws=, "
            "or try a smoother parameterization of the latents, such as a log-normal "
            "scale."
        )
        return [self.finding(text)]
