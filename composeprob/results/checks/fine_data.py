"""Data that are finer than level 0, for densities without a log-density that would show
it."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Int

from composeprob.density.annealed import AnnealedDensity
from composeprob.density.points import lost_to_noise
from composeprob.findings import Code, Finding
from composeprob.results.checks.advice import with_less_noise
from composeprob.results.checks.check import Check
from composeprob.results.checks.impossible_data import (
    ImpossibleData,
    numbers_measured,
    weighted_chains,
)
from composeprob.results.ended import EndedRun


class FineData(Check):
    """Ask whether data are finer than the noise of level 0, where errors are withheld,
    fewer than half of the chains count, or some are where the data are impossible.

    That noise once more, σ/α, takes ½·(σ/α)²/s² nats of log-likelihood from each
    measured number of an instrument whose noise is s.
    """

    code = Code.LEVELS_TOO_FEW
    withholds = False
    meaning = (
        "if factors have only scores and fewer than half of the chains count, the data "
        "are finer than level 0"
    )
    needs = ImpossibleData.needs

    def chains(self, run: EndedRun) -> Int[np.ndarray, " some"]:
        return weighted_chains(run)

    def ask(self, run: EndedRun) -> list[Finding]:
        if not numbers_measured(run):
            return []
        few = run.trust.effective_chains < run.num_chains / 2
        impossible = any(finding.code == Code.ZERO_DENSITY for finding in run.found)
        if not (few or impossible or run.withheld):
            return []
        lost = lost_to_noise(run.density, run.positions)
        return self.findings(lost, run.density)

    def findings(self, lost: float, density: AnnealedDensity) -> list[Finding]:
        """Findings on nats ``lost`` to the noise of level 0 of a density."""
        if not lost > 0.5:
            return []
        log_snr = float(np.asarray(density.schedule.log_snr)[0])
        advised = with_less_noise(density, log_snr + math.log(8 * lost))
        end = "Give"
        if advised:
            end = f"End the levels at less noise, {advised}, or give"
        text = (
            "The data are finer than level 0: noise of its size, "
            f"{math.exp(-log_snr / 2):.2g}, takes {lost:.3g} nats of log-likelihood "
            "from each measured number, so that few of the chains that step there "
            f"reach the data. {end} the data noise of that size, which samples have "
            "anyway."
        )
        return [self.finding(text)]
