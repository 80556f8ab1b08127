"""A run of one sampler: five stages in a list, each a function of one `State`, with
watchers that it reports to.

`carry_out` goes through the list. Ctrl-C ends the current stage, once there are chains;
the stages after it are left out, except `record`. It may come at any time, so a stage
sets `State.run` only to runs that can be recorded.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, SupportsFloat

import equinox as eqx
import jax
import numpy as np
from jax import Array
from jaxtyping import Float, PyTree
from threadpoolctl import threadpool_limits

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.overlap import check, check_evaluations, in_question
from composeprob.errors import CapabilityError, ProgramError
from composeprob.findings import Finding
from composeprob.kernels.gibbs import integrates_score
from composeprob.results.checks import CHECKS, Check
from composeprob.results.checks.own_scores import OwnScores
from composeprob.results.ended import KeyUse, weighs_by_scores
from composeprob.results.repetition import Repetition
from composeprob.results.result import Result
from composeprob.results.support import in_separated_modes
from composeprob.runtime import compiled
from composeprob.runtime.outcome import summarised
from composeprob.runtime.own_draws import own_levels, own_scores
from composeprob.runtime.plan import Attempt, Tried
from composeprob.runtime.progress import Progress
from composeprob.runtime.writer import Checkpoint, Draws, RunCheckpoints, Writer
from composeprob.samplers.choose import check_capabilities
from composeprob.samplers.finishers import Finisher, Trail, WarmUp, memory
from composeprob.samplers.layout import Layout
from composeprob.samplers.replica_exchange import ReplicaExchange
from composeprob.samplers.resampling import Resampler
from composeprob.samplers.run import Run, Visits, begin, placed
from composeprob.samplers.sampler import Sampler
from composeprob.samplers.spread import Spread, everywhere, from_first_process, host


@dataclass
class State:
    """A call of `infer`, checked, and the progress of its run."""

    attempt: Attempt
    key: Array
    num_chains: int
    spread: Spread  # of the chains over devices
    draws: Draws
    checkpoint: Checkpoint | None
    progress: bool
    checks: Sequence[Check] = CHECKS  # that ask the run once it has ended
    spent: int = 0  # evaluations of each chain by the attempts before this one
    # By the monotonic clock, at the beginning of the call; earlier by the time that a
    # resumed run had already taken.
    began: float = field(default_factory=time.monotonic)
    # Called after each piece of work.
    watchers: list[Callable[[State], None]] = field(default_factory=list, init=False)
    # The name of the stage that Ctrl-C ended.
    interrupted: str | None = field(default=None, init=False)
    # Points on arrival at level 0, (N, D), before finishers or draws move them.
    arrival_points: Float[np.ndarray, "chains dims"] | None = field(
        default=None, init=False
    )
    # Points of the initial draws, where the memory of latents is asked.
    start_points: Float[np.ndarray, "chains dims"] | None = field(
        default=None, init=False
    )
    # Correlation of latents with where they began, in runs without a warm-up.
    memory: float = field(default=0.0, init=False)
    checkpoints: RunCheckpoints | None = field(default=None, init=False)
    unbegun: Run = field(init=False)  # before the first draws, on the host
    sampler: Sampler = field(init=False)  # from `prepare` on, prepared for the density
    writer: Writer = field(init=False)
    first: int = field(init=False)  # the level where chains start
    run: Run = field(init=False)  # the chains, on the devices
    placed: tuple[Sampler, AnnealedDensity] = field(init=False)  # on the devices
    bars: Progress = field(init=False)
    # Whether the sampler's chains carry no log-densities that exponents would need.
    untracked: bool = field(default=False, init=False)
    result: Result = field(init=False)

    @property
    def density(self) -> AnnealedDensity:
        """The density, on the levels that may be visited."""
        return self.attempt.density

    @property
    def visits(self) -> Visits:
        """The levels that were visited, in memory of the host."""
        return host(self.run.visits)

    @property
    def seconds(self) -> float:
        """Time since the call began, in seconds."""
        return time.monotonic() - self.began

    def report(
        self,
        title: str,
        total: int,
        done: int = 0,
        doing: str = "",
        **facts: SupportsFloat | str,
    ) -> None:
        """Show the progress, and call the watchers, or show the work that begins.

        Watchers are not called with ``doing``: the run has not changed since the last
        report.
        """
        self.bars.show(title, total, done, doing, **facts)
        if doing:
            return
        for watch in self.watchers:
            watch(self)


def carry_out(state: State) -> Tried:
    """Carry out an attempt, stage by stage; refusals come before anything is
    compiled."""
    compiled.make_room()
    state.bars = Progress(enabled=state.progress)
    # LAPACK's matrices are small here: its threads would wait for one another longer
    # than they work.
    with threadpool_limits(1, user_api="blas"), contextlib.closing(state.bars):
        for stage in STAGES:
            try:
                if not state.interrupted or stage is record:
                    stage(state)
            except KeyboardInterrupt:
                if stage in (prepare, record) or state.run.chains is None:
                    raise
                state.interrupted = stage.__name__
    return Tried(state.attempt, state.result, state.interrupted)


def prepare(state: State) -> None:
    """Check the sampler's capabilities, open folders, and put everything on the
    devices."""
    _check_request(state)
    sampler = state.attempt.sampler
    density = sampler.suited(state.density)
    state.untracked = state.density.tracks and not density.tracks
    state.attempt = dataclasses.replace(state.attempt, density=density)
    sampler = state.sampler = sampler.prepare(density)
    # Replicas swap places instead.
    if isinstance(sampler.exchange, Resampler):
        sampler.exchange.check(state.num_chains)
    for finisher in sampler.finishers:
        finisher.check(density, state.num_chains)
    if state.draws.number is not None and not sampler.can_draw:
        raise CapabilityError(
            f"{type(sampler).__name__} without a kernel cannot go on drawing at level "
            "0.",
            where=density.described.where,
            fix="use cp.AnnealedMCMC(kernel, …) or cp.SMC(kernel), or take more chains "
            "instead of draws.",
        )
    sharded = compiled.in_parts(density, state.spread, sampler)
    state.first = sampler.first_level(density)
    on_host = dataclasses.replace(state.spread, mesh=None, copies=0)
    run = begin(
        state.key,
        state.num_chains,
        sampler.visits(density, state.attempt.pace),
        on_host,
        state.attempt.stream,
    )
    state.unbegun = run
    shapes = _shapes_of_start(state, run)
    if state.checkpoint is not None:
        state.checkpoints = RunCheckpoints(state, state.checkpoint, shapes)
        # A saved run resumes: `Run.visits`, `Run.closings` and `Writer.drawn` count the
        # work that is done, and the stages go on after it.
        run = state.checkpoints.saved or run
        state.began -= state.checkpoints.seconds
    state.writer = Writer(state, shapes)
    state.run = placed(run, state.spread)
    state.placed = compiled.on_mesh((sampler.in_numbers(), sharded), state.spread)
    state.watchers = _watchers(state)


def _check_request(state: State) -> None:
    """Refuse another precision than that of compilation, a sampler without a needed
    capability, and adaptive levels for a sampler without weights."""
    sampler = state.attempt.sampler
    in_double = jax.config.jax_enable_x64
    if getattr(state.density, "_in_double", in_double) != in_double:
        raise ProgramError(
            "jax_enable_x64 has changed since the program was compiled.",
            where=state.density.described.where,
            fix="compile again: cp.compile(program, …), after "
            f"jax.config.update('jax_enable_x64', {in_double}).",
        )
    check_capabilities(sampler, state.density)
    if state.attempt.pace is not None and sampler.weights is None:
        raise CapabilityError(
            "levels='adaptive' chooses levels by the variance of importance weights, "
            f"and {type(sampler).__name__} has no weights.",
            where=state.density.described.where,
            fix="pass sampler=cp.SMC(), or more chains, or an array of log-SNR as "
            "levels.",
        )


def _shapes_of_start(state: State, run: Run) -> Run | None:
    """Shapes of a run's arrays once its chains have started, for files; None where
    nothing is to be written."""
    files = (state.checkpoint, state.draws.number, state.draws.store)
    if all(each is None for each in files):
        return None
    # Compiled, so that all arrays are JAX's.
    start = eqx.filter_jit(state.sampler.start)
    shapes: Run = eqx.filter_eval_shape(start, run, state.density, state.first)
    return shapes


def _watchers(state: State) -> list[Callable[[State], None]]:
    """Watchers of a run, in the order in which they are called."""
    watchers: list[Callable[[State], None]] = []
    if state.checkpoints is not None:
        watchers.append(state.checkpoints)
    # Of one level nothing lies ahead.
    if state.first > 0:
        watchers.append(PilotRun(state))
    return watchers


def descend(state: State, title: str = "") -> None:
    """Visit the levels that are left, in stretches of one compiled loop."""
    sampler, density = state.placed
    name = type(sampler).__name__
    title = title or name
    total = state.first + 1
    if state.run.chains is None:
        state.report(title, total, doing="compiling the first draws")
        state.run = compiled.start(sampler, state.run, density, state.first)
        if _asks_memory(state):
            state.start_points = _points(state.run)
    kernel = ""
    if sampler.kernel is not None:
        kernel = f" with {type(state.sampler.kernel).__name__}"
    state.report(title, total, doing=f"compiling a level of {name}{kernel}")
    visits = state.visits
    stretch = Stretch(state.bars.pause)
    while not visits.arrived:
        made = int(visits.made)
        number = state.run.spread.number
        end = number(made + stretch.size)
        run = compiled.advance(sampler, state.run, density, end, number(0))
        state.run = jax.block_until_ready(run)
        visits = state.visits
        stretch.adapt(int(visits.made) - made)
        level = int(visits.visited()[-1])
        done = total - level
        state.report(title, total, done, **_facts_of_level(state.run, level))
        if visits.arrived and (state.sampler.finishers or state.draws.number):
            # The status needs them to see whether later moves cross between modes.
            state.arrival_points = _points(state.run)


def _facts_of_level(run: Run, level: int) -> dict[str, Any]:
    """Diagnostics of a level for the progress bar, without those that are NaN."""
    records = {
        "acceptance": run.records.acceptance,
        "ESS": run.records.ess,
        "ancestors": run.records.ancestors,
    }
    facts = {}
    for name, values in records.items():
        mean = float(np.mean(np.asarray(values)[level]))
        if not np.isnan(mean):
            facts[name] = mean
    return facts


def finish(state: State) -> None:
    """Move chains at level 0 by the sampler's finishers.

    Interrupted, the chains are as they were before the finisher, and a run that
    continues from its checkpoint begins this finisher anew.
    """
    for finisher in state.sampler.finishers[int(state.run.closings) :]:
        state.run = _finished(state, finisher)


def _finished(state: State, finisher: Finisher) -> Run:
    """Return the run after rounds of one finisher: a few at least where it has as many,
    then until the population drifts no more and does not contradict the target."""
    density = state.placed[1]
    weighted = state.sampler.weights is not None
    title = finisher.title
    total = finisher.rounds
    run = state.run
    closings = run.spread.number(int(run.closings) + 1)
    if not finisher.begins(lambda: _scores(state.sampler, run)):
        return dataclasses.replace(run, closings=closings)
    points = _points(run)
    trail = Trail(points, np.asarray(run.ancestors))
    spent = int(run.spent)
    most_renewed = float(run.renewed)
    drift = 0.0
    departure = 0.0
    if finisher.stay:
        state.report(title, total, done=trail.rounds, doing="moving at level 0")
        run = _stayed(state, finisher.stay)
        spent += finisher.stay * state.sampler.moves.kernel.evaluations_per_step
        points = _points(run)
        departure = _departure(state, finisher, run, points)
    while trail.rounds < total:
        if trail.rounds >= finisher.fewest_rounds and not drift + departure > 0:
            break
        state.report(title, total, done=trail.rounds, doing="fitting the population")
        fitted = _fitted(state, finisher, run, points)
        if fitted is None:
            break
        state.report(title, total, done=trail.rounds, doing=f"compiling {finisher!r}")
        number = run.spread.number(trail.rounds)
        run = compiled.close(finisher, run, density, fitted, number)
        run = jax.block_until_ready(run)
        points = _points(run)
        trail.add(points)
        spent += finisher.evaluations(fitted)
        drift = finisher.drift(trail, state.density, weighted)
        # If global moves took nearly all chains anywhere, their modes may keep them
        # from then on. The few that alone could move would not be a sample.
        most_renewed = np.fmax(most_renewed, float(run.renewed))
        renewed = most_renewed >= 1 - tuning.GLOBAL_MOVES.most_stuck
        if drift and renewed and _in_modes(state, points):
            drift = finisher.drift(trail, state.density, True)
        departure = _departure(state, finisher, run, points)
        state.report(title, total, done=trail.rounds, drift=drift)
    measured = run.drift
    if total > 1:  # a single round measures no drift
        measured = run.spread.number(drift, np.float32)
    entered = max(float(run.entered), finisher.entered(trail))
    # Chains that an earlier round took across modes have not gone back.
    return dataclasses.replace(
        run,
        closings=closings,
        spent=run.spread.number(spent),
        drift=measured,
        entered=run.spread.number(entered, np.float32),
        renewed=run.spread.number(most_renewed, run.renewed.dtype.type),
    )


def _fitted(
    state: State,
    finisher: Finisher,
    run: Run,
    points: Float[np.ndarray, "chains size"],
) -> PyTree[Array] | None:
    """Return what a finisher fits to the population; None where nothing can be
    fitted."""
    told = None
    trials = finisher.trials(state.density)
    if trials is not None:
        density = state.placed[1]
        told = np.asarray(compiled.measure(finisher, run, density, trials))
    elif finisher.by_scores:
        told = _scores(state.sampler, run)
    fitted = finisher.fit(points, state.density, told)
    if fitted is None:
        return None
    return run.spread.place(jax.tree.map(np.asarray, fitted), everywhere)


def _stayed(state: State, transitions: int) -> Run:
    """Return the run after transitions of the sampler's own kernel at level 0."""
    sampler, density = state.placed
    number = state.run.spread.number
    end = number(int(state.visits.made))
    run = compiled.advance(sampler, state.run, density, end, number(transitions))
    return jax.block_until_ready(run)


def _departure(
    state: State,
    finisher: Finisher,
    run: Run,
    points: Float[np.ndarray, "chains size"],
) -> float:
    """Return by how much the points of a run contradict the target, as the finisher
    asks it."""
    scores = _scores(state.sampler, run)
    return finisher.departure(points, scores, np.asarray(run.ancestors))


def _asks_memory(state: State) -> bool:
    """Return whether latents have to forget where they began, and no warm-up asks it:
    importance weights, and swaps with noisier levels, support them without."""
    sampler = state.sampler
    if sampler.kernel is None:
        return False
    warmed = any(isinstance(each, WarmUp) for each in sampler.finishers)
    supported = sampler.weights is not None or isinstance(sampler, ReplicaExchange)
    kinds = {site.kind for site in state.density.sites.values()}
    moved = "static" in kinds and not kinds & {"held", "discrete"}
    return moved and not (warmed or supported)


def _memory(state: State) -> float:
    """Return the greatest correlation of a latent with where it began; 0 where it is
    small, or is not asked."""
    if not state.visits.arrived or not _asks_memory(state):
        return 0.0
    start = state.start_points
    if start is None:  # of a run that goes on from a checkpoint
        sampler, density = state.placed
        unbegun = placed(state.unbegun, state.spread)
        start = _points(compiled.start(sampler, unbegun, density, state.first))
    return memory(start, _points(state.run), Layout.of_density(state.density))


def _in_modes(state: State, points: Float[np.ndarray, "chains size"]) -> bool:
    """Return whether chains lie in separated modes of level 0."""
    layout = Layout.of_density(state.density)
    alpha = float(np.asarray(state.density.schedule.alpha)[0])
    values: Any = points  # arithmetic alone, which is NumPy's too
    return in_separated_modes(state.density, layout.position(values, alpha))


def draw(state: State) -> None:
    """Take draws at level 0, in stretches of one compiled loop."""
    sampler, density = state.placed
    writer = state.writer
    total = state.draws.number or 0
    stretch = Stretch(state.bars.pause)
    while writer.drawn < total and writer.failure is None:
        begin = writer.drawn
        end = min(begin + min(stretch.size, writer.at_once), writer.boundary)
        drawn = compiled.draw(
            sampler,
            state.run,
            density,
            state.run.spread.number(begin),
            state.run.spread.number(end),
            state.run.spread.number(state.draws.thin),
            writer.at_once,
        )
        run, values = jax.block_until_ready(drawn)
        writer.add(end, values)
        stretch.adapt(end - begin)
        state.run = run
        writer.drawn = end
        if end == writer.boundary:
            writer.flush()
        acceptance = np.mean(np.asarray(run.records.acceptance)[0])
        state.report("draws", total, done=writer.drawn, acceptance=acceptance)


def record(state: State) -> None:
    """Write the rest of the draws, repeat the run over every other level, by which
    errors are estimated, and make the result."""
    state.writer.flush()
    # After a failed write the last checkpoint stays: it belongs to the draws on disk.
    if state.checkpoints is not None and state.writer.failure is None:
        state.checkpoints.finish(state)
    repetition = _repeated(state)
    state.memory = _memory(state)
    sampler, density = state.placed
    values, positions = compiled.read(sampler, state.run, density)
    samples = state.writer.samples(values)
    result = summarised(state, samples, host(positions), repetition)
    state.result = state.writer.finish(result)


STAGES = [prepare, descend, finish, draw, record]


class PilotRun:
    """A watcher that sends a few chains ahead by `density.check`, once, in a run that
    turns out to be long, compares its networks with samples of their own factors, and
    warns of the findings.

    The run's own samples answer the same question better, at its end; a run of seconds
    waits for them, as compiling the pilot run would take as long. The duration of a
    level is measured from the second stretch on, as the first one compiles. The rounds
    at level 0 that are sure to follow count by their evaluations: those of a hierarchy
    take most of its time.
    """

    def __init__(self, state: State):
        visits = state.first + 1
        if state.attempt.pace is not None:
            visits = min(visits, tuning.CHECKS.fewest_chosen)
        at_levels = state.sampler.evaluations(visits)
        at_end = 0
        for finisher in state.sampler.finishers:
            at_end += finisher.least_evaluations(state.density)
        # As many levels would take as long as the rounds at level 0.
        self.levels_at_end = at_end * visits / max(at_levels, 1)
        evaluations = at_levels + at_end
        most = tuning.CHECKS.share * state.num_chains * evaluations
        self.of_factors = (
            in_question(state.density) and check_evaluations(state.density) <= most
        )
        # A small budget shortens the path of samples; it does not skip the check.
        self.evaluations = most
        of_each = most / tuning.CHECKS.most_chains
        levels = own_levels(state.density, of_each).evaluations
        weighted = state.sampler.weights is not None
        by_weights = weighs_by_scores(weighted, state.density)
        self.integrated = integrates_score(state.sampler.kernel)
        self.of_scores = (
            self.integrated or by_weights
        ) and tuning.CHECKS.most_chains * levels <= most
        self.due = self.of_factors or self.of_scores
        self.began: tuple[float, int] | None = None  # time and level

    def __call__(self, state: State) -> None:
        if not self.due:
            return
        now = time.monotonic()
        level = int(state.visits.visited()[-1])
        if self.began is None or level >= self.began[1]:
            self.began = (now, level)
            return
        began, above = self.began
        self.due = False
        seconds_left = (level + self.levels_at_end) * (now - began) / (above - level)
        # All processes must decide alike: the check is a computation of them all.
        (is_long,) = from_first_process(int(seconds_left >= tuning.CHECKS.long_seconds))
        if not is_long:
            return
        for finding in self.findings(state):
            warnings.warn(
                f"{finding.message} The run goes on; Ctrl-C ends it.", stacklevel=2
            )

    def findings(self, state: State) -> list[Finding]:
        """Findings on the factors, and on the scores that line integrals rely on."""
        density = state.density
        key = KeyUse.PILOT.folded_into(state.key)
        findings: list[Finding] = []
        if self.of_factors:
            findings += check(density, key, tuning.PILOT.chains)
        if self.of_scores:
            # Conditions are draws of the latents' priors.
            keys = jax.random.split(key, tuning.CHECKS.most_chains)
            positions = jax.vmap(density.initial)(keys)
            scores = own_scores(density, positions, key, self.evaluations)
            findings += OwnScores().findings(scores, density, self.integrated)
        return findings


class Stretch:
    """Number of levels, or draws, between two reports: as many as fit in ``pause``
    seconds."""

    def __init__(self, pause: float):
        self.pause = pause
        self.size = 1
        self.began = time.monotonic()

    def adapt(self, made: int) -> None:
        """Set the next size, at most four times this one, after ``made`` pieces since
        the last call."""
        now = time.monotonic()
        seconds = max(now - self.began, 1e-6)
        self.began = now
        size = max(1, min(4 * self.size, int(made * self.pause / seconds)))
        (self.size,) = from_first_process(size)


def _points(run: Run) -> Float[np.ndarray, "chains dims"]:
    """The population's points v, (N, D), on the host."""
    return np.asarray(run.spread.cut(host(run.chains.position)))


def _scores(sampler: Sampler, run: Run) -> Float[np.ndarray, "chains dims"]:
    """∇log π of the population's points, (N, D), on the host; of tokens no columns."""
    scores = sampler.scores(run)
    if scores is None:
        return np.zeros((len(run.ancestors), 0))
    return np.asarray(run.spread.cut(host(scores)))


def _repeated(state: State) -> Repetition | None:
    """The run once more, over every other level and by other random numbers; None where
    no error is to be estimated by it, or the run did not arrive."""
    sampler = state.sampler
    if sampler.check_order is None or not sampler.estimates_evidence(state.density):
        return None
    if state.interrupted or not state.visits.arrived:
        return None
    coarse = copy.copy(state)
    visits = state.run.visits.coarser()
    run = begin(state.key, state.num_chains, visits, series=state.attempt.stream + 1)
    coarse.run = placed(run, state.spread)
    coarse.watchers = []
    try:
        descend(coarse, "error of the evidence")
    except KeyboardInterrupt:
        return None
    positions = None
    # Other finishers make another population of the run's chains than of these.
    kept = all(finisher.keeps_modes for finisher in sampler.finishers)
    if kept and not state.density.comparable_modes:
        _, positions = compiled.read(state.placed[0], coarse.run, state.placed[1])
        positions = state.spread.cut(host(positions))
    return Repetition(
        log_evidence=float(np.asarray(coarse.run.log_evidence)),
        variance=float(np.asarray(coarse.run.evidence_variance)),
        positions=positions,
        evaluations=sampler.evaluations(int(coarse.visits.made)),
    )
