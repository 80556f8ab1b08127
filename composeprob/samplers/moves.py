"""Transitions of all chains at one level: blocks of a kernel on flat particles, tuned
by the population."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import PyTree

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
from composeprob.samplers.layout import Layout
from composeprob.samplers.random import Stream, key_of
from composeprob.samplers.spread import Spread
from composeprob.schedule import Noise

Particles = GibbsState
"""N chains at one level: ``position`` is v = (y, z) of each, (N, D), ``evaluation`` is
that of the level's density, as `Layout.evaluate` makes it, and ``inner`` what the
kernel of each block carries (momentum, say)."""


class Block(eqx.Module):
    """Entries of a chain that one kernel moves."""

    name: str = eqx.field(static=True)  # of its sites
    entries: range | tuple[int, ...] = eqx.field(
        static=True
    )  # their indices, a `range` where they are in a row
    # Whether its adaptive step shrinks with the level's noise: whether any of its sites
    # is noised.
    follows: bool = eqx.field(static=True)
    static: (
        Array | None
    )  # which of its entries are static, where others are not, (n,) of booleans; None else
    # Whether static entries among noised ones are measured in units of the noise: not
    # where the user gave both step size and metric.
    in_noise: bool = eqx.field(static=True)

    @property
    def index(self) -> slice | np.ndarray:
        """What picks them out of a vector."""
        entries = self.entries
        return (
            slice(entries.start, entries.stop)
            if isinstance(entries, range)
            else np.asarray(entries)
        )

    def length(self, noise: Noise) -> Array:
        """The length, in y, that an adaptive step follows."""
        return noise.sigma / noise.alpha if self.follows else jnp.ones_like(noise.sigma)

    def unit(self, noise: Noise) -> Array | None:
        """What the entries of its static sites are measured in while a step suits its
        noised ones, (n,)."""
        if self.static is None:
            return None
        return jnp.where(
            self.static, noise.alpha / (noise.sigma if self.in_noise else 1.0), 1.0
        )


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
        super().__init__(
            {block.name: part for block, part in zip(blocks, kernels, strict=True)},
            backwards,
        )
        self.blocks = tuple(blocks)

    def part(self, b: int, v: Array) -> Position:
        return {self.blocks[b].name: v[self.blocks[b].index]}

    def joined(self, b: int, v: Array, part: Position) -> Array:
        block = self.blocks[b]
        entries = part[block.name].astype(v.dtype)
        return (
            entries
            if block.entries == range(len(v))
            else v.at[block.index].set(entries)
        )


class Tuning(eqx.Module):
    """What adapts of one block: log c of its step size, and its metric, None where none
    is measured."""

    log_scale: Array
    metric: Metric | None


Setting = tuple[tuple[Tuning, ...], Noise]
"""What is tuned, and the noise of the level."""


class Tally(eqx.Module):
    """What the transitions of each chain at a level add up to, (n, B) for the B blocks
    of a kernel: of acceptance probabilities, of acceptance × quadrature ``error`` (the
    error over accepted moves, without the noise of which were accepted), of
    ``non_finite`` moves, (n,), and of the step sizes in force, (B,)."""

    acceptance: Array
    error: Array
    non_finite: Array
    steps: Array

    @classmethod
    def blank(cls, chains: tuple[int, ...], blocks: int) -> Tally:
        zero = jnp.zeros((*chains, blocks))
        return cls(
            zero,
            zero,
            jnp.zeros(chains[0], jnp.int32),
            jnp.zeros((*chains[1:], blocks)),
        )

    def adding(self, b: int, info: Info, counted: Array, step: Array) -> Tally:
        """After one more transition of block b; one that is not ``counted`` can only be
        non-finite."""
        error = jnp.where(
            info.acceptance > 0, info.acceptance * info.quadrature_error, 0.0
        )
        bad = info.non_finite.astype(jnp.int32).reshape(len(self.non_finite), -1)
        return Tally(
            self.acceptance.at[..., b].add(jnp.where(counted, info.acceptance, 0.0)),
            self.error.at[..., b].add(jnp.where(counted, error, 0.0)),
            self.non_finite + jnp.sum(bad, axis=1, dtype=jnp.int32),
            self.steps.at[..., b].add(jnp.where(counted, step, 0.0)),
        )

    def means(
        self, spread: Spread, moves: Transitions, count: Array | int, num_chains: int
    ) -> tuple[Array, Array, Array]:
        """Over all chains and ``count`` of the ``moves``: mean acceptance, mean error
        of accepted moves (0 unless they integrate a score), number of non-finite
        moves."""
        acceptance = mean_acceptance(self.acceptance / count, spread.total, num_chains)
        errors = integrates_score(moves.kernel)
        error = (
            jnp.mean(spread.gather(self.error), axis=0) / count
            if errors
            else jnp.zeros_like(acceptance)
        )
        return acceptance, error / acceptance, spread.total(self.non_finite)


class Transitions(eqx.Module):
    """A kernel with its number of transitions a level, resolved for one density.

    In y = x/α a step of length h in x has length h/α, so what a user says of x is
    divided by α^p, p the kernel's `scale_exponent`; an adaptive step is c·s^{p/2},
    which is c·σ^p in x.
    """

    # Blocks with a kernel each, whose step size is an array (K,), of x, or `Adaptive`;
    # one block of all sites unless the user gave a `Gibbs`. Entries that must be held
    # are in no block.
    kernel: FlatGibbs
    count: int = eqx.field(
        static=True
    )  # transitions a level whose acceptance is recorded
    layout: Layout = eqx.field(static=True)  # of the density

    @classmethod
    def resolved(
        cls, kernel: Kernel, count: int, density: AnnealedDensity
    ) -> Transitions:
        """Check the sites, metrics and step sizes against the density, before anything
        is compiled."""
        layout, sites = Layout.of_density(density), density.sites
        blocks = in_blocks(
            kernel, [name for name, site in sites.items() if site.kind != "held"]
        )
        parts, places = [], []
        for part, names in zip(blocks.kernels, blocks.sites, strict=True):
            rule, metric, where = (
                as_step_size(part.step_size),
                getattr(part, "metric", None),
                layout.entries(names),
            )
            adaptive, kinds, name = (
                isinstance(rule, Adaptive),
                {sites[site].kind for site in names},
                ", ".join(names),
            )
            powers = [
                np.asarray(density.top.power[site]).max()
                for site in names
                if site in density.top.power
            ]
            steps = (
                rule.starting(
                    part,
                    max(len(where), 1),
                    float(max(1.0, *powers)) if powers else 1.0,
                )
                if isinstance(rule, Adaptive)
                else resolve(rule, density.schedule, part)
            )
            begin = int(where[0]) if len(where) else 0
            row = range(begin, begin + len(where))
            entries = row if np.array_equal(where, row) else tuple(map(int, where))
            still = None if len(kinds) < 2 else jnp.asarray(where >= layout.dims)
            in_noise = adaptive or isinstance(metric, Estimated)
            places.append(Block(name, entries, kinds != {"static"}, still, in_noise))
            part = replaced(part, step_size=steps)
            if isinstance(metric, Metric) and metric is not EUCLIDEAN:
                part = replaced(
                    part, metric=_flat_metric(metric, part, names, name, density)
                )
            parts.append(part)
        return cls(FlatGibbs(parts, places, blocks.backwards), count, layout)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """What each kernel moves."""
        return self.kernel.blocks

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
    def settling(self) -> int:
        """Transitions that adapt the step sizes once more before the first draw."""
        return tuning.WARM_UP.settling if any(self.adaptive) else 0

    def untuned(self, num_chains: int) -> tuple[Tuning, ...]:
        """log c where it starts, and no metric known, for N chains."""

        def start(part: Kernel, rule: Adaptive | None, block: Block) -> Tuning:
            metric, given = None, getattr(part, "metric", None)
            if isinstance(given, Estimated):
                metric = given.unmeasured(
                    {block.name: jnp.zeros((len(block.entries),))}, num_chains
                )
            return Tuning(rule.log_scale if rule else jnp.zeros(()), metric)

        return tuple(map(start, self.kernel.kernels, self.adaptive, self.blocks))

    def tuned(self, setting: Setting) -> FlatGibbs:
        """The kernel in the metrics that are in force."""
        tuning, noise = setting

        def in_force(part: Kernel, known: Tuning, block: Block) -> Kernel:
            given, unit = getattr(part, "metric", None), block.unit(noise)
            if given is None or (isinstance(given, Metric) and unit is None):
                return part
            metric = given if isinstance(given, Metric) else known.metric or EUCLIDEAN
            return replaced(
                part,
                metric=metric if unit is None else metric.scaled({block.name: unit}),
            )

        return replaced(
            self.kernel,
            kernels=tuple(map(in_force, self.kernel.kernels, tuning, self.blocks)),
        )

    def step_size(self, b: int, log_scale: Array, noise: Noise) -> Array:
        """The step size in force of block b, in y."""
        part, block = self.kernel.kernels[b], self.blocks[b]
        if isinstance(part.step_size, Adaptive):
            return scaled_step(log_scale, block.length(noise), part)
        assert isinstance(part.step_size, Array)
        return part.step_size[noise.index] * self.per_unit(b, noise)

    def per_unit(self, b: int, noise: Noise) -> Array:
        """What a step of block b in y is of the same step in x, α^−p."""
        return (
            noise.alpha ** -self.kernel.kernels[b].scale_exponent
            if self.blocks[b].follows
            else jnp.ones(())
        )

    def steps_in_x(self, tuning: tuple[Tuning, ...], noise: Noise) -> Array:
        """Those of all blocks, in x, (…, B) where what is tuned and the noise are
        (…)."""
        sizes = [
            self.step_size(b, known.log_scale, noise) / self.per_unit(b, noise)
            for b, known in enumerate(tuning)
        ]
        return jnp.stack(sizes, axis=-1)

    def adapted(
        self, b: int, known: Tuning, mean: Array, num_chains: int, pace: Array | float
    ) -> Tuning:
        """Block b's step size after a transition of N chains with this mean acceptance,
        at a ``pace`` from 0 to 1."""
        part = self.kernel.kernels[b]
        if not isinstance(rule := part.step_size, Adaptive):
            return known
        # The mean of few chains is mostly noise.
        gain = (
            pace * rule.gain * num_chains / (num_chains + tuning.STEP_SIZE.few_chains)
        )
        moved = adapt(known.log_scale, mean, rule.target(part), gain)
        return Tuning(jnp.where(pace > 0, moved, known.log_scale), known.metric)

    def measured(
        self,
        spread: Spread,
        tuning: tuple[Tuning, ...],
        noise: Noise,
        moved: Array,
        changed: Array,
    ) -> tuple[Tuning, ...]:
        """The metrics, for the transitions that follow, from how far each chain went at
        a level and how much its score changed, (n, D)."""

        def update(block: Block, known: Tuning) -> Tuning:
            if (before := known.metric) is None:
                return known
            units = jnp.full((len(block.entries),), block.length(noise))
            scale = {
                block.name: units
                if block.static is None
                else jnp.where(block.static, 1.0, units)
            }
            rows = spread.gather(
                jnp.concatenate(
                    [moved[:, block.index], changed[:, block.index]], axis=1
                )
            )
            solve = lambda rows: measured(before, scale, *jnp.split(rows, 2, axis=1))  # noqa: E731
            return dataclasses.replace(known, metric=spread.on_population(solve, rows))

        return tuple(map(update, self.blocks, tuning))

    # A single chain

    def step(
        self,
        density: AnnealedDensity,
        terms: bool,
        setting: Setting,
        key: Array,
        particle: Particles,
    ) -> tuple[Particles, Info]:
        """One transition, whose kernels evaluate the density themselves; the `Info` has
        B entries."""
        (tuning, noise), tuned = setting, self.tuned(setting)
        steps = [
            self.step_size(b, known.log_scale, noise) for b, known in enumerate(tuning)
        ]
        kernel = replaced(
            tuned, kernels=tuple(part.under(density, noise) for part in tuned.kernels)
        )
        target = lambda v: self.layout.evaluate(density, v, noise.index, terms)  # noqa: E731
        return kernel.step(key, particle, target, jnp.stack(steps))

    def noise_size(self, b: int) -> int:
        """How many standard normals a transition of block b takes."""
        block = self.blocks[b]
        return self.kernel.kernels[b].noise_size(
            {block.name: jnp.zeros((len(block.entries),))}
        )

    def begin(
        self, b: int, setting: Setting, particle: Particles, normals: Array
    ) -> tuple[PyTree[Array], Array]:
        """Block b's transition begins: its trajectory, and v where the first evaluation
        is wanted, (D,)."""
        gibbs, step = (
            self.tuned(setting),
            self.step_size(b, setting[0][b].log_scale, setting[1]),
        )
        trajectory, part = gibbs.kernels[b].begin(
            normals, gibbs.block_state(b, particle), step
        )
        return _starting(trajectory, None), gibbs.joined(b, particle.position, part)

    def advance(
        self,
        b: int,
        i: Array,
        setting: Setting,
        particle: Particles,
        trajectory: PyTree[Array],
        found: Evaluation,
    ) -> tuple[PyTree[Array], Array]:
        """It goes on after its evaluation i, which was not the last: as `begin`."""
        gibbs = self.tuned(setting)
        trajectory = _starting(trajectory, gibbs.block_state(b, particle))
        trajectory, part = gibbs.kernels[b].advance(
            i, trajectory, gibbs.block_evaluation(b, found)
        )
        return _starting(trajectory, None), gibbs.joined(b, particle.position, part)

    def finish(
        self,
        b: int,
        setting: Setting,
        particle: Particles,
        trajectory: PyTree[Array],
        found: Evaluation,
    ) -> tuple[Particles, Info]:
        """It is accepted, or not, after its last evaluation."""
        gibbs = self.tuned(setting)
        trajectory = _starting(trajectory, gibbs.block_state(b, particle))
        state, info = gibbs.kernels[b].finish(
            trajectory, gibbs.block_evaluation(b, found)
        )
        return gibbs.merged(b, particle, state), info

    def start(self, words: Array, v: Array, found: Evaluation) -> Particles:
        """A chain at its first level, where it was evaluated."""
        return self.kernel.init(key_of(words, Stream.STATES), v, lambda _: found)


def _starting(trajectory: PyTree[Array], state: KernelState | None) -> PyTree[Array]:
    """The trajectory from the state that it began with; None for none, as the chain has
    its position and evaluation."""
    if not isinstance(trajectory, Trajectory):
        return trajectory
    position, evaluation = (
        (None, None) if state is None else (state.position, state.evaluation)
    )
    start = dataclasses.replace(
        trajectory.start, position=position, evaluation=evaluation
    )
    return dataclasses.replace(trajectory, start=start)


def _flat_metric(
    metric: Metric,
    kernel: Kernel,
    names: tuple[str, ...],
    block: str,
    density: AnnealedDensity,
) -> Metric:
    """A metric over sites as one over a block's entries."""
    shapes = {name: density.sites[name].shape for name in sorted(names)}
    metric.check(
        {name: jnp.zeros(shape) for name, shape in shapes.items()},
        type(kernel).__name__,
    )
    if not metric.unit:
        return metric
    units = [
        jnp.broadcast_to(metric.unit.get(name, jnp.ones(())), shape).reshape(-1)
        for name, shape in shapes.items()
    ]
    return dataclasses.replace(metric, unit={block: jnp.concatenate(units)})


def by_kind(
    make: Callable[[], Kernel],
    density: AnnealedDensity,
    static: Callable[[], Kernel] | None = None,
) -> Kernel:
    """One kernel, or `Gibbs` with one for the noised sites and one, ``static``, for the
    static ones where there are both: step sizes of noised sites follow the level's
    noise, and under one for all the shortest length sets the pace.
    """
    noised, latent = (
        tuple(name for name, site in density.sites.items() if site.kind == kind)
        for kind in ("noised", "static")
    )
    return (
        Gibbs({noised: make(), latent: (static or make)()})
        if noised and latent
        else make()
    )
