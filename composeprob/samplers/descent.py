"""The way down the levels: step, weigh, meet, move, as phases around ONE place where the density is evaluated.

A level of the loop is a few phases. Each chooses where every chain is to be evaluated next (predict, correct, begin a
transition), the density is evaluated there, and another says what follows (weigh and resample, advance a trajectory,
accept). So networks are in the compiled loop once, whatever the sampler does with them, and random numbers are drawn
once a phase.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from enum import IntEnum
from functools import partial
from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import PyTree

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Evaluation
from composeprob.kernels import mean_acceptance
from composeprob.kernels.base import log_density_of
from composeprob.pytree import all_finite, where
from composeprob.samplers import fit as population
from composeprob.samplers.fit import Fit, controlled
from composeprob.samplers.layout import Layout
from composeprob.samplers.meet import evidence_variance, log_mean_weight, num_distinct, relative_ess, step_statistics
from composeprob.samplers.moves import Particles, Tally
from composeprob.samplers.random import key_of, normals, stream
from composeprob.samplers.run import Run
from composeprob.samplers.spread import Spread
from composeprob.samplers.step import Backward, Step, fixed_control
from composeprob.samplers.weights import averaged_potential, first_weight, incremental_log_weight
from composeprob.schedule import Noise

if TYPE_CHECKING:
    from composeprob.samplers.sampler import Sampler


class Before(IntEnum):
    """What is done before an evaluation; from `WAIT` + 1 on block b of a kernel begins a transition."""

    PREDICT = 0
    CORRECT = 1
    WAIT = 2


class Evaluated(IntEnum):
    """What was evaluated; from `ARRIVED` + 1 on a point of block b's trajectory."""

    PREDICTED = 0
    ARRIVED = 1


Drift = tuple[Array, Array, Array]
"""S, r and the part of r that comes from the schedule's drift: what a step and its fit need of an evaluation."""


class Level(eqx.Module):
    """The level in progress: where chains go, and what is known of the way.

    Attributes:
        query: where every chain is evaluated next, v, (n, D).
        found: S, r and excess where `Step.predict` led, if the step is corrected.
        noise, log_ratio, stays, error: of the step: its noise, (n, d), its log-ratio, whether a chain met a wall and
            stays, and how far the correction moved it, (n,).
        drift, rate: S + u and r under the control where the step starts, (n, d) and (n,).
        above, here: the population's fits at both ends of the step.
        law: of the step, by what is known so far, if it follows from fits.
        trajectory: of the transition that a kernel is making, by block.
        began: where each chain's transitions began and its score there, (n, 2D), if a metric is measured.
        tally: what the transitions so far add up to.
        before, after: which phase is next before and after the evaluation.
        transition, evaluation: how many were made of each.
    """

    query: Array
    found: Drift | None
    noise: Array
    log_ratio: Array
    stays: Array
    error: Array
    drift: Array
    rate: Array
    above: Fit | None
    here: Fit | None
    law: Step | None
    trajectory: tuple[PyTree[Array], ...]
    began: Array | None
    tally: Tally
    before: Array
    after: Array
    transition: Array
    evaluation: Array


Carry = tuple[Run, Level]


def drift_of(found: Evaluation) -> Drift:
    """What a fit needs of an evaluation."""
    return found.parts.drift, found.parts.rate, found.parts.excess


class Descent:
    """The phases of a sampler's levels under one density, while they are traced.

    Its loop is `phase`, around a run and its level in progress, from `blank` on; or, for chains that are neither
    weighed nor moved (`late`), `reverse`.
    """

    def __init__(self, sampler: Sampler, density: AnnealedDensity, run: Run):
        self.sampler, self.density, self.spread = sampler, density, run.spread
        self.layout, self.moves = Layout.of_density(density), sampler.moves
        self.step = sampler.step if self.layout.dims else None
        self.weighs, self.parts = sampler.weights is not None, sampler.needs_parts(density)
        self.late = not self.weighs and self.moves is None
        self.num_chains = len(run.ancestors)
        self.half = (self.spread.numbers(run.words) >= self.num_chains // 2).astype(jnp.int32)
        self.power = self.layout.power(density)
        self.order = 0 if self.step is None else self.step.order
        self.control = self.step is not None and self.step.control == "affine"
        self.fits = self.control or self.order == 2
        self.twist = self.step.twist if self.step is not None and self.parts else None
        blocks = () if self.moves is None else self.moves.sequence
        self.blocks = blocks
        self.counts = [0] if self.moves is None else [self.moves.kernel.kernels[b].evaluations_per_step for b in blocks]
        self.draws = 1 + (0 if self.moves is None else self.moves.total * len(blocks))
        self.opaque = self.moves is not None and not all(kernel.resumable for kernel in self.moves.kernel.kernels)

    # The loop

    def phase(self, carry: Carry) -> Carry:
        """One evaluation of every chain, and what leads to it and follows from it."""
        run, level = carry
        if self.fits:
            known = level.above, level.here, level.law
            known = jax.lax.cond(level.before < Before.WAIT, partial(self.fitted, run, level), lambda: known)
            level = dataclasses.replace(level, **dict(zip(("above", "here", "law"), known, strict=True)))
        begins = [] if self.opaque else [partial(self.begin, b) for b in self.blocks]
        correct = [self.correct] if self.order == 2 else [self.wait]
        level = jax.lax.switch(level.before, [self.predict, *correct, self.wait, *begins], run, level)
        found = self.evaluated(run, level)
        run, level = jax.lax.switch(level.after, [self.predicted, self.arrived, *self.ends()], run, level, found)
        return jax.lax.cond(level.before == Before.PREDICT, self.leave, lambda run, level: (run, level), run, level)

    def evaluated(self, run: Run, level: Level) -> Evaluation:
        """Every chain's evaluation where it is to be made."""

        def evaluate(query: Array) -> Evaluation:
            at, _ = run.visits.now
            return self.spread.map(lambda v: self.layout.evaluate(self.density, v, at, self.parts), query)

        if not self.opaque:
            return evaluate(level.query)
        return jax.lax.cond(level.after > Evaluated.ARRIVED, lambda _: run.chains.evaluation, evaluate, level.query)

    def blank(self, run: Run) -> Level:
        """No level in progress."""
        n, d, points = len(run.words), self.layout.dims, run.chains.points
        zero, number = jnp.zeros((n,)), jnp.int32(0)
        fit = Fit.none(jnp.zeros((d,))) if self.fits else None
        if fit is not None:
            shapes = jax.eval_shape(lambda: self.fit(run, points, drift_of(run.chains.evaluation), jnp.int32(0)))
            fit = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        found = drift_of(run.chains.evaluation) if self.order == 2 else None
        trajectories: tuple[PyTree[Array], ...] = ()
        if self.moves is not None and not self.opaque:
            blank = [jax.eval_shape(partial(self.started, b), run)[0] for b in range(len(self.blocks))]
            trajectories = tuple(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), t) for t in blank)
        began = jnp.zeros((n, 2 * self.layout.size)) if self.moves is not None and self.moves.measures else None
        tally = Tally.blank(n, max(len(self.blocks), 1))
        step = (jnp.zeros((n, d)), zero, jnp.zeros((n,), bool), zero, jnp.zeros((n, d)), zero)
        law = None
        if self.order == 2:
            assert fit is not None
            shapes = jax.eval_shape(lambda: self.law(run, fit, fit, jnp.asarray(True)))
            law = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return Level(points, found, *step, fit, fit, law, trajectories, began, tally, *(number,) * 4)

    # Step

    def noises(self, run: Run) -> tuple[Noise, Noise, Array]:
        """The noise of the level above and of this one, and whether there is a step between them."""
        at, above = run.visits.now
        schedule = self.density.schedule
        return schedule.at(above), schedule.at(at), at < above

    def number(self, run: Run, draw: Array | int) -> Array:
        """What this draw of the level counts as among all of a chain's."""
        at, _ = run.visits.now
        return at.astype(jnp.uint32) * self.draws + jnp.asarray(draw, jnp.uint32)

    def normals(self, run: Run, draw: Array | int, size: int) -> Array:
        """Standard normal numbers of one of the draws of a level, (n, size)."""
        number, dtype = self.number(run, draw), run.chains.points.dtype
        return self.spread.map(lambda words: normals(words, number, size, dtype), run.words)

    def fixed(self, noise: Noise) -> Array:
        """The control that needs no fit, (d,)."""
        return fixed_control(self.power, noise.variance) if self.control else jnp.zeros_like(self.power)

    def fitted(self, run: Run, level: Level) -> tuple[Fit, Fit, Step | None]:
        """The fits at both ends of a step: of where it starts, before that is left; of where it led, once evaluated."""
        at, above = run.visits.now
        starts, found = level.before == Before.PREDICT, drift_of(run.chains.evaluation)
        points, number = run.chains.points, above
        if self.order == 2:
            points, found = jax.tree.map(partial(jnp.where, starts), (points, found), (level.query, level.found))
            number = jnp.where(starts, above, at)
        here = self.fit(run, points, found, number)
        assert level.above is not None
        start: Fit = where(starts, here, level.above)
        return start, here, self.law(run, start, here, ~starts) if self.order == 2 else None

    def fit(self, run: Run, points: Array, found: Drift, number: Array) -> Fit:
        """The affine fits of all chains at a level."""
        noise, d = self.density.schedule.at(number), self.layout.dims
        base = self.power / noise.variance
        if self.num_chains < tuning.FIT.fewest or self.num_chains * d > tuning.FIT.most:
            return Fit.none(base)
        ratio, fixed = jnp.asarray(self.density.schedule.drift_ratio)[number], self.fixed(noise)

        def row(v: Array, found: Drift) -> Array:
            y, (drift, rate, excess) = v[:d], found
            _, _, rate = controlled(y, drift, rate, jnp.int32(0), None, fixed)
            return jnp.concatenate([y, drift, (rate + noise.alpha**2 * ratio * excess)[None]])

        rows = jnp.concatenate([self.spread.map(row, points, found), run.log_weights[:, None]], axis=1)
        table = self.spread.gather(rows)
        return self.spread.on_population(lambda t: population.fit(t[:, :-1], t[:, -1], base, self.control), table)

    def law(self, run: Run, above: Fit, here: Fit, both: Array) -> Step:
        """The law of a step that follows from fits: of its start, or of both of its ends."""
        noise, end, _ = self.noises(run)
        first = above.slope_with(self.fixed(noise))
        last = where(both, here.slope_with(self.fixed(end)), first)
        return Step.fitted(first, last, noise.variance, end.variance, self.power, both)

    def followed(
        self, y: Array, found: Evaluation, half: Array, fit: Fit | None, noise: Noise
    ) -> tuple[Array, Array, Array]:
        """What one chain's step follows, S + u, (d,), the same with ∇log G, and r under the control."""
        score = found.score[: self.layout.dims]
        if not self.parts:
            return score, score, jnp.zeros(())
        if not self.control:
            return found.parts.drift, score, found.parts.rate
        u, drift, rate = controlled(y, found.parts.drift, found.parts.rate, half, fit, self.fixed(noise))
        return drift, score + u, rate

    def predict(self, run: Run, level: Level) -> Level:
        """Every chain's step from the level above by what is known at its start. Where there is none, chains stay where
        they are in x; at the first level, where they were drawn."""
        noise, end, falls = self.noises(run)
        d, points = self.layout.dims, run.chains.points
        after = jnp.where(falls, Evaluated.PREDICTED if self.order == 2 else Evaluated.ARRIVED, Evaluated.ARRIVED)
        level = dataclasses.replace(level, before=jnp.int32(Before.WAIT), after=after.astype(jnp.int32))
        if self.step is None:
            ratio = jnp.concatenate([jnp.full((d,), noise.alpha / end.alpha), jnp.ones((points.shape[1] - d,))])
            return dataclasses.replace(level, query=self.spread.map(lambda v: v * ratio, points))
        law, above = level.law, level.above
        if law is None:
            law = Step.ddpm(noise.variance, end.variance, self.step.eta)
        plain = not self.weighs and self.density.evaluator.plain

        def chain(v: Array, found: Evaluation, half: Array, z: Array) -> tuple[Array, ...]:
            y = v[:d]
            drift, score, rate = self.followed(y, found, half, above, noise)
            moved, twisted, log_ratio = law.predict(y, drift, score, z, self.twist)
            # Where a score is no number the chain stays at its x: at its y it would grow with α.
            lost = ~all_finite(moved)
            still, stays = jnp.where(lost, y * (noise.alpha / end.alpha), y), lost
            if plain:  # a step through a wall is not made
                there = self.layout.position(jnp.concatenate([moved, v[d:]]), end.alpha)
                potential = self.density.evaluator.plain_potential(there, run.visits.now[0])
                stays = stays | (jnp.isneginf(potential) & ~found.zero)
            moved = jnp.where(falls & ~stays, moved, still)
            query = jnp.concatenate([moved, v[d:]])
            return query, twisted, jnp.where(stays, 0.0, log_ratio), falls & stays, drift, rate

        noises = self.normals(run, 0, d)
        moved = self.spread.map(chain, points, run.chains.evaluation, self.half, noises)
        query, twisted, log_ratio, stays, drift, rate = moved
        level = dataclasses.replace(level, query=query, noise=twisted, log_ratio=log_ratio, stays=stays)
        return dataclasses.replace(level, drift=drift, rate=rate, error=jnp.zeros_like(level.error))

    def predicted(self, run: Run, level: Level, found: Evaluation) -> Carry:
        """What was found where the step led, for its correction."""
        if self.order != 2:
            return run, level
        return run, dataclasses.replace(level, found=drift_of(found), before=jnp.int32(Before.CORRECT))

    def correct(self, run: Run, level: Level) -> Level:
        """Every chain's step once more, by what is known at both ends."""
        (_, end, _), d, law = self.noises(run), self.layout.dims, level.law
        assert law is not None

        def chain(
            v: Array, half: Array, drift: Array, query: Array, there: Drift, twisted: Array
        ) -> tuple[Array, Array]:
            end_drift, rate, _ = there
            if self.control:
                _, end_drift, _ = controlled(query[:d], end_drift, rate, half, level.here, self.fixed(end))
            moved, error = law.correct(v[:d], drift, query[:d], end_drift, twisted)
            fine = all_finite(moved)
            moved = jnp.concatenate([jnp.where(fine, moved, query[:d]), query[d:]])
            return moved, jnp.where(fine, error, jnp.inf)

        batch = (run.chains.points, self.half, level.drift, level.query, level.found, level.noise)
        query, error = self.spread.map(chain, *batch)
        after = jnp.int32(Evaluated.ARRIVED)
        return dataclasses.replace(level, query=query, error=error, before=jnp.int32(Before.WAIT), after=after)

    def wait(self, run: Run, level: Level) -> Level:
        """What is to be evaluated next is known already."""
        return level

    def reverse(self, run: Run) -> Run:
        """A visit of chains that are neither weighed nor moved: evaluated where their step starts, and not where it
        ends. Their path weights take the rate for that of the start on the whole way, and the potential at both ends of
        the path."""
        (at, above), (noise, end, falls) = run.visits.now, self.noises(run)
        assert self.sampler.step is not None
        eta = self.sampler.step.eta

        def visit(run: Run) -> Run:
            def evaluate(v: Array) -> Evaluation:
                return self.layout.evaluate(self.density, v, above, self.parts)

            def gained(found: Evaluation, log_ratio: Array) -> Array:
                parts, potential = found.parts, found.parts.log_potential + found.parts.log_prior
                rate = (end.alpha / noise.alpha) ** 2 * parts.rate
                gain = log_ratio + incremental_log_weight(parts, dataclasses.replace(parts, rate=rate), noise, end)
                gain = gain + jnp.where(at == 0, potential, 0.0)
                return gain - jnp.where(above == self.density.num_levels - 1, potential, 0.0)

            found = self.spread.map(evaluate, run.chains.points)
            run = dataclasses.replace(run, chains=dataclasses.replace(run.chains, evaluation=found))
            level = self.predict(run, self.blank(run))
            if self.parts:
                gain = self.spread.map(gained, found, level.log_ratio)
                run = dataclasses.replace(run, path_weights=run.path_weights + jnp.where(eta == 1, gain, 0.0))
            bad = self.spread.map(lambda e: ~all_finite(e.score), found)
            records = run.records.counting(at, self.spread.total(bad.astype(jnp.int32)))
            chains = dataclasses.replace(run.chains, points=level.query)
            return dataclasses.replace(run, chains=chains, records=records)

        run = jax.lax.cond(falls, visit, lambda run: run, run)
        return dataclasses.replace(run, visits=run.visits.onwards(self.density.schedule, run.records))

    # Weigh and meet

    def arrived(self, run: Run, level: Level, found: Evaluation) -> Carry:
        """Every chain where its step ended: weighed, resampled, and ready for its transitions."""
        at, _ = run.visits.now
        noise, end, falls = self.noises(run)
        backward = self.backward(level, noise, end)

        def chain(
            words: Array,
            half: Array,
            start: Particles,
            v: Array,
            found: Evaluation,
            way: tuple[Array, Array],
            stays: Array,
        ) -> tuple[Particles, Array]:
            moved = Particles(v, found, start.inner)
            if self.moves is not None:
                moved = self.moves.relevel(moved)
            gain = jnp.zeros(())
            if self.parts:
                gained = partial(self.gained, words, half, start, moved, way, level.here, noise, end, backward)
                initial = partial(first_weight, self.layout, self.density, v, found, at)
                gain = jax.lax.cond(falls, gained, initial)
            return moved, jnp.where(stays, jnp.nan, gain)

        stays = level.stays & (not self.weighs)
        batch = (run.words, self.half, run.chains, level.query, found, (level.log_ratio, level.rate), stays)
        chains, gain = self.spread.map(chain, *batch)
        came, run = run, dataclasses.replace(run, chains=chains)
        if self.weighs:
            run = self.met(run, gain, level.error)
        else:
            bad = falls & self.spread.map(lambda e: ~all_finite(e.score), came.chains.evaluation)
            if self.parts:
                run = dataclasses.replace(run, path_weights=run.path_weights + gain)
            if self.step is not None:
                total = self.spread.total(bad.astype(jnp.int32))
                run = dataclasses.replace(run, records=run.records.counting(at, total))
        level = dataclasses.replace(level, transition=jnp.int32(0), evaluation=jnp.int32(0))
        if self.moves is None:
            return run, dataclasses.replace(level, before=jnp.int32(Before.PREDICT))
        if level.began is not None:
            began = jnp.concatenate([run.chains.points, run.chains.evaluation.score], axis=1)
            level = dataclasses.replace(level, began=began)
        tally = Tally.blank(len(run.words), len(self.blocks))
        return run, self.following(dataclasses.replace(level, tally=tally), 0)

    def backward(self, level: Level, noise: Noise, end: Noise) -> Backward | None:
        """The step's backward kernel, where a potential is averaged over it."""
        if self.sampler.weights != "feynman_kac" or not self.density.evaluator.plain:
            return None
        fits = None if level.above is None or level.here is None or not self.fits else (level.above, level.here)
        return Backward.of_step(noise.variance, end.variance, self.power, fits, self.control)

    def gained(
        self,
        words: Array,
        half: Array,
        start: Particles,
        moved: Particles,
        way: tuple[Array, Array],
        here: Fit | None,
        noise: Noise,
        end: Noise,
        backward: Backward | None,
    ) -> Array:
        """What one chain's log-weight gains by its step: −∞ where the density is 0, NaN where it, or a score, is no
        number."""
        d, before, after = self.layout.dims, start.evaluation, moved.evaluation
        if self.sampler.weights == "density":
            total = log_density_of(after) - log_density_of(before)
        else:
            log_ratio, rate = way
            _, _, end_rate = self.followed(moved.points[:d], after, half, here, end)
            left, right = (dataclasses.replace(e.parts, rate=r) for e, r in ((before, rate), (after, end_rate)))
            if backward is not None:
                assert self.twist is not None
                average = partial(averaged_potential, density=self.density, layout=self.layout, most=self.twist)
                points = start.points, moved.points
                averaged = average(words, half, *points, left.log_potential, noise=noise, end=end, backward=backward)
                left = dataclasses.replace(left, log_potential=averaged)
            total = log_ratio + incremental_log_weight(left, right, noise, end)
        if not self.weighs:
            return total
        usable = all_finite((before.parts.drift, after.score)) & (total < jnp.inf)
        # A chain that was at a zero weighs nothing already: it has −∞/−∞ to gain.
        return jnp.where(before.zero, -jnp.inf, jnp.where(usable, total, jnp.nan))

    def met(self, run: Run, gain: Array, error: Array) -> Run:
        """The chains after they have been weighed against one another, and resampled where it is time."""
        at, _ = run.visits.now
        meet, spread = self.sampler.meet, self.spread
        assert meet is not None
        log_weights = run.log_weights + gain
        log_weights = jnp.where(jnp.isfinite(log_weights), log_weights, -jnp.inf)
        table = jnp.stack([log_weights, ~jnp.isnan(gain), run.log_weights, gain, error], axis=1)
        gathered, counted, *step = spread.gather(table).T

        def statistics(log_weights: Array, ancestors: Array, *step: Array) -> tuple[Array, ...]:
            variance = evidence_variance(log_weights, ancestors)
            return relative_ess(log_weights), log_mean_weight(log_weights), variance, *step_statistics(*step)

        ess, log_mean, variance, spreading, moved = spread.on_population(statistics, gathered, run.ancestors, *step)

        def exchange(chains: Particles) -> tuple[Particles, Array, Array, Array]:
            chosen = spread.on_population(lambda weights: meet.survivors(stream(run.shared, at), weights), gathered)
            return (
                spread.exchange(chains, chosen),
                jnp.zeros_like(log_weights),
                run.log_evidence + log_mean,
                run.ancestors[chosen],
            )

        def keep(chains: Particles) -> tuple[Particles, Array, Array, Array]:
            return chains, log_weights, run.log_evidence, run.ancestors

        chains, left, evidence, ancestors = jax.lax.cond(meet.due(ess, at), exchange, keep, run.chains)
        records = run.records.counting(at, jnp.sum(counted == 0, dtype=jnp.int32))
        numbers = num_distinct(ancestors).astype(ess.dtype)
        records = records.at(at, ess=ess, ancestors=numbers, weight_variance=spreading, step_error=moved)
        weighed = {"log_weights": left, "log_evidence": evidence, "evidence_variance": variance}
        return dataclasses.replace(run, chains=chains, ancestors=ancestors, records=records, **weighed)

    # Move

    def following(self, level: Level, place: int) -> Level:
        """The level when the block at this place of a transition is to begin."""
        if self.opaque:
            return dataclasses.replace(level, before=jnp.int32(Before.WAIT), after=jnp.int32(Evaluated.ARRIVED + 1))
        # Branches are in the order of a transition.
        before, after = jnp.int32(Before.WAIT + 1 + place), self.after_block(place, 0)
        return dataclasses.replace(level, before=before, after=after, evaluation=jnp.int32(0))

    def started(self, b: int, run: Run, number: Array | int = 0) -> tuple[PyTree[Array], Array]:
        """The transition of block b of every chain, where it has begun: its trajectory, and the first point of it."""
        moves, (at, _) = self.moves, run.visits.now
        assert moves is not None
        begin = partial(moves.begin, b, run.tuning, self.density.schedule.at(at))
        return self.spread.map(begin, run.chains, self.normals(run, number, moves.noise_size(b)))

    def begin(self, b: int, run: Run, level: Level) -> Level:
        """Block b's transition of every chain, up to its first evaluation."""
        number = 1 + level.transition * len(self.blocks) + b
        trajectory, query = self.started(b, run, number)
        trajectories = (*level.trajectory[:b], trajectory, *level.trajectory[b + 1 :])
        return dataclasses.replace(level, query=query, trajectory=trajectories, before=jnp.int32(Before.WAIT))

    def ends(self) -> list[Callable[[Run, Level, Evaluation], Carry]]:
        """What follows from an evaluation on a trajectory: of each block on to its next point, and after the last one
        the accept test; `after_block` is where each block's are among all phases."""
        if self.opaque:
            return [self.transition]
        return [partial(end, b) for b in self.blocks for end in (self.advance, self.finish)]

    def after_block(self, b: Array | int, evaluation: Array | int) -> Array:
        """The phase after this evaluation of the block at place b of a transition."""
        last = jnp.asarray(self.counts)[b] - 1
        return jnp.int32(Evaluated.ARRIVED + 1 + 2 * b) + (evaluation == last)

    def advance(self, b: int, run: Run, level: Level, found: Evaluation) -> Carry:
        """Block b's transition of every chain after an evaluation that was not its last: on to the next one."""
        moves, (at, _) = self.moves, run.visits.now
        assert moves is not None
        if moves.kernel.kernels[b].evaluations_per_step == 1:
            return run, level
        on = partial(moves.advance, b, level.evaluation, run.tuning, self.density.schedule.at(at))
        new, query = self.spread.map(on, run.chains, level.trajectory[b], found)
        trajectories = (*level.trajectory[:b], new, *level.trajectory[b + 1 :])
        after, evaluation = self.after_block(self.blocks.index(b), level.evaluation + 1), level.evaluation + 1
        level = dataclasses.replace(level, query=query, trajectory=trajectories, after=after, evaluation=evaluation)
        return run, level

    def finish(self, b: int, run: Run, level: Level, found: Evaluation) -> Carry:
        """Block b's transition of every chain after its last evaluation: accepted or rejected, tallied, its step size
        adapted; the next one begins."""
        moves, (at, _) = self.moves, run.visits.now
        assert moves is not None
        noise, counted = self.density.schedule.at(at), level.transition >= moves.total - moves.count
        batch, step = (run.chains, level.trajectory[b], found), moves.steps_in_x(run.tuning, noise)[b]
        chains, info = self.spread.map(partial(moves.finish, b, run.tuning, noise), *batch)
        level = dataclasses.replace(level, tally=level.tally.adding(b, info, counted, step))
        run = self.adapted(dataclasses.replace(run, chains=chains), {b: info.acceptance}, counted)
        place = self.blocks.index(b)
        return run, self.following(level, place + 1) if place < len(self.blocks) - 1 else self.over(level)

    def adapted(self, run: Run, acceptance: dict[int, Array], counted: Array) -> Run:
        """Step sizes after a transition with these acceptances, (n,) by block."""
        moves, tuning = self.moves, list(run.tuning)
        assert moves is not None
        for b, values in acceptance.items():
            if moves.adaptive[b] is not None:
                mean = mean_acceptance(values, self.spread.total, self.num_chains)
                log_scale = moves.adapted(b, tuning[b].log_scale, mean, self.num_chains, counted)
                tuning[b] = dataclasses.replace(tuning[b], log_scale=log_scale)
        return dataclasses.replace(run, tuning=tuple(tuning))

    def over(self, level: Level) -> Level:
        """A transition of all blocks is made: another one follows, or the level is done."""
        assert self.moves is not None
        level = self.following(dataclasses.replace(level, transition=level.transition + 1), 0)
        done = level.transition >= self.moves.total
        return dataclasses.replace(level, before=jnp.where(done, Before.PREDICT, level.before).astype(jnp.int32))

    def transition(self, run: Run, level: Level, found: Evaluation) -> Carry:
        """A whole transition of kernels that call the density themselves, such as BlackJAX's."""
        moves, (at, _) = self.moves, run.visits.now
        assert moves is not None
        noise, counted = self.density.schedule.at(at), level.transition >= moves.total - moves.count
        number = self.number(run, 1 + level.transition * len(self.blocks))
        keys = self.spread.map(lambda words: key_of(words, number), run.words)
        moved = moves.transition(self.spread, keys, run.chains, self.density, run.tuning, noise, self.parts)
        chains, info, steps = moved
        tally = level.tally.adding(slice(None), info, counted, steps)
        run = dataclasses.replace(run, chains=chains)
        run = self.adapted(run, {b: info.acceptance[:, b] for b in range(len(self.blocks))}, counted)
        return run, self.over(dataclasses.replace(level, tally=tally))

    # Leave

    def leave(self, run: Run, level: Level) -> Carry:
        """The level is done: what its transitions came to is recorded, and metrics follow from them."""
        (at, _), moves = run.visits.now, self.moves
        if moves is not None:
            noise, spread, tally = self.density.schedule.at(at), self.spread, level.tally
            acceptance, error, bad = summed(tally, spread, moves.count, self.num_chains, moves.integrates_score)
            records = run.records.counting(at, bad)
            records = records.at(at, acceptance=acceptance, step_size=tally.steps / moves.count, quadrature_error=error)
            run = dataclasses.replace(run, records=records)
            if level.began is not None:
                ended = jnp.concatenate([run.chains.points, run.chains.evaluation.score], axis=1)
                change = ended - level.began
                moved, changed = change[:, : self.layout.size], change[:, self.layout.size :]
                tuning = moves.measured(spread, run.tuning, noise, moved, changed, self.num_chains)
                run = dataclasses.replace(run, tuning=tuning)
        visits = run.visits.onwards(self.density.schedule, run.records)
        return dataclasses.replace(run, visits=visits), dataclasses.replace(level, transition=jnp.int32(0))


def summed(
    tally: Tally, spread: Spread, count: Array | int, num_chains: int, errors: bool
) -> tuple[Array, Array, Array]:
    """Over all chains and ``count`` transitions: mean acceptance, mean error of accepted moves (0 unless there are
    ``errors``), number of non-finite moves."""
    acceptance = mean_acceptance(tally.acceptance / count, spread.total, num_chains)
    error = jnp.zeros_like(acceptance)
    if errors:
        error = jnp.mean(spread.gather(tally.error), axis=0) / count
    return acceptance, error / acceptance, spread.total(tally.non_finite)
