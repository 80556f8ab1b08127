r"""Metrics from the moves of all chains at a level: how much a score changes as a chain moves.

With Δx the way that a chain went at a level and Δs the change of its score, the precision P solves

$$P\,\Sigma\,P = F, \qquad \Sigma = E[\Delta x\,\Delta x^\top], \quad F = E[\Delta s\,\Delta s^\top],$$

the geometric mean of F and Σ⁻¹. The metric is C = P⁻¹/s², in units of the level's noise s = σ_k: then h·C = c·P⁻¹ under
an adaptive step, and c has no reason to change from level to level.

Where scores are linear, Δs = −P·Δx: P is exact from d moves, wherever the chains are. A covariance of where chains are,
or of their scores, is P⁻¹ or P only once the chains have the law of the level; after a fast change of levels chains
would crawl, and so would they where modes are far apart, whose distance is most of a covariance. Moves stay in modes.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from composeprob import tuning
from composeprob.density.evaluation import Position
from composeprob.kernels import Metric


def kind_of(kind: str, size: int, num_chains: int) -> str:
    """What ``"auto"`` is for so many numbers a position and so many chains; other kinds are what they are."""
    if kind != "auto":
        return kind
    if size <= tuning.METRIC.most_numbers and num_chains >= tuning.METRIC.chains_per_number * size:
        return "full"
    return (
        "diagonal" if num_chains >= tuning.METRIC.chains and num_chains * size <= tuning.METRIC.most_of_all else "none"
    )


def unmeasured(kind: str, like: Position) -> Metric:
    """The identity, in the form that `measured` has."""
    unit = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), like)
    size = sum(leaf.size for leaf in jax.tree.leaves(like))
    return Metric(unit) if kind == "diagonal" else Metric(unit, dense=jnp.eye(size))


def measured(kind: str, before: Metric, scale: Position, moved: Array, changed: Array) -> Metric:
    """The metric that moves tell, or what was known before where they tell nothing.

    Args:
        kind: ``"diagonal"`` or ``"full"``.
        before: of the same kind.
        scale: s for every number of a position, in its shapes: the level's noise; 1 where steps do not follow that.
        moved, changed: Δx and Δs of all chains, (N, d), the same on every device. Chains that stayed, or are not finite
            somewhere, do not count.

    References:
        Titsias (2023), *Optimal preconditioning and Fisher adaptive Langevin sampling*; Andrieu and Thoms (2008) for
        adaptation in general.
    """
    sound = jnp.all(jnp.isfinite(moved) & jnp.isfinite(changed), axis=1) & jnp.any(moved != 0, axis=1)
    count = jnp.sum(sound)
    x, s = (jnp.where(sound[:, None], values, 0.0) / jnp.sqrt(jnp.maximum(count, 1)) for values in (moved, changed))
    long, steep = jnp.sqrt(jnp.sum(x**2, axis=0)), jnp.sqrt(jnp.sum(s**2, axis=0))
    told, units = (long > 0) & (steep > 0), ravel_pytree(scale)[0]
    known = ravel_pytree(before.unit)[0] * units
    width = jnp.sqrt(jnp.where(told, long, 1.0) / jnp.where(told, steep, 1.0))
    width = jnp.where(told, jnp.clip(width, known * tuning.METRIC.shrinks, known * tuning.METRIC.grows), known)
    unit = ravel_pytree(scale)[1](width / units)
    if kind == "diagonal":
        return Metric(unit)
    along, across = jnp.where(told, long / width, 1.0), jnp.where(told, steep * width, 1.0)
    largest = jnp.max(along * across) ** 0.5  # the same factor on both changes nothing, and keeps float32 in its range
    x, s = x / width / largest, s * width / largest
    found = Metric(unit, dense=_root(x.T @ x, s.T @ s, count))
    return jax.tree.map(partial(jnp.where, count > 0), found, before)


def _root(covariance: Array, slopes: Array, count: Array) -> Array:
    """M with M·Mᵀ = C, the solution of C·F·C = Σ: with Σ = R·Rᵀ, C = R·(Rᵀ·F·R)^−½·Rᵀ. Of C = I where one is 0.

    Correlations of both are shrunk: with few different moves only the diagonal is known.
    """
    told = (jnp.diag(covariance) > 0) & (jnp.diag(slopes) > 0)
    one = jnp.diag(jnp.where(told, 0.0, 1.0))
    known = jnp.where(told[:, None] & told, 1.0, 0.0)
    root = jnp.linalg.cholesky(regularised(known * covariance, count) + one)
    values, vectors = jnp.linalg.eigh(root.T @ (regularised(known * slopes, count) + one) @ root)
    return root @ vectors * jnp.maximum(values, tuning.METRIC.least_eigenvalue * values[-1]) ** -0.25


def regularised(covariance: Array, count: Array | float) -> Array:
    """A covariance that was estimated from so many independent points, made safely positive definite.

    Its correlations are shrunk by `shrinkage`.

    Args:
        covariance: (d, d), symmetric; 0 where all points agree, which stays as it is.
        count: n.
    """
    share = shrinkage(covariance.shape[0], count)
    return covariance + share * (jnp.diag(jnp.diag(covariance)) - covariance)


def shrinkage(size: int, count: Array | float) -> Array:
    """How far a covariance of d numbers from n independent points is taken towards its diagonal: 1/(1 + (n/d)⁴) + 10⁻⁶.

    In the coordinates in which the true covariance is the identity, an estimate has eigenvalues between (1 ∓ √(d/n))²:
    for n well above d it needs no shrinkage, however ill-conditioned it is, and for n ≤ d it is singular.
    """
    return jnp.minimum(1.0 / (1.0 + (jnp.asarray(count) / size) ** 4) + tuning.METRIC.least_eigenvalue, 1.0)
