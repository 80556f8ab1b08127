"""Groups of chains that barriers of log π₀ part from one another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from composeprob import tuning
from composeprob.density.barriers import barrier_depth
from composeprob.results.comparison import scaled

LogDensity = Callable[[dict[str, np.ndarray]], np.ndarray]
"""log π₀ of positions, ``{site: (M, …)}`` → (M,)."""


@dataclass(frozen=True, eq=False)
class Groups:
    """Chains that are apart.

    Attributes:
        index: each chain's group, (m,), of which 0 is the largest.
        apart: the share of the pairs of chains that a barrier parts.
        depth: the median depth of these barriers, in nats; None where no log-density is known.
    """

    index: np.ndarray
    apart: float
    depth: float | None

    @property
    def shares(self) -> np.ndarray:
        """The share of each group, the largest first."""
        return np.bincount(self.index) / len(self.index)

    def __str__(self) -> str:
        shares = self.shares
        listed = ", ".join(f"{share:.1%}" for share in shares[:3]) + (", …" if len(shares) > 3 else "")
        number = f"{len(shares)} groups" if shares[0] > 1.5 / len(self.index) else "places of their own"
        if self.depth is None:
            return f"{number} without chains between them ({listed})"
        between = f"log π falls by {self.depth:.3g} nats between {self.apart:.0%} of the pairs"
        return f"{number} ({listed}; {between})" if number[0].isdigit() else f"{number} ({between})"


def parted(sites: Mapping[str, np.ndarray], log_density: LogDensity) -> Groups | None:
    """The groups of chains between which log π₀ falls; None where fewer than a tenth of the pairs are apart.

    Pairs are taken at random. A valley that is bent has low density between two of its points too; so chains are one
    group if they hang together over neighbours without a barrier between them.

    Args:
        sites: positions at level 0, ``{site: (m, …)}``.
        log_density: of such positions.
    """
    known, sites = tuning.SHARES, {name: np.asarray(x) for name, x in sites.items()}
    rows = _rows(sites)
    m = len(rows)
    if m < 4 or not np.isfinite(rows).all():
        return None
    first, second = np.triu_indices(m, 1)
    chosen = np.random.default_rng(0).permutation(len(first))[: known.pairs]
    depth = between(sites, sites, first[chosen], second[chosen], log_density)
    apart = share_apart(depth)
    if not apart > known.apart:
        return None
    points = scaled(rows, [x[0].size for x in sites.values()])
    near = np.unique(np.concatenate([_neighbours(points, known.bridges), _tree(points)]), axis=0)
    linked = near[~(between(sites, sites, near[:, 0], near[:, 1], log_density) > known.barrier)]
    index = _components(linked, m)
    if 1 - np.sum((np.bincount(index) / m) ** 2) <= known.apart:
        return None
    return Groups(index, apart, float(np.median(depth[depth > known.barrier])))


def distant(sites: Mapping[str, np.ndarray]) -> Groups | None:
    """The groups that no neighbours lead between, where no log-density is known; None where there is one."""
    rows = _rows(sites)
    if len(rows) < 4 or not np.isfinite(rows).all():
        return None
    index = connected(scaled(rows, [np.size(x[0]) for x in sites.values()]), tuning.SHARES.linked)
    apart = 1 - float(np.sum((np.bincount(index) / len(rows)) ** 2))
    return Groups(index, apart, None) if apart > tuning.SHARES.apart else None


def between(
    ones: Mapping[str, np.ndarray],
    others: Mapping[str, np.ndarray],
    first: np.ndarray,
    second: np.ndarray,
    log_density: LogDensity,
) -> np.ndarray:
    """The depths of the barriers from chains of the ones to chains of the others, in nats."""
    a, b = ({name: np.asarray(x)[i] for name, x in sites.items()} for sites, i in ((ones, first), (others, second)))
    return barrier_depth(log_density, a, b)


def share_apart(depth: np.ndarray) -> float:
    """The share of barriers that are deep, among those that are known."""
    known = np.isfinite(depth) | np.isposinf(depth)
    return float(np.mean(depth[known] > tuning.SHARES.barrier)) if known.any() else 0.0


def connected(points: np.ndarray, k: int) -> np.ndarray:
    """The number of each point's group, the largest first: what the graph of k nearest neighbours connects, (n,)."""
    return _components(_neighbours(points, k), len(points))


def where(sites: Mapping[str, np.ndarray], index: np.ndarray) -> str:
    """The entry in which the two largest groups differ most, in words."""
    rows, one = _rows(sites), index == 0
    other = index == 1 if np.sum(index == 1) > 1 else ~one
    middle, widths = [], []
    for chosen in (one, other):
        middle.append(rows[chosen].mean(0))
        widths.append(rows[chosen].var(0))
    most = int(np.argmax(np.abs(middle[0] - middle[1]) / np.sqrt(sum(widths) + 1e-12 * rows.var(0) + 1e-30)))
    entries = [(name, place) for name, x in sites.items() for place in np.ndindex(np.shape(x)[1:])]
    name, place = entries[most]
    entry = f"{name}[{', '.join(map(str, place))}]" if place else name
    return f"{entry} is about {middle[0][most]:.3g} in one and {middle[1][most]:.3g} in the other"


def _rows(sites: Mapping[str, np.ndarray]) -> np.ndarray:
    """Positions as rows, (m, D)."""
    return np.concatenate([np.asarray(x, float).reshape(len(x), -1) for x in sites.values()], axis=1)


def _neighbours(points: np.ndarray, k: int) -> np.ndarray:
    """Pairs (i, j) with i < j of points of which one is among the k nearest of the other, (·, 2)."""
    from scipy.spatial import cKDTree

    k = min(k, len(points) - 1)
    near = cKDTree(points).query(points, k + 1)[1]
    pairs = np.stack([np.repeat(np.arange(len(points)), k + 1), near.ravel()], axis=1)
    pairs = np.sort(pairs[pairs[:, 0] != pairs[:, 1]], axis=1)
    return np.unique(pairs, axis=0)


def _tree(points: np.ndarray) -> np.ndarray:
    """Pairs (i, j) with i < j of the shortest tree that connects all points, (n − 1, 2): the way over every gap."""
    from scipy.sparse.csgraph import minimum_spanning_tree
    from scipy.spatial.distance import pdist, squareform

    tree = minimum_spanning_tree(squareform(pdist(points) + 1e-30)).tocoo()
    return np.sort(np.stack([tree.row, tree.col], axis=1), axis=1)


def _components(pairs: np.ndarray, n: int) -> np.ndarray:
    """The number of the group that pairs connect each of n things to, the largest first, (n,)."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    found = np.asarray(connected_components(graph, directed=False)[1])
    order = np.argsort(-np.bincount(found), kind="stable")
    return np.argsort(order)[found]
