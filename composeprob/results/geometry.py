"""Samples as rows of numbers, with their names and units; which are near to one
another; and samples as images."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from composeprob import tuning


def entries(name: str, shape: tuple[int, ...]) -> list[str]:
    """The names of a site's numbers: ``x``, or ``x[0, 1]`` and so on."""
    return [
        name + (f"[{', '.join(map(str, index))}]" if index else "")
        for index in np.ndindex(shape)
    ]


def shown_entries(
    name: str, values: np.ndarray, lead: int
) -> tuple[list[str], np.ndarray]:
    """The names of a site's numbers and their values, (…, numbers), behind so many axes
    of samples; of many numbers their mean alone, as ``x (28×28, pooled)``."""
    shape, flat = values.shape[lead:], values.reshape(*values.shape[:lead], -1)
    if flat.shape[-1] <= tuning.SUMMARY.most_rows:
        return entries(name, shape), flat
    return [f"{name} ({'×'.join(map(str, shape))}, pooled)"], flat.mean(
        -1, keepdims=True
    )


def chosen(sites: Mapping[str, ArrayLike], index: np.ndarray) -> dict[str, np.ndarray]:
    """Some samples of every site, ``{site: (n, …)}``."""
    return {name: np.asarray(x)[index] for name, x in sites.items()}


def spaced(n: int, most: float) -> np.ndarray:
    """The indices of so many of n things at most, evenly spaced."""
    return np.linspace(0, n - 1, min(n, int(most))).astype(int)


def rows(
    sites: Mapping[str, np.ndarray], lead: int = 1
) -> tuple[Float[np.ndarray, "n d"], list[int], list[str]]:
    """All sites, ``{site: (n, …)}``, in one row a sample, how many numbers each has,
    and their names; behind one axis of samples or two."""
    shapes = {name: np.shape(x)[lead:] for name, x in sites.items()}
    sizes = [math.prod(shape) for shape in shapes.values()]
    flat = [
        np.asarray(x, float).reshape(-1, size)
        for x, size in zip(sites.values(), sizes, strict=True)
    ]
    names = [each for name, shape in shapes.items() for each in entries(name, shape)]
    return np.concatenate(flat, axis=1), sizes, names


def units(
    variance: Float[np.ndarray, " d"], sizes: list[int]
) -> Float[np.ndarray, " d"]:
    """The spread of the site that each entry belongs to, by the entries' variances; 1
    where nothing varies."""
    spreads = np.sqrt(
        [part.mean() for part in np.split(variance, np.cumsum(sizes)[:-1])]
    )
    return np.repeat(np.where(spreads > 0, spreads, 1.0), sizes)


def scaled(points: np.ndarray, sizes: list[int]) -> np.ndarray:
    """The directions in which points vary most, with sites in units of their spread.

    Entries of one site keep their proportions: what holds modes apart is what varies
    more than the rest.
    """
    points = (points - points.mean(0)) / units(points.var(0), sizes)
    if points.shape[1] <= tuning.COMPARISON.directions:
        return points
    return np.asarray(
        points
        @ np.linalg.svd(points, full_matrices=False)[2][
            : tuning.COMPARISON.directions
        ].T
    )


def nearest(
    points: np.ndarray,
    families: np.ndarray | None,
    others: np.ndarray,
    their_families: np.ndarray,
    k: int,
) -> tuple[Int[np.ndarray, "n k"], Float[np.ndarray, "n k"]]:
    """The k nearest others of each point, in no order, and how far they are, but for
    those of its own family, which are near for another reason."""
    from scipy.spatial.distance import cdist

    index, distance = np.empty((len(points), k), int), np.empty((len(points), k))
    for i in range(0, len(points), 512):
        part = slice(i, i + 512)
        distances = cdist(points[part], others)
        if families is not None:
            distances[families[part, None] == their_families[None, :]] = math.inf
        index[part] = np.argpartition(distances, k - 1, axis=1)[:, :k]
        distance[part] = np.take_along_axis(distances, index[part], axis=1)
    return index, distance


def neighbours(points: np.ndarray, k: int) -> np.ndarray:
    """Pairs (i, j) with i < j of points of which one is among the k nearest of the
    other, (·, 2)."""
    from scipy.spatial import cKDTree

    k = min(k, len(points) - 1)
    near = cKDTree(points).query(points, k + 1)[1]
    pairs = np.stack([np.repeat(np.arange(len(points)), k + 1), near.ravel()], axis=1)
    pairs = np.sort(pairs[pairs[:, 0] != pairs[:, 1]], axis=1)
    return np.unique(pairs, axis=0)


def tree(points: np.ndarray) -> np.ndarray:
    """Pairs (i, j) with i < j of the shortest tree that connects all points, (n − 1,
    2): the way over every gap."""
    from scipy.sparse.csgraph import minimum_spanning_tree
    from scipy.spatial.distance import pdist, squareform

    found = minimum_spanning_tree(squareform(pdist(points) + 1e-30)).tocoo()
    return np.sort(np.stack([found.row, found.col], axis=1), axis=1)


def components(pairs: np.ndarray, n: int) -> np.ndarray:
    """The number of the group that pairs connect each of n things to, the largest
    first, (n,)."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    found = np.asarray(connected_components(graph, directed=False)[1])
    order = np.argsort(-np.bincount(found), kind="stable")
    return np.argsort(order)[found]


def is_image(shape: tuple[int, ...]) -> bool:
    """Says whether events of a shape are images: (H, W), (H, W, 1) or (H, W, 3) with
    sides of 6 or more."""
    return (
        len(shape) in (2, 3)
        and min(shape[:2]) >= 6
        and (len(shape) == 2 or shape[2] in (1, 3))
    )


def as_images(values: np.ndarray) -> np.ndarray:
    """Events (N, H, W) or (N, H, W, C) as images (N, H, W, C), from 0 to 1; values in
    [0, 1] or [−1, 1] keep their meaning, others are stretched."""
    images = np.nan_to_num(np.asarray(values, float))
    images = images[..., None] if images.ndim == 3 else images
    low, high = (
        float(end) for end in np.quantile(images, [0.001, 0.999])
    )  # level 0 still carries some noise
    if low > -0.25 and high < 1.25:
        low, high = 0.0, 1.0
    elif low > -1.5 and high < 1.5:
        low, high = -1.0, 1.0
    return np.clip((images - low) / max(high - low, 1e-12), 0, 1)
