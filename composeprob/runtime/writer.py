"""What a run keeps: its draws, in memory or on disk, and checkpoints from which it goes
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
from composeprob.results.result import Result
from composeprob.results.status import Code
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
    r"""`Draws` says how many draws of every chain a run keeps at level 0, how far
    apart, and where.

    After the last level the sampler's kernel $P$, which leaves $\pi_0$ invariant, goes
    on there. Draw i of a chain is

    $$x^{(i)} \sim P^{\text{thin}}(x^{(i-1)}, \cdot), \qquad x^{(0)} \text{ where the levels left it.}$$

    `Adaptive` step sizes adapt in 50 transitions before the first draw, and are fixed
    then. All draws weigh the same: `SMC` resamples at level 0, and the kernel keeps
    equal weights. A call that wants more of them than a finished run has continues it
    from its checkpoint.

    Args:
        number: of each chain; samples then have shape ``(N, number, …)``. None for the
            chains' last positions only.
        thin: transitions between two draws.
        store: a folder for the samples, written block by block in zarr format (version
            3) as the run goes on, so that memory does not grow with their number; an
            earlier result there is replaced. ``result.samples`` are then read from it
            where they are indexed, and `Result.load` opens it. Of several processes
            each writes its own chains. Left out, samples are in memory.

    Raises:
        InvalidValueError: numbers below 1, more than 2³¹ − 1 transitions, or ``thin``
            without draws.
        WrongTypeError: numbers that are not whole, or a ``store`` that is no path.

    Example:
        >>> import composeprob as cp
        >>> cp.Draws(1000, thin=5)
        Draws(number=1000, thin=5, store=None)
    """

    number: int | None
    thin: int = 1
    store: str | Path | None = None

    def __post_init__(self) -> None:
        thin, most = (
            check_count(self.thin, "thin"),
            2**31 - 1,
        )  # transitions are counted in 32 bits
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
    """`Checkpoint` says where a run keeps its checkpoints, and whether it must continue
    from one.

    They are written between levels and draws beside the run, at most every 10 seconds,
    and at its end. A call that finds one of the same program, sampler, key and number
    of chains continues from it, and gives the samples, bit for bit, that an
    uninterrupted run gives on the same machine. A write that fails stops nothing; the
    status reports it.

    Args:
        folder: made where it is missing.
        resume: True refuses to start where there is no checkpoint, False starts again
            whatever there is; left out, the run continues where there is one.

    Raises:
        WrongTypeError: a folder that is no path, or another ``resume``.

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

    Of draws that were taken (`drawn`) some are in the store (`flushed`); at most
    `at_once` may come out of one call of compiled code. `failure` says why samples
    could not be written. Runs look as ``started`` does, of shapes and dtypes; None
    without draws or a store.
    """

    def __init__(self, state: State, started: Run | None):
        density, spread, path, checkpoints = (
            state.density,
            state.spread,
            state.draws.store,
            state.checkpoints,
        )
        self.run_id, self.drawn = (
            ("", 0) if checkpoints is None else (checkpoints.run_id, checkpoints.drawn)
        )
        self.flushed, self.number, self.spread = self.drawn, state.num_chains, spread
        self.draws, self.total = state.draws.number, state.draws.number or 0
        self.failure: str | None = None
        self.kept = path is not None  # in the user's store
        if path is None and state.checkpoint is not None and self.draws is not None:
            path = (
                Path(state.checkpoint.folder) / "draws.zarr"
            )  # what a checkpoint continues from is on disk too
        self.store = None if path is None else Store(path)
        self.buffers: dict[tuple[str, int], np.ndarray] = {}
        if started is None or not (
            self.draws or self.store
        ):  # only the last positions, in memory
            return
        read = lambda run: jax.vmap(density.to_samples)(
            state.sampler.positions(run, density)
        )  # noqa: E731
        shapes: dict[str, jax.ShapeDtypeStruct] = eqx.filter_eval_shape(read, started)
        self.names, rows = list(shapes), self.number + spread.copies
        bytes_a_draw = max(
            rows
            * sum(s.size // self.number * s.dtype.itemsize for s in shapes.values()),
            1,
        )
        block = max(1, tuning.ROOM.block_bytes * jax.process_count() // bytes_a_draw)
        self.at_once = max(
            1, min(block, tuning.ROOM.draws_bytes * spread.devices // bytes_a_draw)
        )
        self.block = (
            block if self.store is not None else max(self.total, 1)
        )  # in memory there is only one
        if self.store is not None:
            self._open(self.store, shapes, rows // spread.devices)

    def _open(
        self, store: Store, shapes: dict[str, jax.ShapeDtypeStruct], rows: int
    ) -> None:
        first = jax.process_index() == 0
        if first and not self.drawn:
            draws, block = (
                ([], []) if self.draws is None else ([self.draws], [self.block])
            )
            laid_out = {
                name: (
                    (self.number, *draws, *s.shape[1:]),
                    np.dtype(s.dtype),
                    (rows, *block, *s.shape[1:]),
                )
                for name, s in shapes.items()
            }
            store.create(laid_out, self.draws is not None)
            store.write_attributes({"run": self.run_id})
        elif first and (
            not store.is_store() or store.attributes().get("run") != self.run_id
        ):
            raise LoadError(
                f"The checkpoint says that {self.drawn} draws are in {store.path}, but they are not there.",
                fix="pass the store that the run began with, or start again: cp.Checkpoint(folder, resume=False).",
            )
        barrier("store")
        store.open(self.names)
        layouts = (
            array.chunk_layout.write_chunk.shape for array in store.arrays.values()
        )
        uneven = [
            shape[0]
            for shape in layouts
            if shape is not None and shape[0] is not None and rows % shape[0]
        ]
        if jax.process_count() > 1 and uneven:
            raise InvalidValueError(
                f"The draws in {store.path} are laid out in {uneven[0]} chains each, and here each device has "
                f"{rows}: two processes would write to one file.",
                fix="go on with as many devices as the run began with, or in one process.",
            )
        if first and self.draws is not None:
            store.grow(self.draws)
        barrier("room")
        store.open(self.names)

    @property
    def boundary(self) -> int:
        """The draw before which the next block ends."""
        return min((self.flushed // self.block + 1) * self.block, self.total)

    def add(self, end: int, values: dict[str, Array]) -> None:
        """Takes the draws that follow on `drawn`, before ``end``, `boundary` at most,
        of an array that has room for more. They count once `drawn` is set to
        ``end``."""
        for place, rows in _rows(values).items():
            if place not in self.buffers:
                room = rows.shape[0], min(self.block, self.total), *rows.shape[2:]
                self.buffers[place] = np.empty(room, rows.dtype)
            self.buffers[place][:, self.drawn - self.flushed : end - self.flushed] = (
                rows[:, : end - self.drawn]
            )

    def flush(self) -> None:
        """Writes the draws that were taken, and waits for it; where the file system
        refuses, they are not counted."""
        if self.store is not None and self.drawn > self.flushed:
            block = {
                place: rows[:, : self.drawn - self.flushed]
                for place, rows in self.buffers.items()
            }
            written = self._write(self.store, block, slice(self.flushed, self.drawn))
            self.flushed = self.drawn = self.drawn if written else self.flushed

    def _write(
        self, store: Store, blocks: Mapping[tuple[str, int], np.ndarray], *draws: slice
    ) -> bool:
        """Writes rows of chains, and none of copies of them; whether it could."""
        kept = {
            place: rows[: self.number - place[1]]
            for place, rows in blocks.items()
            if place[1] < self.number
        }
        try:
            futures = [
                store.put(name, (slice(first, first + len(rows)), *draws), rows)
                for (name, first), rows in kept.items()
            ]
            for writing in futures:
                writing.result()
        except (ValueError, OSError, RuntimeError) as error:
            self.failure = first_line(error)
        return self.failure is None

    def samples(self, last: dict[str, Array]) -> dict[str, Any]:
        """``{name: (N, draws, …)}``, of a run without draws the ``last`` positions, (N,
        …); the user's store keeps its samples on disk."""
        shown = min(self.drawn, self.total)  # a checkpoint may have more
        if self.store is not None and (
            shown or (self.draws is None and self._write(self.store, _rows(last)))
        ):
            barrier("draws")
            stored = {
                name: self.store.stored(name, shown or None) for name in self.names
            }
            return (
                stored
                if self.kept
                else {name: np.asarray(values) for name, values in stored.items()}
            )
        if not shown:  # where the chains are
            found = self.spread.cut(host(last))
            return (
                found
                if self.draws is None
                else {name: values[:, None] for name, values in found.items()}
            )
        found = {}
        for name in self.names:
            rows = [
                self.buffers.pop(place)
                for place in sorted(self.buffers)
                if place[0] == name
            ]
            found[name] = gathered_rows(
                rows[0] if len(rows) == 1 else np.concatenate(rows)
            )[: self.number, :shown]
        return found

    def finish(self, result: Result) -> Result:
        """Writes what else belongs to a result into the user's store; the result says
        what went wrong."""
        if self.store is not None and self.kept and self.failure is None:
            arrays, facts = result.parts()
            try:
                if jax.process_index() == 0:
                    self.store.write_rest(arrays, {"run": self.run_id, "facts": facts})
            except (ValueError, OSError, RuntimeError) as error:
                self.failure = first_line(error)
            barrier("result")
        if self.failure is None:
            return result
        text = (
            f"The store could not be written: {self.failure}. The samples of this result are those that it has. Make "
            "room or choose another folder; with checkpoint_dir= the same call goes on from the last checkpoint."
        )
        return dataclasses.replace(
            result, status=result.status.with_findings((Code.NOT_SAVED, text))
        )


def _rows(values: dict[str, Array]) -> dict[tuple[str, int], np.ndarray]:
    """The rows that this process has of every site, by the number of the first."""
    return {
        (name, shard.index[0].start or 0): np.asarray(shard.data)
        for name, whole in values.items()
        for shard in whole.addressable_shards
        if shard.replica_id == 0
    }


class RunCheckpoints:
    """The checkpoints of one run, written as it reports. What goes wrong meanwhile is
    reported, and never raised.

    `saved` is the run as it was found in the folder, with ``drawn`` draws in so many
    ``seconds``; None without. Runs look as ``started`` does, of shapes and dtypes.
    `failure` says why the last one could not be written.
    """

    def __init__(self, state: State, checkpoint: Checkpoint, started: Run | None):
        blank = zeros_of(started)
        known = fingerprint(state, blank)
        self.run_id = digest(repr(sorted(known.items())))
        self.folder = CheckpointFolder(checkpoint.folder, known, in_background=True)
        if checkpoint.resume is False:
            self.folder.clear()
        arrays, static = eqx.partition(
            dataclasses.replace(blank, spread=Spread()), eqx.is_array
        )
        found = self.folder.restore((arrays, np.asarray(0), np.asarray(0.0)))
        if found is None and checkpoint.resume:
            raise LoadError(
                f"There is no checkpoint in {self.folder.path} to resume from.",
                fix="check the folder; without resume=True a run starts from the noisiest level.",
            )
        self.saved: Run | None = (
            None if found is None else eqx.combine(found[0], static)
        )
        self.drawn, self.seconds = (
            (0, 0.0) if found is None else (int(found[1]), float(found[2]))
        )
        self.failure: str | None = None
        self.ended, self.due = False, time.monotonic() + tuning.CHECKPOINTS.seconds

    def __call__(self, state: State) -> None:
        """Writes if it is time to, after the draws that belong to it. The writing
        itself runs beside it."""
        if self.ended:
            return
        began = time.monotonic()
        if from_first_process(int(began >= self.due and not self.folder.writing)) == (
            0,
        ):
            return
        state.writer.flush()
        if state.writer.failure is not None:
            return
        if failure := self._save(state):
            if self.failure is None:
                warnings.warn(
                    f"No checkpoint could be written: {failure}. The run goes on.",
                    stacklevel=3,
                )
            self.failure = failure
        seconds, share = tuning.CHECKPOINTS
        self.due = time.monotonic() + max(seconds, (time.monotonic() - began) / share)

    def finish(self, state: State) -> None:
        """Writes the run as it ended and waits for it."""
        self.ended = True
        # The first attempt may only raise what an earlier one came to.
        self.failure = self._save(state, wait=True) and self._save(state, wait=True)
        try:
            self.folder.close()
        except Exception as error:
            self.failure = self.failure or first_line(error)

    def _save(self, state: State, wait: bool = False) -> str | None:
        """Writes the run without copies of chains, as another spread may go on; returns
        what went wrong."""
        try:
            arrays = eqx.filter(state.run.without_copies, eqx.is_array)
            step = int(state.run.visits.made) + state.writer.drawn
            self.folder.save(
                step,
                (arrays, np.asarray(state.writer.drawn), np.asarray(state.seconds)),
            )
            if wait:
                self.folder.wait()
        except (
            Exception
        ) as error:  # of many kinds: Orbax's, TensorStore's, the file system's
            return first_line(error)
        return None


def fingerprint(state: State, blank: Run) -> dict[str, str | int]:
    """What a run's samples follow from, in words where there are any, else as
    digests."""
    density, sampler, key, thin = (
        state.density,
        state.sampler,
        state.key,
        int(state.draws.thin),
    )
    formula = next(
        (line.strip() for line in density.described.text.splitlines() if "∝" in line),
        "",
    )
    return {
        "number of chains": state.num_chains,
        "number of chains evaluated at once": str(state.spread.chunk),
        "number of transitions between draws": "none"
        if state.draws.number is None
        else thin,
        "random key": f"{jax.random.key_impl(key)} {np.asarray(jax.random.key_data(key)).tolist()}",
        "sampler": sampler.describe(),
        "program": formula,
        "levels": repr(density.schedule)
        + (", which the run chooses" if state.pace else ""),
        **{
            f"data {name!r}": digest(value)
            for name, value in density.observed().items()
        },
        "the numbers of the schedule": digest(density.schedule),
        "the numbers of the sampler (step sizes)": digest(sampler),
        "the weights or parameters of its factors": digest(density),
        "version of JAX": jax.__version__,
        "its code (a function in it, precision, or the platform)": digest(
            lowered(state, blank)
        ),
    }


def lowered(state: State, blank: Run) -> str:
    """What one level does, before it is compiled: whatever is no array (functions, say)
    is in there."""
    arrays, static = eqx.partition((state.sampler, blank, state.density), eqx.is_array)
    named = dict(named_leaves(arrays))

    def visit(leaves: dict[str, Array], end: Array) -> PyTree[Array]:
        ordered = jax.tree.unflatten(
            jax.tree.structure(arrays), [leaves[name] for name in named]
        )
        sampler, run, density = eqx.combine(ordered, static)
        return eqx.filter(sampler.advance(run, density, end), eqx.is_array)

    text = jax.jit(visit).lower(named, np.int32(1)).as_text()
    return re.sub(
        r'backend_config = "\d+"|index = \d+', "", text
    )  # callbacks are numbered anew in every process


def digest(tree: PyTree[Array] | str) -> str:
    """SHA-256 over every array of a tree, or over a text."""
    whole = hashlib.sha256(tree.encode() if isinstance(tree, str) else b"")
    for name, leaf in sorted(
        named_leaves(eqx.filter(tree, eqx.is_array)), key=lambda pair: pair[0]
    ):
        values = np.asarray(
            jax.random.key_data(leaf)
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else leaf
        )
        whole.update(f"{name} {values.dtype} {values.shape}".encode())
        whole.update(np.ascontiguousarray(values).tobytes())
    return DIGEST + whole.hexdigest()


def named_leaves(tree: PyTree[Array], above: str = "") -> list[tuple[str, Array]]:
    """The leaves in `jax.tree.leaves`' order; those of a distribution by the names of
    its fields, which key paths number and another version of NumPyro has more of."""
    if isinstance(tree, Distribution):
        fields, (children, _) = (
            type(tree).gather_pytree_data_fields(),
            tree.tree_flatten(),
        )
        pairs = zip(fields, children, strict=True)
        return [
            leaf
            for field, child in pairs
            for leaf in named_leaves(child, f"{above}.{field}")
        ]
    found: list[tuple[str, Array]] = []
    for path, node in jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda node: isinstance(node, Distribution)
    ):
        name = above + jax.tree_util.keystr(path)
        found += (
            named_leaves(node, name)
            if isinstance(node, Distribution)
            else [(name, node)]
        )
    return found
