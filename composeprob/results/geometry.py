"""Samples as rows of numbers, with their names and units, and nearest neighbours among
them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from composeprob import tuning
from composeprob.events import entries


def chosen(sites: Mapping[str, ArrayLike], index: np.ndarray) -> dict[str, np.ndarray]:
    """Some samples of every site, ``{site: (n, …)}``."""
    return {name: np.asarray(x)[index] for name, x in sites.items()}


def spaced(n: int, most: float) -> np.ndarray:
    """The indices of at most ``most`` of n things, evenly spaced."""
    return np.linspace(0, n - 1, min(n, int(most))).astype(int)


def rows(
    sites: Mapping[str, np.ndarray], lead: int = 1
) -> tuple[Float[np.ndarray, "n d"], list[int], list[str]]:
    """All sites, ``{site: (n, …)}``, as one row for each sample, the number of entries
    of each site, and their names; behind ``lead`` axes of samples, one or two."""
    columns = []
    sizes = []
    names = []
    for name, values in sites.items():
        shape = np.shape(values)[lead:]
        size = math.prod(shape)
        columns.append(np.asarray(values, float).reshape(-1, size))
        sizes.append(size)
        names += entries(name, shape)
    return np.concatenate(columns, axis=1), sizes, names


def units(
    variance: Float[np.ndarray, " d"], sizes: list[int]
) -> Float[np.ndarray, " d"]:
    """The standard deviation of the site that each entry belongs to, by the entries'
    variances; 1 where nothing varies."""
    of_sites = np.split(variance, np.cumsum(sizes)[:-1])
    spreads = np.sqrt([site.mean() for site in of_sites])
    return np.repeat(np.where(spreads > 0, spreads, 1.0), sizes)


def scaled(
    points: Float[np.ndarray, "n d"], sizes: list[int]
) -> Float[np.ndarray, "n directions"]:
    """The directions in which points vary most, with sites in units of their spread.

    Entries of one site keep their proportions: directions that separate modes vary more
    than the rest.
    """
    points = (points - points.mean(0)) / units(points.var(0), sizes)
    most = tuning.COMPARISON.directions
    if points.shape[1] <= most:
        return points
    _, _, axes = np.linalg.svd(points, full_matrices=False)
    return np.asarray(points @ axes[:most].T)


def nearest(
    points: Float[np.ndarray, "n d"],
    ancestors: Int[np.ndarray, " n"] | None,
    others: Float[np.ndarray, "m d"],
    their_ancestors: Int[np.ndarray, " m"],
    k: int,
) -> tuple[Int[np.ndarray, "n k"], Float[np.ndarray, "n k"]]:
    """The k nearest other points of each point, unordered, and their distances.

    Others of the same ancestor are left out, as they are near for another reason.
    """
    from scipy.spatial.distance import cdist

    index = np.empty((len(points), k), int)
    distance = np.empty((len(points), k))
    # In blocks, as all distances together may not fit into memory.
    for i in range(0, len(points), 512):
        block = slice(i, i + 512)
        distances = cdist(points[block], others)
        if ancestors is not None:
            same = ancestors[block, None] == their_ancestors[None, :]
            distances[same] = math.inf
        index[block] = np.argpartition(distances, k - 1, axis=1)[:, :k]
        distance[block] = np.take_along_axis(distances, index[block], axis=1)
    return index, distance


def neighbours(points: Float[np.ndarray, "n d"], k: int) -> Int[np.ndarray, "pairs 2"]:
    """Pairs (i, j) with i < j of points of which one is among the k nearest of the
    other."""
    from scipy.spatial import cKDTree

    k = min(k, len(points) - 1)
    _, near = cKDTree(points).query(points, k + 1)  # each point finds itself, too
    each = np.repeat(np.arange(len(points)), k + 1)
    pairs = np.stack([each, near.ravel()], axis=1)
    pairs = np.sort(pairs[pairs[:, 0] != pairs[:, 1]], axis=1)
    return np.unique(pairs, axis=0)


def tree(points: Float[np.ndarray, "n d"]) -> Int[np.ndarray, "pairs 2"]:
    """Pairs (i, j) with i < j that form the shortest tree over all n points, n − 1 of
    them: it bridges every gap."""
    from scipy.sparse.csgraph import minimum_spanning_tree
    from scipy.spatial.distance import pdist, squareform

    # A distance of 0 would count as no edge.
    distances = squareform(pdist(points) + 1e-30)
    edges = minimum_spanning_tree(distances).tocoo()
    return np.sort(np.stack([edges.row, edges.col], axis=1), axis=1)


def components(pairs: Int[np.ndarray, "pairs 2"], n: int) -> Int[np.ndarray, " {n}"]:
    """The group of each of n things, where ``pairs`` are connected; groups are numbered
    from the largest."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    labels = np.asarray(connected_components(graph, directed=False)[1])
    # Stable, so that groups of one size keep their order.
    by_size = np.argsort(-np.bincount(labels), kind="stable")
    rank = np.argsort(by_size)
    return rank[labels]
