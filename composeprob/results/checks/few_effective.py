"""Importance weights of a level that are worth few chains."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

from composeprob.findings import Code, Finding
from composeprob.results.checks.check import Check, Need, levels_in_words
from composeprob.results.ended import EndedRun
from composeprob.results.trust import least_effective_share


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
    advice = (
        "Try levels evenly spaced in log-SNR (cp.Schedule.log_snr), more levels, more "
        "chains, or weights='feynman_kac' where the factors are learned."
    )
    advice_for_reveals = (
        "Try more chains, or factors that say of partly visible tokens what they will "
        "mean for the rest."
    )
    advice_for_noise = "Try more levels, or more chains."

    def ask(self, run: EndedRun) -> list[Finding]:
        return self.findings(
            np.asarray(run.records.ess),
            run.visited,
            run.num_chains,
            run.trust.exact_weights,
            self.advised(run),
        )

    def findings(
        self,
        ess: Float[np.ndarray, " levels"],
        visited: Bool[np.ndarray, " levels"],
        num_chains: int,
        exact: bool = False,
        advice: str = advice,
    ) -> list[Finding]:
        """Findings on effective sizes relative to N of weights that are ``exact``, as
        those of reveals, or have errors."""
        ess = np.asarray(ess, float)
        with np.errstate(invalid="ignore"):
            collapsed = visited & (ess < least_effective_share(num_chains, exact))
        if not collapsed.any():
            return []
        least = float(np.min(ess, where=collapsed, initial=1.0))
        text = (
            f"The importance weights are worth {least * num_chains:.1f} of "
            f"{num_chains} chains ({least:.2g}) at {levels_in_words(collapsed)}. "
            f"{advice}"
        )
        return [self.finding(text)]
