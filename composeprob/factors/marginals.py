"""Noised marginals in closed form: the law of α·X + σ·ε for the distributions X where it is known."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from jax.scipy.special import log_ndtr

from composeprob.errors import WrongTypeError
from composeprob.schedule import Noise

SUPPORTED = "Normal, MultivariateNormal, Uniform, Delta, and mixtures of them (MixtureSameFamily, MixtureGeneral)"


def noised(distribution: Any, noise: Noise) -> Any:
    """The distribution of α·X + σ·ε with ε ~ N(0, I), X ~ ``distribution``.

    Raises:
        WrongTypeError: no closed form is known for it.
    """
    alpha, sigma = noise.alpha, noise.sigma
    match distribution:
        case dist.Independent():
            return noised(distribution.base_dist, noise).to_event(distribution.reinterpreted_batch_ndims)
        case dist.ExpandedDistribution():
            return noised(distribution.base_dist, noise).expand(distribution.batch_shape)
        case dist.MixtureSameFamily():
            components = noised(distribution.component_distribution, noise)
            return dist.MixtureSameFamily(distribution.mixing_distribution, components)
        case dist.MixtureGeneral():
            parts = [noised(part, noise) for part in distribution.component_distributions]
            return dist.MixtureGeneral(distribution.mixing_distribution, parts, support=dist.constraints.real)
        case dist.Normal():
            return dist.Normal(alpha * distribution.loc, jnp.sqrt((alpha * distribution.scale) ** 2 + sigma**2))
        case dist.Delta() if distribution.event_dim == 0:
            return dist.Normal(alpha * distribution.v, sigma)
        case dist.MultivariateNormal():
            size = distribution.event_shape[-1]
            covariance = alpha**2 * distribution.covariance_matrix + sigma**2 * jnp.eye(size)
            return dist.MultivariateNormal(alpha * distribution.loc, covariance)
        case dist.Uniform():
            return NoisedUniform(distribution.low, distribution.high, alpha, sigma)
        case _:
            raise WrongTypeError(
                f"No closed form is known for a noised {type(distribution).__name__}.",
                fix=f"use {SUPPORTED}, or an array of points (n, *event_shape) for their empirical distribution.",
            )


class NoisedUniform(dist.Distribution):
    """α·U(low, high) + σ·ε: log[Φ((x−α·low)/σ) − Φ((x−α·high)/σ)] − log(α·(high−low)), accurate in both tails."""

    arg_constraints = {  # noqa: RUF012 - NumPyro's own class-level convention
        "low": dist.constraints.real,
        "high": dist.constraints.real,
        "alpha": dist.constraints.positive,
        "sigma": dist.constraints.positive,
    }
    support = dist.constraints.real

    def __init__(self, low: Any, high: Any, alpha: Any, sigma: Any, *, validate_args: bool | None = None):
        batch_shape = jnp.broadcast_shapes(jnp.shape(low), jnp.shape(high), jnp.shape(alpha), jnp.shape(sigma))
        self.low, self.high = (jnp.broadcast_to(jnp.asarray(a), batch_shape) for a in (low, high))
        self.alpha, self.sigma = (jnp.broadcast_to(jnp.asarray(a), batch_shape) for a in (alpha, sigma))
        super().__init__(batch_shape=batch_shape, validate_args=validate_args)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        uniform_key, normal_key = jax.random.split(key)
        shape = sample_shape + self.batch_shape
        clean = jax.random.uniform(uniform_key, shape, minval=self.low, maxval=self.high)
        return self.alpha * clean + self.sigma * jax.random.normal(normal_key, shape)

    def log_prob(self, value: Array) -> Array:
        upper = (value - self.alpha * self.low) / self.sigma
        lower = (value - self.alpha * self.high) / self.sigma
        # Φ(u) − Φ(l) = Φ(−l) − Φ(−u): on the side where both are small, neither rounds to 1.
        right = upper + lower > 0
        u, lo = jnp.where(right, -lower, upper), jnp.where(right, -upper, lower)
        log_u, log_l = log_ndtr(u), log_ndtr(lo)
        log_mass = log_u + jnp.log1p(-jnp.exp(log_l - log_u))
        return log_mass - jnp.log(self.alpha * (self.high - self.low))
