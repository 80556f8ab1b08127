"""A run of one sampler: five stages in a list, each a function of one `State`, with
watchers that it reports to.

`carry_out` goes through the list. Ctrl-C ends the stage that it comes in, once there
are chains; what follows is left out, but for `record`. So that it may come at any time
a stage sets `State.run` only to runs that can be recorded.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import SupportsFloat

import equinox as eqx
import jax
import numpy as np
from jax import Array
from threadpoolctl import threadpool_limits

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.overlap import check, check_evaluations, in_question
from composeprob.errors import CapabilityError
from composeprob.results.result import Result
from composeprob.results.status import fewest_families
from composeprob.runtime import compiled
from composeprob.runtime.outcome import KeyUse, summarised
from composeprob.runtime.progress import Progress
from composeprob.runtime.writer import Checkpoint, Draws, RunCheckpoints, Writer
from composeprob.samplers.choose import check_capabilities
from composeprob.samplers.run import Pace, Run, Visits, begin, placed
from composeprob.samplers.sampler import Sampler
from composeprob.samplers.spread import Spread, everywhere, from_first_process, host
from composeprob.settings import usual


@dataclass
class State:
    """A call of `infer`, checked, and where its run is."""

    density: AnnealedDensity  # on the levels that may be visited
    key: Array
    num_chains: int
    spread: Spread  # which chains are where
    pace: Pace | None  # how the run chooses among the levels; None where it visits all
    draws: Draws
    checkpoint: Checkpoint | None
    progress: bool
    sampler: Sampler  # from `prepare` on, prepared for the density
    reason: str  # why it is this one
    # of the key's random numbers; the next one is that of its check on every other
    # level
    series: int = 0
    # raises `FewAncestors` where too few of the first chains have descendants
    gives_up: bool = False
    given_up: bool = False  # takes the place of a run that did
    spent: int = 0  # evaluations of each chain of a run whose place it takes
    # By the clock, less what it had taken before it was resumed; that of a run whose
    # place it takes.
    began: float = field(default_factory=time.monotonic)
    watchers: list[Callable[[State], None]] = field(
        default_factory=list, init=False
    )  # called after each piece of work
    interrupted: str | None = field(
        default=None, init=False
    )  # the name of the stage that Ctrl-C ended
    weak: str = field(
        default="", init=False
    )  # what modes or the evidence lack, where another run may have it
    came: np.ndarray | None = field(
        default=None, init=False
    )  # points at level 0, (N, D), before what closes the run
    checkpoints: RunCheckpoints | None = field(default=None, init=False)
    writer: Writer = field(init=False)
    first: int = field(init=False)  # the level where chains start
    run: Run = field(init=False)  # the chains, on the devices
    placed: tuple[Sampler, AnnealedDensity] = field(init=False)  # on the devices
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

    def report(
        self,
        title: str,
        total: int,
        done: int = 0,
        doing: str = "",
        **facts: SupportsFloat | str,
    ) -> None:
        """Says that so much is done, which the watchers are told, or what is doing
        next."""
        self.bars.show(title, total, done, doing, **facts)
        for watch in () if doing else self.watchers:
            watch(self)


def carry_out(state: State) -> Result:
    """The result of a run, stage by stage; `FewAncestors` where it is given up. What is
    refused is so before anything is compiled."""
    compiled.make_room()
    state.bars = Progress(enabled=state.progress)
    # LAPACK's matrices are small here: its threads would wait for one another longer
    # than they work.
    with threadpool_limits(1, user_api="blas"), usual(), contextlib.closing(state.bars):
        for stage in STAGES:
            try:
                if not state.interrupted or stage is record:
                    stage(state)
            except KeyboardInterrupt:
                if stage in (prepare, record) or state.run.chains is None:
                    raise
                state.interrupted = stage.__name__
    return state.result


def prepare(state: State) -> None:
    """Checks that the sampler can meet the request, opens folders, and puts everything
    on the devices."""
    density, spread, where = state.density, state.spread, state.density.described.where
    check_capabilities(state.sampler, density)
    if state.pace is not None and state.sampler.weights is None:
        raise CapabilityError(
            f"levels='adaptive' goes by the variance of weights, and {type(state.sampler).__name__} has no weights.",
            where=where,
            fix="pass sampler=cp.SMC(), or more chains, or an array of log-SNR as levels.",
        )
    sampler = state.sampler = state.sampler.prepare(density)
    for closing in sampler.finishers:
        closing.check(density, state.num_chains)
    if state.draws.number is not None and sampler.moves is None:
        raise CapabilityError(
            f"{type(sampler).__name__} without a kernel cannot go on drawing at level 0.",
            where=where,
            fix="use cp.AnnealedMCMC(kernel, …) or cp.SMC(kernel), or take more chains instead of draws.",
        )
    shared = compiled.in_parts(density, spread, sampler)
    state.first = sampler.first_level(density)
    here = dataclasses.replace(spread, mesh=None, copies=0)
    run = begin(
        state.key,
        state.num_chains,
        sampler.visits(density, state.pace),
        here,
        state.series,
    )
    started, kept = None, (state.checkpoint, state.draws.number, state.draws.store)
    if any(each is not None for each in kept):
        # Compiled, so that all arrays are JAX's.
        started = eqx.filter_eval_shape(
            eqx.filter_jit(sampler.start), run, density, state.first
        )
    if state.checkpoint is not None:
        state.checkpoints = RunCheckpoints(state, state.checkpoint, started)
        run = state.checkpoints.saved or run
        state.began -= state.checkpoints.seconds
    state.writer = Writer(state, started)
    state.run = placed(run, spread)
    state.placed = compiled.on_mesh((sampler.in_numbers(), shared), spread)
    watchers = state.checkpoints, give_up if state.gives_up else None, PilotRun(state)
    state.watchers = [watch for watch in watchers if watch is not None]
    if state.gives_up:  # a run that goes on may have been given up where it was saved
        give_up(state)


def descend(state: State, title: str = "") -> None:
    """Visits what is left of the levels, in stretches of one compiled loop."""
    sampler, density = state.placed
    name, total = type(sampler).__name__, state.first + 1
    title = title or name
    if state.run.chains is None:
        state.report(title, total, doing="compiling the first draws")
        state.run = compiled.start(sampler, state.run, density, state.first)
    kernel = (
        "" if sampler.kernel is None else f" with {type(state.sampler.kernel).__name__}"
    )
    state.report(title, total, doing=f"compiling a level of {name}{kernel}")
    visits, stretch = state.visits, Stretch(state.bars.pause)
    while not visits.arrived:
        made = int(visits.made)
        end = state.run.spread.number(made + stretch.size)
        state.run = jax.block_until_ready(
            compiled.advance(sampler, state.run, density, end)
        )
        visits, records = state.visits, state.run.records
        stretch.adapt(int(visits.made) - made)
        level = int(visits.visited()[-1])
        facts = {
            "acceptance": records.acceptance,
            "ESS": records.ess,
            "ancestors": records.ancestors,
        }
        means = {
            name: np.mean(np.asarray(values)[level]) for name, values in facts.items()
        }
        state.report(
            title,
            total,
            total - level,
            **{name: mean for name, mean in means.items() if not np.isnan(mean)},
        )
        if visits.arrived and (state.sampler.finishers or state.draws.number):
            state.came = _points(
                state.run
            )  # the status asks whether what follows leads from mode to mode


def finish(state: State) -> None:
    """Moves chains at the target by what closes the sampler's runs. Interrupted, they
    are as they were before it, and a run that continues from its checkpoint begins it
    anew."""
    density = state.placed[1]
    for closing in state.sampler.finishers[int(state.run.closings) :]:
        run, points, number, drift = state.run, _points(state.run), 0, 1.0
        start, spent = points, int(run.spent)
        while number < closing.rounds and (number < 2 or drift > 0):
            state.report(
                closing.title,
                closing.rounds,
                done=number,
                doing="fitting the population",
            )
            fitted = closing.adapt(points, state.density)
            if fitted is None:
                break
            fitted = run.spread.place(jax.tree.map(np.asarray, fitted), everywhere)
            state.report(
                closing.title,
                closing.rounds,
                done=number,
                doing=f"compiling {closing!r}",
            )
            run = jax.block_until_ready(
                compiled.close(closing, run, density, fitted, run.spread.number(number))
            )
            before, points, number = points, _points(run), number + 1
            spent += closing.evaluations(fitted)
            drift = closing.drift(
                (start, before, points),
                state.density,
                state.sampler.weights is not None,
            )
            state.report(closing.title, closing.rounds, done=number, drift=drift)
        closings, counted = map(run.spread.number, (int(run.closings) + 1, spent))
        moved = (
            run.spread.number(drift, np.float32) if closing.rounds > 1 else run.drift
        )  # else nothing measured it
        state.run = dataclasses.replace(
            run, closings=closings, spent=counted, drift=moved
        )


def draw(state: State) -> None:
    """Takes draws at level 0, in stretches of one compiled loop."""
    sampler, density = state.placed
    writer, number, stretch = (
        state.writer,
        state.draws.number or 0,
        Stretch(state.bars.pause),
    )
    while writer.drawn < number and writer.failure is None:
        end = min(writer.drawn + min(stretch.size, writer.at_once), writer.boundary)
        first, last, thin = map(
            state.run.spread.number, (writer.drawn, end, state.draws.thin)
        )
        drawn = compiled.draw(
            sampler, state.run, density, first, last, thin, writer.at_once
        )
        run, values = jax.block_until_ready(drawn)
        writer.add(end, values)
        stretch.adapt(end - writer.drawn)
        state.run, writer.drawn = run, end
        if end == writer.boundary:
            writer.flush()
        state.report(
            "draws",
            number,
            done=writer.drawn,
            acceptance=np.mean(np.asarray(run.records.acceptance)[0]),
        )


def record(state: State) -> None:
    """Writes what is left to write, estimates what the levels' distance does to the
    evidence, and sums the run up."""
    state.writer.flush()
    if (
        state.checkpoints is not None and state.writer.failure is None
    ):  # else the last is that whose draws are there
        state.checkpoints.finish(state)
    coarse = _coarse_evidence(state)
    values, positions = compiled.read(state.placed[0], state.run, state.placed[1])
    state.result = state.writer.finish(
        summarised(state, state.writer.samples(values), host(positions), coarse)
    )


STAGES = [prepare, descend, finish, draw, record]


class FewAncestors(Exception):
    """SMC's chains have become copies of few, at a level where something else can still
    be done."""


def give_up(state: State) -> None:
    """Raises `FewAncestors`, once the run is saved, where too few of the first chains
    have descendants."""
    visits, run, n = state.visits, state.run, state.num_chains
    if not int(visits.made):
        return
    effective = 1.0 / (float(run.evidence_variance) * (n - 1) / n + 1 / n)
    if effective < fewest_families(n):
        if state.checkpoints is not None:
            state.checkpoints.finish(state)
        level = int(visits.visited()[-1])
        raise FewAncestors(
            f"{np.asarray(run.records.ancestors)[level]:.0f} first ones, some so much more than others that they are "
            f"worth {effective:.1f}, at level {level}"
        )


class PilotRun:
    """Sends a few chains ahead by `density.check`, once, if the run turns out to be
    long, and warns of what they find.

    The run's own samples answer the same question better, at its end; a run of seconds
    waits for them, as compiling the pilot run would take as long. How long a level
    takes is known after the second stretch, as the first one compiles.
    """

    def __init__(self, state: State):
        visits = (
            state.first + 1
            if state.pace is None
            else min(state.first + 1, tuning.CHECKS.fewest_chosen)
        )
        most = (
            tuning.CHECKS.share * state.num_chains * state.sampler.evaluations(visits)
        )
        self.due = (
            state.first > 0
            and in_question(state.density)
            and check_evaluations(state.density) <= most
        )
        self.began: tuple[float, int] | None = None

    def __call__(self, state: State) -> None:
        if not self.due:
            return
        now, level = time.monotonic(), int(state.visits.visited()[-1])
        if self.began is None or level >= self.began[1]:
            self.began = now, level
            return
        began, above = self.began
        self.due = False
        (long,) = from_first_process(
            int(level * (now - began) / (above - level) >= tuning.CHECKS.long_seconds)
        )
        if not long:
            return
        key = KeyUse.PILOT.folded_into(state.key)
        for finding in check(state.density, key, tuning.PILOT.chains):
            warnings.warn(
                f"{finding.message} The run goes on; Ctrl-C ends it.", stacklevel=2
            )


class Stretch:
    """How many levels, or draws, are made in a row: as many as fit in the seconds
    between two reports."""

    def __init__(self, pause: float):
        self.pause, self.size, self.began = pause, 1, time.monotonic()

    def adapt(self, made: int) -> None:
        """So many were made in the time since the last call; at most four times as many
        follow."""
        seconds, self.began = max(time.monotonic() - self.began, 1e-6), time.monotonic()
        (self.size,) = from_first_process(
            max(1, min(4 * self.size, int(made * self.pause / seconds)))
        )


def _points(run: Run) -> np.ndarray:
    """The population's points v, (N, D), on the host."""
    return np.asarray(run.spread.cut(host(run.chains.position)))


def _coarse_evidence(state: State) -> tuple[float, float] | None:
    """The log-evidence of the run over every other level, and its variance; None where
    nobody asks, or the run did not get there."""
    checked = (
        state.sampler.check_order is not None
        and state.sampler.estimates_evidence(state.density)
    )
    if not checked or state.interrupted or not state.visits.arrived:
        return None
    coarse = copy.copy(state)
    again = begin(
        state.key, state.num_chains, state.run.visits.coarser(), series=state.series + 1
    )
    coarse.run = placed(again, state.spread)
    coarse.watchers = []
    try:
        descend(coarse, "error of the evidence")
    except KeyboardInterrupt:
        return None
    return float(np.asarray(coarse.run.log_evidence)), float(
        np.asarray(coarse.run.evidence_variance)
    )
