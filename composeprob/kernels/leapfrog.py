"""The one leapfrog integrator."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from composeprob import pytree
from composeprob.density.evaluation import Evaluation, Position, Target
from composeprob.kernels.metric import EUCLIDEAN, Metric
from composeprob.kernels.step_size import match_precision

Point = tuple[Position, Position, Evaluation]
"""Position, momentum, and the target there."""


def leapfrog(
    position: Position,
    momentum: Position,
    evaluation: Evaluation,
    target: Target,
    step_size: Array,
    num_steps: int,
    metric: Metric = EUCLIDEAN,
) -> Point:
    r"""`num_steps` leapfrog steps of Hamilton's equations for $H(x, v) = -\log\pi(x) + \tfrac12\|v\|^2$.

    Each step is $v \leftarrow v + \tfrac h2 L^\top\nabla\log\pi(x)$, $x \leftarrow x + hLv$,
    $v \leftarrow v + \tfrac h2 L^\top\nabla\log\pi(x)$: the leapfrog in the coordinates $L^{-1}x$, that is with the
    inverse mass matrix $LL^\top$ and a momentum measured so that it is N(0, I). The map preserves volume, is reversed
    by flipping the momentum, and errs in H by O(h²).

    Args:
        position, momentum: pytrees of one structure.
        evaluation: the target at `position`; its score starts the first step, so that L steps cost L evaluations.
        target: position → `Evaluation`.
        step_size: h, a scalar; negative runs back in time.
        num_steps: their number. The loop is traced once whatever it is.
        metric: gives L.

    Returns:
        Position, momentum and evaluation at the end.
    """
    return leapfrog_and_kick((position, momentum, evaluation), target, step_size, num_steps, metric)[0]


def leapfrog_and_kick(
    start: Point, target: Target, step_size: Array, num_steps: int, metric: Metric
) -> tuple[Point, Array]:
    """`leapfrog`, and the greatest `kick` on the way, a scalar; NaN is none."""
    one_step = _step(target, match_precision(step_size, start[0]), metric)

    def step(_: int, carry: tuple[Point, Array]) -> tuple[Point, Array]:
        point, greatest = carry
        return one_step(point), jnp.fmax(greatest, kick(point[2].score, step_size, metric))

    return jax.lax.fori_loop(0, num_steps, step, (start, jnp.zeros(())))


def leapfrog_nodes(
    position: Position,
    momentum: Position,
    evaluation: Evaluation,
    target: Target,
    step_size: Array,
    num_steps: int,
    metric: Metric = EUCLIDEAN,
) -> tuple[Point, tuple[Position, Position]]:
    """`leapfrog` that also returns the way: positions and scores at its L + 1 nodes, stacked on a leading axis."""
    one_step = _step(target, match_precision(step_size, position), metric)

    def step(point: Point, _: None) -> tuple[Point, tuple[Position, Position]]:
        point = one_step(point)
        return point, (point[0], point[2].score)

    end, way = jax.lax.scan(step, (position, momentum, evaluation), None, length=num_steps)
    first = (position, evaluation.score)
    return end, jax.tree.map(lambda a, rest: jnp.concatenate([jnp.asarray(a)[None], rest]), first, way)


def kick(score: Position, step_size: Array, metric: Metric) -> Array:
    """½‖h/2·Lᵀ∇log π‖², the energy that half a leapfrog step of length h gives to a chain at rest, a scalar in nats."""
    return (step_size**2 / 8 * pytree.squared_norm(metric.back(score))).astype(jnp.result_type(float))


def _step(target: Target, h: Array, metric: Metric) -> Callable[[Point], Point]:
    """One leapfrog step of length h, one evaluation."""

    def one_step(point: Point) -> Point:
        x, v, at_x = point
        v = pytree.axpy(h / 2, metric.back(at_x.score), v)
        x = pytree.axpy(h, metric.forth(v), x)
        at_x = target(x)
        v = pytree.axpy(h / 2, metric.back(at_x.score), v)
        return x, v, at_x

    return one_step
