"""Networks that count how often they are traced and run."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp


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
