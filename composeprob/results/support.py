"""Support of mode proportions, as a run ends: by importance weights, by the weights of
paths, or by moves between modes.

Where path weights contradict the proportions of independent chains, or cannot support
them, they replace the chains' equal weights if they are worth enough chains. What is
left of doubts are the defects of `Proportions`, which checks report.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Position
from composeprob.density.points import barriers
from composeprob.results import shares
from composeprob.results.chains import Chains
from composeprob.results.estimates import Genealogy
from composeprob.results.geometry import chosen, spaced
from composeprob.results.shares import Proportions


@dataclass(frozen=True, eq=False)
class Arrived(Chains):
    """Chains at level 0, and how they came there.

    Args:
        density: that was sampled.
        replicas: whether the chains swap places with others at all levels.
        weighted: whether they had importance weights, and were resampled.
        has_kernel: whether a kernel corrected them on their way down.
        paths_known: whether weights of paths were accumulated, or all are equal.
        drawn: whether draws at level 0 were taken.
        globally_moved: whether global moves were made.
        half_moved: whether these left many chains where they were: such chains have
            the shares that they arrived with, and the others those of the moves'
            proposals.
        moved: whether draws or finishers moved the chains at level 0.
        instead_of: what the attempt before ended with, as a clause; empty without.
    """

    density: AnnealedDensity
    replicas: bool = False
    weighted: bool = False
    has_kernel: bool = True
    paths_known: bool = False
    drawn: bool = False
    globally_moved: bool = False
    half_moved: bool = False
    moved: bool = False
    instead_of: str = ""

    @property
    def unmoved(self) -> bool:
        """True if the chains are where their paths led, so that the path weights are
        theirs: a kernel corrected their way down, and neither draws nor global moves
        followed."""
        return self.has_kernel and not self.drawn and not self.globally_moved

    @property
    def reason(self) -> shares.Reason:
        """The reason why independent chains may have wrong proportions."""
        if not self.has_kernel:
            return shares.Reason.SUMMED
        if self.density.num_levels == 1:
            return shares.Reason.STARTED
        return shares.Reason.FROZEN


class Support(NamedTuple):
    """Weights of the chains, and what is left to doubt of the proportions they give."""

    # Of the run, or of its paths where these correct the proportions.
    log_weights: Float[np.ndarray, " chains"]
    proportions: Proportions
    corrections: str = ""  # clauses for the reason of the run
    path_weights: float = np.nan  # the chains that these are worth
    by_paths: bool = False  # whether the log-weights are those of the paths


def supported(chains: Arrived) -> Support:
    """Return what supports the mode proportions of chains at level 0."""
    if chains.replicas:  # they swap between modes
        return Support(chains.log_weights, Proportions())
    if chains.weighted:
        return _of_weighted(chains)
    return _of_independent(chains)


def _of_weighted(chains: Arrived) -> Support:
    """Support of chains with importance weights, which were resampled on the way."""
    log_weights = chains.log_weights
    unequal = bool(np.ptp(log_weights))
    if not chains.density.comparable_modes or chains.log_density is None or unequal:
        return Support(log_weights, Proportions())
    equal = np.ones(len(log_weights))
    genealogy = Genealogy.from_ancestors(equal, chains.ancestors)
    defect = shares.unreliable_proportions(
        chains.positions, chains.log_density, genealogy
    )
    return Support(log_weights, Proportions(_defects(defect)))


def _of_independent(chains: Arrived) -> Support:
    """Support of chains without importance weights, by the weights of their paths."""
    number = len(chains.log_weights)
    worth = effective(chains.path_weights)
    lost = shares.weightless(chains.positions, chains.path_weights)
    index = np.flatnonzero(~lost)
    kept = chains.chosen(index)
    defect = _contradiction(kept, lost)
    unsupported = _unsupported(chains, worth, index)
    separated = functools.cache(lambda: _separated(chains, unsupported))

    exact = "exact_marginals" in chains.density.capabilities
    fewest = max(
        tuning.SHARES.support * number, min(tuning.ERRORS.fewest_families, number / 8)
    )
    likely = alike(kept.path_weights)
    # Where log π of modes cannot be compared, nothing else corrects their shares.
    alone = likely and not chains.density.comparable_modes
    if chains.unmoved and (worth >= fewest or alone):
        # Shares are off by √(N/worth − 1) of their standard deviation at most: too
        # little for few chains to show it.
        uneven = worth < tuning.SHARES.even * number
        hidden = not exact and uneven
        if defect or (hidden and separated()):
            return _reweighted(chains.path_weights, lost, worth)

    if not defect and chains.density.comparable_modes and kept.log_density is not None:
        defect = shares.unreliable_proportions(kept.positions, kept.log_density)
    if not defect and chains.globally_moved:
        defect = shares.halves_differ(chains.positions, chains.log_density)
    enough = worth >= fewest or likely
    if chains.half_moved:
        # Path weights are those of places that other chains have left: they tell only
        # how far off the shares were on arrival.
        enough = worth >= tuning.SHARES.even * number
    proportions = Proportions(_defects(defect))
    if not (defect or exact or (chains.paths_known and enough)):
        proportions = unsupported
        # Asked at once where another run can follow, which must know the answer.
        if chains.density.comparable_modes:
            proportions = Proportions(_defects(separated()))
    log_weights, corrections = _without_lost(chains, lost)
    path_weights = worth if chains.paths_known else np.nan
    return Support(log_weights, proportions, corrections, path_weights)


def _contradiction(kept: Arrived, lost: Bool[np.ndarray, " chains"]) -> str:
    """Say that path weights contradict the proportions of the chains that are ``kept``,
    or that others, which moved, are ``lost``; empty where neither holds."""
    if kept.path_weights.any():
        text = shares.path_weight_dependence(
            kept.positions, kept.path_weights, kept.log_density, kept.reason
        )
        if text:
            return text
    # Chains that have not moved get weight 0 instead.
    if not lost.any() or kept.unmoved:
        return ""
    return (
        f"{lost.mean():.2%} of the chains are separated from the others, in places of "
        "negligible path weight, which hold next to no probability. "
        f"{kept.reason}"
    )


def _without_lost(
    chains: Arrived, lost: Bool[np.ndarray, " chains"]
) -> tuple[Float[np.ndarray, " chains"], str]:
    """Log-weights of the chains, with weight 0 where they are ``lost`` and have not
    moved, and a clause that says so."""
    if not lost.any() or not chains.unmoved:
        return chains.log_weights, ""
    clause = (
        f"; {lost.sum()} separated chains, whose path weights are negligible, get "
        "weight 0"
    )
    return np.where(lost, -np.inf, chains.log_weights), clause


def _separated(chains: Arrived, unsupported: Proportions) -> str:
    """Say that chains lie in separated modes; empty where they do not."""
    some = chains.chosen(compared_chains(unsupported))
    # One half of the chains may cross barriers that the other half does not.
    arrival = None if chains.half_moved else some.arrival
    return separated_text(chains.density, some.positions, arrival, unsupported)


def _defects(text: str) -> tuple[str, ...]:
    """The defects of proportions with this one, if there is one."""
    return (text,) if text else ()


def _reweighted(
    path_weights: Float[np.ndarray, " chains"],
    lost: Bool[np.ndarray, " chains"],
    worth: float,
) -> Support:
    """Support by path weights in the place of the chains' own."""
    weights = np.where(np.isfinite(path_weights) & ~lost, path_weights, -np.inf)
    corrections = (
        f"; path weights, worth {worth:.0f} of {len(path_weights)} chains, correct the "
        "mode proportions"
    )
    return Support(weights - weights.max(), Proportions(), corrections, worth, True)


def _unsupported(
    chains: Arrived, worth: float, kept: Int[np.ndarray, " kept"]
) -> Proportions:
    """Proportions that nothing supports if the ``kept`` chains lie in separated
    modes."""
    if chains.moved and chains.arrival is None:
        return Proportions()  # whether moves crossed between modes is unknown
    cause = (
        f"the path weights are worth {worth:.2g} of {len(chains.log_weights)} chains"
    )
    if not chains.paths_known:
        cause = (
            "independent chains have no importance weights, and the weights of their "
            "paths are unknown"
        )
    if chains.instead_of:
        cause = f"{chains.instead_of}, and {cause}"
    return Proportions((), cause, chains.reason, kept)


def effective(log_weights: Float[np.ndarray, " chains"]) -> float:
    """Effective sample size of weights; those that are not finite count as 0."""
    finite = log_weights[np.isfinite(log_weights)]
    if not finite.size:
        return 0.0
    return Genealogy.from_log_weights(finite).effective


def alike(log_weights: Float[np.ndarray, " chains"]) -> bool:
    """Return whether weights differ so little that they support shares, although chance
    may leave few of them.

    Log-normal weights whose logarithms have standard deviation s have the relative
    effective size e^(−s²). Few chains tell s far better than their effective size.
    """
    finite = log_weights[np.isfinite(log_weights)]
    if len(finite) <= 0.95 * len(log_weights):
        return False
    return float(shares.clipped(finite).std()) <= tuning.SHARES.alike


def compared_chains(proportions: Proportions) -> Int[np.ndarray, " some"]:
    """Indices of the chains between which barriers are looked for."""
    some = spaced(len(proportions.compared), tuning.CHECKS.most_chains)
    return proportions.compared[some]


def in_separated_modes(density: AnnealedDensity, positions: Position) -> bool:
    """Return whether barriers of log π₀ separate chains from one another."""
    number = len(next(iter(positions.values())))
    some = chosen(positions, spaced(number, tuning.CHECKS.most_chains))
    return shares.separated(some, barriers(density)) is not None


def separated_text(
    density: AnnealedDensity,
    positions: Position,
    arrival: Position | None,
    proportions: Proportions,
) -> str:
    """Say that these positions lie in separated modes; empty where they do not, or
    nothing asks.

    Chains that moved since their ``arrival`` at level 0 are fine if they have crossed
    as many barriers as lie between them, and no entry remembers where it was: one of
    many signs that changes is a crossing too.
    """
    if not proportions.unsupported:
        return ""
    depths = barriers(density)
    groups = shares.separated(positions, depths)
    if groups is None:
        return ""
    if arrival is not None:
        size = sum(np.size(values) // len(values) for values in positions.values())
        crossed = shares.share_separated(depths(arrival, positions), size)
        often = crossed >= tuning.SHARES.crossing * groups.separated
        if often and not shares.remembered(arrival, positions):
            return ""
    places = shares.largest_difference(positions, groups.index)
    return (
        f"The chains lie in {groups}: {places}. Nothing supports these mode "
        f"proportions: {proportions.unsupported}. {proportions.reason}"
    )
