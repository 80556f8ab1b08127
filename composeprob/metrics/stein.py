"""The kernel Stein discrepancy: how far samples are from a density known up to its constant."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float64
from numpy.typing import ArrayLike

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import over_chains
from composeprob.errors import InvalidValueError, ShapeError
from composeprob.metrics.points import as_positions, as_rows, as_weights

Sites = ArrayLike | Mapping[str, ArrayLike]
"""One site's values, or ``{site: values}``."""


def ksd(
    samples: Sites,
    score: AnnealedDensity | Callable[[Array], Array] | Sites,
    beta: float = -0.5,
    length: float = 1.0,
    log_weights: ArrayLike | None = None,
) -> float:
    r"""Computes the kernel Stein discrepancy with the kernel $k(x, y) = (c^2 + \|x - y\|^2)^\beta$.

    $$\mathrm{KSD}^2 = \sum_{ij} w_i w_j\, k_0(x_i, x_j), \qquad
      k_0 = \nabla_x\!\cdot\!\nabla_y k + \langle\nabla_x k, s(y)\rangle + \langle\nabla_y k, s(x)\rangle
            + k\,\langle s(x), s(y)\rangle,$$

    with s = ∇ log π. It needs no draws of π and no normaliser; E k₀ = 0 under π. Pairs of a sample with itself count
    (the V-statistic, as in the literature), so it is ≥ 0, and for n exact draws about √(E k₀(x, x)/n). It does **not**
    see the shares of modes that are far apart, nor one that is missing: report `mode_weights` beside it.

    Args:
        samples: shape (n, …), or ``{site: (n, …)}``.
        score: s: a compiled density, whose level 0 counts; a function of ONE event; or the scores themselves, shaped
            like the samples.
        beta: in (−1, 0): there KSD → 0 implies convergence in distribution, if the score grows linearly.
        length: c > 0, in the samples' units.
        log_weights: of the samples, up to a constant, shape (n,).

    Raises:
        ShapeError: scores or samples of the wrong shape.
        InvalidValueError: samples or scores that are not finite, β outside (−1, 0), or c ≤ 0.

    Example:
        >>> import composeprob as cp, jax
        >>> x = jax.random.normal(jax.random.key(0), (500, 2))
        >>> cp.metrics.ksd(x, lambda x: -x) < 0.1 < cp.metrics.ksd(x + 1, lambda x: -x)
        True

    References:
        Gorham and Mackey 2017, *Measuring sample quality with kernels*. Liu, Lee and Jordan 2016.
    """
    from scipy.spatial.distance import cdist

    if not -1 < beta < 0 or not (np.isfinite(length) and length > 0):
        raise InvalidValueError(
            f"The kernel (c² + r²)^β needs −1 < β < 0 and c > 0; got β = {beta!r}, c = {length!r}.",
            fix="beta=-0.5, length=1.0.",
        )
    points, scores = _with_scores(samples, score)
    weights, d = as_weights(log_weights, len(points)), points.shape[1]
    inner = (points * scores).sum(1)
    total = 0.0
    for i in range(0, len(points), tuning.GRAM_ROWS):
        x, s, w = points[i : i + tuning.GRAM_ROWS], scores[i : i + tuning.GRAM_ROWS], weights[i : i + tuning.GRAM_ROWS]
        square = cdist(x, points, "sqeuclidean")
        q = length**2 + square
        # ⟨x − y, s(y) − s(x)⟩, without an (n, n, d) array
        along = x @ scores.T - inner[None] - inner[i : i + tuning.GRAM_ROWS, None] + s @ points.T
        stein = q**beta * (s @ scores.T) + 2 * beta * q ** (beta - 1) * (along - d)
        stein -= 4 * beta * (beta - 1) * q ** (beta - 2) * square
        total += float(w @ stein @ weights)
    return float(np.sqrt(max(total, 0.0)))


def _with_scores(
    samples: Sites, score: AnnealedDensity | Callable[[Array], Array] | Sites
) -> tuple[Float64[np.ndarray, "n d"], Float64[np.ndarray, "n d"]]:
    """Samples and scores as rows."""
    if isinstance(score, AnnealedDensity):
        scores = over_chains(eqx.Partial(score.score, level=0), as_positions(samples, score))
        scores = _rows(scores, "scores")
    elif callable(score):
        scores = _rows(jax.vmap(score)(jnp.asarray(samples, jnp.result_type(float))), "scores")
    else:
        scores = _rows(score, "scores")
    points = _rows(samples, "samples")
    if points.shape != scores.shape:
        raise ShapeError(
            f"{points.shape[0]} samples of {points.shape[1]} numbers have scores of shape {scores.shape}.",
            fix="a score is a gradient: one number for each of the sample's.",
        )
    return points, scores


def _rows(tree: Sites, what: str) -> Float64[np.ndarray, "n d"]:
    """Rows of all sites together, in the order of their names."""
    if not isinstance(tree, Mapping):
        return as_rows(tree, what)
    return np.concatenate([as_rows(tree[name], what) for name in sorted(tree)], axis=1)
