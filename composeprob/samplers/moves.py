"""Transitions of all chains at one level: blocks of a kernel on flat particles, tuned by the population."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import PyTree

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Evaluation, Position
from composeprob.kernels import (
    Adaptive,
    Estimated,
    Gibbs,
    Info,
    Kernel,
    KernelState,
    Metric,
    adapt,
    mean_acceptance,
    resolve,
)
from composeprob.kernels.base import Trajectory
from composeprob.kernels.gibbs import GibbsState, in_blocks, with_field, with_parts
from composeprob.kernels.line_integral import integrates_score
from composeprob.kernels.metric import EUCLIDEAN
from composeprob.kernels.step_size import as_step_size
from composeprob.samplers.layout import Layout
from composeprob.samplers.preconditioning import kind_of, measured, unmeasured
from composeprob.samplers.random import Stream, key_of
from composeprob.samplers.spread import Spread
from composeprob.schedule import Noise


class Particles(eqx.Module):
    """N chains at one level.

    Attributes:
        points: v = (y, z) of each, (N, D).
        evaluation: of the level's density there, flat as `Layout.evaluate` makes it.
        inner: what the kernel of each block carries (momentum, say).
    """

    points: Array
    evaluation: Evaluation
    inner: tuple[PyTree[Array], ...] = ()


class Block(eqx.Module):
    """Entries of a chain that one kernel moves.

    Attributes:
        name: of its sites.
        begin, end: where they are, if they are in a row.
        entries: their indices, if they are not; None else.
        follows: whether its adaptive step shrinks with the level's noise: whether any of its sites is noised.
        static: which of its entries are static, where others are not, (n,) of booleans; None else.
        in_noise: whether static entries among noised ones are measured in units of the noise: not where the user gave
            both step size and metric.
    """

    name: str = eqx.field(static=True)
    begin: int = eqx.field(static=True)
    end: int = eqx.field(static=True)
    entries: tuple[int, ...] | None = eqx.field(static=True)
    follows: bool = eqx.field(static=True)
    static: Array | None
    in_noise: bool = eqx.field(static=True)

    @property
    def index(self) -> slice | np.ndarray:
        return slice(self.begin, self.end) if self.entries is None else np.asarray(self.entries)

    @property
    def size(self) -> int:
        return self.end - self.begin if self.entries is None else len(self.entries)

    def unit(self, noise: Noise) -> Array | None:
        """What the entries of its static sites are measured in while a step suits its noised ones, (n,)."""
        if self.static is None:
            return None
        return jnp.where(self.static, noise.alpha / (noise.sigma if self.in_noise else 1.0), 1.0)


class Tuning(eqx.Module):
    """What adapts of one block: log c of its step size, and its metric, None where none is measured."""

    log_scale: Array
    metric: Metric | None


class Tally(eqx.Module):
    """What the transitions of each chain at a level add up to, (n, B) for the B blocks of a kernel.

    Attributes:
        acceptance: sums of the acceptance probabilities.
        error: of acceptance × quadrature error: over all transitions that is the mean over accepted moves, without the
            noise of which were accepted.
        non_finite: number of moves, (n,).
        steps: sums of the step sizes in force, (B,).
    """

    acceptance: Array
    error: Array
    non_finite: Array
    steps: Array

    @classmethod
    def blank(cls, count: int, blocks: int) -> Tally:
        zero = jnp.zeros((count, blocks))
        return cls(zero, zero, jnp.zeros((count,), jnp.int32), jnp.zeros((blocks,)))

    def adding(self, b: int | slice, info: Info, counted: Array, step: Array) -> Tally:
        """After one more transition of block b, or of all; one that is not ``counted`` can only be non-finite."""
        error = jnp.where(info.acceptance > 0, info.acceptance * info.quadrature_error, 0.0)
        bad = info.non_finite.astype(jnp.int32)
        return Tally(
            self.acceptance.at[:, b].add(jnp.where(counted, info.acceptance, 0.0)),
            self.error.at[:, b].add(jnp.where(counted, error, 0.0)),
            self.non_finite + (jnp.sum(bad, axis=1) if bad.ndim == 2 else bad),
            self.steps.at[b].add(jnp.where(counted, step, 0.0)),
        )


class Transitions(eqx.Module):
    """A kernel with its number of transitions a level, resolved for one density.

    In y = x/α a step of length h in x has length h/α, so what a user says of x is divided by α^p, p the kernel's
    `scale_exponent`; an adaptive step is c·s^{p/2}, which is c·σ^p in x.

    Attributes:
        kernel: blocks with a kernel each, whose step size is an array (K,), of x, or `Adaptive`; one block of all sites
            unless the user gave a `Gibbs`. Entries that must be held are in no block.
        blocks: where their entries are.
        count: transitions a level whose acceptance is recorded.
        layout: of the density.
    """

    kernel: Gibbs
    blocks: tuple[Block, ...]
    count: int = eqx.field(static=True)
    layout: Layout = eqx.field(static=True)

    @classmethod
    def resolved(cls, kernel: Kernel, count: int, density: AnnealedDensity) -> Transitions:
        """Check the sites, metrics and step sizes against the density, before anything is compiled."""
        layout, sites = Layout.of_density(density), density.sites
        blocks = in_blocks(kernel, [name for name, site in sites.items() if site.kind != "held"])
        parts: dict[str, Kernel] = {}
        places = []
        for part, names in zip(blocks.kernels, blocks.sites, strict=True):
            rule, metric, entries = as_step_size(part.step_size), getattr(part, "metric", None), layout.entries(names)
            adaptive, extent = isinstance(rule, Adaptive), _extent(density, names)
            steps = (
                rule.starting(part, *extent) if isinstance(rule, Adaptive) else resolve(rule, density.schedule, part)
            )
            kinds = {sites[name].kind for name in names}
            still = None if len(kinds) < 2 else jnp.asarray(entries >= layout.dims)
            begin = int(entries[0]) if len(entries) else 0
            end = begin + len(entries)
            scattered = None if np.array_equal(entries, np.arange(begin, end)) else tuple(map(int, entries))
            name, in_noise = ", ".join(names), adaptive or isinstance(metric, Estimated)
            places.append(Block(name, begin, end, scattered, kinds != {"static"}, still, in_noise))
            part = with_field(part, "step_size", steps)
            if isinstance(metric, Metric) and metric is not EUCLIDEAN:
                part = with_field(part, "metric", _flat_metric(metric, part, names, name, density))
            parts[name] = part
        return cls(Gibbs(parts, backwards=blocks.backwards), tuple(places), count, layout)

    @property
    def adaptive(self) -> tuple[Adaptive | None, ...]:
        """For each block how its step size adapts; None where it is given."""
        rules = (part.step_size for part in self.kernel.kernels)
        return tuple(rule if isinstance(rule, Adaptive) else None for rule in rules)

    @property
    def total(self) -> int:
        """Transitions a level, adapting ones included."""
        return self.count + max(rule.warmup if rule else 0 for rule in self.adaptive)

    @property
    def evaluations(self) -> int:
        """Evaluations a level and chain."""
        return self.total * self.kernel.evaluations_per_step

    @property
    def proposals(self) -> int:
        """Moves a level and chain that can turn out non-finite."""
        return self.total * len(self.blocks)

    @property
    def settling(self) -> int:
        """Transitions that adapt the step sizes once more before the first draw: down the levels they lag behind, and
        at level 0 they stop shrinking."""
        return tuning.WARM_UP.settling if any(self.adaptive) else 0

    @property
    def noised(self) -> bool:
        """Whether any site is noised."""
        return self.layout.dims > 0

    @property
    def integrates_score(self) -> bool:
        """Whether the accept test of a block integrates the score."""
        return any(map(integrates_score, self.kernel.kernels))

    @property
    def measures(self) -> bool:
        """Whether the metric of a block is measured."""
        return any(isinstance(getattr(part, "metric", None), Estimated) for part in self.kernel.kernels)

    @property
    def sequence(self) -> tuple[int, ...]:
        """The blocks in the order in which a transition moves them."""
        order = tuple(range(len(self.blocks)))
        return order[::-1] if self.kernel.backwards else order

    def untuned(self, num_chains: int) -> tuple[Tuning, ...]:
        """log c where it starts, and no metric known, for N chains."""

        def start(part: Kernel, block: Block) -> Tuning:
            rule, kind = part.step_size, self._kind(part, block, num_chains)
            metric = None if kind == "none" else unmeasured(kind, self._like(block))
            return Tuning(rule.log_scale if isinstance(rule, Adaptive) else jnp.zeros(()), metric)

        return tuple(map(start, self.kernel.kernels, self.blocks))

    def tuned(self, tuning: tuple[Tuning, ...], noise: Noise) -> Gibbs:
        """The kernel in the metrics that are in force."""

        def in_force(part: Kernel, known: Tuning, block: Block) -> Kernel:
            given, unit = getattr(part, "metric", None), block.unit(noise)
            if given is None or (isinstance(given, Metric) and unit is None):
                return part
            metric = given if isinstance(given, Metric) else known.metric or EUCLIDEAN
            return with_field(part, "metric", metric if unit is None else metric.scaled({block.name: unit}))

        parts = list(map(in_force, self.kernel.kernels, tuning, self.blocks))
        return with_parts(self.kernel, parts)  # type: ignore[return-value]

    def step_size(self, b: int, log_scale: Array, noise: Noise) -> Array:
        """The step size in force of block b, in y."""
        part, block = self.kernel.kernels[b], self.blocks[b]
        if isinstance(part.step_size, Adaptive):
            length = noise.sigma / noise.alpha if block.follows else jnp.ones_like(noise.sigma)
            return jnp.exp(log_scale) * length**part.scale_exponent
        assert isinstance(part.step_size, Array)
        return part.step_size[noise.index] * self.per_unit(b, noise)

    def per_unit(self, b: int, noise: Noise) -> Array:
        """What a step of block b in y is of the same step in x, α^−p."""
        return noise.alpha ** -self.kernel.kernels[b].scale_exponent if self.blocks[b].follows else jnp.ones(())

    def step_sizes(self, tuning: tuple[Tuning, ...], noise: Noise) -> list[Array]:
        """Those of all blocks, in y."""
        return [self.step_size(b, known.log_scale, noise) for b, known in enumerate(tuning)]

    def steps_in_x(self, tuning: tuple[Tuning, ...], noise: Noise) -> Array:
        """Those of all blocks, in x, (…, B) where what is tuned and the noise are (…)."""
        steps = self.step_sizes(tuning, noise)
        return jnp.stack([step / self.per_unit(b, noise) for b, step in enumerate(steps)], axis=-1)

    def adapted(self, b: int, log_scale: Array, mean: Array, num_chains: int, counted: Array) -> Array:
        """log c of block b after a transition of N chains with this mean acceptance; ends a warm-up if ``counted``."""
        part = self.kernel.kernels[b]
        if not isinstance(rule := part.step_size, Adaptive):
            return log_scale
        # The mean of few chains is mostly noise.
        gain = rule.gain * num_chains / (num_chains + tuning.STEP_SIZE.few_chains)
        moved = adapt(log_scale, mean, rule.target(part), gain)
        return jnp.where(counted, log_scale, moved) if rule.warmup else moved

    def measured(
        self,
        spread: Spread,
        tuning: tuple[Tuning, ...],
        noise: Noise,
        moved: Array,
        changed: Array,
        num_chains: int,
    ) -> tuple[Tuning, ...]:
        """The metrics that the moves of all chains at a level give, for the transitions that follow.

        Args:
            moved, changed: how far each chain went, and how much its score changed, (n, D).
        """

        def update(known: Tuning, part: Kernel, block: Block) -> Tuning:
            if known.metric is None:
                return known
            length = noise.sigma / noise.alpha if block.follows else jnp.ones_like(noise.sigma)
            units = jnp.full((block.size,), length)
            units = units if block.static is None else jnp.where(block.static, 1.0, units)
            rows = spread.gather(jnp.concatenate([moved[:, block.index], changed[:, block.index]], axis=1))
            kind, size = self._kind(part, block, num_chains), block.size

            def solve(rows: Array) -> Metric:
                return measured(kind, known.metric, {block.name: units}, rows[:, :size], rows[:, size:])  # type: ignore[arg-type]

            return dataclasses.replace(known, metric=spread.on_population(solve, rows))

        return tuple(map(update, tuning, self.kernel.kernels, self.blocks))

    def transition(
        self,
        spread: Spread,
        keys: Array,
        chains: Particles,
        density: AnnealedDensity,
        tuning: tuple[Tuning, ...],
        noise: Noise,
        parts: bool,
    ) -> tuple[Particles, Info, Array]:
        """One transition of every chain, whose kernels evaluate the density themselves.

        Args:
            keys: of this transition, (n,).
            parts: whether evaluations have theirs.

        Returns:
            The chains; the `Info` of each, (n, B); and the step sizes in force, of x, (B,).
        """
        step = partial(self.step, density, parts, tuning, noise)
        moved, info = spread.map(step, keys, chains)
        return moved, info, self.steps_in_x(tuning, noise)

    def settled(
        self,
        spread: Spread,
        words: Array,
        chains: Particles,
        density: AnnealedDensity,
        tuning: tuple[Tuning, ...],
        noise: Noise,
        i: Array | int,
        thin: Array,
        parts: bool,
    ) -> tuple[Particles, tuple[Tuning, ...], Tally]:
        """The transitions at level 0 that lead to draw i: ``thin`` of them, before the first one `settling` ones too.

        In these step sizes settle, at the mean of their second half: it has less noise than the last one.

        Args:
            words: of the stream of draws, (n, 2).
            noise: of level 0.
            parts: whether evaluations have theirs.

        Returns:
            The chains, what adapts, and the tally of the ``thin`` transitions.
        """
        settled, count = jnp.int32(self.settling), len(self.blocks)
        metrics, num_chains = [known.metric for known in tuning], spread.number_of(words)

        def tuned(scales: Array) -> tuple[Tuning, ...]:
            return tuple(Tuning(c, metric) for c, metric in zip(scales, metrics, strict=True))

        def transition(t: Array, carry: tuple[Particles, Array, Array, Tally]) -> tuple[Particles, Array, Array, Tally]:
            chains, scales, recent, tally = carry
            keys, counted = spread.map(lambda words: key_of(words, t), words), t >= settled
            moved = self.transition(spread, keys, chains, density, tuned(scales), noise, parts)
            chains, info, steps = moved
            tally = tally.adding(slice(None), info, counted, steps)
            if not self.settling:
                return chains, scales, recent, tally

            def adapt(scales: Array, recent: Array) -> tuple[Array, Array]:
                mean = mean_acceptance(info.acceptance, spread.total, num_chains)
                blocks = [self.adapted(b, scales[b], mean[b], num_chains, jnp.asarray(False)) for b in range(count)]
                scales = jnp.stack(blocks)
                recent = recent + jnp.where(2 * t >= settled, scales, 0.0)
                return jnp.where(t == settled - 1, recent / (settled - settled // 2), scales), recent

            scales, recent = jax.lax.cond(counted, lambda *same: same, adapt, scales, recent)
            return chains, scales, recent, tally

        scales = jnp.stack([known.log_scale for known in tuning])
        start = (chains, scales, jnp.zeros_like(scales), Tally.blank(len(words), count))
        first = jnp.where(i == 0, 0, settled + i * thin)
        chains, scales, _, tally = jax.lax.fori_loop(first, settled + (i + 1) * thin, transition, start)
        return chains, tuned(scales), tally

    # A single chain

    def step(
        self,
        density: AnnealedDensity,
        parts: bool,
        tuning: tuple[Tuning, ...],
        noise: Noise,
        key: Array,
        particle: Particles,
    ) -> tuple[Particles, Info]:
        """One transition, whose kernels evaluate the density themselves; the `Info` has B entries."""

        def target(position: Position) -> Evaluation:
            v = self.join(particle.points, position)
            return self.view(self.layout.evaluate(density, v, noise.index, parts))

        gibbs, steps = self.tuned(tuning, noise), self.step_sizes(tuning, noise)
        state, info = gibbs.step(key, self.state(particle), target, steps)
        return self.particle(state, particle), info

    def noise_size(self, b: int) -> int:
        """How many standard normals a transition of block b takes."""
        return self.kernel.kernels[b].noise_size({self.blocks[b].name: jnp.zeros((self.blocks[b].size,))})

    def begin(
        self, b: int, tuning: tuple[Tuning, ...], noise: Noise, particle: Particles, normals: Array
    ) -> tuple[PyTree[Array], Array]:
        """Block b's transition begins: its trajectory, and v where the first evaluation is wanted, (D,)."""
        gibbs, step = self.tuned(tuning, noise), self.step_size(b, tuning[b].log_scale, noise)
        state = gibbs.block_state(b, self.state(particle))
        trajectory, position = gibbs.kernels[b].begin(normals, state, step)
        return _cut(trajectory), self.join(particle.points, position)

    def advance(
        self,
        b: int,
        i: Array | int,
        tuning: tuple[Tuning, ...],
        noise: Noise,
        particle: Particles,
        trajectory: PyTree[Array],
        found: Evaluation,
    ) -> tuple[PyTree[Array], Array]:
        """It goes on after its evaluation i, which was not the last: as `begin`."""
        gibbs = self.tuned(tuning, noise)
        evaluation, state = gibbs.block_evaluation(b, self.view(found)), gibbs.block_state(b, self.state(particle))
        trajectory, position = gibbs.kernels[b].advance(i, _restored(trajectory, state), evaluation)
        return _cut(trajectory), self.join(particle.points, position)

    def finish(
        self,
        b: int,
        tuning: tuple[Tuning, ...],
        noise: Noise,
        particle: Particles,
        trajectory: PyTree[Array],
        found: Evaluation,
    ) -> tuple[Particles, Info]:
        """It is accepted, or not, after its last evaluation."""
        gibbs = self.tuned(tuning, noise)
        trajectory = _restored(trajectory, gibbs.block_state(b, self.state(particle)))
        state, info = gibbs.kernels[b].finish(trajectory, gibbs.block_evaluation(b, self.view(found)))
        return self.particle(gibbs.merged(b, self.state(particle), state), particle), info

    def start(self, words: Array, v: Array, found: Evaluation) -> Particles:
        """A chain at its first level, where it was evaluated."""
        state = self.kernel.init(key_of(words, Stream.STATES), self.split(v), lambda _: self.view(found))
        return Particles(v, found, state.inner)

    def relevel(self, particle: Particles) -> Particles:
        """A chain at another level, where it was evaluated."""
        state = self.kernel.relevel(self.state(particle), lambda _: self.view(particle.evaluation))
        return self.particle(state, particle)

    def split(self, v: Array) -> Position:
        """The blocks' entries of a vector (D,), or of a gradient."""
        return {block.name: v[block.index] for block in self.blocks}

    def join(self, v: Array, position: Position) -> Array:
        """The vector with the entries of some blocks replaced."""
        for block in self.blocks:
            if block.name in position:
                entries = position[block.name].astype(v.dtype)
                v = entries if entries.shape == v.shape and block.entries is None else v.at[block.index].set(entries)
        return v

    def view(self, found: Evaluation) -> Evaluation:
        """An evaluation whose score is that of the blocks."""
        return dataclasses.replace(found, score=self.split(found.score))

    def state(self, particle: Particles) -> GibbsState:
        """One chain as the kernel sees it."""
        return GibbsState(self.split(particle.points), self.view(particle.evaluation), particle.inner)

    def particle(self, state: GibbsState, before: Particles) -> Particles:
        """One chain as the engine holds it, after the kernel moved it from ``before``."""
        found = state.evaluation
        score = self.join(before.evaluation.score, found.score)
        evaluation = dataclasses.replace(found, score=score)
        return Particles(self.join(before.points, state.position), evaluation, state.inner)

    def _kind(self, part: Kernel, block: Block, num_chains: int) -> str:
        """The metric that is measured for a block, ``"none"`` if none is."""
        given = getattr(part, "metric", None)
        if not isinstance(given, Estimated):
            return "none"
        return kind_of(given.kind, block.size, num_chains)

    def _like(self, block: Block) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape of a block's entries."""
        return {block.name: jax.ShapeDtypeStruct((block.size,), jnp.result_type(float))}


def _cut(trajectory: PyTree[Array]) -> PyTree[Array]:
    """A trajectory without the position and the evaluation that it starts from: the chain has them."""
    if not isinstance(trajectory, Trajectory):
        return trajectory
    start = dataclasses.replace(trajectory.start, position=None, evaluation=None)
    return dataclasses.replace(trajectory, start=start)


def _restored(trajectory: PyTree[Array], state: KernelState) -> PyTree[Array]:
    """The trajectory with them again, from the state that it began with."""
    if not isinstance(trajectory, Trajectory):
        return trajectory
    start = dataclasses.replace(trajectory.start, position=state.position, evaluation=state.evaluation)
    return dataclasses.replace(trajectory, start=start)


def _flat_metric(
    metric: Metric, kernel: Kernel, names: tuple[str, ...], block: str, density: AnnealedDensity
) -> Metric:
    """A metric over sites as one over a block's entries."""
    shapes = {name: density.sites[name].shape for name in sorted(names)}
    metric.check({name: jnp.zeros(shape) for name, shape in shapes.items()}, type(kernel).__name__)
    if not metric.unit:
        return metric
    units = [jnp.broadcast_to(metric.unit.get(name, jnp.ones(())), shape).reshape(-1) for name, shape in shapes.items()]
    return dataclasses.replace(metric, unit={block: jnp.concatenate(units)})


def _extent(density: AnnealedDensity, names: tuple[str, ...]) -> tuple[int, float]:
    """How many numbers these sites are, and the most factors, by their powers, that any of them is in."""
    size = sum(math.prod(density.sites[name].shape) for name in names)
    powers = [np.asarray(density.top.power[name]).max() for name in names if name in density.top.power]
    return max(size, 1), float(max(1.0, *powers)) if powers else 1.0
