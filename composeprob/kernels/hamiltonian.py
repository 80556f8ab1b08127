"""What UHMC and HMC share: momentum, its partial refreshment, and the one leapfrog integrator."""

from __future__ import annotations

import dataclasses
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from composeprob import pytree
from composeprob.arguments import check_count
from composeprob.density.evaluation import Evaluation, Position, Target
from composeprob.kernels.base import Kernel, KernelState, Trajectory, log_density_of
from composeprob.kernels.metric import Metric, MetricLike, as_metric, in_force
from composeprob.kernels.metropolis import kick_energy
from composeprob.kernels.step_size import as_scalar, check_range, match_precision


class HamiltonianState(KernelState):
    """A chain with its momentum.

    Attributes:
        momentum: v, structured like the position; N(0, I) at stationarity, independent of x, of the level and of the
            metric, in whose coordinates it is measured.
    """

    momentum: Position


class HamiltonianTrajectory(Trajectory[HamiltonianState]):
    """A Hamiltonian transition in the middle of a leapfrog step, which leads to `position`.

    Attributes:
        momentum: v after the step's first half kick.
        greatest_kick: the greatest `kick_energy` of the steps so far, a scalar; NaN is none.
    """

    momentum: Position
    greatest_kick: Array


class Hamiltonian(Kernel[HamiltonianState]):
    r"""Base of the kernels that follow a trajectory of $H(x, v) = -\log\pi(x) + \tfrac12\|v\|^2$.

    It has L leapfrog steps of length h: $v \leftarrow v + \tfrac h2 L^\top\nabla\log\pi(x)$, $x \leftarrow x + hLv$,
    $v \leftarrow v + \tfrac h2 L^\top\nabla\log\pi(x)$, in the coordinates $L^{-1}x$ of the inverse mass matrix
    $LL^\top$, where momenta are N(0, I). The map preserves volume, is reversed by flipping the momentum, and errs in H
    by O(h²). h is a length: h_k = c·σ_k suits every level.

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
        check_count(self.num_leapfrog, f"{name}(num_leapfrog=)")
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

    def begin(self, noise: Array, state: HamiltonianState, step_size: Array) -> tuple[HamiltonianTrajectory, Position]:
        """v ← γ·v + √(1−γ²)·ξ with γ the damping and ξ ~ N(0, I), which leaves N(0, I) invariant; then the leapfrog."""
        kept, size = match_precision(self.damping, state.position), pytree.size(state.position)
        fresh = pytree.scale(jnp.sqrt(1 - kept**2), pytree.unravel(noise[:size], state.position))
        start = dataclasses.replace(state, momentum=pytree.axpy(kept, state.momentum, fresh))
        h = match_precision(step_size, state.position)
        trajectory = HamiltonianTrajectory(
            start, start.position, h, noise[size:], path=None, momentum=start.momentum, greatest_kick=jnp.zeros(())
        )
        return self.kick_and_drift(trajectory, start)

    def advance(
        self, i: Array | int, trajectory: HamiltonianTrajectory, evaluation: Evaluation
    ) -> tuple[HamiltonianTrajectory, Position]:
        return self.kick_and_drift(trajectory, self.second_kick(trajectory, evaluation))

    def kick_and_drift(
        self, trajectory: HamiltonianTrajectory, point: HamiltonianState
    ) -> tuple[HamiltonianTrajectory, Position]:
        """The first half of a leapfrog step from a point, and where it leads."""
        h, metric, score = trajectory.step_size, in_force(self.metric), point.evaluation.score
        momentum = pytree.axpy(h / 2, metric.back(score), point.momentum)
        position = pytree.axpy(h, metric.forth(momentum), point.position)
        kick = jnp.fmax(trajectory.greatest_kick, kick_energy(score, h, metric))
        return dataclasses.replace(trajectory, position=position, momentum=momentum, greatest_kick=kick), position

    def second_kick(self, trajectory: HamiltonianTrajectory, evaluation: Evaluation) -> HamiltonianState:
        """The point where a leapfrog step ends: its second half kick, by the score found there."""
        kick = in_force(self.metric).back(evaluation.score)
        momentum = pytree.axpy(trajectory.step_size / 2, kick, trajectory.momentum)
        return HamiltonianState(trajectory.position, evaluation, momentum)


def flip(state: HamiltonianState) -> HamiltonianState:
    """The same point with the momentum turned round."""
    return HamiltonianState(state.position, state.evaluation, jax.tree.map(jnp.negative, state.momentum))


def log_joint(state: HamiltonianState) -> Array:
    """−H(x, v) = log π(x) − ½‖v‖², a scalar."""
    return log_density_of(state.evaluation) - 0.5 * pytree.squared_norm(state.momentum)
