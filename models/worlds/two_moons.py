"""Two moons: a point on a thin crescent, shifted by a function of θ.

Two values of θ have the same shift.

References:
    Greenberg, Nonnenmacher and Macke 2019, *Automatic posterior transformation*;
    Lueckmann et al. 2021, *Benchmarking simulation-based inference*, whose simulator
    this is.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array

SIZE = 2
"""Number of parameters."""
BOUND = 1.0
"""The prior is uniform on [−BOUND, BOUND]."""
RADIUS = 0.1
WIDTH = 0.01
CENTRE = 0.25
"""The crescent: mean radius, the radius' standard deviation, and x of the centre."""


def prior() -> dist.Distribution:
    """Return the uniform prior of θ, shape (2,)."""
    return dist.Uniform(jnp.full(SIZE, -BOUND), jnp.full(SIZE, BOUND)).to_event(1)


def simulate(key: Array, theta: Array) -> Array:
    """Draw one observation (n, 2) for each θ (n, 2)."""
    angle_key, radius_key = jax.random.split(key)
    angle = jax.random.uniform(
        angle_key, theta.shape[:1], minval=-jnp.pi / 2, maxval=jnp.pi / 2
    )
    radius = RADIUS + WIDTH * jax.random.normal(radius_key, theta.shape[:1])
    x = radius * jnp.cos(angle) + CENTRE
    moon = jnp.stack([x, radius * jnp.sin(angle)], axis=-1)
    return moon + _shift(theta)


def log_likelihood(theta: Array, x: Array) -> Array:
    """Return log p(x | θ) of one observation x (2,) under one θ (2,).

    It is −∞ beyond the half circle.
    """
    p = x - _shift(theta)
    u = jnp.array([p[0] - CENTRE, p[1]])
    radius = jnp.sqrt(jnp.sum(u**2))
    # The density of (angle, radius) over the plane's area element. The probability of
    # negative radii is negligible.
    inside = dist.Normal(RADIUS, WIDTH).log_prob(radius) - jnp.log(jnp.pi * radius)
    return jnp.where(u[0] > 0, inside, -jnp.inf)


def _shift(theta: Array) -> Array:
    """Return the shift, which is even in θ₁ + θ₂."""
    total = theta[..., 0] + theta[..., 1]
    difference = theta[..., 1] - theta[..., 0]
    return jnp.stack([-jnp.abs(total), difference], axis=-1) / jnp.sqrt(2.0)
