"""Factors that agree nowhere, and negations that take nothing away."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from composeprob import tuning
from composeprob.density.overlap import agreement
from composeprob.findings import Code, Finding
from composeprob.results.checks.check import Check, Need
from composeprob.results.ended import EndedRun, KeyUse
from composeprob.results.geometry import spaced


class Agreement(Check):
    """Common part of the checks that ask `composeprob.density.overlap`."""

    needs = frozenset({Need.LEVEL_0, Need.EVALUATIONS, Need.COMPOSITION, Need.FINITE})

    def chains(self, run: EndedRun) -> Int[np.ndarray, " some"]:
        number = np.clip(
            run.evaluations // _num_levels(run), 1, tuning.CHECKS.most_chains
        )
        return spaced(run.num_chains, number)

    def findings(self, run: EndedRun) -> tuple[Finding, ...]:
        """All disagreements of factors, evaluated once for all of these checks."""
        key = KeyUse.OVERLAP.folded_into(run.key)
        return run.once(
            "agreement",
            lambda: agreement(run.density, run.positions, key, _num_levels(run)),
        )


def _num_levels(run: EndedRun) -> int:
    """Number of levels at which factors are compared: levels and chains share the
    evaluations in proportion."""
    levels = run.evaluations // min(run.num_chains, tuning.CHECKS.most_chains)
    return int(np.clip(levels, 2, tuning.OVERLAP.levels))


class NoOverlap(Agreement):
    """Ask whether factors have mass where the samples are."""

    code = Code.NO_OVERLAP
    withholds = False  # errors are those of the program as it stands
    meaning = "the factors agree nowhere, or a negation takes nothing away"

    def ask(self, run: EndedRun) -> list[Finding]:
        return [found for found in self.findings(run) if found.code == self.code]
