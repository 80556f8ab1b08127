"""Draws of a single chain, which cannot show modes that it has missed."""

from __future__ import annotations

import math

from composeprob import tuning
from composeprob.findings import Code, Finding
from composeprob.results.checks.check import Check, Need
from composeprob.results.ended import EndedRun
from composeprob.results.importance import can_draw


class OneChain(Check):
    """Ask whether errors rest on the draws of one chain alone, where importance samples
    cannot show whether it has missed a mode.

    Draws that stay in one mode have small errors, and nothing to be compared with.
    Several chains come down into different modes, and their errors show that.
    """

    code = Code.MODES_UNREACHED
    withholds = True
    meaning = (
        "all draws are of one chain, and nothing shows whether it has missed a mode"
    )
    needs = frozenset({Need.LEVEL_0, Need.NUMBERS})

    def ask(self, run: EndedRun) -> list[Finding]:
        drawn = run.ending.drawn
        # Replicas that come from the noisiest level are as good as other chains.
        if run.num_chains > 1 or not drawn or not math.isnan(run.trust.round_trips):
            return []
        # `ModesUnreached` compares as many draws with importance samples.
        if can_draw(run.density) and drawn >= tuning.CHECKS.most_chains:
            return []
        text = (
            f"All {drawn:,} draws are of one chain. If it has missed a mode, its error "
            "does not show that. Try num_chains=4 with fewer draws of each: chains in "
            "different modes show these."
        )
        return [self.finding(text)]
