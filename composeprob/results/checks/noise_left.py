"""Noise of level 0 that a composition of tokens does not ignore."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.categorical import UniformDensity
from composeprob.density.residual_noise import log_weights_of_clean
from composeprob.findings import Code, Finding
from composeprob.results.checks.advice import with_less_noise
from composeprob.results.checks.check import Check, Need
from composeprob.results.ended import EndedRun
from composeprob.results.geometry import chosen


class NoiseOfTokens(NamedTuple):
    """Change of a distribution of tokens if level 0 had no noise."""

    total_variation: float
    log_evidence: float


class NoiseLeft(Check):
    """Ask whether tokens without noise would have another distribution than level 0.

    A divisor that makes a state less probable than noise makes it has the value of the
    state's neighbours at level 0, so that a quotient is too small there. The samples
    are right for level 0, and no check of chains or weights sees it.
    """

    code = Code.LEVELS_TOO_FEW
    withholds = True
    meaning = (
        "without the noise of level 0 tokens would have another distribution (a total "
        "variation of 3 %, or 0.05 in the log-evidence), most often because a factor "
        "divides by probabilities that are smaller than this noise"
    )
    needs = frozenset({Need.LEVEL_0, Need.EVALUATIONS})

    def chains(self, run: EndedRun) -> Int[np.ndarray, " some"]:
        return run.first_chains

    def ask(self, run: EndedRun) -> list[Finding]:
        if not isinstance(run.density, UniformDensity):
            return []
        some = self.chains(run)
        weights = run.genealogy.weights[some]
        change = log_weights_of_clean(run.density, chosen(run.positions, some))
        return self.findings(noise_left(change, weights), run.density)

    def findings(
        self, left: NoiseOfTokens | None, density: AnnealedDensity
    ) -> list[Finding]:
        """Findings on what the noise of level 0 changes."""
        limits = tuning.FINDINGS
        if left is None:
            return []
        few = left.total_variation <= limits.noise_left
        if few and abs(left.log_evidence) <= limits.noise_left_evidence:
            return []
        log_snr = float(np.asarray(density.schedule.log_snr)[0])
        # The change falls about as the root of the noise does.
        excess = max(left.total_variation, abs(left.log_evidence) / 2)
        excess = max(excess / limits.noise_left, 1.0)
        advised = with_less_noise(density, log_snr + 2 * math.log(excess) + 1)
        end = (
            "A factor knows no level of less noise: take the samples as those of the "
            "noised factors, or train it at less noise."
        )
        if advised:
            end = f"End the levels at less noise: {advised}."
        text = (
            "Level 0 keeps noise that the factors do not ignore. Without it the "
            f"samples' distribution would be another by {left.total_variation:.1%} "
            "(total variation), and the log-evidence would change by "
            f"{left.log_evidence:+.2g}. Factors that divide by probabilities smaller "
            f"than this noise are the usual reason. {end}"
        )
        return [self.finding(text)]


def noise_left(
    change: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"]
) -> NoiseOfTokens | None:
    """Return what importance weights from level 0 to no noise change; None if no sample
    has a finite one.

    Args:
        change: log-weights of samples of level 0.
        weights: of the samples.
    """
    weights = np.where(np.isfinite(change), weights, 0.0)
    if not weights.sum() > 0:
        return None
    weights = weights / weights.sum()
    greatest = float(change[weights > 0].max())
    ratios = np.exp(np.where(weights > 0, change - greatest, -np.inf))
    mean = float(weights @ ratios)
    total_variation = 0.5 * float(weights @ np.abs(ratios / mean - 1))
    return NoiseOfTokens(total_variation, greatest + math.log(mean))
