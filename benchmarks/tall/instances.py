"""The toy problems of Linhart et al. (arXiv 2404.07593), whose single posteriors are
known at every noise level.

A problem has a Gaussian prior with a diagonal covariance, n observations, and the
posterior of θ from each of them alone: one Gaussian, or a mixture of two. Scores may be
wrong by a fixed amount, the output of a random network, as of a score that was learned:
ε̂ = ε + error·net(θ, x, t).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

BETA_MIN, BETA_MAX = 0.1, 40.0
FLOOR = math.exp(-16.0)
"""Term that the papers' code adds to σ²."""


class Instance(NamedTuple):
    """One problem: what is known of θ before and after one observation.

    Attributes:
        prior_mean, prior_variance: (m,).
        xs: the observations, (n, m).
        log_weights: of an individual posterior's components, (n, J).
        means: (n, J, m).
        covariances: (J, m, m), the same for every observation.
        error: what the network's output is multiplied by.
        net: the weights and biases of the network's two layers.
    """

    prior_mean: np.ndarray
    prior_variance: np.ndarray
    xs: np.ndarray
    log_weights: np.ndarray
    means: np.ndarray
    covariances: np.ndarray
    error: float
    net: tuple[np.ndarray, ...]

    @property
    def size(self) -> int:
        """m."""
        return len(self.prior_mean)


def gaussian(m: int, n: int, error: float, seed: int) -> Instance:
    """Prior N(μ₀, diag s²) of very unequal scales, x | θ ~ N(θ, 0.2·I + 0.8·11ᵀ)."""
    rng = np.random.default_rng([seed, m])
    mean = 20 * rng.uniform(size=m) - 10
    deviation = 25 * rng.uniform(size=m) + 0.1
    noise = 0.2 * np.eye(m) + 0.8
    theta = mean + deviation * rng.standard_normal(m)
    xs = rng.multivariate_normal(theta, noise, size=100)[:n]
    inverse = np.linalg.inv(noise)
    prior = np.diag(1 / deviation**2)
    covariance = np.linalg.inv(inverse + prior)
    means = (xs @ inverse + mean / deviation**2) @ covariance
    return Instance(
        mean,
        deviation**2,
        xs,
        np.zeros((n, 1)),
        means[:, None],
        covariance[None],
        error,
        _net(rng, m),
    )


def mixture(m: int, n: int, error: float, seed: int) -> Instance:
    """Prior N(0, I), x | θ ~ ½·N(θ, 2.25·S) + ½·N(θ, S/9); the components' weights are
    those of the papers' code."""
    rng = np.random.default_rng([seed, m, 2])
    s = np.sqrt(np.linspace(0.6, 1.4, m))
    theta = rng.standard_normal(m)
    wide = rng.uniform(size=100) < 0.5
    xs = (
        theta + np.where(wide[:, None], 1.5, 1 / 3) * s * rng.standard_normal((100, m))
    )[:n]
    precisions = np.stack([1 / (2.25 * s**2), 9 / s**2])
    variances = 1 / (precisions + 1)
    means = variances * precisions * xs[:, None]
    # The papers' code has s + 1, where the marginal's scale is √(s² + 1).
    scales = np.stack([1.5 * s + 1, s / 3 + 1])
    log_weights = np.sum(-0.5 * (xs[:, None] / scales) ** 2 - np.log(scales), axis=-1)
    log_weights -= np.logaddexp.reduce(log_weights, axis=1, keepdims=True)
    covariances = variances[:, :, None] * np.eye(m)
    return Instance(
        np.zeros(m),
        np.ones(m),
        xs,
        log_weights,
        means,
        covariances,
        error,
        _net(rng, m),
    )


TOYS = {"gaussian": gaussian, "mixture": mixture}


def _net(rng: np.random.Generator, m: int) -> tuple[np.ndarray, ...]:
    """Linear(2m + 1, 5m), ReLU, Linear(5m, m), tanh, as PyTorch initialises them."""
    shapes = ((2 * m + 1, 5 * m), (5 * m, m))
    layers = []
    for inputs, outputs in shapes:
        bound = 1 / math.sqrt(inputs)
        layers += [
            rng.uniform(-bound, bound, (inputs, outputs)),
            rng.uniform(-bound, bound, outputs),
        ]
    return tuple(layers)


def signal(t: Any) -> Array:
    """The papers' α(t), the square of the amplitude of the signal at time t."""
    return jnp.exp(-0.5 * (0.5 * (BETA_MAX - BETA_MIN) * t**2 + BETA_MIN * t))


def time_of(log_snr: Array) -> Array:
    """The t at which α/(1 − α) has this log."""
    # The root of ½·growth·t² + BETA_MIN·t = −2·log α.
    needed = 2 * jax.nn.softplus(-log_snr)
    growth = BETA_MAX - BETA_MIN
    return (jnp.sqrt(BETA_MIN**2 + 2 * growth * needed) - BETA_MIN) / growth


def log_posterior(
    instance: Instance,
    theta: Array,
    at: tuple[Array, Array],
    amplitude: Array,
    sigma: Array,
) -> Array:
    """log p(θ_t | x) of an individual posterior, normalised.

    Args:
        instance: for the covariances.
        theta: (m,).
        at: log-weights (J,) and means (J, m) of the posterior without noise.
        amplitude, sigma: θ_t = amplitude·θ + sigma·ε.
    """
    log_weights, means = at
    terms = []
    for j in range(len(instance.covariances)):
        covariance = amplitude**2 * jnp.asarray(
            instance.covariances[j]
        ) + sigma**2 * jnp.eye(instance.size)
        factor = jnp.linalg.cholesky(covariance)
        # One inverse serves all chains.
        inverse = jax.scipy.linalg.cho_solve((factor, True), jnp.eye(instance.size))
        away = theta - amplitude * means[j]
        log_det = 2 * jnp.sum(jnp.log(jnp.diag(factor)))
        terms.append(
            log_weights[j]
            - 0.5
            * (away @ inverse @ away + log_det + instance.size * math.log(2 * math.pi))
        )
    return jax.nn.logsumexp(jnp.stack(terms))


def mistake(instance: Instance, theta: Array, x: Array, t: Array) -> Array:
    """Error that is added to ε, (m,)."""
    first, first_bias, second, second_bias = map(jnp.asarray, instance.net)
    hidden = jax.nn.relu(
        jnp.concatenate([theta, x, jnp.reshape(t, (1,))]) @ first + first_bias
    )
    return instance.error * jnp.tanh(hidden @ second + second_bias)
