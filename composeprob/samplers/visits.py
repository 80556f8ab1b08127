"""Which levels a run visits: all of them, those that it is given, or those that it chooses as it goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from composeprob import tuning
from composeprob.schedule import Schedule

if TYPE_CHECKING:
    from composeprob.samplers.run import Records


class Pace(eqx.Module):
    """How long the steps of a run are that chooses its levels: as long as the last one says that they may be.

    A step of Δλ in log-SNR had weights of relative variance v = 1/CESS − 1, which grows as Δλ², and was moved, in
    units of the density's width, when its end was taken into account too; e is the mean square, which grows as Δλ⁴. The
    next one is Δλ·min(√(V/v), (E/e)^¼) long, with V the ``variance`` and E the ``error``, and at most the ``longest``:
    as step sizes of integrators with an embedded error are chosen.

    References:
        Zhou, Johansen and Aston 2016, *Toward automatic model comparison*, for the conditional effective sample size,
        CESS. Hairer, Nørsett and Wanner 1993, *Solving ordinary differential equations I*, II.4, for step sizes.
    """

    variance: Array
    error: Array
    longest: Array

    @classmethod
    def default(cls, num_chains: int) -> Pace:
        """The one of ``levels="adaptive"``: what steps do wrong grows as Δλ², and shrinks with the ± of N chains."""
        pace = tuning.PACE
        share = min(1.0, pace.few_chains / num_chains)
        rules = pace.tolerance * share**0.5, pace.tolerance * share, pace.longest * share**0.25
        return cls(*map(jnp.float32, rules))

    def after(self, schedule: Schedule, records: Records, level: Array, above: Array) -> Array:
        """The level that follows, at least one below, and no cleaner than the step's length allows."""
        log_snr, pace = jnp.asarray(schedule.log_snr), tuning.PACE
        by_weight = jnp.sqrt(self.variance / jnp.maximum(records.weight_variance[level], 1e-12))
        by_error = (self.error / jnp.maximum(records.step_error[level], 1e-12)) ** 0.25
        ratio = jnp.minimum(by_weight, by_error)
        ratio = jnp.clip(jnp.where(jnp.isnan(ratio), pace.slower, ratio), pace.slower, pace.faster)
        step = jnp.minimum((log_snr[level] - log_snr[above]) * ratio, self.longest)
        goal = log_snr[level] + jnp.where(level == above, pace.first, step)
        return jnp.clip(jnp.sum(log_snr > goal + 1e-6), 0, jnp.maximum(level - 1, 0)).astype(jnp.int32)


class Visits(eqx.Module):
    """The levels of a run, in the order in which it visits them.

    Attributes:
        order: from the first level down to 0, (K,); 0 behind that, and `OPEN` where the ``pace`` has yet to choose.
        made: how many of them have been visited, a scalar.
    """

    OPEN = -1

    order: Array
    made: Array
    pace: Pace | None

    @classmethod
    def given(cls, levels: Sequence[int] | np.ndarray, num_levels: int) -> Visits:
        """Visits of these levels, the noisiest first, of which the last is 0."""
        order = np.zeros(num_levels, np.int32)
        order[: len(levels)] = levels
        return cls(jax.device_put(order), jax.device_put(np.int32(0)), None)

    @classmethod
    def every(cls, first: int, num_levels: int) -> Visits:
        """Visits of every level from the first one down."""
        return cls.given(np.arange(first, -1, -1), num_levels)

    @classmethod
    def paced(cls, first: int, num_levels: int, pace: Pace) -> Visits:
        """Visits of levels that the run chooses, from the first one on."""
        order = np.full(num_levels, cls.OPEN, np.int32)
        order[0] = first
        return cls(jnp.asarray(order), jnp.int32(0), pace)

    @property
    def arrived(self) -> Array:
        """Whether level 0 was visited, a boolean; NumPy's of visits that are on the host."""
        return (self.made > 0) & (self.order[self.made - 1] == 0)

    def before(self, end: Array | int) -> Array:
        """Whether fewer than ``end`` visits were made, and level 0 is not among them, a boolean."""
        return (self.made < end) & ~self.arrived

    @property
    def level(self) -> Array:
        """The level that was visited last; before the first visit the one where chains start."""
        return self.order[jnp.maximum(self.made - 1, 0)]

    @property
    def now(self) -> tuple[Array, Array]:
        """The level of the next visit, and the one above it, which is the same at the first."""
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
            following = jnp.where(given == self.OPEN, self.pace.after(schedule, records, *self.now), given)
            order = order.at[self.made + 1].set(following)  # beyond the end nothing is written
        return Visits(order, self.made + 1, self.pace)

    def visited(self) -> np.ndarray:
        """The levels that were visited, in order."""
        return np.asarray(self.order)[: int(self.made)]

    def coarser(self) -> Visits:
        """Every other one of the levels that were visited, the first and level 0 among them; nothing is visited yet."""
        levels = self.visited()
        given = Visits.given(np.append(levels[:-1:2], levels[-1]), len(self.order))
        # The pace is of no use, but without it the same loop would be compiled a second time.
        return Visits(given.order, given.made, self.pace)
