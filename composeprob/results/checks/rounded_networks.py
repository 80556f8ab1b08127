"""Networks whose products are rounded so coarsely that estimates change."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from composeprob import tuning
from composeprob.density.points import log_densities
from composeprob.density.rounding import unrounded
from composeprob.findings import Code, Finding
from composeprob.results.checks.check import Check, Need
from composeprob.results.ended import EndedRun
from composeprob.results.geometry import chosen, rows


class Rounding(NamedTuple):
    """Change of estimates by the rounding of networks."""

    shift: float  # of a mean, in standard deviations, less four standard errors
    log_evidence: float  # change of log Z


def rounding(
    change: Float[np.ndarray, " n"],
    points: Float[np.ndarray, "n d"],
    weights: Float[np.ndarray, " n"],
) -> Rounding:
    r"""Estimate what a change of log π₀ does to means and to the evidence.

    To first order the mean of a number z of standard deviation 1 moves by
    $c = \operatorname{Cov}(z, \text{change})$. Over d numbers these make
    $\sum_i c_i^2$, the squared shift along the direction in which they move most. In
    many dimensions that is known far better than the largest of its terms: noise alone
    adds $d\,V/n$, with V the variance of the change.

    Args:
        change: log π₀ without rounding less log π₀ with it, at the samples.
        points: the samples.
        weights: of the samples, of sum 1.
    """
    centred = points - weights @ points
    spread = np.sqrt(weights @ centred**2)
    units = centred / np.where(spread > 0, spread, 1.0)
    deviation = change - weights @ change
    variance = float(weights @ deviation**2)
    n = 1 / float(np.sum(weights**2))
    covariances = (weights * deviation) @ units
    # ‖C‖² of the correlations C, of which there may be many more than samples.
    weighted = np.sqrt(weights)[:, None] * units
    if len(weighted) > weighted.shape[1]:
        weighted = weighted.T  # ‖A·Aᵀ‖ = ‖Aᵀ·A‖: the smaller matrix of the two
    squared = float(np.sum((weighted @ weighted.T) ** 2))
    varying = np.count_nonzero(spread)
    noise = (varying + 4 * math.sqrt(2 * squared)) * variance / n
    shift = math.sqrt(max(float(np.sum(covariances**2)) - noise, 0.0))
    greatest = float(change.max())
    mean_ratio = float(weights @ np.exp(change - greatest))
    return Rounding(shift, greatest + math.log(mean_ratio))


class RoundedNetworks(Check):
    """Ask whether the rounding of ``precision="bfloat16"`` changes log π₀ by so much,
    from sample to sample, that means or the evidence change.

    The samples are right for the density of the rounded networks. A change that is the
    same everywhere moves the evidence alone.
    """

    code = Code.NETWORK_DOUBTED
    withholds = True
    meaning = (
        "networks that are rounded to bfloat16 move the mean by a tenth of a standard "
        "deviation along some direction, after four standard errors are subtracted, or "
        "the log-evidence by a quarter; of densities with a log-density"
    )
    needs = frozenset({Need.LEVEL_0, Need.EVALUATIONS, Need.FINITE, Need.NUMBERS})

    def chains(self, run: EndedRun) -> np.ndarray:
        return run.first_chains

    def ask(self, run: EndedRun) -> list[Finding]:
        exact = unrounded(run.density)
        if exact is None or "energy" not in run.density.capabilities:
            return []
        some = self.chains(run)
        positions = chosen(run.positions, some)
        change = log_densities(exact, positions) - log_densities(run.density, positions)
        weights = run.genealogy.weights[some] * np.isfinite(change)
        if not weights.sum() > 0:
            return []
        points, _, _ = rows(positions)
        change = np.where(weights > 0, change, 0.0)
        found = rounding(change, points, weights / weights.sum())
        limits = tuning.FINDINGS
        moved = found.shift > tuning.SHARES.shift
        evidence = abs(found.log_evidence) > limits.rounded_evidence
        if not moved and not (evidence and run.level_weights):
            return []
        return [
            self.finding(
                "Networks are rounded to bfloat16, which changes log π₀ from sample to "
                f"sample by a standard deviation of {float(change.std()):.2g} nats. "
                f"Without rounding the mean would be {found.shift:.2g} standard "
                "deviations elsewhere, along the direction in which it changes most, "
                f"and the log-evidence would change by {found.log_evidence:+.2g}. "
                "Leave precision= out, or train on data of mean 0 and standard "
                "deviation 1, which lose little."
            )
        ]
