"""What a run has at a level: its chains, what they weigh, what adapts, and what is recorded."""

from __future__ import annotations

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import PyTree

from composeprob.samplers.random import words_of
from composeprob.samplers.spread import Spread, chains, everywhere
from composeprob.samplers.visits import Visits


class Records(eqx.Module):
    """What is recorded of each level, every field of shape (K,), or (K, B) for the B blocks of a kernel; NaN where a
    level has no such number.

    `acceptance`, `step_size` and `quadrature_error`, the mean over accepted moves, are those of blocks. `ess` is taken
    before resampling, `ancestors`, the number of first chains that have descendants, after it. `weight_variance` is the
    relative variance of the incremental weights of the step to this level, `step_error` how far its correction moved
    chains, in units of the noise; `swaps` the mean probability of swaps with the next noisier rung.
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
        precision = jnp.result_type(float)
        by_level, by_block = (np.full(shape, np.nan, precision) for shape in ((num_levels,), (num_levels, num_blocks)))
        counts = np.zeros((num_levels,), np.int32)
        return cls(by_block, by_block, by_level, by_level, counts, by_block, by_level, by_level, by_level)  # type: ignore[arg-type]

    def at(self, level: Array, **values: Array) -> Records:
        """The same with other values at a level."""
        new = {name: getattr(self, name).at[level].set(value) for name, value in values.items()}
        return dataclasses.replace(self, **new)

    def counting(self, level: Array, bad: Array) -> Records:
        """The same with more moves of a level, over all chains, counted as non-finite."""
        return dataclasses.replace(self, non_finite=self.non_finite.at[level].add(bad))


class NoRecords(Records):
    """Records that stay empty, for runs that are compiled and not made: without means over all devices' chains."""

    def at(self, level: Array, **values: Array) -> NoRecords:
        return self

    def counting(self, level: Array, bad: Array) -> NoRecords:
        return self


class Run(eqx.Module):
    """N chains at one level: everything that the next level needs.

    `Sampler.start` and `Sampler.advance` run on every device, and see there the part of that device of what is by chain
    (`BY_CHAIN`); all else is the same everywhere.

    Attributes:
        chains: the sampler's own state of every chain, each leaf of shape (N, …).
        words: random words of every chain, (N, 2): chain i's noise depends on nothing but these and the level.
        shared: words for what chains decide together (resampling), (2,).
        log_weights: log-weights, (N,).
        path_weights: what independent chains would weigh by their paths, (N,), in logarithms and up to a constant: the
            check of modes' shares reads them, and takes them for the run's weights where they mend shares.
        log_evidence: log of the estimated ∫π, a scalar; ``evidence_variance`` is its relative variance.
        ancestors: the first chain that each chain descends from, (N,) of 0 … N − 1.
        tuning: what adapts of each block of the kernel.
        records: what happened at each level.
        stayed: transitions of a warm-up at the target, and ``drift``, by how much its last block moved the population.
        global_acceptance: mean probability with which global moves were accepted; NaN before there were any.
        visits: the levels that it visits, and how many it has visited.
        spread: which chains are where, and how many are evaluated at once.
    """

    chains: PyTree[Array]
    words: Array
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
    visits: Visits
    spread: Spread = Spread()

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


def begin(key: Array, num_chains: int, visits: Visits, spread: Spread | None = None, series: int = 0) -> Run:
    """A run without chains: random words, others for another ``series`` of the same key, equal weights, empty records;
    made on the host, so that nothing is compiled."""
    words, shared = words_of(key, num_chains, series)
    precision = jnp.result_type(float)
    zero, equal, none = np.zeros((), precision), np.zeros((num_chains,), precision), np.zeros((), np.int32)
    unknown, ancestors = np.full((), np.nan, precision), np.arange(num_chains, dtype=np.int32)
    records = Records.empty(len(visits.order))
    weights: PyTree[Array] = (equal, equal, zero, zero, ancestors)
    rest: PyTree[Array] = ((), records, none, zero, unknown, visits, spread or Spread())
    return jax.tree.map(jax.device_put, Run(None, words, shared, *weights, *rest))


def placed(run: Run, spread: Spread) -> Run:
    """The same run of N chains, spread so."""
    parts = {field.name: getattr(run, field.name) for field in dataclasses.fields(run)} | {"spread": spread}
    by_chain = spread.place(spread.padded({name: parts.pop(name) for name in BY_CHAIN}), chains)
    return Run(**by_chain, **spread.place(parts, everywhere))
