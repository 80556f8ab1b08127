"""Samples that are too large for the noise of the noisiest level."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from composeprob import tuning
from composeprob.findings import Code, Finding
from composeprob.results.checks.check import Check
from composeprob.results.ended import EndedRun


class SamplesDiverged(Check):
    """Ask whether the noise of the noisiest level, from which a run starts, hides the
    samples of noised sites: α·‖x‖ < σ·√d."""

    code = Code.SAMPLES_DIVERGED
    withholds = True
    meaning = "samples are too large to be hidden by the noise of the noisiest level"

    def ask(self, run: EndedRun) -> list[Finding]:
        density = run.density
        if density.num_levels <= 1:
            return []
        noised = {}
        for name, values in run.positions.items():
            if density.sites[name].kind == "noised":
                noised[name] = values
        alpha = float(np.asarray(density.schedule.alpha)[-1])
        sigma = float(np.asarray(density.schedule.sigma)[-1])
        return self.findings(noised, alpha, sigma)

    def findings(
        self, samples: Mapping[str, np.ndarray], alpha: float, sigma: float
    ) -> list[Finding]:
        """Findings on samples, ``{site: (N, …)}``, whose noisiest level has these α and
        σ."""
        limits = tuning.FINDINGS
        findings = []
        for name, values in samples.items():
            x = np.asarray(values, float).reshape(len(values), -1)
            with np.errstate(over="ignore"):
                size = np.sqrt(np.mean(x**2, axis=1))
            signal = np.where(np.isfinite(size), size * alpha / sigma, np.inf)
            many_far = np.mean(signal > limits.far_signal) > limits.many
            if not many_far and not np.any(signal > limits.farthest_signal):
                continue
            text = (
                f"The samples of {name!r} are too large: their root mean square is up "
                f"to {signal.max() * sigma / alpha:.3g}, and the noise of the noisiest "
                f"level hides nothing above {sigma / alpha:.3g}. Look for a network "
                "that is plugged in wrongly, for a denominator that is narrower than "
                "its numerator, and for steps that are too large. For data of that "
                "size end the schedule at a lower log-SNR."
            )
            findings.append(self.finding(text))
        return findings
