"""The one leapfrog integrator."""

from __future__ import annotations

import jax
from jax import Array

from composeprob import pytree
from composeprob.density.evaluation import Evaluation, Position, Target
from composeprob.kernels.step_size import match_precision


def leapfrog(
    position: Position, momentum: Position, evaluation: Evaluation, target: Target, step_size: Array, num_steps: int
) -> tuple[Position, Position, Evaluation]:
    r"""`num_steps` leapfrog steps of Hamilton's equations for $H(x, v) = -\log\pi(x) + \tfrac12\|v\|^2$.

    Each step is $v \leftarrow v + \tfrac h2\nabla\log\pi(x)$, $x \leftarrow x + hv$,
    $v \leftarrow v + \tfrac h2\nabla\log\pi(x)$. The map preserves volume, is reversed by flipping the momentum, and
    errs in H by O(h²).

    Args:
        position, momentum: pytrees of one structure.
        evaluation: the target at `position`; its score starts the first step, so that L steps cost L evaluations.
        target: position → `Evaluation`.
        step_size: h, a scalar; negative runs back in time.
        num_steps: L. The loop is traced once whatever L.

    Returns:
        Position, momentum and evaluation at the end.
    """
    h = match_precision(step_size, position)

    def one_step(_: int, carry: tuple[Position, Position, Evaluation]) -> tuple[Position, Position, Evaluation]:
        x, v, at_x = carry
        v = pytree.axpy(h / 2, at_x.score, v)
        x = pytree.axpy(h, v, x)
        at_x = target(x)
        v = pytree.axpy(h / 2, at_x.score, v)
        return x, v, at_x

    return jax.lax.fori_loop(0, num_steps, one_step, (position, momentum, evaluation))
