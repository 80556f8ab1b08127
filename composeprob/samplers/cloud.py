"""The chains of a run as one weighted cloud of points: flattened positions, weights, a safe covariance."""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import PyTree

from composeprob.samplers.resampling import relative_weights

T = TypeVar("T")
SMALLEST = 1e-6
"""The least eigenvalue of a regularised correlation matrix: what float32 still inverts."""


def flattened(tree: PyTree[Array]) -> Array:
    """Every chain's numbers in one row, (N, d): leaves of shape (N, …) side by side, sites in alphabetical order."""
    leaves = jax.tree.leaves(tree)
    return jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)


def unflattened(row: Array, like: T) -> T:
    """One chain's numbers, (d,), in the shapes of ``like``, a position without an axis of chains."""
    leaves, treedef = jax.tree.flatten(like)
    sizes = [leaf.size for leaf in leaves]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    pieces = [row[end - size : end].reshape(leaf.shape) for leaf, size, end in zip(leaves, sizes, ends, strict=True)]
    return jax.tree.unflatten(treedef, pieces)


def shares(log_weights: Array) -> Array:
    """Weights that add up to 1, (N,); equal ones where every weight is 0."""
    weights = relative_weights(log_weights)
    total = jnp.sum(weights)
    return jnp.where(total > 0, weights / jnp.where(total > 0, total, 1.0), 1.0 / len(weights))


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
    return jnp.minimum(1.0 / (1.0 + (jnp.asarray(count) / size) ** 4) + SMALLEST, 1.0)
