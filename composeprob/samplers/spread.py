"""How chains are spread over devices and evaluated in chunks, so that the same numbers
come out wherever they run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree
from numpy.typing import ArrayLike

from composeprob.arguments import check_count
from composeprob.errors import InvalidValueError, WrongTypeError

Tree = TypeVar("Tree")
AXES = ("chains", "model")
"""Of a mesh: chains are spread over all of its devices, arrays that are kept in parts
over those in a row."""
WORD = np.dtype(np.uint32)
"""What chains travel as when devices exchange them."""


class Spread(eqx.Module):
    """N chains on D devices, equally many on each, evaluated ``chunk`` at a time.

    Where N is no multiple of D, or of D·chunk, the last device has copies of the first
    chains beside its own, which are moved like the others and counted nowhere. What is
    computed of single chains goes through `map`; whatever they have in common through
    `total`, `gather` and `exchange`, the only collectives of a run.

    The rounding of a batch depends on its size (a matrix product is blocked by it) and
    on what the compiler fuses it with. With a ``chunk`` every batch has the same size,
    and a loop around it through which nothing is fused with it: from two devices on
    their number changes no bit; on one the compiler simplifies otherwise
    (`executable`).
    """

    # Of two axes, `AXES`, the second of length 1 unless the user's mesh has two; None
    # for one device.
    mesh: Mesh | None = eqx.field(static=True, default=None)
    chunk: int | None = eqx.field(
        static=True, default=None
    )  # chains in one evaluation, None for all of a device
    rounds: Array | None = (
        # of chunks; known at run time only, or the compiler would undo a loop of 1
        None
    )
    copies: int = eqx.field(
        static=True, default=0
    )  # how many chains more than N there are

    @classmethod
    def checked(cls, mesh: object, chunk: object, num_chains: int) -> Spread:
        """A checked spread of N chains; raises for a mesh of three axes or more, a
        chunk that is no number, or more devices than chains."""
        if mesh is not None and (
            not isinstance(mesh, Mesh) or len(mesh.axis_names) not in (1, 2)
        ):
            found = (
                f"one with the axes {mesh.axis_names}"
                if isinstance(mesh, Mesh)
                else type(mesh).__name__
            )
            raise WrongTypeError(
                f"mesh must be a jax.sharding.Mesh of one axis or two; got {found}.",
                fix="jax.sharding.Mesh(jax.devices(), ('chains',)); two axes are for networks kept in parts, "
                "jax.sharding.Mesh(np.reshape(jax.devices(), (2, 4)), ('chains', 'model')).",
            )
        size = None if chunk is None else check_count(chunk, "chunk")
        devices = 1 if mesh is None else mesh.size
        if num_chains < devices:
            raise InvalidValueError(
                f"{num_chains} chains cannot be spread over {devices} devices.",
                fix=f"use {devices} chains or more, or a mesh of fewer devices.",
            )
        share, over = (
            -(-num_chains // devices),
            None if mesh is None else chain_mesh(mesh.devices),
        )
        if size is None:
            return cls(over, copies=devices * share - num_chains)
        rounds = -(-share // size)
        return cls(over, size, jnp.int32(rounds), devices * rounds * size - num_chains)

    @property
    def devices(self) -> int:
        """D."""
        return 1 if self.mesh is None else self.mesh.size

    def map(self, function: Callable[..., Tree], *batch: PyTree[Array]) -> Tree:
        """``function`` of every chain of this device: their axis leads in each argument
        and in what it returns."""
        evaluate, size, rounds = jax.vmap(function), self.chunk, self.rounds
        if size is None or rounds is None:
            return evaluate(*batch)
        here = len(jax.tree.leaves(batch)[0])

        def write(whole: Tree, some: Tree, i: Array) -> Tree:
            put = partial(
                jax.lax.dynamic_update_slice_in_dim, start_index=i * size, axis=0
            )
            return jax.tree.map(put, whole, some)

        def evaluate_chunk(
            i: Array, carry: tuple[Tree, Tree, PyTree[Array]]
        ) -> tuple[Tree, Tree, PyTree[Array]]:
            whole, last, batch_now = carry
            return (
                write(whole, last, i - 1),
                evaluate(*batch_now),
                _rows(batch, (i + 1) * size, size),
            )

        # What is evaluated comes from the round before and is written in the one after:
        # nothing is fused with it.
        first = _rows(batch, 0, size)
        shapes = jax.eval_shape(lambda: evaluate(*first))
        blank = zeros_of(shapes), zeros_of(shapes, here)
        whole, last, _ = jax.lax.fori_loop(
            0, rounds, evaluate_chunk, (blank[1], blank[0], first)
        )
        return write(whole, last, rounds - 1)

    def on_population(self, function: Callable[..., Tree], *values: Array) -> Tree:
        """``function`` of what every device has of all chains, arrays (N, …): as in
        `map`, nothing is fused with it."""
        if self.rounds is None:
            return function(*values)

        def evaluate_once(
            i: Array, carry: tuple[Tree, tuple[Array, ...]]
        ) -> tuple[Tree, tuple[Array, ...]]:
            now = carry[1]
            return function(*now), _rows(now, i * now[0].shape[0], now[0].shape[0])

        blank = zeros_of(jax.eval_shape(function, *values))
        return jax.lax.fori_loop(
            0, jnp.minimum(self.rounds, 1), evaluate_once, (blank, values)
        )[0]

    def total(self, counts: Array) -> Array:
        """Σ over all N chains of integers that each has, (n, …) → (…): floats would
        depend on the order."""
        assert jnp.issubdtype(counts.dtype, jnp.integer)
        if self.copies:
            mine = self.numbers(counts) < self.number_of(counts)
            counts = jnp.where(mine.reshape(-1, *[1] * (counts.ndim - 1)), counts, 0)
        here = jnp.sum(counts, axis=0, dtype=jnp.int32)
        return here if self.devices == 1 else jax.lax.psum(here, AXES)

    def gather(self, values: Array) -> Array:
        """Every chain's value on every device, (n, …) → (N, …)."""
        return self.cut(
            values
            if self.devices == 1
            else jax.lax.all_gather(values, AXES, tiled=True)
        )

    def number_of(self, values: Array) -> int:
        """N, given what this device has a row of for each of its chains."""
        return len(values) * self.devices - self.copies

    def numbers(self, values: Array) -> Array:
        """The number of each of this device's chains, given what it has a row of for
        each; copies have one too."""
        device = jnp.int32(0) if self.devices == 1 else jax.lax.axis_index(AXES)
        return device * len(values) + jnp.arange(len(values))

    def cut(self, tree: Tree) -> Tree:
        """The N chains themselves, of arrays that have copies at their end."""
        return (
            jax.tree.map(lambda leaf: leaf[: len(leaf) - self.copies], tree)
            if self.copies
            else tree
        )

    def padded(self, tree: Tree) -> Tree:
        """Arrays of N chains with copies of the first ones at their end."""
        return (
            _rows(tree, 0, jax.tree.leaves(tree)[0].shape[0] + self.copies)
            if self.copies
            else tree
        )

    def exchange(self, chains: Tree, chosen: Array) -> Tree:
        """Put chain ``chosen[i]`` in the place of chain i, for all N of them: one
        collective, whatever chains hold.

        Every device's chains go round all devices in D − 1 steps, each of which takes
        what it needs when they pass: as much is moved as by a gather, and a device
        holds a few devices' chains only.
        """
        chosen = self.padded(chosen)
        if self.devices == 1:
            return jax.tree.map(lambda leaf: leaf[chosen], chains)
        leaves, treedef = jax.tree.flatten(chains)
        words = [_to_words(leaf) for leaf in leaves]
        packed, ends = (
            jnp.concatenate(words, axis=1),
            np.cumsum([w.shape[1] for w in words])[:-1],
        )
        size, numbers = len(packed), self.numbers(packed)
        here, device = chosen[numbers], numbers[0] // size
        ring = [(i, (i + 1) % self.devices) for i in range(self.devices)]

        def take(k: Array | int, passing: Array, taken: Array) -> Array:
            """What is needed of the chains of the device k places back."""
            theirs = here // size == (device - k) % self.devices
            return jnp.where(theirs[:, None], passing[here % size], taken)

        def pass_on(k: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            passing, taken = carry
            return jax.lax.ppermute(passing, AXES, ring), take(k, passing, taken)

        passing, taken = jax.lax.fori_loop(
            0, self.devices - 1, pass_on, (packed, packed)
        )
        pieces = jnp.split(take(self.devices - 1, passing, taken), ends, axis=1)
        return jax.tree.unflatten(
            treedef,
            [_from_words(p, leaf) for p, leaf in zip(pieces, leaves, strict=True)],
        )

    def place(self, tree: Tree, spec: PartitionSpec) -> Tree:
        """Arrays of which every process has the whole, spread over the mesh."""
        if self.mesh is None:
            return tree
        sharding = NamedSharding(self.mesh, spec)

        def put(leaf: Any) -> Any:
            if not eqx.is_array(leaf):
                return leaf
            if sharding.is_fully_addressable:
                return jax.device_put(leaf, sharding)
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                return jax.random.wrap_key_data(
                    put(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf)
                )
            whole = np.asarray(leaf)
            return jax.make_array_from_callback(
                whole.shape, sharding, lambda index: whole[index]
            )

        return jax.tree.map(put, tree)

    def number(self, value: float, dtype: type = np.int32) -> Array:
        """A number on every device, a whole one unless it is to be another."""
        return self.place(jnp.asarray(dtype(value)), everywhere)


everywhere, chains = PartitionSpec(), PartitionSpec(AXES)
"""Placements: the whole on every device; a share of the chains on each."""


def every_device(num_chains: int, chunk: object) -> Mesh | None:
    """All devices, or as many as have a chain, or a chunk of them, to evaluate; None
    for one. Where there are several processes all of their devices work, whatever N
    is."""
    chosen = getattr(jax.config, "jax_default_device", None)
    devices = jax.devices() if chosen is None else [chosen]
    if jax.process_count() > 1:
        return chain_mesh(devices)
    unit = chunk if isinstance(chunk, int) and chunk > 0 else 1
    number = min(len(devices), -(-num_chains // unit))
    return None if number == 1 else chain_mesh(devices[:number])


def chain_mesh(devices: Sequence[jax.Device] | np.ndarray) -> Mesh:
    """A row of devices, each a row by itself, or a table of them, as the mesh that the
    samplers know."""
    table = np.asarray(devices)
    return Mesh(table.reshape(len(table), -1), AXES, axis_types=(AxisType.Auto,) * 2)


def host(tree: PyTree[Array]) -> PyTree[np.ndarray]:
    """Arrays as NumPy's, whole in every process."""

    here = lambda leaf: leaf.is_fully_addressable or leaf.is_fully_replicated  # noqa: E731
    return jax.tree.map(
        lambda leaf: np.asarray(leaf if here(leaf) else gathered_rows(leaf)), tree
    )


def gathered_rows(rows: ArrayLike) -> np.ndarray:
    """The rows of all processes, in their order, in each of them."""
    return np.asarray(
        rows
        if jax.process_count() == 1
        else multihost_utils.process_allgather(rows, tiled=True)
    )


def from_first_process(*numbers: int) -> tuple[int, ...]:
    """The first process's numbers, in every process: what depends on a clock must be
    the same in all."""
    if jax.process_count() == 1:
        return numbers
    return tuple(
        int(n) for n in multihost_utils.broadcast_one_to_all(np.asarray(numbers))
    )


def barrier(what: str) -> None:
    """Wait until every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def _rows(tree: Tree, start: Array | int, size: int) -> Tree:
    """Rows start … start + size − 1, cyclic; by index, as a slice of everything would
    be simplified away."""
    return jax.tree.map(
        lambda leaf: leaf[(start + jnp.arange(size)) % leaf.shape[0]], tree
    )


def zeros_of(shapes: PyTree[Any], rows: int | None = None) -> PyTree[Any]:
    """Zeros of these shapes, of so many rows where a number is given; keys, where they
    are of these."""

    def zeros(leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        shape = leaf.shape if rows is None else (rows, *leaf.shape[1:])
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.zeros(shape, leaf.dtype)
        return jax.random.split(jax.random.key(0, impl=leaf.dtype._impl.name), shape)

    return jax.tree.map(zeros, shapes)


def _wide(dtype: jnp.dtype) -> jnp.dtype:
    """The kind of number of 32 bits or more that holds such numbers exactly."""
    if dtype.itemsize >= WORD.itemsize:
        return dtype
    return jnp.dtype(jnp.float32 if jnp.issubdtype(dtype, jnp.floating) else jnp.int32)


def _to_words(leaf: Array) -> Array:
    """(n, …) as (n, words) of 32 bits."""
    data = (
        jax.random.key_data(leaf)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else leaf
    )
    flat = data.reshape(len(data), -1).astype(_wide(data.dtype))
    return jax.lax.bitcast_convert_type(flat, WORD).reshape(len(data), -1)


def _from_words(words: Array, like: Array) -> Array:
    """What `_to_words` made words of, in the shape and of the kind of ``like``."""
    key = jnp.issubdtype(like.dtype, jax.dtypes.prng_key)
    shape = jax.eval_shape(jax.random.key_data, like) if key else like
    pairs = words.reshape(len(words), -1, _wide(shape.dtype).itemsize // WORD.itemsize)
    flat = jax.lax.bitcast_convert_type(
        pairs if pairs.shape[-1] > 1 else pairs[..., 0], _wide(shape.dtype)
    )
    values = flat.astype(shape.dtype).reshape(shape.shape)
    return (
        jax.random.wrap_key_data(values, impl=jax.random.key_impl(like))
        if key
        else values
    )
