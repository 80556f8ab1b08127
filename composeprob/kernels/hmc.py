"""Hamiltonian Monte Carlo with partial momentum refreshment."""

from __future__ import annotations

import dataclasses
from functools import partial

import equinox as eqx
import jax.numpy as jnp
from jax import Array
from jax.scipy.special import ndtr

from composeprob import pytree
from composeprob.density.evaluation import Evaluation, Position
from composeprob.errors import InvalidValueError
from composeprob.kernels.base import Info
from composeprob.kernels.hamiltonian import (
    Hamiltonian,
    HamiltonianState,
    HamiltonianTrajectory,
    flip,
    log_joint,
)
from composeprob.kernels.line_integral import LineIntegral, LogRatio, check_log_ratio
from composeprob.kernels.metropolis import log_uniform, metropolis
from composeprob.kernels.step_size import Adaptive, StepSizeLike, as_scalar, as_step_size, check_range, match_precision
from composeprob.kernels.walls import comparable


class HMC(Hamiltonian):
    r"""Hamiltonian Monte Carlo: the trajectory of `UHMC`, accepted so that π is left exactly invariant.

    $$v \leftarrow \gamma v + \sqrt{1-\gamma^2}\,\xi, \qquad (x', v') = \mathrm{leapfrog}^L_h(x, v), \qquad
      a = \min\big(1, e^{H(x,v) - H(x',v')}\big), \qquad H(x, v) = -\log\pi(x) + \tfrac12\|v\|^2.$$

    A rejection flips the momentum, $(x, v) \to (x, -v)$: the proposal is an involution only with the flip, and without
    it a partly refreshed momentum biases the law (N(0, 1) gets a variance of 1.13 at γ = 0.5). Each chain decides for
    itself. L evaluations per transition: that of the current point is cached.

    Args:
        step_size: h > 0, a length: a number, one per level (K,), a rule such as ``lambda s: 0.5 * s.sigma``, or
            `Adaptive` (the default, to an acceptance of 0.75).
        num_leapfrog: L ≥ 1, evaluations per transition.
        damping: γ in [0, 1), the part of the momentum that is kept.
        jitter: j in [0, 1): each transition draws its own step, h·(1 + j·U) with U uniform on (−1, 1). With one length
            for all of them a trajectory can be a whole number of half turns in some direction, and never leave a point
            there but to its mirror image.
        metric: the inverse mass matrix, as of `MALA`. The momentum v is measured so that it is N(0, I) in every metric:
            the trajectory is that of $u = L^{-1}x$.
        log_ratio: ``"exact"``, from the density's own values, or a `LineIntegral` of its score, for densities that
            offer nothing else: π is then left invariant up to the quadrature's error. ``LineIntegral(None)`` integrates
            along the trajectory itself and needs no evaluation more.

    Raises:
        InvalidValueError: for a step size that is not positive and finite, L < 1, γ or j outside [0, 1), or Simpson's
            rule along an odd number of leapfrogs.
        WrongTypeError: for a `log_ratio` that is neither.

    Example:
        >>> from composeprob.kernels import HMC
        >>> kernel = HMC(0.03, num_leapfrog=5, damping=0.9)
        >>> kernel.evaluations_per_step, sorted(kernel.requires)
        (5, ['energy', 'score'])

    References:
        Duane et al. (1987), hybrid Monte Carlo; Horowitz (1991), partial refreshment; Beskos et al. (2013), optimal
        tuning of hybrid Monte Carlo; Sjöberg et al. (2023) for the line integral.
    """

    step_size: StepSizeLike = eqx.field(default_factory=Adaptive, converter=as_step_size)
    jitter: Array | float = eqx.field(default=0.0, converter=partial(as_scalar, what="jitter"), repr=False)
    log_ratio: LogRatio = eqx.field(default="exact", static=True, repr=False)

    optimal_acceptance = 0.75

    def __check_init__(self) -> None:
        check_log_ratio(self.log_ratio, "HMC")
        check_range(self.jitter, "HMC(jitter=)", 0.0, 1.0, closed=True, fix="a number in [0, 1); 0 for equal steps")
        if not isinstance(self.log_ratio, LineIntegral) or self.log_ratio.num_points is not None:
            return
        self.log_ratio.check_tolerance(self.num_leapfrog, "use num_leapfrog=2")
        if self.log_ratio.rule == "simpson" and self.num_leapfrog % 2:
            raise InvalidValueError(
                f"Simpson's rule along the trajectory needs an even number of leapfrogs; got {self.num_leapfrog}",
                fix=f"use num_leapfrog={self.num_leapfrog + 1}, or LineIntegral(None, rule='trapezoid')",
            )

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"score"} if isinstance(self.log_ratio, LineIntegral) else {"energy", "score"})

    @property
    def evaluations_per_step(self) -> int:
        extra = self.log_ratio.extra_evaluations if isinstance(self.log_ratio, LineIntegral) else 0
        return self.num_leapfrog + extra

    def noise_size(self, position: Position) -> int:
        return super().noise_size(position) + 2  # for the accept test and the jitter

    def begin(self, noise: Array, state: HamiltonianState, step_size: Array) -> tuple[HamiltonianTrajectory, Position]:
        uniform = 2 * ndtr(noise[-1]) - 1
        jittered = step_size * (1.0 + match_precision(self.jitter, state.position) * uniform)
        trajectory, position = super().begin(noise, state, jittered)
        if isinstance(self.log_ratio, LineIntegral):
            path = self.log_ratio.begin(trajectory.start, self.num_leapfrog)
            trajectory = dataclasses.replace(trajectory, path=path)
        return trajectory, position

    def advance(
        self, i: Array | int, trajectory: HamiltonianTrajectory, evaluation: Evaluation
    ) -> tuple[HamiltonianTrajectory, Position]:
        start, point, length = trajectory.start, self.second_kick(trajectory, evaluation), self.num_leapfrog
        if trajectory.path is None:
            return self.kick_and_drift(trajectory, point)
        assert isinstance(self.log_ratio, LineIntegral)
        path = self.log_ratio.record(i, length, trajectory.path, start, point)
        trajectory = dataclasses.replace(trajectory, path=path)
        leapfrog = self.kick_and_drift(trajectory, point)
        if not self.log_ratio.extra_evaluations:
            return leapfrog
        line = trajectory, self.log_ratio.node(i - (length - 1) + 1, path, start)
        return pytree.where(jnp.asarray(i < length - 1), leapfrog, line)

    def finish(self, trajectory: HamiltonianTrajectory, evaluation: Evaluation) -> tuple[HamiltonianState, Info]:
        start, proposed = trajectory.start, self.second_kick(trajectory, evaluation)
        log_u, kick = log_uniform(trajectory.spare_noise[0]), trajectory.greatest_kick
        if not isinstance(self.log_ratio, LineIntegral):
            there, here = comparable(proposed, start)
            log_ratio = log_joint(there) - log_joint(here)
            return metropolis(log_u, log_ratio, proposed, flip(start), greatest_kick=kick)
        proposed, log_target_ratio, error = self.log_ratio.finish(self.num_leapfrog, trajectory.path, start, proposed)
        kinetic = 0.5 * (pytree.squared_norm(start.momentum) - pytree.squared_norm(proposed.momentum))
        log_ratio = log_target_ratio + kinetic
        return metropolis(log_u, log_ratio, proposed, flip(start), log_target_ratio, error, kick)
