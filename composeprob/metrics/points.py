"""Samples as rows of numbers, and their weights, as all distances use them."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float64
from numpy.typing import ArrayLike

from composeprob.density.annealed import AnnealedDensity
from composeprob.errors import InvalidValueError, ShapeError


def as_rows(samples: ArrayLike, what: str) -> Float64[np.ndarray, "n d"]:
    """Finite samples of shape (n, …), at least one, as float64 of shape (n, d)."""
    points = np.asarray(samples, np.float64)
    if points.ndim == 0 or len(points) == 0:
        fix = "pass an array of shape (n, …), such as result['x']."
        raise ShapeError(f"{what} must have a leading axis of at least one sample; got shape {points.shape}.", fix=fix)
    points = points.reshape(len(points), -1)
    bad = int((~np.isfinite(points)).any(1).sum())
    if bad:
        fix = "look at result.status; drop them only if you also report how many there were."
        raise InvalidValueError(f"{bad} of {len(points)} samples in {what} are not finite.", fix=fix)
    return points


def as_positions(points: object, density: AnnealedDensity) -> dict[str, Array]:
    """Finite points as ``{site: (n, …)}`` of a density's sites and shapes, of one site those of an array alone."""
    sites = density.sites
    given = points if isinstance(points, Mapping) else dict.fromkeys(sites if len(sites) == 1 else (), points)
    if given.keys() != sites.keys():
        raise ShapeError(
            f"This density has the sites {sorted(sites)}; got {sorted(given) or 'one array of points'}.",
            fix="pass {" + ", ".join(f"{name!r}: (n, …)" for name in sites) + "}.",
        )
    placed = {name: jnp.asarray(given[name], jnp.result_type(float)) for name in sites}
    numbers = {value.shape[:1] for value in placed.values()}
    wrong = [name for name, value in placed.items() if value.shape[1:] != sites[name].shape or value.ndim == 0]
    if wrong or len(numbers) != 1 or numbers == {(0,)}:
        shapes = {name: value.shape for name, value in placed.items()}
        fix = "pass " + ", ".join(f"(n, {', '.join(map(str, s.shape))}) for {k!r}" for k, s in sites.items()) + "."
        raise ShapeError(f"Points have the shapes {shapes}.", fix=fix)
    if not all(bool(jnp.isfinite(value).all()) for value in placed.values()):
        raise InvalidValueError("Some points are not finite.", fix="drop them.")
    return placed


def as_pair(x: ArrayLike, y: ArrayLike) -> tuple[Float64[np.ndarray, "n d"], Float64[np.ndarray, "m d"]]:
    """Two sets of samples as rows; refuses those of spaces of different dimension."""
    points, others = as_rows(x, "x"), as_rows(y, "y")
    if points.shape[1] != others.shape[1]:
        fix = "pass samples of one site."
        raise ShapeError(f"Events of {points.shape[1]} and of {others.shape[1]} numbers cannot be compared.", fix=fix)
    return points, others


def as_weights(log_weights: ArrayLike | None, n: int) -> Float64[np.ndarray, " {n}"]:
    """Weights of shape (n,) that sum to 1; equal ones where ``log_weights``, one a sample, is None."""
    if log_weights is None:
        return np.full(n, 1.0 / max(n, 1))
    logs = np.asarray(log_weights, np.float64)
    if logs.shape != (n,):
        raise ShapeError(f"{n} samples have log-weights of shape {logs.shape}.", fix=f"pass an array of shape ({n},).")
    if np.isnan(logs).any() or not np.isfinite(logs.max()):
        fix = "pass result.log_weights."
        raise InvalidValueError("Log-weights must be numbers or −∞, with one of them finite.", fix=fix)
    weights = np.exp(logs - logs.max())
    return weights / weights.sum()
