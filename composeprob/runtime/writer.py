"""Samples at level 0, kept in memory, or on disk so that memory does not grow with their number."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import numpy as np
from jax import Array

from composeprob import tuning
from composeprob.checkpoint import first_line
from composeprob.errors import InvalidValueError, LoadError
from composeprob.results.result import Result
from composeprob.results.status import Code
from composeprob.results.store import Store
from composeprob.samplers.run import Run
from composeprob.samplers.spread import barrier, gathered_rows, host

if TYPE_CHECKING:
    from composeprob.runtime.stages import State


class Writer:
    """Takes this process's rows of every site, block by block into a store, or all of them into memory.

    Of draws that were taken (`drawn`) some are in the store (`flushed`); at most `at_once` may come out of one call of
    compiled code. `failure` says why samples could not be written. Runs look as ``started`` does, of shapes and dtypes;
    None without draws or a store.
    """

    def __init__(self, state: State, started: Run | None):
        density, spread, path, checkpoints = state.density, state.spread, state.draws.store, state.checkpoints
        self.run_id, self.drawn = ("", 0) if checkpoints is None else (checkpoints.run_id, checkpoints.drawn)
        self.flushed, self.number, self.spread = self.drawn, state.num_chains, spread
        self.draws, self.total = state.draws.number, state.draws.number or 0
        self.failure: str | None = None
        self.kept = path is not None  # in the user's store
        if path is None and state.checkpoint is not None and self.draws is not None:
            path = Path(state.checkpoint.folder) / "draws.zarr"  # what a checkpoint continues from is on disk too
        self.store = None if path is None else Store(path)
        self.buffers: dict[tuple[str, int], np.ndarray] = {}
        if started is None or not (self.draws or self.store):  # only the last positions, in memory
            return
        read = lambda run: jax.vmap(density.to_samples)(state.sampler.positions(run, density))  # noqa: E731
        shapes: dict[str, jax.ShapeDtypeStruct] = eqx.filter_eval_shape(read, started)
        self.names, rows = list(shapes), self.number + spread.copies
        bytes_a_draw = max(rows * sum(s.size // self.number * s.dtype.itemsize for s in shapes.values()), 1)
        block = max(1, tuning.ROOM.block_bytes * jax.process_count() // bytes_a_draw)
        self.at_once = max(1, min(block, tuning.ROOM.draws_bytes * spread.devices // bytes_a_draw))
        self.block = block if self.store is not None else max(self.total, 1)  # in memory there is only one
        if self.store is not None:
            self._open(self.store, shapes, rows // spread.devices)

    def _open(self, store: Store, shapes: dict[str, jax.ShapeDtypeStruct], rows: int) -> None:
        first = jax.process_index() == 0
        if first and not self.drawn:
            draws, block = ([], []) if self.draws is None else ([self.draws], [self.block])
            laid_out = {
                name: ((self.number, *draws, *s.shape[1:]), np.dtype(s.dtype), (rows, *block, *s.shape[1:]))
                for name, s in shapes.items()
            }
            store.create(laid_out, self.draws is not None)
            store.write_attributes({"run": self.run_id})
        elif first and (not store.is_store() or store.attributes().get("run") != self.run_id):
            raise LoadError(
                f"The checkpoint says that {self.drawn} draws are in {store.path}, but they are not there.",
                fix="pass the store that the run began with, or start again: cp.Checkpoint(folder, resume=False).",
            )
        barrier("store")
        store.open(self.names)
        layouts = (array.chunk_layout.write_chunk.shape for array in store.arrays.values())
        uneven = [shape[0] for shape in layouts if shape is not None and shape[0] is not None and rows % shape[0]]
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
        """Takes the draws that follow on `drawn`, before ``end``, `boundary` at most, of an array that has room for
        more. They count once `drawn` is set to ``end``."""
        for place, rows in _rows(values).items():
            if place not in self.buffers:
                room = rows.shape[0], min(self.block, self.total), *rows.shape[2:]
                self.buffers[place] = np.empty(room, rows.dtype)
            self.buffers[place][:, self.drawn - self.flushed : end - self.flushed] = rows[:, : end - self.drawn]

    def flush(self) -> None:
        """Writes the draws that were taken, and waits for it; where the file system refuses, they are not counted."""
        if self.store is not None and self.drawn > self.flushed:
            block = {place: rows[:, : self.drawn - self.flushed] for place, rows in self.buffers.items()}
            written = self._write(self.store, block, slice(self.flushed, self.drawn))
            self.flushed = self.drawn = self.drawn if written else self.flushed

    def _write(self, store: Store, blocks: Mapping[tuple[str, int], np.ndarray], *draws: slice) -> bool:
        """Writes rows of chains, and none of copies of them; whether it could."""
        kept = {place: rows[: self.number - place[1]] for place, rows in blocks.items() if place[1] < self.number}
        try:
            futures = [
                store.put(name, (slice(first, first + len(rows)), *draws), rows) for (name, first), rows in kept.items()
            ]
            for writing in futures:
                writing.result()
        except (ValueError, OSError, RuntimeError) as error:
            self.failure = first_line(error)
        return self.failure is None

    def samples(self, last: dict[str, Array]) -> dict[str, Any]:
        """``{name: (N, draws, …)}``, of a run without draws the ``last`` positions, (N, …); the user's store keeps its
        samples on disk."""
        shown = min(self.drawn, self.total)  # a checkpoint may have more
        if self.store is not None and (shown or (self.draws is None and self._write(self.store, _rows(last)))):
            barrier("draws")
            stored = {name: self.store.stored(name, shown or None) for name in self.names}
            return stored if self.kept else {name: np.asarray(values) for name, values in stored.items()}
        if not shown:  # where the chains are
            found = self.spread.cut(host(last))
            return found if self.draws is None else {name: values[:, None] for name, values in found.items()}
        found = {}
        for name in self.names:
            rows = [self.buffers.pop(place) for place in sorted(self.buffers) if place[0] == name]
            found[name] = gathered_rows(rows[0] if len(rows) == 1 else np.concatenate(rows))[: self.number, :shown]
        return found

    def finish(self, result: Result) -> Result:
        """Writes what else belongs to a result into the user's store; the result says what went wrong."""
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
        return dataclasses.replace(result, status=result.status.with_findings((Code.NOT_SAVED, text)))


def _rows(values: dict[str, Array]) -> dict[tuple[str, int], np.ndarray]:
    """The rows that this process has of every site, by the number of the first."""
    return {
        (name, shard.index[0].start or 0): np.asarray(shard.data)
        for name, whole in values.items()
        for shard in whole.addressable_shards
        if shard.replica_id == 0
    }
