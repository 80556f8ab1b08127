"""The Metropolis-adjusted Langevin algorithm."""

from __future__ import annotations

import dataclasses

import equinox as eqx
import jax.numpy as jnp
from jax import Array

from composeprob.density.evaluation import Evaluation, Position
from composeprob.errors import InvalidValueError
from composeprob.kernels.base import Info, KernelState, Trajectory, log_density_of
from composeprob.kernels.langevin import Langevin, log_proposal_ratio
from composeprob.kernels.line_integral import LineIntegral, LogRatio, check_log_ratio
from composeprob.kernels.metric import in_force
from composeprob.kernels.metropolis import kick_energy, log_uniform, metropolis
from composeprob.kernels.step_size import Adaptive, StepSizeLike, as_step_size
from composeprob.kernels.walls import comparable


class MALA(Langevin):
    r"""Metropolis-adjusted Langevin: the proposal of `ULA`, accepted so that π is left exactly invariant.

    $$x' = x + h\,C\nabla\log\pi(x) + \sqrt{2h}\,L\,\xi, \qquad
      a = \min\Big(1, \frac{\pi(x')\,q(x\mid x')}{\pi(x)\,q(x'\mid x)}\Big), \qquad
      q(x'\mid x) = N(x'; x + h\,C\nabla\log\pi(x), 2hC).$$

    Each chain decides for itself. One evaluation per transition: that of the current point is cached.

    Args:
        step_size: h > 0, a squared length: a number, one per level (K,), a rule such as
            ``lambda s: 0.1 * s.sigma**2``, or `Adaptive` (the default, to an acceptance of 0.574).
        log_ratio: ``"exact"``, from the density's own values, or a `LineIntegral` of its score, for densities that
            offer nothing else: π is then left invariant up to the quadrature's error.
        metric: C = L·Lᵀ, the inverse mass matrix: ``"none"`` for I; ``{site: inverse mass}``, numbers or arrays > 0
            where sites have other widths (variances are good ones), or a matrix (d, d) over the flattened position,
            sites in alphabetical order; or what is measured as chains go down the levels, ``"diagonal"``, ``"full"``
            or, by the numbers of chains and of coordinates, ``"auto"``. A measured metric is a property of all chains,
            like `Adaptive` steps: what that does to each of them vanishes with many chains, and at level 0 it changes
            no more. One that is given leaves π as invariant as none does.

    Raises:
        InvalidValueError: for a step size that is not positive and finite, a metric that is not positive definite, or a
            `LineIntegral` without points (this kernel has no trajectory).
        WrongTypeError: for a `log_ratio` that is neither, or a metric that is none.
        ShapeError: for a metric that does not fit the position.

    Example:
        >>> from composeprob.kernels import MALA
        >>> kernel = MALA(0.01)
        >>> kernel.evaluations_per_step, sorted(kernel.requires)
        (1, ['energy', 'score'])
        >>> MALA(0.5, metric={"mu": 0.01})
        MALA(step_size=0.5, metric={'mu': 0.01})

    References:
        Roberts and Rosenthal (1998), optimal scaling of discrete approximations to Langevin diffusions; Sjöberg et al.
        (2023) for the line integral; Titsias (2023), *Optimal preconditioning and Fisher adaptive Langevin sampling*.
    """

    step_size: StepSizeLike = eqx.field(default_factory=Adaptive, converter=as_step_size)
    log_ratio: LogRatio = eqx.field(default="exact", static=True, repr=False)

    optimal_acceptance = 0.574

    def __check_init__(self) -> None:
        check_log_ratio(self.log_ratio, "MALA")
        if isinstance(self.log_ratio, LineIntegral) and self.log_ratio.num_points is None:
            raise InvalidValueError(
                "MALA has no trajectory whose points a line integral could use",
                fix="give their number, such as cp.LineIntegral(num_points=3)",
            )

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"score"} if isinstance(self.log_ratio, LineIntegral) else {"energy", "score"})

    @property
    def evaluations_per_step(self) -> int:
        return 1 + (self.log_ratio.extra_evaluations if isinstance(self.log_ratio, LineIntegral) else 0)

    def noise_size(self, position: Position) -> int:
        return super().noise_size(position) + 1  # for the accept test

    def begin(self, noise: Array, state: KernelState, step_size: Array) -> tuple[Trajectory[KernelState], Position]:
        trajectory, position = super().begin(noise, state, step_size)
        path = self.log_ratio.begin(state, 1) if isinstance(self.log_ratio, LineIntegral) else None
        return dataclasses.replace(trajectory, path=path), position

    def advance(
        self, i: Array | int, trajectory: Trajectory[KernelState], evaluation: Evaluation
    ) -> tuple[Trajectory[KernelState], Position]:
        assert isinstance(self.log_ratio, LineIntegral)
        point = KernelState(trajectory.position, evaluation)
        path = self.log_ratio.record(i, 1, trajectory.path, trajectory.start, point)
        return dataclasses.replace(trajectory, path=path), self.log_ratio.node(i + 1, path, trajectory.start)

    def finish(self, trajectory: Trajectory[KernelState], evaluation: Evaluation) -> tuple[KernelState, Info]:
        start, h, metric = trajectory.start, trajectory.step_size, in_force(self.metric)
        proposed, error = KernelState(trajectory.position, evaluation), jnp.zeros(())
        if isinstance(self.log_ratio, LineIntegral):
            proposed, log_target_ratio, error = self.log_ratio.finish(1, trajectory.path, start, proposed)
        else:
            there, here = comparable(proposed, start)
            log_target_ratio = log_density_of(there.evaluation) - log_density_of(here.evaluation)
        log_ratio = log_target_ratio + log_proposal_ratio(start, proposed, h, metric)
        kick = kick_energy(start.evaluation.score, jnp.sqrt(2 * h), metric)
        log_u = log_uniform(trajectory.spare_noise[0])
        return metropolis(log_u, log_ratio, proposed, start, log_target_ratio, error, kick)
