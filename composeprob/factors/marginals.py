"""Noised marginals in closed form: the law of α·X + σ·ε for the distributions X where it is known."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from jax.scipy.special import log_ndtr

from composeprob.errors import WrongTypeError
from composeprob.factors.whitening import log_normal
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
            whole = dist.constraints.independent(dist.constraints.real, len(distribution.event_shape))
            return dist.MixtureGeneral(distribution.mixing_distribution, parts, support=whole)
        case dist.Normal():
            return dist.Normal(
                alpha * jnp.asarray(distribution.loc),
                jnp.sqrt((alpha * jnp.asarray(distribution.scale)) ** 2 + sigma**2),
            )
        case dist.Delta() if distribution.event_dim == 0:
            return dist.Normal(alpha * jnp.asarray(distribution.v), sigma)
        case dist.MultivariateNormal():
            size = distribution.event_shape[-1]
            covariance = alpha**2 * distribution.covariance_matrix + sigma**2 * jnp.eye(size)
            return WhitenedNormal(alpha * jnp.asarray(distribution.loc), covariance)
        case dist.Uniform():
            return NoisedUniform(distribution.low, distribution.high, alpha, sigma)
        case _:
            raise WrongTypeError(
                f"No closed form is known for a noised {type(distribution).__name__}.",
                fix=f"use {SUPPORTED}, or an array of points (n, *event_shape) for their empirical distribution.",
            )


class WhitenedNormal(dist.MultivariateNormal):
    """A multivariate normal whose density is that of `log_normal`: chains share no lock, and a level's covariance is
    factorised once for all of them."""

    def log_prob(self, value: Array) -> Array:
        return log_normal(value - self.loc, self.covariance_matrix)


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
        width = self.alpha * (self.high - self.low) / self.sigma
        return log_normal_mass(lower, upper, width) - jnp.log(self.alpha * (self.high - self.low))


def log_normal_mass(lower: Array, upper: Array, width: Array) -> Array:
    """log[Φ(upper) − Φ(lower)], width = upper − lower > 0, with a value and gradient that no cancellation spoils.

    Wide intervals: the difference of two tails, on the side where neither rounds to 1. Narrow ones, whose tails agree
    in nearly all digits: Gauss–Legendre quadrature of exp(−z²/2) about the middle.
    """
    middle, half = 0.5 * (lower + upper), 0.5 * width
    narrow = (half < 0.5) & (half * jnp.abs(middle) < 2.0)
    nodes, weights = (jnp.asarray(a, middle.dtype) for a in np.polynomial.legendre.leggauss(16))
    h, m = jnp.where(narrow, half, 0.25)[..., None], jnp.where(narrow, middle, 0.0)[..., None]
    inside = jax.nn.logsumexp(-h * nodes * (m + 0.5 * h * nodes), b=weights, axis=-1)
    by_quadrature = inside + jnp.log(h[..., 0]) - 0.5 * m[..., 0] ** 2 - 0.5 * math.log(2 * math.pi)
    # Φ(u) − Φ(l) = Φ(−l) − Φ(−u): on the left side both are tails.
    right = middle > 0
    u, lo = jnp.where(right, -lower, upper), jnp.where(right, -upper, lower)
    u, lo = jnp.where(narrow, 1.0, u), jnp.where(narrow, -1.0, lo)
    log_u, log_l = _log_tail(u), _log_tail(lo)
    return jnp.where(narrow, by_quadrature, log_u + jnp.log1p(-jnp.exp(log_l - log_u)))


def _log_tail(x: Array) -> Array:
    """log Φ(x); below −20 by its asymptotic series, because the gradient of JAX's loses its digits there."""
    far = x < -20.0
    y = jnp.where(far, x, -20.0)
    term = series = jnp.ones_like(y)
    for n in range(1, 8):
        term = -term * (2 * n - 1) / y**2
        series = series + term
    by_series = -0.5 * y**2 - jnp.log(-y) - 0.5 * math.log(2 * math.pi) + jnp.log(series)
    return jnp.where(far, by_series, log_ndtr(jnp.where(far, 0.0, x)))
