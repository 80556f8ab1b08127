"""Densities that are 0 somewhere: what a kernel may do outside the wall, and how it comes in."""

from __future__ import annotations

from typing import TypeVar

import equinox as eqx
import jax.numpy as jnp
from jax import Array

from composeprob import pytree
from composeprob.density.evaluation import Evaluation
from composeprob.kernels.base import KernelState

S = TypeVar("S", bound=KernelState)


def zero_density(evaluation: Evaluation) -> Array:
    """Whether π, or the part G of it, is 0 here, a scalar bool; False where neither has a value."""
    values = (evaluation.log_density, evaluation.log_potential)
    return sum((jnp.isneginf(v) for v in values if v is not None), jnp.asarray(False))


def comparable(proposed: S, current: S) -> tuple[S, S]:
    """Both states, with log-densities that can be compared where π is 0 at both: those of all but the potential G.

    Else the ratio would be 0/0 and a chain that starts outside a wall would never move. So it moves as if there were no
    wall until it finds the way in, where any proposal is accepted. Points of density 0 have no share in π, so what
    chains do there leaves π invariant.
    """
    both = zero_density(proposed.evaluation) & zero_density(current.evaluation)

    def seen(state: S) -> S:
        e = state.evaluation
        if e.log_density is None:
            return state
        rest = sum((t for t in (e.log_prior, e.log_marginal, e.log_exact) if t is not None), jnp.zeros(()))
        return eqx.tree_at(lambda s: s.evaluation.log_density, state, jnp.where(both, rest, e.log_density))

    return seen(proposed), seen(current)


def finite(state: S) -> Array:
    """Whether every number of a state is finite, but for the logarithms of a density that is 0, a scalar bool."""
    e = state.evaluation
    zero = zero_density(e)
    logs = [t for t in (e.log_density, e.log_potential) if t is not None]
    fields = lambda s: [t for t in (s.evaluation.log_density, s.evaluation.log_potential) if t is not None]  # noqa: E731
    return pytree.all_finite(eqx.tree_at(fields, state, [jnp.where(zero & jnp.isneginf(t), 0.0, t) for t in logs]))
