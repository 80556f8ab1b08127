"""Networks that count how often they are traced and run, and a conditional factor in closed form."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from composeprob.factors.base import LeafFactor, Traits
from composeprob.schedule import Schedule


class Counter:
    """Traces and runs so far. A callback without arguments runs once for a whole batch under `jax.vmap`."""

    def __init__(self) -> None:
        self.traces = self.runs = 0

    def called(self) -> None:
        self.traces += 1
        jax.debug.callback(self._ran)

    def _ran(self) -> None:
        self.runs += 1

    def runs_of(self, thunk: Any) -> int:
        """How often the network runs in `thunk`."""
        jax.effects_barrier()
        before = self.runs
        jax.block_until_ready(thunk())
        jax.effects_barrier()
        return self.runs - before


class Energy(eqx.Module):
    """E = ½·‖W·x − c‖² of each event; counted."""

    weight: jax.Array
    counter: Counter = eqx.field(static=True)

    def __call__(self, x: jax.Array, t: jax.Array, c: jax.Array | float = 0.0) -> jax.Array:
        self.counter.called()
        return 0.5 * jnp.sum((self.weight @ x - c) ** 2)


class Moved(LeafFactor):
    """N(c + d, 0.5²) of every entry, c and d conditions: normalised, and exact at every level."""

    schedule: Schedule
    event_shape: tuple[int, ...] = eqx.field(static=True)
    fixed: Mapping[str, Any]
    label: str = eqx.field(static=True)

    def __init__(self, schedule):
        self.schedule, self.event_shape, self.fixed, self.label = schedule, (2,), {}, "moved"

    @property
    def traits(self):
        return Traits(Traits.EXACT, "any", ("c", "d"))

    def call_conditions(self):
        return {"c": 0.0, "d": 0.0, **self.fixed}

    def evaluate(self, x, noise, conditions):
        def log_density(x):
            at, scale = noise.alpha * (conditions["c"] + conditions["d"]), jnp.hypot(0.5 * noise.alpha, noise.sigma)
            return jnp.sum(dist.Normal(at, scale).log_prob(x))

        return jax.value_and_grad(log_density)(x)
