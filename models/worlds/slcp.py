"""SLCP, "simple likelihood, complex posterior": four points of a Gaussian in the plane.

Its posterior has four modes. θ has five uniform numbers; (θ₁, θ₂) is the Gaussian's
mean, θ₃² and θ₄² are its standard deviations, and tanh θ₅ is its correlation. Data of
one observation are its four points, a vector of eight numbers. They do not depend on
the signs of θ₃ and θ₄.

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
"""Number of parameters."""
POINTS = 4
"""Number of points of one observation."""
BOUND = 3.0
"""The prior is uniform on [−BOUND, BOUND]."""


def prior() -> dist.Distribution:
    """Return the uniform prior of θ, shape (5,)."""
    return dist.Uniform(jnp.full(SIZE, -BOUND), jnp.full(SIZE, BOUND)).to_event(1)


def simulate(key: Array, theta: Array) -> Array:
    """Draw one observation (n, 8) for each θ (n, 5)."""
    first, second = jax.random.normal(key, (2, theta.shape[0], POINTS))
    correlation = jnp.tanh(theta[:, 4:5])
    # √(1 − tanh²) as 1/cosh, which does not cancel where the correlation is close to 1.
    other = correlation * first + second / jnp.cosh(theta[:, 4:5])
    standard = jnp.stack([first, other], axis=-1)
    points = theta[:, None, :2] + theta[:, None, 2:4] ** 2 * standard
    return points.reshape(theta.shape[0], 2 * POINTS)


def log_likelihood(theta: Array, x: Array) -> Array:
    """Return log p(x | θ) of one observation x (8,) under one θ (5,)."""
    deviations = theta[2:4] ** 2
    z = (x.reshape(POINTS, 2) - theta[:2]) / deviations
    first = z[:, 0]
    # The inverse of `simulate`: independent of the first, with variance 1.
    other = (z[:, 1] - jnp.tanh(theta[4]) * first) * jnp.cosh(theta[4])
    log_deviations = jnp.sum(jnp.log(deviations))
    log_scale = log_deviations - jnp.log(jnp.cosh(theta[4])) + jnp.log(2 * jnp.pi)
    return -0.5 * jnp.sum(first**2 + other**2) - POINTS * log_scale
