"""Transitions of all chains at one level: blocks of a kernel on flat particles, tuned
by the population."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, Key, PyTree, UInt32

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Evaluation, Position
from composeprob.kernels.gibbs import (
    Gibbs,
    GibbsState,
    in_blocks,
    integrates_score,
    replaced,
)
from composeprob.kernels.kernel import Info, Kernel, KernelState, Trajectory
from composeprob.kernels.metric import EUCLIDEAN, Estimated, Metric, measured
from composeprob.kernels.step_size import (
    Adaptive,
    adapt,
    as_step_size,
    mean_acceptance,
    resolve,
    scaled_step,
)
from composeprob.samplers.discrete import with_discrete
from composeprob.samplers.layout import Layout
from composeprob.samplers.own_kernels import check_own_kernels
from composeprob.samplers.random import Stream, key_of
from composeprob.samplers.spread import Spread
from composeprob.schedule import Noise

Particles = GibbsState
"""N chains at one level: ``position`` is v = (y, z) of each, (N, D), ``evaluation`` is
that of the level's density, as `Layout.evaluate` makes it, and ``inner`` the states of
the blocks' kernels (momenta, say)."""


class Block(eqx.Module):
    """Entries of a chain that one kernel moves."""

    name: str = eqx.field(static=True)  # of its sites
    # Their indices, a `range` where they are in a row
    entries: range | tuple[int, ...] = eqx.field(static=True)
    # True if any of its sites is noised: its adaptive step shrinks with the noise.
    follows_noise: bool = eqx.field(static=True)
    # True for its static entries; None unless it has noised ones too
    static: Bool[Array, " entries"] | None
    # True if static entries among noised ones are measured in units of the noise: not
    # where the user gave both step size and metric.
    in_noise: bool = eqx.field(static=True)

    @property
    def index(self) -> slice | np.ndarray:
        """Index of the entries in a vector."""
        if isinstance(self.entries, range):
            # A slice compiles to less than a gather.
            return slice(self.entries.start, self.entries.stop)
        return np.asarray(self.entries)

    def length(self, noise: Noise) -> Array:
        """Length, in y, that an adaptive step follows."""
        if self.follows_noise:
            return noise.sigma / noise.alpha
        return jnp.ones_like(noise.sigma)

    def unit(self, noise: Noise) -> Float[Array, " entries"] | None:
        """Units in which a step that suits the noised entries suits the static ones
        too; None for a block of one kind."""
        if self.static is None:
            return None
        sigma = noise.sigma if self.in_noise else 1.0
        return jnp.where(self.static, noise.alpha / sigma, 1.0)


class FlatGibbs(Gibbs):
    """Blocks of the entries of a chain's vector v, (D,), each of which its kernel moves
    as one site."""

    blocks: tuple[Block, ...]

    def __init__(
        self,
        kernels: Sequence[Kernel],
        blocks: Sequence[Block],
        backwards: bool = False,
    ):
        names = [block.name for block in blocks]
        super().__init__(dict(zip(names, kernels, strict=True)), backwards)
        self.blocks = tuple(blocks)

    def part(self, b: int, v: Float[Array, " size"]) -> Position:
        block = self.blocks[b]
        return {block.name: v[block.index]}

    def joined(
        self, b: int, v: Float[Array, " size"], part: Position
    ) -> Float[Array, " size"]:
        block = self.blocks[b]
        entries = part[block.name].astype(v.dtype)
        if block.entries == range(len(v)):
            return entries
        return v.at[block.index].set(entries)


class Tuning(eqx.Module):
    """Adapted quantities of one block."""

    log_scale: Array  # log c of its step size
    metric: Metric | None  # None where none is measured


Setting: TypeAlias = tuple[tuple[Tuning, ...], Noise]
"""Tuned quantities of all blocks, and the noise of the level."""


class Tally(eqx.Module):
    """Sums over the transitions of each chain at a level, for the B blocks of a
    kernel."""

    acceptance: Float[Array, "chains *rungs blocks"]  # of acceptance probabilities
    # of acceptance × quadrature error: the expected error of accepted moves, without
    # the noise of the accept tests
    error: Float[Array, "chains *rungs blocks"]
    non_finite: Int[Array, " chains"]  # of moves
    steps: Float[Array, "*rungs blocks"]  # of the step sizes in force

    @classmethod
    def blank(cls, chains: tuple[int, ...], blocks: int) -> Tally:
        """Return zeros; ``chains`` is (N,), or (N, L) with replicas."""
        zero = jnp.zeros((*chains, blocks))
        return cls(
            acceptance=zero,
            error=zero,
            non_finite=jnp.zeros(chains[0], jnp.int32),
            steps=jnp.zeros((*chains[1:], blocks)),
        )

    def adding(self, b: int, info: Info, counted: Array, step: Array) -> Tally:
        """Add one more transition of block b; if it is not ``counted``, only its
        non-finite moves."""
        # The error of a move that is never accepted may be NaN.
        error = info.acceptance * info.quadrature_error
        error = jnp.where(info.acceptance > 0, error, 0.0)
        non_finite = info.non_finite.astype(jnp.int32)
        non_finite = non_finite.reshape(len(self.non_finite), -1)
        acceptance = jnp.where(counted, info.acceptance, 0.0)
        return Tally(
            acceptance=self.acceptance.at[..., b].add(acceptance),
            error=self.error.at[..., b].add(jnp.where(counted, error, 0.0)),
            non_finite=self.non_finite + jnp.sum(non_finite, axis=1, dtype=jnp.int32),
            steps=self.steps.at[..., b].add(jnp.where(counted, step, 0.0)),
        )

    def means(
        self, spread: Spread, moves: Transitions, count: Array | int, num_chains: int
    ) -> tuple[Array, Array, Array]:
        """Return means over all chains and ``count`` of the ``moves``.

        Returns:
            Mean acceptance; mean error of accepted moves, 0 unless they integrate a
                score; and the number of non-finite moves.
        """
        acceptance = mean_acceptance(self.acceptance / count, spread.total, num_chains)
        error = jnp.zeros_like(acceptance)
        if integrates_score(moves.kernel):
            error = jnp.mean(spread.gather(self.error), axis=0) / count
        return acceptance, error / acceptance, spread.total(self.non_finite)


class Transitions(eqx.Module):
    """A kernel with its number of transitions a level, resolved for one density.

    In y = x/α a step of length h in x has length h/α, so numbers that a user gives for
    x are divided by α^p, p the kernel's `scale_exponent`; an adaptive step is
    c·s^{p/2}, which is c·σ^p in x.
    """

    # Blocks with a kernel each, whose step size is an array (K,), of x, or `Adaptive`;
    # one block of all sites unless the user gave a `Gibbs`. Entries that must be held
    # are in no block.
    kernel: FlatGibbs
    # Transitions a level whose acceptance is recorded
    count: int = eqx.field(static=True)
    layout: Layout = eqx.field(static=True)  # of the density

    @classmethod
    def resolved(
        cls, kernel: Kernel, count: int, density: AnnealedDensity
    ) -> Transitions:
        """Check the sites, metrics and step sizes against the density, before anything
        is compiled."""
        layout = Layout.of_density(density)
        movable = [name for name, site in density.sites.items() if site.kind != "held"]
        by_sites = in_blocks(with_discrete(kernel, density), movable)
        kernels = []
        blocks = []
        for part, sites, label in zip(
            by_sites.kernels, by_sites.sites, by_sites.labels, strict=True
        ):
            block = _block_of(part, label, sites, layout, density)
            part = part.resolved(sites, density)
            if part.sees_whole:
                block = dataclasses.replace(block, entries=range(layout.size))
            blocks.append(block)
            kernels.append(_resolved_kernel(part, block, sites, layout, density))
        moves = cls(FlatGibbs(kernels, blocks, by_sites.backwards), count, layout)
        check_own_kernels(moves, density)
        return moves

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Entries that each kernel moves."""
        return self.kernel.blocks

    @property
    def adaptive(self) -> tuple[Adaptive | None, ...]:
        """Rule by which each block's step size adapts; None where it is given."""
        rules: list[Adaptive | None] = []
        for kernel in self.kernel.kernels:
            if isinstance(kernel.step_size, Adaptive):
                rules.append(kernel.step_size)
            else:
                rules.append(None)
        return tuple(rules)

    @property
    def total(self) -> int:
        """Transitions a level, adapting ones included."""
        warmups = [rule.warmup for rule in self.adaptive if rule]
        return self.count + max(warmups, default=0)

    @property
    def settling(self) -> int:
        """Transitions that adapt the step sizes once more before the first draw."""
        return tuning.WARM_UP.settling if any(self.adaptive) else 0

    def untuned(self, num_chains: int) -> tuple[Tuning, ...]:
        """Return the initial log c of each block's step size, and its metric before it
        is measured, for N chains."""
        tuned = []
        for kernel, rule, block in zip(
            self.kernel.kernels, self.adaptive, self.blocks, strict=True
        ):
            metric = None
            given = getattr(kernel, "metric", None)
            if isinstance(given, Estimated):
                entries = {block.name: jnp.zeros((len(block.entries),))}
                metric = given.unmeasured(entries, num_chains)
            log_scale = rule.log_scale if rule else jnp.zeros(())
            tuned.append(Tuning(log_scale, metric))
        return tuple(tuned)

    def tuned(self, setting: Setting) -> FlatGibbs:
        """Return the kernel in the metrics that are in force."""
        tunings, noise = setting
        kernels = []
        for kernel, tuned, block in zip(
            self.kernel.kernels, tunings, self.blocks, strict=True
        ):
            kernels.append(_in_force(kernel, tuned, block, noise))
        return replaced(self.kernel, kernels=tuple(kernels))

    def step_size(self, b: int, log_scale: Array, noise: Noise) -> Array:
        """Step size in force of block b, in y."""
        kernel = self.kernel.kernels[b]
        if isinstance(kernel.step_size, Adaptive):
            return scaled_step(log_scale, self.blocks[b].length(noise), kernel)
        assert isinstance(kernel.step_size, Array)
        return kernel.step_size[noise.index] * self.per_unit(b, noise)

    def per_unit(self, b: int, noise: Noise) -> Array:
        """α^−p: a step of block b in y over the same step in x."""
        if self.blocks[b].follows_noise:
            return noise.alpha ** -self.kernel.kernels[b].scale_exponent
        return jnp.ones(())

    def steps_in_x(
        self, tuning: tuple[Tuning, ...], noise: Noise
    ) -> Float[Array, "*rungs blocks"]:
        """Step sizes in force of all blocks, in x."""
        sizes = []
        for b, tuned in enumerate(tuning):
            in_y = self.step_size(b, tuned.log_scale, noise)
            sizes.append(in_y / self.per_unit(b, noise))
        return jnp.stack(sizes, axis=-1)

    def adapted(
        self, b: int, tuned: Tuning, mean: Array, num_chains: int, pace: Array | float
    ) -> Tuning:
        """Adapt block b's step size to the mean acceptance of a transition of N chains,
        at a ``pace`` from 0 to 1."""
        kernel = self.kernel.kernels[b]
        rule = kernel.step_size
        if not isinstance(rule, Adaptive):
            return tuned
        # The mean of few chains is mostly noise.
        few = tuning.STEP_SIZE.few_chains
        gain = pace * rule.gain * num_chains / (num_chains + few)
        adapted = adapt(tuned.log_scale, mean, rule.target(kernel), gain)
        if math.isfinite(kernel.longest):
            adapted = jnp.minimum(adapted, math.log(kernel.longest))
        return Tuning(jnp.where(pace > 0, adapted, tuned.log_scale), tuned.metric)

    def measured(
        self,
        spread: Spread,
        tuning: tuple[Tuning, ...],
        noise: Noise,
        moved: Float[Array, "chains size"],
        changed: Float[Array, "chains size"],
    ) -> tuple[Tuning, ...]:
        """Measure the metrics, for the transitions that follow, from how far each chain
        ``moved`` at a level and how much its score ``changed``."""
        metrics = []
        for block, tuned in zip(self.blocks, tuning, strict=True):
            metrics.append(_measured(spread, block, tuned, noise, moved, changed))
        return tuple(metrics)

    # A single chain

    def step(
        self,
        density: AnnealedDensity,
        terms: bool,
        setting: Setting,
        key: Key[Array, ""],
        particle: Particles,
    ) -> tuple[Particles, Info]:
        """Make one transition, whose kernels evaluate the density themselves; the
        `Info` has B entries."""
        tunings, noise = setting
        tuned = self.tuned(setting)
        steps = []
        kernels = []
        for b, kernel in enumerate(tuned.kernels):
            steps.append(self.step_size(b, tunings[b].log_scale, noise))
            kernels.append(kernel.under(density, noise))

        def target(v: Array) -> Evaluation:
            return self.layout.evaluate(density, v, noise.index, terms)

        kernel = replaced(tuned, kernels=tuple(kernels))
        moved, info = kernel.step(key, particle, target, jnp.stack(steps))
        return carried(particle, moved), info

    def noise_size(self, b: int) -> int:
        """Number of standard normals that a transition of block b takes."""
        block = self.blocks[b]
        entries = {block.name: jnp.zeros((len(block.entries),))}
        return self.kernel.kernels[b].noise_size(entries)

    def begin(
        self, b: int, setting: Setting, particle: Particles, normals: Array
    ) -> tuple[PyTree[Array], Float[Array, " size"]]:
        """Begin block b's transition; return its trajectory, and v where the density
        must be evaluated first."""
        tunings, noise = setting
        gibbs = self.tuned(setting)
        step = self.step_size(b, tunings[b].log_scale, noise)
        start = gibbs.block_state(b, particle)
        trajectory, part = gibbs.kernels[b].begin(normals, start, step)
        return _without_start(trajectory), gibbs.joined(b, particle.position, part)

    def advance(
        self,
        b: int,
        i: Int[Array, ""],
        setting: Setting,
        particle: Particles,
        trajectory: PyTree[Array],
        evaluation: Evaluation,
    ) -> tuple[PyTree[Array], Float[Array, " size"]]:
        """Go on after the transition's evaluation i, which was not the last; return the
        same as `begin`."""
        gibbs = self.tuned(setting)
        trajectory = _with_start(trajectory, gibbs.block_state(b, particle))
        trajectory, part = gibbs.kernels[b].advance(
            i, trajectory, gibbs.block_evaluation(b, evaluation)
        )
        return _without_start(trajectory), gibbs.joined(b, particle.position, part)

    def finish(
        self,
        b: int,
        setting: Setting,
        particle: Particles,
        trajectory: PyTree[Array],
        evaluation: Evaluation,
    ) -> tuple[Particles, Info]:
        """Accept or reject after the transition's last evaluation."""
        gibbs = self.tuned(setting)
        trajectory = _with_start(trajectory, gibbs.block_state(b, particle))
        state, info = gibbs.kernels[b].finish(
            trajectory, gibbs.block_evaluation(b, evaluation)
        )
        return carried(particle, gibbs.merged(b, particle, state)), info

    def start(
        self,
        words: UInt32[Array, " 2"],
        v: Float[Array, " size"],
        evaluation: Evaluation,
    ) -> Particles:
        """Return a chain at its first level, where it was evaluated."""
        key = key_of(words, Stream.STATES)
        return self.kernel.init(key, v, lambda _: evaluation)


def carried(start: Particles, moved: Particles) -> Particles:
    """Return a chain after a transition, with log f of its tracked factors.

    Where the kernel has not carried them, a factor's energy tells the rise of log f, or
    the trapezoid rule along the chord.
    """
    here = start.evaluation.tracked
    there = moved.evaluation.tracked
    if here is None or there is None:
        return moved
    chord = moved.position - start.position
    rises = []
    for i, (before, after) in enumerate(
        zip(here.log_densities, there.log_densities, strict=True)
    ):
        if before is not None and after is not None:
            rises.append(after - before)
        else:
            rises.append(0.5 * (here.scores[i] + there.scores[i]) @ chord)
    values = here.values + jnp.stack(rises)
    values = jnp.where(jnp.isnan(there.values), values, there.values)
    tracked = there.with_values(values)
    evaluation = dataclasses.replace(moved.evaluation, tracked=tracked)
    return dataclasses.replace(moved, evaluation=evaluation)


# Between its evaluations a transition is carried by the loop over levels. The position
# and the evaluation that it began with are those of the chain: kept in both places they
# would take memory twice.


def _without_start(trajectory: PyTree[Array]) -> PyTree[Array]:
    """Return the trajectory without the position and evaluation of its start."""
    if not isinstance(trajectory, Trajectory):
        return trajectory
    start = dataclasses.replace(trajectory.start, position=None, evaluation=None)
    return dataclasses.replace(trajectory, start=start)


def _with_start(trajectory: PyTree[Array], state: KernelState) -> PyTree[Array]:
    """Return the trajectory with its start's position and evaluation, those of
    ``state``."""
    if not isinstance(trajectory, Trajectory):
        return trajectory
    start = dataclasses.replace(
        trajectory.start, position=state.position, evaluation=state.evaluation
    )
    return dataclasses.replace(trajectory, start=start)


def _block_of(
    kernel: Kernel,
    label: str,
    sites: tuple[str, ...],
    layout: Layout,
    density: AnnealedDensity,
) -> Block:
    """Return the block of entries of these sites, which the kernel moves."""
    indices = layout.entries(sites)
    first = int(indices[0]) if len(indices) else 0
    in_a_row = range(first, first + len(indices))
    entries: range | tuple[int, ...] = in_a_row
    if not np.array_equal(indices, in_a_row):
        entries = tuple(map(int, indices))
    kinds = {density.sites[site].kind for site in sites}
    static = None
    if len(kinds) > 1:
        static = jnp.asarray(indices >= layout.dims)
    adaptive = isinstance(as_step_size(kernel.step_size), Adaptive)
    metric = getattr(kernel, "metric", None)
    return Block(
        name=label,
        entries=entries,
        follows_noise="noised" in kinds,
        static=static,
        in_noise=adaptive or isinstance(metric, Estimated),
    )


def _resolved_kernel(
    kernel: Kernel,
    block: Block,
    sites: tuple[str, ...],
    layout: Layout,
    density: AnnealedDensity,
) -> Kernel:
    """Return a block's kernel with its step sizes and its metric for this density."""
    rule = as_step_size(kernel.step_size)
    step: Adaptive | Array
    if isinstance(rule, Adaptive):
        # A product of P factors is narrower than each of them.
        powers = density.top.power
        greatest = [np.asarray(powers[site]).max() for site in sites if site in powers]
        power = float(max([1.0, *greatest]))
        step = rule.starting(kernel, max(len(block.entries), 1), power)
    else:
        step = resolve(rule, density.schedule, kernel)
    kernel = replaced(kernel, step_size=step)
    metric = getattr(kernel, "metric", None)
    if isinstance(metric, Metric) and metric is not EUCLIDEAN:
        flat = _flat_metric(metric, kernel, sites, block.name, density)
        return replaced(kernel, metric=flat)
    return kernel


def _in_force(kernel: Kernel, tuned: Tuning, block: Block, noise: Noise) -> Kernel:
    """Return a block's kernel in the metric that is in force at a level."""
    metric = getattr(kernel, "metric", None)
    unit = block.unit(noise)
    if metric is None or (isinstance(metric, Metric) and unit is None):
        return kernel
    if not isinstance(metric, Metric):
        metric = tuned.metric or EUCLIDEAN
    if unit is not None:
        metric = metric.scaled({block.name: unit})
    return replaced(kernel, metric=metric)


def _measured(
    spread: Spread,
    block: Block,
    tuned: Tuning,
    noise: Noise,
    moved: Float[Array, "chains size"],
    changed: Float[Array, "chains size"],
) -> Tuning:
    """Return a block's tuning with its metric measured once more, if it is measured."""
    before = tuned.metric
    if before is None:
        return tuned
    units = jnp.full((len(block.entries),), block.length(noise))
    if block.static is not None:
        units = jnp.where(block.static, 1.0, units)
    scale = {block.name: units}

    def solve(rows: Array) -> Metric:
        return measured(before, scale, *jnp.split(rows, 2, axis=1))

    of_block = [moved[:, block.index], changed[:, block.index]]
    rows = spread.gather(jnp.concatenate(of_block, axis=1))
    return dataclasses.replace(tuned, metric=spread.on_population(solve, rows))


def _flat_metric(
    metric: Metric,
    kernel: Kernel,
    sites: tuple[str, ...],
    block: str,
    density: AnnealedDensity,
) -> Metric:
    """Return a metric over sites as one over a block's entries."""
    shapes = {name: density.sites[name].shape for name in sorted(sites)}
    position = {name: np.zeros(shape) for name, shape in shapes.items()}
    metric.check(position, type(kernel).__name__)
    if not metric.unit:
        return metric
    units = []
    for name, shape in shapes.items():
        unit = metric.unit.get(name, np.ones((), np.float32))
        units.append(jnp.broadcast_to(unit, shape).reshape(-1))
    return dataclasses.replace(metric, unit={block: jnp.concatenate(units)})


def by_kind(
    make: Callable[[], Kernel],
    density: AnnealedDensity,
    static: Callable[[], Kernel] | None = None,
) -> Kernel:
    """Return one kernel; where there are noised and static sites, `Gibbs` with a kernel
    for each kind, ``static`` for the static sites.

    Step sizes of noised sites follow the level's noise. Under one kernel for all sites
    the shortest length would limit the step.
    """
    kinds = {name: site.kind for name, site in density.sites.items()}
    noised = tuple(name for name, kind in kinds.items() if kind == "noised")
    latent = tuple(name for name, kind in kinds.items() if kind == "static")
    if noised and latent:
        return Gibbs({noised: make(), latent: (static or make)()})
    return make()
