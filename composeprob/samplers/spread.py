"""The spread of chains over devices and their evaluation in chunks, so that the same
numbers come out wherever they run."""

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
from jaxtyping import Int, PyTree, Shaped, UInt32
from numpy.typing import ArrayLike

from composeprob.arguments import check_count
from composeprob.errors import InvalidValueError, WrongTypeError

Tree = TypeVar("Tree")
AXES = ("chains", "model")
"""Axes of a mesh: chains are spread over all of its devices, arrays that are kept in
parts over those in a row."""
WORD = np.dtype(np.uint32)
"""Type of the words in which devices exchange chains."""


class Spread(eqx.Module):
    """The placement of N chains on D devices, equally many on each, evaluated ``chunk``
    at a time.

    Where N is not a multiple of D, or of D·chunk, the last device has copies of the
    first chains beside its own, which are moved like the others and counted nowhere.
    Computations of single chains go through `map`; those of all together through
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
    # Chains in one evaluation, None for all of a device
    chunk: int | None = eqx.field(static=True, default=None)
    # Number of chunks; known at run time only, or the compiler would undo a loop of 1
    rounds: Array | None = None
    # Number of chains beyond N
    copies: int = eqx.field(static=True, default=0)

    @classmethod
    def checked(cls, mesh: object, chunk: object, num_chains: int) -> Spread:
        """Return a checked spread of N chains; raises for a mesh of three axes or more,
        a chunk that is not a number, or more devices than chains."""
        if mesh is not None and not isinstance(mesh, Mesh):
            raise _not_a_mesh(type(mesh).__name__)
        if mesh is not None and len(mesh.axis_names) not in (1, 2):
            raise _not_a_mesh(f"one with the axes {mesh.axis_names}")
        table = None
        devices = 1
        if mesh is not None:
            table = chain_mesh(mesh.devices)
            devices = mesh.size
        size = None
        if chunk is not None:
            size = check_count(chunk, "chunk")
        if num_chains < devices:
            raise InvalidValueError(
                f"{num_chains} chains cannot be spread over {devices} devices.",
                fix=f"use {devices} chains or more, or a mesh of fewer devices.",
            )
        share = -(-num_chains // devices)
        if size is None:
            return cls(table, copies=devices * share - num_chains)
        rounds = -(-share // size)
        copies = devices * rounds * size - num_chains
        return cls(table, size, jnp.int32(rounds), copies)

    @property
    def devices(self) -> int:
        """D."""
        return 1 if self.mesh is None else self.mesh.size

    def map(self, function: Callable[..., Tree], *batch: PyTree[Array]) -> Tree:
        """Map ``function`` over this device's chains: their axis leads in each argument
        and in the result."""
        evaluate = jax.vmap(function)
        size = self.chunk
        rounds = self.rounds
        if size is None or rounds is None:
            return evaluate(*batch)

        def write(whole: Tree, chunk: Tree, i: Array) -> Tree:
            put = partial(
                jax.lax.dynamic_update_slice_in_dim, start_index=i * size, axis=0
            )
            return jax.tree.map(put, whole, chunk)

        def evaluate_chunk(
            i: Array, carry: tuple[Tree, Tree, PyTree[Array]]
        ) -> tuple[Tree, Tree, PyTree[Array]]:
            whole, last, chunk = carry
            whole = write(whole, last, i - 1)
            following = _rows(batch, (i + 1) * size, size)
            return whole, evaluate(*chunk), following

        # A chunk is taken in the round before it is evaluated, and written in the one
        # after: nothing is fused with its evaluation.
        num_chains = len(jax.tree.leaves(batch)[0])
        first = _rows(batch, 0, size)
        shapes = jax.eval_shape(lambda: evaluate(*first))
        start = zeros_of(shapes, num_chains), zeros_of(shapes), first
        whole, last, _ = jax.lax.fori_loop(0, rounds, evaluate_chunk, start)
        return write(whole, last, rounds - 1)

    def on_population(self, function: Callable[..., Tree], *values: Array) -> Tree:
        """Apply ``function`` to arrays of all chains, (N, …), which every device has;
        as in `map`, nothing is fused with it."""
        if self.rounds is None:
            return function(*values)

        def evaluate_once(
            i: Array, carry: tuple[Tree, tuple[Array, ...]]
        ) -> tuple[Tree, tuple[Array, ...]]:
            _, rows = carry
            return function(*rows), _rows(rows, i * rows[0].shape[0], rows[0].shape[0])

        blank = zeros_of(jax.eval_shape(function, *values))
        # One round, which the compiler does not know.
        once = jnp.minimum(self.rounds, 1)
        value, _ = jax.lax.fori_loop(0, once, evaluate_once, (blank, values))
        return value

    def total(self, counts: Int[Array, " chains *columns"]) -> Int[Array, " *columns"]:
        """Σ over all N chains of each chain's integers; a sum of floats would depend on
        the order."""
        assert jnp.issubdtype(counts.dtype, jnp.integer)
        if self.copies:
            is_chain = self.numbers(counts) < self.number_of(counts)
            is_chain = is_chain.reshape(-1, *[1] * (counts.ndim - 1))
            counts = jnp.where(is_chain, counts, 0)
        here = jnp.sum(counts, axis=0, dtype=jnp.int32)
        if self.devices == 1:
            return here
        return jax.lax.psum(here, AXES)

    def gather(
        self, values: Shaped[Array, " chains *columns"]
    ) -> Shaped[Array, " all_chains *columns"]:
        """Return every chain's value, on every device."""
        if self.devices > 1:
            values = jax.lax.all_gather(values, AXES, tiled=True)
        return self.cut(values)

    def number_of(self, values: Shaped[Array, "chains ..."]) -> int:
        """N, given an array with a row for each of this device's chains."""
        return len(values) * self.devices - self.copies

    def numbers(self, values: Shaped[Array, "chains ..."]) -> Int[Array, " chains"]:
        """Number of each of this device's chains, given an array with a row for each;
        copies have one too."""
        device = jnp.int32(0)
        if self.devices > 1:
            device = jax.lax.axis_index(AXES)
        return device * len(values) + jnp.arange(len(values))

    def cut(self, tree: Tree) -> Tree:
        """Return the N chains themselves, of arrays that have copies at their end."""
        if not self.copies:
            return tree
        return jax.tree.map(lambda leaf: leaf[: len(leaf) - self.copies], tree)

    def padded(self, tree: Tree) -> Tree:
        """Return arrays of N chains with copies of the first ones at their end."""
        if not self.copies:
            return tree
        num_chains = jax.tree.leaves(tree)[0].shape[0]
        return _rows(tree, 0, num_chains + self.copies)

    def exchange(self, chains: Tree, chosen: Int[Array, " all_chains"]) -> Tree:
        """Put chain ``chosen[i]`` in the place of chain i, for all N of them: one
        collective, whatever chains hold.

        Every device's chains go round all devices in D − 1 steps; each device takes the
        chains that it needs as they pass. As much is moved as by a gather, and a device
        holds a few devices' chains only.
        """
        chosen = self.padded(chosen)
        if self.devices == 1:
            return jax.tree.map(lambda leaf: leaf[chosen], chains)
        leaves, treedef = jax.tree.flatten(chains)
        # One collective for all leaves: their bits, side by side as words.
        words = [_to_words(leaf) for leaf in leaves]
        packed = jnp.concatenate(words, axis=1)
        ends = np.cumsum([w.shape[1] for w in words])[:-1]
        size = len(packed)
        numbers = self.numbers(packed)
        needed = chosen[numbers]  # the chains that take the places of this device's
        device = numbers[0] // size
        ring = [(i, (i + 1) % self.devices) for i in range(self.devices)]

        def take(k: Array | int, passing: Array, taken: Array) -> Array:
            """Take the needed chains of the device k places back."""
            passes = needed // size == (device - k) % self.devices
            return jnp.where(passes[:, None], passing[needed % size], taken)

        def pass_on(k: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            passing, taken = carry
            return jax.lax.ppermute(passing, AXES, ring), take(k, passing, taken)

        passing, taken = jax.lax.fori_loop(
            0, self.devices - 1, pass_on, (packed, packed)
        )
        taken = take(self.devices - 1, passing, taken)
        pieces = jnp.split(taken, ends, axis=1)
        exchanged = map(_from_words, pieces, leaves)
        return jax.tree.unflatten(treedef, list(exchanged))

    def place(self, tree: Tree, spec: PartitionSpec) -> Tree:
        """Spread arrays over the mesh; every process has the whole of them."""
        if self.mesh is None:
            return tree
        sharding = NamedSharding(self.mesh, spec)
        # Devices of other processes cannot be written to: each process makes its parts.

        def put(leaf: Any) -> Any:
            if not eqx.is_array(leaf):
                return leaf
            if sharding.is_fully_addressable:
                return jax.device_put(leaf, sharding)
            if _is_key(leaf):
                data = put(jax.random.key_data(leaf))
                return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
            whole = np.asarray(leaf)
            return jax.make_array_from_callback(
                whole.shape, sharding, lambda index: whole[index]
            )

        return jax.tree.map(put, tree)

    def number(self, value: float, dtype: type = np.int32) -> Array:
        """Return a number on every device, an integer unless another ``dtype`` is
        given."""
        return self.place(jnp.asarray(dtype(value)), everywhere)


def _not_a_mesh(value: str) -> WrongTypeError:
    """Return the error for a value that cannot be used as a mesh."""
    return WrongTypeError(
        f"mesh must be a jax.sharding.Mesh of one axis or two; got {value}.",
        fix="jax.sharding.Mesh(jax.devices(), ('chains',)); two axes are for networks "
        "kept in shards, jax.sharding.Mesh(np.reshape(jax.devices(), (2, 4)), "
        "('chains', 'model')).",
    )


everywhere = PartitionSpec()
"""Placement of the whole on every device."""
chains = PartitionSpec(AXES)
"""Placement of a share of the chains on each device."""


def every_device(num_chains: int, chunk: object) -> Mesh | None:
    """Return the mesh of all devices, but of no more than there are chains, or chunks
    of chains, to evaluate; None for one device. Of several processes all devices work,
    whatever N is."""
    chosen = getattr(jax.config, "jax_default_device", None)
    devices = [chosen]
    if chosen is None:
        devices = jax.devices()
    if jax.process_count() > 1:
        return chain_mesh(devices)
    # A chunk that is not a number is refused later, by `Spread.checked`.
    unit = chunk if isinstance(chunk, int) and chunk > 0 else 1
    number = min(len(devices), -(-num_chains // unit))
    if number == 1:
        return None
    return chain_mesh(devices[:number])


def chain_mesh(devices: Sequence[jax.Device] | np.ndarray) -> Mesh:
    """Return the samplers' mesh over devices: a row of them, each then a row by itself,
    or a table."""
    table = np.asarray(devices)
    return Mesh(table.reshape(len(table), -1), AXES, axis_types=(AxisType.Auto,) * 2)


def host(tree: PyTree[Array]) -> PyTree[np.ndarray]:
    """Return arrays as NumPy's, whole in every process."""

    def fetched(leaf: Array) -> np.ndarray:
        if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return np.asarray(gathered_rows(leaf))
        return np.asarray(leaf)

    return jax.tree.map(fetched, tree)


def gathered_rows(rows: ArrayLike) -> np.ndarray:
    """Return the rows of all processes, in their order, in each of them."""
    if jax.process_count() > 1:
        rows = multihost_utils.process_allgather(rows, tiled=True)
    return np.asarray(rows)


def from_first_process(*numbers: int) -> tuple[int, ...]:
    """Return the first process's numbers, in every process: decisions by a clock must
    be the same in all."""
    if jax.process_count() == 1:
        return numbers
    broadcast = multihost_utils.broadcast_one_to_all(np.asarray(numbers))
    return tuple(int(n) for n in broadcast)


def barrier(name: str) -> None:
    """Wait until every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _is_key(leaf: Array | jax.ShapeDtypeStruct) -> bool:
    """Return whether an array, or the shape of one, is of random keys."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _rows(tree: Tree, start: Array | int, size: int) -> Tree:
    """Rows start … start + size − 1, cyclic."""

    def of_leaf(leaf: Array) -> Array:
        # By index, as a slice of everything would be simplified away.
        return leaf[(start + jnp.arange(size)) % leaf.shape[0]]

    return jax.tree.map(of_leaf, tree)


def zeros_of(shapes: PyTree[Any], rows: int | None = None) -> PyTree[Any]:
    """Zeros of these shapes, with a leading axis of length ``rows`` if that is given;
    for shapes of keys, keys."""

    def zeros(leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        shape = leaf.shape
        if rows is not None:
            shape = (rows, *leaf.shape[1:])
        if not _is_key(leaf):
            return jnp.zeros(shape, leaf.dtype)
        return jax.random.split(jax.random.key(0, impl=leaf.dtype._impl.name), shape)

    return jax.tree.map(zeros, shapes)


def _wide(dtype: jnp.dtype) -> jnp.dtype:
    """Return the dtype of at least 32 bits that holds such numbers exactly."""
    if dtype.itemsize >= WORD.itemsize:
        return dtype
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.dtype(jnp.float32)
    return jnp.dtype(jnp.int32)


def _to_words(leaf: Array) -> UInt32[Array, "chains words"]:
    """Return an array of chains as words of 32 bits."""
    data = jax.random.key_data(leaf) if _is_key(leaf) else leaf
    flat = data.reshape(len(data), -1).astype(_wide(data.dtype))
    return jax.lax.bitcast_convert_type(flat, WORD).reshape(len(data), -1)


def _from_words(words: UInt32[Array, "chains words"], like: Array) -> Array:
    """Invert `_to_words`: return the array of these words, in the shape and dtype of
    ``like``."""
    is_key = _is_key(like)
    shape = jax.eval_shape(jax.random.key_data, like) if is_key else like
    wide = _wide(shape.dtype)
    words_each = wide.itemsize // WORD.itemsize
    groups = words.reshape(len(words), -1, words_each)
    # A bitcast to a number of 64 bits takes an axis of two words, one to 32 bits none.
    if groups.shape[-1] == 1:
        groups = groups[..., 0]
    flat = jax.lax.bitcast_convert_type(groups, wide)
    values = flat.astype(shape.dtype).reshape(shape.shape)
    if is_key:
        return jax.random.wrap_key_data(values, impl=jax.random.key_impl(like))
    return values
