"""Scores that are not gradients, under an accept test that integrates them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

from composeprob import tuning
from composeprob.findings import Code, Finding
from composeprob.results.checks.check import Check, Need
from composeprob.results.ended import EndedRun


class NotConservative(Check):
    """Ask whether a score that a line integral relied on is not a gradient."""

    code = Code.NOT_CONSERVATIVE
    withholds = True
    meaning = "a line integral relied on a score that is not a gradient"
    needs = frozenset({Need.EVALUATIONS, Need.LINE_INTEGRAL})

    def chains(self, run: EndedRun) -> Int[np.ndarray, " few"]:
        return run.first_chains

    def ask(self, run: EndedRun) -> list[Finding]:
        return self.findings(run.curl())

    def findings(self, curl: Mapping[str, float]) -> list[Finding]:
        """Findings on the relative curl of factors, NaN where it is unknown."""
        ceiling = tuning.FINDINGS.curl_ceiling
        above = []
        for name, value in curl.items():
            if value > ceiling:
                above.append(f"{name} (relative curl {value:.2g})")
        if not above:
            return []
        text = (
            "Not the gradient of any log-density: the score of "
            f"{', '.join(above)}. A relative curl up to {ceiling:g} is accepted. A "
            "line integral of this score depends on its path, so the Metropolis test "
            "targets no distribution. Train that model longer or with an energy "
            "parameterization, or use a kernel without a test: cp.ULA, cp.UHMC, or "
            "cp.SMC with kernel=None."
        )
        return [self.finding(text)]
