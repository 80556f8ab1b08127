"""Hamiltonian kernels UHMC and HMC: momentum, its partial refreshment, and the one
leapfrog that both follow."""

from __future__ import annotations

import dataclasses
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.special import ndtr
from jaxtyping import Float, Key

from composeprob import pytree
from composeprob.arguments import check_count
from composeprob.density.evaluation import Evaluation, Position, Target
from composeprob.errors import InvalidValueError
from composeprob.kernels.kernel import (
    Info,
    Kernel,
    KernelState,
    Trajectory,
    log_density_of,
)
from composeprob.kernels.line_integral import (
    LineIntegral,
    LogRatio,
    check_log_ratio,
    extra_evaluations,
    needed_by,
)
from composeprob.kernels.metric import MetricLike, as_metric, in_force
from composeprob.kernels.metropolis import (
    comparable,
    kick_energy,
    log_uniform,
    metropolis,
    unadjusted,
)
from composeprob.kernels.step_size import (
    Adaptive,
    StepSizeLike,
    as_scalar,
    as_step_size,
    check_range,
    match_precision,
)


class HamiltonianState(KernelState):
    """A chain with its momentum.

    Attributes:
        momentum: v, structured like the position; N(0, I) at stationarity, independent
            of x, of the level and of the metric, in whose coordinates it is measured.
    """

    momentum: Position


class HamiltonianTrajectory(Trajectory[HamiltonianState]):
    """A Hamiltonian transition in the middle of a leapfrog step, which leads to
    `position`."""

    momentum: Position  # v after the step's first half kick
    # The greatest `kick_energy` of the steps so far; NaNs are left out.
    greatest_kick: Float[Array, ""]


class Hamiltonian(Kernel[HamiltonianState]):
    r"""Base of the kernels that follow a trajectory of $H(x, v) = -\log\pi(x) +
    \tfrac12\|v\|^2$.

    It has L leapfrog steps of length h: $v \leftarrow v + \tfrac h2
    L^\top\nabla\log\pi(x)$, $x \leftarrow x + hLv$, $v \leftarrow v + \tfrac h2
    L^\top\nabla\log\pi(x)$, in the coordinates $L^{-1}x$ of the inverse mass matrix
    $LL^\top$, where momenta are N(0, I). The map preserves volume, is reversed by
    flipping the momentum, and errs in H by O(h²). h is a length: h_k = c·σ_k suits
    every level.
    """

    num_leapfrog: int = eqx.field(default=3, static=True)
    damping: Array | float = eqx.field(
        default=0.5, converter=partial(as_scalar, what="damping")
    )

    metric: MetricLike = eqx.field(
        default="none", converter=as_metric, kw_only=True, repr=False
    )

    scale_exponent = 1

    def __check_init__(self) -> None:
        name = type(self).__name__
        check_count(self.num_leapfrog, f"{name}(num_leapfrog=)")
        check_range(
            self.damping,
            f"{name}(damping=)",
            1.0,
            closed=True,
            fix="a number in [0, 1); 0 draws a new momentum",
        )

    @property
    def evaluations_per_step(self) -> int:
        return self.num_leapfrog

    def init(
        self, key: Key[Array, ""], position: Position, target: Target
    ) -> HamiltonianState:
        evaluation = super().init(key, position, target).evaluation
        return HamiltonianState(position, evaluation, pytree.normal_like(key, position))

    def begin(
        self,
        noise: Float[Array, " noise_size"],
        state: HamiltonianState,
        step_size: Float[Array, ""],
    ) -> tuple[HamiltonianTrajectory, Position]:
        """Refresh v ← γ·v + √(1−γ²)·ξ with γ the damping and ξ ~ N(0, I), which leaves
        N(0, I) invariant; then begin the leapfrog."""
        damping = match_precision(self.damping, state.position)
        # The normals that follow ξ are for the accept test and the jitter of HMC.
        size = pytree.size(state.position)
        xi = pytree.unravel(noise[:size], state.position)
        fresh = pytree.scale(jnp.sqrt(1 - damping**2), xi)
        momentum = pytree.axpy(damping, state.momentum, fresh)
        start = dataclasses.replace(state, momentum=momentum)
        h = match_precision(step_size, state.position)
        trajectory = HamiltonianTrajectory(
            start,
            start.position,
            h,
            noise[size:],
            path=None,
            momentum=start.momentum,
            greatest_kick=jnp.zeros(()),
        )
        return self.kick_and_drift(trajectory, start)

    def advance(
        self, i: Array | int, trajectory: HamiltonianTrajectory, evaluation: Evaluation
    ) -> tuple[HamiltonianTrajectory, Position]:
        return self.kick_and_drift(trajectory, self.second_kick(trajectory, evaluation))

    def kick_and_drift(
        self, trajectory: HamiltonianTrajectory, point: HamiltonianState
    ) -> tuple[HamiltonianTrajectory, Position]:
        """Make the first half of a leapfrog step from a point; return the trajectory
        and the point where it leads."""
        # v ← v + h/2·Lᵀ∇log π(x), x ← x + h·L·v; the second half kick needs the score
        # at the new x.
        h = trajectory.step_size
        metric = in_force(self.metric)
        score = point.evaluation.score
        momentum = pytree.axpy(h / 2, metric.back(score), point.momentum)
        position = pytree.axpy(h, metric.forth(momentum), point.position)
        # fmax passes over NaN: the kick before a step broke down is what explains it.
        kick = jnp.fmax(trajectory.greatest_kick, kick_energy(score, h, metric))
        kicked = dataclasses.replace(
            trajectory, position=position, momentum=momentum, greatest_kick=kick
        )
        return kicked, position

    def second_kick(
        self, trajectory: HamiltonianTrajectory, evaluation: Evaluation
    ) -> HamiltonianState:
        """Return the point where a leapfrog step ends, after its second half kick by
        the score there."""
        kick = in_force(self.metric).back(evaluation.score)
        momentum = pytree.axpy(trajectory.step_size / 2, kick, trajectory.momentum)
        return HamiltonianState(trajectory.position, evaluation, momentum)


def flip(state: HamiltonianState) -> HamiltonianState:
    """Return the point with its momentum reversed."""
    reversed_momentum = jax.tree.map(jnp.negative, state.momentum)
    return HamiltonianState(state.position, state.evaluation, reversed_momentum)


def log_joint(state: HamiltonianState) -> Float[Array, ""]:
    """Return −H(x, v) = log π(x) − ½‖v‖²."""
    return log_density_of(state.evaluation) - 0.5 * pytree.squared_norm(state.momentum)


def kinetic_ratio(start: HamiltonianState, end: HamiltonianState) -> Float[Array, ""]:
    """Return ½‖v‖² − ½‖v'‖², the log-ratio of the momenta's densities."""
    old = pytree.squared_norm(start.momentum)
    new = pytree.squared_norm(end.momentum)
    return 0.5 * (old - new)


class UHMC(Hamiltonian):
    r"""Unadjusted Hamiltonian Monte Carlo: $v \leftarrow \gamma v +
    \sqrt{1-\gamma^2}\,\xi$, then L leapfrog steps.

    Needs scores only and leaves π invariant up to an error of order h²: on N(0, s²) its
    stationary variance is s²/(1 − h²/(4s²)), whatever L and γ, and for h ≥ 2s it
    diverges.

    Args:
        step_size: h > 0, as of `HMC`, but not `Adaptive`: nothing is rejected, so there
            is nothing to adapt to.
        num_leapfrog: L ≥ 1, evaluations per transition.
        damping: γ in [0, 1), the fraction of the momentum that is kept.
        metric: the inverse mass matrix, as of `HMC`.

    Raises:
        InvalidValueError: for a step size that is not positive and finite, L < 1, or γ
            outside [0, 1).
        CapabilityError: for an `Adaptive` step size.

    Example:
        >>> from composeprob.kernels import UHMC
        >>> UHMC(0.03, num_leapfrog=3).evaluations_per_step
        3

    References:
        Horowitz (1991), a generalized guided Monte Carlo algorithm; Du et al. (2023),
        Reduce, Reuse, Recycle.
    """

    optimal_acceptance = None
    requires = frozenset({"score"})

    def finish(
        self, trajectory: HamiltonianTrajectory, evaluation: Evaluation
    ) -> tuple[HamiltonianState, Info]:
        start = trajectory.start
        proposed = self.second_kick(trajectory, evaluation)
        # The leapfrog preserves volume and is its own reverse: the directions differ by
        # the law of momenta only.
        return unadjusted(proposed, flip(start), kinetic_ratio(start, proposed))


class HMC(Hamiltonian):
    r"""Hamiltonian Monte Carlo: the trajectory of `UHMC`, accepted so that π is left
    exactly invariant.

    $$v \leftarrow \gamma v + \sqrt{1-\gamma^2}\,\xi, \qquad
      (x', v') = \mathrm{leapfrog}^L_h(x, v), \qquad
      a = \min\big(1, e^{H(x,v) - H(x',v')}\big), \qquad H(x, v) = -\log\pi(x) +
      \tfrac12\|v\|^2.$$

    A rejection flips the momentum, $(x, v) \to (x, -v)$: the proposal is an involution
    only with the flip, and without it a partly refreshed momentum biases the law (N(0,
    1) gets a variance of 1.13 at γ = 0.5). Each chain decides for itself. L evaluations
    per transition: that of the current point is cached.

    Args:
        step_size: h > 0, a length: a number, one per level (K,), a rule such as
            ``lambda s: 0.5 * s.sigma``, or `Adaptive` (the default, to an acceptance of
            0.75).
        num_leapfrog: L ≥ 1, evaluations per transition.
        damping: γ in [0, 1), the fraction of the momentum that is kept.
        jitter: j in [0, 1): each transition draws a step size h·(1 + j·U) with U
            uniform on (−1, 1). With one length for all of them a trajectory can be a
            whole number of half turns in some direction, and never leave a point there
            but to its mirror image.
        metric: the inverse mass matrix, as of `MALA`. The momentum v is measured so
            that it is N(0, I) in every metric: the trajectory is that of $u = L^{-1}x$.
        log_ratio: ``"exact"``, from the density's own values, or a `LineIntegral` of
            its score, for densities that offer nothing else: π is then left invariant
            up to the quadrature's error. ``LineIntegral(None)`` integrates along the
            trajectory itself and needs no further evaluation.

    Raises:
        InvalidValueError: for a step size that is not positive and finite, L < 1, γ or
            j outside [0, 1), or Simpson's rule along an odd number of leapfrogs.
        WrongTypeError: for a `log_ratio` that is neither.

    Example:
        >>> from composeprob.kernels import HMC
        >>> kernel = HMC(0.03, num_leapfrog=5, damping=0.9)
        >>> kernel.evaluations_per_step, sorted(kernel.requires)
        (5, ['energy', 'score'])

    References:
        Duane et al. (1987), hybrid Monte Carlo; Horowitz (1991), partial refreshment;
        Beskos et al. (2013), optimal tuning of hybrid Monte Carlo; Sjöberg et al.
        (2023) for the line integral.
    """

    step_size: StepSizeLike = eqx.field(
        default_factory=Adaptive, converter=as_step_size
    )
    jitter: Array | float = eqx.field(
        default=0.0, converter=partial(as_scalar, what="jitter"), repr=False
    )
    log_ratio: LogRatio = eqx.field(default="exact", static=True, repr=False)

    optimal_acceptance = 0.75

    def __check_init__(self) -> None:
        check_log_ratio(self.log_ratio, "HMC")
        check_range(
            self.jitter,
            "HMC(jitter=)",
            1.0,
            closed=True,
            fix="a number in [0, 1); 0 for equal steps",
        )
        if not isinstance(self.log_ratio, LineIntegral):
            return
        if self.log_ratio.num_points is not None:
            return
        # The nodes are the leapfrog's own.
        self.log_ratio.check_tolerance(self.num_leapfrog, "use num_leapfrog=2")
        if self.log_ratio.rule == "simpson" and self.num_leapfrog % 2:
            raise InvalidValueError(
                "Simpson's rule along the trajectory needs an even number of "
                f"leapfrogs; got {self.num_leapfrog}",
                fix=f"use num_leapfrog={self.num_leapfrog + 1}, or "
                "LineIntegral(None, rule='trapezoid')",
            )

    @property
    def requires(self) -> frozenset[str]:
        return needed_by(self.log_ratio)

    @property
    def evaluations_per_step(self) -> int:
        return self.num_leapfrog + extra_evaluations(self.log_ratio)

    def noise_size(self, position: Position) -> int:
        return super().noise_size(position) + 2  # for the accept test and the jitter

    def begin(
        self,
        noise: Float[Array, " noise_size"],
        state: HamiltonianState,
        step_size: Float[Array, ""],
    ) -> tuple[HamiltonianTrajectory, Position]:
        uniform = 2 * ndtr(noise[-1]) - 1  # on (−1, 1)
        jitter = match_precision(self.jitter, state.position)
        return self.begun(noise, state, step_size * (1.0 + jitter * uniform))

    def begun(
        self,
        noise: Float[Array, " noise_size"],
        state: HamiltonianState,
        step_size: Float[Array, ""],
    ) -> tuple[HamiltonianTrajectory, Position]:
        """Return what `begin` does, of a transition whose step size is settled."""
        trajectory, position = super().begin(noise, state, step_size)
        if isinstance(self.log_ratio, LineIntegral):
            path = self.log_ratio.begin(trajectory.start, self.num_leapfrog)
            trajectory = dataclasses.replace(trajectory, path=path)
        return trajectory, position

    def advance(
        self, i: Array | int, trajectory: HamiltonianTrajectory, evaluation: Evaluation
    ) -> tuple[HamiltonianTrajectory, Position]:
        start = trajectory.start
        length = self.num_leapfrog
        point = self.second_kick(trajectory, evaluation)
        if trajectory.path is None:
            return self.kick_and_drift(trajectory, point)
        assert isinstance(self.log_ratio, LineIntegral)
        # Evaluations 0 … L − 1 are the leapfrog's, those that follow are at inner nodes
        # of the straight line.
        path = self.log_ratio.record(i, length, trajectory.path, start, point)
        trajectory = dataclasses.replace(trajectory, path=path)
        leapfrog = self.kick_and_drift(trajectory, point)
        if not self.log_ratio.extra_evaluations:
            return leapfrog
        # After the trajectory's end come the inner nodes of the straight line to it.
        node = self.log_ratio.node(i - (length - 1) + 1, path, start)
        on_trajectory = jnp.asarray(i < length - 1)
        return pytree.where(on_trajectory, leapfrog, (trajectory, node))

    def log_step_ratio(
        self, trajectory: HamiltonianTrajectory, proposed: HamiltonianState
    ) -> Float[Array, ""] | float:
        """Return the log-ratio of the densities of the step size at the proposed and
        the present position: 0, as it depends on neither."""
        return 0.0

    def finish(
        self, trajectory: HamiltonianTrajectory, evaluation: Evaluation
    ) -> tuple[HamiltonianState, Info]:
        start = trajectory.start
        proposed = self.second_kick(trajectory, evaluation)
        log_u = log_uniform(trajectory.spare_noise[0])
        kick = trajectory.greatest_kick
        of_step = self.log_step_ratio(trajectory, proposed)
        if not isinstance(self.log_ratio, LineIntegral):
            # The leapfrog preserves volume: the ratio is that of e^−H at both ends.
            there, here = comparable(proposed, start)
            log_ratio = log_joint(there) - log_joint(here) + of_step
            return metropolis(
                log_u, log_ratio, proposed, flip(start), greatest_kick=kick
            )
        proposed, log_target_ratio, error = self.log_ratio.finish(
            self.num_leapfrog, trajectory.path, start, proposed
        )
        log_ratio = log_target_ratio + kinetic_ratio(start, proposed) + of_step
        return metropolis(
            log_u, log_ratio, proposed, flip(start), log_target_ratio, error, kick
        )
