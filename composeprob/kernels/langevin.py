"""The Langevin proposal that ULA and MALA share."""

from __future__ import annotations

import equinox as eqx
import jax.numpy as jnp
from jax import Array

from composeprob import pytree
from composeprob.density.evaluation import Position, Target
from composeprob.kernels.base import Kernel, KernelState, Trajectory
from composeprob.kernels.metric import EUCLIDEAN, Metric, MetricLike, as_metric, in_force
from composeprob.kernels.step_size import match_precision


class Langevin(Kernel[KernelState]):
    """Base of the kernels that move by one Euler step of dx = C·∇ log π dt + √(2C) dW.

    h is a squared length: a step moves by about √(2h), and h_k = c·σ_k² suits every level.

    Attributes:
        metric: C, the inverse mass matrix.
    """

    metric: MetricLike = eqx.field(default="none", converter=as_metric, kw_only=True, repr=False)

    scale_exponent = 2

    @property
    def evaluations_per_step(self) -> int:
        return 1

    def init(self, key: Array, position: Position, target: Target) -> KernelState:
        if isinstance(self.metric, Metric):
            self.metric.check(position, type(self).__name__)
        return KernelState(position, target(position))

    def begin(self, noise: Array, state: KernelState, step_size: Array) -> tuple[Trajectory[KernelState], Position]:
        h, size = match_precision(step_size, state.position), pytree.size(state.position)
        position = self.propose(pytree.unravel(noise[:size], state.position), state, h)
        return Trajectory(state, position, h, noise[size:], path=None), position

    def propose(self, noise: Position, state: KernelState, step_size: Array) -> Position:
        """x' = x + h·C·∇ log π(x) + √(2h)·L·ξ with C = L·Lᵀ and ξ = noise ~ N(0, I)."""
        metric = in_force(self.metric)
        drifted = pytree.axpy(step_size, metric.forth(metric.back(state.evaluation.score)), state.position)
        return pytree.axpy(jnp.sqrt(2 * step_size), metric.forth(noise), drifted)


def log_proposal_ratio(
    current: KernelState, proposed: KernelState, step_size: Array, metric: Metric = EUCLIDEAN
) -> Array:
    r"""log q(x|x') − log q(x'|x) of the Langevin proposal q(x'|x) = N(x'; x + h·C·s, 2h·C), with s = ∇ log π.

    Written out, the two squares over 4h leave, with C = L·Lᵀ,

    $$-\tfrac12\langle x' - x,\; s + s'\rangle + \tfrac h4\left(\|L^\top s\|^2 - \|L^\top s'\|^2\right),$$

    which does not subtract two large numbers when h is small or the dimension is high.

    Returns:
        A scalar.
    """
    h = match_precision(step_size, current.position)
    s, s_new = current.evaluation.score, proposed.evaluation.score
    moved = pytree.axpy(-1.0, current.position, proposed.position)
    along_path = pytree.vdot(moved, pytree.axpy(1.0, s, s_new))
    here, there = (pytree.squared_norm(metric.back(score)) for score in (s, s_new))
    return -0.5 * along_path + 0.25 * h * (here - there)
