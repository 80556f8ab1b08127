"""Langevin kernels: ULA, and MALA, which corrects it by a Metropolis test."""

from __future__ import annotations

import dataclasses

import equinox as eqx
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from composeprob import pytree
from composeprob.density.evaluation import Evaluation, Position
from composeprob.errors import InvalidValueError
from composeprob.kernels.kernel import Info, Kernel, KernelState, Trajectory
from composeprob.kernels.line_integral import (
    LineIntegral,
    LogRatio,
    check_log_ratio,
    extra_evaluations,
    needed_by,
)
from composeprob.kernels.metric import (
    EUCLIDEAN,
    Metric,
    MetricLike,
    as_metric,
    in_force,
)
from composeprob.kernels.metropolis import (
    kick_energy,
    log_density_ratio,
    log_uniform,
    metropolis,
    unadjusted,
)
from composeprob.kernels.step_size import (
    Adaptive,
    StepSizeLike,
    as_step_size,
    match_precision,
)


class Langevin(Kernel[KernelState]):
    """Base of the kernels that move by one Euler step of dx = C·∇ log π dt + √(2C) dW,
    C the metric. h is a squared length: a step moves by about √(2h), and h_k = c·σ_k²
    suits every level."""

    metric: MetricLike = eqx.field(
        default="none", converter=as_metric, kw_only=True, repr=False
    )

    scale_exponent = 2

    def begin(
        self,
        noise: Float[Array, " noise_size"],
        state: KernelState,
        step_size: Float[Array, ""],
    ) -> tuple[Trajectory[KernelState], Position]:
        h = match_precision(step_size, state.position)
        # The normals that follow ξ are for the accept test of MALA.
        size = pytree.size(state.position)
        xi = pytree.unravel(noise[:size], state.position)
        position = self.propose(xi, state, h)
        return Trajectory(state, position, h, noise[size:], path=None), position

    def propose(
        self, noise: Position, state: KernelState, step_size: Float[Array, ""]
    ) -> Position:
        """Return x' = x + h·C·∇ log π(x) + √(2h)·L·ξ with C = L·Lᵀ and ξ = noise ~ N(0,
        I)."""
        metric = in_force(self.metric)
        drift = metric.forth(metric.back(state.evaluation.score))
        drifted = pytree.axpy(step_size, drift, state.position)
        return pytree.axpy(jnp.sqrt(2 * step_size), metric.forth(noise), drifted)


def log_proposal_ratio(
    current: KernelState,
    proposed: KernelState,
    step_size: Float[Array, ""],
    metric: Metric = EUCLIDEAN,
) -> Float[Array, ""]:
    r"""Return log q(x|x') − log q(x'|x) of the Langevin proposal q(x'|x) = N(x'; x +
    h·C·s, 2h·C), with s = ∇ log π.

    Written out, the two squares over 4h leave, with C = L·Lᵀ,

    $$-\tfrac12\langle x' - x,\; s + s'\rangle
      + \tfrac h4\left(\|L^\top s\|^2 - \|L^\top s'\|^2\right),$$

    a scalar, which does not subtract two large numbers when h is small or the dimension
    is high.
    """
    h = match_precision(step_size, current.position)
    # C⁻¹·C = I: the metric cancels in the inner product, and is left in the norms as L.
    s = current.evaluation.score
    s_new = proposed.evaluation.score
    moved = pytree.axpy(-1.0, current.position, proposed.position)
    along_path = pytree.vdot(moved, pytree.axpy(1.0, s, s_new))
    here = pytree.squared_norm(metric.back(s))
    there = pytree.squared_norm(metric.back(s_new))
    return -0.5 * along_path + 0.25 * h * (here - there)


class ULA(Langevin):
    r"""Unadjusted Langevin: $x' = x + h\,C\nabla\log\pi(x) + \sqrt{2h}\,L\,\xi$ with $C
    = LL^\top$, never rejected.

    Needs scores only and leaves π invariant up to an error of order h: on N(0, s²) its
    stationary variance is s²/(1 − h/(2s²)), and for h ≥ 2s² it diverges.

    Args:
        step_size: h > 0, as of `MALA`, but not `Adaptive`: nothing is rejected, so
            there is nothing to adapt to.
        metric: C, as of `MALA`.

    Raises:
        InvalidValueError: for a step size that is not positive and finite, or a metric
            that is not positive definite.
        CapabilityError: for an `Adaptive` step size.

    Example:
        >>> from composeprob.kernels import ULA
        >>> sorted(ULA(0.01).requires)
        ['score']

    References:
        Roberts and Tweedie (1996), exponential convergence of Langevin distributions
        and their discrete approximations.
    """

    optimal_acceptance = None
    requires = frozenset({"score"})
    evaluations_per_step = 1

    def finish(
        self, trajectory: Trajectory[KernelState], evaluation: Evaluation
    ) -> tuple[KernelState, Info]:
        start = trajectory.start
        proposed = KernelState(trajectory.position, evaluation)
        log_reversal = log_proposal_ratio(
            start, proposed, trajectory.step_size, in_force(self.metric)
        )
        return unadjusted(proposed, start, log_reversal)


class MALA(Langevin):
    r"""Metropolis-adjusted Langevin: the proposal of `ULA`, accepted so that π is left
    exactly invariant.

    $$x' = x + h\,C\nabla\log\pi(x) + \sqrt{2h}\,L\,\xi, \qquad
      a = \min\Big(1, \frac{\pi(x')\,q(x\mid x')}{\pi(x)\,q(x'\mid x)}\Big), \qquad
      q(x'\mid x) = N(x'; x + h\,C\nabla\log\pi(x), 2hC).$$

    Each chain decides for itself. One evaluation per transition: that of the current
    point is cached.

    Args:
        step_size: h > 0, a squared length: a number, one per level (K,), a rule such as
            ``lambda s: 0.1 * s.sigma**2``, or `Adaptive` (the default, to an acceptance
            of 0.574).
        log_ratio: ``"exact"``, from the density's own values, or a `LineIntegral` of
            its score, for densities that offer nothing else: π is then left invariant
            up to the quadrature's error.
        metric: C = L·Lᵀ, the inverse mass matrix: ``"none"`` for I; ``{site: inverse
            mass}``, numbers or arrays > 0 where sites have other widths (variances are
            good ones), or a matrix (d, d) over the flattened position, sites in
            alphabetical order; or what is measured as chains go down the levels,
            ``"diagonal"``, ``"full"`` or, by the numbers of chains and of coordinates,
            ``"auto"``. A measured metric is a property of all chains, like `Adaptive`
            steps: its dependence on each of them vanishes with many chains, and at
            level 0 it changes no more. A metric that is given leaves π exactly
            invariant.

    Raises:
        InvalidValueError: for a step size that is not positive and finite, a metric
            that is not positive definite, or a `LineIntegral` without points (this
            kernel has no trajectory).
        WrongTypeError: for a `log_ratio` that is neither, or a metric of another type.
        ShapeError: for a metric that does not fit the position.

    Example:
        >>> from composeprob.kernels import MALA
        >>> kernel = MALA(0.01)
        >>> kernel.evaluations_per_step, sorted(kernel.requires)
        (1, ['energy', 'score'])
        >>> MALA(0.5, metric={"mu": 0.01})
        MALA(step_size=0.5, metric={'mu': 0.01})

    References:
        Roberts and Rosenthal (1998), optimal scaling of discrete approximations to
        Langevin diffusions; Sjöberg et al. (2023) for the line integral; Titsias
        (2023), *Optimal preconditioning and Fisher adaptive Langevin sampling*.
    """

    step_size: StepSizeLike = eqx.field(
        default_factory=Adaptive, converter=as_step_size
    )
    log_ratio: LogRatio = eqx.field(default="exact", static=True, repr=False)

    optimal_acceptance = 0.574

    def __check_init__(self) -> None:
        check_log_ratio(self.log_ratio, "MALA")
        if not isinstance(self.log_ratio, LineIntegral):
            return
        if self.log_ratio.num_points is None:
            raise InvalidValueError(
                "MALA has no trajectory whose points a line integral could use",
                fix="give their number, such as cp.LineIntegral(num_points=3)",
            )

    @property
    def requires(self) -> frozenset[str]:
        return needed_by(self.log_ratio)

    @property
    def evaluations_per_step(self) -> int:
        return 1 + extra_evaluations(self.log_ratio)

    def noise_size(self, position: Position) -> int:
        return super().noise_size(position) + 1  # for the accept test

    def begin(
        self,
        noise: Float[Array, " noise_size"],
        state: KernelState,
        step_size: Float[Array, ""],
    ) -> tuple[Trajectory[KernelState], Position]:
        trajectory, position = super().begin(noise, state, step_size)
        if isinstance(self.log_ratio, LineIntegral):
            path = self.log_ratio.begin(state, 1)
            trajectory = dataclasses.replace(trajectory, path=path)
        return trajectory, position

    def advance(
        self,
        i: Array | int,
        trajectory: Trajectory[KernelState],
        evaluation: Evaluation,
    ) -> tuple[Trajectory[KernelState], Position]:
        assert isinstance(self.log_ratio, LineIntegral)
        # Only a line integral has evaluations after the proposal's: at inner nodes, of
        # which `record` reads the evaluation alone.
        point = KernelState(trajectory.position, evaluation)
        path = self.log_ratio.record(i, 1, trajectory.path, trajectory.start, point)
        node = self.log_ratio.node(i + 1, path, trajectory.start)
        return dataclasses.replace(trajectory, path=path), node

    def finish(
        self, trajectory: Trajectory[KernelState], evaluation: Evaluation
    ) -> tuple[KernelState, Info]:
        start = trajectory.start
        h = trajectory.step_size
        metric = in_force(self.metric)
        proposed = KernelState(trajectory.position, evaluation)
        error = jnp.zeros(())
        # The ratio of the targets by values, or by the integral of the score.
        if isinstance(self.log_ratio, LineIntegral):
            proposed, log_target_ratio, error = self.log_ratio.finish(
                1, trajectory.path, start, proposed
            )
        else:
            log_target_ratio = log_density_ratio(proposed, start)
        log_ratio = log_target_ratio + log_proposal_ratio(start, proposed, h, metric)
        # Of one leapfrog step as long as the noise of this one.
        kick = kick_energy(start.evaluation.score, jnp.sqrt(2 * h), metric)
        log_u = log_uniform(trajectory.spare_noise[0])
        return metropolis(
            log_u, log_ratio, proposed, start, log_target_ratio, error, kick
        )
