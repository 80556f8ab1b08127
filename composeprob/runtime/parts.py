"""Large arrays of a density kept in parts: every device has a share of each, and the whole only while it evaluates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

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
from composeprob.samplers.sampler import Sampler
from composeprob.samplers.spread import AXES, Spread, everywhere


class Part(eqx.Module):
    """Stands for an array of which every device in a row of the mesh has a part.

    Attributes:
        array: inside of `on_devices` this device's part, outside the whole, in parts.
        axis: along which it is cut.
    """

    array: Array
    axis: int = eqx.field(static=True)

    @property
    def place(self) -> PartitionSpec:
        """Where the parts are."""
        return PartitionSpec(*[None] * self.axis, AXES[1])

    def gathered(self, after: PyTree[Array]) -> Array:
        """The array, from all of its parts: one all-gather, which does not begin before the values ``after`` are there.

        Else a loop would gather once and for all what does not change in it, and keep it.
        """
        part, _ = jax.lax.optimization_barrier((self.array, after))
        return jax.lax.all_gather(part, AXES[1], axis=self.axis, tiled=True)


def _delegated(name: str) -> Callable[..., PyTree[Array]]:
    """The method of `Evaluates` with this name, of an evaluator whose arrays are gathered for the call."""

    def method(self: InParts, value: PyTree[Array], *others: object, **named: object) -> PyTree[Array]:
        return getattr(self.gathered(value), name)(value, *others, **named)

    return method


class InParts(Evaluates):
    """An evaluator with arrays in parts, put together for each evaluation and forgotten after it.

    All devices in a row must evaluate equally often, as each gives its parts to the others.

    Attributes:
        evaluator: with a `Part` in the place of each such array.
    """

    evaluator: Evaluates

    def gathered(self, after: PyTree[Array]) -> Evaluates:
        """The evaluator itself. An array that its caller makes no use of is not gathered: the compiler drops it."""
        return jax.tree.map(
            lambda leaf: leaf.gathered(after) if _is_part(leaf) else leaf, self.evaluator, is_leaf=_is_part
        )

    @property
    def plain(self) -> bool:
        return self.evaluator.plain

    def data(self) -> dict[str, Array]:
        return self.gathered(()).data()

    def draw_static(self, key: Array, xs: dict[str, Array]) -> dict[str, Array]:
        return self.gathered(xs).draw_static(key, xs)

    def predict(self, key: Array, values: dict[str, Array]) -> dict[str, Array]:
        return self.gathered(values).predict(key, values)

    __call__ = _delegated("__call__")
    plain_potential = _delegated("plain_potential")
    leaf_scores = _delegated("leaf_scores")
    expert_values = _delegated("expert_values")
    read = _delegated("read")
    log_likelihood = _delegated("log_likelihood")


def in_parts(density: AnnealedDensity, spread: Spread, sampler: Sampler) -> AnnealedDensity:
    """The density with its evaluator's large arrays (`tuning.ROOM.parts_bytes`) in parts if a mesh has a second axis.

    Raises:
        CapabilityError: a kernel would leave devices waiting for one another.
    """
    number = 1 if spread.mesh is None else spread.mesh.shape[AXES[1]]
    if number == 1:
        return density
    shared = partitioned(density, number, tuning.ROOM.parts_bytes)
    kernels = () if sampler.moves is None else sampler.moves.kernel.kernels
    for kernel in kernels if shared is not density else ():
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
        if not is_array(leaf) or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf
        if leaf.size * leaf.dtype.itemsize <= above:
            return leaf
        even = [axis for axis, length in enumerate(leaf.shape) if length % number == 0]
        return Part(leaf, max(even, key=lambda axis: leaf.shape[axis])) if even else leaf

    marked = jax.tree.map(shard, density.evaluator, is_leaf=lambda node: isinstance(node, Distribution))
    found = any(map(_is_part, jax.tree.leaves(marked, is_leaf=_is_part)))
    return dataclasses.replace(density, evaluator=InParts(marked)) if found else density


def places(density: AnnealedDensity) -> PyTree[PartitionSpec]:
    """Where a density's arrays are, as `on_devices` wants it."""
    arrays = eqx.filter(density, is_array)
    return jax.tree.map(lambda leaf: leaf.place if _is_part(leaf) else everywhere, arrays, is_leaf=_is_part)


def placed(density: AnnealedDensity, spread: Spread) -> AnnealedDensity:
    """The density on the devices of a spread. What it holds twice (a network in a factor, and again among the arguments
    of a program that is run again) is there once."""
    if spread.mesh is None:
        return density
    known: dict[tuple[int, PartitionSpec], Array] = {}

    def put(leaf: PyTree[Array]) -> PyTree[Array]:
        array, place = (leaf.array, leaf.place) if _is_part(leaf) else (leaf, everywhere)
        if (id(array), place) not in known:
            known[id(array), place] = spread.place(array, place)
        there = known[id(array), place]
        return dataclasses.replace(leaf, array=there) if _is_part(leaf) else there

    return jax.tree.map(put, density, is_leaf=_is_part)


def _is_part(node: object) -> bool:
    return isinstance(node, Part)
