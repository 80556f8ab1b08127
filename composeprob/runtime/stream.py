"""Draws at level 0 after the levels, kept in memory, or on disk so that memory does not grow with their number."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

from composeprob.checkpoint import first_line
from composeprob.density.annealed import AnnealedDensity
from composeprob.errors import CapabilityError, InvalidValueError, LoadError, WrongTypeError
from composeprob.json_data import JSONObject
from composeprob.results.store import BLOCK_BYTES, Store
from composeprob.runtime.compiled import draw
from composeprob.runtime.progress import Progress
from composeprob.samplers.base import Run, Sampler
from composeprob.samplers.spread import Spread, agreed, everyones, together

AT_ONCE_BYTES = 2**22
"""Room on each device for the draws of one call."""
MOST_TRANSITIONS = 2**31 - 1
"""Transitions are counted in 32 bits."""


class Kept:
    """Where samples go: this process's rows of every site, block by block into a store, or all of them into memory.

    Args:
        names: ``{name: shape and dtype of all chains' values at one draw}``, copies of chains included.
        draws: their number; None for the chains' last positions only.
        path: the store's folder; None for memory.
        spread: how the chains are.
        run_id: what the store's draws follow from, so that a resumed run finds its own.
        done: draws that the store has already.

    Raises:
        InvalidValueError: nothing can be written there.
        LoadError: a run is resumed whose draws are not there.
    """

    def __init__(
        self,
        names: dict[str, jax.ShapeDtypeStruct],
        draws: int | None,
        path: str | Path | None,
        spread: Spread,
        run_id: str,
        done: int = 0,
    ):
        self.draws, self.run_id = draws, run_id
        self.store = None if path is None else Store(path)
        self.flushed, devices = done, spread.devices
        rows = next(iter(names.values())).shape[0]
        self.number = rows - spread.copies
        self.names = {n: jax.ShapeDtypeStruct((self.number, *s.shape[1:]), s.dtype) for n, s in names.items()}
        bytes_a_draw = sum(int(np.prod(s.shape)) * s.dtype.itemsize for s in names.values())
        self.block = max(1, BLOCK_BYTES * jax.process_count() // max(bytes_a_draw, 1))
        self.at_once = max(1, min(self.block, AT_ONCE_BYTES * devices // max(bytes_a_draw, 1)))
        self.rows = rows // devices
        self.buffers: dict[tuple[str, int], np.ndarray] = {}
        if self.store is not None:
            self._open(self.store, done)

    def _open(self, store: Store, done: int) -> None:
        if jax.process_index() == 0:
            if done:
                self._check(store, done)
            else:
                store.create({name: self._laid_out(s) for name, s in self.names.items()}, self.draws is not None)
                store.write_attributes({"run": self.run_id})
        together("store")
        store.open(self.names)
        if self.draws is not None:
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
            together("room")
            store.open(self.names)

    def _check(self, store: Store, done: int) -> None:
        found = store.attributes() if store.is_store() else {}
        if found.get("run") != self.run_id:
            raise LoadError(
                f"The checkpoint says that {done} draws are in {store.path}, but they are not there.",
                fix="pass the store that the run began with, or resume=False to start again.",
            )

    def _laid_out(self, one: jax.ShapeDtypeStruct) -> tuple[tuple[int, ...], np.dtype, tuple[int, ...]]:
        n, *event = one.shape
        between = [] if self.draws is None else [self.draws]
        block = [] if self.draws is None else [self.block]
        return (n, *between, *event), np.dtype(one.dtype), (self.rows, *block, *event)

    @property
    def boundary(self) -> int:
        """The draw before which the next block ends."""
        assert self.draws is not None
        return self.draws if self.store is None else min((self.flushed // self.block + 1) * self.block, self.draws)

    def add(self, begin: int, end: int, values: dict[str, Array]) -> None:
        """Take draws ``begin`` … ``end`` − 1, up to `boundary` at most, of an array that has room for more.

        Raises:
            NotKept: a block cannot be written.
        """
        assert self.draws is not None
        offset, room = (0, self.draws) if self.store is None else (self.flushed, min(self.block, self.draws))
        for name, whole in values.items():
            for first, rows in _own_rows(whole):
                if (name, first) not in self.buffers:
                    self.buffers[name, first] = np.empty((rows.shape[0], room, *rows.shape[2:]), rows.dtype)
                self.buffers[name, first][:, begin - offset : end - offset] = rows[:, : end - begin]
        if end == self.boundary:
            self.flush(end)

    def flush(self, end: int) -> None:
        """Write the draws before ``end``, and wait for it.

        Raises:
            NotKept: the file system says no.
        """
        if self.store is None or end <= self.flushed:
            return
        try:
            every = ((name, first, rows[:, : end - self.flushed]) for (name, first), rows in self.buffers.items())
            ready = [
                self.store.put(name, np.s_[first : first + len(rows), self.flushed : end], rows)
                for name, first, rows in self._cut(every)
            ]
            for writing in ready:
                writing.result()
        except (ValueError, OSError, RuntimeError) as error:
            raise NotKept(first_line(error)) from error
        self.flushed = end

    def last(self, values: dict[str, Array]) -> None:
        """Write a run's only samples, (N, …).

        Raises:
            NotKept: the file system says no.
        """
        assert self.store is not None
        try:
            every = ((name, first, rows) for name, whole in values.items() for first, rows in _own_rows(whole))
            for name, first, rows in self._cut(every):
                self.store.put(name, (slice(first, first + len(rows)),), rows).result()
        except (ValueError, OSError, RuntimeError) as error:
            raise NotKept(first_line(error)) from error

    def samples(self, done: int) -> dict[str, Any]:
        """``{name: (N, done, …)}``, on disk or in memory."""
        if self.store is not None:
            together("draws")
            return {name: self.store.stored(name, done if self.draws is not None else None) for name in self.names}
        firsts = {name: sorted(first for site, first in self.buffers if site == name) for name in self.names}
        own = {name: [self.buffers.pop((name, first)) for first in each] for name, each in firsts.items()}
        whole = {name: parts[0] if len(parts) == 1 else np.concatenate(parts) for name, parts in own.items()}
        return {name: everyones(values)[: self.number, :done] for name, values in whole.items()}

    def _cut(self, rows: Iterable[tuple[str, int, np.ndarray]]) -> Iterator[tuple[str, int, np.ndarray]]:
        """What of these (name, number of the first, rows) belongs to chains and not to copies."""
        for name, first, values in rows:
            if first < self.number:
                yield name, first, values[: self.number - first]

    def finish(self, arrays: dict[str, np.ndarray], facts: JSONObject) -> str | None:
        """Write what else belongs to a result; says what went wrong."""
        assert self.store is not None
        failure = None
        if jax.process_index() == 0:
            try:
                about = {"run": self.run_id, "facts": facts, "arrays": sorted(arrays)}
                self.store.write_rest(arrays, about)
            except (ValueError, OSError, RuntimeError) as error:
                failure = first_line(error)
        together("result")
        return failure


class NotKept(Exception):
    """Draws could not be written; says why."""


def stream(
    sampler: Sampler,
    run: Run,
    density: AnnealedDensity,
    kept: Kept,
    done: int,
    thin: int,
    show: bool,
    save: Callable[[Run, int], None],
) -> tuple[Run, int, str | None]:
    """Draw until there are as many as `kept` wants; Ctrl-C ends it early.

    Args:
        sampler, run, density: placed, at level 0.
        kept: where draws go.
        done: draws that are there already.
        thin: transitions between two draws.
        show: whether to show a progress bar.
        save: called with the run and its number of draws now and then.

    Returns:
        The run, the number of draws, and what went wrong with keeping them.
    """
    assert kept.draws is not None
    size, tick = 1, time.monotonic()
    with Progress(kept.draws, show, "draws") as bar:
        try:
            while done < kept.draws:
                stop = min(done + size, kept.boundary)
                begin, end, apart = (run.spread.number(n) for n in (done, stop, thin))
                ahead, values = jax.block_until_ready(draw(sampler, run, density, begin, end, apart, kept.at_once))
                kept.add(done, stop, values)
                number, (run, done) = stop - done, (ahead, stop)
                seconds, tick = max(time.monotonic() - tick, 1e-6), time.monotonic()
                (size,) = agreed(min(max(1, int(number * bar.pause / seconds)), kept.at_once))
                bar.update(done, acceptance=np.mean(np.asarray(run.records.acceptance)[0]))
                save(run, done)
        except KeyboardInterrupt:
            pass
        except NotKept as error:
            return run, kept.flushed, str(error)
        try:
            kept.flush(done)
        except NotKept as error:
            return run, kept.flushed, str(error)
    return run, done, None


def check_draws(draws: Any, thin: Any, store: object, sampler: Sampler, where: str) -> None:
    """Refuse numbers of draws and transitions that mean nothing, and samplers that cannot go on at level 0.

    Raises:
        WrongTypeError, InvalidValueError, CapabilityError: before anything is compiled.
    """
    for name, value in (("draws", draws), ("thin", thin)):
        if value is None and name == "draws":
            continue
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
            raise WrongTypeError(f"{name} must be a whole number; got {value!r}.", fix="pass an int, such as 1000.")
        if value < 1:
            raise InvalidValueError(f"{name} must be at least 1; got {value}.", fix="ask for one or more.")
    if store is not None and not isinstance(store, (str, Path)):
        raise WrongTypeError(
            f"store must be a folder's path; got {store!r}.", fix="pass a str or a pathlib.Path, such as 'draws.zarr'."
        )
    if draws is None:
        if thin != 1:
            raise InvalidValueError(f"thin={thin} was given, but no draws to thin.", fix="pass draws= too.")
        return
    if draws * thin > MOST_TRANSITIONS:
        raise InvalidValueError(
            f"{draws} draws of {thin} transitions each are more than {MOST_TRANSITIONS}.", fix="ask for fewer."
        )
    if sampler.moves is None:
        raise CapabilityError(
            f"{type(sampler).__name__} without a kernel cannot go on drawing at level 0.",
            where=where,
            fix="use cp.AnnealedMCMC(kernel, …) or cp.SMC(kernel), or take more chains instead of draws.",
        )


def _own_rows(whole: Array) -> list[tuple[int, np.ndarray]]:
    """The rows that this process has: where each device's begin, and what they are."""
    shards = [shard for shard in whole.addressable_shards if shard.replica_id == 0]
    return [(shard.index[0].start or 0, np.asarray(shard.data)) for shard in shards]
