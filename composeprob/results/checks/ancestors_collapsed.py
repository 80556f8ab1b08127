"""Chains that descend from too few."""

from __future__ import annotations

from composeprob.findings import Code, Finding
from composeprob.results.checks.check import Check, Need
from composeprob.results.ended import EndedRun
from composeprob.results.trust import least_effective_ancestors


class AncestorsCollapsed(Check):
    """Ask whether the chains have too few ancestors for errors to be stated."""

    code = Code.ANCESTORS_COLLAPSED
    withholds = True
    meaning = (
        "after resampling, chains have so few ancestors that they are worth fewer than "
        "N/16 independent ones, at least 4 and at most 12 (below 32 chains N/8)"
    )
    needs = frozenset({Need.LEVEL_0})
    advice = (
        "Try more chains, more levels, steps_per_level=3 or more, or weights that "
        "differ less (anneal='moments' or 'denoised' for observations); "
        "cp.ReplicaExchange; or cp.AnnealedMCMC, whose chains are independent."
    )
    advice_for_reveals = (
        "Try more chains, sampler=cp.Reveal(redraws=4), or factors that say of partly "
        "visible tokens what they will mean for the rest."
    )
    advice_for_noise = (
        "Try more chains, more levels, or sampler=cp.TauLeaping(redraws=8)."
    )

    def ask(self, run: EndedRun) -> list[Finding]:
        trust = run.trust
        return self.findings(
            trust.independent, trust.ancestors, trust.num_chains, self.advised(run)
        )

    def findings(
        self, worth: float, distinct: float, num_chains: int, advice: str = advice
    ) -> list[Finding]:
        """Findings on N chains with so many distinct ancestors, worth so many
        independent chains."""
        if worth >= least_effective_ancestors(num_chains):
            return []
        text = (
            f"After resampling, the {num_chains} chains have {distinct:.0f} distinct "
            f"ancestors (effective number {worth:.1f}): mode proportions are as "
            "uncertain as with so few chains, and no standard error is given. "
            f"{advice}"
        )
        return [self.finding(text)]
