"""Modes that one of two runs has missed."""

from __future__ import annotations

import math
from typing import NamedTuple

from composeprob import tuning
from composeprob.findings import Code, Finding
from composeprob.results.checks.check import Check, Need


class Isolated(NamedTuple):
    """Shares of isolated samples in two runs, as `Result.compare` measures them."""

    here: float  # of the other run's samples, that have none near in this one
    there: float  # of this run's samples
    number: int  # of samples of each run
    by_chance: float  # the frequency of such shares between runs of one distribution


class ModesMissing(Check):
    """Ask whether one of two runs has missed a mode that the other found."""

    code = Code.MODES_MISSING
    withholds = True
    meaning = (
        "by `result.compare`: another run has modes that this one lacks, or conversely"
    )
    needs = frozenset({Need.ELSEWHERE})

    def ask(self, run: Isolated) -> list[Finding]:
        if run.by_chance >= tuning.COMPARISON.chance:
            return []
        findings = []
        for share, whose, where in (
            (run.here, "the other run's", "this one"),
            (run.there, "this run's", "the other"),
        ):
            if share < tuning.COMPARISON.least:
                continue
            error = math.sqrt(share * (1 - share) / run.number)
            text = (
                f"{share:.0%} ± {error:.0%} of {whose} samples lie where {where} has "
                "next to none: it has missed a mode, or modes, of about that "
                "probability. Mode proportions are wrong in at least one of them. Try "
                "more chains, more levels, cp.SMC, whose weights keep proportions "
                "right, and compare a third run."
            )
            findings.append(self.finding(text))
        return findings
