"""What a run has at a level: its chains, their weights, what adapts, what is recorded,
and which levels it visits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import PyTree

from composeprob import tuning
from composeprob.samplers.random import words_of
from composeprob.samplers.spread import Spread, chains, everywhere
from composeprob.schedule import Schedule


class Records(eqx.Module):
    """What is recorded of each level, every field of shape (K,), or (K, B) for the B
    blocks of a kernel; NaN where a level has no such number."""

    acceptance: Array  # (K, B)
    step_size: Array  # (K, B)
    ess: Array  # before resampling
    ancestors: Array  # the number of first chains that have descendants, after it
    non_finite: Array
    quadrature_error: Array  # the mean over accepted moves, (K, B)
    # the relative variance of the incremental weights of the step to this level
    weight_variance: Array
    step_error: Array  # how far its correction moved chains, in units of the noise
    swaps: Array  # the mean probability of swaps with the next noisier rung

    @classmethod
    def empty(cls, num_levels: int, num_blocks: int = 1) -> Records:
        # Not weakly typed, as nothing is that comes from a checkpoint: a run that goes
        # on would be compiled again.
        precision = jnp.result_type(float)
        by_level, by_block = (
            np.full(shape, np.nan, precision)
            for shape in ((num_levels,), (num_levels, num_blocks))
        )
        counts = np.zeros((num_levels,), np.int32)
        return cls(
            by_block,
            by_block,
            by_level,
            by_level,
            counts,
            by_block,
            by_level,
            by_level,
            by_level,
        )  # type: ignore[arg-type]

    def at(self, level: Array, **values: Array) -> Self:
        """The same with other values at a level."""
        new = {
            name: getattr(self, name).at[level].set(value)
            for name, value in values.items()
        }
        return dataclasses.replace(self, **new)

    def counting(self, level: Array, bad: Array) -> Self:
        """The same with more moves of a level, over all chains, counted as
        non-finite."""
        return self.at(level, non_finite=self.non_finite[level] + bad)


class NoRecords(Records):
    """Records that stay empty, for runs that are compiled and not made: without means
    over all devices' chains."""

    def at(self, level: Array, **values: Array) -> Self:
        return self


class Pace(eqx.Module):
    """How long the steps of a run are that chooses its levels: as long as the last one
    says that they may be.

    A step of Δλ in log-SNR had weights of relative variance v = 1/CESS − 1 (Zhou,
    Johansen and Aston 2016), which grows as Δλ², and was moved, in units of the
    density's width, by its correction; e is the mean square, which grows as Δλ⁴. The
    next one is Δλ·min(√(V/v), (E/e)^¼) long, with V the ``variance`` and E the
    ``error``, and at most the ``longest``: as integrators with an embedded error choose
    steps (Hairer, Nørsett and Wanner 1993, II.4).
    """

    variance: Array
    error: Array
    longest: Array

    @classmethod
    def default(cls, num_chains: int) -> Pace:
        """The one of ``levels="adaptive"``: what steps do wrong grows as Δλ², and
        shrinks with the ± of N chains."""
        pace = tuning.PACE
        share = min(1.0, pace.few_chains / num_chains)
        rules = (
            pace.tolerance * share**0.5,
            pace.tolerance * share,
            pace.longest * share**0.25,
        )
        return cls(*map(jnp.float32, rules))

    def after(
        self, schedule: Schedule, records: Records, level: Array, above: Array
    ) -> Array:
        """The level that follows, at least one below, and no cleaner than the step's
        length allows."""
        log_snr, pace = jnp.asarray(schedule.log_snr), tuning.PACE
        by_weight = jnp.sqrt(
            self.variance / jnp.maximum(records.weight_variance[level], 1e-12)
        )
        by_error = (self.error / jnp.maximum(records.step_error[level], 1e-12)) ** 0.25
        ratio = jnp.minimum(by_weight, by_error)
        ratio = jnp.clip(
            jnp.where(jnp.isnan(ratio), pace.slower, ratio), pace.slower, pace.faster
        )
        step = jnp.minimum((log_snr[level] - log_snr[above]) * ratio, self.longest)
        goal = log_snr[level] + jnp.where(level == above, pace.first, step)
        return jnp.clip(
            jnp.sum(log_snr > goal + 1e-6), 0, jnp.maximum(level - 1, 0)
        ).astype(jnp.int32)


class Visits(eqx.Module):
    """The levels of a run, in the order in which it visits them."""

    OPEN = -1

    # from the first level down to 0, (K,); 0 behind that, and `OPEN` where the pace has
    # yet to choose
    order: Array
    made: Array  # how many of them have been visited, a scalar
    pace: Pace | None

    @classmethod
    def given(
        cls,
        levels: Sequence[int] | np.ndarray,
        num_levels: int,
        pace: Pace | None = None,
    ) -> Visits:
        """Visits of these levels, the noisiest first, of which the last is 0, or after
        which the ``pace`` chooses."""
        order = np.full(num_levels, 0 if pace is None else cls.OPEN, np.int32)
        order[: len(levels)] = levels
        return cls(jax.device_put(order), jax.device_put(np.int32(0)), pace)

    @classmethod
    def every(cls, first: int, num_levels: int) -> Visits:
        """Visits of every level from the first one down."""
        return cls.given(np.arange(first, -1, -1), num_levels)

    @property
    def arrived(self) -> Array:
        """Whether level 0 was visited, a boolean; NumPy's of visits that are on the
        host."""
        return (self.made > 0) & (self.order[self.made - 1] == 0)

    def before(self, end: Array | int) -> Array:
        """Whether fewer than ``end`` visits were made, and level 0 is not among them, a
        boolean."""
        return (self.made < end) & ~self.arrived

    @property
    def level(self) -> Array:
        """The level that was visited last; before the first visit the one where chains
        start."""
        return self.order[jnp.maximum(self.made - 1, 0)]

    @property
    def now(self) -> tuple[Array, Array]:
        """The level of the next visit, and the one above it, which is the same at the
        first."""
        return self.order[self.made], self.level

    @property
    def number(self) -> Array:
        """What random numbers of the next visit are counted by."""
        return self.order[self.made]

    def onwards(self, schedule: Schedule, records: Records) -> Visits:
        """One visit more was made, and is recorded."""
        order = self.order
        if self.pace is not None:
            given = order.at[self.made + 1].get(mode="fill", fill_value=0)
            following = jnp.where(
                given == self.OPEN, self.pace.after(schedule, records, *self.now), given
            )
            order = order.at[self.made + 1].set(
                following
            )  # beyond the end nothing is written
        return Visits(order, self.made + 1, self.pace)

    def visited(self) -> np.ndarray:
        """The levels that were visited, in order."""
        return np.asarray(self.order)[: int(self.made)]

    def coarser(self) -> Visits:
        """Every other one of the levels that were visited, the first and level 0 among
        them; nothing is visited yet."""
        levels = self.visited()
        given = Visits.given(np.append(levels[:-1:2], levels[-1]), len(self.order))
        # The pace is of no use, but without it the same loop would be compiled a second
        # time.
        return Visits(given.order, given.made, self.pace)


class Run(eqx.Module):
    """N chains at one level: everything that the next level needs.

    `Sampler.start` and `Sampler.advance` run on every device, and see there the part of
    that device of what is by chain (`BY_CHAIN`); all else is the same everywhere.
    """

    chains: PyTree[
        Array
    ]  # the sampler's own state of every chain, each leaf of shape (N, …)
    # random words of every chain, (N, 2): chain i's noise depends on nothing but these
    # and the level
    words: Array
    shared: Array  # words for what chains decide together (resampling), (2,)
    log_weights: Array  # (N,)
    # What independent chains would weigh by their paths, (N,), in logarithms and up to
    # a constant: the check of modes' shares reads them, and takes them for the run's
    # weights where they mend shares.
    path_weights: Array
    log_evidence: Array  # log of the estimated ∫π, a scalar
    evidence_variance: Array  # its relative variance
    # what it would be more if potentials were not averaged, and the variance of that,
    # (2,)
    averaging: Array
    ancestors: Array  # the first chain that each chain descends from, (N,) of 0 … N − 1
    tuning: tuple[PyTree[Array], ...]  # what adapts of each block of the kernel
    records: Records  # what happened at each level
    closings: Array  # how many of what closes the run have
    spent: Array  # evaluations of each chain that these took
    # by how much the last block of a warm-up at the target moved the population
    drift: Array
    # mean probability with which global moves were accepted; NaN before there were any
    global_acceptance: Array
    visits: Visits  # the levels that it visits, and how many it has visited
    spread: Spread = (
        Spread()
    )  # which chains are where, and how many are evaluated at once

    @classmethod
    def places(cls) -> Run:
        """Where each part of a run is, as `jax.shard_map` wants it."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(*(chains if name in BY_CHAIN else everywhere for name in names))  # type: ignore[arg-type]

    @property
    def without_copies(self) -> Run:
        """The same run without copies of chains, as `placed` takes it."""
        parts = self.spread.cut({name: getattr(self, name) for name in BY_CHAIN})
        return dataclasses.replace(self, **parts, spread=Spread())


BY_CHAIN = ("chains", "words", "log_weights", "path_weights")
"""The parts of a run that lead with the chains' axis."""


def begin(
    key: Array,
    num_chains: int,
    visits: Visits,
    spread: Spread | None = None,
    series: int = 0,
) -> Run:
    """A run without chains: random words, others for another ``series`` of the same
    key, equal weights, empty records; made on the host, so that nothing is compiled."""
    words, shared = words_of(key, num_chains, series)
    precision = jnp.result_type(float)
    zero, equal, none = (
        np.zeros((), precision),
        np.zeros((num_chains,), precision),
        np.zeros((), np.int32),
    )
    unknown, ancestors = (
        np.full((), np.nan, precision),
        np.arange(num_chains, dtype=np.int32),
    )
    records = Records.empty(len(visits.order))
    weights: PyTree[Array] = (
        equal,
        equal,
        zero,
        zero,
        np.zeros(2, precision),
        ancestors,
    )
    rest: PyTree[Array] = (
        (),
        records,
        none,
        none,
        zero,
        unknown,
        visits,
        spread or Spread(),
    )
    return jax.tree.map(jax.device_put, Run(None, words, shared, *weights, *rest))


def placed(run: Run, spread: Spread) -> Run:
    """The same run of N chains, spread so."""
    parts = {
        field.name: getattr(run, field.name) for field in dataclasses.fields(run)
    } | {"spread": spread}
    by_chain = spread.place(
        spread.padded({name: parts.pop(name) for name in BY_CHAIN}), chains
    )
    return Run(**by_chain, **spread.place(parts, everywhere))
