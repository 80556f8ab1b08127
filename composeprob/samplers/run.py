"""The state of a run at a level: its chains and their weights, adapted quantities,
records, and the levels that it visits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, PyTree, UInt32

from composeprob import tuning
from composeprob.records import Records
from composeprob.samplers.random import words_of
from composeprob.samplers.spread import Spread, chains, everywhere
from composeprob.schedule import Schedule


def _on_host(values: np.ndarray) -> Array:
    """Return NumPy's array where JAX's is expected: nothing is put on a device yet."""
    return values  # type: ignore[return-value]


class Pace(eqx.Module):
    """The rule by which a run chooses its levels: each step is as long as the last one
    allows.

    A step of Δλ in log-SNR had weights of relative variance v = 1/CESS − 1 (Zhou,
    Johansen and Aston 2016), which grows as Δλ², and was moved, in units of the
    density's width, by its correction; e is the mean square, which grows as Δλ⁴. The
    next one is Δλ·min(√(V/v), (E/e)^¼) long, with V the ``variance`` and E the
    ``error``, and at most the ``longest``: as integrators with an embedded error choose
    steps (Hairer, Nørsett and Wanner 1993, II.4).
    """

    variance: Float[Array, ""]
    error: Float[Array, ""]
    longest: Float[Array, ""]

    @classmethod
    def default(cls, num_chains: int) -> Pace:
        """Return the rule of ``levels="adaptive"``: the error of a step grows as Δλ²,
        and shrinks with the standard error of N chains."""
        pace = tuning.PACE
        share = min(1.0, pace.few_chains / num_chains)
        return cls(
            variance=jnp.float32(pace.tolerance * share**0.5),
            error=jnp.float32(pace.tolerance * share),
            longest=jnp.float32(pace.longest * share**0.25),
        )

    def after(
        self,
        schedule: Schedule,
        records: Records,
        level: Int[Array, ""],
        above: Int[Array, ""],
    ) -> Int[Array, ""]:
        """Return the level that follows, at least one below, and no cleaner than the
        step's length allows."""
        log_snr = jnp.asarray(schedule.log_snr)
        pace = tuning.PACE
        variance = jnp.maximum(records.weight_variance[level], 1e-12)
        error = jnp.maximum(records.step_error[level], 1e-12)
        by_weight = jnp.sqrt(self.variance / variance)
        by_error = (self.error / error) ** 0.25
        ratio = jnp.minimum(by_weight, by_error)
        # Where nothing was measured the next step is shorter.
        ratio = jnp.where(jnp.isnan(ratio), pace.slower, ratio)
        ratio = jnp.clip(ratio, pace.slower, pace.faster)
        last_step = log_snr[level] - log_snr[above]
        step = jnp.minimum(last_step * ratio, self.longest)
        goal = log_snr[level] + jnp.where(level == above, pace.first, step)
        # Levels are numbered from the cleanest: those cleaner than the goal are below.
        following = jnp.sum(log_snr > goal + 1e-6)
        return jnp.clip(following, 0, jnp.maximum(level - 1, 0)).astype(jnp.int32)


class Visits(eqx.Module):
    """The levels of a run, in the order in which it visits them."""

    OPEN = -1

    # From the first level down to 0, then zeros; `OPEN` where the pace has yet to
    # choose
    order: Int[Array, " levels"]
    made: Int[Array, ""]  # number of levels that have been visited
    pace: Pace | None

    @classmethod
    def given(
        cls,
        levels: Sequence[int] | np.ndarray,
        num_levels: int,
        pace: Pace | None = None,
    ) -> Visits:
        """Return visits of these levels, the noisiest first. The last one is level 0,
        or else the ``pace`` chooses the levels after it."""
        behind = 0 if pace is None else cls.OPEN
        order = np.full(num_levels, behind, np.int32)
        order[: len(levels)] = levels
        return cls(jax.device_put(order), jax.device_put(np.int32(0)), pace)

    @classmethod
    def every(cls, first: int, num_levels: int) -> Visits:
        """Return visits of every level from the first one down."""
        return cls.given(np.arange(first, -1, -1), num_levels)

    @property
    def arrived(self) -> Bool[Array, ""]:
        """True if level 0 was visited; NumPy's of visits that are on the host."""
        return (self.made > 0) & (self.order[self.made - 1] == 0)

    def before(self, end: Array | int) -> Bool[Array, ""]:
        """Return whether fewer than ``end`` visits were made, and level 0 is not among
        them."""
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
        """The number by which random numbers of the next visit are counted."""
        return self.order[self.made]

    def onwards(self, schedule: Schedule, records: Records) -> Visits:
        """Return the visits after one more was made, and is recorded."""
        order = self.order
        if self.pace is not None:
            given = order.at[self.made + 1].get(mode="fill", fill_value=0)
            chosen = self.pace.after(schedule, records, *self.now)
            following = jnp.where(given == self.OPEN, chosen, given)
            # Beyond the end nothing is written.
            order = order.at[self.made + 1].set(following)
        return Visits(order, self.made + 1, self.pace)

    def visited(self) -> Int[np.ndarray, " visited"]:
        """Return the levels that were visited, in order."""
        return np.asarray(self.order)[: int(self.made)]

    def coarser(self) -> Visits:
        """Return visits, none made yet, of every other visited level, with the first
        and level 0 among them."""
        levels = self.visited()
        given = Visits.given(np.append(levels[:-1:2], levels[-1]), len(self.order))
        # The pace is of no use, but without it the same loop would be compiled a second
        # time.
        return Visits(given.order, given.made, self.pace)


class Run(eqx.Module):
    """N chains at one level: everything that the next level needs.

    `Sampler.start` and `Sampler.advance` run on every device, and see there the part of
    that device of the arrays with a chains' axis (`BY_CHAIN`); all else is the same
    everywhere.
    """

    # A checkpoint names its arrays after these fields.

    # The sampler's state of every chain, each leaf of shape (N, …)
    chains: PyTree[Array]
    # Random words of every chain: chain i's noise depends on nothing but these and the
    # level
    words: UInt32[Array, "chains 2"]
    shared: UInt32[Array, " 2"]  # words for common decisions (resampling)
    log_weights: Float[Array, " chains"]
    # Log-weights of independent chains by their paths, up to a constant: the check of
    # modes' proportions reads them, and takes them for the run's weights where they
    # correct these.
    path_weights: Float[Array, " chains"]
    log_evidence: Float[Array, ""]  # log of the estimated ∫π
    evidence_variance: Float[Array, ""]  # its relative variance
    # Its increase if potentials were not averaged, and the variance of that
    averaging: Float[Array, " 2"]
    # The initial chain that each chain descends from, of 0 … N − 1
    ancestors: Int[Array, " all_chains"]
    tuning: tuple[PyTree[Array], ...]  # adapted quantities of each block of the kernel
    records: Records
    closings: Int[Array, ""]  # number of finishers that are done
    spent: Int[Array, ""]  # evaluations of each chain that these took
    # How much the last block of a warm-up at the target moved the population
    drift: Float[Array, ""]
    # Nats of evidence of what chains entered at level 0, where none had arrived
    entered: Float[Array, ""]
    # Mean probability with which global moves were accepted; NaN before there were any
    global_acceptance: Float[Array, ""]
    # Share of the chains that these took anywhere; NaN before there were any
    renewed: Float[Array, ""]
    # Log-evidence by draws from fitted mixtures as importance samples, its variance;
    # NaN before there were any
    importance_evidence: Float[Array, " 2"]
    visits: Visits
    # Places of the chains, and how many are evaluated at once
    spread: Spread = Spread()

    @classmethod
    def places(cls) -> Run:
        """Return the place of each part of a run, as `jax.shard_map` takes it."""
        places: dict[str, object] = {}
        for field in dataclasses.fields(cls):
            places[field.name] = chains if field.name in BY_CHAIN else everywhere
        return cls(**places)  # type: ignore[arg-type]

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
    """Return a run without chains, made on the host, so that nothing is compiled.

    It has random words, others for another ``series`` of the same key, equal weights
    and empty records.
    """
    words, shared = words_of(key, num_chains, series)
    precision = jnp.result_type(float)
    zero = _on_host(np.zeros((), precision))
    no_weights = _on_host(np.zeros((num_chains,), precision))
    none = _on_host(np.zeros((), np.int32))
    unmeasured = _on_host(np.full((), np.nan, precision))
    averaging = _on_host(np.zeros(2, precision))
    ancestors = _on_host(np.arange(num_chains, dtype=np.int32))
    run = Run(
        chains=None,
        words=words,
        shared=shared,
        log_weights=no_weights,
        path_weights=no_weights,
        log_evidence=zero,
        evidence_variance=zero,
        averaging=averaging,
        ancestors=ancestors,
        tuning=(),
        records=Records.empty(len(visits.order)),
        closings=none,
        spent=none,
        drift=zero,
        entered=zero,
        global_acceptance=unmeasured,
        renewed=unmeasured,
        importance_evidence=_on_host(np.full(2, np.nan, precision)),
        visits=visits,
        spread=spread or Spread(),
    )
    return jax.tree.map(jax.device_put, run)


def placed(run: Run, spread: Spread) -> Run:
    """Return the same run of N chains, spread over devices."""
    fields = [field.name for field in dataclasses.fields(run) if field.name != "spread"]
    parts = {name: getattr(run, name) for name in fields}
    by_chain = {name: parts.pop(name) for name in BY_CHAIN}
    by_chain = spread.place(spread.padded(by_chain), chains)
    common = spread.place(parts, everywhere)
    return Run(**by_chain, **common, spread=spread.place(spread, everywhere))
