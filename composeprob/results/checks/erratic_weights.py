"""Weight increments of a single step that differ too much."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from composeprob import tuning
from composeprob.findings import Code, Finding
from composeprob.results.checks.check import Check, Need, levels_in_words
from composeprob.results.ended import EndedRun
from composeprob.results.trust import effective_share_of_steps


class ErraticWeights(Check):
    """Ask whether the weight increments of one step differ too much.

    Erratic steps make weights collapse, which `FewEffective` has said already then.
    """

    code = Code.WEIGHTS_COLLAPSED
    withholds = True
    meaning = (
        "the weight increments of a single step were worth less than 5 % of the chains"
    )
    needs = frozenset({Need.LEVEL_WEIGHTS})
    unless_said = True

    advice = (
        "Compile with many more levels, widen the sharp factor, or try "
        "anneal='tempered'."
    )
    advice_for_noise = "Compile with many more levels."

    def ask(self, run: EndedRun) -> list[Finding]:
        # Exact weights have no error that closer levels would remedy.
        if run.trust.exact_weights:
            return []
        variance = np.asarray(run.records.weight_variance)
        return self.findings(variance, self.advised(run))

    def findings(
        self, variance: Float[np.ndarray, " levels"], advice: str = advice
    ) -> list[Finding]:
        """Findings on relative variances of increments, NaN where there was none."""
        effective = effective_share_of_steps(variance)
        erratic = effective < tuning.FINDINGS.ess_floor
        if not erratic.any():
            return []
        text = (
            "The weight increments of a single step differ so much that only "
            f"{np.nanmin(effective):.2g} of the chains count, at "
            f"{levels_in_words(erratic)}: a factor changes over a shorter distance "
            "than the step is long, and the log-evidence comes out too low. "
            f"{advice}"
        )
        return [self.finding(text)]
