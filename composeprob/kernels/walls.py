"""Densities that are 0 somewhere: what a kernel may do outside the wall, and how it comes in."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import equinox as eqx
import jax.numpy as jnp
from jax import Array

from composeprob import pytree
from composeprob.kernels.base import KernelState

StateT = TypeVar("StateT", bound=KernelState)


def comparable(proposed: StateT, current: StateT) -> tuple[StateT, StateT]:
    """Both states, with log-densities that can be compared where π is 0 at both: those without the wall.

    Else the ratio would be 0/0 and a chain that starts outside a wall would never move. So it moves as if there were no
    wall until it finds the way in, where any proposal is accepted. Points of density 0 have no share in π, so what
    chains do there leaves π invariant.
    """
    both = proposed.evaluation.zero & current.evaluation.zero

    def without_wall(state: StateT) -> StateT:
        value, log_open = state.evaluation.log_density, state.evaluation.log_open
        if value is None or log_open is None:
            return state
        return eqx.tree_at(lambda s: s.evaluation.log_density, state, jnp.where(both, log_open, value))

    return without_wall(proposed), without_wall(current)


def finite(state: StateT) -> Array:
    """Whether every number that a kernel reads of a state is finite, a scalar bool; log 0 counts as a number."""
    value, zero = state.evaluation.log_density, state.evaluation.zero
    logs = [] if value is None else [jnp.where(zero & jnp.isneginf(value), 0.0, value)]
    rest = dataclasses.replace(state, evaluation=None)  # type: ignore[arg-type]
    return pytree.all_finite((rest, state.evaluation.score, logs))
