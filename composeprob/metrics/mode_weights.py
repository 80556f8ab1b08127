"""The share of mass at each mode of a known target, and the error of each mode's width and orientation."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64, Int
from numpy.typing import ArrayLike

from composeprob.errors import ShapeError
from composeprob.metrics.distances import as_weights


def mode_weights(
    samples: ArrayLike, centers: ArrayLike, log_weights: ArrayLike | None = None
) -> Float64[np.ndarray, " modes"]:
    """Computes the share of the samples' weight that is nearest to each centre.

    Args:
        samples: shape (N, …); samples that are not finite belong to no mode.
        centers: shape (M, …), events of the same shape.
        log_weights: log-weights of the samples up to a constant, shape (N,); equal weights if left out.

    Returns:
        Shares of shape (M,). They sum to 1, or to less by the weight of samples that are not finite.

    Raises:
        ShapeError: events of different shape.

    Example:
        >>> from composeprob.metrics.mode_weights import mode_weights
        >>> mode_weights([[0.1], [0.9], [1.2], [0.8]], [[0.0], [1.0]]).tolist()
        [0.25, 0.75]
    """
    points, chosen = nearest_mode(samples, centers)
    weights = as_weights(log_weights, len(points))
    inside = chosen >= 0
    return np.bincount(chosen[inside], weights=weights[inside], minlength=len(np.asarray(centers)))


def nearest_mode(samples: ArrayLike, centers: ArrayLike) -> tuple[Float64[np.ndarray, "n d"], Int[np.ndarray, " n"]]:
    """Samples as rows, and the number of the centre that each is nearest to: −1 where it is not finite."""
    points, targets = np.asarray(samples, np.float64), np.asarray(centers, np.float64)
    if points.shape[1:] != targets.shape[1:]:
        raise ShapeError(
            f"Samples are events of shape {points.shape[1:]}, centres of shape {targets.shape[1:]}.",
            fix="pass samples of shape (N, …) and centres of shape (M, …) with the same trailing shape.",
        )
    points, targets = points.reshape(len(points), -1), targets.reshape(len(targets), -1)
    finite = np.asarray(np.isfinite(points).all(axis=1))
    # ‖x − c‖² up to ‖x‖², which all centres share: no (N, M, d) array
    distance = (targets**2).sum(1)[None] - 2 * np.where(finite[:, None], points, 0.0) @ targets.T
    return points, np.where(finite, distance.argmin(1), -1)


def total_variation(p: ArrayLike, q: ArrayLike) -> float:
    """Computes the total variation ½ Σᵢ |pᵢ − qᵢ|: 0 for equal distributions, 1 for disjoint ones.

    Args:
        p: probabilities, shape (M,).
        q: probabilities, shape (M,).

    Example:
        >>> from composeprob.metrics.mode_weights import total_variation
        >>> total_variation([0.5, 0.5], [0.75, 0.25])
        0.25
    """
    p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
    if p.shape != q.shape:
        fix = "pass one weight for each of the same modes, 0 where one has none."
        raise ShapeError(f"Two distributions over {p.shape} and {q.shape} modes cannot be compared.", fix=fix)
    return float(0.5 * np.abs(p - q).sum())


def covariance_error(
    samples: ArrayLike, centers: ArrayLike, covariances: ArrayLike, log_weights: ArrayLike | None = None
) -> Float64[np.ndarray, " modes"]:
    r"""Computes the relative error of the covariance within each mode, $\|\hat C_m - C_m\|_F / \|C_m\|_F$.

    Ĉ_m is the unbiased covariance, about their own mean, of the samples that are nearest to centre m (`mode_weights`
    counts the same ones). Where modes overlap this cuts their tails, and exact draws do not reach 0 either.

    Args:
        samples: shape (N, …); samples that are not finite belong to no mode.
        centers: shape (M, …), events of the same shape.
        covariances: C_m, shape (M, d, d) with d the number of elements of an event, or (d, d) for all modes.
        log_weights: log-weights of the samples up to a constant, shape (N,); equal weights if left out.

    Returns:
        Errors of shape (M,); NaN for a mode that has no two samples.

    Raises:
        ShapeError: shapes that do not fit together.

    Example:
        >>> import composeprob as cp
        >>> cp.metrics.covariance_error([[-1.0], [1.0], [9.0], [11.0]], [[0.0], [10.0]], [[[2.0]], [[1.0]]]).tolist()
        [0.0, 1.0]
    """
    points, chosen = nearest_mode(samples, centers)
    (count, d), modes = points.shape, len(np.asarray(centers))
    truth = np.asarray(covariances, np.float64)
    if truth.shape not in ((modes, d, d), (d, d)):
        fix = f"pass an array of shape ({modes}, {d}, {d}), or ({d}, {d}) for all modes."
        raise ShapeError(f"{modes} modes of {d} numbers have covariances of shape {truth.shape}.", fix=fix)
    truth = np.broadcast_to(truth, (modes, d, d))
    weights = as_weights(log_weights, count)
    errors = np.full(modes, np.nan)
    for m in range(modes):
        inside = chosen == m
        if not weights[inside].any():
            continue
        w = weights[inside] / weights[inside].sum()
        if 1 - w @ w < 1e-12:  # (n − 1)/n for equal weights
            continue
        found = np.cov(points[inside], rowvar=False, aweights=w).reshape(d, d)
        errors[m] = np.linalg.norm(found - truth[m]) / np.linalg.norm(truth[m])
    return errors
