"""Proposals whose density or score was not finite."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Position
from composeprob.findings import Code, Finding
from composeprob.results.checks.check import Check, Need, levels_in_words
from composeprob.results.ended import EndedRun


class NonFinite(Check):
    """Ask whether too many proposals had no finite density, and which observation is
    NaN where such proposals go."""

    code = Code.NON_FINITE
    withholds = False
    meaning = (
        "more than 1 % of the proposals had a NaN or infinite density or score; "
        "proposals of steps that are far too long for their starting point do not count"
    )
    needs = frozenset({Need.EVALUATIONS})

    def chains(self, run: EndedRun) -> Int[np.ndarray, " few"]:
        return run.first_chains

    def ask(self, run: EndedRun) -> list[Finding]:
        counts = np.asarray(run.records.non_finite)
        findings = self.findings(counts, run.kernel.proposals, run.visited)
        if not findings:
            return []
        suspects = _observations_of_nan(run.density, run.positions)
        if not suspects:
            return findings
        return [self.finding(findings[0].message + nan_likelihood(suspects))]

    def findings(
        self,
        count: Float[np.ndarray, " levels"],
        proposals: np.ndarray | int,
        visited: Bool[np.ndarray, " levels"],
    ) -> list[Finding]:
        """Findings on the number of such proposals at each level, of all chains."""
        of_levels = np.broadcast_to(np.asarray(proposals, float), visited.shape)
        with np.errstate(invalid="ignore", divide="ignore"):
            share = np.asarray(count, float) / of_levels
            bad = visited & (share > tuning.FINDINGS.non_finite_ceiling)
        if not bad.any():
            return []
        text = (
            f"Up to {np.max(share, where=bad, initial=0.0):.1%} of the proposals had a "
            f"NaN or infinite density or score at {levels_in_words(bad)}. They were "
            "rejected, so the chains cannot enter that region, and its probability is "
            "missing from the samples and the evidence. Evaluate density.log_density "
            "there to find the factor that overflows; where the step size is fixed, "
            "try step_size=cp.Adaptive(). A factor that is meant to be 0 there must "
            "return -jnp.inf with a finite gradient: "
            "jnp.where(inside, log_weight, -jnp.inf)."
        )
        return [self.finding(text)]


def nan_likelihood(observed: Sequence[str]) -> str:
    """A remark on observations whose likelihood is NaN where proposals were rejected;
    begins with a space."""
    return (
        f" The likelihood of {', '.join(map(repr, observed))} is NaN near the chains: "
        "look for a scale of it that depends on a latent and is 0 or negative there, "
        "and write jnp.exp(s) or jax.nn.softplus(s) for s."
    )


def _observations_of_nan(density: AnnealedDensity, positions: Position) -> list[str]:
    """Observations whose likelihood is NaN four times as far from the mean of the
    chains as these are: where proposals go that have no finite density."""
    if not density.observed():
        return []
    far = jax.tree.map(lambda x: x.mean(0) + 4 * (x - x.mean(0)), positions)
    values = density.log_likelihood(jax.vmap(density.to_samples)(far))
    return [name for name, value in values.items() if np.isnan(value).any()]
