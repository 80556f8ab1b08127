"""The way down the levels: step, weigh, meet, move, as phases around ONE place where
the density is evaluated.

A level of the loop is a few phases. Each chooses where every chain is to be evaluated
next (predict, correct, begin a transition), the density is evaluated there, and another
says what follows (weigh and resample, advance a trajectory, accept). So networks are in
the compiled loop once, and random numbers are drawn once a phase.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import PyTree

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Evaluation, unknown
from composeprob.kernels import Info, mean_acceptance
from composeprob.kernels.gibbs import measures_metric
from composeprob.pytree import all_finite, where
from composeprob.samplers.layout import Layout
from composeprob.samplers.moves import Particles, Tally, Transitions
from composeprob.samplers.random import key_of, normals, stream
from composeprob.samplers.resampling import Resampler, num_distinct, statistics
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
from composeprob.samplers.weights import Weight, first_weight
from composeprob.schedule import Noise

Drift = tuple[Array, Array, Array, Array]
"""S, r, the part of r that comes from the schedule's drift, ∇log G: what a step and its
fit need of an evaluation."""


class Way(eqx.Module):
    """A step of every chain."""

    drift: Array  # S + u where it starts, (n, d)
    rate: Array  # r under the control there, (n,)
    noise: Array  # of `Step.predict`, (n, d)
    log_ratio: Array  # of `Step.predict`, (n,)
    # whether a chain has no finite score, or met a wall, and stays where it was in x,
    # (n,)
    stays: Array
    error: Array  # how far the correction moved it, (n,)


class Level(eqx.Module):
    """The level in progress."""

    phase: Array  # which of the table's phases is next
    turn: Array  # how many transitions have been made
    query: Array  # where every chain is evaluated next, v, (n, D)
    way: Way  # the step that leads to the level
    above: Fit | None  # the fit where the step starts, if it is corrected
    found: Drift | None  # what was found where `Step.predict` led, if it is corrected
    trajectory: tuple[
        PyTree[Array], ...
    ]  # of the transition that a kernel is making, by block
    began: (
        Array | None
    )  # where each chain's transitions began and its score there, (n, 2D), if a metric is measured
    tally: Tally  # what the transitions so far add up to


class Now(eqx.Module):
    """What chains share in a phase."""

    start: Noise  # of the level above
    end: Noise  # of this one
    falls: Array  # whether there is a step between them
    normals: Array  # standard normal numbers of every chain, (n, …)
    above: Fit | None = None  # the population's fit where the step starts
    here: Fit | None = None  # and where it ends
    law: Step | None = None  # of a step of second order, by what is known so far


Carry = tuple[Run, Level]


def drift_of(found: Evaluation, dims: int) -> Drift:
    """What a step and its fit need of evaluations; of those without parts the score
    stands for all that is known."""
    score, parts = found.score[..., :dims], found.terms
    if parts is not None:
        return parts.drift, parts.rate, parts.excess, score - parts.drift
    return (
        score,
        jnp.zeros(score.shape[:-1]),
        jnp.zeros(score.shape[:-1]),
        jnp.zeros_like(score),
    )


@dataclasses.dataclass(eq=False)
class Descent:
    """The phases of a sampler's levels under one density, while they are traced: its
    loop is `phase`, around a run and its level in progress, from `blank` on.

    Args:
        density, run: what the chains are of.
        moves, step, weights, meet: of a `Sampler`, each of which may be missing.
        terms: whether evaluations have their density terms.
        leads: to levels, before transitions there. Without, all are made at level 0,
            where chains are, towards draws or in a warm-up: down the levels step sizes
            lag behind, and at level 0 they stop shrinking, so in the first
            `Transitions.settling` they adapt once more, ever less, and are fixed then;
            metrics do not change.
    """

    density: AnnealedDensity
    run: dataclasses.InitVar[Run]
    moves: Transitions
    step: ReverseStep | None = None
    weights: str | None = None
    meet: Resampler | None = None
    terms: bool = False
    leads: bool = True

    def __post_init__(self, run: Run) -> None:
        density, moves, weights = self.density, self.moves, self.weights
        self.spread, self.words, self.num_chains = (
            run.spread,
            run.words,
            len(run.ancestors),
        )
        self.layout = Layout.of_density(density)
        self.step = self.step if self.layout.dims else None
        self.half = (self.spread.numbers(run.words) >= self.num_chains // 2).astype(
            jnp.int32
        )
        self.power = self.layout.power(density, density.num_levels - 1)
        self.control = self.step is not None and self.step.control == "affine"
        self.corrects = self.step is not None and self.step.order == 2
        self.twist = self.step.twist if self.step is not None and self.terms else None
        self.bends = (
            self.corrects
            and self.terms
            and self.twist != 0
            and density.evaluator.guided
        )
        self.weight = Weight(weights, density, self.layout, self.twist)
        self.blocks = () if moves is None else tuple(moves.kernel.order)
        self.plain = not (weights or self.blocks)
        self.opaque = not all(
            self.moves.kernel.kernels[b].resumable for b in self.blocks
        )
        # Transitions of a visit, and how many of them are not counted, as step sizes
        # adapt.
        self.total, self.adapting = (
            (0, 0) if moves is None else (moves.total, moves.total - moves.count)
        )
        if not self.leads:
            self.adapting = moves.settling
        sizes = [] if self.opaque else [self.moves.noise_size(b) for b in self.blocks]
        self.noise_size = max([self.layout.dims, *sizes])

        # The phases: what is done before and after each evaluation, which one of its
        # block's transition that is, and which draw of the level's it takes, −1 for
        # none. The first ones lead to the level, the others are those of one transition
        # of all blocks, which is repeated.
        self.lead = 1 + self.corrects if self.leads else 0
        waiting = lambda run, level, now: (
            level
        )  # what is to be evaluated next is known already  # noqa: E731
        self.before: list[Callable[..., Level]] = [
            *[self.predict, self.correct][: self.lead],
            waiting,
        ]
        after: list[Callable[..., Carry]] = [self.predicted, self.arrived]
        self.after = after[2 - self.lead :]
        self.phases = [(0, 0, 0, 0), (1, 1, 0, -1)][: self.lead]
        for b in () if self.opaque else self.blocks:
            count = self.moves.kernel.kernels[b].evaluations_per_step
            self.before.append(partial(self.begin, b))
            self.after += [partial(self.advance, b)] * (count > 1) + [
                partial(self.finish, b)
            ]
            begin, finish = len(self.before) - 1, len(self.after) - 1
            self.phases.append((begin, finish - (count > 1), 0, 1 + b))
            self.phases += [
                (self.lead, finish - (i < count - 1), i, -1) for i in range(1, count)
            ]
        if self.opaque:
            self.after.append(self.transition)
            self.phases.append((self.lead, self.lead, 0, -1))

    # The loop

    def blank(self, run: Run) -> Level:
        """No level in progress: chains are about to step to it, or, at the first one,
        are there."""
        n, d, points = len(run.words), self.layout.dims, run.chains.position
        zero = jnp.zeros((n,))
        way = Way(
            jnp.zeros((n, d)),
            zero,
            jnp.zeros((n, d)),
            zero,
            jnp.zeros((n,), bool),
            zero,
        )
        now = self.now(run)
        phase = jnp.where(now.falls, 0, max(self.lead - 1, 0)).astype(jnp.int32)
        found, fit, law = drift_of(run.chains.evaluation, d), None, None
        if self.control or self.corrects:
            fit = jax.eval_shape(self.fit, run, points, found, now.end)
            law = (
                jax.eval_shape(self.law, now, fit, fit, now.falls)
                if self.corrects
                else None
            )
        self.unfitted = fit, fit, law
        blocks = () if self.opaque else range(len(self.blocks))
        trajectories = tuple(
            zeros_of(jax.eval_shape(partial(self.started, b), run, now)[0])
            for b in blocks
        )
        began = (
            jnp.zeros((n, 2 * self.layout.size))
            if self.blocks and measures_metric(self.moves.kernel)
            else None
        )
        tally = Tally.blank(points.shape[:-1], max(len(self.blocks), 1))
        above, found_there = (zeros_of(fit), found) if self.corrects else (None, None)
        return Level(
            phase,
            jnp.zeros_like(phase),
            points,
            way,
            above,
            found_there,
            trajectories,
            began,
            tally,
        )

    def phase(self, carry: Carry) -> Carry:
        """One evaluation of every chain, and what leads to it and follows from it."""
        run, level = carry
        before, after, _, draw = jnp.asarray(self.phases)[level.phase]
        now = self.now(run)
        drawn, fitted = (
            partial(self.normals, run, level, now, draw),
            partial(self.fitted, run, level, now),
        )
        now = dataclasses.replace(
            now, normals=jax.lax.cond(draw < 0, lambda: now.normals, drawn)
        )
        if self.control or self.corrects:
            above, here, law = jax.lax.cond(
                level.phase < self.lead, fitted, partial(zeros_of, self.unfitted)
            )
            now = dataclasses.replace(now, above=above, here=here, law=law)
            level = dataclasses.replace(level, above=above if self.corrects else None)
        level = jax.lax.switch(before, self.before, run, level, now)
        run, level = jax.lax.switch(
            after, self.after, run, level, now, self.evaluated(run, level, now)
        )
        over = level.phase == len(self.phases) - 1
        phase, turn = jnp.where(over, self.lead, level.phase + 1), level.turn + over
        level = dataclasses.replace(
            level, phase=phase.astype(jnp.int32), turn=turn.astype(jnp.int32)
        )
        if not self.leads:
            return run, level

        def leave() -> Carry:
            parts = {"phase": level.phase, "turn": level.turn, "tally": level.tally}
            return self.leave(run, level, now), dataclasses.replace(
                level, **jax.tree.map(jnp.zeros_like, parts)
            )

        return jax.lax.cond(over & (turn >= self.total), leave, lambda: (run, level))

    def now(self, run: Run) -> Now:
        """What chains share in a phase, without fits and random numbers."""
        (at, above), schedule = run.visits.now, self.density.schedule
        start, end = schedule.at(above), schedule.at(at)
        normals = jnp.zeros(
            (*run.chains.position.shape[:-1], self.noise_size),
            run.chains.position.dtype,
        )
        return Now(start, end, jnp.all(at < above), normals)

    def number(self, run: Run, level: Level, draw: Array | int) -> Array:
        """What a draw of the level's counts as among all of a chain's: 0 is the step's,
        1 + b that of block b in the transition that is being made."""
        draw, draws = (
            level.turn * len(self.blocks) + draw,
            1 + self.total * len(self.blocks),
        )
        return run.visits.number.astype(jnp.uint32) * draws + draw.astype(jnp.uint32)

    def normals(self, run: Run, level: Level, now: Now, draw: Array) -> Array:
        """Standard normal numbers of one of the level's draws, (n, …): as many as any
        of them takes."""
        number, like = self.number(run, level, draw), now.normals
        numbers = self.at_level(
            run,
            now,
            lambda _, words: normals(words, number, like.shape[-1], like.dtype),
        )
        return self.spread.map(numbers, self.words)

    def at_level(
        self, run: Run, now: Now, function: Callable[..., Tree]
    ) -> Callable[..., Tree]:
        """``function`` of a chain, given what is tuned and the noise of its level."""
        return partial(function, (run.tuning, now.end))

    def evaluated(self, run: Run, level: Level, now: Now) -> Evaluation:
        """Every chain's evaluation where it is to be made: not where kernels call the
        density themselves, and not where chains that are neither weighed nor moved
        end."""

        def evaluate() -> Evaluation:
            point = lambda at, v: self.layout.evaluate(
                self.density, v, at[1].index, self.terms
            )  # noqa: E731
            return self.spread.map(self.at_level(run, now, point), level.query)

        if not (self.opaque or self.plain):
            return evaluate()
        if not self.lead:
            return run.chains.evaluation
        skipped = level.phase >= self.lead if self.opaque else now.end.index == 0
        return jax.lax.cond(skipped, lambda: run.chains.evaluation, evaluate)

    # Step

    def fixed(self, noise: Noise) -> Array:
        """The control that needs no fit, (d,)."""
        return (
            fixed_control(self.power, noise.variance)
            if self.control
            else jnp.zeros_like(self.power)
        )

    def fitted(self, run: Run, level: Level, now: Now) -> tuple[Fit, Fit, Step | None]:
        """The fit where a step starts, before that is left, and where it led, once that
        is evaluated; and its law by what is known so far."""
        points, found = (
            run.chains.position,
            drift_of(run.chains.evaluation, self.layout.dims),
        )
        if not self.corrects:
            fit = self.fit(run, points, found, now.start)
            return fit, dataclasses.replace(fit, fixed=self.fixed(now.end)), None
        starts, ended = level.phase == 0, (level.query, level.found, now.end)
        here = self.fit(
            run,
            *jax.tree.map(
                partial(jnp.where, starts), (points, found, now.start), ended
            ),
        )
        assert level.above is not None
        start: Fit = where(starts, here, level.above)
        return start, here, self.law(now, start, here, ~starts)

    def fit(self, run: Run, points: Array, found: Drift, noise: Noise) -> Fit:
        """The affine fits of all chains at a level."""
        base, d = (
            self.layout.power(self.density, noise.index) / noise.variance,
            self.layout.dims,
        )
        fixed = self.fixed(noise)
        if self.num_chains < tuning.FIT.fewest or self.num_chains * d > tuning.FIT.most:
            return dataclasses.replace(Fit.none(base, self.bends), fixed=fixed)
        ratio = (
            noise.alpha**2 * jnp.asarray(self.density.schedule.drift_ratio)[noise.index]
        )

        def row(v: Array, found: Drift, log_weight: Array) -> Array:
            drift, rate, excess, pull = found
            rate = rate + jnp.sum(fixed) + (fixed * v[:d]) @ drift
            pulls = [pull] if self.bends else []
            return jnp.concatenate(
                [v[:d], drift, *pulls, jnp.stack([rate + ratio * excess, log_weight])]
            )

        table = self.spread.gather(self.spread.map(row, points, found, run.log_weights))
        known = self.spread.on_population(
            lambda t: fit(t[:, :-1], t[:, -1], base, self.control), table
        )
        return dataclasses.replace(known, fixed=fixed)

    def law(self, now: Now, above: Fit, here: Fit, both: Array) -> Step:
        """The law of a step that follows from fits: of its start, or of both of its
        ends."""
        first, s1, s0 = above.controlled_slope, now.start.variance, now.end.variance
        last = where(both, here.controlled_slope, first)
        step = Step.fitted(first, last, s1, s0, self.power, both)
        return step.bent(above, s1, s0) if self.bends else step

    def followed(
        self, y: Array, found: Evaluation, half: Array, fit: Fit | None
    ) -> tuple[Array, Array, Array]:
        """What one chain's step follows, S + u, (d,), the same with ∇log G, and r under
        the control."""
        (drift, rate, *_), score = drift_of(found, y.size), found.score[: y.size]
        if self.control and fit is not None:
            u, drift, rate = fit.controlled(y, drift, rate, half)
            score = score + u
        return drift, score, rate

    def predict(self, run: Run, level: Level, now: Now) -> Level:
        """Every chain's step from the level above by what is known at its start. Where
        there is none, chains stay where they are in x; at the first level, where they
        were drawn."""
        d, points, grows = (
            self.layout.dims,
            run.chains.position,
            now.start.alpha / now.end.alpha,
        )
        if self.step is None:
            scale = jnp.where(jnp.arange(self.layout.size) < d, grows, 1.0)
            return dataclasses.replace(
                level, query=self.spread.map(lambda v: v * scale, points)
            )
        law = now.law or Step.ddpm(now.start.variance, now.end.variance, self.step.eta)

        def chain(
            v: Array, found: Evaluation, half: Array, z: Array
        ) -> tuple[Array, Way]:
            y = v[:d]
            drift, score, rate = self.followed(y, found, half, now.above)
            moved, twisted, log_ratio = law.predict(y, drift, score, z, self.twist)
            # Where a score is no number the chain stays at its x: at its y it would
            # grow with α.
            lost = ~all_finite(moved)
            stays = lost | (
                self.walled(jnp.concatenate([moved, v[d:]]), now) & ~found.zero
            )
            moved = jnp.where(now.falls & ~stays, moved, jnp.where(lost, y * grows, y))
            log_ratio = jnp.where(stays, 0.0, log_ratio)
            way = Way(drift, rate, twisted, log_ratio, now.falls & stays, jnp.zeros(()))
            return jnp.concatenate([moved, v[d:]]), way

        query, way = self.spread.map(
            chain, points, run.chains.evaluation, self.half, now.normals[:, :d]
        )
        return dataclasses.replace(level, query=query, way=way)

    def walled(self, v: Array, now: Now) -> Array:
        """Whether a step of one chain, which nothing weighs, would end behind a wall:
        it is not made."""
        if self.weights or not self.density.evaluator.has_user_potential:
            return jnp.zeros((), bool)
        potential = self.density.evaluator.user_potential(
            self.layout.position(v, now.end.alpha), now.end.index
        )
        return jnp.isneginf(potential)

    def predicted(self, run: Run, level: Level, now: Now, found: Evaluation) -> Carry:
        """What was found where the step led, for its correction."""
        return run, dataclasses.replace(level, found=drift_of(found, self.layout.dims))

    def correct(self, run: Run, level: Level, now: Now) -> Level:
        """Every chain's step once more, by what is known at both ends; at the first
        level chains stay."""
        d, law, falls = self.layout.dims, now.law, now.falls
        assert law is not None

        def chain(
            v: Array, half: Array, way: Way, query: Array, there: Drift
        ) -> tuple[Array, Array]:
            end_drift, rate, *_ = there
            if self.control and now.here is not None:
                _, end_drift, _ = now.here.controlled(query[:d], end_drift, rate, half)
            moved, error = law.correct(
                v[:d], way.drift, query[:d], end_drift, way.noise
            )
            fine = all_finite(moved) & ~self.walled(
                jnp.concatenate([moved, query[d:]]), now
            )
            moved = jnp.where(falls & fine, moved, query[:d])
            return jnp.concatenate([moved, query[d:]]), jnp.where(
                fine & falls, error, jnp.where(falls, jnp.inf, 0.0)
            )

        query, error = self.spread.map(
            chain, run.chains.position, self.half, level.way, level.query, level.found
        )
        return dataclasses.replace(
            level, query=query, way=dataclasses.replace(level.way, error=error)
        )

    # Weigh and meet

    def arrived(self, run: Run, level: Level, now: Now, found: Evaluation) -> Carry:
        """Every chain where its step ended: weighed, resampled, and ready for its
        transitions."""
        at, backward, left = now.end.index, None, run.chains.evaluation
        if self.weights == "feynman_kac" and self.density.evaluator.has_user_potential:
            both = (
                (now.above, now.here)
                if now.above is not None and now.here is not None
                else None
            )
            backward = Backward.of_step(
                now.start.variance, now.end.variance, self.power, both, self.control
            )

        def chain(
            words: Array,
            half: Array,
            start: Particles,
            v: Array,
            found: Evaluation,
            way: Way,
        ) -> tuple[Particles, tuple[Array, Array]]:
            moved, none = Particles(v, found, start.inner), jnp.zeros(())

            def gained() -> tuple[Array, Array]:
                """−∞ where the density is 0; of chains that are weighed NaN where it,
                or a score, is no number."""
                _, _, rate = self.followed(v[: self.layout.dims], found, half, now.here)
                known = lambda chain: chain.evaluation.terms.rate  # noqa: E731
                before, after = (
                    eqx.tree_at(known, start, way.rate),
                    eqx.tree_at(known, moved, rate),
                )
                gain, more = self.weight.gained(
                    words, half, before, after, now.start, now.end, backward
                )
                gain = gain + way.log_ratio
                usable = all_finite((start.evaluation.terms.drift, found.score)) & (
                    gain < jnp.inf
                )
                return jnp.where(
                    usable | start.evaluation.zero | (not self.weights), gain, jnp.nan
                ), more

            gains = none, none
            if self.terms:  # reverse diffusion by itself weighs nothing where it begins
                first = partial(first_weight, self.layout, self.density, v, found, at)
                gains = jax.lax.cond(
                    now.falls, gained, lambda: (none if self.plain else first(), none)
                )
            return moved, gains

        batch = run.words, self.half, run.chains, level.query, found, level.way
        chains, (gain, more) = self.spread.map(chain, *batch)
        run = dataclasses.replace(run, chains=chains)
        if self.weights:
            run = self.met(run, at, gain, more, level.way.error)
        elif self.step is not None:
            bad = now.falls & self.spread.map(lambda e: ~all_finite(e.score), left)
            records = run.records.counting(at, self.spread.total(bad.astype(jnp.int32)))
            gain = jnp.where(
                self.step.eta == 1, jnp.where(level.way.stays, jnp.nan, gain), 0.0
            )
            run = dataclasses.replace(
                run, records=records, path_weights=run.path_weights + gain
            )
        if level.began is not None:
            began = jnp.concatenate(
                [run.chains.position, run.chains.evaluation.score], axis=1
            )
            level = dataclasses.replace(level, began=began)
        return run, level

    def met(self, run: Run, at: Array, gain: Array, more: Array, error: Array) -> Run:
        """The chains after they have been weighed against one another, and resampled
        where it is time."""
        meet, spread = self.meet, self.spread
        assert meet is not None
        log_weights = run.log_weights + gain
        log_weights = jnp.where(jnp.isfinite(log_weights), log_weights, -jnp.inf)
        table = jnp.stack(
            [log_weights, ~jnp.isnan(gain), run.log_weights, gain, error, more], axis=1
        )
        gathered, counted, *step, more = spread.gather(table).T
        found = spread.on_population(statistics, gathered, run.ancestors, more, *step)
        ess, log_mean, variance, off, spreading, moved = found
        run = dataclasses.replace(run, averaging=run.averaging + off)

        def exchange() -> Run:
            chosen = spread.on_population(
                lambda weights: meet.survivors(stream(run.shared, at), weights),
                gathered,
            )
            chains, ancestors = (
                spread.exchange(run.chains, chosen),
                run.ancestors[chosen],
            )
            total, equal = run.log_evidence + log_mean, jnp.zeros_like(log_weights)
            return dataclasses.replace(
                run,
                chains=chains,
                ancestors=ancestors,
                log_evidence=total,
                log_weights=equal,
            )

        kept = partial(dataclasses.replace, run, log_weights=log_weights)
        run = jax.lax.cond(meet.due(ess, at) | (at == 0), exchange, kept)
        records = run.records.counting(at, jnp.sum(counted == 0, dtype=jnp.int32))
        numbers = num_distinct(run.ancestors).astype(ess.dtype)
        records = records.at(
            at, ess=ess, ancestors=numbers, weight_variance=spreading, step_error=moved
        )
        return dataclasses.replace(run, records=records, evidence_variance=variance)

    # Move

    def started(self, b: int, run: Run, now: Now) -> tuple[PyTree[Array], Array]:
        """The transition of block b of every chain, where it has begun: its trajectory,
        and the first point of it."""
        begin = self.at_level(run, now, partial(self.moves.begin, b))
        return self.spread.map(
            begin, run.chains, now.normals[..., : self.moves.noise_size(b)]
        )

    def begin(self, b: int, run: Run, level: Level, now: Now) -> Level:
        """Block b's transition of every chain, up to its first evaluation."""
        return self.along(b, level, *self.started(b, run, now))

    def along(
        self, b: int, level: Level, trajectory: PyTree[Array], query: Array
    ) -> Level:
        """The level with another trajectory of block b, which leads to ``query``."""
        trajectories = (*level.trajectory[:b], trajectory, *level.trajectory[b + 1 :])
        return dataclasses.replace(level, query=query, trajectory=trajectories)

    def advance(
        self, b: int, run: Run, level: Level, now: Now, found: Evaluation
    ) -> Carry:
        """Block b's transition of every chain after an evaluation that was not its
        last: on to the next one."""
        i = jnp.asarray(self.phases)[level.phase, 2]
        on = self.at_level(run, now, partial(self.moves.advance, b, i))
        return run, self.along(
            b, level, *self.spread.map(on, run.chains, level.trajectory[b], found)
        )

    def finish(
        self, b: int, run: Run, level: Level, now: Now, found: Evaluation
    ) -> Carry:
        """Block b's transition of every chain after its last evaluation: accepted or
        rejected."""
        finish = self.at_level(run, now, partial(self.moves.finish, b))
        chains, info = self.spread.map(finish, run.chains, level.trajectory[b], found)
        return self.made(b, run, level, now, chains, info)

    def transition(self, run: Run, level: Level, now: Now, found: Evaluation) -> Carry:
        """A whole transition of kernels that call the density themselves, such as
        BlackJAX's."""
        counter = self.number(run, level, 1)
        keys = self.spread.map(
            self.at_level(run, now, lambda _, words: key_of(words, counter)), self.words
        )
        step = self.at_level(
            run, now, partial(self.moves.step, self.density, self.terms)
        )
        chains, info = self.spread.map(step, keys, run.chains)
        for b in self.blocks:
            run, level = self.made(
                b,
                run,
                level,
                now,
                chains,
                jax.tree.map(lambda entries, b=b: entries[..., b], info),
            )
        return run, level

    def made(
        self, b: int, run: Run, level: Level, now: Now, chains: Particles, info: Info
    ) -> Carry:
        """The chains after a transition of block b: tallied, and its step size
        adapted."""
        moves, tuning, counted = (
            self.moves,
            list(run.tuning),
            level.turn >= self.adapting,
        )
        step = moves.steps_in_x(run.tuning, now.end)[..., b]
        level = dataclasses.replace(
            level, tally=level.tally.adding(b, info, counted, step)
        )
        mean = mean_acceptance(info.acceptance, self.spread.total, self.num_chains)
        tuning[b] = moves.adapted(
            b, tuning[b], mean, self.num_chains, self.pace(b, level.turn)
        )
        return dataclasses.replace(run, chains=chains, tuning=tuple(tuning)), level

    def pace(self, b: int, turn: Array) -> Array | float:
        """How fast block b's step size adapts: not after a warm-up."""
        if not self.leads:
            return jnp.clip(2 - 2 * turn / max(self.adapting, 1), 0.0, 1.0)
        rule = self.moves.adaptive[b]
        return (
            turn < self.adapting
            if self.adapting and rule is not None and rule.warmup
            else 1.0
        )

    # Leave

    def leave(self, run: Run, level: Level, now: Now) -> Run:
        """The level is done: what its transitions came to is recorded, and metrics
        follow from them."""
        if self.blocks:
            moves, at, spread, tally = (
                self.moves,
                now.end.index,
                self.spread,
                level.tally,
            )
            acceptance, error, bad = tally.means(
                spread, moves, moves.count, self.num_chains
            )
            records = run.records.counting(at, bad)
            records = records.at(
                at,
                acceptance=acceptance,
                step_size=tally.steps / moves.count,
                quadrature_error=error,
            )
            run = dataclasses.replace(run, records=records)
            if level.began is not None:
                change = (
                    jnp.concatenate(
                        [run.chains.position, run.chains.evaluation.score], axis=1
                    )
                    - level.began
                )
                moved, changed = jnp.split(change, 2, axis=1)
                metrics = moves.measured(spread, run.tuning, now.end, moved, changed)
                run = dataclasses.replace(run, tuning=metrics)
        return dataclasses.replace(
            run, visits=run.visits.onwards(self.density.schedule, run.records)
        )


def at_target(
    run: Run,
    density: AnnealedDensity,
    moves: Transitions,
    words: Array,
    first: Array | int,
    end: Array | int,
) -> tuple[Run, Tally]:
    """The run after transitions first … end − 1 at level 0, whose random numbers are
    those of ``words``, (n, 2), and what they add up to."""
    chains = dataclasses.replace(
        run.chains, evaluation=run.chains.evaluation.without_terms
    )
    run = dataclasses.replace(run, chains=chains, words=words)
    way = Descent(density, run, moves, leads=False)
    level = dataclasses.replace(way.blank(run), turn=jnp.asarray(first, jnp.int32))
    run, level = jax.lax.while_loop(
        lambda carry: carry[1].turn < end, way.phase, (run, level)
    )
    return run, level.tally


def moved_to(run: Run, chains: Particles) -> Run:
    """The run with chains elsewhere at level 0. What only weights read belongs to where
    they were, and is unknown."""
    parts = run.chains.evaluation.terms
    found = dataclasses.replace(
        chains.evaluation, terms=None if parts is None else unknown(parts)
    )
    return dataclasses.replace(
        run, chains=dataclasses.replace(chains, evaluation=found)
    )
