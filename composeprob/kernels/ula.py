"""The unadjusted Langevin algorithm."""

from __future__ import annotations

from composeprob.density.evaluation import Evaluation
from composeprob.kernels.base import Info, KernelState, Trajectory
from composeprob.kernels.langevin import Langevin, log_proposal_ratio
from composeprob.kernels.metric import in_force
from composeprob.kernels.metropolis import unadjusted


class ULA(Langevin):
    r"""Unadjusted Langevin: $x' = x + h\,C\nabla\log\pi(x) + \sqrt{2h}\,L\,\xi$ with $C = LL^\top$, never rejected.

    Needs scores only and leaves π invariant up to an error of order h: on N(0, s²) its stationary variance is
    s²/(1 − h/(2s²)), and for h ≥ 2s² it diverges.

    Args:
        step_size: h > 0, a squared length: a number, one per level (K,), or a rule such as
            ``lambda s: 0.1 * s.sigma**2``. Not `Adaptive`: nothing is rejected, so there is nothing to adapt to.
        metric: C, as of `MALA`.

    Raises:
        InvalidValueError: for a step size that is not positive and finite, or a metric that is not positive definite.
        CapabilityError: for an `Adaptive` step size.

    Example:
        >>> from composeprob.kernels import ULA
        >>> sorted(ULA(0.01).requires)
        ['score']

    References:
        Roberts and Tweedie (1996), exponential convergence of Langevin distributions and their discrete approximations.
    """

    optimal_acceptance = None

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"score"})

    def finish(self, trajectory: Trajectory[KernelState], evaluation: Evaluation) -> tuple[KernelState, Info]:
        start, proposed = trajectory.start, KernelState(trajectory.position, evaluation)
        log_reversal = log_proposal_ratio(start, proposed, trajectory.step_size, in_force(self.metric))
        return unadjusted(proposed, start, log_reversal)
