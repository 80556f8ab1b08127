"""Chains where the data are all but impossible, for densities without a log-density
that would show it."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from composeprob import tuning
from composeprob.density.points import log_likelihood
from composeprob.findings import Code, Finding
from composeprob.results.checks.check import Check, Need
from composeprob.results.ended import EndedRun


class ImpossibleData(Check):
    """Ask whether chains are where the data are all but impossible.

    At most a share L/Z of the posterior, Z = E_prior[L], is where the likelihood is at
    most L. Numbers of precision eps tell −log eps nats each, so that the best chain's
    log L is above log Z by that times the numbers sampled or measured at most,
    whichever are fewer: points twice as far below it have no share.
    """

    code = Code.ZERO_DENSITY
    withholds = True
    meaning = (
        "if factors have only scores, chains ended where the data are all but "
        "impossible; with their share"
    )
    needs = frozenset(
        {
            Need.LEVEL_0,
            Need.EVALUATIONS,
            Need.SCORES_ALONE,
            Need.FINITE,
            Need.NUMBERS,
        }
    )

    def chains(self, run: EndedRun) -> Int[np.ndarray, " some"]:
        return weighted_chains(run)

    def ask(self, run: EndedRun) -> list[Finding]:
        measured = numbers_measured(run)
        if not measured:
            return []
        values = run.once(
            "log-likelihood", lambda: log_likelihood(run.density, run.positions)
        )
        return self.findings(values, min(measured, run.size))

    def findings(
        self, log_likelihood: Float[np.ndarray, " chains"], numbers: int
    ) -> list[Finding]:
        """Findings on the log-likelihoods of chains, of so many numbers."""
        below = np.nanmax(log_likelihood, initial=-np.inf) - log_likelihood
        off = below > 2 * numbers * -np.log(np.finfo(np.float32).eps)
        if not off.any():
            return []
        text = (
            f"{off.mean():.2%} of the chains are where the data are all but "
            f"impossible, {below[off].min():.0f} nats or more of log-likelihood below "
            "the best chain: noisier levels led them there, and they cannot leave. "
            "Their samples belong to no posterior; leave them out. Try more chains, so "
            "that SMC gives such chains no weight, or more levels."
        )
        return [self.finding(text)]


def weighted_chains(run: EndedRun) -> Int[np.ndarray, " some"]:
    """Indices of chains whose weight is not negligible, the first of many."""
    weights = run.genealogy.weights
    counted = np.flatnonzero(weights >= weights.max() / len(weights))
    return counted[: tuning.SHARES.most]


def numbers_measured(run: EndedRun) -> int:
    """Number of numbers in the program's data."""
    return sum(np.size(values) for values in run.density.observed().values())
