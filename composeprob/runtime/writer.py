"""Samples at level 0, kept in memory, or on disk so that memory does not grow with their number."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

from composeprob import tuning
from composeprob.checkpoint import first_line
from composeprob.errors import InvalidValueError, LoadError
from composeprob.json_data import JSONObject
from composeprob.results.store import Store
from composeprob.samplers.spread import Spread, barrier, gathered_rows


class NotWritten(Exception):
    """Samples could not be written, and why."""


class Writer:
    """Takes this process's rows of every site, block by block into a store, or all of them into memory.

    Args:
        shapes: ``{name: shape and dtype of all chains' values at one draw}``, copies of chains included.
        draws: their number; None for the chains' last positions only.
        path: the store's folder; None for memory.
        spread: which chains are where.
        run_id: what the store's draws follow from, so that a resumed run finds them.
        done: draws that the store has already.

    Attributes:
        at_once: so many draws at most may come out of one call of compiled code.
        flushed: so many are in the store.

    Raises:
        InvalidValueError: nothing can be written there.
        LoadError: a run is resumed whose draws are not there.
    """

    def __init__(
        self,
        shapes: dict[str, jax.ShapeDtypeStruct],
        draws: int | None,
        path: str | Path | None,
        spread: Spread,
        run_id: str,
        done: int = 0,
    ):
        self.draws, self.run_id, self.flushed = draws, run_id, done
        self.store = None if path is None else Store(path)
        rows, devices = next(iter(shapes.values())).shape[0], spread.devices
        self.number, self.rows, self.names = rows - spread.copies, rows // devices, list(shapes)
        bytes_a_draw = max(sum(int(np.prod(s.shape)) * s.dtype.itemsize for s in shapes.values()), 1)
        block = max(1, tuning.ROOM.block_bytes * jax.process_count() // bytes_a_draw)
        self.at_once = max(1, min(block, tuning.ROOM.draws_bytes * devices // bytes_a_draw))
        self.block = block if self.store is not None else draws or 1  # in memory there is only one
        self.buffers: dict[tuple[str, int], np.ndarray] = {}
        if self.store is not None:
            self._open(self.store, shapes, done)

    def _open(self, store: Store, shapes: dict[str, jax.ShapeDtypeStruct], done: int) -> None:
        if jax.process_index() == 0:
            if not done:
                between, block = ([], []) if self.draws is None else ([self.draws], [self.block])
                laid_out = {
                    name: ((self.number, *between, *s.shape[1:]), np.dtype(s.dtype), (self.rows, *block, *s.shape[1:]))
                    for name, s in shapes.items()
                }
                store.create(laid_out, self.draws is not None)
                store.write_attributes({"run": self.run_id})
            elif not store.is_store() or store.attributes().get("run") != self.run_id:
                raise LoadError(
                    f"The checkpoint says that {done} draws are in {store.path}, but they are not there.",
                    fix="pass the store that the run began with, or start again: cp.Checkpoint(folder, resume=False).",
                )
        barrier("store")
        store.open(self.names)
        if self.draws is None:
            return
        layouts = [array.chunk_layout.write_chunk.shape for array in store.arrays.values()]
        extents = [shape[0] for shape in layouts if shape is not None and shape[0] is not None]
        if jax.process_count() > 1 and any(self.rows % extent for extent in extents):
            raise InvalidValueError(
                f"The draws in {store.path} are laid out in {extents[0]} chains each, and here each device has "
                f"{self.rows}: two processes would write to one file.",
                fix="go on with as many devices as the run began with, or in one process.",
            )
        if jax.process_index() == 0:
            store.grow(self.draws)
        barrier("room")
        store.open(self.names)

    @property
    def boundary(self) -> int:
        """The draw before which the next block ends."""
        assert self.draws is not None
        return min((self.flushed // self.block + 1) * self.block, self.draws)

    def add(self, begin: int, end: int, values: dict[str, Array]) -> None:
        """Takes draws ``begin`` … ``end`` − 1, up to `boundary` at most, of an array that has room for more.

        Raises:
            NotWritten: a block cannot be written.
        """
        assert self.draws is not None
        for place, rows in _rows(values).items():
            if place not in self.buffers:
                room = min(self.block, self.draws)
                self.buffers[place] = np.empty((rows.shape[0], room, *rows.shape[2:]), rows.dtype)
            self.buffers[place][:, begin - self.flushed : end - self.flushed] = rows[:, : end - begin]
        if end == self.boundary:
            self.flush(end)

    def flush(self, end: int) -> None:
        """Writes the draws before ``end``, and waits for it.

        Raises:
            NotWritten: the file system refuses.
        """
        if self.store is not None and end > self.flushed:
            block = {place: rows[:, : end - self.flushed] for place, rows in self.buffers.items()}
            self._write(self.store, block, slice(self.flushed, end))
            self.flushed = end

    def last(self, values: dict[str, Array]) -> None:
        """Writes a run's only samples, (N, …).

        Raises:
            NotWritten: the file system refuses.
        """
        assert self.store is not None
        self._write(self.store, _rows(values))

    def _write(self, store: Store, blocks: Mapping[tuple[str, int], np.ndarray], *draws: slice) -> None:
        """Writes rows of chains, and none of copies of them."""
        kept = {place: rows[: self.number - place[1]] for place, rows in blocks.items() if place[1] < self.number}
        try:
            futures = [
                store.put(name, (slice(first, first + len(rows)), *draws), rows) for (name, first), rows in kept.items()
            ]
            for writing in futures:
                writing.result()
        except (ValueError, OSError, RuntimeError) as error:
            raise NotWritten(first_line(error)) from error

    def samples(self, done: int) -> dict[str, Any]:
        """``{name: (N, done, …)}``, on disk or in memory."""
        if self.store is not None:
            barrier("draws")
            return {name: self.store.stored(name, done if self.draws is not None else None) for name in self.names}
        found = {}
        for name in self.names:
            rows = [self.buffers.pop(place) for place in sorted(self.buffers) if place[0] == name]
            whole = gathered_rows(rows[0] if len(rows) == 1 else np.concatenate(rows))
            found[name] = whole[: self.number, :done]
        return found

    def finish(self, arrays: dict[str, np.ndarray], facts: JSONObject) -> str | None:
        """Writes what else belongs to a result; returns what went wrong."""
        assert self.store is not None
        failure = None
        if jax.process_index() == 0:
            try:
                self.store.write_rest(arrays, {"run": self.run_id, "facts": facts, "arrays": sorted(arrays)})
            except (ValueError, OSError, RuntimeError) as error:
                failure = first_line(error)
        barrier("result")
        return failure


def _rows(values: dict[str, Array]) -> dict[tuple[str, int], np.ndarray]:
    """The rows that this process has of every site, by the number of the first."""
    return {
        (name, shard.index[0].start or 0): np.asarray(shard.data)
        for name, whole in values.items()
        for shard in whole.addressable_shards
        if shard.replica_id == 0
    }
