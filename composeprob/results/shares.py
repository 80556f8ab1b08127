r"""Checks of mode proportions: do independent chains lie in the modes in the shares
that the densities of these have?

Chains that no longer cross from mode to mode keep the proportions of the level at which
the modes separated. These are those of level 0 only where noise changes none of them.
Two quantities tell, and neither takes an evaluation.

*Path weights.* With the Feynman–Kac weights W of the chains' paths, E[W·f]/E[W] is the
mean of any f under π (annealed importance sampling: Neal 2001; Jarzynski 1997). Where
chains forget, W is independent of where they end; else their mean of f is off, to first
order, by

$$E_\pi[f] - E[f] \approx
\mathrm{Cov}(f, \log W + \tfrac12 (\log W - E[\log W \mid x])^2),$$

which is well estimated even where few chains carry all of W (of log W that adds up over
many coordinates, say). The square is there for chains that forget: E[W | x] is the same
for all x then, and E[log W | x] is less by half of its variance, which is larger at
some x than at others.

*Log-densities that can be compared between modes.* At level 0, where chains are in
equilibrium inside of each mode m,

$$\log Z_m = E_m[\log \pi - \log p_m],$$

with the density $p_m$ of the chains there, which the distance to the k-th nearest
neighbour estimates (Kozachenko and Leonenko 1987, *Sample estimate of the entropy of a
random vector*). Shares of chains are compared with $Z_m/\sum Z$.

Where neither is available, `separated` finds the groups of chains between which log π₀
has barriers.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from composeprob import tuning
from composeprob.density.points import correlations
from composeprob.results.estimates import Genealogy
from composeprob.results.geometry import (
    chosen,
    components,
    neighbours,
    rows,
    scaled,
    spaced,
    tree,
)

Barriers = Callable[[dict[str, np.ndarray], dict[str, np.ndarray]], np.ndarray]
"""Barrier heights of log π₀ between positions, ``{site: (M, …)}`` each → (M,), in
nats."""


@dataclass(frozen=True, eq=False)
class Groups:
    """Chains in separated modes."""

    index: Int[np.ndarray, " chains"]  # each chain's group, of which 0 is the largest
    separated: float  # share of the pairs of chains with a barrier between them
    depth: float  # the median height of these barriers, in nats

    @property
    def shares(self) -> Float[np.ndarray, " groups"]:
        """The share of each group, the largest first."""
        return np.bincount(self.index) / len(self.index)

    def __str__(self) -> str:
        shares = self.shares
        barriers = (
            f"log π falls by {self.depth:.3g} nats between {self.separated:.0%} of the "
            "pairs"
        )
        if shares[0] <= 1.5 / len(self.index):
            return f"groups of one chain each ({barriers})"
        listed = ", ".join(f"{share:.1%}" for share in shares[:3])
        if len(shares) > 3:
            listed += ", …"
        return f"{len(shares)} groups ({listed}; {barriers})"


def separated(
    sites: Mapping[str, np.ndarray],
    barriers: Barriers,
    apart: float = tuning.SHARES.apart,
) -> Groups | None:
    """Return the groups of chains with barriers of log π₀ between them; None where the
    share of pairs that are separated is at most ``apart``.

    Pairs are taken at random. A valley that is bent has low density between two of its
    points too; so chains are one group if they hang together over neighbours without a
    barrier between them.
    """
    points, sizes, _ = rows(sites)
    m, numbers = points.shape
    if m < 4 or not np.isfinite(points).all():
        return None
    first, second = np.triu_indices(m, 1)
    some = np.random.default_rng(0).permutation(len(first))[: tuning.SHARES.pairs]
    depth = barriers(chosen(sites, first[some]), chosen(sites, second[some]))
    share = share_separated(depth, numbers)
    # Some pairs alone may miss a group of few chains, which counts where any does.
    if apart > 0 and not share > apart:
        return None
    # The shortest tree leads over every gap that neighbours leave.
    points = scaled(points, sizes)
    pairs = np.concatenate([neighbours(points, tuning.SHARES.bridges), tree(points)])
    pairs = np.unique(pairs, axis=0)
    deep = detectable_barrier(numbers)
    of_pairs = barriers(chosen(sites, pairs[:, 0]), chosen(sites, pairs[:, 1]))
    linked = ~(of_pairs > deep)  # NaN links
    index = components(pairs[linked], m)
    in_different_groups = 1 - np.sum((np.bincount(index) / m) ** 2)
    if in_different_groups <= apart:
        return None
    if share == 0.0:  # no pair that was examined has a chain of a small group
        share = in_different_groups
        depth = of_pairs
    return Groups(index, share, float(np.median(depth[depth > deep])))


def across_gaps(
    sites: Mapping[str, np.ndarray], barriers: Barriers, most: int
) -> Int[np.ndarray, " chains"]:
    """Return the group of each chain, of groups however small, the largest first.

    Groups hang together over the shortest tree of the chains. Its ``most`` longest
    edges are the widest gaps between chains, and those with a barrier are cut. An
    outlier of one mode is behind a gap too, but behind no barrier.
    """
    points, sizes, _ = rows(sites)
    m, numbers = points.shape
    scaled_points = scaled(points, sizes)
    edges = tree(scaled_points)
    lengths = np.linalg.norm(
        scaled_points[edges[:, 0]] - scaled_points[edges[:, 1]], axis=1
    )
    by_length = np.argsort(-lengths, kind="stable")
    edges = edges[by_length]
    gaps = edges[:most]
    depth = barriers(chosen(sites, gaps[:, 0]), chosen(sites, gaps[:, 1]))
    cut = depth > detectable_barrier(numbers)  # NaN links
    return components(np.concatenate([gaps[~cut], edges[most:]]), m)


class FewInGroup(NamedTuple):
    """A group of copies whose share rests on few ancestors."""

    group: int
    share: float  # of the chains, by weight
    ancestors: float  # effective number


def few_in_group(
    index: Int[np.ndarray, " chains"],
    genealogy: Genealogy,
    fewest: float = tuning.SHARES.fewest_ancestors,
) -> FewInGroup | None:
    """Return the group whose share rests on the fewest ancestors, of the chains in
    groups; None where each share is supported.

    A share is unsupported by less than the fewest effective ancestors whose chains are
    mostly copies. As many chains that were never copied are a small mode, whose share
    is off by its own square root at most.

    Small groups have few ancestors even where all are known equally well. So a share is
    supported, too, if as great a share of the other chains would have fewer than the
    fewest, and all ancestors together are enough to have found a large group.
    """
    n = len(index)
    groups = np.unique(index[genealogy.weights > 0])
    enough = genealogy.effective >= tuning.SHARES.fewest_in_all
    worst: FewInGroup | None = None
    for group in groups:
        share, effective = _share_and_ancestors(genealogy, index == group)
        copied = n * share >= tuning.SHARES.copies * effective
        if not copied or effective >= fewest:
            continue
        if enough and len(groups) > 1:
            rest, others = _share_and_ancestors(genealogy, index != group)
            if share * others < fewest * rest:
                continue
        if worst is None or effective < worst.ancestors:
            worst = FewInGroup(int(group), share, effective)
    return worst


def _share_and_ancestors(
    genealogy: Genealogy, members: Bool[np.ndarray, " chains"]
) -> tuple[float, float]:
    """Return the weight of some chains, and the effective number of their ancestors."""
    weights = genealogy.weights * members
    share = float(weights.sum())
    of_ancestors = np.bincount(genealogy.index, weights)
    return share, share**2 / float(np.sum(of_ancestors**2))


def detectable_barrier(numbers: int) -> float:
    """Height above which a barrier between two draws separates modes, in nats, for
    positions of n numbers.

    Between two Gaussians that are δ standard deviations apart log π falls by B = δ²/8.
    On the way from a draw, where the noise of the n − 1 other entries averages out, it
    rises first, and falls from its maximum only by B²/(B + (n − 1)/4).
    """
    depth = tuning.SHARES.barrier
    return max(depth**2 / (depth + (numbers - 1) / 4), 1.0)


def remembered(start: Mapping[str, np.ndarray], end: Mapping[str, np.ndarray]) -> bool:
    """Return whether an entry of the chains, ``{site: (N, …)}``, is correlated with
    where it was, by more than chance. All signs may have changed at once."""
    before, _, _ = rows(start)
    after, _, _ = rows(end)
    limit = max(tuning.SHARES.remembered, 4 / math.sqrt(len(before)))
    return bool(np.abs(correlations(before, after)).max() > limit)


def share_separated(depth: Float[np.ndarray, " pairs"], numbers: int) -> float:
    """The share of barriers that separate modes of n numbers, among those that are not
    NaN."""
    valid = np.isfinite(depth) | np.isposinf(depth)
    if not valid.any():
        return 0.0
    return float(np.mean(depth[valid] > detectable_barrier(numbers)))


def largest_difference(
    sites: Mapping[str, np.ndarray], index: Int[np.ndarray, " chains"]
) -> str:
    """The entry in which the two largest groups differ most, in words."""
    points, _, names = rows(sites)
    first = points[index == 0]
    second = points[index == 1]
    if len(second) < 2:  # one chain has no width: take all others together
        second = points[index != 0]
    centres = (first.mean(0), second.mean(0))
    width = first.var(0) + second.var(0) + 1e-12 * points.var(0) + 1e-30
    most = int(np.argmax(np.abs(centres[0] - centres[1]) / np.sqrt(width)))
    return (
        f"{names[most]} is about {centres[0][most]:.3g} in one and "
        f"{centres[1][most]:.3g} in the other"
    )


def halves_differ(
    sites: Mapping[str, np.ndarray], log_density: Float[np.ndarray, " chains"] | None
) -> str:
    """Say that the means of the two halves of the chains differ, in an entry or in
    log π; empty where chance may have made the difference.

    Each half's global moves are fitted to the other half. Both have the law of the
    target if the moves have mixed the modes, and else what their fits happened to be.
    """
    from scipy import stats

    points, _, names = rows(sites)
    if log_density is not None:
        points = np.column_stack([points, log_density])
        names = [*names, "log π"]
    finite = np.isfinite(points).all(axis=1)
    middle = len(points) // 2
    first = points[:middle][finite[:middle]]
    second = points[middle:][finite[middle:]]
    if min(len(first), len(second)) < tuning.ERRORS.fewest_families:
        return ""
    # Welch's test of each mean, at a probability shared among them.
    found = stats.ttest_ind(first, second, equal_var=False)
    chances = np.where(np.isnan(found.pvalue), 1.0, found.pvalue)
    most = int(np.argmin(chances))
    if chances[most] > tuning.SHARES.halves_by_chance / len(names):
        return ""
    return (
        "The two halves of the chains, whose global moves are fitted to one another, "
        f"differ: the mean of {names[most]} is {first[:, most].mean():.3g} in one and "
        f"{second[:, most].mean():.3g} in the other, "
        f"{abs(found.statistic[most]):.2g} standard errors apart. The moves have not "
        "mixed what the halves' fits leave out. Try more chains, or cp.SMC with more "
        "levels."
    )


class Reason(enum.StrEnum):
    """Reasons for wrong mode proportions, each with its remedy."""

    FROZEN = (
        "Independent chains keep the proportions of the noisier level below which they "
        "no longer cross between modes. Try cp.SMC with more chains or more levels, "
        "cp.ReplicaExchange, whose chains move between modes, or, for positions of few "
        "numbers under analytic or calibrated factors, then=cp.GlobalMoves(20)."
    )
    STARTED = (
        "Chains that cannot cross between modes keep the proportions of their starting "
        "points. Take more chains, so that global moves know the modes better, or let "
        "noise carry them: give the latent that has modes a prior such as "
        "cp.Analytic(distribution, cp.Schedule.log_snr(60))."
    )
    SUMMED = (
        "Reverse diffusion follows the composed score, which at noisier levels is not "
        "the score of the noised program. Use cp.SMC(), or leave sampler= out."
    )


@dataclass(frozen=True, eq=False)
class Proportions:
    """Support of the mode proportions, as the run ended."""

    # What contradicts them, or that nothing supports them, in words; empty without.
    defect: str = ""
    contradicted: bool = False  # whether the defect is that something contradicts them
    # The clause why nothing supports them, if they may be separated; else empty.
    unsupported: str = ""
    reason: str = ""  # why they may be wrong, and what to try
    # The chains that are not at places of negligible weight.
    compared: Int[np.ndarray, " kept"] = field(default_factory=lambda: np.arange(0))
    # The share of separated pairs above which they need support.
    apart: float = tuning.SHARES.apart

    @property
    def verdict(self) -> str:
        """``"contradicted"``, or ``"unsupported"``; empty without a defect."""
        if not self.defect:
            return ""
        return "contradicted" if self.contradicted else "unsupported"


def weightless(
    sites: Mapping[str, np.ndarray], path_weights: Float[np.ndarray, " chains"]
) -> Bool[np.ndarray, " chains"]:
    """Mark the separated chains whose paths give their place no probability.

    A place G has the probability E[W; G]/E[W]. The log W of these chains is below the
    median by more than numbers of 32 bits tell, and by some widths of log W more, where
    normal log W have 80 % within 1.28 widths. A chain that forgets may have any W, but
    ends among others: so each chain here is also twice as far from the nearest of the
    others as all but the farthest of these are from one another.
    """
    from scipy.spatial import cKDTree

    finite = np.flatnonzero(np.isfinite(path_weights))
    points, sizes, _ = rows(sites)
    marked = np.zeros(len(points), bool)
    if len(finite) < tuning.COMPARISON.fewest or not np.isfinite(points).all():
        return marked
    low, middle, high = np.quantile(path_weights[finite], [0.1, 0.5, 0.9])
    below_width = middle - tuning.SHARES.lost * (high - low) / 2.56
    least = below_width + np.log(np.finfo(np.float32).eps)
    # Compared with the other chains, as suspects may lie close to one another.
    suspects = finite[path_weights[finite] < least]
    if len(suspects):
        points = scaled(points, sizes)
        others = cKDTree(np.delete(points, suspects, axis=0))
        between_others = others.query(others.data, 2)[0][:, 1]
        far = 2 * np.quantile(between_others, 1 - tuning.SHARES.tail)
        to_others = others.query(points[suspects])[0]
        marked[suspects[to_others > far]] = True
    return marked


def path_weight_dependence(
    sites: dict[str, np.ndarray],
    path_weights: Float[np.ndarray, " chains"],
    log_density: Float[np.ndarray, " chains"] | None = None,
    why: str = Reason.FROZEN,
) -> str:
    """Say that chains of larger path weight lie elsewhere; empty where they do not.

    The positions are regressed on log W with its correction (see the module). Three
    sets of columns are tried: their principal axes; these and groups of chains, as a
    small mode moves no mean; and the log-density, as modes that hold too few chains are
    often denser, in many directions at once.

    Args:
        sites: positions at level 0, ``{site: (N, …)}``.
        path_weights: log W of each chain, up to a constant.
        log_density: log π of each chain, if it is known.
        why: the reason that the text states.
    """
    finite = np.flatnonzero(np.isfinite(path_weights))
    if len(finite) < 0.95 * len(path_weights) or len(finite) < 40:
        return ""
    limits = tuning.SHARES
    # Bounds the time of the singular values of all columns.
    numbers = sum(np.size(x) // len(path_weights) for x in sites.values())
    most = min(4 * limits.most, max(limits.entries // numbers, limits.most // 4))
    sample = finite[spaced(len(finite), most)]
    points, _, names = rows(chosen(sites, sample))
    if not np.isfinite(points).all() or not points.std(0).any():
        return ""
    log_w = _centred(path_weights[sample])
    width = points.std(0)
    points = (points - points.mean(0)) / np.where(width > 0, width, 1.0)
    axes = _principal_axes(points)
    inside = _in_groups(axes)
    columns = [axes, np.concatenate([axes, inside - inside.mean(0)], axis=1)]
    if log_density is not None and np.isfinite(log_density[sample]).all():
        columns.append(_centred(log_density[sample])[:, None])
    for regressors in columns:
        explained = _explained(regressors, log_w)
        if explained is not None:
            moved = _largest_move(names, points, inside, explained)
            return f"Where chains ended depends on their path weights: {moved}. {why}"
    return ""


def _centred(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Values without outliers, less their mean."""
    values = clipped(values)
    return values - values.mean()


def _principal_axes(
    points: Float[np.ndarray, "n dims"],
) -> Float[np.ndarray, "n axes"]:
    """Orthonormal coordinates of points along the directions in which they vary; at
    most as many as n points can support in a regression."""
    axes, spread, _ = np.linalg.svd(points, full_matrices=False)
    return axes[:, spread > 1e-6 * spread[0]][:, : len(points) // tuning.SHARES.fewest]


def _in_groups(axes: Float[np.ndarray, "n axes"]) -> Bool[np.ndarray, "n groups"]:
    """Membership in clusters of k-means, without those of too few points."""
    from scipy.cluster.vq import kmeans2

    n = len(axes)
    number = min(tuning.SHARES.groups, n // tuning.SHARES.fewest)
    # Orthonormal columns have the variance 1/n.
    points = axes[:, : tuning.COMPARISON.directions] * math.sqrt(n)
    cluster = kmeans2(points, number, minit="++", seed=0)[1]
    large = np.flatnonzero(np.bincount(cluster) >= tuning.SHARES.fewest)
    return cluster[:, None] == large


def clipped(values: np.ndarray) -> np.ndarray:
    """Values whose tails, at either end, are cut at their quantiles (winsorized)."""
    tail = tuning.SHARES.tail
    return np.clip(values, *np.quantile(values, [tail, 1 - tail]))


def _explained(
    columns: Float[np.ndarray, "n columns"], log_w: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " n"] | None:
    """Return the part of the corrected log W, with the square of its residual, that the
    columns explain, if they explain where it is large; else None.

    Both log W and its corrected form must be explained beyond chance.
    """
    from scipy.special import chdtrc

    n = len(log_w)
    basis, sizes, _ = np.linalg.svd(columns, full_matrices=False)
    basis = basis[:, sizes > 1e-6 * sizes[0]]
    degrees = basis.shape[1]
    residual = log_w - basis @ (basis.T @ log_w)
    corrected = log_w + 0.5 * (residual**2 - np.mean(residual**2))
    for values in (log_w, corrected):
        explained = float(((basis.T @ values) ** 2).sum())
        noise = (float(values @ values) - explained) / (n - degrees - 1)
        # Without dependence explained/noise is χ² of so many degrees of freedom.
        if explained == 0:
            return None
        if chdtrc(degrees, explained / noise) > tuning.SHARES.by_chance:
            return None
    # Many chains show even shifts too small to matter: those of the corrected log W,
    # the last one of the loop.
    matters = explained / n - degrees * noise / n >= tuning.SHARES.shift**2
    if not matters:
        return None
    explained_mean = basis @ (basis.T @ log_w)
    explained_all = basis @ (basis.T @ corrected)
    # The square is a correction: where it says more than log W itself it is noise.
    if np.std(explained_all - explained_mean) > np.std(explained_mean):
        return explained_mean
    return explained_all


def _largest_move(
    names: list[str],
    points: Float[np.ndarray, "n dims"],
    inside: Bool[np.ndarray, "n groups"],
    explained: Float[np.ndarray, " n"],
) -> str:
    """The quantity that weighting by the ``explained`` part of log W would change most,
    in words: the mean of an entry, or the share of a group."""
    from scipy.special import expit, logit, softmax

    n = len(explained)
    # Weights e^{b·x} by the slope b = Cov(x, log W) of one entry, in units of its
    # variance: a normal mean moves by b, and no mean leaves the samples' range.
    slopes = points.T @ explained / n
    moves = np.sum(softmax(points * slopes, axis=0) * points, axis=0)
    most = int(np.argmax(np.abs(moves)))
    if inside.shape[1] > 1:
        share = inside.mean(0)
        # The log-odds of a group move by the difference of mean log W inside and out.
        difference = explained @ inside / n / (share * (1 - share))
        reweighted = expit(logit(share) + difference)
        group = int(np.argmax(np.abs(reweighted - share)))
        if abs(reweighted[group] - share[group]) > abs(moves[most]):
            return (
                f"one group of them holds {share[group]:.1%}, and weighted by them it "
                f"would hold about {reweighted[group]:.1%}"
            )
    return (
        f"weighted by them, the mean of {names[most]} would move by {moves[most]:+.2f} "
        "of its standard deviations"
    )


class _Mode(NamedTuple):
    """A group of chains, and the mode's normaliser by the density of these."""

    share: float  # of the chains
    log_z: float  # log Z_m, up to a constant that all modes share
    variance: float  # of log_z − log share


def unreliable_proportions(
    sites: dict[str, np.ndarray],
    log_density: Float[np.ndarray, " chains"],
    genealogy: Genealogy | None = None,
) -> str:
    """Say that groups of chains do not have the shares that their log-densities imply;
    empty where they do.

    Groups of fewer than five chains for each number of a sample are not judged, nor are
    samples of more than ten numbers, whose neighbours are too far away to tell a
    density. Of copied chains, a group's share is known as well as their few ancestors
    tell it, and one of the copies in a group counts.
    """
    sample = spaced(len(log_density), tuning.SHARES.most)
    points, sizes, _ = rows(chosen(sites, sample))
    values = log_density[sample]
    n, d = points.shape
    if d > tuning.SHARES.numbers or n <= tuning.SHARES.linked:
        return ""
    if not np.isfinite(points).all() or not np.isfinite(values).all():
        return ""
    ancestors = np.arange(n) if genealogy is None else genealogy.index[sample]
    copied = Genealogy.from_ancestors(np.ones(n), ancestors)
    if copied.effective <= tuning.ERRORS.fewest_ancestors:
        return ""
    labels = components(neighbours(scaled(points, sizes), tuning.SHARES.linked), n)
    modes = _modes(points, values, labels, copied)
    if modes is None or len(modes) < 2:
        return ""
    log_z = np.array([mode.log_z for mode in modes])
    shares = np.array([mode.share for mode in modes])
    # 0 for all modes, up to a constant, where shares are those of the densities.
    off = log_z - np.log(shares)
    low = int(np.argmin(off))
    high = int(np.argmax(off))
    chance = 3 * math.sqrt(modes[high].variance + modes[low].variance)
    if off[high] - off[low] < tuning.SHARES.slack * d + chance:
        return ""
    expected = np.exp(log_z[high] - np.logaddexp.reduce(log_z))
    held = modes[high].share / sum(mode.share for mode in modes)
    decided = "at noisier levels" if genealogy is None else "by few of the chains"
    return (
        f"The chains lie in {len(modes)} groups that they do not cross between, in "
        f"proportions that were decided {decided}: one group holds {held:.1%} of them, "
        f"and by its log-density it should hold about {expected:.1%}. Means over all "
        "groups are wrong; each group by itself is not. Try cp.SMC with more chains or "
        "more levels, or cp.ReplicaExchange, whose chains move between modes."
    )


def _modes(
    points: Float[np.ndarray, "n dims"],
    log_density: Float[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
    genealogy: Genealogy,
) -> list[_Mode] | None:
    """Return the modes of enough chains; None where one of them has no density."""
    n, d = points.shape
    e = genealogy.effective
    modes = []
    for label in range(labels.max() + 1):
        members = np.flatnonzero(labels == label)
        # Copies lie closer together than draws of the mode's density.
        _, first = np.unique(genealogy.index[members], return_index=True)
        distinct = members[first]
        if len(distinct) < max(5 * d, tuning.SHARES.linked):
            continue
        log_z = log_density[distinct] - _log_density(points[distinct])
        if not np.isfinite(log_z).all():
            return None
        share = len(members) / n
        # Var(log share) ≈ Var(share)/share², without bias for e independent ancestors.
        of_share = float(genealogy.variance(labels == label)) * e / (e - 1)
        variance = of_share / share**2 + log_z.var() / len(distinct)
        modes.append(_Mode(share, log_z.mean(), variance))
    return modes


def _log_density(points: Float[np.ndarray, "n dims"]) -> Float[np.ndarray, " n"]:
    """log p at each of n points drawn from p, by the k-th nearest neighbour; not finite
    where some points are the same or lie in a plane.

    With V the volume of the ball that reaches to the neighbour, E[log p] is
    ψ(k) − ψ(n) − E[log V]. Points are whitened first, as a ball is a poor fit to a long
    mode.
    """
    from scipy.spatial import cKDTree
    from scipy.special import digamma, gammaln

    k = tuning.SHARES.neighbours
    n, d = points.shape
    variances, axes = np.linalg.eigh(np.atleast_2d(np.cov(points, rowvar=False)))
    with np.errstate(all="ignore"):
        units = np.sqrt(variances)
        white = np.nan_to_num((points - points.mean(0)) @ axes / units)
        radius = cKDTree(white).query(white, k + 1)[0][:, -1]
        log_volume = (
            d * np.log(radius)
            + 0.5 * d * math.log(math.pi)
            - gammaln(0.5 * d + 1)
            + np.log(units).sum()
        )
    return np.asarray(digamma(k) - digamma(n) - log_volume)
