"""The compiled pieces of a run: each is one executable, the same on every device, whatever the numbers in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jax import Array

from composeprob.density.annealed import AnnealedDensity
from composeprob.sampling.base import Run, Sampler
from composeprob.sampling.spread import Spread, chains, everywhere


@eqx.filter_jit
def start(sampler: Sampler, run: Run, density: AnnealedDensity, first: int) -> Run:
    """Chains at the first level."""

    def own(sampler: Sampler, run: Run, density: AnnealedDensity) -> Run:
        return sampler.start(run, density, first)

    return on_devices(run.spread, own, (sampler, run, density), (everywhere, Run.places(), everywhere), Run.places())


@eqx.filter_jit
def advance(sampler: Sampler, run: Run, density: AnnealedDensity, begin: Array, end: Array, first: int) -> Run:
    """Visit the levels first − begin … first − end + 1; the bounds are arrays: every stretch is one executable."""

    def own(sampler: Sampler, run: Run, density: AnnealedDensity, begin: Array, end: Array) -> Run:
        return jax.lax.fori_loop(begin, end, lambda i, r: sampler.visit(r, density, first - i, first), run)

    specs = (everywhere, Run.places(), everywhere, everywhere, everywhere)
    return on_devices(run.spread, own, (sampler, run, density, begin, end), specs, Run.places())


@eqx.filter_jit
def read(spread: Spread, density: AnnealedDensity, positions: Any) -> dict[str, Array]:
    """What positions mean to the program's author, ``{name: (N, …)}``."""

    def own(spread: Spread, density: AnnealedDensity, positions: Any) -> dict[str, Array]:
        return spread.map(density.to_samples, positions)

    return on_devices(spread, own, (spread, density, positions), (everywhere, everywhere, chains), chains)


def on_devices(
    spread: Spread, function: Callable[..., Any], arguments: tuple[Any, ...], places: Any, out_places: Any
) -> Any:
    """Call a function on every device of a spread, with that device's share of each argument.

    Args:
        spread: over which devices.
        function: returns a pytree of arrays.
        arguments: pytrees of arrays and of what is the same everywhere.
        places: for each argument `chains`, `everywhere`, or a pytree of these that its own begins with.
        out_places: likewise for what the function returns.
    """
    if spread.mesh is None:
        return function(*arguments)
    arrays, static = eqx.partition(arguments, eqx.is_array)

    def own(arrays: tuple[Any, ...]) -> Any:
        return function(*eqx.combine(arrays, static))

    mapped = jax.shard_map(own, mesh=spread.mesh, in_specs=(places,), out_specs=out_places, check_vma=False)
    return mapped(arrays)
