"""The compiled pieces of a run: each is one executable, the same on every device, whatever the numbers in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeAlias, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from jaxtyping import PyTree

from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Position
from composeprob.runtime.parts import places
from composeprob.samplers.base import Run, Sampler
from composeprob.samplers.spread import Spread, chains, everywhere

P = ParamSpec("P")
T = TypeVar("T")
MAPS = 50_000
"""Memory maps from which on compiled code is let go. Linux allows a process 65,530, every executable of XLA's for
processors holds some, and a process that runs out of them dies."""


def make_room(most: int = MAPS) -> None:
    """Lets go of all compiled code where this process has more memory maps than ``most``: what is used again is
    compiled again."""
    maps = Path("/proc/self/maps")
    if maps.is_file() and maps.read_bytes().count(b"\n") > most:
        jax.clear_caches()


def compiler_options(spread: Spread) -> dict[str, str | bool]:
    """What the compiler of a run is told.

    A program for several devices goes through XLA's partitioner, which one for a single device does not. It ends by
    merging equal expressions, and the algebraic simplifier, which comes later, does to merged expressions what it does
    not do to equal ones (a·x + a·y becomes a·(x + y), x/√v becomes x·v^−½). For chains in chunks equal expressions are
    never merged, so that most programs round on one device as on several; that costs no time that could be measured.
    The partitioner also writes out constants and scalars once for each use, which no option undoes: last bits on one
    device can still differ. From two devices on the same passes see the same code.
    """
    return {} if spread.chunk is None else {"xla_disable_hlo_passes": "cse"}


def executable(function: Callable[P, T]) -> Callable[P, T]:
    """``function``, of which one argument is a `Spread` or a `Run` with one, compiled with the options for that."""
    options = compiler_options(Spread(chunk=1))
    plain = eqx.filter_jit(function)
    by_chunk = eqx.filter_jit(function, compiler_options=options)  # type: ignore[call-overload]  # handed on to jax.jit

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        (spread,) = (a.spread if isinstance(a, Run) else a for a in args if isinstance(a, Run | Spread))
        if spread.chunk is None:
            return plain(*args, **kwargs)
        # Inside of other compiled code the options are those of the whole, and JAX takes none here.
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(args))
        return (plain if traced else by_chunk)(*args, **kwargs)

    return call


@executable
def start(sampler: Sampler, run: Run, density: AnnealedDensity, first: int) -> Run:
    """Chains at the first level."""

    def own(sampler: Sampler, run: Run, density: AnnealedDensity) -> Run:
        return sampler.start(run, density, first)

    specs = (everywhere, Run.places(), places(density))
    return on_devices(run.spread, own, specs, Run.places())(sampler, run, density)


def descent(sampler: Sampler, run: Run, density: AnnealedDensity, end: Array | int) -> Run:
    """Goes on with the run's visits until ``end`` are made, or level 0 is reached; traced."""

    def visit(run: Run) -> Run:
        moved = sampler.visit(run, density, *run.visits.now)
        return dataclasses.replace(moved, visits=moved.visits.onwards(density.schedule, moved.records))

    return jax.lax.while_loop(lambda run: (run.visits.made < end) & ~run.visits.arrived, visit, run)


@executable
def advance(sampler: Sampler, run: Run, density: AnnealedDensity, end: Array) -> Run:
    """`descent` on every device; ``end`` is an array: every stretch is one executable."""
    specs = (everywhere, Run.places(), places(density), everywhere)
    return on_devices(run.spread, descent, specs, Run.places())(sampler, run, density, end)


@executable
def draw(
    sampler: Sampler, run: Run, density: AnnealedDensity, begin: Array, end: Array, thin: Array, most: int
) -> tuple[Run, dict[str, Array]]:
    """Go on at level 0: ``thin`` transitions of the kernel for each of the draws ``begin`` … ``end`` − 1.

    Step sizes and metrics no longer change once they have settled, so that these transitions leave π_0 invariant.

    Args:
        sampler: prepared, with a kernel.
        run: at level 0.
        density: the same everywhere.
        begin, end, thin: numbers at run time.
        most: room for so many draws.

    Returns:
        The run, and ``{name: (N, most, …)}``, of which the first ``end`` − ``begin`` draws count.
    """

    def own(
        sampler: Sampler, run: Run, density: AnnealedDensity, begin: Array, end: Array, thin: Array
    ) -> tuple[Run, dict[str, Array]]:
        def values(run: Run) -> dict[str, Array]:
            return run.spread.map(density.to_samples, sampler.positions(run))

        def one(i: Array, carry: tuple[Run, dict[str, Array]]) -> tuple[Run, dict[str, Array]]:
            run = sampler.draw(carry[0], density, i, thin)
            put = lambda all_, new: all_.at[:, i - begin].set(new)  # noqa: E731
            return run, jax.tree.map(put, carry[1], values(run))

        shapes = jax.eval_shape(values, run)
        blank = {name: jnp.zeros((s.shape[0], most, *s.shape[1:]), s.dtype) for name, s in shapes.items()}
        return jax.lax.fori_loop(begin, end, one, (run, blank))

    specs = (everywhere, Run.places(), places(density), *(everywhere,) * 3)
    return on_devices(run.spread, own, specs, (Run.places(), chains))(sampler, run, density, begin, end, thin)


@executable
def read(spread: Spread, density: AnnealedDensity, positions: Position) -> dict[str, Array]:
    """What positions mean to the program's author, ``{name: (N, …)}``."""

    def own(spread: Spread, density: AnnealedDensity, positions: Position) -> dict[str, Array]:
        return spread.map(density.to_samples, positions)

    return on_devices(spread, own, (everywhere, places(density), chains), chains)(spread, density, positions)


def sample_shapes(sampler: Sampler, run: Run, density: AnnealedDensity, first: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every site's samples, all chains together; compiles nothing."""
    alone = dataclasses.replace(run, spread=Spread())
    started = alone if run.chains is not None else eqx.filter_eval_shape(start, sampler, alone, density, first)
    return eqx.filter_eval_shape(lambda run: jax.vmap(density.to_samples)(sampler.positions(run)), started)


Specs: TypeAlias = PyTree[PartitionSpec]
"""Where arrays are: `chains`, `everywhere`, or a pytree of these."""


def on_devices(spread: Spread, function: Callable[..., T], specs: Specs, out_specs: Specs) -> Callable[..., T]:
    """A function on every device of a spread, with that device's share of each argument.

    Args:
        spread: over which devices.
        function: of pytrees of arrays and of what is the same everywhere; returns a pytree of arrays.
        specs: where each argument is: `chains`, `everywhere`, or a pytree of these that its own begins with.
        out_specs: likewise for what the function returns.
    """
    if spread.mesh is None:
        return function

    def spread_out(*arguments: object) -> T:
        arrays, static = eqx.partition(arguments, eqx.is_array)

        def own(arrays: tuple[PyTree[Array], ...]) -> T:
            return function(*eqx.combine(arrays, static))

        mapped = jax.shard_map(own, mesh=spread.mesh, in_specs=(specs,), out_specs=out_specs, check_vma=False)
        return mapped(arrays)

    return spread_out
