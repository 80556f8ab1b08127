"""The one place where a proposal is accepted or rejected."""

from __future__ import annotations

import dataclasses
import math
from typing import TypeVar

import equinox as eqx
import jax.numpy as jnp
from jax import Array
from jax.scipy.special import erfc

from composeprob import pytree, tuning
from composeprob.density.evaluation import Position
from composeprob.kernels.kernel import Info, KernelState, log_density_of
from composeprob.kernels.metric import Metric

StateT = TypeVar("StateT", bound=KernelState)


def kick_energy(score: Position, step_size: Array, metric: Metric) -> Array:
    """½‖h/2·Lᵀ∇log π‖², the energy that half a leapfrog step of length h gives to a
    chain at rest, a scalar in nats."""
    return (step_size**2 / 8 * pytree.squared_norm(metric.back(score))).astype(
        jnp.result_type(float)
    )


def log_uniform(normal: Array) -> Array:
    """log U of the uniform number U = Φ(z) that a standard normal number makes; finite
    for |z| up to 12. `jax.scipy.special.log_ndtr` is right beyond, where no draw comes,
    and takes the compiler four times as much."""
    return jnp.log(0.5 * erfc(-math.sqrt(0.5) * normal))


def accept(log_u: Array, log_ratio: Array) -> tuple[Array, Array]:
    """Whether U ≤ min(1, exp(log_ratio)), and that probability, each of any shape; NaN
    rejects."""
    known = ~jnp.isnan(log_ratio)
    probability = jnp.where(known, jnp.exp(jnp.minimum(log_ratio, 0.0)), 0.0)
    return known & (
        log_u <= log_ratio
    ), probability  # log U is never −∞: a ratio of −∞ cannot be accepted


def metropolis(
    log_u: Array,
    log_ratio: Array,
    proposed: StateT,
    rejected: StateT,
    log_target_ratio: Array | None = None,
    quadrature_error: Array | float = 0.0,
    greatest_kick: Array | float = 0.0,
) -> tuple[StateT, Info]:
    """Accepts `proposed` with probability min(1, exp(log_ratio)), else goes to
    `rejected`.

    The chosen state is selected, never blended: a·x' + (1−a)·x would carry a NaN of x'
    into the chain, as 0·NaN = NaN.

    Args:
        log_u: log U of a uniform number, a scalar, such as `log_uniform` makes.
        log_ratio: log π(x')q(x|x') − log π(x)q(x'|x), a scalar, of `comparable` states;
            NaN rejects.
        proposed: the state at x'. If any part of it is non-finite it is rejected and
            flagged; a density of 0, log π = −∞, is no such part.
        rejected: the state after a rejection: the current one, with its momentum
            flipped where there is one.
        log_target_ratio: log π(x') − log π(x), a scalar; left out, that of the two
            states' evaluations.
        quadrature_error: an estimate of the error of `log_ratio` where that is a
            quadrature.
        greatest_kick: the greatest `kick_energy` on the way. Over `tuning.DIVERGED` the
            step was far too long for where it began, and what is not finite where it
            ended says nothing of the density: rejected, but not flagged.

    Returns:
        The next state and its `Info`.
    """
    leaving = proposed.evaluation.zero & ~rejected.evaluation.zero
    log_ratio = jnp.where(
        leaving, -jnp.inf, log_ratio
    )  # a line integral of the score does not see a wall
    usable = finite(proposed) & ~jnp.isnan(log_ratio)
    accepted, probability = accept(log_u, jnp.where(usable, log_ratio, jnp.nan))
    if log_target_ratio is None:
        log_target_ratio = log_density_ratio(proposed, rejected)
    diverged = jnp.asarray(greatest_kick) > tuning.DIVERGED + math.sqrt(
        pytree.size(proposed.position)
    )
    precision = jnp.result_type(float)
    info = Info(
        acceptance=probability.astype(precision),
        accepted=accepted,
        non_finite=~usable & ~diverged,
        log_reversal=jnp.where(accepted, -log_target_ratio, 0.0),
        quadrature_error=jnp.where(usable, quadrature_error, jnp.nan).astype(precision),
    )
    return pytree.where(accepted, proposed, rejected), info


def unadjusted(
    proposed: StateT, rejected: StateT, log_reversal: Array | None = None
) -> tuple[StateT, Info]:
    """Goes to `proposed` unless it is non-finite, or leads out of where the density is
    positive: what kernels without a Metropolis test do instead of it.

    ``log_reversal`` is log q(x|x') − log q(x'|x) of the proposal, a scalar; NaN is
    reported where it is left out.
    """
    certain, log_reversal = (
        jnp.zeros(()),
        jnp.asarray(jnp.nan) if log_reversal is None else log_reversal,
    )
    return metropolis(certain, certain, proposed, rejected, -log_reversal)


def comparable(proposed: StateT, current: StateT) -> tuple[StateT, StateT]:
    """Both states, with log-densities that can be compared where π is 0 at both: those
    without the wall.

    Else the ratio would be 0/0, and a chain that starts outside a wall would never
    move. What chains do where the density is 0 leaves π invariant; once they find the
    way in, any proposal is accepted.
    """
    both = proposed.evaluation.zero & current.evaluation.zero

    def without_wall(state: StateT) -> StateT:
        value, log_open = state.evaluation.log_density, state.evaluation.log_open
        if value is None or log_open is None:
            return state
        return eqx.tree_at(
            lambda s: s.evaluation.log_density, state, jnp.where(both, log_open, value)
        )

    return without_wall(proposed), without_wall(current)


def log_density_ratio(proposed: StateT, current: StateT) -> Array:
    """log π(x') − log π(x) of `comparable` states, a scalar."""
    there, here = comparable(proposed, current)
    return log_density_of(there.evaluation) - log_density_of(here.evaluation)


def finite(state: StateT) -> Array:
    """Whether every number that a kernel reads of a state is finite, a scalar bool; log
    0 counts as a number."""
    value, zero = state.evaluation.log_density, state.evaluation.zero
    logs = [] if value is None else [jnp.where(zero & jnp.isneginf(value), 0.0, value)]
    rest = dataclasses.replace(state, evaluation=None)  # type: ignore[arg-type]
    return pytree.all_finite((rest, state.evaluation.score, logs))
