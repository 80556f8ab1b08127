"""Support of a run's estimates: `Trust`, numbers with their meanings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from composeprob import tuning
from composeprob.text import printable


def least_effective_ancestors(num_chains: int) -> float:
    """Effective number of ancestors below which no error of a run of N chains is
    stated."""
    # Three degrees of freedom, or what few chains can have.
    least = min(tuning.ERRORS.fewest_ancestors + 1, num_chains / 8)
    return max(least, min(tuning.ERRORS.fewest_families, num_chains / 16))


def least_effective_share(num_chains: int, exact: bool = False) -> float:
    """Effective size of a level's weights, relative to N, below which they have
    collapsed. Weights that are ``exact``, as those of reveals, need only leave enough
    ancestors."""
    # With few chains the share alone says little: fewer than two effective chains is a
    # collapse at any N.
    least = max(tuning.FINDINGS.ess_floor, min(2.0 / num_chains, 0.5))
    if exact:
        least = min(least, least_effective_ancestors(num_chains) / num_chains)
    return least


def effective_share_of_steps(
    variance: Float[np.ndarray, " levels"],
) -> Float[np.ndarray, " levels"]:
    """Conditional effective size of single steps, 1/(1 + v), relative to N, by the
    relative variance v of their weight increments (Zhou, Johansen and Aston 2016)."""
    effective: Float[np.ndarray, " levels"] = 1 / (1 + np.asarray(variance, float))
    return effective


SHOWN = (
    ("level_weights", "{:.2g}", "of the chains count, at the worst level"),
    ("step_weights", "{:.2g}", "of the chains count, in the worst step"),
    ("path_weights", "{:,.4g} of {n:,}", "chains' worth of path weights"),
    ("global_acceptance", "{:.2g}", "of global moves accepted"),
    ("round_trips", "{:.3g}", "round trips of replicas, for each chain"),
    ("drift", "{:.2g} sd", "drift, or memory of the start, at level 0"),
    ("memory", "{:.2g}", "correlation of latents with where they began"),
    ("discretisation", "{:.2g} nats", "discretisation error of log Z"),
    ("missing", "{:.2g} nats", "of log Z found over every other level alone"),
    ("narrowing", "{:.0%}", "of a Gaussian's variance lost by the reverse steps"),
)
"""Fields of `Trust` that some runs have: their form, and what they mean."""
ZERO_WITHOUT = ("drift", "memory", "discretisation", "missing", "narrowing")
"""Fields that are 0, instead of NaN, where there is nothing to say."""


@dataclass(frozen=True)
class Trust:
    """`Trust` states what means, mode proportions and the evidence of a run rest on.

    A number is NaN where the run has no such thing, such as weights or replicas.

    Args:
        num_chains: N.
        independent: number of independent chains that these are worth at least, by
            their genealogy; the errors of few ancestors rest on it.
        effective_chains: number of independent chains whose means would have the same
            errors, the least over the sites.
        ancestors: number of first chains that have descendants.
        level_weights: effective size of the weights, relative to N, at the level where
            it is least.
        step_weights: effective size of the weight increments of one step, relative to
            N, at the level where it is least.
        path_weights: number of chains that the weights of paths are worth, where
            independent chains have such weights.
        exact_weights: whether weights have no error by the distance of levels, as those
            of reveals.
        proportions: what is wrong with mode proportions, as the run ended:
            ``"contradicted"``, or ``"unsupported"``; empty where nothing is.
        global_acceptance: mean acceptance of global moves between modes.
        round_trips: number of replicas that came from the noisiest level to level 0, in
            the draws of one chain.
        drift: by how many standard deviations the last block at level 0 moved the
            population, or is correlated with where it began; 0 without.
        memory: correlation of a latent with where its chain began, in runs without a
            warm-up; 0 where it is no more than chance makes it.
        discretisation: error of log Z by the distance of levels, in nats.
        missing: nats by which log Z of the run over every other level is greater than
            the run's, beyond noise; 0 where it is not.
        narrowing: share of the variance of N(0, 1) that reverse steps without
            transitions and weights lose, by the distance of levels; 0 with these.
        corrections: what the run corrected in its mode proportions, as clauses of
            `Result.reason`.

    Example:
        >>> import composeprob as cp
        >>> trust = cp.Trust(num_chains=100, independent=3.0, ancestors=5)
        >>> trust.enough, trust.lacks
        (False, 'the chains had too few distinct ancestors')
    """

    num_chains: int
    independent: float = math.nan
    effective_chains: float = math.nan
    ancestors: int = 0
    level_weights: float = math.nan
    step_weights: float = math.nan
    path_weights: float = math.nan
    exact_weights: bool = False
    proportions: str = ""
    global_acceptance: float = math.nan
    round_trips: float = math.nan
    drift: float = 0.0
    memory: float = 0.0
    discretisation: float = 0.0
    missing: float = 0.0
    narrowing: float = 0.0
    corrections: str = ""

    @property
    def lacks(self) -> str:
        """The first thing that is not enough and that another run may have, as a
        clause; empty where there is none."""
        if self.proportions == "unsupported":
            return "nothing supported the proportions of separated modes"
        if self.proportions:
            return f"the proportions of separated modes were {self.proportions}"
        least = least_effective_share(self.num_chains, self.exact_weights)
        erratic = self.step_weights < tuning.FINDINGS.ess_floor
        if self.level_weights < least or (erratic and not self.exact_weights):
            return "too few chains supported the importance weights"
        if self.independent < least_effective_ancestors(self.num_chains):
            return "the chains had too few distinct ancestors"
        if self.discretisation > tuning.FINDINGS.levels_error:
            return "the levels were too far apart for the log-evidence"
        return ""

    @property
    def enough(self) -> bool:
        """True if mode proportions, weights, ancestors and levels support what is
        reported, so that a default run ends; other checks may still find something."""
        return not self.lacks

    def numbers(self) -> dict[str, float | bool | str]:
        """The fields that are not NaN, for files."""
        fields = dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if value == value}

    def rows(self) -> Iterator[tuple[str, str]]:
        """Each number that the run has, in words, and its meaning."""
        n = self.num_chains
        yield f"{self.effective_chains:,.4g} of {n:,}", "independent chains' worth"
        yield f"{self.ancestors:,} of {n:,}", "first chains that have descendants"
        for name, number, meaning in SHOWN:
            value = getattr(self, name)
            nothing = value == 0 and name in ZERO_WITHOUT
            if not (nothing or math.isnan(value)):
                yield number.format(value, n=n), meaning
        mode_proportions = self.proportions or "not contradicted"
        yield mode_proportions, "mode proportions, as the run ended"

    def __str__(self) -> str:
        rows = list(self.rows())
        width = max(len(number) for number, _ in rows)
        lines = [f"{number:>{width}}  {meaning}" for number, meaning in rows]
        if self.lacks:
            lines.append(f"not enough: {self.lacks}")
        return printable("\n".join(lines))
