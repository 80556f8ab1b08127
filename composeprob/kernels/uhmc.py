"""Unadjusted Hamiltonian Monte Carlo."""

from __future__ import annotations

from composeprob import pytree
from composeprob.density.evaluation import Evaluation
from composeprob.kernels.base import Info
from composeprob.kernels.hamiltonian import Hamiltonian, HamiltonianState, HamiltonianTrajectory, flip
from composeprob.kernels.metropolis import unadjusted


class UHMC(Hamiltonian):
    r"""Unadjusted Hamiltonian Monte Carlo: $v \leftarrow \gamma v + \sqrt{1-\gamma^2}\,\xi$, then L leapfrog steps.

    Needs scores only and leaves π invariant up to an error of order h²: on N(0, s²) its stationary variance is
    s²/(1 − h²/(4s²)), whatever L and γ, and for h ≥ 2s it diverges.

    Args:
        step_size: h > 0, a length: a number, one per level (K,), or a rule such as ``lambda s: 0.5 * s.sigma``.
            Not `Adaptive`: nothing is rejected, so there is nothing to adapt to.
        num_leapfrog: L ≥ 1, evaluations per transition.
        damping: γ in [0, 1), the part of the momentum that is kept.
        metric: the inverse mass matrix, as of `HMC`.

    Raises:
        InvalidValueError: for a step size that is not positive and finite, L < 1, or γ outside [0, 1).
        CapabilityError: for an `Adaptive` step size.

    Example:
        >>> from composeprob.kernels import UHMC
        >>> UHMC(0.03, num_leapfrog=3).evaluations_per_step
        3

    References:
        Horowitz (1991), a generalized guided Monte Carlo algorithm; Du et al. (2023), Reduce, Reuse, Recycle.
    """

    optimal_acceptance = None

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"score"})

    def finish(self, trajectory: HamiltonianTrajectory, evaluation: Evaluation) -> tuple[HamiltonianState, Info]:
        start, proposed = trajectory.start, self.second_kick(trajectory, evaluation)
        # The leapfrog preserves volume and is its own reverse: the directions differ by the law of momenta only.
        log_reversal = 0.5 * (pytree.squared_norm(start.momentum) - pytree.squared_norm(proposed.momentum))
        return unadjusted(proposed, flip(start), log_reversal)
