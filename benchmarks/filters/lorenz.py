"""Lorenz's system of 1963: its flow, and series of states and observations."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

START = jnp.array([1.509, -1.531, 25.46])
"""Mean of the first state, near the attractor."""

VARIANCE = 2.0
"""Variance of observations, and of the first state."""

FILE = Path(__file__).parent / "lorenz-63-series.npz"
"""The series of the benchmark, so that all filters see the same one."""


def rates(x: Array) -> Array:
    """The time derivative of states, (…, 3)."""
    a, b, c = jnp.moveaxis(x, -1, 0)
    return jnp.stack([10.0 * (b - a), a * (28.0 - c) - b, a * b - 8.0 / 3.0 * c], -1)


def runge_kutta(x: Array, h: float) -> Array:
    """States after a step of length h, by Runge and Kutta's rule of order 4."""
    k1 = rates(x)
    k2 = rates(x + h / 2 * k1)
    k3 = rates(x + h / 2 * k2)
    k4 = rates(x + h * k3)
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


@jax.jit
def flow(x: Array) -> Array:
    """States 0.25 units of time later, in steps of 0.01."""
    return jax.lax.fori_loop(0, 25, lambda _, x: runge_kutta(x, 0.01), x)


@jax.jit
def short_flow(x: Array) -> Array:
    """States 0.025 units of time later, in one step, as SDA has it."""
    return runge_kutta(x, 0.025)


def noised(key: Array, x: Array, width: float | Array) -> Array:
    """States with Gaussian noise of a standard deviation."""
    return x + width * jax.random.normal(key, x.shape)


class Series(NamedTuple):
    """True states and observations of them, (T + 1, 3)."""

    states: np.ndarray
    observations: np.ndarray


def series(steps: int) -> Series:
    """Return the benchmark's series, whose dynamics have no noise, all three numbers
    seen.

    A file holds 300 steps of it. The system is chaotic: versions of JAX round its flow
    differently, and then give different states after some 140 observations. A longer
    series is simulated.
    """
    known = np.load(FILE)
    if steps < len(known["states"]):
        first = slice(steps + 1)
        return Series(known["states"][first], known["observations"][first])
    return simulated(steps, jax.random.key(42))


def simulated(steps: int, key: Array) -> Series:
    """Return a new series, by the code that made the one in the file."""
    first_key, noise_key = jax.random.split(key)
    states = [noised(first_key, START, VARIANCE**0.5)]
    for _ in range(steps):
        states.append(flow(states[-1]))
    truth = np.array(states)
    observations = noised(noise_key, jnp.asarray(truth), VARIANCE**0.5)
    return Series(truth, np.asarray(observations))
