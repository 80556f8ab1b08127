"""Trained scores that do not match the samples of their own factors."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.learned_scores import OwnScore
from composeprob.findings import Code, Finding
from composeprob.results.checks.advice import without_cleanest
from composeprob.results.checks.check import Check, Need
from composeprob.results.ended import EndedRun, KeyUse

PLUGGED_IN_WRONGLY = (
    "Look for another parameterization=, schedule or time= than those of its training, "
    "and for a scale of its output."
)
"""Advice about a network that is wrong at all levels."""


class OwnScores(Check):
    """Ask whether a score that a line integral relied on is the score of its factor's
    own samples, as `composeprob.runtime.own_draws` measures it; of a score that only
    weights relied on, whether it predicts the noise in these samples."""

    code = Code.NETWORK_DOUBTED
    withholds = True
    meaning = (
        "at level 0 a network's score does not match the factor's own samples, and a "
        "line integral relied on it; or it does not predict the noise that these are "
        "given"
    )
    needs = frozenset(
        {Need.LEVEL_0, Need.EVALUATIONS, Need.TRUSTED_SCORES, Need.NUMBERS}
    )

    def chains(self, run: EndedRun) -> Int[np.ndarray, " some"]:
        limits = tuning.FINDINGS
        # Noised twice, and at fewer than half of the levels compared with another one.
        most = run.density.num_levels + 3 * limits.slope_levels
        number = run.evaluations / most
        # With fewer samples than half, reverse diffusion leaves levels out.
        number = max(number, limits.own_draws // 2)
        return np.arange(int(min(number, limits.own_draws, run.num_chains)))

    def asks(self, run: EndedRun) -> bool:
        """Return whether a run has chains enough: of fewer samples errors are too
        large."""
        return run.num_chains >= tuning.FINDINGS.own_draws // 8

    def ask(self, run: EndedRun) -> list[Finding]:
        if not self.asks(run):
            return []
        key = KeyUse.OWN_DRAWS.folded_into(run.key)
        scores = run.own_scores(run.positions, key, run.evaluations)
        return self.findings(scores, run.density, run.kernel.integrates_score)

    def findings(
        self,
        scores: Mapping[str, OwnScore],
        density: AnnealedDensity,
        integrated: bool = True,
    ) -> list[Finding]:
        """Findings on the scores of factors of a density, along which line integrals
        were taken, or only weights."""
        wrong = {name: score for name, score in scores.items() if score.wrong}
        # Reverse steps are as long as the noise is wide: they hardly see errors at
        # level 0, which lead accept tests astray.
        if not (wrong and integrated):
            return self.of_noise(scores)
        listed = ", ".join(
            f"that of {name} is {score}" for name, score in wrong.items()
        )
        text = (
            "At level 0 scores do not match the factors' own samples, drawn by reverse "
            f"diffusion: {listed}. "
        )
        right_from = [score.right_from for score in wrong.values()]
        levels = [level for level in right_from if level is not None]
        log_snr = -np.inf
        if len(levels) == len(right_from):
            log_snr = float(np.asarray(density.schedule.log_snr)[max(levels)])
        # Levels of noise alone do not tell one network from another.
        if log_snr < 0:
            return [
                self.finding(
                    f"{text}They are right at no level with more signal than noise. "
                    f"{PLUGGED_IN_WRONGLY}"
                )
            ]
        end = without_cleanest(density, max(levels))
        text += (
            "Errors of a network grow as noise falls, and Metropolis tests lead chains "
            "where such a score leads, not to the learned distribution. The scores are "
            f"about right at a log-SNR of {log_snr:.2g} and below: end the levels "
            f"there ({end}), train with more weight on little noise, or use "
            "cp.Ancestral, for one factor alone."
        )
        return [self.finding(text)]

    def of_noise(self, scores: Mapping[str, OwnScore]) -> list[Finding]:
        """Findings on scores that predict another noise than is in samples of their
        factors."""
        misfits = []
        for name, score in scores.items():
            if score.misfit is not None:
                misfits.append(f"of {name}: {score.misfit}")
        if not misfits:
            return []
        text = (
            "A network does not predict the noise that its factor's own samples were "
            f"given: {'; '.join(misfits)}. An exact score predicts the mean of that "
            f"noise, whatever the samples are. {PLUGGED_IN_WRONGLY}"
        )
        return [self.finding(text)]
