"""Reverse steps that nothing corrects, on levels that are far apart."""

from __future__ import annotations

import math

from composeprob.findings import Code, Finding
from composeprob.results.checks.check import Check, Need
from composeprob.results.ended import EndedRun


class NarrowSteps(Check):
    """Ask whether reverse steps that nothing corrects make a Gaussian narrower by more
    than the standard error of its variance, √(2/N).

    Each step of first order has the variance of one point's posterior. What is lost
    follows from the levels alone, and from no sample: so few samples show it as well.
    """

    code = Code.LEVELS_TOO_FEW
    withholds = True
    meaning = (
        "reverse steps that no transitions or weights correct (`cp.Ancestral`) lose "
        "more of a Gaussian's variance than its standard error, √(2/N)"
    )
    needs = frozenset({Need.LEVEL_0})

    def ask(self, run: EndedRun) -> list[Finding]:
        return self.findings(run.trust.narrowing, run.num_chains, len(run.log_snr))

    def findings(self, lost: float, num_chains: int, num_levels: int) -> list[Finding]:
        """Findings on a share of the variance that N chains lose over these levels."""
        error = math.sqrt(2 / num_chains)
        if not lost > error:
            return []
        # What is lost falls as the number of levels grows.
        enough = math.ceil(num_levels * lost / error)
        text = (
            f"Reverse steps over {num_levels} levels lose {lost:.0%} of the variance "
            f"of a Gaussian, and its standard error with {num_chains} chains is "
            f"{error:.1%}: samples are too narrow, and shares of modes are off as "
            f"well. Compile with {enough} levels or more (schedule=), or leave "
            "sampler= out: the default sampler corrects its steps."
        )
        return [self.finding(text)]
