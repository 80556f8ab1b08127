"""SLCP, "simple likelihood, complex posterior": four points of a Gaussian in the plane,
whose posterior has four modes.

θ has five uniform numbers; (θ₁, θ₂) is the Gaussian's mean, θ₃² and θ₄² are its
standard deviations, and tanh θ₅ is its correlation. Data of one observation are its
four points, a vector of eight numbers. Neither the sign of θ₃ nor that of θ₄ can be
told from them.

References:
    Papamakarios, Sterratt and Murray 2019, *Sequential neural likelihood*; Lueckmann et
    al. 2021, *Benchmarking simulation-based inference*, whose simulator this is.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array

SIZE = 5
"""Parameters."""
POINTS = 4
"""Points of one observation."""
BOUND = 3.0
"""The prior is uniform from minus to plus this."""


def prior() -> dist.Distribution:
    """The uniform prior of θ, shape (5,)."""
    return dist.Uniform(jnp.full(SIZE, -BOUND), jnp.full(SIZE, BOUND)).to_event(1)


def simulate(key: Array, theta: Array) -> Array:
    """One observation (n, 8) for each θ (n, 5)."""
    first, second = jax.random.normal(key, (2, theta.shape[0], POINTS))
    correlation = jnp.tanh(theta[:, 4:5])
    # √(1 − tanh²) as 1/cosh, which does not cancel where the correlation is close to 1.
    other = correlation * first + second / jnp.cosh(theta[:, 4:5])
    points = theta[:, None, :2] + theta[:, None, 2:4] ** 2 * jnp.stack(
        [first, other], axis=-1
    )
    return points.reshape(theta.shape[0], 2 * POINTS)


def log_likelihood(theta: Array, x: Array) -> Array:
    """log p(x | θ) of one observation x (8,) under one θ (5,)."""
    deviations = theta[2:4] ** 2
    z = (x.reshape(POINTS, 2) - theta[:2]) / deviations
    first, other = (
        z[:, 0],
        (z[:, 1] - jnp.tanh(theta[4]) * z[:, 0]) * jnp.cosh(theta[4]),
    )
    log_scale = (
        jnp.sum(jnp.log(deviations)) - jnp.log(jnp.cosh(theta[4])) + jnp.log(2 * jnp.pi)
    )
    return -0.5 * jnp.sum(first**2 + other**2) - POINTS * log_scale
