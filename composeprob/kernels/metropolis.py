"""The one place where a proposal is accepted or rejected."""

from __future__ import annotations

import dataclasses
import math
from typing import TypeVar

import equinox as eqx
import jax.numpy as jnp
from jax import Array
from jax.scipy.special import erfc
from jaxtyping import Bool, Float

from composeprob import pytree, tuning
from composeprob.density.evaluation import Position
from composeprob.kernels.kernel import Info, KernelState, log_density_of
from composeprob.kernels.metric import Metric

StateT = TypeVar("StateT", bound=KernelState)


def kick_energy(
    score: Position, step_size: Float[Array, ""], metric: Metric
) -> Float[Array, ""]:
    """Return ½‖h/2·Lᵀ∇log π‖², the energy in nats that half a leapfrog step of length h
    gives to a chain at rest."""
    energy = step_size**2 / 8 * pytree.squared_norm(metric.back(score))
    return energy.astype(jnp.result_type(float))


def log_uniform(normal: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return log U of the uniform number U = Φ(z) that a standard normal number makes;
    finite for |z| up to 12.

    `jax.scipy.special.log_ndtr` is right beyond, where no draw comes, and takes the
    compiler four times as much.
    """
    return jnp.log(0.5 * erfc(-math.sqrt(0.5) * normal))


def accept(
    log_u: Float[Array, "*shape"], log_ratio: Float[Array, "*shape"]
) -> tuple[Bool[Array, "*shape"], Float[Array, "*shape"]]:
    """Return whether U ≤ min(1, exp(log_ratio)), and that probability; NaN rejects."""
    known = ~jnp.isnan(log_ratio)
    probability = jnp.where(known, jnp.exp(jnp.minimum(log_ratio, 0.0)), 0.0)
    # log U is never −∞: a ratio of −∞ cannot be accepted.
    accepted = known & (log_u <= log_ratio)
    return accepted, probability


def metropolis(
    log_u: Float[Array, ""],
    log_ratio: Float[Array, ""],
    proposed: StateT,
    rejected: StateT,
    log_target_ratio: Float[Array, ""] | None = None,
    quadrature_error: Float[Array, ""] | float = 0.0,
    greatest_kick: Float[Array, ""] | float = 0.0,
) -> tuple[StateT, Info]:
    """Accept `proposed` with probability min(1, exp(log_ratio)), else go to `rejected`.

    The chosen state is selected, never blended: a·x' + (1−a)·x would carry a NaN of x'
    into the chain, as 0·NaN = NaN.

    Args:
        log_u: log U of a uniform number, such as `log_uniform` makes.
        log_ratio: log π(x')q(x|x') − log π(x)q(x'|x) of `comparable` states; NaN
            rejects.
        proposed: the state at x'. If any part of it is non-finite it is rejected and
            flagged; a density of 0, log π = −∞, is no such part.
        rejected: the state after a rejection: the current one, with its momentum
            flipped where there is one.
        log_target_ratio: log π(x') − log π(x); left out, that of the two states'
            evaluations.
        quadrature_error: an estimate of the error of `log_ratio` where that is a
            quadrature.
        greatest_kick: the greatest `kick_energy` on the way. Over `tuning.DIVERGED` the
            step was far too long for its start, and a non-finite end says nothing of
            the density: rejected, but not flagged.

    Returns:
        The next state and its `Info`.
    """
    # A line integral of the score does not see a wall.
    leaving = proposed.evaluation.zero & ~rejected.evaluation.zero
    log_ratio = jnp.where(leaving, -jnp.inf, log_ratio)
    usable = is_finite(proposed) & ~jnp.isnan(log_ratio)
    accepted, probability = accept(log_u, jnp.where(usable, log_ratio, jnp.nan))
    if log_target_ratio is None:
        log_target_ratio = log_density_ratio(proposed, rejected)
    limit = tuning.DIVERGED + math.sqrt(pytree.size(proposed.position))
    diverged = jnp.asarray(greatest_kick) > limit
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
    proposed: StateT, rejected: StateT, log_reversal: Float[Array, ""] | None = None
) -> tuple[StateT, Info]:
    """Go to `proposed` unless it is non-finite, or leads out of where the density is
    positive: replaces the Metropolis test of kernels that have none.

    Args:
        proposed: the state at x'.
        rejected: the state that is kept otherwise.
        log_reversal: log q(x|x') − log q(x'|x) of the proposal; left out, NaN is
            reported.

    Returns:
        The next state and its `Info`.
    """
    if log_reversal is None:
        log_reversal = jnp.asarray(jnp.nan)
    certain = jnp.zeros(())
    return metropolis(certain, certain, proposed, rejected, -log_reversal)


def comparable(proposed: StateT, current: StateT) -> tuple[StateT, StateT]:
    """Return both states; if π is 0 at both, with log-densities that leave out the
    wall.

    Else the ratio would be 0/0, and a chain that starts outside a wall would never
    move. Moves where the density is 0 leave π invariant; once a chain finds the way in,
    any proposal is accepted.
    """
    both = proposed.evaluation.zero & current.evaluation.zero

    def without_wall(state: StateT) -> StateT:
        value = state.evaluation.log_density
        log_open = state.evaluation.log_open
        if value is None or log_open is None:
            return state
        return eqx.tree_at(
            lambda s: s.evaluation.log_density, state, jnp.where(both, log_open, value)
        )

    return without_wall(proposed), without_wall(current)


def log_density_ratio(proposed: StateT, current: StateT) -> Float[Array, ""]:
    """Return log π(x') − log π(x) of `comparable` states."""
    there, here = comparable(proposed, current)
    return log_density_of(there.evaluation) - log_density_of(here.evaluation)


def is_finite(state: StateT) -> Bool[Array, ""]:
    """Return whether every number that a kernel reads of a state is finite; log 0
    counts as finite."""
    value = state.evaluation.log_density
    logs = []
    if value is not None:
        is_log_zero = state.evaluation.zero & jnp.isneginf(value)
        logs = [jnp.where(is_log_zero, 0.0, value)]
    rest = dataclasses.replace(state, evaluation=None)  # type: ignore[arg-type]
    return pytree.all_finite((rest, state.evaluation.score, logs))
