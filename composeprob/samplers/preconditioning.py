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
    metric = tuning.METRIC
    if kind != "auto":
        return kind
    if size <= metric.most_numbers and num_chains >= metric.chains_per_number * size:
        return "full"
    return "diagonal" if num_chains >= metric.chains and num_chains * size <= metric.most_of_all else "none"


def unmeasured(kind: str, like: Position) -> Metric:
    """The identity, in the form that `measured` has."""
    unit = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), like)
    size = sum(leaf.size for leaf in jax.tree.leaves(like))
    return Metric(unit) if kind == "diagonal" else Metric(unit, dense=jnp.eye(size))


def measured(before: Metric, scale: Position, moved: Array, changed: Array) -> Metric:
    """The metric by Δx and Δs of all chains, (N, d), in the form of the one ``before``, which stays where they leave it
    open. Chains that stayed, or are not finite somewhere, do not count.

    ``scale`` is s for every number of a position, in its shapes: the level's noise, 1 where steps do not follow that.

    References:
        Titsias (2023), *Optimal preconditioning and Fisher adaptive Langevin sampling*; Andrieu and Thoms (2008) for
        adaptation in general.
    """
    rows = jnp.stack([moved, changed])
    sound = jnp.all(jnp.isfinite(rows), axis=(0, 2)) & jnp.any(moved != 0, axis=1)
    count = jnp.sum(sound)
    rows = jnp.where(sound[:, None], rows, 0.0) / jnp.sqrt(jnp.maximum(count, 1))
    lengths = jnp.sqrt(jnp.sum(rows**2, axis=1))
    (units, shaped), (known, _) = ravel_pytree(scale), ravel_pytree(before.unit)
    measurable, known = jnp.all(lengths > 0, axis=0), known * units
    width = jnp.sqrt(lengths[0] / jnp.where(measurable, lengths[1], 1.0))
    width = jnp.clip(width, known * tuning.METRIC.shrinks, known * tuning.METRIC.grows)
    width = jnp.where(measurable, width, known)
    unit = shaped(width / units)
    if before.dense is None:
        return Metric(unit)
    scales = jnp.stack([1 / width, width])
    # The same factor on both changes nothing, and keeps float32 in its range.
    largest = jnp.max(jnp.where(measurable, jnp.prod(lengths, axis=0), 1.0)) ** 0.5
    rows = rows * scales[:, None] / largest
    found = Metric(unit, dense=_root(rows.mT @ rows, measurable, count))
    return jax.tree.map(partial(jnp.where, count > 0), found, before)


def _root(matrices: Array, measurable: Array, count: Array) -> Array:
    """M with M·Mᵀ = C, the solution of C·F·C = Σ, of Σ and F, (2, d, d): with Σ = R·Rᵀ, C = R·(Rᵀ·F·R)^−½·Rᵀ. Of C = I
    where an entry is not ``measurable``, (d,).

    Correlations of both are shrunk: with few different moves only the diagonal is known.
    """
    both = measurable[:, None] & measurable
    matrices = regularised(jnp.where(both, matrices, 0.0), count) + jnp.where(both, 0.0, jnp.eye(len(both)))
    root, slopes = jnp.linalg.cholesky(matrices[0]), matrices[1]
    values, vectors = jnp.linalg.eigh(root.T @ slopes @ root)
    return root @ vectors * jnp.maximum(values, tuning.METRIC.least_eigenvalue * values[-1]) ** -0.25


def regularised(covariance: Array, count: Array | float) -> Array:
    """Covariances of d numbers, (…, d, d), from n independent points, taken towards their diagonals by
    1/(1 + (n/d)⁴) + 10⁻⁶.

    In the coordinates in which the true covariance is the identity, an estimate has eigenvalues between (1 ∓ √(d/n))²:
    for n well above d it needs no shrinkage, however ill-conditioned it is, and for n ≤ d it is singular.
    """
    size = covariance.shape[-1]
    share = 1.0 / (1.0 + (jnp.asarray(count) / size) ** 4) + tuning.METRIC.least_eigenvalue
    return covariance * (1 - jnp.minimum(share, 1.0) * (1 - jnp.eye(size)))
