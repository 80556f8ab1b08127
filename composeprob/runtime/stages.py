"""A run of one sampler: five stages in a list, each a function of one `State`, with watchers that it reports to.

`carry_out` goes through the list. Ctrl-C ends the stage that it comes in, once there are chains; what follows is left
out, but for `record`. So that it may come at any time a stage sets `State.run` only to runs that can be recorded.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, SupportsFloat

import equinox as eqx
import jax
import numpy as np
from jax import Array
from threadpoolctl import threadpool_limits

from composeprob.density.annealed import AnnealedDensity
from composeprob.errors import CapabilityError
from composeprob.results.result import Result
from composeprob.runtime import compiled, parts
from composeprob.runtime.progress import Progress, Report
from composeprob.runtime.record import summarised
from composeprob.runtime.resume import RunCheckpoints, blank_like
from composeprob.runtime.watchers import GiveUp, PilotRun
from composeprob.runtime.writer import NotWritten, Writer
from composeprob.samplers.choose import check_capabilities
from composeprob.samplers.run import Run, begin, placed
from composeprob.samplers.sampler import Sampler
from composeprob.samplers.spread import everywhere, from_first_process, host
from composeprob.samplers.visits import Visits
from composeprob.settings import usual

if TYPE_CHECKING:
    from composeprob.runtime.infer import Request


@dataclass
class State:
    """Where a run is.

    Attributes:
        request: the call of `infer`.
        sampler: how chains travel; from `prepare` on, prepared for the density.
        reason: why it is this one.
        gives_up: whether it raises `FewAncestors` where too few of the first chains have descendants.
        watchers: called with the state and a `Report` after each piece of work, and before what takes long.
        began: when it did, by the clock, less what it had taken before it was resumed.
        first: the level where chains start.
        run: the chains, on the devices.
        placed: sampler and density, on the devices.
        bars: the progress bar, which says how long a piece of work may take.
        checkpoints, writer: None without.
        drawn: how many draws were taken.
        unwritten: why samples could not be written; None where nothing went wrong.
        interrupted: the name of the stage that Ctrl-C ended; None without.
        result: from `record`.
    """

    request: Request
    sampler: Sampler
    reason: str
    gives_up: bool = False
    watchers: list[Callable[[State, Report], None]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    drawn: int = 0
    unwritten: str | None = None
    interrupted: str | None = None
    checkpoints: RunCheckpoints | None = None
    writer: Writer | None = None
    first: int = field(init=False)
    run: Run = field(init=False)
    placed: tuple[Sampler, AnnealedDensity] = field(init=False)
    bars: Progress = field(init=False)
    result: Result = field(init=False)

    @property
    def visits(self) -> Visits:
        """The levels that were visited, in memory of the host."""
        return host(self.run.visits)

    @property
    def seconds(self) -> float:
        """That the run has taken."""
        return time.monotonic() - self.began

    def report(self, title: str, total: int, done: int = 0, doing: str = "", **facts: SupportsFloat | str) -> None:
        """Tells the watchers; see `Report`."""
        for watch in self.watchers:
            watch(self, Report(title, total, done, doing, facts))


def carry_out(state: State) -> Result:
    """The result of a run, stage by stage.

    Raises:
        ComposeProbError: the sampler cannot do it, or a folder belongs to another run; nothing is compiled before.
        FewAncestors: the run was given up.
    """
    compiled.make_room()
    state.bars = Progress(enabled=state.request.progress)
    # LAPACK's matrices are small here: its threads would wait for one another longer than they work.
    with threadpool_limits(1, user_api="blas"), usual(), contextlib.closing(state.bars):
        for stage in STAGES:
            if state.interrupted and stage is not record:
                continue
            try:
                stage(state)
            except KeyboardInterrupt:
                if stage in (prepare, record) or state.run.chains is None:
                    raise
                state.interrupted = stage.__name__
    return state.result


def prepare(state: State) -> None:
    """Checks that the sampler can meet the request, opens folders, and puts everything on the devices."""
    request, density = state.request, state.request.density
    check_capabilities(state.sampler, density)
    if request.pace is not None and not state.sampler.paces:
        raise CapabilityError(
            f"levels='adaptive' goes by the variance of weights, and {type(state.sampler).__name__} has no weights.",
            where=density.described.where,
            fix="pass sampler=cp.SMC(), or 256 chains or more, or an array of log-SNR as levels.",
        )
    sampler = state.sampler = state.sampler.prepare(density)
    for closing in sampler.then:
        closing.check_chains(request.num_chains, density)
    if request.draws.number is not None and sampler.moves is None:
        raise CapabilityError(
            f"{type(sampler).__name__} without a kernel cannot go on drawing at level 0.",
            where=density.described.where,
            fix="use cp.AnnealedMCMC(kernel, …) or cp.SMC(kernel), or take more chains instead of draws.",
        )
    shared = parts.in_parts(density, request.spread, sampler)
    state.first = sampler.first_level(density)
    here = dataclasses.replace(request.spread, mesh=None, copies=0)
    run = begin(request.key, request.num_chains, sampler.visits(density, request.pace), here)
    if request.checkpoint is not None:
        blank = blank_like(eqx.filter_eval_shape(compiled.start, sampler, run, density, state.first))
        state.checkpoints = RunCheckpoints(request, sampler, state.first, blank)
        if state.checkpoints.saved is not None:
            run, state.drawn, earlier = state.checkpoints.saved
            state.began -= earlier
    state.run = placed(run, request.spread)
    state.placed = request.spread.place(sampler.in_numbers(), everywhere), parts.placed(shared, request.spread)
    state.writer = _writer(state)
    watchers = [state.bars, state.checkpoints, GiveUp() if state.gives_up else None, PilotRun(state)]
    state.watchers = [watch for watch in watchers if watch is not None]


def descend(state: State) -> None:
    """Visits what is left of the levels, in stretches of one compiled loop."""
    sampler, density = state.placed
    title, total = type(sampler).__name__, state.first + 1
    if state.run.chains is None:
        state.report(title, total, doing="compiling the first draws")
        state.run = compiled.start(sampler, state.run, density, state.first)
    kernel = "" if sampler.kernel is None else f" with {type(state.sampler.kernel).__name__}"
    state.report(title, total, doing=f"compiling a level of {title}{kernel}")
    visits, stretch = state.visits, Stretch(state.bars.pause)
    while not visits.arrived:
        made = int(visits.made)
        end = state.run.spread.number(made + stretch.size)
        state.run = jax.block_until_ready(compiled.advance(sampler, state.run, density, end))
        visits = state.visits
        stretch.adapt(int(visits.made) - made)
        level = int(visits.visited()[-1])
        records = state.run.records
        facts = {"acceptance": np.mean(np.asarray(records.acceptance)[level])}
        facts |= {"ESS": np.asarray(records.ess)[level], "ancestors": np.asarray(records.ancestors)[level]}
        known = {name: value for name, value in facts.items() if not np.isnan(value)}
        state.report(title, total, done=total - level, **known)


def finish(state: State) -> None:
    """Moves chains at the target by what closes the sampler's runs.

    Interrupted, they are as they were before it, and a run that continues from its checkpoint begins it anew.
    """
    density = state.placed[1]
    for closing in state.sampler.then:
        if closing.done(state.run):
            continue
        run, points, number, drift = state.run, _points(state.run), 0, 1.0
        while number < closing.rounds and (number < 2 or drift > 0):
            state.report(closing.title, closing.rounds, done=number, doing="fitting the population")
            fitted = closing.adapt(points, state.request.density)
            if fitted is None:
                break
            fitted = run.spread.place(jax.tree.map(np.asarray, fitted), everywhere)
            state.report(closing.title, closing.rounds, done=number, doing=f"compiling {closing!r}")
            run = jax.block_until_ready(compiled.close(closing, run, density, fitted, run.spread.number(number)))
            before, points, number = points, _points(run), number + 1
            drift = closing.drift(before, points)
            state.report(closing.title, closing.rounds, done=number, drift=drift)
        state.run = closing.closed(run, number, drift) if number else run


def draw(state: State) -> None:
    """Takes draws at level 0, in stretches of one compiled loop."""
    if (number := state.request.draws.number) is None:
        return
    assert state.writer is not None
    (sampler, density), writer, stretch = state.placed, state.writer, Stretch(state.bars.pause)
    thin = state.run.spread.number(state.request.draws.thin)
    try:
        while state.drawn < number:
            end = min(state.drawn + min(stretch.size, writer.at_once), writer.boundary)
            first, last = map(state.run.spread.number, (state.drawn, end))
            drawn = compiled.draw(sampler, state.run, density, first, last, thin, writer.at_once)
            run, values = jax.block_until_ready(drawn)
            writer.add(state.drawn, end, values)
            made = end - state.drawn
            state.run, state.drawn = run, end
            stretch.adapt(made)
            acceptance = np.mean(np.asarray(run.records.acceptance)[0])
            state.report("draws", number, done=end, acceptance=acceptance)
    except NotWritten as error:
        state.drawn, state.unwritten = writer.flushed, str(error)


def record(state: State) -> None:
    """Writes what is left to write, estimates what the levels' distance does to the evidence, and sums the run up."""
    request, writer = state.request, state.writer
    if writer is not None:
        try:
            writer.flush(state.drawn)
        except NotWritten as error:
            state.drawn, state.unwritten = writer.flushed, str(error)
    if state.checkpoints is not None and state.unwritten is None:  # else the last one is that whose draws are there
        state.checkpoints.finish(state)
    coarse = None
    if state.sampler.check_order is not None and state.sampler.estimates_evidence(request.density):
        coarse = _coarse_evidence(state)
    sampler, density = state.placed
    values, positions = compiled.read(sampler, state.run, density)
    result = summarised(state, _samples(state, values), host(positions), coarse)
    if request.draws.store is not None and state.unwritten is None:
        assert writer is not None
        state.unwritten = writer.finish(*result.parts())
    if state.unwritten is not None:
        result = dataclasses.replace(result, status=result.status.not_stored(state.unwritten))
    state.result = result


STAGES = [prepare, descend, finish, draw, record]


class Stretch:
    """How many levels, or draws, are made in a row: as many as fit between two reports.

    Args:
        pause: seconds between them.
    """

    def __init__(self, pause: float):
        self.pause, self.size, self.began = pause, 1, time.monotonic()

    def adapt(self, made: int) -> None:
        """So many were made in the time since the last call; at most four times as many follow."""
        seconds, self.began = max(time.monotonic() - self.began, 1e-6), time.monotonic()
        (self.size,) = from_first_process(max(1, min(4 * self.size, int(made * self.pause / seconds))))


def _points(run: Run) -> np.ndarray:
    """The population's points v, (N, D), on the host."""
    return np.asarray(run.spread.cut(host(run.chains.points)))


def _writer(state: State) -> Writer | None:
    """What takes the samples, if it is not only the chains' last positions in memory."""
    request, draws = state.request, state.request.draws
    if draws.number is None and draws.store is None:
        return None
    store = draws.store
    if store is None and request.checkpoint is not None:  # draws that a checkpoint continues from are on disk too
        store = Path(request.checkpoint.folder) / "draws.zarr"
    shapes = compiled.sample_shapes(state.sampler, state.run, request.density, state.first)
    run_id = "" if state.checkpoints is None else state.checkpoints.run_id
    return Writer(shapes, draws.number, store, request.spread, run_id, state.drawn)


def _samples(state: State, values: dict[str, Array]) -> dict[str, np.ndarray]:
    """Every site's samples, where the chains end if there are no draws; those of a run with a store are left there."""
    request, writer, shown = state.request, state.writer, min(state.drawn, state.request.draws.number or 0)
    if writer is not None and shown:  # a checkpoint may have more
        samples = writer.samples(shown)
    else:
        if writer is not None and writer.draws is None:
            try:
                writer.last(values)
                return writer.samples(1)
            except NotWritten as error:
                state.unwritten = str(error)
        samples = state.run.spread.cut(host(values))
        if request.draws.number is not None:  # none was drawn yet: where the chains are
            samples = {name: value[:, None] for name, value in samples.items()}
    return samples if request.draws.store else {name: np.asarray(values) for name, values in samples.items()}


def _coarse_evidence(state: State) -> float | None:
    """The log-evidence of the run over every other level; None where there is none, or it was interrupted."""
    visits = state.visits
    if state.interrupted or not visits.arrived:
        return None
    request, coarse = state.request, copy.copy(state)
    run = begin(
        request.key, request.num_chains, state.run.visits.coarser(), series=1
    )  # of random numbers: not those of the run itself
    coarse.run = placed(run, request.spread)
    coarse.watchers = [lambda _, report: state.bars(state, report._replace(title="error of the evidence"))]
    try:
        descend(coarse)
    except KeyboardInterrupt:
        return None
    return float(np.asarray(coarse.run.log_evidence))
