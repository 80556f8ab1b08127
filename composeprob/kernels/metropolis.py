"""The one place where a proposal is accepted or rejected."""

from __future__ import annotations

import dataclasses
import math
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from composeprob import pytree
from composeprob.kernels.base import Info, KernelState, log_density_of
from composeprob.kernels.walls import comparable, finite

S = TypeVar("S", bound=KernelState)
DIVERGED = 100.0
"""Nats, and √d more for d numbers, beyond which the kick of a step is that of one far too long: chains in equilibrium
that accept most moves are given about √d/3."""


def metropolis(
    key: Array,
    log_ratio: Array,
    proposed: S,
    rejected: S,
    log_target_ratio: Array | None = None,
    quadrature_error: Array | float = 0.0,
    pushed: Array | float = 0.0,
) -> tuple[S, Info]:
    """Accepts `proposed` with probability min(1, exp(log_ratio)), else goes to `rejected`.

    The chosen state is selected, never blended: a·x' + (1−a)·x would carry a NaN of x' into the chain, as 0·NaN = NaN.

    Args:
        key: typed random key.
        log_ratio: log π(x')q(x|x') − log π(x)q(x'|x), a scalar, of `comparable` states; NaN rejects.
        proposed: the state at x'. If any part of it is non-finite it is rejected and flagged; a density of 0,
            log π = −∞, is no such part.
        rejected: the state after a rejection: the current one, with its momentum flipped where there is one.
        log_target_ratio: log π(x') − log π(x), a scalar; left out, that of the two states' evaluations.
        quadrature_error: an estimate of the error of `log_ratio` where that is a quadrature.
        pushed: the greatest `kick` on the way. Over `DIVERGED` the step was far too long for where it began, and what
            is not finite where it ended says nothing of the density: rejected, but not flagged.

    Returns:
        The next state and its `Info`.
    """
    leaves = proposed.evaluation.zero & ~rejected.evaluation.zero
    log_ratio = jnp.where(leaves, -jnp.inf, log_ratio)  # a line integral of the score does not see a wall
    usable = finite(proposed) & ~jnp.isnan(log_ratio)
    probability = jnp.where(usable, jnp.exp(jnp.minimum(log_ratio, 0.0)), 0.0)
    # −Exponential(1) is the logarithm of a uniform number, and never −∞: a ratio of −∞ cannot be accepted.
    log_uniform = -jax.random.exponential(key, dtype=jnp.result_type(log_ratio))
    accepted = usable & (log_uniform <= log_ratio)
    if log_target_ratio is None:
        there, here = comparable(proposed, rejected)
        log_target_ratio = log_density_of(there.evaluation) - log_density_of(here.evaluation)
    info = _info(accepted, probability, usable, -log_target_ratio, quadrature_error)
    size = sum(x.size for x in jax.tree.leaves(proposed.position))
    info = dataclasses.replace(info, non_finite=info.non_finite & ~(jnp.asarray(pushed) > DIVERGED + math.sqrt(size)))
    return pytree.where(accepted, proposed, rejected), info


def unadjusted(proposed: S, rejected: S, log_reversal: Array | None = None) -> tuple[S, Info]:
    """Goes to `proposed` unless it is non-finite, or leads out of where the density is positive.

    That is what kernels without a Metropolis test do instead of it.

    Args:
        proposed: the state at x'.
        rejected: the state where x' is unusable.
        log_reversal: log q(x|x') − log q(x'|x) of the proposal, a scalar; left out where unknown, and reported as NaN.
    """
    usable = finite(proposed)
    leaves = proposed.evaluation.zero & ~rejected.evaluation.zero
    taken = usable & ~leaves
    log_reversal = jnp.asarray(jnp.nan) if log_reversal is None else log_reversal
    return pytree.where(taken, proposed, rejected), _info(taken, taken, usable, log_reversal, 0.0)


def _info(
    accepted: Array, probability: Array, usable: Array, log_reversal: Array, quadrature_error: Array | float
) -> Info:
    precision = jnp.result_type(float)
    return Info(
        acceptance=probability.astype(precision),
        accepted=accepted,
        non_finite=~usable,
        log_reversal=jnp.where(accepted, log_reversal, 0.0),
        quadrature_error=jnp.where(usable, quadrature_error, jnp.nan).astype(precision),
    )
