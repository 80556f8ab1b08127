"""Draws of a density inside other compiled code: a run of a sampler without progress, interruption or diagnostics."""

from __future__ import annotations

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from composeprob.density.annealed import AnnealedDensity
from composeprob.runtime.compiled import descent
from composeprob.samplers.base import Sampler, begin
from composeprob.samplers.choose import check_capabilities, choose
from composeprob.samplers.visits import Visits

SHARED, MORE, ORDER = 2**31 - 3, 2**31 - 4, 2**31 - 5
"""Folded into the first chain's key for what the chains share, for the keys of further chains, for their order."""


def draw(density: AnnealedDensity, keys: Array, sampler: Sampler | None = None, least: int = 1) -> dict[str, Array]:
    """One draw for each key, from chains that travel together; may be traced and mapped, as `infer` may not.

    Args:
        density: a compiled program; its arrays must be concrete.
        keys: typed random keys, (n,).
        sampler: how chains travel; left out, chosen as `infer` does.
        least: run at least so many chains, and return n of them.

    Returns:
        ``{name: (n, …)}``, in random order: resampling leaves copies of one chain side by side.

    Raises:
        CapabilityError: the sampler needs what a factor does not offer.
    """
    n = keys.shape[0]
    num_chains = max(n, least)
    with jax.ensure_compile_time_eval():  # what is decided by the density's numbers is decided now
        if sampler is None:
            sampler, _ = choose(density, num_chains)
        check_capabilities(sampler, density)
        sampler = sampler.prepare(density).in_numbers()
        first = sampler.first_level(density)
    return _draw(density, sampler, keys, num_chains, first)


@eqx.filter_jit
def _draw(density: AnnealedDensity, sampler: Sampler, keys: Array, num_chains: int, first: int) -> dict[str, Array]:
    n, key = keys.shape[0], keys[0]
    if num_chains > n:
        keys = jnp.concatenate([keys, jax.random.split(jax.random.fold_in(key, MORE), num_chains - n)])
    visits = Visits.every(first, density.num_levels)
    run = dataclasses.replace(begin(jax.random.fold_in(key, SHARED), num_chains, visits), keys=keys)
    run = sampler.start(run, density, first)
    run = descent(sampler, run, density, first + 1)
    chosen = jax.random.permutation(jax.random.fold_in(key, ORDER), num_chains)[:n]
    return jax.tree.map(lambda values: values[chosen], jax.vmap(density.to_samples)(sampler.positions(run)))
