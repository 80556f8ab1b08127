"""The draws of a run, in memory or on disk, and the checkpoints from which it goes
on."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import PyTree
from numpyro.distributions import Distribution

from composeprob import tuning
from composeprob.arguments import check_count, check_path
from composeprob.checkpoint import DIGEST, CheckpointFolder, first_line
from composeprob.errors import InvalidValueError, LoadError, WrongTypeError
from composeprob.results.checks.not_saved import NotSaved
from composeprob.results.result import Result
from composeprob.results.store import Store
from composeprob.samplers.run import Run
from composeprob.samplers.spread import (
    Spread,
    barrier,
    from_first_process,
    gathered_rows,
    host,
    zeros_of,
)

if TYPE_CHECKING:
    from composeprob.runtime.stages import State


@dataclass(frozen=True)
class Draws:
    r"""`Draws` states the number of draws of every chain that a run keeps at level 0,
    their distance, and their place.

    After the last level the sampler's kernel $P$, which leaves $\pi_0$ invariant, goes
    on there. Draw i of a chain is

    $$x^{(i)} \sim P^{\text{thin}}(x^{(i-1)}, \cdot), \qquad
    x^{(0)} \text{ where the levels left it.}$$

    `Adaptive` step sizes adapt in 50 transitions before the first draw, and are fixed
    then. All draws have equal weight: `SMC` resamples at level 0, and the kernel keeps
    weights equal. A call for more draws than a finished run has continues it from its
    checkpoint.

    Args:
        number: of each chain; samples then have shape ``(N, number, …)``. None for the
            chains' last positions only.
        thin: transitions between two draws.
        store: a folder for the samples, written block by block in zarr format (version
            3) as the run goes on, so that memory does not grow with their number; an
            earlier result there is replaced. ``result.samples`` are then read from it
            when they are indexed, and `Result.load` opens it. Each of several processes
            writes its own chains. Left out, samples are in memory.

    Raises:
        InvalidValueError: numbers below 1, more than 2³¹ − 1 transitions, or ``thin``
            without draws.
        WrongTypeError: numbers that are not whole, or a ``store`` that is not a path.

    Example:
        >>> import composeprob as cp
        >>> cp.Draws(1000, thin=5)
        Draws(number=1000, thin=5, store=None)
    """

    number: int | None
    thin: int = 1
    store: str | Path | None = None

    def __post_init__(self) -> None:
        thin = check_count(self.thin, "thin")
        most = 2**31 - 1  # transitions are counted in 32 bits
        if self.store is not None:
            check_path(self.store, "store", "draws.zarr")
        if self.number is None and thin != 1:
            raise InvalidValueError(
                f"thin={thin} was given, but no draws to thin.", fix="pass draws= too."
            )
        if self.number is not None and check_count(self.number, "draws") * thin > most:
            text = (
                f"{self.number} draws of {thin} transitions each are more than {most}."
            )
            raise InvalidValueError(text, fix="ask for fewer.")


@dataclass(frozen=True)
class Checkpoint:
    """`Checkpoint` states the folder of a run's checkpoints, and whether it must
    continue from one.

    They are written between levels and draws beside the run, at most every 10 seconds,
    and at its end. A call that finds one of the same program, sampler, key and number
    of chains continues from it, and gives the samples, bit for bit, of an uninterrupted
    run on the same machine. A write that fails stops nothing; the status reports it.

    Args:
        folder: made where it is missing.
        resume: True refuses to start where there is no checkpoint, False starts again
            in any case; left out, the run continues where there is one.

    Raises:
        WrongTypeError: a folder that is not a path, or another ``resume``.

    Example:
        >>> import composeprob as cp
        >>> cp.Checkpoint("checkpoints", resume=True)
        Checkpoint(folder='checkpoints', resume=True)
    """

    folder: str | Path
    resume: bool | None = None

    def __post_init__(self) -> None:
        check_path(self.folder, "checkpoint_dir", "checkpoints")
        if self.resume is not None and not isinstance(self.resume, (bool, np.bool_)):
            raise WrongTypeError(
                f"resume must be True, False or None; got {self.resume!r}.",
                fix="leave it out to continue where there is a checkpoint.",
            )


class Writer:
    """Takes this process's rows of every site, block by block into a store, or all of
    them into memory.

    Of the draws that were taken (`drawn`) some are in the store (`flushed`); at most
    `at_once` may come out of one call of compiled code. `failure` is the reason why
    samples could not be written. ``shapes`` are the shapes and dtypes of a run that has
    started; None without draws or a store.
    """

    def __init__(self, state: State, shapes: Run | None):
        self.spread = state.spread
        self.number = state.num_chains
        self.draws = state.draws.number
        self.total = state.draws.number or 0
        self.run_id = ""
        self.drawn = 0
        if state.checkpoints is not None:
            self.run_id = state.checkpoints.run_id
            self.drawn = state.checkpoints.drawn
        self.flushed = self.drawn
        self.failure: str | None = None
        self.in_users_store = state.draws.store is not None
        self.store = _store_of(state)
        self.buffers: dict[tuple[str, int], np.ndarray] = {}
        # Without draws or a store only the last positions are kept, in memory.
        if shapes is not None and (self.draws or self.store):
            self._plan(state, shapes)

    def _plan(self, state: State, shapes: Run) -> None:
        """Choose the sizes of blocks, and open the store."""

        def read(run: Run) -> dict[str, Array]:
            positions = state.sampler.positions(run, state.density)
            return jax.vmap(state.density.to_samples)(positions)

        sites: dict[str, jax.ShapeDtypeStruct] = eqx.filter_eval_shape(read, shapes)
        self.names = list(sites)
        rows = self.number + self.spread.copies
        bytes_a_row = sum(
            site.size // self.number * site.dtype.itemsize for site in sites.values()
        )
        bytes_a_draw = max(rows * bytes_a_row, 1)
        room = tuning.ROOM
        block = max(1, room.block_bytes * jax.process_count() // bytes_a_draw)
        on_devices = room.draws_bytes * self.spread.devices // bytes_a_draw
        self.at_once = max(1, min(block, on_devices))
        # A block on disk is one file of each device; in memory there is only one block.
        self.block = block if self.store is not None else max(self.total, 1)
        if self.store is not None:
            self._open(self.store, sites, rows // self.spread.devices)

    def _open(
        self, store: Store, sites: dict[str, jax.ShapeDtypeStruct], rows: int
    ) -> None:
        """Create the store, or open that of a checkpoint, with blocks of ``rows``
        chains."""
        first = jax.process_index() == 0
        if first and not self.drawn:
            self._create(store, sites, rows)
        elif first and not self._is_of_this_run(store):
            raise LoadError(
                f"The checkpoint says that {self.drawn} draws are in {store.path}, but "
                "they are not there.",
                fix="pass the store that the run began with, or start again: "
                "cp.Checkpoint(folder, resume=False).",
            )
        # Other processes open the arrays once the first has made them.
        barrier("store")
        store.open(self.names)
        self._check_layout(store, rows)
        if first and self.draws is not None:
            store.grow(self.draws)
        barrier("room")
        store.open(self.names)

    def _create(
        self, store: Store, sites: dict[str, jax.ShapeDtypeStruct], rows: int
    ) -> None:
        """Create the store's arrays, empty."""
        has_draws = self.draws is not None
        draws = [self.draws] if self.draws is not None else []
        # A file has the size of a whole block, however few draws are in it.
        block = [min(self.block, *draws)] if has_draws else []
        layout = {}
        for name, site in sites.items():
            event = site.shape[1:]
            shape = (self.number, *draws, *event)
            layout[name] = (shape, np.dtype(site.dtype), (rows, *block, *event))
        store.create(layout, has_draws)
        store.write_attributes({"run": self.run_id})

    def _is_of_this_run(self, store: Store) -> bool:
        """Return whether the store has the draws that the checkpoint counts."""
        return store.is_store() and store.attributes().get("run") == self.run_id

    def _check_layout(self, store: Store, rows: int) -> None:
        """Refuse blocks in which the chains of two processes lie."""
        if jax.process_count() == 1:
            return
        for array in store.arrays.values():
            shape = array.chunk_layout.write_chunk.shape
            if shape is None or shape[0] is None or rows % shape[0] == 0:
                continue
            raise InvalidValueError(
                f"The draws in {store.path} are stored in blocks of {shape[0]} chains, "
                f"and each device here has {rows}: two processes would write to one "
                "file.",
                fix="go on with as many devices as the run began with, or in one "
                "process.",
            )

    @property
    def boundary(self) -> int:
        """The draw before which the next block ends."""
        return min((self.flushed // self.block + 1) * self.block, self.total)

    def add(self, end: int, values: dict[str, Array]) -> None:
        """Take the draws from `drawn` to ``end``, `boundary` at most, out of arrays
        that have room for more. They count once `drawn` is set to ``end``."""
        start = self.drawn - self.flushed
        new = end - self.drawn
        for place, rows in _rows(values).items():
            if place not in self.buffers:
                room = (rows.shape[0], min(self.block, self.total), *rows.shape[2:])
                self.buffers[place] = np.empty(room, rows.dtype)
            self.buffers[place][:, start : start + new] = rows[:, :new]

    def flush(self) -> None:
        """Write the draws that were taken, and wait for it; where the file system
        refuses, they are not counted."""
        if self.store is None or self.drawn <= self.flushed:
            return
        number = self.drawn - self.flushed
        block = {place: rows[:, :number] for place, rows in self.buffers.items()}
        if self._write(self.store, block, slice(self.flushed, self.drawn)):
            self.flushed = self.drawn
        else:
            # The result then has the draws that are on disk, and no others.
            self.drawn = self.flushed

    def _write(
        self, store: Store, blocks: Mapping[tuple[str, int], np.ndarray], *draws: slice
    ) -> bool:
        """Write rows of chains, and none of copies of them; return whether nothing has
        failed so far."""
        try:
            futures = []
            for (name, first), rows in blocks.items():
                if first >= self.number:
                    continue
                kept = rows[: self.number - first]
                place = (slice(first, first + len(kept)), *draws)
                futures.append(store.put(name, place, kept))
            # All sites are written at the same time.
            for writing in futures:
                writing.result()
        except (ValueError, OSError, RuntimeError) as error:
            self.failure = first_line(error)
        return self.failure is None

    def samples(self, last: dict[str, Array]) -> dict[str, Any]:
        """Return ``{name: (N, draws, …)}``, or without draws the ``last`` positions,
        (N, …); the user's store keeps its samples on disk."""
        shown = min(self.drawn, self.total)  # a checkpoint may have more
        if self.store is not None and self._is_stored(self.store, shown, last):
            return self._stored(self.store, shown)
        if shown:
            return self._buffered(shown)
        positions = self.spread.cut(host(last))
        if self.draws is None:
            return positions
        # No draw was taken: the last position of each chain stands for one.
        return {name: values[:, None] for name, values in positions.items()}

    def _is_stored(self, store: Store, shown: int, last: dict[str, Array]) -> bool:
        """Return whether the store has the samples; without draws they are written
        now."""
        if shown:
            return True
        return self.draws is None and self._write(store, _rows(last))

    def _stored(self, store: Store, shown: int) -> dict[str, Any]:
        """Samples of the store; read into memory if it is that of a checkpoint."""
        barrier("draws")
        stored = {name: store.stored(name, shown or None) for name in self.names}
        if self.in_users_store:
            return stored
        return {name: np.asarray(values) for name, values in stored.items()}

    def _buffered(self, shown: int) -> dict[str, np.ndarray]:
        """Samples in memory, of all processes."""
        samples = {}
        for name in self.names:
            places = sorted(place for place in self.buffers if place[0] == name)
            parts = [self.buffers.pop(place) for place in places]
            # One part is not copied.
            rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
            samples[name] = gathered_rows(rows)[: self.number, :shown]
        return samples

    def finish(self, result: Result) -> Result:
        """Write the rest of a result into the user's store; the result returned reports
        a failure."""
        if self.store is not None and self.in_users_store and self.failure is None:
            arrays, facts = result.parts()
            try:
                if jax.process_index() == 0:
                    self.store.write_rest(arrays, {"run": self.run_id, "facts": facts})
            except (ValueError, OSError, RuntimeError) as error:
                self.failure = first_line(error)
            barrier("result")
        if self.failure is None:
            return result
        finding = NotSaved().of_store(self.failure)
        status = result.status.with_findings(finding)
        return dataclasses.replace(result, status=status)


def _store_of(state: State) -> Store | None:
    """The user's store, or that of draws beside a checkpoint, which continues from
    them; None where draws are in memory."""
    if state.draws.store is not None:
        return Store(state.draws.store)
    if state.checkpoint is not None and state.draws.number is not None:
        return Store(Path(state.checkpoint.folder) / "draws.zarr")
    return None


def _rows(values: dict[str, Array]) -> dict[tuple[str, int], np.ndarray]:
    """The rows that this process has of every site, by the index of the first."""
    rows = {}
    for name, array in values.items():
        for shard in array.addressable_shards:
            # Rows that several devices have are taken once.
            if shard.replica_id == 0:
                first = shard.index[0].start or 0
                rows[name, first] = np.asarray(shard.data)
    return rows


class RunCheckpoints:
    """The checkpoints of one run, written as it reports. Failed writes are reported,
    and never raised.

    `saved` is the run in the folder, with `drawn` draws made in so many `seconds`; None
    without a checkpoint. `stages.prepare` resumes from it. ``shapes`` are the shapes
    and dtypes of a run that has started. `failure` is the reason why the last
    checkpoint could not be written.
    """

    def __init__(self, state: State, checkpoint: Checkpoint, shapes: Run | None):
        blank = zeros_of(shapes)
        identity = fingerprint(state, blank)
        self.run_id = digest(repr(sorted(identity.items())))
        self.folder = CheckpointFolder(checkpoint.folder, identity, in_background=True)
        if checkpoint.resume is False:
            self.folder.clear()
        arrays, static = eqx.partition(
            dataclasses.replace(blank, spread=Spread()), eqx.is_array
        )
        # The template's arrays are replaced; its static part is this process's.
        restored = self.folder.restore((arrays, np.asarray(0), np.asarray(0.0)))
        if restored is None and checkpoint.resume:
            raise LoadError(
                f"There is no checkpoint in {self.folder.path} to resume from.",
                fix="check the folder; without resume=True a run starts from the "
                "noisiest level.",
            )
        self.saved: Run | None = None
        self.drawn = 0
        self.seconds = 0.0
        if restored is not None:
            arrays, drawn, seconds = restored
            self.saved = eqx.combine(arrays, static)
            self.drawn = int(drawn)
            self.seconds = float(seconds)
        self.failure: str | None = None
        self.ended = False
        self.due = time.monotonic() + tuning.CHECKPOINTS.seconds

    def __call__(self, state: State) -> None:
        """Write a checkpoint if one is due, after the draws that it counts. The writing
        itself runs beside the run."""
        if self.ended:
            return
        began = time.monotonic()
        # All processes must write, or none.
        is_due = began >= self.due and not self.folder.writing
        (is_due_everywhere,) = from_first_process(int(is_due))
        if not is_due_everywhere:
            return
        state.writer.flush()
        if state.writer.failure is not None:
            return
        failure = self._save(state)
        if failure:
            if self.failure is None:
                warnings.warn(
                    f"No checkpoint could be written: {failure}. The run goes on.",
                    stacklevel=3,
                )
            self.failure = failure
        # Handing over large runs takes time, of which they may spend a share.
        seconds, share = tuning.CHECKPOINTS
        now = time.monotonic()
        self.due = now + max(seconds, (now - began) / share)

    def finish(self, state: State) -> None:
        """Write the run as it ended, and wait for it."""
        self.ended = True
        # The first attempt may raise no more than the failure of an earlier one.
        self.failure = self._save(state, wait=True) and self._save(state, wait=True)
        try:
            self.folder.close()
        except Exception as error:
            self.failure = self.failure or first_line(error)

    def _save(self, state: State, wait: bool = False) -> str | None:
        """Write the run without copies of chains, as another spread may go on; return
        the reason of a failure."""
        try:
            arrays = eqx.filter(state.run.without_copies, eqx.is_array)
            drawn = state.writer.drawn
            step = int(state.run.visits.made) + drawn
            content = (arrays, np.asarray(drawn), np.asarray(state.seconds))
            self.folder.save(step, content)
            if wait:
                self.folder.wait()
        # Of many kinds: Orbax's, TensorStore's, the file system's.
        except Exception as error:
            return first_line(error)
        return None


def fingerprint(state: State, blank: Run) -> dict[str, str | int]:
    """Everything that determines a run's samples: in words where there are any, else as
    digests.

    A checkpoint belongs to a run if all are the same; an error names those that are
    not.
    """
    density = state.density
    key = state.key
    lines = density.described.text.splitlines()
    formula = next((line.strip() for line in lines if "∝" in line), "")
    key_data = np.asarray(jax.random.key_data(key)).tolist()
    thin: str | int = "none" if state.draws.number is None else int(state.draws.thin)
    levels = repr(density.schedule)
    if state.attempt.pace:
        levels += ", which the run chooses"
    data = {
        f"data {name!r}": digest(value) for name, value in density.observed().items()
    }
    code = "its code (a function in it, precision, or the platform)"
    return {
        "number of chains": state.num_chains,
        "number of chains evaluated at once": str(state.spread.chunk),
        "number of transitions between draws": thin,
        "random key": f"{jax.random.key_impl(key)} {key_data}",
        "sampler": state.sampler.describe(),
        "program": formula,
        "levels": levels,
        **data,
        "the numbers of the schedule": digest(density.schedule),
        "the numbers of the sampler (step sizes)": digest(state.sampler),
        "the weights or parameters of its factors": digest(density),
        "version of JAX": jax.__version__,
        code: digest(lowered(state, blank)),
    }


def lowered(state: State, blank: Run) -> str:
    """The text of one level's program before compilation, which shows what is not an
    array, such as functions."""
    arrays, static = eqx.partition((state.sampler, blank, state.density), eqx.is_array)
    # Arguments by name, as their order may be another one in every process.
    named = dict(named_leaves(arrays))

    def visit(leaves: dict[str, Array], end: Array) -> PyTree[Array]:
        ordered = [leaves[name] for name in named]
        tree = jax.tree.unflatten(jax.tree.structure(arrays), ordered)
        sampler, run, density = eqx.combine(tree, static)
        return eqx.filter(sampler.advance(run, density, end), eqx.is_array)

    text = jax.jit(visit).lower(named, np.int32(1)).as_text()
    # Callbacks are numbered anew in every process.
    return re.sub(r'backend_config = "\d+"|index = \d+', "", text)


def digest(tree: PyTree[Array] | str) -> str:
    """SHA-256 over every array of a tree, or over a text."""
    text = tree if isinstance(tree, str) else ""
    sha = hashlib.sha256(text.encode())
    leaves = named_leaves(eqx.filter(tree, eqx.is_array))
    # Sorted, as distributions list their arrays in another order in every process.
    for name, leaf in sorted(leaves, key=lambda pair: pair[0]):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        values = np.asarray(leaf)
        sha.update(f"{name} {values.dtype} {values.shape}".encode())
        sha.update(np.ascontiguousarray(values).tobytes())
    return DIGEST + sha.hexdigest()


def named_leaves(tree: PyTree[Array], above: str = "") -> list[tuple[str, Array]]:
    """The leaves in `jax.tree.leaves`' order with names.

    Leaves of a distribution are named by its fields: key paths number them, and another
    version of NumPyro has more fields.
    """
    leaves: list[tuple[str, Array]] = []
    if isinstance(tree, Distribution):
        fields = type(tree).gather_pytree_data_fields()
        children, _ = tree.tree_flatten()
        for field, child in zip(fields, children, strict=True):
            leaves += named_leaves(child, f"{above}.{field}")
        return leaves
    for path, node in jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda node: isinstance(node, Distribution)
    ):
        name = above + jax.tree_util.keystr(path)
        if isinstance(node, Distribution):
            leaves += named_leaves(node, name)
        else:
            leaves.append((name, node))
    return leaves
