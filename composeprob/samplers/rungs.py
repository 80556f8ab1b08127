"""What `ReplicaExchange` moves: ensembles of replicas, and the rungs that all of them share."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from composeprob.density.annealed import AnnealedDensity
from composeprob.kernels.gibbs import GibbsState


class Rungs(eqx.Module):
    """What all ensembles share.

    Attributes:
        levels: of the rungs, (L,), rung 0 the cleanest.
        log_scale: log c of the step sizes there, (L, B).
        sweeps: made since the chains arrived, a scalar.
        chance: mean probability of each rung's swap with the one above it, over ``sweeps``, (L − 1,).
        acceptance: of transitions, (L, B).
    """

    levels: Array
    log_scale: Array
    sweeps: Array
    chance: Array
    acceptance: Array


class Ensemble(eqx.Module):
    """One chain of the sampler: a replica on every rung.

    Attributes:
        states: of replicas, each leaf of shape (L, …).
        from_top: whether each replica was on the top rung since it last was on rung 0, (L,).
        trips: how many replicas came from the top to rung 0, a scalar.
    """

    states: GibbsState
    from_top: Array
    trips: Array


def evened(rungs: Rungs, density: AnnealedDensity, energies: bool) -> Array:
    """Levels between which neighbours would be refused equally often, (L,), as swaps at the present ones tell.

    Path weights have an error of their own, which follows from the levels' distance: with them that counts for two
    thirds.
    """
    between = jnp.maximum(1 - rungs.chance, 0.02)
    if not energies:
        distance = -jnp.diff(jnp.asarray(density.schedule.log_snr)[rungs.levels])
        between = between / jnp.sum(between) + 2 * distance / jnp.sum(distance)
    barrier = jnp.concatenate([jnp.zeros(1), jnp.cumsum(between)])
    even = jnp.linspace(0, barrier[-1], len(rungs.levels))
    wanted = jnp.interp(even, barrier, rungs.levels.astype(barrier.dtype))
    return apart(jnp.round(wanted).astype(jnp.int32), density.num_levels)


def apart(levels: Array, num_levels: int) -> Array:
    """Rising levels moved as little as it takes to be L different ones from 0 to K − 1, these two among them."""
    index = jnp.arange(len(levels))
    levels = index + jax.lax.cummax(levels - index)  # each above the one below it
    top = num_levels - len(levels) + index  # and none so high that those above it have no room
    return jnp.minimum(levels, top).at[0].set(0).at[-1].set(num_levels - 1).astype(jnp.int32)
