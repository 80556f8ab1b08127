"""What densities and data say at many points: the log-density, how far it falls on the
way from one point to another, and the log-likelihood, with whether data are finer than
level 0."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from composeprob import pytree, tuning
from composeprob.density.evaluation import Position

if TYPE_CHECKING:
    from composeprob.density.annealed import AnnealedDensity


def log_densities(
    density: AnnealedDensity,
    positions: Position,
    level: int = 0,
    size: int | None = None,
) -> np.ndarray:
    """log π_level at many positions, (M, …) → (M,)."""
    return in_blocks(partial(_of_block, density, jnp.asarray(level)), positions, size)


def barriers(density: AnnealedDensity) -> Callable[[Position, Position], np.ndarray]:
    """What computes the depths of the barriers of π₀ between positions, (n, …) each →
    (n,): by log-densities, or by integrals of the score, by the trapezoid rule, where
    the density offers only that."""
    if "energy" in density.capabilities:
        return partial(barrier_depth, partial(log_densities, density))

    def by_score(a: Position, b: Position) -> np.ndarray:
        points = jax.tree.map(partial(_along, inner=tuning.BY_SCORE.between), a, b)
        ways = jax.tree.map(
            lambda start, end, x: np.resize(end - start, x.shape), a, b, points
        )
        slopes = in_blocks(partial(_slopes, density), (points, ways)).reshape(
            -1, len(jax.tree.leaves(a)[0])
        )
        rises = 0.5 * (slopes[1:] + slopes[:-1]) / (len(slopes) - 1)
        return _deepest(np.concatenate([0 * slopes[:1], rises]).cumsum(0))

    return by_score


def in_blocks(
    function: Callable[[Any], ArrayLike], positions: Any, size: int | None = None
) -> np.ndarray:
    """``function`` of many positions, (M, …) → (…, M). They go in blocks of one size,
    so that one executable serves any number of them."""
    number, size = len(jax.tree.leaves(positions)[0]), size or tuning.SHARES.block

    def block(begin: int) -> np.ndarray:
        rows = np.minimum(np.arange(begin, begin + size), number - 1)
        return np.asarray(
            function(jax.tree.map(lambda x: np.asarray(x)[rows], positions))
        )[..., : number - begin]

    return np.concatenate([block(begin) for begin in range(0, number, size)], axis=-1)


@eqx.filter_jit
def _of_block(density: AnnealedDensity, level: Array, positions: Position) -> Array:
    return jax.lax.map(
        lambda x: density.log_density(x, level),
        positions,
        batch_size=tuning.SHARES.at_once,
    )


@eqx.filter_jit
def _slopes(
    density: AnnealedDensity, points_and_ways: tuple[Position, Position]
) -> Array:
    """⟨∇log π₀(x), way⟩ of each."""

    def slope(both: tuple[Position, Position]) -> Array:
        return pytree.vdot(density.evaluator(both[0], 0).score, both[1])

    return jax.lax.map(slope, points_and_ways, batch_size=tuning.SHARES.at_once)


def barrier_depth(
    log_density: Callable[[Position], ArrayLike], a: Position, b: Position
) -> np.ndarray:
    r"""Computes the depth of the barrier on the segment from a to b, in nats: how far
    log π falls between two points of it, of which the lower one counts,

    $$\max_{i < j < k} \min(\ell_i, \ell_k) - \ell_j, \qquad \ell_j = \log\pi\left(a + \tfrac{j}{m+1}(b - a)\right).$$

    It is 0 at most where log π is concave: points of one log-concave mode have no
    barrier between them. The ends alone would not do in many dimensions: on the way
    from one draw to another what both have of noise averages out, which lifts log π in
    the middle, by d/4 nats for a Gaussian.

    Of ends (n, …), arrays or pytrees of arrays, with m inner points between them;
    ``log_density``, (M, …) → (M,), is called once. Returns (n,), NaN where π is 0 or
    unknown at an end.
    """
    values = np.asarray(log_density(jax.tree.map(_along, a, b)), float)
    return _deepest(values.reshape(-1, len(jax.tree.leaves(a)[0])))


def _along(start: ArrayLike, end: ArrayLike, inner: int = 9) -> np.ndarray:
    """The points from start to end, m between them, (n, …) each → ((m + 2)·n, …)."""
    start, end = np.asarray(start), np.asarray(end)
    t = (
        (np.arange(inner + 2) / (inner + 1))
        .astype(start.dtype)
        .reshape(-1, *[1] * start.ndim)
    )
    return ((1 - t) * start + t * end).reshape(-1, *start.shape[1:])


def _deepest(values: np.ndarray) -> np.ndarray:
    """The depths, of log π at the points, (m + 2, n)."""
    with np.errstate(invalid="ignore"):
        ends = np.isfinite(values[0]) & np.isfinite(values[-1])
        before, after = (
            np.maximum.accumulate(values),
            np.maximum.accumulate(values[::-1])[::-1],
        )
        depth = np.minimum(before[:-2], after[2:]) - values[1:-1]
        return np.where(ends, depth.max(0), np.nan)


def log_likelihood(density: AnnealedDensity, positions: Position) -> np.ndarray:
    """log p of all that is observed at positions of chains, (N, …) → (N,)."""
    values = density.log_likelihood(jax.vmap(density.to_samples)(positions)).values()
    return np.sum(
        [np.asarray(value, float).reshape(len(value), -1).sum(1) for value in values],
        axis=0,
    )


def lost_to_noise(density: AnnealedDensity, positions: Position | None = None) -> float:
    """How many nats of log-likelihood level 0's own noise once more, σ/α, takes from
    each number seen: ½·(σ/α)²/s² of an instrument whose noise is s. It is the median
    over positions, (N, …); where none are given, over 16 draws of that noise around
    0."""
    seen = sum(np.size(y) for y in density.observed().values())
    if not seen:
        return 0.0
    if positions is None:
        positions = {
            name: np.zeros((16, *site.shape), np.float32)
            for name, site in density.sites.items()
        }
    rng, sigma = np.random.default_rng(0), float(np.asarray(density.schedule.sigma)[0])
    noised = {
        name: sigma * (density.sites[name].kind == "noised") for name in positions
    }
    noise = {
        name: (noised[name] * rng.standard_normal(x.shape)).astype(x.dtype)
        for name, x in positions.items()
    }
    # There and back, so that the slope cancels.
    here, *near = (
        log_likelihood(
            density, jax.tree.map(lambda x, e, way=way: x + way * e, positions, noise)
        )
        for way in (0, 1, -1)
    )
    return float(np.median(here - (near[0] + near[1]) / 2)) / seen
