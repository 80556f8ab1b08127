"""Posteriors of simulators, learned from pairs (θ, x) drawn afresh for each step."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

import composeprob as cp

from .networks.bounded_posterior import BoundedPosterior
from .networks.gaussian_posterior import GaussianPosterior
from .rates import cosine
from .worlds import drift_diffusion, slcp, two_moons

SETTINGS: dict[str, Any] = {
    "parameterization": "epsilon",
    "conditions": ("x",),
    # The focus is where posteriors take shape.
    "log_snr": cp.training.LogSNR(-12.0, 12.0, focus=(-3.0, 10.0)),
    "batches": cp.training.Batches(256, antithetic=True),
    "learning_rate": cosine(1e-3),
    "schedule": cp.Schedule.log_snr(80, -9.0, 11.0),
}


def even(log_snr: Array) -> Array:
    """Return a weight of the loss, 1/√(σ² + 0.001).

    It gives importance to errors of the score where there is little noise: the loss of
    the noise itself hardly depends on them there, as it contains σ·error. In a product
    over n observations they add up to n times as much.
    """
    return 1 / jnp.sqrt(jax.nn.sigmoid(-log_snr) + 1e-3)


def posterior(
    simulator: ModuleType, network: Any, **settings: Any
) -> cp.training.Recipe:
    """Return the recipe of p(θ | x) for one observation x.

    Args:
        simulator: a module with ``prior()`` and ``simulate(key, θ)``.
        network: ``network(key)`` makes the untrained network, called as ``network(θ, λ,
            x=x)``.
        settings: settings of the recipe in place of `SETTINGS`.
    """
    prior = simulator.prior()

    def pairs(key: Array, n: int) -> tuple[Array, dict[str, Array]]:
        prior_key, data_key = jax.random.split(key)
        theta = prior.sample(prior_key, (n,))
        return theta, {"x": simulator.simulate(data_key, theta)}

    return cp.training.Recipe(network=network, data=pairs, **(SETTINGS | settings))


def slcp_network(key: Array) -> BoundedPosterior:
    """Make the network of SLCP.

    It takes the data as mean, standard deviations and correlation of the four points,
    which are sufficient.
    """
    return BoundedPosterior(
        slcp.SIZE,
        slcp.BOUND,
        data=_moments,
        data_size=5,
        inputs=_residuals,
        input_size=8,
        width=160,
        embedding=96,
        rngs=nnx.Rngs(params=key),
    )


def _moments(x: Array) -> Array:
    """Return sufficient statistics of four points of a Gaussian, of moderate size."""
    mean, deviation, correlation = _sample(x)
    bounded = jnp.clip(correlation, -0.9999, 0.9999)
    angle = 0.5 * jnp.arctanh(bounded)[None]
    return jnp.concatenate([mean / slcp.BOUND, 0.5 * jnp.log(deviation), angle])


def _residuals(theta: Array, x: Array, width: Array) -> tuple[Array, Array]:
    """Return θ relative to its estimates by moments, in their errors, and these."""
    mean, deviation, correlation = _sample(x)
    error = 0.5 * deviation  # of a mean of four
    root = jnp.sqrt(deviation)
    root_error = 0.2 * root  # of √s, as s is estimated to about 40 %
    away = theta[:2] - mean
    place = away / jnp.sqrt(error**2 + width**2)
    # Where the points lie along a line, the errors of the two coordinates of their mean
    # are correlated.
    slope = correlation * deviation / deviation[::-1]
    rest = error**2 * (1 - correlation**2) + width**2 * (1 + slope**2)
    across = (away - slope * away[::-1]) / jnp.sqrt(rest)
    deviations = theta[2:4]
    # The deviations are θ₃² and θ₄²: either sign of a root is possible.
    root_spread = jnp.sqrt(root_error**2 + width**2)
    below = (deviations + root) / root_spread
    above = (deviations - root) / root_spread
    # Far away the logarithm of a distance is enough.
    features = jnp.arcsinh(jnp.concatenate([place, across, below, above]))
    scale = jnp.concatenate([error, root_error, jnp.ones(1)])
    return features, jnp.minimum(scale, slcp.BOUND / jnp.sqrt(3.0))


def _sample(x: Array) -> tuple[Array, Array, Array]:
    """Return mean, standard deviations and correlation of the points of x."""
    points = x.reshape(slcp.POINTS, 2)
    mean = points.mean(0)
    centred = points - mean
    variance = jnp.sum(centred**2, axis=0) / (slcp.POINTS - 1) + 1e-8
    covariance = jnp.sum(centred[:, 0] * centred[:, 1]) / (slcp.POINTS - 1)
    correlation = covariance / jnp.sqrt(variance[0] * variance[1])
    return mean, jnp.sqrt(variance), correlation


def two_moons_network(key: Array) -> BoundedPosterior:
    """Make the network of two moons, which takes θ and x at two scales each."""

    def inputs(theta: Array, x: Array, width: Array) -> tuple[Array, Array]:
        # x lies near (−|θ₁ + θ₂|, θ₂ − θ₁)/√2: both signs of the sum are features.
        total = theta[0] + theta[1]
        difference = theta[1] - theta[0]
        turned = jnp.stack([total, -total, difference]) / jnp.sqrt(2.0)
        near = (turned + jnp.stack([x[0], x[0], -x[1]])) / jnp.sqrt(0.2**2 + width**2)
        features = jnp.concatenate([near, jnp.arcsinh(10 * near)])
        return features, jnp.full(two_moons.SIZE, two_moons.WIDTH)

    return BoundedPosterior(
        two_moons.SIZE,
        two_moons.BOUND,
        data=lambda x: x,
        data_size=2,
        inputs=inputs,
        input_size=6,
        width=192,
        rngs=nnx.Rngs(params=key),
    )


def drift_diffusion_network(key: Array) -> GaussianPosterior:
    """Make the network of drift diffusion, which takes the summaries of a subject."""
    params, theta_key, data_key = jax.random.split(key, 3)
    world = drift_diffusion
    theta = world.prior().sample(theta_key, (2000,))
    return GaussianPosterior(
        world.SIZE,
        world.simulate(data_key, theta),
        centre=world.LOCATION,
        scale=world.SCALE,
        width=64,
        blocks=2,
        embedding=128,
        rngs=nnx.Rngs(params=params),
    )
