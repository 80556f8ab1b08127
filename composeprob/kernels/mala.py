"""The Metropolis-adjusted Langevin algorithm."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from composeprob.density.evaluation import Target
from composeprob.errors import InvalidValueError
from composeprob.kernels.base import Info, KernelState, log_density_of
from composeprob.kernels.langevin import Langevin, log_proposal_ratio
from composeprob.kernels.leapfrog import kick
from composeprob.kernels.line_integral import LineIntegral, LogRatio, check_log_ratio
from composeprob.kernels.metric import in_force
from composeprob.kernels.metropolis import metropolis
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
            sites in alphabetical order; or what is measured as chains go down the levels, ``"diagonal"``,
            ``"low_rank"``, ``"full"`` or, by the numbers of chains and of coordinates, ``"auto"``. A measured metric is
            a property of all chains, like `Adaptive` steps: what that does to each of them vanishes with many chains,
            and at level 0 it changes no more. One that is given leaves π as invariant as none does.

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

    def step(self, key: Array, state: KernelState, target: Target, step_size: Array) -> tuple[KernelState, Info]:
        key_propose, key_accept = jax.random.split(key)
        proposed = self.propose(key_propose, state, target, step_size)
        error: Array | float = 0.0
        if isinstance(self.log_ratio, LineIntegral):
            log_target_ratio, error = self.log_ratio.straight(state, proposed, target)
        else:
            there, here = comparable(proposed, state)
            log_target_ratio = log_density_of(there.evaluation) - log_density_of(here.evaluation)
        log_ratio = log_target_ratio + log_proposal_ratio(state, proposed, step_size, in_force(self.metric))
        pushed = kick(state.evaluation.score, jnp.sqrt(2 * step_size), in_force(self.metric))
        return metropolis(key_accept, log_ratio, proposed, state, log_target_ratio, error, pushed)
