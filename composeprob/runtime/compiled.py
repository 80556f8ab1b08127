"""The compiled pieces of a run: each is one executable, the same on every device, whatever the numbers in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from jaxtyping import PyTree

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Position
from composeprob.runtime.parts import places
from composeprob.samplers.closing import Closing
from composeprob.samplers.run import Run
from composeprob.samplers.sampler import Sampler
from composeprob.samplers.spread import Spread, chains, everywhere

Params = ParamSpec("Params")
Output = TypeVar("Output")


def make_room(most: int = tuning.ROOM.memory_maps) -> None:
    """Lets go of all compiled code where this process has more memory maps than ``most``: what is used again is
    compiled again."""
    maps = Path("/proc/self/maps")
    if maps.is_file() and maps.read_bytes().count(b"\n") > most:
        jax.clear_caches()


def compiler_options(spread: Spread) -> dict[str, str | bool]:
    """The options of a run's compiler.

    A program for several devices goes through XLA's partitioner, which one for a single device does not. It ends by
    merging equal expressions, and the algebraic simplifier, which comes later, does to merged expressions what it does
    not do to equal ones (a·x + a·y becomes a·(x + y), x/√v becomes x·v^−½). For chains in chunks equal expressions are
    never merged, so that most programs round on one device as on several; that costs no time that could be measured.
    The partitioner also writes out constants and scalars once for each use, which no option undoes: last bits on one
    device can still differ. From two devices on the same passes see the same code.
    """
    return {} if spread.chunk is None else {"xla_disable_hlo_passes": "cse"}


def executable(out: PyTree[PartitionSpec]) -> Callable[[Callable[Params, Output]], Callable[Params, Output]]:
    """A decorator: compiles a function for every device that a run is spread over.

    One of its arguments is the run. On each device the function sees that device's share of the run's chains, and the
    whole of everything else.

    Args:
        out: where what it returns is: `chains`, `everywhere`, or a pytree of these.
    """

    def decorate(function: Callable[Params, Output]) -> Callable[Params, Output]:
        def on_devices(*args: Params.args, **kwargs: Params.kwargs) -> Output:
            arrays, static = eqx.partition(args, eqx.is_array)
            mapped = jax.shard_map(
                lambda arrays: function(*eqx.combine(arrays, static), **kwargs),
                mesh=_run(args).spread.mesh,
                in_specs=(tuple(map(_place, args)),),
                out_specs=out,
                check_vma=False,
            )
            return mapped(arrays)

        options = compiler_options(Spread(chunk=1))
        compiled = {
            (meshed, chunked): eqx.filter_jit(body, compiler_options=options if chunked else {})  # type: ignore[call-overload]  # for jax.jit
            for meshed, body in ((False, function), (True, on_devices))
            for chunked in (False, True)
        }

        @wraps(function)
        def call(*args: Params.args, **kwargs: Params.kwargs) -> Output:
            # Inside of other compiled code the options are those of the whole, and JAX takes none here.
            traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(args))
            spread = _run(args).spread
            return compiled[spread.mesh is not None, spread.chunk is not None and not traced](*args, **kwargs)

        return call

    return decorate


def _run(arguments: tuple[object, ...]) -> Run:
    """The run among them."""
    (run,) = (argument for argument in arguments if isinstance(argument, Run))
    return run


def _place(argument: object) -> PyTree[PartitionSpec]:
    """Where an argument's arrays are, as `jax.shard_map` wants it."""
    if isinstance(argument, Run):
        return Run.places()
    return places(argument) if isinstance(argument, AnnealedDensity) else everywhere


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
    """At level 0 ``thin`` transitions of the kernel for each of the draws ``begin`` … ``end`` − 1.

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


def sample_shapes(sampler: Sampler, run: Run, density: AnnealedDensity, first: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every site's samples, all chains together; compiles nothing."""
    alone = dataclasses.replace(run, spread=Spread())
    started = alone if run.chains is not None else eqx.filter_eval_shape(start, sampler, alone, density, first)
    return eqx.filter_eval_shape(lambda run: jax.vmap(density.to_samples)(sampler.positions(run, density)), started)
