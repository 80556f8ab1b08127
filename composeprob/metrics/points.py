"""Samples as rows of numbers, and their weights, as all distances use them."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64
from numpy.typing import ArrayLike

from composeprob.errors import InvalidValueError, ShapeError


def as_rows(samples: ArrayLike, what: str) -> Float64[np.ndarray, "n d"]:
    """Converts samples of shape (n, …) to float64 of shape (n, d).

    Raises:
        ShapeError: no leading axis of samples, or none of them.
        InvalidValueError: a sample that is not finite.
    """
    points = np.asarray(samples, np.float64)
    if points.ndim == 0 or len(points) == 0:
        raise ShapeError(
            f"{what} must have a leading axis of at least one sample; got shape {points.shape}.",
            fix="pass an array of shape (n, …), such as result['x'].",
        )
    points = points.reshape(len(points), -1)
    bad = int((~np.isfinite(points)).any(1).sum())
    if bad:
        raise InvalidValueError(
            f"{bad} of {len(points)} samples in {what} are not finite.",
            fix="look at result.status; drop them only if you also report how many there were.",
        )
    return points


def same_dimension(x: Float64[np.ndarray, "n d"], y: Float64[np.ndarray, "m e"]) -> None:
    """Refuses samples of spaces of different dimension."""
    if x.shape[1] != y.shape[1]:
        raise ShapeError(
            f"Events of {x.shape[1]} and of {y.shape[1]} numbers cannot be compared.",
            fix="pass samples of one site.",
        )


def as_weights(log_weights: ArrayLike | None, n: int) -> Float64[np.ndarray, " {n}"]:
    """Returns weights of shape (n,) that sum to 1; equal ones where ``log_weights`` is None.

    Raises:
        ShapeError: not one log-weight a sample.
        InvalidValueError: a NaN, or no weight at all.
    """
    if log_weights is None:
        return np.full(n, 1.0 / max(n, 1))
    logs = np.asarray(log_weights, np.float64)
    if logs.shape != (n,):
        raise ShapeError(f"{n} samples have log-weights of shape {logs.shape}.", fix=f"pass an array of shape ({n},).")
    if np.isnan(logs).any() or not np.isfinite(logs.max()):
        raise InvalidValueError(
            "Log-weights must be numbers or −∞, with one of them finite.", fix="pass result.log_weights."
        )
    weights = np.exp(logs - logs.max())
    return weights / weights.sum()
