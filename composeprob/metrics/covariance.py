"""The error of each mode's width and orientation."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64
from numpy.typing import ArrayLike

from composeprob.errors import ShapeError
from composeprob.metrics.mode_weights import nearest_mode
from composeprob.metrics.points import as_weights


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
        raise ShapeError(
            f"{modes} modes of {d} numbers have covariances of shape {truth.shape}.",
            fix=f"pass an array of shape ({modes}, {d}, {d}), or ({d}, {d}) for all modes.",
        )
    truth = np.broadcast_to(truth, (modes, d, d))
    weights = as_weights(log_weights, count)
    errors = np.full(modes, np.nan)
    for m in range(modes):
        inside = chosen == m
        total = weights[inside].sum()
        if total == 0:
            continue
        w = weights[inside] / total
        freedom = 1 - w @ w  # (n − 1)/n for equal weights
        if freedom < 1e-12:
            continue
        centred = points[inside] - w @ points[inside]
        found = (w[:, None] * centred).T @ centred / freedom
        errors[m] = np.linalg.norm(found - truth[m]) / np.linalg.norm(truth[m])
    return errors
