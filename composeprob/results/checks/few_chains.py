"""A remark on runs without a problem of which few chains count."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from composeprob.findings import Code, Finding
from composeprob.results.checks.check import Check, Need
from composeprob.results.ended import EndedRun
from composeprob.results.estimates import effective_chains


class FewChains(Check):
    """Ask whether fewer than half of the chains count, and at which levels the others
    were lost, where nothing is wrong."""

    code = Code.OK
    withholds = False
    meaning = (
        "no problem was found; where fewer than half of the chains count, the "
        "log-SNRs between which the others were lost"
    )
    needs = frozenset({Need.NO_FINDING, Need.LAST_POSITIONS})

    def chains(self, run: EndedRun) -> np.ndarray:
        return np.arange(0)

    def ask(self, run: EndedRun) -> list[Finding]:
        # Samples of a store are on disk.
        samples = [np.asarray(values) for values in run.samples.values()]
        worth = effective_chains(run.genealogy, samples)
        ess = np.asarray(run.records.ess)
        if run.reveals:  # their levels are reveals, of which no run has more
            ess = np.ones_like(ess)
        return self.findings(worth, run.num_chains, ess, run.log_snr)

    def findings(
        self,
        worth: float,
        num_chains: int,
        ess: Float[np.ndarray, " levels"],
        log_snr: Float[np.ndarray, " levels"],
    ) -> list[Finding]:
        """Remarks on N chains that are worth so many independent ones.

        A level of relative effective size e, resampled or not, adds 1/e less that of
        the level before, or 1 if resampled, to the relative variance of the weights.
        """
        if not worth < num_chains / 2:
            return []
        text = (
            f"No problem was found. The {num_chains:,} chains are worth {worth:,.0f} "
            "independent ones; the errors account for this."
        )
        spread = 1 / np.clip(np.nan_to_num(np.asarray(ess, float), nan=1.0), 1e-12, 1.0)
        before = np.append(spread[1:], 1.0)
        # A level that was resampled starts again from equal weights.
        lost = np.maximum(spread - np.where(before > spread, 1.0, before), 0.0)
        if lost.sum() > 0.5:
            shares = np.cumsum(lost) / lost.sum()
            high, low = np.interp([0.1, 0.9], shares, log_snr)
            text += (
                f" Most of the others were lost between log-SNR {low:.2g} and "
                f"{high:.2g}, where single steps make the weights uneven: the longer a "
                "step is, the less closely it follows the program, most of all where "
                "chains separate into modes. More levels keep more chains: compile "
                f"with twice the {len(ess)} (schedule=)."
            )
        return [self.finding(text)]
