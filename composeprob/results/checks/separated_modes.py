"""Separated modes whose proportions nothing supports."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from composeprob.findings import Code, Finding
from composeprob.results.checks.check import Check, Need
from composeprob.results.ended import EndedRun
from composeprob.results.support import compared_chains, separated_text


class SeparatedModes(Check):
    """Ask whether chains lie in modes with barriers between them, where nothing
    supports the proportions. Of densities that can be compared it was asked as the run
    ended, since another run may follow."""

    code = Code.SHARES_FROZEN
    withholds = True
    meaning = "modes are separated, and nothing supports their proportions"
    needs = frozenset({Need.LEVEL_0, Need.EVALUATIONS, Need.NUMBERS})

    def chains(self, run: EndedRun) -> Int[np.ndarray, " some"]:
        return compared_chains(run.proportions)

    def ask(self, run: EndedRun) -> list[Finding]:
        if not run.proportions.unsupported:
            return []
        text = separated_text(run.density, run.positions, run.arrival, run.proportions)
        return [self.finding(text)] if text else []
