"""The compiled pieces of a run: each is one executable, the same on every device,
whatever the numbers in it.

Large arrays of a density may be sharded: every device keeps a shard of each, and
gathers the whole only while it evaluates.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from jaxtyping import PyTree
from numpyro.distributions import Distribution

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity, Evaluates
from composeprob.density.evaluation import Position
from composeprob.errors import CapabilityError
from composeprob.kernels import BlackJAX
from composeprob.pytree import is_array
from composeprob.samplers.finishers import Finisher
from composeprob.samplers.run import Run
from composeprob.samplers.sampler import Sampler
from composeprob.samplers.spread import (
    AXES,
    Spread,
    Tree,
    chains,
    everywhere,
)

Params = ParamSpec("Params")
Output = TypeVar("Output")


def make_room(most: int = tuning.ROOM.memory_maps) -> None:
    """Free all compiled code where this process has more memory maps than ``most``."""
    maps = Path("/proc/self/maps")
    if maps.is_file() and maps.read_bytes().count(b"\n") > most:
        jax.clear_caches()


class Shard(eqx.Module):
    """A large array that is cut along an axis, a part on each device in a row of the
    mesh.

    Inside of `on_devices` the field is this device's part, outside the whole array.
    """

    array: Array
    axis: int = eqx.field(static=True)

    def gathered(self, after: PyTree[Array]) -> Array:
        """The whole array: one all-gather, which does not begin before the values
        ``after`` are there.

        Without such a dependence a loop would gather once and for all an array that
        does not change in it, and keep it.
        """
        part, _ = jax.lax.optimization_barrier((self.array, after))
        return jax.lax.all_gather(part, AXES[1], axis=self.axis, tiled=True)


def _is_shard(node: object) -> bool:
    return isinstance(node, Shard)


def _gathering(name: str) -> Any:
    """A method of `Evaluates` for `Sharded`, which gathers the evaluator's arrays for
    the call; or a property, which takes none."""

    def method(self: Sharded, *arguments: PyTree[Array]) -> PyTree[Array]:
        after = eqx.filter(arguments, eqx.is_inexact_array)

        def gathered(leaf: PyTree[Array]) -> PyTree[Array]:
            return leaf.gathered(after) if _is_shard(leaf) else leaf

        # The compiler drops the gathering of arrays that the method does not use.
        whole = jax.tree.map(gathered, self.evaluator, is_leaf=_is_shard)
        return getattr(whole, name)(*arguments)

    def attribute(self: Sharded) -> object:
        return getattr(self.evaluator, name)

    if isinstance(vars(Evaluates)[name], property):
        return property(attribute)
    return method


class Sharded(eqx.Module):
    """An evaluator with a `Shard` in the place of each large array; these are gathered
    for each evaluation and freed after it.

    All devices in a row must evaluate equally often, as each gives its shards to the
    others.
    """

    evaluator: Evaluates


# The members of `Evaluates` stand in its definition alone.
for _name in vars(Evaluates):
    if _name == "__call__" or not _name.startswith("_"):
        setattr(Sharded, _name, _gathering(_name))


def in_parts(
    density: AnnealedDensity, spread: Spread, sampler: Sampler
) -> AnnealedDensity:
    """Return the density with its evaluator's large arrays (`tuning.ROOM.parts_bytes`)
    sharded if a mesh has a second axis; refuse kernels that would leave devices waiting
    for one another."""
    if spread.mesh is None or spread.mesh.shape[AXES[1]] == 1:
        return density
    number = spread.mesh.shape[AXES[1]]
    sharded = partitioned(density, number, tuning.ROOM.parts_bytes)
    if sampler.moves is None or sharded is density:
        return sharded
    for kernel in sampler.moves.kernel.kernels:
        # A NUTS tree has a random depth, and other algorithms are unknown.
        if isinstance(kernel, BlackJAX):
            raise CapabilityError(
                f"{kernel!r} may evaluate some chains more often than others, and "
                "devices that hold shards of a network must evaluate equally often.",
                fix="use MALA, HMC, ULA or UHMC, or a mesh of one axis.",
            )
    return sharded


def partitioned(density: AnnealedDensity, number: int, above: int) -> AnnealedDensity:
    """Return the density with its evaluator's arrays of more than ``above`` bytes in
    ``number`` shards each; the density itself if there are none.

    Each is cut along the longest axis that can be cut evenly; one without such an axis
    stays whole. So do NumPyro's distributions, which list their arrays in another order
    in every process: processes would wait for different ones.
    """

    def shard(leaf: PyTree[Array]) -> PyTree[Array]:
        if not is_array(leaf) or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf
        if leaf.size * leaf.dtype.itemsize <= above:
            return leaf
        even = [axis for axis, length in enumerate(leaf.shape) if length % number == 0]
        if not even:
            return leaf
        return Shard(leaf, max(even, key=lambda axis: leaf.shape[axis]))

    marked = jax.tree.map(
        shard, density.evaluator, is_leaf=lambda node: isinstance(node, Distribution)
    )
    leaves = jax.tree.leaves(marked, is_leaf=_is_shard)
    if not any(map(_is_shard, leaves)):
        return density
    evaluator: Any = Sharded(marked)  # its methods are those of `Evaluates`
    return dataclasses.replace(density, evaluator=evaluator)


def places(argument: PyTree[Any]) -> PyTree[PartitionSpec]:
    """The placement of the arrays of a run, a density or anything else on the mesh, for
    `jax.shard_map`."""
    if isinstance(argument, Run):
        return Run.places()

    def place(leaf: PyTree[Array]) -> PartitionSpec:
        if _is_shard(leaf):
            return PartitionSpec(*[None] * leaf.axis, AXES[1])
        return everywhere

    return jax.tree.map(place, eqx.filter(argument, is_array), is_leaf=_is_shard)


def on_mesh(tree: Tree, spread: Spread) -> Tree:
    """Put a density, or a tree without shards, on the devices of a spread.

    An array that it holds twice (a network in a factor, and again among the arguments
    of a program that is run again) is there once.
    """
    if spread.mesh is None:
        return tree
    arrays, static = eqx.partition(tree, eqx.is_array)
    placed: dict[tuple[int, PartitionSpec], Array] = {}

    def put(place: PartitionSpec, array: Array) -> Array:
        if (id(array), place) not in placed:
            placed[id(array), place] = spread.place(array, place)
        return placed[id(array), place]

    def put_all(place: PartitionSpec, part: PyTree[Array]) -> PyTree[Array]:
        return jax.tree.map(partial(put, place), part)

    there = jax.tree.map(put_all, places(tree), arrays)
    return eqx.combine(there, static)


def on_devices(
    function: Callable[Params, Output], out: PyTree[PartitionSpec]
) -> Callable[Params, Output]:
    """Map a function, whose second argument is a run, over the devices that this is
    spread over.

    On each device it sees that device's share of the run's chains, and the whole of
    everything else. The placement of its output is ``out``.
    """

    @functools.wraps(function)
    def mapped(*args: Params.args, **kwargs: Params.kwargs) -> Output:
        arrays, static = eqx.partition(args, eqx.is_array)

        def on_one(arrays: PyTree[Array]) -> Output:
            return function(*eqx.combine(arrays, static), **kwargs)

        mesh = args[1].spread.mesh  # type: ignore[attr-defined]
        where = tuple(map(places, args))
        on_all = jax.shard_map(
            on_one, mesh=mesh, in_specs=(where,), out_specs=out, check_vma=False
        )
        return on_all(arrays)

    return mapped


def executable(
    out: PyTree[PartitionSpec],
) -> Callable[[Callable[Params, Output]], Callable[Params, Output]]:
    """Make a decorator that compiles a function of a run for the devices that this is
    spread over; see `on_devices`.

    With chains in chunks most programs round on one device as on several: XLA's
    partitioner, which only programs for several devices go through, ends by merging
    equal expressions, and the simplifier after it rewrites merged expressions (a·x +
    a·y becomes a·(x + y)), but not equal ones. So they are never merged with chunks,
    which costs no time. Constants, which the partitioner writes out once for each use,
    can still make last bits on one device differ.
    """

    def decorate(function: Callable[Params, Output]) -> Callable[Params, Output]:
        @functools.cache
        def compiled(meshed: bool, chunked: bool) -> Callable[Params, Output]:
            options = {"xla_disable_hlo_passes": "cse"} if chunked else {}
            body = on_devices(function, out) if meshed else function
            # Options are passed on to `jax.jit`.
            return eqx.filter_jit(body, compiler_options=options)  # type: ignore[call-overload]

        @functools.wraps(function)
        def call(*args: Params.args, **kwargs: Params.kwargs) -> Output:
            spread: Spread = args[1].spread  # type: ignore[attr-defined]
            executable = compiled(spread.mesh is not None, spread.chunk is not None)
            return executable(*args, **kwargs)

        return call

    return decorate


@executable(out=Run.places())
def start(sampler: Sampler, run: Run, density: AnnealedDensity, first: int) -> Run:
    """Return the run with chains at the first level."""
    return sampler.start(run, density, first)


@executable(out=Run.places())
def advance(
    sampler: Sampler,
    run: Run,
    density: AnnealedDensity,
    end: Array,
    stay: Array,
) -> Run:
    """Return the run after the visits up to number ``end``, and ``stay`` transitions at
    level 0; both are arrays so that every stretch is one executable."""
    return sampler.advance(run, density, end, stay)


@executable(out=everywhere)
def measure(
    closing: Finisher, run: Run, density: AnnealedDensity, trials: PyTree[Array]
) -> Array:
    """Return what a finisher measures on the chains before it is fitted."""
    return closing.measure(run, density, trials)


@executable(out=Run.places())
def close(
    closing: Finisher,
    run: Run,
    density: AnnealedDensity,
    fitted: PyTree[Array],
    number: Array,
) -> Run:
    """Return the run after a round of a finisher at level 0."""
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
    """Take the draws ``begin`` … ``end`` − 1 at level 0, each after ``thin``
    transitions of the kernel, which leave π_0 invariant.

    Draws are ``{name: (N, most, …)}``, of which the first ``end`` − ``begin`` count.
    """

    def values(run: Run) -> dict[str, Array]:
        return run.spread.map(density.to_samples, sampler.positions(run, density))

    def take(
        i: Array, carry: tuple[Run, dict[str, Array]]
    ) -> tuple[Run, dict[str, Array]]:
        run, drawn = carry
        run = sampler.draw(run, density, i, thin)
        drawn = jax.tree.map(
            lambda draws, new: draws.at[:, i - begin].set(new), drawn, values(run)
        )
        return run, drawn

    shapes = jax.eval_shape(values, run)
    blank = {
        name: jnp.zeros((site.shape[0], most, *site.shape[1:]), site.dtype)
        for name, site in shapes.items()
    }
    return jax.lax.fori_loop(begin, end, take, (run, blank))


@executable(out=(chains, chains))
def read(
    sampler: Sampler, run: Run, density: AnnealedDensity
) -> tuple[dict[str, Array], Position]:
    """Return the values of the program's sites, ``{name: (N, …)}``, and the chains'
    positions."""
    positions = sampler.positions(run, density)
    return run.spread.map(density.to_samples, positions), positions
