"""The descent of the levels (step, weight, resample, move) as phases around ONE place
where the density is evaluated.

A level of the loop is a few phases. Each chooses where every chain is to be evaluated
next (predict, correct, begin a transition), the density is evaluated there, and another
function says what follows (weight and resample, advance a trajectory, accept). So
networks are in the compiled loop once, and random numbers are drawn once a phase.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, PyTree, UInt32

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Evaluation, unknown
from composeprob.kernels import Info, mean_acceptance
from composeprob.kernels.gibbs import measures_metric
from composeprob.pytree import all_finite, where
from composeprob.samplers.layout import Layout
from composeprob.samplers.moves import Particles, Tally, Transitions
from composeprob.samplers.population import reweighted
from composeprob.samplers.random import key_of, normals
from composeprob.samplers.resampling import Resampler
from composeprob.samplers.run import Run
from composeprob.samplers.spread import Tree, zeros_of
from composeprob.samplers.step import (
    Backward,
    Fit,
    ReverseStep,
    Step,
    fit,
    fixed_control,
)
from composeprob.samplers.tracking import (
    Slopes,
    fitted_slopes,
    innovations,
    stepped,
)
from composeprob.samplers.weights import FeynmanKac, Passage, Weights
from composeprob.schedule import Noise

# Axes of the arrays below: "chains" are those of this device, "rungs" the replicas of a
# chain (`ReplicaExchange` alone has any), "dims" the d noised entries of v, and "size"
# all D of them.


class DriftTerms(NamedTuple):
    """Parts of an evaluation that a step and its fit need."""

    drift: Float[Array, "*chains dims"]  # S
    rate: Float[Array, "*chains"]  # r, without the part below
    excess: Float[Array, "*chains"]  # the part of r from the schedule's drift
    pull: Float[Array, "*chains dims"]  # ∇log G


class StepRecord(eqx.Module):
    """The step of every chain to the level in progress."""

    drift: Float[Array, "chains dims"]  # S + u where it starts
    rate: Float[Array, " chains"]  # r under the control there
    noise: Float[Array, "chains dims"]  # of `Step.predict`
    log_ratio: Float[Array, " chains"]  # of `Step.predict`
    # Chains without a finite score, or in front of a wall, stay where they were in x.
    stays: Bool[Array, " chains"]
    error: Float[Array, " chains"]  # how far the correction moved the chain


class StepFits(NamedTuple):
    """Fits over the population at both ends of a step, and the law that they give."""

    above: Fit | None = None  # where it starts
    here: Fit | None = None  # where it ends
    law: Step | None = None  # of a step of second order


class LevelState(eqx.Module):
    """The state of the level in progress."""

    phase: Int[Array, ""]  # the next row of the table of phases
    turn: Int[Array, ""]  # transitions made so far
    # Transitions to make at level 0 after all visits; 0 on the way down, None if the
    # sampler makes none.
    stay: Int[Array, ""] | None
    query: Float[Array, "chains *rungs size"]  # where chains are evaluated next, v
    step_record: StepRecord
    fits: StepFits
    # Of a step that is corrected: the evaluation where `Step.predict` led
    predicted: DriftTerms | None
    trajectories: tuple[PyTree[Array], ...]  # transitions under way, by block
    # Position and score of each chain before its transitions, if a metric is measured.
    origin: Float[Array, "chains *rungs twice_size"] | None
    tally: Tally  # sums over the transitions so far


class PhaseContext(eqx.Module):
    """Values that all chains share in a phase."""

    start: Noise  # of the level above
    end: Noise  # of the level in progress
    falls: Bool[Array, ""]  # True if a step lies between them
    normals: Float[Array, "chains *rungs noise"]  # standard normals of every chain


Carry: TypeAlias = tuple[Run, LevelState]
Before: TypeAlias = Callable[[Run, LevelState, PhaseContext], LevelState]
After: TypeAlias = Callable[[Run, LevelState, PhaseContext, Evaluation], Carry]

NO_DRAW = -1


class Phase(NamedTuple):
    """One row of the table of phases."""

    before: Before  # sets where chains are evaluated
    after: After  # takes the evaluation
    evaluation: int = 0  # its number within the transition of a block
    draw: int = NO_DRAW  # its random numbers: 0 the step's, 1 + b those of block b


EVALUATION = Phase._fields.index("evaluation")
"""The column of the table of phases that `Descent.advance` reads."""


def drift_of(evaluation: Evaluation, dims: int) -> DriftTerms:
    """Return the parts of evaluations that steps need; without density terms the score
    stands for S, and everything else is 0."""
    score = evaluation.score[..., :dims]
    terms = evaluation.terms
    if terms is not None:
        rate = terms.rate
        tracked = evaluation.tracked
        if tracked is not None:
            rate = rate + tracked.rate
        return DriftTerms(terms.drift, rate, terms.excess, score - terms.drift)
    return DriftTerms(
        drift=score,
        rate=jnp.zeros(score.shape[:-1]),
        excess=jnp.zeros(score.shape[:-1]),
        pull=jnp.zeros_like(score),
    )


class Phases(Protocol):
    """Phases of chains, each of which evaluates every factor once."""

    def blank(self, run: Run) -> Any:
        """Return the state before the first phase, with its number as ``turn``."""

    def phase(self, carry: tuple[Run, Any]) -> tuple[Run, Any]:
        """Go through the next phase."""


@dataclasses.dataclass(eq=False)
class Descent:
    """The phases of a sampler's levels under one density, while they are traced.

    A loop begins with a run and the `blank` state of its level, and calls `phase`.

    Args:
        density: of all levels.
        run: the chains, of which sizes, words and spread are read.
        moves, step, weights, exchange: of a `Sampler`, each of which may be missing.
        terms: whether evaluations have their density terms.
        leads: whether steps lead to levels, before the transitions there. If not, all
            transitions are made at level 0, where the chains are, towards draws or in a
            warm-up. Down the levels step sizes lag behind the noise, which stops
            falling at level 0: so they adapt once more, ever less, in the first
            `Transitions.settling` transitions, and are fixed then. Metrics do not
            change.
        stays: whether chains that came down may `stay` at level 0 for further
            transitions, whose step sizes settle in the same way.
    """

    density: AnnealedDensity
    run: dataclasses.InitVar[Run]
    moves: Transitions
    step: ReverseStep | None = None
    weights: Weights | None = None
    exchange: Resampler | None = None
    terms: bool = False
    leads: bool = True
    stays: bool = False

    def __post_init__(self, run: Run) -> None:
        self._set_chains(run)
        self._set_step()
        self._set_transitions()
        self._set_phases()

    def _set_chains(self, run: Run) -> None:
        """Set sizes, and the half of the population that each chain belongs to."""
        self.spread = run.spread
        self.words = run.words
        self.num_chains = len(run.ancestors)
        self.layout = Layout.of_density(self.density)
        # Controls are fitted over one half and used by the other.
        second_half = self.spread.numbers(run.words) >= self.num_chains // 2
        self.half = second_half.astype(jnp.int32)

    def _set_step(self) -> None:
        """Set the parts of a step that this density and this sampler have use for."""
        density = self.density
        if not self.layout.dims:
            self.step = None
        step = self.step
        self.power = self.layout.power(density, density.num_levels - 1)
        self.control = step is not None and step.control == "affine"
        self.corrects = step is not None and step.order == 2
        self.twist_limit = None
        if step is not None and self.terms:
            self.twist_limit = step.twist
        # Only a density that guides (observations, user energies) has a ∇log G whose
        # slope a twisted step can make use of.
        guided = self.corrects and self.terms and self.twist_limit != 0
        self.bends = guided and density.evaluator.guided

    def _set_transitions(self) -> None:
        """Set the blocks, and the numbers of transitions at a level: `total` in all,
        the first `adapting` of which are not recorded, as step sizes adapt in them."""
        moves = self.moves
        self.blocks: tuple[int, ...] = ()
        self.total = 0
        self.adapting = 0
        self.settling = 0
        if moves is not None:
            self.blocks = tuple(moves.kernel.order)
            self.total = moves.total
            self.adapting = moves.total - moves.count
            self.settling = moves.settling
        if not self.leads:
            self.adapting = self.settling
        # Reverse diffusion by itself needs no evaluation where it ends.
        self.steps_only = self.weights is None and not self.blocks
        # A kernel with a `step` of its own cannot be cut at its evaluations.
        self.opaque = not all(
            self.moves.kernel.kernels[b].resumable for b in self.blocks
        )
        sizes = [self.layout.dims]
        if not self.opaque:
            sizes += [moves.noise_size(b) for b in self.blocks]
        self.noise_size = max(sizes)

    def _set_phases(self) -> None:
        """Set the table of phases: those that lead to the level, then those of one
        transition of all blocks, which is repeated."""
        leading = self._leading_phases()
        moving = self._transition_phases()
        self.phases = [*leading, *moving]
        self.num_leading = len(leading)
        # `jax.lax.switch` takes a list of branches and an index. A branch is traced
        # once, however many phases share it.
        befores = [phase.before for phase in leading]
        befores += [self.wait, *(phase.before for phase in moving)]
        self.before: list[Before] = list(dict.fromkeys(befores))
        self.after: list[After] = list(dict.fromkeys(p.after for p in self.phases))
        rows = []
        for phase in self.phases:
            before = self.before.index(phase.before)
            after = self.after.index(phase.after)
            rows.append((before, after, phase.evaluation, phase.draw))
        self.table: Int[np.ndarray, "phases 4"] = np.array(rows)

    def _leading_phases(self) -> list[Phase]:
        """Phases of the step: once predicted, and once more corrected if it is of
        second order."""
        if not self.leads:
            return []
        if not self.corrects:
            return [Phase(before=self.predict, after=self.arrived, draw=0)]
        return [
            Phase(before=self.predict, after=self.predicted, draw=0),
            Phase(before=self.correct, after=self.arrived),
        ]

    def _transition_phases(self) -> list[Phase]:
        """Phases of one transition: of each block as many as its kernel evaluates the
        density."""
        if self.opaque:
            return [Phase(before=self.wait, after=self.transition)]
        phases = []
        for b in self.blocks:
            count = self.moves.kernel.kernels[b].evaluations_per_step
            advance = partial(self.advance, b)
            finish = partial(self.finish, b)
            before: Before = partial(self.begin, b)
            draw = 1 + b
            for i in range(count):
                after = advance if i < count - 1 else finish
                phases.append(Phase(before, after, evaluation=i, draw=draw))
                # The next evaluation of this transition is where `advance` leads, and
                # `begin` drew the random numbers of them all.
                before = self.wait
                draw = NO_DRAW
        return phases

    # The loop

    def blank(self, run: Run) -> LevelState:
        """Return a level that has not begun: chains are about to step to it, or, at the
        first one, are there."""
        n = len(run.words)
        points = run.chains.position
        step_record = blank_record(n, self.layout.dims)
        context = self.context(run)
        # Chains at the first level are there already: only the last leading phase,
        # which weights them, is left.
        arrival = max(self.num_leading - 1, 0)
        phase = jnp.where(context.falls, 0, arrival).astype(jnp.int32)
        stay = None
        if self.stays:
            stay = jnp.zeros_like(phase)
        drift = drift_of(run.chains.evaluation, self.layout.dims)
        shapes_of_fits = self._shapes_of_fits(run, points, drift, context)
        trajectories = []
        for b in () if self.opaque else range(len(self.blocks)):
            trajectory, _ = jax.eval_shape(partial(self.started, b), run, context)
            trajectories.append(zeros_of(trajectory))
        origin = None
        if self.blocks and measures_metric(self.moves.kernel):
            origin = jnp.zeros((n, 2 * self.layout.size))
        tally = Tally.blank(points.shape[:-1], max(len(self.blocks), 1))
        predicted = drift if self.corrects else None
        return LevelState(
            phase=phase,
            turn=jnp.zeros_like(phase),
            stay=stay,
            query=points,
            step_record=step_record,
            fits=zeros_of(shapes_of_fits),
            predicted=predicted,
            trajectories=tuple(trajectories),
            origin=origin,
            tally=tally,
        )

    def staying(self, state: LevelState, stay: Array | int) -> LevelState:
        """Return the state of chains that make ``stay`` transitions where they are; the
        same state if that is 0."""
        stay = jnp.asarray(stay, jnp.int32)
        phase = jnp.where(stay > 0, self.num_leading, state.phase)
        return dataclasses.replace(state, stay=stay, phase=phase.astype(jnp.int32))

    def _shapes_of_fits(
        self, run: Run, points: Array, drift: DriftTerms, context: PhaseContext
    ) -> StepFits:
        """Shapes of what `fitted` returns."""
        if not (self.control or self.corrects):
            return StepFits()
        fit = jax.eval_shape(self.fit, run, points, drift, context.end)
        if not self.corrects:
            return StepFits(fit, fit)
        law = jax.eval_shape(self.law, context, fit, fit, context.falls)
        return StepFits(fit, fit, law)

    def phase(self, carry: Carry) -> Carry:
        """Run one phase: choose where each chain is evaluated, evaluate it there, and
        act on the evaluation."""
        run, state = carry
        before, after, _, draw = jnp.asarray(self.table)[state.phase]
        context = self.with_normals(run, state, self.context(run), draw)
        if self.control or self.corrects:
            state = self.with_fits(run, state, context)
        state = jax.lax.switch(before, self.before, run, state, context)
        # The only place where the loop evaluates the density: outside of the branches,
        # which would each have its networks.
        evaluation = self.evaluated(run, state, context)
        run, state = jax.lax.switch(after, self.after, run, state, context, evaluation)
        return self.onwards(run, state, context)

    def onwards(self, run: Run, state: LevelState, context: PhaseContext) -> Carry:
        """Return the run and its level before the next phase, which may be the first of
        another level."""
        transition_over = state.phase == len(self.phases) - 1
        phase = jnp.where(transition_over, self.num_leading, state.phase + 1)
        turn = state.turn + transition_over
        state = dataclasses.replace(
            state, phase=phase.astype(jnp.int32), turn=turn.astype(jnp.int32)
        )
        if not self.leads:
            return run, state

        due: Array | int = self.total
        if state.stay is not None:
            due = jnp.where(state.stay > 0, state.stay, due)

        def leave() -> Carry:
            # The next level begins with its first phase, no transition, empty sums.
            counters = {
                "phase": state.phase,
                "turn": state.turn,
                "stay": state.stay,
                "tally": state.tally,
            }
            zeros = jax.tree.map(jnp.zeros_like, counters)
            after = self.left(run, state, context)
            return after, dataclasses.replace(state, **zeros)

        def go_on() -> Carry:
            return run, state

        return jax.lax.cond(transition_over & (turn >= due), leave, go_on)

    def context(self, run: Run) -> PhaseContext:
        """Return what chains share in a phase, without random numbers."""
        level, level_above = run.visits.now
        schedule = self.density.schedule
        start = schedule.at(level_above)
        end = schedule.at(level)
        points = run.chains.position
        normals = jnp.zeros((*points.shape[:-1], self.noise_size), points.dtype)
        falls = jnp.all(level < level_above)
        return PhaseContext(start, end, falls, normals)

    def with_normals(
        self, run: Run, state: LevelState, context: PhaseContext, draw: Array
    ) -> PhaseContext:
        """Return the context with the random numbers of a draw, if there is one."""
        drawn = partial(self.normals, run, state, context, draw)
        numbers = jax.lax.cond(draw < 0, lambda: context.normals, drawn)
        return dataclasses.replace(context, normals=numbers)

    def with_fits(
        self, run: Run, state: LevelState, context: PhaseContext
    ) -> LevelState:
        """Return the state with new fits in the phases that lead to a level."""
        fits = jax.lax.cond(
            state.phase < self.num_leading,
            partial(self.fitted, run, state, context),
            lambda: state.fits,
        )
        return dataclasses.replace(state, fits=fits)

    def draw_number(self, run: Run, state: LevelState, draw: Array | int) -> Array:
        """Return the number of a draw, which counts a chain's random numbers: at every
        level one draw for the step, and one for each block in each transition."""
        # Counted by the level's number, not by the number of visits: draws of different
        # levels have different numbers, whichever levels a run visits.
        per_level = 1 + self.total * len(self.blocks)
        within_level = state.turn * len(self.blocks) + draw
        first_of_level = run.visits.number.astype(jnp.uint32) * per_level
        if state.stay is not None:
            # Transitions of chains that stay are counted behind those of all levels.
            behind = jnp.where(state.stay > 0, self.density.num_levels * per_level, 0)
            first_of_level = first_of_level + behind.astype(jnp.uint32)
        return first_of_level + within_level.astype(jnp.uint32)

    def normals(
        self, run: Run, state: LevelState, context: PhaseContext, draw: Array
    ) -> Float[Array, "chains *rungs noise"]:
        """Standard normal numbers of one of the level's draws: as many as the longest
        of them takes."""
        number = self.draw_number(run, state, draw)
        like = context.normals

        def of_chain(_: object, words: Array) -> Array:
            return normals(words, number, like.shape[-1], like.dtype)

        return self.spread.map(self.at_level(run, context, of_chain), self.words)

    def at_level(
        self, run: Run, context: PhaseContext, function: Callable[..., Tree]
    ) -> Callable[..., Tree]:
        """Bind the tuned quantities and the level's noise as the first argument of a
        function of one chain."""
        return partial(function, (run.tuning, context.end))

    def evaluated(
        self, run: Run, state: LevelState, context: PhaseContext
    ) -> Evaluation:
        """Evaluate the density at every chain's query, except where nothing needs it.

        Kernels that call the density themselves evaluate in their own transitions, and
        chains that are neither weighted nor moved need no evaluation where they end.
        """

        def evaluate() -> Evaluation:
            def of_chain(setting: tuple[object, Noise], v: Array) -> Evaluation:
                _, noise = setting
                return self.layout.evaluate(self.density, v, noise.index, self.terms)

            return self.spread.map(self.at_level(run, context, of_chain), state.query)

        if not (self.opaque or self.steps_only):
            return evaluate()
        if not self.num_leading:
            return run.chains.evaluation
        if self.opaque:
            skipped = state.phase >= self.num_leading
        else:
            skipped = context.end.index == 0
        return jax.lax.cond(skipped, lambda: run.chains.evaluation, evaluate)

    def wait(self, run: Run, state: LevelState, context: PhaseContext) -> LevelState:
        """Return the level as it is: what is evaluated next has been chosen."""
        return state

    # Step

    def fixed(self, noise: Noise) -> Float[Array, " dims"]:
        """Slope of the control that needs no fit."""
        if self.control:
            return fixed_control(self.power, noise.variance)
        return jnp.zeros_like(self.power)

    def fitted(self, run: Run, state: LevelState, context: PhaseContext) -> StepFits:
        """Return the fits at both ends of the step, and its law by the evaluations made
        so far.

        Before the step the chains are where it starts, after its prediction where that
        led: one fit a phase, at one place or the other.
        """
        points = run.chains.position
        drift = drift_of(run.chains.evaluation, self.layout.dims)
        if not self.corrects:
            above = self.fit(run, points, drift, context.start)
            here = dataclasses.replace(above, fixed=self.fixed(context.end))
            return StepFits(above, here)
        starts = state.phase == 0
        at_start = points, drift, context.start
        at_end = state.query, state.predicted, context.end
        place = jax.tree.map(partial(jnp.where, starts), at_start, at_end)
        here = self.fit(run, *place)
        assert state.fits.above is not None
        above = where(starts, here, state.fits.above)
        return StepFits(above, here, self.law(context, above, here, ~starts))

    def fit(self, run: Run, points: Array, drift: DriftTerms, noise: Noise) -> Fit:
        """Fit the affine models of all chains at a level; too few chains, or too many
        numbers, get the fit that needs none."""
        d = self.layout.dims
        base = self.layout.power(self.density, noise.index) / noise.variance
        fixed = self.fixed(noise)
        if self.num_chains < tuning.FIT.fewest or self.num_chains * d > tuning.FIT.most:
            return dataclasses.replace(Fit.default(base, self.bends), fixed=fixed)
        drift_ratio = jnp.asarray(self.density.schedule.drift_ratio)[noise.index]
        ratio = noise.alpha**2 * drift_ratio

        def row(v: Array, at_v: DriftTerms, log_weight: Array) -> Array:
            # r + ∇·u + ⟨u, S⟩ of the fixed control u = fixed·y
            rate = at_v.rate + jnp.sum(fixed) + (fixed * v[:d]) @ at_v.drift
            pulls = [at_v.pull] if self.bends else []
            last = jnp.stack([rate + ratio * at_v.excess, log_weight])
            return jnp.concatenate([v[:d], at_v.drift, *pulls, last])

        def of_table(table: Array) -> Fit:
            return fit(table[:, :-1], table[:, -1], base, self.control)

        rows = self.spread.map(row, points, drift, run.log_weights)
        fitted = self.spread.on_population(of_table, self.spread.gather(rows))
        return dataclasses.replace(fitted, fixed=fixed)

    def law(self, context: PhaseContext, above: Fit, here: Fit, both: Array) -> Step:
        """Return the law of a step, by the fit at its start, or by those at ``both`` of
        its ends."""
        first = above.controlled_slope
        s1 = context.start.variance
        s0 = context.end.variance
        last = where(both, here.controlled_slope, first)
        step = Step.fitted(first, last, s1, s0, self.power, both)
        if self.bends:
            return step.bent(above, s1, s0)
        return step

    def followed(
        self, y: Array, evaluation: Evaluation, half: Array, fit: Fit | None
    ) -> tuple[Float[Array, " dims"], Float[Array, " dims"], Float[Array, ""]]:
        """Return the drift S + u that one chain's step follows, the same with ∇log G,
        and r under the control."""
        drift, rate, *_ = drift_of(evaluation, y.size)
        score = evaluation.score[: y.size]
        if self.control and fit is not None:
            u, drift, rate = fit.controlled(y, drift, rate, half)
            score = score + u
        return drift, score, rate

    def predict(self, run: Run, state: LevelState, context: PhaseContext) -> LevelState:
        """Step every chain from the level above by drift and score at its start.
        Without a step, and at the first level, chains stay where they are in x."""
        d = self.layout.dims
        points = run.chains.position
        growth = context.start.alpha / context.end.alpha  # of y where x stays
        if self.step is None:
            scale = jnp.where(jnp.arange(self.layout.size) < d, growth, 1.0)
            query = self.spread.map(lambda v: v * scale, points)
            return dataclasses.replace(state, query=query)
        law = state.fits.law or Step.ddpm(
            context.start.variance, context.end.variance, self.step.eta
        )

        def chain(
            v: Array, evaluation: Evaluation, half: Array, z: Array
        ) -> tuple[Array, StepRecord]:
            y = v[:d]
            above = state.fits.above
            drift, score, rate = self.followed(y, evaluation, half, above)
            moved, noise, log_ratio = law.predict(y, drift, score, z, self.twist_limit)
            # Where a score is NaN the chain stays at its x: at its y it would grow with
            # α.
            lost = ~all_finite(moved)
            blocked = self.behind_wall(jnp.concatenate([moved, v[d:]]), context)
            # A chain that is behind the wall already may move there: it has to get out.
            stays = lost | (blocked & ~evaluation.zero)
            steps = context.falls & ~stays
            moved = jnp.where(steps, moved, jnp.where(lost, y * growth, y))
            step_record = StepRecord(
                drift=drift,
                rate=rate,
                noise=noise,
                log_ratio=jnp.where(stays, 0.0, log_ratio),
                stays=context.falls & stays,
                error=jnp.zeros(()),
            )
            return jnp.concatenate([moved, v[d:]]), step_record

        query, step_record = self.spread.map(
            chain, points, run.chains.evaluation, self.half, context.normals[:, :d]
        )
        return dataclasses.replace(state, query=query, step_record=step_record)

    def behind_wall(
        self, v: Float[Array, " size"], context: PhaseContext
    ) -> Bool[Array, ""]:
        """Return whether a step of one chain would end where a user's potential is −∞:
        such a step is not made. Weighted chains make it, and lose their weight."""
        if self.weights is not None or not self.density.evaluator.has_user_potential:
            return jnp.zeros((), bool)
        potential = self.density.evaluator.user_potential(
            self.layout.position(v, context.end.alpha), context.end.index
        )
        return jnp.isneginf(potential)

    def predicted(
        self,
        run: Run,
        state: LevelState,
        context: PhaseContext,
        evaluation: Evaluation,
    ) -> Carry:
        """Keep the evaluation where the step led, for its correction."""
        evaluation = self.tracked(run, state, context, evaluation)
        drift = drift_of(evaluation, self.layout.dims)
        return run, dataclasses.replace(state, predicted=drift)

    def correct(self, run: Run, state: LevelState, context: PhaseContext) -> LevelState:
        """Make every chain's step once more, by the drifts at both of its ends; at the
        first level chains stay."""
        d = self.layout.dims
        falls = context.falls
        _, here, law = state.fits
        assert law is not None

        def chain(
            v: Array, half: Array, record: StepRecord, query: Array, at_end: DriftTerms
        ) -> tuple[Array, Array]:
            end_drift = at_end.drift
            if self.control and here is not None:
                _, end_drift, _ = here.controlled(
                    query[:d], end_drift, at_end.rate, half
                )
            moved, error = law.correct(
                v[:d], record.drift, query[:d], end_drift, record.noise
            )
            blocked = self.behind_wall(jnp.concatenate([moved, query[d:]]), context)
            usable = all_finite(moved) & ~blocked
            moved = jnp.where(falls & usable, moved, query[:d])
            corrected = jnp.concatenate([moved, query[d:]])
            # ∞ marks a correction that could not be made; means leave it out.
            without = jnp.where(falls, jnp.inf, 0.0)
            return corrected, jnp.where(usable & falls, error, without)

        points = run.chains.position
        query, error = self.spread.map(
            chain, points, self.half, state.step_record, state.query, state.predicted
        )
        step_record = dataclasses.replace(state.step_record, error=error)
        return dataclasses.replace(state, query=query, step_record=step_record)

    # Weight and resample

    def tracked(
        self, run: Run, state: LevelState, context: PhaseContext, evaluation: Evaluation
    ) -> Evaluation:
        """Return the evaluation where every chain's step led, with the log-densities
        of factors that chains carry there."""
        if evaluation.tracked is None:
            return evaluation
        start = context.start
        end = context.end
        falls = context.falls

        def row(chain: Particles, v: Array, evaluation: Evaluation) -> Array:
            return innovations(chain, v, evaluation, start, end, falls)

        def slopes_of(rows: Array) -> Slopes:
            return fitted_slopes(rows, end)

        rows = self.spread.map(row, run.chains, state.query, evaluation)
        slopes = self.spread.on_population(slopes_of, self.spread.gather(rows))

        def stepped_chain(
            chain: Particles, evaluation: Evaluation, row: Array, half: Array
        ) -> Evaluation:
            return stepped(chain, evaluation, row, slopes, half, start, end, falls)

        return self.spread.map(stepped_chain, run.chains, evaluation, rows, self.half)

    def arrived(
        self,
        run: Run,
        state: LevelState,
        context: PhaseContext,
        evaluation: Evaluation,
    ) -> Carry:
        """Move every chain to where its step ended: weighted, resampled, and ready for
        its transitions."""
        level = context.end.index
        backward = self.backward_kernel(state, context)
        # Chains without weights have path weights.
        rule: Weights = FeynmanKac()
        if self.weights is not None:
            rule = self.weights
        evaluation = self.tracked(run, state, context, evaluation)
        evaluation_above = run.chains.evaluation

        def chain(
            words: Array,
            half: Array,
            start: Particles,
            v: Array,
            evaluation: Evaluation,
            record: StepRecord,
        ) -> tuple[Particles, tuple[Array, Array]]:
            moved = Particles(v, evaluation, start.inner)
            zero = jnp.zeros(())
            if not self.terms:
                return moved, (zero, zero)

            def increment() -> tuple[Array, Array]:
                """Increment of the step: −∞ where the density is 0; of weighted chains
                NaN where it, or a score, is NaN."""
                y = v[: self.layout.dims]
                _, _, rate = self.followed(y, evaluation, half, state.fits.here)
                before = eqx.tree_at(rate_of, start, record.rate)
                after = eqx.tree_at(rate_of, moved, rate)
                passage = Passage(
                    start=before,
                    moved=after,
                    noise=context.start,
                    end=context.end,
                    density=self.density,
                    layout=self.layout,
                    words=words,
                    half=half,
                    backward=backward,
                    twist_limit=self.twist_limit,
                )
                gain, averaging = rule.increment(passage)
                gain = gain + record.log_ratio
                scores = start.evaluation.terms.drift, evaluation.score
                usable = all_finite(scores) & (gain < jnp.inf)
                # Where the density was 0 the increment is −∞, whatever the scores are.
                usable = usable | start.evaluation.zero | (self.weights is None)
                return jnp.where(usable, gain, jnp.nan), averaging

            def initial() -> tuple[Array, Array]:
                """Log-weight of the first draw; reverse diffusion by itself has none
                where it begins."""
                if self.steps_only:
                    return zero, zero
                log_weight = rule.first(self.layout, self.density, v, evaluation, level)
                return log_weight, zero

            return moved, jax.lax.cond(context.falls, increment, initial)

        chains, (gain, averaging) = self.spread.map(
            chain,
            run.words,
            self.half,
            run.chains,
            state.query,
            evaluation,
            state.step_record,
        )
        run = dataclasses.replace(run, chains=chains)
        if self.weights is not None:
            error = state.step_record.error
            assert self.exchange is not None
            run = reweighted(run, self.exchange, level, gain, averaging, error)
        elif self.step is not None:
            run = self.path_weighted(run, state, context, evaluation_above, gain)
        if state.origin is not None:
            state = dataclasses.replace(state, origin=positions_and_scores(run))
        return run, state

    def backward_kernel(
        self, state: LevelState, context: PhaseContext
    ) -> Backward | None:
        """Return the step's backward kernel, if a user's potential is averaged over
        it."""
        by_rate = self.weights is not None and self.weights.by_rate
        if not (by_rate and self.density.evaluator.has_user_potential):
            return None
        above, here, _ = state.fits
        both = None
        if above is not None and here is not None:
            both = above, here
        s1 = context.start.variance
        s0 = context.end.variance
        return Backward.of_step(s1, s0, self.power, both, self.control)

    def path_weighted(
        self,
        run: Run,
        state: LevelState,
        context: PhaseContext,
        evaluation_above: Evaluation,
        gain: Float[Array, " chains"],
    ) -> Run:
        """Add a step to the path weights of independent chains, and count those that
        had no finite score to follow."""
        lost = self.spread.map(lambda e: ~all_finite(e.score), evaluation_above)
        lost = context.falls & lost
        number_lost = self.spread.total(lost.astype(jnp.int32))
        records = run.records.counting(context.end.index, number_lost)
        assert self.step is not None
        # Only DDPM's ancestral step, η = 1, has a path whose weight is known.
        gain = jnp.where(state.step_record.stays, jnp.nan, gain)
        gain = jnp.where(self.step.eta == 1, gain, 0.0)
        path_weights = run.path_weights + gain
        return dataclasses.replace(run, records=records, path_weights=path_weights)

    # Move

    def started(
        self, b: int, run: Run, context: PhaseContext
    ) -> tuple[PyTree[Array], Array]:
        """Return the trajectories of new transitions of block b, and where each chain
        is evaluated first."""
        begin = self.at_level(run, context, partial(self.moves.begin, b))
        noise = context.normals[..., : self.moves.noise_size(b)]
        return self.spread.map(begin, run.chains, noise)

    def begin(
        self, b: int, run: Run, state: LevelState, context: PhaseContext
    ) -> LevelState:
        """Begin block b's transition of every chain, up to its first evaluation."""
        trajectory, query = self.started(b, run, context)
        return self.along(b, state, trajectory, query)

    def along(
        self, b: int, state: LevelState, trajectory: PyTree[Array], query: Array
    ) -> LevelState:
        """Return the level with another trajectory of block b, which leads to
        ``query``."""
        trajectories = list(state.trajectories)
        trajectories[b] = trajectory
        return dataclasses.replace(state, query=query, trajectories=tuple(trajectories))

    def advance(
        self,
        b: int,
        run: Run,
        state: LevelState,
        context: PhaseContext,
        evaluation: Evaluation,
    ) -> Carry:
        """Advance block b's transition of every chain after an evaluation that was not
        its last: on to the next one."""
        i = jnp.asarray(self.table)[state.phase, EVALUATION]
        advance = self.at_level(run, context, partial(self.moves.advance, b, i))
        trajectory, query = self.spread.map(
            advance, run.chains, state.trajectories[b], evaluation
        )
        return run, self.along(b, state, trajectory, query)

    def finish(
        self,
        b: int,
        run: Run,
        state: LevelState,
        context: PhaseContext,
        evaluation: Evaluation,
    ) -> Carry:
        """Accept or reject block b's transition of every chain after its last
        evaluation."""
        finish = self.at_level(run, context, partial(self.moves.finish, b))
        chains, info = self.spread.map(
            finish, run.chains, state.trajectories[b], evaluation
        )
        return self.made(b, run, state, context, chains, info)

    def transition(
        self,
        run: Run,
        state: LevelState,
        context: PhaseContext,
        evaluation: Evaluation,
    ) -> Carry:
        """Make a whole transition of kernels that call the density themselves, such as
        BlackJAX's."""
        number = self.draw_number(run, state, 1)

        def key(_: object, words: Array) -> Array:
            return key_of(words, number)

        keys = self.spread.map(self.at_level(run, context, key), self.words)
        step = partial(self.moves.step, self.density, self.terms)
        chains, info = self.spread.map(
            self.at_level(run, context, step), keys, run.chains
        )
        for b in self.blocks:
            info_of_block = jax.tree.map(lambda entries, b=b: entries[..., b], info)
            run, state = self.made(b, run, state, context, chains, info_of_block)
        return run, state

    def made(
        self,
        b: int,
        run: Run,
        state: LevelState,
        context: PhaseContext,
        chains: Particles,
        info: Info,
    ) -> Carry:
        """Return the chains after a transition of block b: tallied, and its step size
        adapted."""
        moves = self.moves
        counted = state.turn >= self.adapting
        step = moves.steps_in_x(run.tuning, context.end)[..., b]
        tally = state.tally.adding(b, info, counted, step)
        state = dataclasses.replace(state, tally=tally)
        mean = mean_acceptance(info.acceptance, self.spread.total, self.num_chains)
        pace = self.pace(b, state)
        tuned = list(run.tuning)
        tuned[b] = moves.adapted(b, tuned[b], mean, self.num_chains, pace)
        return dataclasses.replace(run, chains=chains, tuning=tuple(tuned)), state

    def pace(self, b: int, state: LevelState) -> Array | float:
        """Return the factor by which block b's step size adapts more slowly: 0 after a
        warm-up, where it is fixed."""
        turn = state.turn
        # At full pace for half of the transitions, then ever less.
        settling = jnp.clip(2 - 2 * turn / max(self.settling, 1), 0.0, 1.0)
        if not self.leads:
            return settling
        pace: Array | float = 1.0
        rule = self.moves.adaptive[b]
        if self.adapting and rule is not None and rule.warmup:
            pace = turn < self.adapting
        if state.stay is not None:
            return jnp.where(state.stay > 0, settling, pace)
        return pace

    # Leave

    def left(self, run: Run, state: LevelState, context: PhaseContext) -> Run:
        """Return the run after its transitions: to stay is no visit."""
        leave = partial(self.leave, run, state, context)
        if state.stay is None:
            return leave()
        return jax.lax.cond(state.stay > 0, lambda: run, leave)

    def leave(self, run: Run, state: LevelState, context: PhaseContext) -> Run:
        """Leave a level that is done: record its transitions, and measure metrics from
        them."""
        if self.blocks:
            run = self.recorded(run, state, context)
        if self.blocks and state.origin is not None:
            change = positions_and_scores(run) - state.origin
            moved, changed = jnp.split(change, 2, axis=1)
            tuned = self.moves.measured(
                self.spread, run.tuning, context.end, moved, changed
            )
            run = dataclasses.replace(run, tuning=tuned)
        visits = run.visits.onwards(self.density.schedule, run.records)
        return dataclasses.replace(run, visits=visits)

    def recorded(self, run: Run, state: LevelState, context: PhaseContext) -> Run:
        """Return the run with the means over the level's transitions in its records."""
        moves = self.moves
        level = context.end.index
        acceptance, error, number_lost = state.tally.means(
            self.spread, moves, moves.count, self.num_chains
        )
        records = run.records.counting(level, number_lost)
        records = records.at(
            level,
            acceptance=acceptance,
            step_size=state.tally.steps / moves.count,
            quadrature_error=error,
        )
        return dataclasses.replace(run, records=records)


def blank_record(num_chains: int, dims: int) -> StepRecord:
    """Return the record of a level before its step: zeros."""
    zero = jnp.zeros((num_chains,))
    return StepRecord(
        drift=jnp.zeros((num_chains, dims)),
        rate=zero,
        noise=jnp.zeros((num_chains, dims)),
        log_ratio=zero,
        stays=jnp.zeros((num_chains,), bool),
        error=zero,
    )


def rate_of(chain: Particles) -> Array:
    """Return the Feynman–Kac rate of one chain."""
    return chain.evaluation.terms.rate


def positions_and_scores(run: Run) -> Float[Array, "chains twice_size"]:
    """Return v and ∇log π of every chain, side by side."""
    chains = run.chains
    return jnp.concatenate([chains.position, chains.evaluation.score], axis=1)


def at_target(
    run: Run,
    density: AnnealedDensity,
    moves: Transitions,
    words: UInt32[Array, "chains 2"],
    first: Array | int,
    end: Array | int,
) -> tuple[Run, Tally]:
    """Make the transitions ``first`` … ``end`` − 1 at level 0, with the random numbers
    of ``words``; return the run and the tally of these transitions."""
    evaluation = run.chains.evaluation.without_terms
    chains = dataclasses.replace(run.chains, evaluation=evaluation)
    run = dataclasses.replace(run, chains=chains, words=words)
    descent = Descent(density, run, moves, leads=False)
    turn = jnp.asarray(first, jnp.int32)
    state = dataclasses.replace(descent.blank(run), turn=turn)

    def unfinished(carry: Carry) -> Array:
        return carry[1].turn < end

    run, state = jax.lax.while_loop(unfinished, descent.phase, (run, state))
    return run, state.tally


def moved_to(run: Run, chains: Particles) -> Run:
    """Return the run with its chains moved to other points at level 0.

    Density terms and tracked factors, which only weights read, belong to the former
    points: they become unknown.
    """
    before = run.chains.evaluation
    terms, tracked = unknown((before.terms, before.tracked))
    evaluation = dataclasses.replace(chains.evaluation, terms=terms, tracked=tracked)
    moved = dataclasses.replace(chains, evaluation=evaluation)
    return dataclasses.replace(run, chains=moved)
