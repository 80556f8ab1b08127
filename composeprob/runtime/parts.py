"""Large arrays of a density kept in parts: every device has a share of each, and the whole only while it evaluates."""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import PyTree
from numpyro.distributions import Distribution

from composeprob.density.annealed import AnnealedDensity, Evaluates
from composeprob.density.evaluation import Evaluation, Position
from composeprob.density.experts import Noticed
from composeprob.errors import CapabilityError, InvalidValueError, WrongTypeError
from composeprob.kernels import BlackJAX
from composeprob.pytree import is_array
from composeprob.samplers.base import Sampler
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

    def whole(self, after: PyTree[Array]) -> Array:
        """The array, from all of its parts: one all-gather, which does not begin before the values ``after`` are there.

        Else a loop would gather once and for all what does not change in it, and keep it.
        """
        part, _ = jax.lax.optimization_barrier((self.array, after))
        return jax.lax.all_gather(part, AXES[1], axis=self.axis, tiled=True)


class InParts(Evaluates):
    """An evaluator with arrays in parts, put together for each evaluation and forgotten after it.

    All devices in a row must evaluate equally often, as each gives its parts to the others.

    Attributes:
        cut: the evaluator, with a `Part` in the place of each such array.
    """

    cut: Evaluates

    def whole(self, after: PyTree[Array]) -> Evaluates:
        """The evaluator itself. An array that its caller makes no use of is not gathered: the compiler drops it."""
        return jax.tree.map(lambda leaf: leaf.whole(after) if _is_part(leaf) else leaf, self.cut, is_leaf=_is_part)

    def __call__(self, position: Position, level: Array | int) -> Evaluation:
        return self.whole(position)(position, level)

    @property
    def plain(self) -> bool:
        return self.cut.plain

    def plain_potential(self, position: Position, level: Array | int) -> Array:
        return self.whole(position).plain_potential(position, level)

    def leaf_scores(self, position: Position, level: Array | int) -> tuple[dict[str, Array], ...]:
        return self.whole(position).leaf_scores(position, level)

    def noticed(self, position: Position, level: Array | int) -> tuple[Noticed, ...]:
        return self.whole(position).noticed(position, level)

    def draw_static(self, key: Array, xs: dict[str, Array]) -> dict[str, Array]:
        return self.whole(xs).draw_static(key, xs)

    def read(self, position: Position) -> dict[str, Array]:
        return self.whole(position).read(position)

    def data(self) -> dict[str, Array]:
        return self.whole(()).data()

    def predict(self, key: Array, values: dict[str, Array]) -> dict[str, Array]:
        return self.whole(values).predict(key, values)

    def log_likelihood(self, values: dict[str, Array]) -> dict[str, Array]:
        return self.whole(values).log_likelihood(values)


def in_parts(density: AnnealedDensity, spread: Spread, above: int | None) -> AnnealedDensity:
    """The density with its evaluator's arrays of more than ``above`` bytes in parts; None for all of them whole.

    Each is cut along the longest axis that can be cut evenly for the devices in a row; one without such stays whole.
    So do NumPyro's distributions, which list their arrays in another order in every process: these would wait for
    different ones.
    """
    if above is None:
        return density
    assert spread.mesh is not None
    number = spread.mesh.shape[AXES[1]]

    def cut(leaf: Any) -> Any:
        if not is_array(leaf) or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf
        if leaf.size * leaf.dtype.itemsize <= above:
            return leaf
        even = [axis for axis, length in enumerate(leaf.shape) if length % number == 0]
        return Part(leaf, max(even, key=lambda axis: leaf.shape[axis])) if even else leaf

    marked = jax.tree.map(cut, density.evaluator, is_leaf=lambda node: isinstance(node, Distribution))
    return dataclasses.replace(density, evaluator=InParts(marked))


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

    def put(leaf: Any) -> Any:
        array, place = (leaf.array, leaf.place) if _is_part(leaf) else (leaf, everywhere)
        if (id(array), place) not in known:
            known[id(array), place] = spread.place(array, place)
        there = known[id(array), place]
        return dataclasses.replace(leaf, array=there) if _is_part(leaf) else there

    return jax.tree.map(put, density, is_leaf=_is_part)


def check_parts(above: object, mesh: Mesh | None, sampler: Sampler) -> None:
    """Refuse a size that is none, a mesh that leaves open which devices share an array, and kernels that would leave
    devices waiting for one another.

    Raises:
        WrongTypeError, InvalidValueError, CapabilityError: before anything is compiled.
    """
    if above is None:
        return
    if not isinstance(above, (int, np.integer)) or isinstance(above, bool):
        raise WrongTypeError(
            f"shard_above must be a whole number of bytes; got {above!r}.", fix="pass an int, such as 2**20."
        )
    if above < 0:
        raise InvalidValueError(
            f"shard_above must be at least 0 bytes; got {above}.", fix="pass a size, such as 2**20."
        )
    if mesh is None or len(mesh.axis_names) != 2:
        found = "no mesh" if mesh is None else f"a mesh with the one axis {mesh.axis_names[0]!r}"
        raise InvalidValueError(
            f"shard_above={above} was given with {found}: it shares arrays out along the second axis of a mesh.",
            fix="pass mesh=jax.make_mesh((2, 4), ('chains', 'model')): each array is in parts on 4 devices.",
        )
    moves = sampler.moves
    for part in moves.kernel.kernels if moves is not None else ():
        if isinstance(part, BlackJAX):  # a NUTS tree ends where it ends; of other algorithms nothing is known
            raise CapabilityError(
                f"{part!r} may evaluate some chains more often than others, and devices that share networks out must "
                "evaluate equally often.",
                fix="use MALA, HMC, ULA or UHMC, or leave shard_above out.",
            )


def _is_part(node: object) -> bool:
    return isinstance(node, Part)
