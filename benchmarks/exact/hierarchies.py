"""Plain hierarchies of latents, with the exact laws of their mean and scales.

Given the scales all else is Gaussian: members are integrated in closed form, and mu is
normal. So one grid of the logarithm of a scale, or one of two of them, gives every
moment. Balanced designs of two layers, of crossed effects, and of readings whose noise
is unknown have covariances whose eigenvectors are the same for all scales: contrasts
within groups, between groups, and the grand mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from scipy import optimize
from scipy.special import ndtr

import composeprob as cp

PRIORS: dict[str, Callable[[], dist.Distribution]] = {
    "HalfNormal": lambda: dist.HalfNormal(1.0),
    "HalfCauchy": lambda: dist.HalfCauchy(1.0),
    "Exponential": lambda: dist.Exponential(1.0),
    "Gamma": lambda: dist.Gamma(2.0, 2.0),
    "InverseGamma": lambda: dist.InverseGamma(2.0, 0.5),
    "LogNormal": lambda: dist.LogNormal(-1.0, 1.0),
    "Uniform": lambda: dist.Uniform(0.0, 2.0),
}
"""Priors of scales; `InverseGamma` is that of a variance."""

PRIOR_SD = 2.0
"""Standard deviation of mu's prior."""

SHAPES = {5: (5, 1), 30: (6, 5), 100: (10, 10), 300: (20, 15), 1000: (40, 25)}
"""Groups and members, or rows and columns, of so many data."""


class Law(NamedTuple):
    """Mean, variance and fourth central moment of a marginal posterior."""

    mean: float
    variance: float
    fourth: float

    @property
    def deviation_of_square(self) -> float:
        """Standard deviation of the squared deviation from the mean, over the
        variance."""
        return math.sqrt(self.fourth / self.variance**2 - 1)


class Data(NamedTuple):
    """Data, and the standard deviation of each given its member."""

    y: np.ndarray
    noise: np.ndarray


class Event(NamedTuple):
    """A latent, or the logarithm of a scale, below a threshold."""

    name: str
    threshold: float
    probability: float


class Posterior(NamedTuple):
    """A posterior on a grid of scales: the weights of its points, the law of a latent
    that is normal at each of them, and the logarithms of the scales there."""

    weight: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    log_scales: dict[str, np.ndarray]
    location: str = "mu"

    def laws(self) -> dict[str, Law]:
        """Return the laws of the latent and of the log-scales."""
        centre = self.weight @ self.mean
        away = self.mean - centre
        variance = self.weight @ (self.variance + away**2)
        # Of a normal distribution about another point.
        fourth = self.weight @ (
            3 * self.variance**2 + 6 * self.variance * away**2 + away**4
        )
        laws = {self.location: Law(centre, variance, fourth)}
        for name, values in self.log_scales.items():
            centre = self.weight @ values
            away = values - centre
            laws[name] = Law(centre, self.weight @ away**2, self.weight @ away**4)
        return laws

    def events(self, tail: float) -> list[Event]:
        """Return the events below the quantiles at ``tail`` and at 1 − ``tail``."""
        found = []
        for probability in (tail, 1 - tail):
            threshold = self._quantile(probability)
            found.append(Event(self.location, threshold, probability))
            for name, values in self.log_scales.items():
                found.append(self._scale_below(name, values, probability))
        return found

    def _quantile(self, probability: float) -> float:
        """Return the quantile of the latent."""
        used = self.weight > 1e-12
        weight = self.weight[used]
        mean = self.mean[used]
        deviation = np.sqrt(self.variance[used])

        def excess(x: float) -> float:
            return float(weight @ ndtr((x - mean) / deviation)) - probability

        far = 8 * deviation
        return float(optimize.brentq(excess, (mean - far).min(), (mean + far).max()))

    def _scale_below(self, name: str, values: np.ndarray, tail: float) -> Event:
        """Return an event whose threshold lies halfway between two points of the grid,
        and whose probability is near ``tail``."""
        points, index = np.unique(values, return_inverse=True)
        below = np.cumsum(np.bincount(index, self.weight))
        last = int(np.abs(below[:-1] - tail).argmin())
        threshold = 0.5 * (points[last] + points[last + 1])
        return Event(name, float(threshold), float(below[last]))


class Structure(NamedTuple):
    """A hierarchy: its program for a prior, its data, and its exact posterior."""

    program: Callable[[str], Any]
    data: Callable[[int, str], Data]
    posterior: Callable[[str, Data], Posterior]

    def laws(self, prior: str, data: Data) -> dict[str, Law]:
        """Return the exact laws of mu and of the log-scales."""
        return self.posterior(prior, data).laws()


def scale(name: str, prior: str) -> Any:
    """State a scale, or the variance that it is the root of."""
    value = numpyro.sample(name, PRIORS[prior]())
    return jnp.sqrt(value) if prior == "InverseGamma" else value


def log_scale(value: Any, prior: str) -> Any:
    """Return the logarithm of a scale, by the value of its site."""
    return jnp.log(value) * (0.5 if prior == "InverseGamma" else 1.0)


def log_prior(prior: str, tau: np.ndarray) -> np.ndarray:
    """Return the log-density of log tau."""
    value = tau
    log_slope = np.log(tau)  # of the value, by log tau
    if prior == "InverseGamma":
        value = tau**2
        log_slope = np.log(2 * value)
    law = PRIORS[prior]()
    inside = np.asarray(law.support(value))
    # NumPyro warns of values outside of the support.
    within = jnp.asarray(np.where(inside, value, 1.0), jnp.float32)
    log_density = np.asarray(law.log_prob(within), float)
    return np.where(inside, log_density + log_slope, -np.inf)


def one_layer(prior: str) -> Any:
    @cp.program
    def one_layer(y: Any, noise: Any) -> None:
        mu = numpyro.sample("mu", dist.Normal(0.0, PRIOR_SD))
        tau = scale("tau", prior)
        with numpyro.plate("members", len(y)):
            theta = numpyro.sample("theta", dist.Normal(mu, tau))
            numpyro.sample("y", dist.Normal(theta, noise), obs=y)

    return one_layer


def non_centred(prior: str) -> Any:
    @cp.program
    def non_centred(y: Any, noise: Any) -> None:
        mu = numpyro.sample("mu", dist.Normal(0.0, PRIOR_SD))
        tau = scale("tau", prior)
        with numpyro.plate("members", len(y)):
            xi = numpyro.sample("xi", dist.Normal(0.0, 1.0))
            numpyro.sample("y", dist.Normal(mu + tau * xi, noise), obs=y)

    return non_centred


def two_layers(prior: str) -> Any:
    @cp.program
    def two_layers(y: Any, noise: Any) -> None:
        mu = numpyro.sample("mu", dist.Normal(0.0, PRIOR_SD))
        between = scale("between", prior)
        within = scale("within", prior)
        groups, members = y.shape
        with numpyro.plate("groups", groups, dim=-2):
            centre = numpyro.sample("centre", dist.Normal(mu, between))
            with numpyro.plate("members", members, dim=-1):
                theta = numpyro.sample("theta", dist.Normal(centre, within))
                numpyro.sample("y", dist.Normal(theta, noise), obs=y)

    return two_layers


def crossed(prior: str) -> Any:
    @cp.program
    def crossed(y: Any, noise: Any) -> None:
        mu = numpyro.sample("mu", dist.Normal(0.0, PRIOR_SD))
        rows = scale("rows", prior)
        columns = scale("columns", prior)
        of_rows = numpyro.plate("of rows", y.shape[0], dim=-2)
        of_columns = numpyro.plate("of columns", y.shape[1], dim=-1)
        with of_rows:
            row = numpyro.sample("row", dist.Normal(0.0, rows))
        with of_columns:
            column = numpyro.sample("column", dist.Normal(0.0, columns))
        with of_rows, of_columns:
            numpyro.sample("y", dist.Normal(mu + row + column, noise), obs=y)

    return crossed


ONE_LAYER = {
    "vague": (0.5, 0.5, 0.05),
    "sharp": (0.01, 0.01, 0.5),
    "mixed": (0.01, 2.0, 0.3),
}
"""Noise of every other datum, of those between, and the spread of members."""


def data_of_one_layer(members: int, kind: str) -> Data:
    """Draw data that are vague, sharp, or either in turn."""
    rng = np.random.default_rng(members)
    even, odd, spread = ONE_LAYER[kind]
    noise = np.where(np.arange(members) % 2, odd, even)
    theta = 0.4 + spread * rng.standard_normal(members)
    return Data(theta + noise * rng.standard_normal(members), noise)


LAYERS = {
    "vague": (0.5, 0.05, 0.05),
    "sharp": (0.01, 0.5, 0.5),
    "mixed": (0.5, 0.7, 0.02),
}
"""Noise, and the spreads of the first and of the second kind of effects."""


def data_of_two_layers(members: int, kind: str) -> Data:
    rng = np.random.default_rng(members)
    groups, each = SHAPES[members]
    noise, between, within = LAYERS[kind]
    centre = 0.4 + between * rng.standard_normal((groups, 1))
    theta = centre + within * rng.standard_normal((groups, each))
    y = theta + noise * rng.standard_normal((groups, each))
    return Data(y, np.asarray(noise))


def data_of_crossed(members: int, kind: str) -> Data:
    rng = np.random.default_rng(members)
    rows, columns = SHAPES[members]
    noise, of_rows, of_columns = LAYERS[kind]
    row = of_rows * rng.standard_normal((rows, 1))
    column = of_columns * rng.standard_normal((1, columns))
    y = 0.4 + row + column + noise * rng.standard_normal((rows, columns))
    return Data(y, np.asarray(noise))


def one_layer_posterior(prior: str, data: Data) -> Posterior:
    y, noise = data
    log_tau = np.linspace(-10.0, 4.0, 6001)
    tau = np.exp(log_tau)
    variance = tau[:, None] ** 2 + noise**2  # of a datum given mu and tau
    precision = (1 / variance).sum(1) + 1 / PRIOR_SD**2  # of mu given tau
    mean = (y / variance).sum(1) / precision
    log_weight = (
        log_prior(prior, tau)
        - 0.5 * (np.log(variance) + y**2 / variance).sum(1)
        + 0.5 * precision * mean**2
        - 0.5 * np.log(precision)
    )
    return on_points(log_weight, mean, 1 / precision, {"tau": log_tau})


def two_layers_posterior(prior: str, data: Data) -> Posterior:
    y, noise = data
    groups, each = y.shape
    of_group = y.mean(1)
    within_groups = ((y - of_group[:, None]) ** 2).sum()
    between_groups = each * ((of_group - y.mean()) ** 2).sum()
    log_scales, first, second = two_scales()
    inner = second**2 + noise**2  # variance of contrasts within groups
    outer = inner + each * first**2  # of contrasts between groups
    log_weight = contrasts(inner, within_groups, groups * (each - 1))
    log_weight += contrasts(outer, between_groups, groups - 1)
    names = ("between", "within")
    return posterior_of_two(prior, y, log_weight, outer, log_scales, names)


def crossed_posterior(prior: str, data: Data) -> Posterior:
    y, noise = data
    rows, columns = y.shape
    mean = y.mean()
    between_rows = columns * ((y.mean(1) - mean) ** 2).sum()
    between_columns = rows * ((y.mean(0) - mean) ** 2).sum()
    log_scales, first, second = two_scales()
    of_rows = noise**2 + columns * first**2
    of_columns = noise**2 + rows * second**2
    log_weight = contrasts(of_rows, between_rows, rows - 1)
    log_weight += contrasts(of_columns, between_columns, columns - 1)
    total = of_rows + of_columns - noise**2
    names = ("rows", "columns")
    return posterior_of_two(prior, y, log_weight, total, log_scales, names)


def two_scales() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the log-scales of a grid, and both scales at its points."""
    log_scales = np.linspace(-9.0, 3.0, 601)
    first, second = np.meshgrid(np.exp(log_scales), np.exp(log_scales), indexing="ij")
    return log_scales, first, second


def contrasts(variance: np.ndarray, squares: float, number: int) -> np.ndarray:
    """Return the log-density of so many contrasts of this variance."""
    return -0.5 * number * np.log(variance) - 0.5 * squares / variance


def posterior_of_two(
    prior: str,
    y: np.ndarray,
    log_weight: np.ndarray,
    total: np.ndarray,
    log_scales: np.ndarray,
    names: tuple[str, str],
) -> Posterior:
    """Return the posterior by the weights of a grid without those of the grand mean,
    which is N(mu, ``total``/n)."""
    of_mean = total / y.size
    marginal = of_mean + PRIOR_SD**2
    log_weight = log_weight - 0.5 * np.log(marginal) - 0.5 * y.mean() ** 2 / marginal
    of_prior = log_prior(prior, np.exp(log_scales))
    log_weight = log_weight + of_prior[:, None] + of_prior
    precision = 1 / of_mean + 1 / PRIOR_SD**2
    mean = y.mean() / of_mean / precision
    first, second = np.meshgrid(log_scales, log_scales, indexing="ij")
    scales = {names[0]: first.ravel(), names[1]: second.ravel()}
    return on_points(log_weight.ravel(), mean.ravel(), 1 / precision.ravel(), scales)


def on_points(
    log_weight: np.ndarray,
    mean: np.ndarray,
    variance: np.ndarray,
    log_scales: dict[str, np.ndarray],
    location: str = "mu",
) -> Posterior:
    """Return the posterior whose points have these log-weights, up to a constant."""
    weight = np.exp(log_weight - log_weight.max())
    weight /= weight.sum()
    return Posterior(weight, mean, variance, log_scales, location)


STRUCTURES = {
    "one layer": Structure(one_layer, data_of_one_layer, one_layer_posterior),
    "non-centred": Structure(non_centred, data_of_one_layer, one_layer_posterior),
    "two layers": Structure(two_layers, data_of_two_layers, two_layers_posterior),
    "crossed": Structure(crossed, data_of_crossed, crossed_posterior),
}
