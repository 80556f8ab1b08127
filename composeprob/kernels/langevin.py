"""The Langevin proposal that ULA and MALA share."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from composeprob import pytree
from composeprob.density.evaluation import Position, Target
from composeprob.kernels.base import Kernel, KernelState
from composeprob.kernels.step_size import match_precision


class Langevin(Kernel[KernelState]):
    """Base of the kernels that move by one Euler step of dx = ∇ log π dt + √2 dW.

    h is a squared length: a step moves by about √(2h), and h_k = c·σ_k² suits every level.
    """

    scale_exponent = 2

    @property
    def evaluations_per_step(self) -> int:
        return 1

    def init(self, key: Array, position: Position, target: Target) -> KernelState:
        return KernelState(position, target(position))

    def propose(self, key: Array, state: KernelState, target: Target, step_size: Array) -> KernelState:
        """x' = x + h·∇ log π(x) + √(2h)·ξ with ξ ~ N(0, I), evaluated; one evaluation."""
        h = match_precision(step_size, state.position)
        noise = pytree.normal_like(key, state.position)
        drifted = pytree.axpy(h, state.evaluation.score, state.position)
        position = pytree.axpy(jnp.sqrt(2 * h), noise, drifted)
        return KernelState(position, target(position))


def log_proposal_ratio(current: KernelState, proposed: KernelState, step_size: Array) -> Array:
    r"""log q(x|x') − log q(x'|x) of the Langevin proposal q(x'|x) = N(x'; x + h·s, 2h·I), with s = ∇ log π.

    Written out, the two squares over 4h leave

    $$-\tfrac12\langle x' - x,\; s + s'\rangle + \tfrac h4\left(\|s\|^2 - \|s'\|^2\right),$$

    which does not subtract two large numbers when h is small or the dimension is high.

    Returns:
        A scalar.
    """
    h = match_precision(step_size, current.position)
    s, s_new = current.evaluation.score, proposed.evaluation.score
    moved = pytree.axpy(-1.0, current.position, proposed.position)
    along_path = pytree.vdot(moved, pytree.axpy(1.0, s, s_new))
    return -0.5 * along_path + 0.25 * h * (pytree.squared_norm(s) - pytree.squared_norm(s_new))
