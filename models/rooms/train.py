"""Walks of 24 points through a row of rooms, given the doors, as a score."""

from __future__ import annotations

import jax
from jax import Array

import composeprob as cp

from ..networks.walker import Walker
from ..rates import cosine
from ..worlds import rooms


def data(key: Array, n: int) -> tuple[Array, dict[str, Array]]:
    """Draw n walks, each in rooms of its own."""
    doors_key, walk_key = jax.random.split(key)
    doors = jax.vmap(rooms.doors)(jax.random.split(doors_key, n))
    walks = jax.vmap(rooms.walk)(jax.random.split(walk_key, n), doors)
    return walks, {"doors": doors}


def network(key: Array) -> Walker:
    """Make the network, with the covariance of 20,000 walks."""
    walks, _ = data(jax.random.key(0), 20_000)
    return Walker(rooms.POINTS, walks, hidden=128, blocks=3, key=key)


RECIPE = cp.training.Recipe(
    network=network,
    data=data,
    parameterization="epsilon",
    conditions=("doors",),
    # σ is 0.005 at level 0, a hundredth of a door.
    schedule=cp.Schedule.log_snr(100, -9.0, 10.5),
    log_snr=cp.training.LogSNR(-12.0, 12.0, focus=(-3.0, 9.0)),
    batches=cp.training.Batches(256, antithetic=True),
    learning_rate=cosine(1e-3),
    iterations=25_000,
)
