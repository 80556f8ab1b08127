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

from composeprob.density.evaluation import Position
from composeprob.kernels import Metric
from composeprob.samplers.cloud import SMALLEST, regularised, unflattened

SOME = 50
"""Chains from which on ``"auto"`` measures each coordinate's width."""
PER_NUMBER = 10
"""Chains for each number of a position, from which on it measures how they hang together."""
MOST = 64
"""Numbers of a position up to which it does."""
ROOM = 2**25
"""Numbers, of all chains together, up to which it measures anything: every device gets those of all."""
RANK = 16
"""Narrow directions of ``"low_rank"``."""
SHRINKS, GROWS = 0.1, 3.0
"""Factors by which a width may change from level to level: too long a step stops a chain, too short a one does not."""


def kind_of(kind: str, size: int, num_chains: int) -> str:
    """What ``"auto"`` is for so many numbers a position and so many chains; other kinds are what they are."""
    if kind != "auto":
        return kind
    if size <= MOST and num_chains >= PER_NUMBER * size:
        return "full"
    return "diagonal" if num_chains >= SOME and num_chains * size <= ROOM else "none"


def unmeasured(kind: str, like: Position) -> Metric:
    """The identity, in the form that `measured` has."""
    unit = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), like)
    size = sum(leaf.size for leaf in jax.tree.leaves(like))
    if kind == "diagonal":
        return Metric(unit)
    if kind == "full":
        return Metric(unit, dense=jnp.eye(size))
    rank = min(RANK, size)
    return Metric(unit, basis=jnp.eye(size)[:, :rank], stretch=jnp.ones(rank))


def measured(kind: str, before: Metric, scale: Position, moved: Array, changed: Array) -> Metric:
    """The metric that moves tell, or what was known before where they tell nothing.

    Args:
        kind: ``"diagonal"``, ``"low_rank"`` or ``"full"``.
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
    width = jnp.where(told, jnp.clip(width, known * SHRINKS, known * GROWS), known)
    unit = unflattened(width / units, scale)
    if kind == "diagonal":
        return Metric(unit)
    along, across = jnp.where(told, long / width, 1.0), jnp.where(told, steep * width, 1.0)
    largest = jnp.max(along * across) ** 0.5  # the same factor on both changes nothing, and keeps float32 in its range
    x, s = x / width / largest, s * width / largest
    if kind == "full":
        dense = _root(x.T @ x, s.T @ s, count)
        return jax.tree.map(partial(jnp.where, count > 0), Metric(unit, dense), before)
    basis = _steepest(s, min(RANK, x.shape[1]))
    x, s = x @ basis, s @ basis
    root = _root(x.T @ x, s.T @ s, count)
    variances, vectors = jnp.linalg.eigh(root @ root.T)
    found = Metric(unit, None, basis @ vectors, jnp.sqrt(jnp.maximum(variances, 0.0)))
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
    return root @ vectors * jnp.maximum(values, SMALLEST * values[-1]) ** -0.25


def _steepest(s: Array, rank: int) -> Array:
    """Orthonormal columns, (d, rank), along which scores change most, by subspace iteration: products with (N, d) only.

    Other directions keep the diagonal's width.
    """

    def turn(_: int, basis: Array) -> Array:
        return jnp.linalg.qr(s.T @ (s @ basis))[0]

    first = jax.random.normal(jax.random.key(0), (s.shape[1], rank), s.dtype)
    return jax.lax.fori_loop(0, 4, turn, jnp.linalg.qr(first)[0])
