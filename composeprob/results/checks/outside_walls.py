"""Chains at points of density 0."""

from __future__ import annotations

import numpy as np

from composeprob.findings import Code, Finding
from composeprob.results.checks.check import Check, Need
from composeprob.results.ended import EndedRun


class OutsideWalls(Check):
    """Ask whether chains ended at density 0 or NaN, outside of the walls of a
    posterior."""

    code = Code.ZERO_DENSITY
    withholds = True
    meaning = "chains ended at points of density 0 or NaN; with their share"
    needs = frozenset({Need.LEVEL_0})

    def ask(self, run: EndedRun) -> list[Finding]:
        if run.log_density is None:
            return []
        forbidden = np.isneginf(run.log_density) | np.isnan(run.log_density)
        return self.findings(float(np.mean(forbidden)))

    def findings(self, share: float) -> list[Finding]:
        """Findings on a share of the chains that are at density 0 or NaN."""
        if not share > 0:
            return []
        text = (
            f"{share:.2%} of the chains are at points of density 0 or NaN, outside of "
            "the walls that bound the posterior: they did not find the way in. Their "
            "samples belong to no posterior; leave them out. Try cp.SMC, which gives "
            "such chains no weight, with more chains, or give the wall a slope, such "
            "as jax.nn.log_sigmoid(distance / width)."
        )
        return [self.finding(text)]
