"""What UHMC and HMC share: momentum, its partial refreshment, and the trajectory."""

from __future__ import annotations

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from composeprob import pytree
from composeprob.density.evaluation import Position, Target
from composeprob.kernels.base import Kernel, KernelState, log_density_of
from composeprob.kernels.leapfrog import leapfrog_and_kick, leapfrog_nodes
from composeprob.kernels.metric import Metric, MetricLike, as_metric, in_force
from composeprob.kernels.step_size import as_scalar, check_count, check_range, match_precision


class HamiltonianState(KernelState):
    """A chain with its momentum.

    Attributes:
        momentum: v, structured like the position; N(0, I) at stationarity, independent of x, of the level and of the
            metric, in whose coordinates it is measured.
    """

    momentum: Position


class Hamiltonian(Kernel[HamiltonianState]):
    """Base of the kernels that follow a trajectory of H(x, v) = −log π(x) + ½‖v‖², in the coordinates of their metric.

    h is a length: h_k = c·σ_k suits every level.

    Attributes:
        num_leapfrog: L, leapfrog steps (and evaluations) in one transition.
        damping: part of the momentum that is kept between transitions, in [0, 1); 0 draws it anew.
        metric: the inverse mass matrix.
    """

    num_leapfrog: int = eqx.field(default=3, static=True)
    damping: Array | float = eqx.field(default=0.5, converter=partial(as_scalar, what="damping"))

    metric: MetricLike = eqx.field(default="none", converter=as_metric, kw_only=True, repr=False)

    scale_exponent = 1

    def __check_init__(self) -> None:
        name = type(self).__name__
        check_count(self.num_leapfrog, f"{name}(num_leapfrog=)", minimum=1)
        check_range(
            self.damping, f"{name}(damping=)", 0.0, 1.0, closed=True, fix="a number in [0, 1); 0 draws a new momentum"
        )

    @property
    def evaluations_per_step(self) -> int:
        return self.num_leapfrog

    def init(self, key: Array, position: Position, target: Target) -> HamiltonianState:
        if isinstance(self.metric, Metric):
            self.metric.check(position, type(self).__name__)
        return HamiltonianState(position, target(position), pytree.normal_like(key, position))

    def refresh(self, key: Array, state: HamiltonianState) -> HamiltonianState:
        """v ← γ·v + √(1−γ²)·ξ with γ the damping and ξ ~ N(0, I): leaves N(0, I) invariant."""
        kept = match_precision(self.damping, state.position)
        noise = pytree.normal_like(key, state.position)
        momentum = pytree.axpy(kept, state.momentum, pytree.scale(jnp.sqrt(1 - kept**2), noise))
        return HamiltonianState(state.position, state.evaluation, momentum)

    def integrate(self, state: HamiltonianState, target: Target, step_size: Array) -> tuple[HamiltonianState, Array]:
        """The end of the trajectory from `state`, and the greatest `kick` on it; L evaluations."""
        start = state.position, state.momentum, state.evaluation
        end, kick = leapfrog_and_kick(start, target, step_size, self.num_leapfrog, in_force(self.metric))
        position, momentum, evaluation = end
        return HamiltonianState(position, evaluation, momentum), kick

    def trajectory(
        self, state: HamiltonianState, target: Target, step_size: Array
    ) -> tuple[HamiltonianState, Position, Position]:
        """As `integrate`, with all L + 1 positions and scores of the way, both ends among them."""
        (position, momentum, evaluation), (nodes, scores) = leapfrog_nodes(
            state.position,
            state.momentum,
            state.evaluation,
            target,
            step_size,
            self.num_leapfrog,
            in_force(self.metric),
        )
        return HamiltonianState(position, evaluation, momentum), nodes, scores


def flip(state: HamiltonianState) -> HamiltonianState:
    """The same point with the momentum turned round."""
    return HamiltonianState(state.position, state.evaluation, jax.tree.map(jnp.negative, state.momentum))


def log_joint(state: HamiltonianState) -> Array:
    """−H(x, v) = log π(x) − ½‖v‖², a scalar."""
    return log_density_of(state.evaluation) - 0.5 * pytree.squared_norm(state.momentum)
