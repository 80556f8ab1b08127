"""Importance weights of a level that are worth few chains."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

from composeprob.findings import Code, Finding
from composeprob.results.checks.check import Check, Need, levels_in_words
from composeprob.results.ended import EndedRun
from composeprob.results.trust import (
    least_effective_ancestors,
    least_effective_share,
)


class FewEffective(Check):
    """Ask whether the importance weights of a level are worth few chains."""

    code = Code.WEIGHTS_COLLAPSED
    withholds = True
    meaning = (
        "the importance weights of a level were worth less than 5 % of the chains; not "
        "reported if global moves made the chains independent afterwards: the evidence "
        "is then that of their importance samples, or is not stated"
    )
    needs = frozenset({Need.LEVEL_WEIGHTS})
    for_tokens = (
        "Try ",
        "Try more chains, or factors that say of partly visible tokens what they will "
        "mean for the rest.",
    )

    for_noised_tokens = ("Try ", "Try more levels, or more chains.")

    def ask(self, run: EndedRun) -> list[Finding]:
        least = least_effective_share(run.num_chains)
        # Weights of reveals are exact, so that only the number of chains counts that
        # they leave.
        if run.reveals:
            enough = least_effective_ancestors(run.num_chains)
            least = min(least, enough / run.num_chains)
        return self.findings(
            np.asarray(run.records.ess), run.visited, run.num_chains, least
        )

    def findings(
        self,
        ess: Float[np.ndarray, " levels"],
        visited: Bool[np.ndarray, " levels"],
        num_chains: int,
        least_share: float | None = None,
    ) -> list[Finding]:
        """Findings on effective sizes relative to N; ``least_share`` is the least one
        that is none."""
        ess = np.asarray(ess, float)
        if least_share is None:
            least_share = least_effective_share(num_chains)
        with np.errstate(invalid="ignore"):
            collapsed = visited & (ess < least_share)
        if not collapsed.any():
            return []
        least = float(np.min(ess, where=collapsed, initial=1.0))
        text = (
            f"The importance weights are worth {least * num_chains:.1f} of "
            f"{num_chains} chains ({least:.2g}) at {levels_in_words(collapsed)}. Try "
            "levels evenly spaced in log-SNR (cp.Schedule.log_snr), more levels, more "
            "chains, or weights='feynman_kac' where the factors are learned."
        )
        return [self.finding(text)]
