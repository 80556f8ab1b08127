"""What a sampler is: it starts N chains at a noisy level and takes them, level by level, to level 0."""

from __future__ import annotations

import abc
import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import PyTree

from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Position, Target
from composeprob.errors import CapabilityError
from composeprob.kernels import Gibbs, Kernel
from composeprob.kernels.gibbs import parts_of
from composeprob.kernels.line_integral import integrates_score
from composeprob.samplers.spread import Spread, chains, everywhere
from composeprob.samplers.visits import Pace, Visits

if TYPE_CHECKING:
    from composeprob.samplers.transitions import Transitions

REVERSE = 2**31 - 1
"""Folded into a level's key for the reverse step; transitions fold in their number, counted from 0."""


class Records(eqx.Module):
    """What is recorded of each level, every field of shape (K,), or (K, B) for the B blocks of a kernel; NaN where a
    level has no such number.

    `acceptance`, `step_size` and `quadrature_error` are those of blocks. `ess` is taken before
    resampling, `ancestors`, the number of first chains that have descendants, after it.
    `quadrature_error` is the mean over accepted moves: what a path that is refused anyway is off by does no harm.
    `weight_variance` is the relative variance of the weights that the step to this level gave, and `step_error` how far
    chains were moved when its end was taken into account, in units of the noise.
    `swaps` is the mean probability of swaps with the next noisier rung of `ReplicaExchange`.
    """

    acceptance: Array
    step_size: Array
    ess: Array
    ancestors: Array
    non_finite: Array
    quadrature_error: Array
    weight_variance: Array
    step_error: Array
    swaps: Array

    @classmethod
    def empty(cls, num_levels: int, num_blocks: int = 1) -> Records:
        # Not weakly typed, as nothing is that comes from a checkpoint: a run that goes on would be compiled again.
        nan, own = (jnp.full(shape, jnp.nan, float) for shape in ((num_levels,), (num_levels, num_blocks)))
        return cls(own, own, nan, nan, jnp.zeros((num_levels,), jnp.int32), own, nan, nan, nan)


class Run(eqx.Module):
    """N chains at one level: everything that the next level needs.

    `Sampler.start` and `Sampler.visit` run on every device, and see there the chains, keys and log-weights of that
    device only; all else is the same everywhere.

    Attributes:
        chains: the sampler's own state of every chain, each leaf of shape (N, …).
        keys: a random key for every chain, (N,): chain i's noise depends on nothing but its key and the level.
        shared: the key for what chains decide together (resampling).
        log_weights: log-weights, (N,).
        path_weights: what independent chains would weigh by the way that they came, in logarithms and up to a constant,
            (N,): `shares.uneven_paths` looks at them, and nothing else does.
        log_evidence: log of the estimated ∫π, a scalar.
        evidence_variance: the relative variance of that estimate, a scalar.
        ancestors: the first chain that each chain descends from, (N,) of 0 … N − 1.
        tuning: what adapts of each block of the kernel: `tuning.Tuning`.
        records: what happened at each level.
        stayed: transitions that were made in a stay at level 0, a scalar, and ``drift``, what that still found to move.
        global_acceptance: mean probability with which global moves were accepted, a scalar; NaN before there were any.
        islands: log of what the weights of each island of `SMC` say of ∫π over what all of them say, (I,), at level 0.
        visits: the levels that it visits, and how many it has visited.
        spread: which chains are where, and how many are evaluated at once.
    """

    chains: PyTree[Array]
    keys: Array
    shared: Array
    log_weights: Array
    path_weights: Array
    log_evidence: Array
    evidence_variance: Array
    ancestors: Array
    tuning: tuple[PyTree[Array], ...]
    records: Records
    stayed: Array
    drift: Array
    global_acceptance: Array
    islands: Array
    visits: Visits
    spread: Spread = Spread()

    @classmethod
    def places(cls) -> Run:
        """Where each part of a run is, as `jax.shard_map` wants it."""
        return cls(chains, chains, everywhere, chains, chains, *(everywhere,) * 11)  # type: ignore[arg-type]

    @property
    def whole(self) -> Run:
        """The same run without copies of chains, as `placed` takes it."""
        own, keys, *weights = self.spread.cut((self.chains, self.keys, self.log_weights, self.path_weights))
        whole = dataclasses.replace(self, chains=own, keys=keys, spread=Spread())
        return dataclasses.replace(whole, log_weights=weights[0], path_weights=weights[1])

    def counting(self, level: Array, bad: Array) -> Run:
        """The same run with so many moves of the level, over all chains, counted as non-finite."""
        return eqx.tree_at(lambda run: run.records.non_finite, self, self.records.non_finite.at[level].add(bad))


class Route(eqx.Module):
    """What leads chains from each level to the next, apart from transitions.

    Attributes:
        reverse: whether a step of the reverse process does, as `reverse_step` makes it.
        leaning: whether that follows `leaning` and not the score.
        weights: how chains are weighed from level to level, None where they are not.
    """

    reverse: bool = eqx.field(static=True)
    leaning: bool = eqx.field(static=True, default=False)
    weights: str | None = eqx.field(static=True, default=None)


class Sampler(eqx.Module):
    """How chains travel from the noisiest level to level 0: what `infer` takes as ``sampler=``.

    Hyper-parameters only; numbers are leaves, so other numbers reuse compiled code.

    Attributes:
        kernel: what moves chains at a level; None where nothing does.
        moves: its transitions at each level, once `prepare` has resolved them.
        stay: whether HMC moves all sites at level 0 after the last visit, until the population stops drifting.
        global_moves: proposals to each chain there, before that, from what is fitted to other chains.
    """

    kernel: Kernel | None = eqx.field(default=None, init=False, repr=False)
    moves: Transitions | None = eqx.field(default=None, init=False, repr=False)
    stay: bool = eqx.field(default=False, init=False, repr=False, static=True)
    global_moves: Array | int = eqx.field(default=0, init=False, repr=False)

    @property
    @abc.abstractmethod
    def requires(self) -> dict[str, frozenset[str]]:
        """What the density must offer, by who needs it: ``{"HMC": {"energy", "score"}}``."""

    @property
    def paces(self) -> bool:
        """Whether it records what a `Pace` reads, so that runs can choose their levels."""
        return False

    @property
    def adjusted(self) -> tuple[bool, ...]:
        """Whether a Metropolis test decides, so that its acceptance means something, for each of the kernel's parts."""
        parts = () if self.kernel is None else parts_of(self.kernel)
        return tuple(part.optimal_acceptance is not None for part in parts) or (False,)

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the kernel's blocks, where it has any, such as ``("x", "mu, sigma")``."""
        return tuple(", ".join(sites) for sites in self.kernel.sites) if isinstance(self.kernel, Gibbs) else ()

    def in_numbers(self) -> Self:
        """The same, once prepared, with the steps that rules gave in the place of the rules: these are functions, and
        one that is written again, as a notebook's cell does, would be compiled again."""
        if self.kernel is None or self.moves is None:
            return self
        return eqx.tree_at(lambda sampler: sampler.kernel, self, self.moves.kernel)

    @property
    def check_order(self) -> int | None:
        """The order p at which the error of `Run.log_evidence` vanishes with the levels' distance, where it shall be
        estimated; None where it has none, or nobody asks."""
        return None

    @property
    def integrates_score(self) -> bool:
        """Whether an accept test integrates the score, which means something only where that is a gradient."""
        return self.kernel is not None and any(map(integrates_score, parts_of(self.kernel)))

    def estimates_evidence(self, density: AnnealedDensity) -> bool:
        """Whether `Run.log_evidence` estimates log ∫π_0."""
        return False

    @abc.abstractmethod
    def prepare(self, density: AnnealedDensity) -> Sampler:
        """The same sampler with everything resolved that depends on the density: step sizes per level, defaults.

        Raises:
            ComposeProbError: it cannot be used with this density.
        """

    def route(self, density: AnnealedDensity) -> Route:
        """How chains come from level to level, for likelihoods that walk this way backwards.

        Raises:
            ComposeProbError: its steps have no reversal that can be written down.
        """
        raise CapabilityError(
            f"The likelihood of {type(self).__name__} is not known: its path cannot be reversed.",
            fix="use cp.Ancestral(), cp.AnnealedMCMC(kernel, steps_per_level) or cp.SMC(kernel).",
        )

    def with_moves(self, kernel: Kernel, steps_per_level: int) -> Sampler:
        """The same sampler, not yet prepared, with other transitions; itself where it makes none."""
        return self

    @abc.abstractmethod
    def first_level(self, density: AnnealedDensity) -> int:
        """The level where chains start."""

    @abc.abstractmethod
    def evaluations(self, first_level: int, completed: int) -> int:
        """Evaluations of the composed density per chain in ``completed`` levels, counted from ``first_level`` down."""

    @abc.abstractmethod
    def proposals(self) -> int:
        """Moves of one chain at one level that can turn out non-finite: transitions, adapting ones included, and
        the reverse step."""

    @abc.abstractmethod
    def start(self, run: Run, density: AnnealedDensity, level: int) -> Run:
        """Fill in the chains' states (and first weights) at the first level, before any transition there."""

    @abc.abstractmethod
    def visit(self, run: Run, density: AnnealedDensity, level: Array, above: Array) -> Run:
        """Bring the chains from the level ``above`` to ``level`` and move them there.

        Called from the first level, where both are the same, down to 0.
        """

    def visits(self, density: AnnealedDensity, pace: Pace | None) -> Visits:
        """The levels that it visits: all from the first on, or those that a `Pace` chooses."""
        first, levels = self.first_level(density), density.num_levels
        return Visits.every(first, levels) if pace is None else Visits.paced(first, levels, pace)

    def draw(self, run: Run, density: AnnealedDensity, i: Array, thin: Array) -> Run:
        """Makes the ``thin`` transitions at level 0 that lead to draw i, before the first one `settling` ones too."""
        assert self.moves is not None
        keys = level_keys(run.keys, density.num_levels + 2)  # after those of the first draws and states
        spread, schedule, target = run.spread, density.schedule, self.target(density, jnp.int32(0))
        states, tuning, tally = self.moves.draw(spread, keys, run.chains, target, schedule, run.tuning, i, thin)
        records = self.moves.recorded(spread, run.records, schedule, tuning, tally, i * thin, thin)
        return dataclasses.replace(run, chains=states, tuning=tuning, records=records)

    @property
    def drawing(self) -> tuple[int, int, int]:
        """Evaluations of one transition of `draw`, the moves in it that can turn out non-finite, and how many of them
        are made before the first draw."""
        if self.moves is None:
            return 0, 0, 0
        return self.moves.kernel.evaluations_per_step, len(self.moves.follows), self.moves.settling

    def target(self, density: AnnealedDensity, level: Array | int) -> Target:
        """A level's density as this sampler's kernel sees it. Of chains that nobody weighs, what only weights read is
        not computed."""
        return lambda position: density.evaluator(position, level).alone

    @abc.abstractmethod
    def positions(self, run: Run) -> Position:
        """The chains' positions, each leaf of shape (N, …)."""

    def round_trips(self, run: Run) -> float | None:
        """How many replicas of a chain came from the noisiest level to level 0 in its draws; None without replicas."""
        return None

    @abc.abstractmethod
    def describe(self) -> str:
        """One line: the sampler and its settings."""

    def __repr__(self) -> str:
        return self.describe()


def begin(
    key: Array,
    num_chains: int,
    visits: Visits,
    spread: Spread = Spread(),  # noqa: B008 - immutable
) -> Run:
    """A run without chains: keys, equal weights, empty records."""
    return dataclasses.replace(_begin(key, num_chains, visits), spread=spread)


@partial(jax.jit, static_argnums=1)
def _begin(key: Array, num_chains: int, visits: Visits) -> Run:
    """`begin` on one device, which is called once for all arrays."""
    keys = jax.random.split(key, num_chains + 1)
    zero, weights = jnp.zeros(()), jnp.zeros((num_chains,))
    own, none = jnp.arange(num_chains, dtype=jnp.int32), jnp.zeros((), jnp.int32)
    records, apart = Records.empty(len(visits.order)), jnp.zeros((1,))
    unknown = jnp.full((), jnp.nan, float)  # not weakly typed, as in `Records.empty`
    state = records, none, zero, unknown, apart, visits
    return Run(None, keys[1:], keys[0], weights, weights, zero, zero, own, (), *state)


def placed(run: Run, spread: Spread) -> Run:
    """The same run of N chains, spread so."""
    by_chain = (run.chains, run.keys, run.log_weights, run.path_weights)
    own, keys, log_weights, path_weights = spread.place(spread.padded(by_chain), chains)
    common = (run.log_evidence, run.evidence_variance, run.ancestors, run.tuning, run.records)
    rest: Any = (*common, run.stayed, run.drift, run.global_acceptance, run.islands, run.visits, spread)
    return Run(
        own, keys, spread.place(run.shared, everywhere), log_weights, path_weights, *spread.place(rest, everywhere)
    )


def draw_initial(run: Run, density: AnnealedDensity, level: int) -> Position:
    """Independent draws of the first level's law, one a chain."""
    keys = level_keys(run.keys, density.num_levels)
    return run.spread.map(lambda key: density.initial(key, level), keys)


def level_keys(keys: Array, level: Array | int) -> Array:
    """Each chain's key for one level."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, level)
