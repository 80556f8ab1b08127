r"""Whether independent chains lie in the modes in the shares that their densities have.

Chains that no longer cross from mode to mode keep the shares of the level at which they
parted, which are those of level 0 only where noise changes none of them. Two things
tell, and neither takes an evaluation.

*What their paths weigh.* With the Feynman–Kac weights W of the ways that they came,
E[W·f]/E[W] is the mean of any f under π (annealed importance sampling: Neal 2001;
Jarzynski 1997). Where chains forget, W has nothing to do with where they end; else
their mean of f is off, to first order, by

$$E_\pi[f] - E[f] \approx \mathrm{Cov}(f, \log W + \tfrac12 (\log W - E[\log W \mid x])^2),$$

which is told well where W itself is a few chains' (log W that adds up over many
coordinates, say). The square is there for chains that forget: E[W | x] is the same for
all x then, and E[log W | x] is less by half of its variance, which is larger at some x
than at others.

*Log-densities that can be compared between modes.* At level 0, where chains are in
equilibrium inside of each mode m,

$$\log Z_m = E_m[\log \pi - \log p_m],$$

with the density $p_m$ of the chains there, which the distance to the k-th nearest
neighbour estimates (Kozachenko and Leonenko 1987, *Sample estimate of the entropy of a
random vector*). Shares of chains are compared with $Z_m/\sum Z$.

Where neither is known, `parted` finds the groups of chains that barriers of log π₀
part.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from composeprob import tuning
from composeprob.results.estimates import Families
from composeprob.results.geometry import (
    chosen,
    components,
    neighbours,
    rows,
    scaled,
    spaced,
    tree,
)
from composeprob.results.status import Code, Findings

Barriers = Callable[[dict[str, np.ndarray], dict[str, np.ndarray]], np.ndarray]
"""How deep log π₀ falls between positions, ``{site: (M, …)}`` each → (M,), in nats."""


@dataclass(frozen=True, eq=False)
class Groups:
    """Chains that are apart."""

    index: np.ndarray  # each chain's group, (m,), of which 0 is the largest
    apart: float  # the share of the pairs of chains that a barrier parts
    depth: float  # the median depth of these barriers, in nats

    @property
    def shares(self) -> np.ndarray:
        """The share of each group, the largest first."""
        return np.bincount(self.index) / len(self.index)

    def __str__(self) -> str:
        shares = self.shares
        listed = ", ".join(f"{share:.1%}" for share in shares[:3]) + (
            ", …" if len(shares) > 3 else ""
        )
        number = (
            f"{len(shares)} groups"
            if shares[0] > 1.5 / len(self.index)
            else "places of their own"
        )
        between = f"log π falls by {self.depth:.3g} nats between {self.apart:.0%} of the pairs"
        return (
            f"{number} ({listed}; {between})"
            if number[0].isdigit()
            else f"{number} ({between})"
        )


def parted(sites: Mapping[str, np.ndarray], barriers: Barriers) -> Groups | None:
    """The groups of chains between which log π₀ falls; None where fewer than a tenth of
    the pairs are apart.

    Pairs are taken at random. A valley that is bent has low density between two of its
    points too; so chains are one group if they hang together over neighbours without a
    barrier between them.
    """
    known, (points, sizes, _) = tuning.SHARES, rows(sites)
    m = len(points)
    if m < 4 or not np.isfinite(points).all():
        return None
    first, second = np.triu_indices(m, 1)
    pairs = np.random.default_rng(0).permutation(len(first))[: known.pairs]
    depth = barriers(chosen(sites, first[pairs]), chosen(sites, second[pairs]))
    apart, deep = share_apart(depth, points.shape[1]), seen_barrier(points.shape[1])
    if not apart > known.apart:
        return None
    points = scaled(points, sizes)
    near = np.unique(
        np.concatenate([neighbours(points, known.bridges), tree(points)]), axis=0
    )
    linked = ~(barriers(chosen(sites, near[:, 0]), chosen(sites, near[:, 1])) > deep)
    index = components(near[linked], m)
    if 1 - np.sum((np.bincount(index) / m) ** 2) <= known.apart:
        return None
    return Groups(index, apart, float(np.median(depth[depth > deep])))


def seen_barrier(numbers: int) -> float:
    """How deep a barrier that parts chains is on the way from one draw to another, in
    nats, of positions of n numbers.

    Between two Gaussians that are δ standard deviations apart log π falls by B = δ²/8,
    but from where it is greatest on the way, as the noise of the n − 1 other entries
    averages out there, by B²/(B + (n − 1)/4) only.
    """
    depth = tuning.SHARES.barrier
    return max(depth**2 / (depth + (numbers - 1) / 4), 1.0)


def share_apart(depth: np.ndarray, numbers: int) -> float:
    """The share of barriers that are deep for positions of n numbers, among those that
    are known."""
    known = np.isfinite(depth) | np.isposinf(depth)
    return float(np.mean(depth[known] > seen_barrier(numbers))) if known.any() else 0.0


def where(sites: Mapping[str, np.ndarray], index: np.ndarray) -> str:
    """The entry in which the two largest groups differ most, in words."""
    (points, _, names), largest = rows(sites), index == 0
    second = index == 1 if np.sum(index == 1) > 1 else ~largest
    middle = [points[group].mean(0) for group in (largest, second)]
    width = (
        points[largest].var(0) + points[second].var(0) + 1e-12 * points.var(0) + 1e-30
    )
    most = int(np.argmax(np.abs(middle[0] - middle[1]) / np.sqrt(width)))
    return f"{names[most]} is about {middle[0][most]:.3g} in one and {middle[1][most]:.3g} in the other"


class Reason(enum.StrEnum):
    """Why chains keep wrong shares, and what helps."""

    FROZEN = (
        "They kept shares that noisier levels decided, as chains do that cannot cross between modes any more. Try "
        "cp.SMC with more chains or more levels, cp.ReplicaExchange, whose chains move between modes, or, for "
        "positions of few numbers under analytic or calibrated factors, then=cp.GlobalMoves(20)."
    )
    STARTED = (
        "They kept shares that their starts decided, as chains do that cannot cross between modes. Take more "
        "chains, of which global moves then know the modes better, or let noise carry them: give the latent that has "
        "modes a prior such as cp.Analytic(distribution, cp.Schedule.log_snr(60))."
    )
    SUMMED = (
        "Reverse diffusion follows the composed score, whose law at noisier levels is not the program's with noise. "
        "Use cp.SMC(), or leave sampler= out."
    )


def weightless(sites: Mapping[str, np.ndarray], path_weights: np.ndarray) -> np.ndarray:
    """Which chains lie apart, in places that hold nothing by what their paths weigh,
    (N,) of bool.

    A place G holds E[W; G]/E[W] of π. These chains' W is below the median by more than
    numbers of 32 bits tell, and by some widths of log W more, with the width such that
    normal log W have 80 % within 1.28 of them. Chains that forget may have come any
    way, but then end among others: so each is twice as far from the nearest of these as
    all but the farthest of them are from one another.
    """
    from scipy.spatial import cKDTree

    finite, (points, sizes, _) = np.flatnonzero(np.isfinite(path_weights)), rows(sites)
    nothing = np.zeros(len(points), bool)
    if len(finite) < tuning.COMPARISON.fewest or not np.isfinite(points).all():
        return nothing
    low, middle, high = np.quantile(path_weights[finite], [0.1, 0.5, 0.9])
    least = (
        middle
        - tuning.SHARES.lost * (high - low) / 2.56
        + np.log(np.finfo(np.float32).eps)
    )
    doubted = finite[path_weights[finite] < least]
    if len(doubted):
        points = scaled(points, sizes)
        others = cKDTree(np.delete(points, doubted, axis=0))
        far = 2 * np.quantile(
            others.query(others.data, 2)[0][:, 1], 1 - tuning.SHARES.tail
        )
        nothing[doubted[others.query(points[doubted])[0] > far]] = True
    return nothing


def uneven_paths(
    sites: dict[str, np.ndarray],
    path_weights: np.ndarray,
    log_density: np.ndarray | None = None,
    why: str = Reason.FROZEN,
) -> Findings:
    """The finding that chains whose paths weigh more lie elsewhere, if they do, and
    ``why``.

    Of positions at level 0, ``{site: (N, …)}``, log W of each, (N,), up to a constant,
    and log π, where it is known: what holds too little is often denser, in many
    directions at once.
    """
    from scipy.cluster.vq import kmeans2

    finite = np.flatnonzero(np.isfinite(path_weights))
    if len(finite) < 0.95 * len(path_weights) or len(finite) < 40:
        return []
    numbers = sum(np.size(x) // len(path_weights) for x in sites.values())
    most = min(
        4 * tuning.SHARES.most,
        max(tuning.SHARES.entries // numbers, tuning.SHARES.most // 4),
    )
    sample = finite[spaced(len(finite), most)]
    n = len(sample)
    (points, _, names), gain = rows(chosen(sites, sample)), path_weights[sample]
    if not np.isfinite(points).all() or not points.std(0).any():
        return []
    gain = clipped(gain)
    gain, width = gain - gain.mean(), points.std(0)
    points = (points - points.mean(0)) / np.where(width > 0, width, 1.0)
    axes, spread, _ = np.linalg.svd(points, full_matrices=False)
    axes = axes[:, spread > 1e-6 * spread[0]][:, : n // tuning.SHARES.fewest]
    directions, groups = tuning.COMPARISON.directions, tuning.SHARES.groups
    near = kmeans2(
        axes[:, :directions] * math.sqrt(n),
        min(groups, n // tuning.SHARES.fewest),
        minit="++",
        seed=0,
    )[1]
    inside = near[:, None] == np.flatnonzero(np.bincount(near) >= tuning.SHARES.fewest)
    with_groups = np.concatenate([axes, inside - inside.mean(0)], axis=1)
    columns = [axes, with_groups]
    if log_density is not None and np.isfinite(log_density[sample]).all():
        values = clipped(log_density[sample])
        columns.append((values - values.mean())[:, None])
    explained = next(
        (
            each
            for each in (_explained(each, gain) for each in columns)
            if each is not None
        ),
        None,
    )
    if explained is None:
        return []
    moved = _most_moved(names, points, inside, explained)
    text = f"Where chains ended depends on what their paths weigh: {moved}. {why}"
    return [(Code.SHARES_FROZEN, text)]


def clipped(values: np.ndarray) -> np.ndarray:
    """Values of which those farthest out, at either end, are taken for no farther than
    the next one."""
    return np.clip(
        values, *np.quantile(values, [tuning.SHARES.tail, 1 - tuning.SHARES.tail])
    )


def _explained(columns: np.ndarray, gain: np.ndarray) -> np.ndarray | None:
    """log W with the square of what the columns leave of it, if these columns tell
    where it is large, else None."""
    from scipy.special import chdtrc

    n = len(gain)
    basis, sizes, _ = np.linalg.svd(columns, full_matrices=False)
    basis = basis[:, sizes > 1e-6 * sizes[0]]
    rest = gain - basis @ (basis.T @ gain)
    corrected = gain + 0.5 * (rest**2 - np.mean(rest**2))
    for each in (gain, corrected):
        explained = float(((basis.T @ each) ** 2).sum())
        noise = (float(each @ each) - explained) / (n - basis.shape[1] - 1)
        if (
            explained == 0
            or chdtrc(basis.shape[1], explained / noise) > tuning.SHARES.by_chance
        ):
            return None
    return (
        corrected
        if explained / n - basis.shape[1] * noise / n >= tuning.SHARES.shift**2
        else None
    )


def _most_moved(
    names: list[str], points: np.ndarray, inside: np.ndarray, gain: np.ndarray
) -> str:
    """What weights would change most, in words: the mean of an entry, or the share of a
    group."""
    from scipy.special import expit, logit

    by, n = points.T @ gain / len(gain), len(gain)
    most, share = int(np.argmax(np.abs(by))), inside.mean(0)
    if inside.shape[1] > 1:
        # What is inside gains so much more than what is outside, in logarithms.
        weighed = expit(logit(share) + gain @ inside / n / (share * (1 - share)))
        group = int(np.argmax(np.abs(weighed - share)))
        if abs(weighed[group] - share[group]) > abs(by[most]):
            return f"one group of them holds {share[group]:.1%}, and weighed it would hold about {weighed[group]:.1%}"
    return f"weighed, the mean of {names[most]} would move by {by[most]:+.2f} of its standard deviations"


def frozen_shares(
    sites: dict[str, np.ndarray],
    log_density: np.ndarray,
    families: Families | None = None,
) -> Findings:
    """The finding that groups of chains have other shares than their densities, if they
    have.

    Groups of fewer than five chains for each number of a sample are not judged, nor are
    samples of more than ten numbers, whose neighbours are too far away to tell a
    density. Of chains that were copied, in families, shares are known as well as so few
    families know them, and of the copies in a group one counts.
    """
    sample = spaced(len(log_density), tuning.SHARES.most)
    (points, sizes, _), values = rows(chosen(sites, sample)), log_density[sample]
    n, d = points.shape
    few = d > tuning.SHARES.numbers or n <= tuning.SHARES.linked
    if few or not np.isfinite(points).all() or not np.isfinite(values).all():
        return []
    index = np.arange(n) if families is None else families.index[sample]
    copied = Families.from_ancestors(np.ones(n), index)
    if copied.effective <= tuning.ERRORS.fewest_ancestors:
        return []
    modes = components(neighbours(scaled(points, sizes), tuning.SHARES.linked), n)
    share, log_z, variance = [], [], []  # the variance is that of log_z − log share
    for m in range(modes.max() + 1):
        members = np.flatnonzero(modes == m)
        first = members[np.unique(index[members], return_index=True)[1]]
        if len(first) < max(5 * d, tuning.SHARES.linked):
            continue
        each = values[first] - _log_density(points[first])
        if not np.isfinite(each).all():
            return []
        share.append(len(members) / n)
        log_z.append(each.mean())
        of_share = (
            float(copied.variance(modes == m))
            * copied.effective
            / (copied.effective - 1)
        )
        variance.append(of_share / share[-1] ** 2 + each.var() / len(first))
    if len(share) < 2:
        return []
    off = np.array(log_z) - np.log(share)
    low, high = int(np.argmin(off)), int(np.argmax(off))
    chance = 3 * math.sqrt(variance[high] + variance[low])
    if off[high] - off[low] < tuning.SHARES.slack * d + chance:
        return []
    should = np.exp(log_z[high] - np.logaddexp.reduce(log_z))
    decided = "by noisier levels" if families is None else "by few of the chains"
    text = (
        f"The chains lie in {len(share)} groups that they do not cross between, in shares that were decided {decided}: "
        f"one group holds {share[high] / sum(share):.1%} of them, and by its log-density it should hold about "
        f"{should:.1%}. Means over all groups are wrong; each group by itself is not. Try cp.SMC with more chains or "
        "more levels, or cp.ReplicaExchange, whose chains move between modes."
    )
    return [(Code.SHARES_FROZEN, text)]


def _log_density(points: np.ndarray) -> np.ndarray:
    """log p at each of n points drawn from p, (n,), in units in which they have
    covariance 1; not finite where some of them are the same or lie in a plane."""
    from scipy.spatial import cKDTree
    from scipy.special import digamma, gammaln

    n, d = points.shape
    variances, axes = np.linalg.eigh(np.atleast_2d(np.cov(points, rowvar=False)))
    with np.errstate(all="ignore"):
        units = np.sqrt(variances)
        white = np.nan_to_num((points - points.mean(0)) @ axes / units)
        radius = cKDTree(white).query(white, tuning.SHARES.neighbours + 1)[0][:, -1]
        volume = (
            d * np.log(radius)
            + 0.5 * d * math.log(math.pi)
            - gammaln(0.5 * d + 1)
            + np.log(units).sum()
        )
    return np.asarray(digamma(tuning.SHARES.neighbours) - digamma(n) - volume)
