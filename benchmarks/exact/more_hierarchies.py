"""More hierarchies with exact posteriors: readings whose noise is unknown, regressions
whose coefficients share a scale, and counts."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from scipy.special import gammaln, logsumexp

import composeprob as cp
from exact.hierarchies import (
    PRIOR_SD,
    Posterior,
    contrasts,
    log_prior,
    on_points,
    posterior_of_two,
    scale,
    two_scales,
)


def unknown_noise(prior: str) -> Any:
    """State readings of members whose noise has a scale of its own."""

    @cp.program
    def unknown_noise(y: Any) -> None:
        mu = numpyro.sample("mu", dist.Normal(0.0, PRIOR_SD))
        tau = scale("tau", prior)
        sigma = scale("sigma", prior)
        members, readings = y.shape
        with numpyro.plate("members", members, dim=-2):
            theta = numpyro.sample("theta", dist.Normal(mu, tau))
            with numpyro.plate("readings", readings, dim=-1):
                numpyro.sample("y", dist.Normal(theta, sigma), obs=y)

    return unknown_noise


def unknown_noise_posterior(prior: str, y: np.ndarray) -> Posterior:
    members, readings = y.shape
    of_member = y.mean(1)
    within = ((y - of_member[:, None]) ** 2).sum()
    between = readings * ((of_member - y.mean()) ** 2).sum()
    log_scales, tau, sigma = two_scales()
    outer = sigma**2 + readings * tau**2
    log_weight = contrasts(sigma**2, within, members * (readings - 1))
    log_weight += contrasts(outer, between, members - 1)
    return posterior_of_two(prior, y, log_weight, outer, log_scales, ("tau", "sigma"))


def regression(prior: str) -> Any:
    """State a line in many inputs whose coefficients share a scale."""

    @cp.program
    def regression(inputs: Any, y: Any) -> None:
        tau = scale("tau", prior)
        sigma = scale("sigma", prior)
        with numpyro.plate("coefficients", inputs.shape[1]):
            slope = numpyro.sample("slope", dist.Normal(0.0, tau))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Normal(inputs @ slope, sigma), obs=y)

    return regression


def regression_posterior(prior: str, inputs: np.ndarray, y: np.ndarray) -> Posterior:
    """Return the posterior of the first coefficient and of both scales.

    In the left singular vectors of the inputs, data have variances σ² + τ²·s².
    """
    left, singular, right = np.linalg.svd(inputs, full_matrices=False)
    along = left.T @ y
    beyond = (y**2).sum() - (along**2).sum()
    log_scales, tau, sigma = two_scales()
    log_weight = contrasts(sigma**2, beyond, len(y) - len(singular))
    mean = np.zeros_like(tau)
    variance = np.zeros_like(tau)
    for value, s, part in zip(along, singular, right[:, 0], strict=True):
        total = sigma**2 + tau**2 * s**2
        log_weight += contrasts(total, value**2, 1)
        mean += part * tau**2 * s / total * value
        variance += part**2 * tau**2 * sigma**2 / total
    of_prior = log_prior(prior, np.exp(log_scales))
    log_weight += of_prior[:, None] + of_prior
    scales = {"tau": np.log(tau).ravel(), "sigma": np.log(sigma).ravel()}
    arrays = log_weight.ravel(), mean.ravel(), variance.ravel()
    return on_points(*arrays, scales, location="slope")


def counts(prior: str) -> Any:
    """State counts of members whose log-rates share a mean and a scale."""

    @cp.program
    def counts(y: Any) -> None:
        mu = numpyro.sample("mu", dist.Normal(0.0, PRIOR_SD))
        tau = scale("tau", prior)
        with numpyro.plate("members", len(y)):
            theta = numpyro.sample("theta", dist.Normal(mu, tau))
            numpyro.sample("y", dist.Poisson(jnp.exp(theta)), obs=y)

    return counts


def counts_posterior(prior: str, y: np.ndarray) -> Posterior:
    """Return the posterior on a grid of mu and log tau, with each distinct count
    integrated over standard coordinates of its member."""
    mu = np.linspace(-4.0, 5.0, 181)[:, None]
    log_tau = np.linspace(-8.0, 3.0, 111)
    tau = np.exp(log_tau)
    xi = np.linspace(-7.0, 7.0, 281)
    log_xi = -0.5 * xi**2 - 0.5 * np.log(2 * np.pi) + np.log(xi[1] - xi[0])
    log_weight = -0.5 * (mu / PRIOR_SD) ** 2 + log_prior(prior, tau)
    for count, members in zip(*np.unique(y, return_counts=True), strict=True):
        for column, width in enumerate(tau):
            theta = mu + width * xi
            log_rate = count * theta - np.exp(theta) - gammaln(count + 1)
            log_weight[:, column] += members * logsumexp(log_rate + log_xi, axis=1)
    means, logs = np.broadcast_arrays(mu, log_tau)
    cell = np.full(means.size, float(mu[1, 0] - mu[0, 0]) ** 2 / 12)
    return on_points(log_weight.ravel(), means.ravel(), cell, {"tau": logs.ravel()})
