"""Large arrays of a density kept in parts: every device has a share of each, and the whole only while it evaluates."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from jaxtyping import PyTree
from numpyro.distributions import Distribution

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity, Evaluates
from composeprob.errors import CapabilityError
from composeprob.kernels import BlackJAX
from composeprob.pytree import is_array
from composeprob.samplers.run import Run
from composeprob.samplers.sampler import Sampler
from composeprob.samplers.spread import AXES, Spread, everywhere

Tree = TypeVar("Tree")


class Part(eqx.Module):
    """Stands for an array that is cut along an axis, of which every device in a row of the mesh has a part; inside of
    `on_devices` it holds this device's part, outside the whole, in parts."""

    array: Array
    axis: int = eqx.field(static=True)

    def gathered(self, after: PyTree[Array]) -> Array:
        """The array, from all of its parts: one all-gather, which does not begin before the values ``after`` are there.

        Else a loop would gather once and for all what does not change in it, and keep it.
        """
        part, _ = jax.lax.optimization_barrier((self.array, after))
        return jax.lax.all_gather(part, AXES[1], axis=self.axis, tiled=True)


def _is_part(node: object) -> bool:
    return isinstance(node, Part)


def _delegated(name: str) -> Any:
    """What `Evaluates` has of this name: a property, or a method of an evaluator whose arrays are gathered for the
    call."""

    def method(self: InParts, *arguments: PyTree[Array]) -> PyTree[Array]:
        after = eqx.filter(arguments, eqx.is_inexact_array)
        gathered = lambda leaf: leaf.gathered(after) if _is_part(leaf) else leaf  # noqa: E731
        # An array that the method makes no use of is not gathered: the compiler drops it.
        return getattr(jax.tree.map(gathered, self.evaluator, is_leaf=_is_part), name)(*arguments)

    known = isinstance(vars(Evaluates)[name], property)
    return property(lambda self: getattr(self.evaluator, name)) if known else method


class InParts(eqx.Module):
    """An evaluator with a `Part` in the place of each large array, put together for each evaluation and forgotten after
    it. All devices in a row must evaluate equally often, as each gives its parts to the others."""

    evaluator: Evaluates
    vars().update({name: _delegated(name) for name in vars(Evaluates) if name == "__call__" or name[0] != "_"})


def in_parts(density: AnnealedDensity, spread: Spread, sampler: Sampler) -> AnnealedDensity:
    """The density with its evaluator's large arrays (`tuning.ROOM.parts_bytes`) in parts if a mesh has a second axis;
    refuses kernels that would leave devices waiting for one another."""
    number = 1 if spread.mesh is None else spread.mesh.shape[AXES[1]]
    shared = density if number == 1 else partitioned(density, number, tuning.ROOM.parts_bytes)
    kernels = () if sampler.moves is None or shared is density else sampler.moves.kernel.kernels
    for kernel in kernels:
        if isinstance(kernel, BlackJAX):  # a NUTS tree ends where it ends; of other algorithms nothing is known
            raise CapabilityError(
                f"{kernel!r} may evaluate some chains more often than others, and devices that share networks out must "
                "evaluate equally often.",
                fix="use MALA, HMC, ULA or UHMC, or a mesh of one axis.",
            )
    return shared


def partitioned(density: AnnealedDensity, number: int, above: int) -> AnnealedDensity:
    """The density with its evaluator's arrays of more than ``above`` bytes in so many parts; itself without any.

    Each is cut along the longest axis that can be cut evenly; one without such stays whole. So do NumPyro's
    distributions, which list their arrays in another order in every process: these would wait for different ones.
    """

    def shard(leaf: PyTree[Array]) -> PyTree[Array]:
        key = is_array(leaf) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        if not is_array(leaf) or key or leaf.size * leaf.dtype.itemsize <= above:
            return leaf
        even = [axis for axis, length in enumerate(leaf.shape) if length % number == 0]
        return Part(leaf, max(even, key=lambda axis: leaf.shape[axis])) if even else leaf

    marked = jax.tree.map(shard, density.evaluator, is_leaf=lambda node: isinstance(node, Distribution))
    found = any(map(_is_part, jax.tree.leaves(marked, is_leaf=_is_part)))
    evaluator: Any = InParts(marked)  # its methods are those of `Evaluates`
    return dataclasses.replace(density, evaluator=evaluator) if found else density


def places(argument: PyTree[Any]) -> PyTree[PartitionSpec]:
    """Where the arrays of a run, a density or anything else are, as `jax.shard_map` wants it."""
    if isinstance(argument, Run):
        return Run.places()
    row = lambda leaf: PartitionSpec(*[None] * leaf.axis, AXES[1]) if _is_part(leaf) else everywhere  # noqa: E731
    return jax.tree.map(row, eqx.filter(argument, is_array), is_leaf=_is_part)


def placed(tree: Tree, spread: Spread) -> Tree:
    """A density, or what has no parts, on the devices of a spread. What it holds twice (a network in a factor, and
    again among the arguments of a program that is run again) is there once."""
    if spread.mesh is None:
        return tree
    arrays, static = eqx.partition(tree, eqx.is_array)
    known: dict[tuple[int, PartitionSpec], Array] = {}

    def put(place: PartitionSpec, array: Array) -> Array:
        if (id(array), place) not in known:
            known[id(array), place] = spread.place(array, place)
        return known[id(array), place]

    there = jax.tree.map(lambda place, part: jax.tree.map(partial(put, place), part), places(tree), arrays)
    return eqx.combine(there, static)
