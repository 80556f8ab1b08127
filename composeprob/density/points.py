"""Densities and data at many points: log-densities, barriers between points, and
log-likelihoods, with their loss to the noise of level 0."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float
from numpy.typing import ArrayLike

from composeprob import pytree, tuning
from composeprob.density.evaluation import Position
from composeprob.density.once import compiled_by_size

if TYPE_CHECKING:
    from composeprob.density.annealed import AnnealedDensity


def correlations(
    before: Float[np.ndarray, "n d"], after: Float[np.ndarray, "n d"]
) -> Float[np.ndarray, " d"]:
    """Return the correlation of each entry with itself, over n chains; 0 where it does
    not vary."""
    old = before - before.mean(0, dtype=float)
    new = after - after.mean(0, dtype=float)
    sizes = np.maximum(np.std(old, axis=0) * np.std(new, axis=0), 1e-30)
    return np.mean(old * new, axis=0) / sizes


def log_densities(
    density: AnnealedDensity,
    positions: Position,
    level: int = 0,
    size: int | None = None,
) -> Float[np.ndarray, " positions"]:
    """log π_level at many positions, (M, …) → (M,)."""
    return in_blocks(partial(_of_block, density, jnp.asarray(level)), positions, size)


def slopes(
    density: AnnealedDensity, positions: Position, directions: Position
) -> Float[np.ndarray, " positions"]:
    """Derivatives of log π₀ at many positions along a direction each, (M, …) → (M,), by
    scores alone."""
    return in_blocks(partial(_slopes, density), (positions, directions))


def barriers(density: AnnealedDensity) -> Callable[[Position, Position], np.ndarray]:
    """Return a function for the barrier depths of π₀ between positions, (n, …) each →
    (n,).

    It compares log-densities, or where the density offers only its score, integrals of
    the score by the trapezoidal rule.
    """
    if "energy" in density.capabilities:
        return partial(barrier_depth, partial(log_densities, density))

    def by_score(a: Position, b: Position) -> np.ndarray:
        points = jax.tree.map(partial(_along, inner=tuning.BY_SCORE.between), a, b)
        # `np.resize` repeats b − a for each of the points of its segment.
        directions = jax.tree.map(
            lambda start, end, x: np.resize(end - start, x.shape), a, b, points
        )
        num_segments = len(jax.tree.leaves(a)[0])
        along = slopes(density, points, directions).reshape(-1, num_segments)
        return _deepest(integrated(along, 1 / (len(along) - 1)))

    return by_score


def integrated(
    slopes: Float[np.ndarray, "points lines"], gaps: ArrayLike
) -> Float[np.ndarray, "points lines"]:
    """Integrals of slopes along lines, from the first point on, by the trapezoidal
    rule.

    Args:
        slopes: derivatives at the points of each line.
        gaps: distances of neighbours, one or (points − 1, 1).
    """
    rises = 0.5 * (slopes[1:] + slopes[:-1]) * np.asarray(gaps)
    return np.concatenate([0 * slopes[:1], rises]).cumsum(0)


class Scores(NamedTuple):
    """Gradients at many points, (M, …), with the numbers of all sites in one row.

    Attributes:
        score: ∇log π₀, (M, D).
        value: the part of log π₀ that has a value, −∞ where π₀ is 0, (M,); 0 elsewhere
            where no part has.
        gradient: of that part, (M, D).
    """

    score: Float[np.ndarray, "points size"]
    value: Float[np.ndarray, " points"]
    gradient: Float[np.ndarray, "points size"]


def scores(density: AnnealedDensity, positions: Position) -> Scores:
    """∇log π₀ at many positions, (M, …), with what has a value of log π₀.

    Sites are in the order of ``positions``.
    """
    table = in_blocks(partial(_gradients, density, tuple(positions)), positions)
    score, gradient = np.split(table[1:].T, 2, axis=1)
    return Scores(score, table[0], gradient)


def in_blocks(
    function: Callable[[Any], ArrayLike], positions: Any, size: int | None = None
) -> np.ndarray:
    """Evaluate ``function`` at many positions, (M, …) → (…, M), in blocks of one size,
    so that one executable serves any number of them."""
    number = len(jax.tree.leaves(positions)[0])
    size = size or tuning.SHARES.block
    blocks = []
    for begin in range(0, number, size):
        # The last position fills the last block up; its repetitions are cut off.
        rows = np.minimum(np.arange(begin, begin + size), number - 1)
        block = jax.tree.map(lambda x, rows=rows: np.asarray(x)[rows], positions)
        blocks.append(np.asarray(function(block))[..., : number - begin])
    return np.concatenate(blocks, axis=-1)


@compiled_by_size
def _of_block(
    density: AnnealedDensity, level: Array, positions: Position
) -> Float[Array, " positions"]:
    return jax.lax.map(
        lambda x: density.log_density(x, level),
        positions,
        batch_size=tuning.SHARES.at_once,
    )


@compiled_by_size
def _gradients(
    density: AnnealedDensity, names: tuple[str, ...], positions: Position
) -> Float[Array, "rows points"]:
    """`Scores` of a block: a row of values, those of the score and of the gradient."""

    def flat(gradient: Position) -> Array:
        return jnp.concatenate([gradient[name].reshape(-1) for name in names])

    def of_point(position: Position) -> Array:
        evaluation = density.evaluator(position, 0)
        score = flat(evaluation.score)
        value = evaluation.log_density
        gradient = score
        if value is None:
            value = jnp.zeros(())
            gradient = jnp.zeros_like(score)
            if evaluation.closed_form is not None:
                value = evaluation.closed_form.value
                # The gradient of the part without a closed form is taken off.
                gradient = score - flat(evaluation.closed_form.score)
        value = jnp.where(evaluation.zero, -jnp.inf, value)
        return jnp.concatenate([value[None], score, gradient])

    return jax.lax.map(of_point, positions, batch_size=tuning.SHARES.at_once).T


@compiled_by_size
def _slopes(
    density: AnnealedDensity, points_and_directions: tuple[Position, Position]
) -> Float[Array, " points"]:
    """⟨∇log π₀(x), direction⟩ of each point."""

    def slope(point_and_direction: tuple[Position, Position]) -> Float[Array, ""]:
        point, direction = point_and_direction
        return pytree.vdot(density.evaluator(point, 0).score, direction)

    return jax.lax.map(slope, points_and_directions, batch_size=tuning.SHARES.at_once)


def barrier_depth(
    log_density: Callable[[Position], ArrayLike], a: Position, b: Position
) -> Float[np.ndarray, " n"]:
    r"""Compute the depth of the barrier on the segment from a to b, in nats: the
    largest fall of log π between two points, below the lower one of the two,

    $$\max_{i < j < k} \min(\ell_i, \ell_k) - \ell_j, \qquad
    \ell_j = \log\pi\left(a + \tfrac{j}{m+1}(b - a)\right).$$

    It is 0 at most where log π is concave: points of one log-concave mode have no
    barrier between them. The ends alone would not do in many dimensions: between two
    samples their independent deviations average out, which lifts log π in the middle,
    by d/4 nats for a Gaussian.

    The ends a and b are (n, …), arrays or pytrees of arrays, with m inner points
    between them; ``log_density``, (M, …) → (M,), is called once. The depths are NaN
    where π is 0 or unknown at an end.
    """
    values = np.asarray(log_density(jax.tree.map(_along, a, b)), float)
    return _deepest(values.reshape(-1, len(jax.tree.leaves(a)[0])))


def _along(start: ArrayLike, end: ArrayLike, inner: int = 9) -> np.ndarray:
    """Points from start to end, m between them, (n, …) each → ((m + 2)·n, …)."""
    start = np.asarray(start)
    end = np.asarray(end)
    t = (np.arange(inner + 2) / (inner + 1)).astype(start.dtype)
    # Points lead segments: a reshape to (m + 2, n) tells them apart again.
    t = t.reshape(-1, *[1] * start.ndim)
    return ((1 - t) * start + t * end).reshape(-1, *start.shape[1:])


def _deepest(values: Float[np.ndarray, "points n"]) -> Float[np.ndarray, " n"]:
    """Depth of the deepest barrier in each column of log π."""
    with np.errstate(invalid="ignore"):
        ends = np.isfinite(values[0]) & np.isfinite(values[-1])
        # The highest value up to each point, and from each point on.
        before = np.maximum.accumulate(values)
        after = np.maximum.accumulate(values[::-1])[::-1]
        depth = np.minimum(before[:-2], after[2:]) - values[1:-1]
        return np.where(ends, depth.max(0), np.nan)


def log_likelihood(
    density: AnnealedDensity, positions: Position
) -> Float[np.ndarray, " chains"]:
    """log p of all observations at positions of chains, (N, …) → (N,)."""
    samples = jax.vmap(density.to_samples)(positions)
    # Sites have any number of observed numbers; sums in double precision.
    totals = []
    for value in density.log_likelihood(samples).values():
        totals.append(np.asarray(value, float).reshape(len(value), -1).sum(1))
    return np.sum(totals, axis=0)


def lost_to_noise(density: AnnealedDensity, positions: Position | None = None) -> float:
    """Estimate the nats of log-likelihood that each observed number loses to the noise
    of level 0, σ/α, added once more: ½·(σ/α)²/s² of an instrument whose noise is s.

    It is the median over positions, (N, …); where none are given, over 16 draws of that
    noise around 0.
    """
    num_observed = sum(np.size(y) for y in density.observed().values())
    if not num_observed:
        return 0.0
    if positions is None:
        positions = {
            name: np.zeros((16, *site.shape), np.float32)
            for name, site in density.sites.items()
        }
    rng = np.random.default_rng(0)
    sigma = float(np.asarray(density.schedule.sigma)[0])
    noise = {}
    for name, x in positions.items():
        scale = sigma * (density.sites[name].kind == "noised")  # 0 at static sites
        noise[name] = (scale * rng.standard_normal(x.shape)).astype(x.dtype)

    def at_offset(sign: int) -> np.ndarray:
        moved = jax.tree.map(lambda x, e: x + sign * e, positions, noise)
        return log_likelihood(density, moved)

    # There and back, so that the slope cancels.
    loss = at_offset(0) - (at_offset(1) + at_offset(-1)) / 2
    return float(np.median(loss)) / num_observed
