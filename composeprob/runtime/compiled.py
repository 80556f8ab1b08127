"""The compiled pieces of a run: each is one executable, the same on every device,
whatever the numbers in it.

Large arrays of a density may be kept in parts: every device has a share of each, and
the whole only while it evaluates. A run can also be compiled ahead, for devices that
this machine need not have.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree
from numpyro.distributions import Distribution

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity, Evaluates
from composeprob.density.evaluation import Position
from composeprob.errors import CapabilityError
from composeprob.kernels import BlackJAX
from composeprob.pytree import is_array
from composeprob.samplers.choose import check_capabilities
from composeprob.samplers.finishers import Finisher
from composeprob.samplers.run import NoRecords, Run, begin, placed
from composeprob.samplers.sampler import Sampler
from composeprob.samplers.spread import (
    AXES,
    Spread,
    Tree,
    chain_mesh,
    chains,
    everywhere,
)

Params = ParamSpec("Params")
Output = TypeVar("Output")


def make_room(most: int = tuning.ROOM.memory_maps) -> None:
    """Lets go of all compiled code where this process has more memory maps than
    ``most``."""
    maps = Path("/proc/self/maps")
    if maps.is_file() and maps.read_bytes().count(b"\n") > most:
        jax.clear_caches()


class Shard(eqx.Module):
    """Stands for an array that is cut along an axis, of which every device in a row of
    the mesh has a part; inside of `on_devices` it holds this device's part, outside the
    whole, in parts."""

    array: Array
    axis: int = eqx.field(static=True)

    def gathered(self, after: PyTree[Array]) -> Array:
        """The array, from all of its parts: one all-gather, which does not begin before
        the values ``after`` are there.

        Else a loop would gather once and for all what does not change in it, and keep
        it.
        """
        part, _ = jax.lax.optimization_barrier((self.array, after))
        return jax.lax.all_gather(part, AXES[1], axis=self.axis, tiled=True)


def _is_part(node: object) -> bool:
    return isinstance(node, Shard)


def _delegated(name: str) -> Any:
    """What `Evaluates` has of this name: a property, or a method of an evaluator whose
    arrays are gathered for the call."""

    def method(self: Sharded, *arguments: PyTree[Array]) -> PyTree[Array]:
        after = eqx.filter(arguments, eqx.is_inexact_array)
        gathered = lambda leaf: leaf.gathered(after) if _is_part(leaf) else leaf  # noqa: E731
        # An array that the method makes no use of is not gathered: the compiler drops
        # it.
        return getattr(jax.tree.map(gathered, self.evaluator, is_leaf=_is_part), name)(
            *arguments
        )

    known = isinstance(vars(Evaluates)[name], property)
    return property(lambda self: getattr(self.evaluator, name)) if known else method


class Sharded(eqx.Module):
    """An evaluator with a `Shard` in the place of each large array, put together for
    each evaluation and forgotten after it. All devices in a row must evaluate equally
    often, as each gives its parts to the others."""

    evaluator: Evaluates
    vars().update(
        {
            name: _delegated(name)
            for name in vars(Evaluates)
            if name == "__call__" or name[0] != "_"
        }
    )


def in_parts(
    density: AnnealedDensity, spread: Spread, sampler: Sampler
) -> AnnealedDensity:
    """The density with its evaluator's large arrays (`tuning.ROOM.parts_bytes`) in
    parts if a mesh has a second axis; refuses kernels that would leave devices waiting
    for one another."""
    number = 1 if spread.mesh is None else spread.mesh.shape[AXES[1]]
    shared = (
        density
        if number == 1
        else partitioned(density, number, tuning.ROOM.parts_bytes)
    )
    kernels = (
        ()
        if sampler.moves is None or shared is density
        else sampler.moves.kernel.kernels
    )
    for kernel in kernels:
        if isinstance(
            kernel, BlackJAX
        ):  # a NUTS tree ends where it ends; of other algorithms nothing is known
            raise CapabilityError(
                f"{kernel!r} may evaluate some chains more often than others, and devices that share networks out must "
                "evaluate equally often.",
                fix="use MALA, HMC, ULA or UHMC, or a mesh of one axis.",
            )
    return shared


def partitioned(density: AnnealedDensity, number: int, above: int) -> AnnealedDensity:
    """The density with its evaluator's arrays of more than ``above`` bytes in so many
    parts; itself without any.

    Each is cut along the longest axis that can be cut evenly; one without such stays
    whole. So do NumPyro's distributions, which list their arrays in another order in
    every process: these would wait for different ones.
    """

    def shard(leaf: PyTree[Array]) -> PyTree[Array]:
        key = is_array(leaf) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        if not is_array(leaf) or key or leaf.size * leaf.dtype.itemsize <= above:
            return leaf
        even = [axis for axis, length in enumerate(leaf.shape) if length % number == 0]
        return (
            Shard(leaf, max(even, key=lambda axis: leaf.shape[axis])) if even else leaf
        )

    marked = jax.tree.map(
        shard, density.evaluator, is_leaf=lambda node: isinstance(node, Distribution)
    )
    found = any(map(_is_part, jax.tree.leaves(marked, is_leaf=_is_part)))
    evaluator: Any = Sharded(marked)  # its methods are those of `Evaluates`
    return dataclasses.replace(density, evaluator=evaluator) if found else density


def places(argument: PyTree[Any]) -> PyTree[PartitionSpec]:
    """Where the arrays of a run, a density or anything else are, as `jax.shard_map`
    wants it."""
    if isinstance(argument, Run):
        return Run.places()
    row = lambda leaf: (
        PartitionSpec(*[None] * leaf.axis, AXES[1]) if _is_part(leaf) else everywhere
    )  # noqa: E731
    return jax.tree.map(row, eqx.filter(argument, is_array), is_leaf=_is_part)


def on_mesh(tree: Tree, spread: Spread) -> Tree:
    """A density, or what has no parts, on the devices of a spread. What it holds twice
    (a network in a factor, and again among the arguments of a program that is run
    again) is there once."""
    if spread.mesh is None:
        return tree
    arrays, static = eqx.partition(tree, eqx.is_array)
    known: dict[tuple[int, PartitionSpec], Array] = {}

    def put(place: PartitionSpec, array: Array) -> Array:
        if (id(array), place) not in known:
            known[id(array), place] = spread.place(array, place)
        return known[id(array), place]

    there = jax.tree.map(
        lambda place, part: jax.tree.map(partial(put, place), part),
        places(tree),
        arrays,
    )
    return eqx.combine(there, static)


def on_devices(
    function: Callable[Params, Output], out: PyTree[PartitionSpec]
) -> Callable[Params, Output]:
    """The function, whose second argument is a run, on every device that this is spread
    over: it sees that device's share of the run's chains there, and the whole of
    everything else. What it returns is where ``out`` says."""

    @functools.wraps(function)
    def mapped(*args: Params.args, **kwargs: Params.kwargs) -> Output:
        arrays, static = eqx.partition(args, eqx.is_array)
        on_one = lambda arrays: function(*eqx.combine(arrays, static), **kwargs)  # noqa: E731
        mesh, where = args[1].spread.mesh, tuple(map(places, args))  # type: ignore[attr-defined]
        return jax.shard_map(
            on_one, mesh=mesh, in_specs=(where,), out_specs=out, check_vma=False
        )(arrays)

    return mapped


def executable(
    out: PyTree[PartitionSpec],
) -> Callable[[Callable[Params, Output]], Callable[Params, Output]]:
    """A decorator: compiles a function of a run for the devices that this is spread
    over; see `on_devices`.

    With chains in chunks most programs round on one device as on several: XLA's
    partitioner, which only programs for several devices go through, ends by merging
    equal expressions, and the simplifier after it does to merged ones what it does not
    do to equal ones (a·x + a·y becomes a·(x + y)). So they are never merged there,
    which takes no time. Constants, which the partitioner writes out once for each use,
    can still make last bits on one device differ.
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
            return compiled(spread.mesh is not None, spread.chunk is not None)(
                *args, **kwargs
            )

        return call

    return decorate


@executable(out=Run.places())
def start(sampler: Sampler, run: Run, density: AnnealedDensity, first: int) -> Run:
    """Chains at the first level."""
    return sampler.start(run, density, first)


@executable(out=Run.places())
def advance(sampler: Sampler, run: Run, density: AnnealedDensity, end: Array) -> Run:
    """Chains after their visits until ``end`` are made, an array: every stretch of
    levels is one executable."""
    return sampler.advance(run, density, end)


@executable(out=Run.places())
def close(
    closing: Finisher,
    run: Run,
    density: AnnealedDensity,
    fitted: PyTree[Array],
    number: Array,
) -> Run:
    """Chains at level 0 after a round of what closes a run."""
    return closing.move(run, density, fitted, number)


@executable(out=(Run.places(), chains))
def draw(
    sampler: Sampler,
    run: Run,
    density: AnnealedDensity,
    begin: Array,
    end: Array,
    thin: Array,
    most: int,
) -> tuple[Run, dict[str, Array]]:
    """At level 0 ``thin`` transitions of the kernel, which leave π_0 invariant, for
    each of the draws ``begin`` … ``end`` − 1, as ``{name: (N, most, …)}``, of which the
    first ``end`` − ``begin`` count."""

    def values(run: Run) -> dict[str, Array]:
        return run.spread.map(density.to_samples, sampler.positions(run, density))

    def take(
        i: Array, carry: tuple[Run, dict[str, Array]]
    ) -> tuple[Run, dict[str, Array]]:
        run = sampler.draw(carry[0], density, i, thin)
        return run, jax.tree.map(
            lambda drawn, new: drawn.at[:, i - begin].set(new), carry[1], values(run)
        )

    shapes = jax.eval_shape(values, run)
    blank = {
        name: jnp.zeros((s.shape[0], most, *s.shape[1:]), s.dtype)
        for name, s in shapes.items()
    }
    return jax.lax.fori_loop(begin, end, take, (run, blank))


@executable(out=(chains, chains))
def read(
    sampler: Sampler, run: Run, density: AnnealedDensity
) -> tuple[dict[str, Array], Position]:
    """What the chains' positions mean to the program's author, ``{name: (N, …)}``, and
    the positions."""
    positions = sampler.positions(run, density)
    return run.spread.map(density.to_samples, positions), positions


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compiler reports of a whole run, start and every level, as one program;
    sizes and costs are a chip's."""

    arguments: int  # bytes of memory, as the next two
    outputs: int
    temporaries: int
    # the compiler's own estimates, NaN where it gives none; the body of a loop counts
    # once
    flops: float
    bytes_accessed: float
    seconds: float
    collectives: dict[
        str, int
    ]  # how many operations of each kind the compiled program has


def compile_ahead(
    density: AnnealedDensity,
    sampler: Sampler,
    num_chains: int,
    devices: Sequence[jax.Device] | np.ndarray,
    diagnostics: bool = True,
) -> Compiled:
    """Compile a run of N chains that are spread over devices, which this machine need
    not have.

    Args:
        density, sampler, num_chains: as for `infer`; arrays of networks may be shapes
            (`jax.ShapeDtypeStruct`).
        devices: such as ``jax.experimental.topologies.get_topology_desc(…).devices``; a
            table is a mesh of two axes.
        diagnostics: whether the program also gives what a `Result` reports of each
            level: means over all chains, which take collectives even where the chains
            themselves need none.
    """
    check_capabilities(sampler, density)
    sampler = sampler.prepare(density)
    first, mesh = sampler.first_level(density), chain_mesh(devices)
    spread = Spread.checked(mesh, None, num_chains)
    here = dataclasses.replace(spread, mesh=None)  # where the devices are not
    run = placed(
        begin(jax.random.key(0), num_chains, sampler.visits(density, None)), here
    )
    records = run.records if diagnostics else NoRecords.empty(density.num_levels)
    run = dataclasses.replace(run, records=records, spread=spread)
    given = sampler, run, in_parts(density, spread, sampler)

    def descent(sampler: Sampler, run: Run, density: AnnealedDensity) -> PyTree[Array]:
        run = sampler.advance(sampler.start(run, density, first), density, first + 1)
        return (
            sampler.positions(run, density),
            run.log_weights,
            (run.log_evidence, run.records),
        )

    def struct(place: PartitionSpec, part: PyTree[Any]) -> PyTree[jax.ShapeDtypeStruct]:
        sharding = NamedSharding(mesh, place)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=sharding
            ),
            part,
        )

    arrays, static = eqx.partition(given, is_array)
    structs = jax.tree.map(struct, tuple(map(places, given)), arrays)
    program = on_devices(descent, out=(chains, chains, everywhere))
    compiled: Any = (
        jax.jit(lambda arrays: program(*eqx.combine(arrays, static)))
        .lower(structs)
        .compile()
    )
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    sizes = (
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.temp_size_in_bytes,
    )
    flops, accessed, seconds = (
        cost.get(name, math.nan)
        for name in ("flops", "bytes accessed", "optimal_seconds")
    )
    seconds = seconds if seconds > 0 else math.nan  # of large programs it is below 0
    return Compiled(*sizes, flops, accessed, seconds, collectives(compiled.as_text()))


def collectives(text: str) -> dict[str, int]:
    """The collective operations in the text of a compiled program, by kind; an
    asynchronous one counts where it starts."""
    kinds = (
        "all-reduce",
        "all-gather",
        "reduce-scatter",
        "all-to-all",
        "collective-permute",
    )
    found = re.findall(rf"\s({'|'.join(kinds)})(?:-start)?\(", text)
    return dict(sorted(Counter(found).items()))
