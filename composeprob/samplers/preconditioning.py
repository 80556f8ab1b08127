r"""Metrics from the cloud of chains at a level: what wide and narrow directions its density has.

Precision is taken as $P = \tfrac12(F + \Sigma^{-1})$, with Σ the covariance of positions and F that of their scores,
and the metric is $C = P^{-1}/s^2$, in units of the level's noise s = σ_k: then h·C = c·P⁻¹ under an adaptive step, and
c has no reason to change from level to level.

On a Gaussian F and Σ⁻¹ both are the precision, and since scores are linear in positions the sampling errors of the two
cancel to first order. Where there are several modes, Σ is mostly the distance between them, which says nothing of how
far a chain can move, and F is the mean precision within them. Where the density is flat between walls, F is 0 and Σ is
not. The mean of both precisions is never less than half of either, so no direction gets a step that one of them rules
out.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from composeprob.density.evaluation import Position
from composeprob.kernels import Metric
from composeprob.samplers.cloud import mean_and_deviations, shares, shrinkage, unflattened

SOME = 50
"""Chains from which on ``"auto"`` measures each coordinate's width."""
PER_NUMBER = 10
"""Chains for each number of a position, from which on it measures how they hang together."""
MOST = 64
"""Numbers of a position up to which it does."""
ROOM = 2**25
"""Numbers, of all chains together, up to which it measures anything: every device gets those of all."""
RANK = 8
"""Wide directions, and narrow ones, of ``"low_rank"``."""


def kind_of(kind: str, size: int, num_chains: int) -> str:
    """What ``"auto"`` is for so many numbers a position and so many chains; other kinds are what they are."""
    if kind != "auto":
        return kind
    if size <= MOST and num_chains >= PER_NUMBER * size:
        return "full"
    return "diagonal" if num_chains >= SOME and num_chains * size <= ROOM else "none"


def estimate(
    kind: str, points: Array, scores: Array, log_weights: Array, scale: Array | float, like: Position
) -> Metric:
    """The metric of a cloud.

    Args:
        kind: ``"diagonal"``, ``"low_rank"`` or ``"full"``.
        points, scores: (N, d), of all chains, the same on every device.
        log_weights: (N,). Chains that are not finite somewhere do not count.
        scale: s, the level's noise; 1 for sites that do not follow it.
        like: a position of one chain, for its shapes.

    References:
        Titsias (2023), *Optimal preconditioning and Fisher adaptive Langevin sampling*, for F; Haario, Saksman and
        Tamminen (2001), *An adaptive Metropolis algorithm*, for Σ.
    """
    sound = jnp.all(jnp.isfinite(points) & jnp.isfinite(scores), axis=1)
    points, scores = (jnp.where(sound[:, None], values, 0.0) for values in (points, scores))
    weights = shares(jnp.where(sound, log_weights, -jnp.inf))
    (variance, x), (slope, s) = (_squares(values, weights) for values in (points, scores))
    told = variance > 0
    precision = jnp.where(told, 0.5 * (slope + 1.0 / jnp.where(told, variance, 1.0)), slope)
    width = jnp.where(precision > 0, precision, 1.0 / jnp.asarray(scale) ** 2) ** -0.5
    unit = unflattened(width / scale, like)
    x, s = x / width, s * width
    if kind == "diagonal":
        return Metric(unit)
    count = jnp.minimum(1.0 / jnp.sum(weights**2), _distinct(points))
    if kind == "full":
        return Metric(unit, dense=_root(x, s, count))
    basis = _directions(x, s)
    values, vectors = jnp.linalg.eigh(_precision(x @ basis, s @ basis, count))
    return Metric(unit, basis=basis @ vectors, stretch=values**-0.5)


def _squares(values: Array, weights: Array) -> tuple[Array, Array]:
    """The weighted variance of each coordinate, (d,), and √w times the deviations, (N, d); 0 where all chains agree up
    to rounding."""
    mean, deviations = mean_and_deviations(values, weights)
    variance = jnp.sum(deviations**2, axis=0)
    differ = variance > 1e-10 * mean**2
    return jnp.where(differ, variance, 0.0), jnp.where(differ, deviations, 0.0)


def blank(kind: str, like: Position) -> Metric:
    """Of the form that `estimate` has, NaN in the place of every number."""
    row = jax.ShapeDtypeStruct((2, sum(leaf.size for leaf in jax.tree.leaves(like))), jnp.result_type(float))
    shapes = jax.eval_shape(
        partial(estimate, kind, scale=1.0, like=like), row, row, jax.ShapeDtypeStruct((2,), row.dtype)
    )
    return jax.tree.map(lambda leaf: jnp.full(leaf.shape, jnp.nan, leaf.dtype), shapes)


def _precision(x: Array, s: Array, count: Array) -> Array:
    """½(Σ⁻¹ + F) from √w times the deviations of positions and scores, (N, d), in units of the diagonal's width.

    Both are shrunk to the identity, the diagonal's metric: with few different chains nothing else is known.
    """
    identity = jnp.eye(x.shape[1], dtype=x.dtype)
    share = shrinkage(len(identity), count)
    covariance, slopes = (identity * share + (1 - share) * values.T @ values for values in (x, s))
    still = jnp.diag(covariance) <= 2 * share  # where all chains agree positions tell nothing
    inverse = jnp.linalg.inv(covariance + jnp.diag(jnp.where(still, 1.0, 0.0)))
    return 0.5 * (0.5 * (inverse + inverse.T) + slopes)


def _root(x: Array, s: Array, count: Array) -> Array:
    """M with M·Mᵀ = P⁻¹: R⁻ᵀ of P = R·Rᵀ."""
    lower = jnp.linalg.cholesky(_precision(x, s, count))
    return jax.scipy.linalg.solve_triangular(lower, jnp.eye(len(lower), dtype=lower.dtype), lower=True).T


def _directions(x: Array, s: Array) -> Array:
    """Orthonormal columns, (d, r), that span the directions of the largest variance of positions and of scores.

    By subspace iteration, which needs products with (N, d) arrays only. Other directions keep the diagonal's width.
    """
    size = x.shape[1]
    rank = max(min(RANK, size // 2), 1)
    first = jax.random.normal(jax.random.key(0), (size, rank), x.dtype)

    def leading(values: Array) -> Array:
        def turn(_: int, basis: Array) -> Array:
            return jnp.linalg.qr(values.T @ (values @ basis))[0]

        return jax.lax.fori_loop(0, 4, turn, jnp.linalg.qr(first)[0])

    both = jnp.concatenate([leading(x), leading(s)], axis=1)[:, :size]
    return jnp.linalg.qr(both)[0]


def _distinct(points: Array) -> Array:
    """How many different chains there are, told by their first number: resampling makes exact copies."""
    ordered = jnp.sort(points[:, 0])
    return 1 + jnp.sum(ordered[1:] != ordered[:-1])
