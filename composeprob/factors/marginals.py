"""Noised marginals: the distribution of α·X + σ·ε for the distributions X where it is known, exactly."""

from __future__ import annotations

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions.truncated import (
    LeftTruncatedDistribution,
    RightTruncatedDistribution,
    TwoSidedTruncatedDistribution,
)

from composeprob.errors import WrongTypeError
from composeprob.factors.one_dimension import NoisedByQuadrature, NoisedTruncatedNormal, NoisedUniform, coordinate
from composeprob.factors.whitening import log_normal
from composeprob.schedule import Noise

SUPPORTED = (
    "Normal, MultivariateNormal, Delta, Uniform, HalfNormal, TruncatedNormal, LogNormal, Gamma, Exponential, "
    "InverseGamma, Weibull, HalfCauchy, Beta, StudentT, Cauchy, these moved and scaled (AffineTransform), and mixtures "
    "(MixtureSameFamily, MixtureGeneral)"
)


def noised(distribution: dist.Distribution, noise: Noise) -> dist.Distribution:
    """The distribution of α·X + σ·ε with ε ~ N(0, I), X ~ ``distribution``.

    Raises:
        WrongTypeError: its noised distribution is not known.
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
        case dist.HalfNormal():
            return NoisedTruncatedNormal(distribution, 0.0, distribution.scale, 0.0, None, alpha, sigma)
        case LeftTruncatedDistribution() | RightTruncatedDistribution() | TwoSidedTruncatedDistribution() if isinstance(
            distribution.base_dist, dist.Normal
        ):  # NumPyro's function ``TruncatedNormal`` returns these
            inner = distribution.base_dist
            low, high = (getattr(distribution, bound, None) for bound in ("low", "high"))
            return NoisedTruncatedNormal(distribution, inner.loc, inner.scale, low, high, alpha, sigma)
        case _ if coordinate(distribution) is not None:
            return NoisedByQuadrature(distribution, alpha, sigma)
        case dist.TransformedDistribution() if distribution.base_dist.event_shape == () and all(
            isinstance(transform, dist.transforms.AffineTransform) for transform in distribution.transforms
        ):
            return _moved(distribution, noise)
        case _:
            raise WrongTypeError(
                f"A noised {type(distribution).__name__} has no closed form here.",
                fix=f"use {SUPPORTED}, or an array of points (n, *event_shape) for their empirical distribution.",
            )


class WhitenedNormal(dist.MultivariateNormal):
    """A multivariate normal whose density is that of `log_normal`: chains share no lock, and a level's covariance is
    factorised once for all of them."""

    def log_prob(self, value: Array) -> Array:
        return log_normal(value - self.loc, self.covariance_matrix)


def _moved(distribution: dist.Distribution, noise: Noise) -> dist.Distribution:
    """The noised distribution of loc + scale·Y: noised Y with as much noise for a signal of another strength, moved."""
    loc, scale = jnp.zeros(()), jnp.ones(())
    for transform in distribution.transforms:
        loc, scale = transform.loc + transform.scale * loc, transform.scale * scale
    whole = noised(distribution.base_dist, Noise(noise.index, noise.alpha * jnp.abs(scale), noise.sigma))
    shift = dist.transforms.AffineTransform(noise.alpha * loc, jnp.sign(scale), domain=dist.constraints.real)
    return dist.TransformedDistribution(whole, shift)
