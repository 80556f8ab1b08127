"""Kernels that accept next to nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from composeprob import tuning
from composeprob.findings import Code, Finding
from composeprob.results.checks.check import Check, levels_in_words
from composeprob.results.ended import EndedRun


class AcceptanceCollapsed(Check):
    """Ask whether a kernel, or a block of it, accepted next to none of its
    proposals."""

    code = Code.ACCEPTANCE_COLLAPSED
    withholds = True
    meaning = "a kernel accepted less than 5 % of its proposals at a level"

    def ask(self, run: EndedRun) -> list[Finding]:
        kernel = run.kernel
        acceptance = np.asarray(run.records.acceptance)
        return self.findings(acceptance, run.visited, kernel.adjusted, kernel.blocks)

    def findings(
        self,
        acceptance: Float[np.ndarray, "levels ..."],
        visited: Bool[np.ndarray, " levels"],
        adjusted: bool | Sequence[bool] = True,
        blocks: Sequence[str] = (),
    ) -> list[Finding]:
        """Findings on mean acceptance probabilities, one for each block.

        Without a Metropolis test acceptance means nothing: ``adjusted`` says whether
        the kernel, or each block, has one.
        """
        accepted = np.asarray(acceptance, float).reshape(len(visited), -1)
        with np.errstate(invalid="ignore"):
            too_low = accepted < tuning.FINDINGS.acceptance_floor
        stuck = visited[:, None] & too_low & np.asarray(adjusted)
        findings = []
        for b, levels in enumerate(stuck.T):
            if not levels.any():
                continue
            block = f" of block {blocks[b]!r}" if blocks else ""
            least = np.min(accepted[:, b], where=levels, initial=1.0)
            text = (
                f"Acceptance{block} fell to {least:.2g} at {levels_in_words(levels)}: "
                "the chains hardly moved there. Where the step size is fixed, try "
                "step_size=cp.Adaptive(), or smaller steps at little noise (h ∝ σ² for "
                "MALA, h ∝ σ for HMC); where it adapts, cp.Adaptive(warmup=50), or "
                "more levels."
            )
            findings.append(self.finding(text))
        return findings
