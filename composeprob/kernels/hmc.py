"""Hamiltonian Monte Carlo with partial momentum refreshment."""

from __future__ import annotations

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from composeprob import pytree
from composeprob.density.evaluation import Target
from composeprob.errors import InvalidValueError
from composeprob.kernels.base import Info
from composeprob.kernels.hamiltonian import Hamiltonian, HamiltonianState, flip, log_joint
from composeprob.kernels.leapfrog import kick
from composeprob.kernels.line_integral import LineIntegral, LogRatio, check_log_ratio
from composeprob.kernels.metric import in_force
from composeprob.kernels.metropolis import metropolis
from composeprob.kernels.step_size import Adaptive, StepSizeLike, as_scalar, as_step_size, check_range, match_precision
from composeprob.kernels.walls import comparable

JITTER = 3
"""Folded into a transition's key for its own step size."""


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
        own_nodes = isinstance(self.log_ratio, LineIntegral) and self.log_ratio.num_points is None
        if own_nodes and self.log_ratio.rule == "simpson" and self.num_leapfrog % 2:  # type: ignore[union-attr]
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

    def step(
        self, key: Array, state: HamiltonianState, target: Target, step_size: Array
    ) -> tuple[HamiltonianState, Info]:
        key_refresh, key_accept = jax.random.split(key)
        refreshed = self.refresh(key_refresh, state)
        drawn = jax.random.uniform(jax.random.fold_in(key, JITTER), (), jnp.result_type(step_size), -1.0, 1.0)
        step_size = step_size * (1.0 + match_precision(self.jitter, state.position) * drawn)
        if not isinstance(self.log_ratio, LineIntegral):
            proposed, pushed = self.integrate(refreshed, target, step_size)
            there, here = comparable(proposed, refreshed)
            log_ratio = log_joint(there) - log_joint(here)
            return metropolis(key_accept, log_ratio, proposed, flip(refreshed), pushed=pushed)
        if self.log_ratio.num_points is None:
            proposed, nodes, scores = self.trajectory(refreshed, target, step_size)
            pushed = jnp.nanmax(jax.vmap(lambda score: kick(score, step_size, in_force(self.metric)))(scores))
            log_target_ratio, error = self.log_ratio.along(nodes, scores)
        else:
            proposed, pushed = self.integrate(refreshed, target, step_size)
            log_target_ratio, error = self.log_ratio.straight(refreshed, proposed, target)
        kinetic = 0.5 * (pytree.squared_norm(refreshed.momentum) - pytree.squared_norm(proposed.momentum))
        log_ratio = log_target_ratio + kinetic
        return metropolis(key_accept, log_ratio, proposed, flip(refreshed), log_target_ratio, error, pushed)
