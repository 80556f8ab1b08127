"""The compiled pieces of a run: each is one executable, the same on every device, whatever the numbers in it; and a run
that is compiled ahead, for devices that this machine need not have."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Position
from composeprob.pytree import is_array
from composeprob.runtime.parts import in_parts, places
from composeprob.samplers.choose import check_capabilities
from composeprob.samplers.closing import Closing
from composeprob.samplers.run import NoRecords, Run, begin, placed
from composeprob.samplers.sampler import Sampler
from composeprob.samplers.spread import Spread, chain_mesh, chains, everywhere

Params = ParamSpec("Params")
Output = TypeVar("Output")


def make_room(most: int = tuning.ROOM.memory_maps) -> None:
    """Lets go of all compiled code where this process has more memory maps than ``most``."""
    maps = Path("/proc/self/maps")
    if maps.is_file() and maps.read_bytes().count(b"\n") > most:
        jax.clear_caches()


def on_devices(function: Callable[Params, Output], out: PyTree[PartitionSpec]) -> Callable[Params, Output]:
    """The function, whose second argument is a run, on every device that this is spread over: it sees that device's
    share of the run's chains there, and the whole of everything else. What it returns is where ``out`` says."""

    @functools.wraps(function)
    def mapped(*args: Params.args, **kwargs: Params.kwargs) -> Output:
        arrays, static = eqx.partition(args, eqx.is_array)
        on_one = lambda arrays: function(*eqx.combine(arrays, static), **kwargs)  # noqa: E731
        mesh, where = args[1].spread.mesh, tuple(map(places, args))  # type: ignore[attr-defined]
        return jax.shard_map(on_one, mesh=mesh, in_specs=(where,), out_specs=out, check_vma=False)(arrays)

    return mapped


def executable(out: PyTree[PartitionSpec]) -> Callable[[Callable[Params, Output]], Callable[Params, Output]]:
    """A decorator: compiles a function of a run for the devices that this is spread over; see `on_devices`.

    With chains in chunks most programs round on one device as on several: XLA's partitioner, which only programs for
    several devices go through, ends by merging equal expressions, and the simplifier after it does to merged ones what
    it does not do to equal ones (a·x + a·y becomes a·(x + y)). So they are never merged there, which takes no time.
    Constants, which the partitioner writes out once for each use, can still make last bits on one device differ.
    """

    def decorate(function: Callable[Params, Output]) -> Callable[Params, Output]:
        @functools.cache
        def compiled(meshed: bool, chunked: bool) -> Callable[Params, Output]:
            options = {"xla_disable_hlo_passes": "cse"} if chunked else {}
            body = on_devices(function, out) if meshed else function
            return eqx.filter_jit(body, compiler_options=options)  # type: ignore[call-overload]  # for jax.jit

        @functools.wraps(function)
        def call(*args: Params.args, **kwargs: Params.kwargs) -> Output:
            spread: Spread = args[1].spread  # type: ignore[attr-defined]
            return compiled(spread.mesh is not None, spread.chunk is not None)(*args, **kwargs)

        return call

    return decorate


@executable(out=Run.places())
def start(sampler: Sampler, run: Run, density: AnnealedDensity, first: int) -> Run:
    """Chains at the first level."""
    return sampler.start(run, density, first)


@executable(out=Run.places())
def advance(sampler: Sampler, run: Run, density: AnnealedDensity, end: Array) -> Run:
    """Chains after their visits until ``end`` are made, an array: every stretch of levels is one executable."""
    return sampler.advance(run, density, end)


@executable(out=Run.places())
def close(closing: Closing, run: Run, density: AnnealedDensity, fitted: PyTree[Array], number: Array) -> Run:
    """Chains at level 0 after a round of what closes a run."""
    return closing.move(run, density, fitted, number)


@executable(out=(Run.places(), chains))
def draw(
    sampler: Sampler, run: Run, density: AnnealedDensity, begin: Array, end: Array, thin: Array, most: int
) -> tuple[Run, dict[str, Array]]:
    """At level 0 ``thin`` transitions of the kernel, which leave π_0 invariant, for each of the draws ``begin`` …
    ``end`` − 1, as ``{name: (N, most, …)}``, of which the first ``end`` − ``begin`` count."""

    def values(run: Run) -> dict[str, Array]:
        return run.spread.map(density.to_samples, sampler.positions(run, density))

    def take(i: Array, carry: tuple[Run, dict[str, Array]]) -> tuple[Run, dict[str, Array]]:
        run = sampler.draw(carry[0], density, i, thin)
        return run, jax.tree.map(lambda drawn, new: drawn.at[:, i - begin].set(new), carry[1], values(run))

    shapes = jax.eval_shape(values, run)
    blank = {name: jnp.zeros((s.shape[0], most, *s.shape[1:]), s.dtype) for name, s in shapes.items()}
    return jax.lax.fori_loop(begin, end, take, (run, blank))


@executable(out=(chains, chains))
def read(sampler: Sampler, run: Run, density: AnnealedDensity) -> tuple[dict[str, Array], Position]:
    """What the chains' positions mean to the program's author, ``{name: (N, …)}``, and the positions."""
    positions = sampler.positions(run, density)
    return run.spread.map(density.to_samples, positions), positions


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compiler reports of a whole run, start and every level, as one program; sizes and costs are a chip's."""

    arguments: int  # bytes of memory, as the next two
    outputs: int
    temporaries: int
    flops: float  # the compiler's own estimates, NaN where it gives none; the body of a loop counts once
    bytes_accessed: float
    seconds: float
    collectives: dict[str, int]  # how many operations of each kind the compiled program has


def compile_ahead(
    density: AnnealedDensity,
    sampler: Sampler,
    num_chains: int,
    devices: Sequence[jax.Device] | np.ndarray,
    diagnostics: bool = True,
) -> Compiled:
    """Compile a run of N chains that are spread over devices, which this machine need not have.

    Args:
        density, sampler, num_chains: as for `infer`; arrays of networks may be shapes (`jax.ShapeDtypeStruct`).
        devices: such as ``jax.experimental.topologies.get_topology_desc(…).devices``; a table is a mesh of two axes.
        diagnostics: whether the program also gives what a `Result` reports of each level: means over all chains, which
            take collectives even where the chains themselves need none.
    """
    check_capabilities(sampler, density)
    sampler = sampler.prepare(density)
    first, mesh = sampler.first_level(density), chain_mesh(devices)
    spread = Spread.checked(mesh, None, num_chains)
    here = dataclasses.replace(spread, mesh=None)  # where the devices are not
    run = placed(begin(jax.random.key(0), num_chains, sampler.visits(density, None)), here)
    records = run.records if diagnostics else NoRecords.empty(density.num_levels)
    run = dataclasses.replace(run, records=records, spread=spread)
    given = sampler, run, in_parts(density, spread, sampler)

    def descent(sampler: Sampler, run: Run, density: AnnealedDensity) -> PyTree[Array]:
        run = sampler.advance(sampler.start(run, density, first), density, first + 1)
        return sampler.positions(run, density), run.log_weights, (run.log_evidence, run.records)

    def struct(place: PartitionSpec, part: PyTree[Any]) -> PyTree[jax.ShapeDtypeStruct]:
        sharding = NamedSharding(mesh, place)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), part)

    arrays, static = eqx.partition(given, is_array)
    structs = jax.tree.map(struct, tuple(map(places, given)), arrays)
    program = on_devices(descent, out=(chains, chains, everywhere))
    compiled: Any = jax.jit(lambda arrays: program(*eqx.combine(arrays, static))).lower(structs).compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    sizes = memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes
    flops, accessed, seconds = (cost.get(name, math.nan) for name in ("flops", "bytes accessed", "optimal_seconds"))
    seconds = seconds if seconds > 0 else math.nan  # of large programs it is below 0
    return Compiled(*sizes, flops, accessed, seconds, collectives(compiled.as_text()))


def collectives(text: str) -> dict[str, int]:
    """The collective operations in the text of a compiled program, by kind; an asynchronous one counts where it
    starts."""
    kinds = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
    found = re.findall(rf"\s({'|'.join(kinds)})(?:-start)?\(", text)
    return dict(sorted(Counter(found).items()))
