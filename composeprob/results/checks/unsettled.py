"""Populations that still drift at level 0."""

from __future__ import annotations

from composeprob.findings import Code, Finding
from composeprob.results.checks.check import Check
from composeprob.results.ended import EndedRun


class Unsettled(Check):
    """Ask whether the warm-up at level 0 ended before the population had settled, or
    latents had moved too little in a run without one."""

    code = Code.UNSETTLED
    withholds = True
    meaning = (
        "the population still drifted, or latents were still correlated with their "
        "earlier values, when the warm-up at level 0 ended; or, without one, latents "
        "are still correlated with their initial draws"
    )

    def ask(self, run: EndedRun) -> list[Finding]:
        return self.findings(run.trust.drift) + self.findings_of_memory(
            run.trust.memory
        )

    def findings(self, drift: float) -> list[Finding]:
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

    def findings_of_memory(self, memory: float) -> list[Finding]:
        """Findings on the correlation of latents with where they began, in runs
        without a warm-up; 0 without."""
        if memory == 0.0:
            return []
        text = (
            f"Latents are correlated by {memory:.2g} with where their chains began: "
            "the sampler moved them too little to forget it. End the run by a warm-up "
            "(then=cp.WarmUp()), or take more transitions at each level."
        )
        return [self.finding(text)]
