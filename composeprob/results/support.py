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
    return Support(log_weights, Proportions(defect, contradicted=True))


@dataclass(frozen=True)
class _Paths:
    """What the weights of the chains' paths are good for.

    Args:
        chains: all of them.
        lost: marks those in separated places of negligible path weight.
        kept: the others.
        worth: number of chains that the weights are worth.
    """

    chains: Arrived
    lost: Bool[np.ndarray, " chains"]
    kept: Arrived
    worth: float

    @classmethod
    def of(cls, chains: Arrived) -> _Paths:
        """Read the path weights of chains."""
        lost = shares.weightless(chains.positions, chains.path_weights)
        kept = chains.chosen(np.flatnonzero(~lost))
        return cls(chains, lost, kept, effective(chains.path_weights))

    @property
    def exact(self) -> bool:
        """True if levels are exact marginals, whose paths keep the shares."""
        return "exact_marginals" in self.chains.density.capabilities

    @property
    def enough(self) -> bool:
        """True if shares can rest on so many chains."""
        number = len(self.lost)
        fewest = min(tuning.ERRORS.fewest_families, number / 8)
        return self.worth >= max(tuning.SHARES.support * number, fewest)

    @property
    def even(self) -> bool:
        """True if weights are so even that shares are hardly off without them: by
        √(N/worth − 1) of their standard deviation at most."""
        return self.worth >= tuning.SHARES.even * len(self.lost)

    @property
    def may_replace(self) -> bool:
        """True if these weights may be those of the chains: they are where their paths
        led, and either enough of them count, or nothing else can correct shares."""
        comparable = self.chains.density.comparable_modes
        alone = alike(self.kept.path_weights) and not comparable
        return self.chains.unmoved and (self.enough or alone)

    @property
    def supports(self) -> bool:
        """True if the chains' own shares rest on them."""
        if not self.chains.paths_known:
            return False
        if self.chains.half_moved:
            # Path weights are those of places that other chains have left: they tell
            # only how far off the shares were on arrival.
            return self.even
        return self.enough or alike(self.kept.path_weights)


def _of_independent(chains: Arrived) -> Support:
    """Support of chains without importance weights, by the weights of their paths."""
    paths = _Paths.of(chains)
    unsupported = _unsupported(paths)
    separated = functools.cache(lambda: _separated(chains, unsupported))
    defect = _contradiction(paths)
    if paths.may_replace:
        # Few chains do not show how far off uneven weights leave the shares.
        hidden = not (paths.exact or paths.even)
        if defect or (hidden and separated()):
            return _reweighted(paths)
    defect = defect or _contradiction_by_densities(paths)
    if defect:
        proportions = Proportions(defect, contradicted=True)
    elif paths.exact or paths.supports:
        proportions = Proportions()
    elif chains.density.comparable_modes:
        # Another run can follow, so that the answer is needed at once.
        proportions = Proportions(separated())
    else:
        proportions = unsupported
    log_weights, corrections = _without_lost(paths)
    path_weights = paths.worth if chains.paths_known else np.nan
    return Support(log_weights, proportions, corrections, path_weights)


def _contradiction_by_densities(paths: _Paths) -> str:
    """Say that log-densities of separated groups contradict their shares, or that the
    halves of the chains have different ones; empty where neither holds."""
    chains = paths.chains
    kept = paths.kept
    defect = ""
    if chains.density.comparable_modes and kept.log_density is not None:
        defect = shares.unreliable_proportions(kept.positions, kept.log_density)
    if not defect and chains.globally_moved:
        defect = shares.halves_differ(chains.positions, chains.log_density)
    return defect


def _contradiction(paths: _Paths) -> str:
    """Say that path weights contradict the proportions of the chains that are kept, or
    that others, which moved, are lost; empty where neither holds."""
    kept = paths.kept
    if kept.path_weights.any():
        text = shares.path_weight_dependence(
            kept.positions, kept.path_weights, kept.log_density, kept.reason
        )
        if text:
            return text
    # Chains that have not moved get weight 0 instead.
    if not paths.lost.any() or kept.unmoved:
        return ""
    return (
        f"{paths.lost.mean():.2%} of the chains are separated from the others, in "
        "places of negligible path weight, which hold next to no probability. "
        f"{kept.reason}"
    )


def _without_lost(paths: _Paths) -> tuple[Float[np.ndarray, " chains"], str]:
    """Log-weights of the chains, with weight 0 where they are lost and have not moved,
    and a clause that says so."""
    chains = paths.chains
    lost = paths.lost
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


def _reweighted(paths: _Paths) -> Support:
    """Support by path weights in the place of the chains' own."""
    path_weights = paths.chains.path_weights
    counted = np.isfinite(path_weights) & ~paths.lost
    weights = np.where(counted, path_weights, -np.inf)
    corrections = (
        f"; path weights, worth {paths.worth:.0f} of {len(weights)} chains, correct "
        "the mode proportions"
    )
    log_weights = weights - weights.max()
    return Support(log_weights, Proportions(), corrections, paths.worth, True)


def _unsupported(paths: _Paths) -> Proportions:
    """Proportions that nothing supports if the chains that are kept lie in separated
    modes."""
    chains = paths.chains
    if chains.moved and chains.arrival is None:
        return Proportions()  # whether moves crossed between modes is unknown
    cause = f"the path weights are worth {paths.worth:.2g} of {len(paths.lost)} chains"
    if not chains.paths_known:
        cause = (
            "independent chains have no importance weights, and the weights of their "
            "paths are unknown"
        )
    apart = tuning.SHARES.apart
    if chains.instead_of:
        cause = f"{chains.instead_of}, and {cause}"
        # Weights that collapsed say that paths favour one mode, so that few chains of
        # another one tell nothing of its share.
        apart = 0.0
    compared = np.flatnonzero(~paths.lost)
    return Proportions(
        unsupported=cause, reason=chains.reason, compared=compared, apart=apart
    )


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
    groups = shares.separated(positions, depths, proportions.apart)
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
