"""Noised boxes, half-normals and truncated normals in closed form: a Gaussian times the mass of another in the box."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from jax.scipy.special import log_ndtr
from jax.typing import ArrayLike


class NoisedUniform(dist.Distribution):
    """α·U(low, high) + σ·ε: log[Φ((x−α·low)/σ) − Φ((x−α·high)/σ)] − log(α·(high−low)), accurate in both tails."""

    arg_constraints = {  # noqa: RUF012 - NumPyro's own class-level convention
        "low": dist.constraints.real,
        "high": dist.constraints.real,
        "alpha": dist.constraints.positive,
        "sigma": dist.constraints.positive,
    }
    support = dist.constraints.real

    def __init__(
        self, low: ArrayLike, high: ArrayLike, alpha: ArrayLike, sigma: ArrayLike, *, validate_args: bool | None = None
    ):
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


class NoisedTruncatedNormal(dist.Distribution):
    """α·U + σ·ε with U ~ N(loc, scale²) between ``low`` and ``high``, either of which may be None for none.

    Without bounds x = α·U + σ·ε is N(α·loc, v²), v² = α²·scale² + σ², and U given x is N(m, s²) with
    m = (α·scale²·x + σ²·loc)/v² and s = scale·σ/v. With them the density is
    N(x; α·loc, v²)·P(low < N(m, s²) < high)/P(low < N(loc, scale²) < high).
    """

    arg_constraints: dict[str, dist.constraints.Constraint] = {}  # noqa: RUF012 - NumPyro's own class-level convention
    support = dist.constraints.real

    def __init__(
        self, clean: dist.Distribution, loc: ArrayLike, scale: ArrayLike, low: Array | float | None,
        high: Array | float | None, alpha: ArrayLike, sigma: ArrayLike, *, validate_args: bool | None = None,
    ):  # fmt: skip
        batch_shape = jnp.broadcast_shapes(clean.batch_shape, jnp.shape(alpha), jnp.shape(sigma))
        self.clean = clean
        self.loc, self.scale, self.alpha, self.sigma = (
            jnp.broadcast_to(jnp.asarray(a), batch_shape) for a in (loc, scale, alpha, sigma)
        )
        self.low, self.high = low, high
        super().__init__(batch_shape=batch_shape, validate_args=validate_args)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        return noised_sample(self, self.clean, key, sample_shape)

    def log_prob(self, value: Array) -> Array:
        v = jnp.sqrt((self.alpha * self.scale) ** 2 + self.sigma**2)
        away = (value - self.alpha * self.loc) / v
        # m − loc, in units of the prior's scale so that nothing is lost where the noise is small or large.
        m = self.loc + self.alpha * self.scale**2 / v * away
        s = self.scale * self.sigma / v
        normal = -0.5 * away**2 - jnp.log(v) - 0.5 * math.log(2 * math.pi)
        return normal + self._log_inside(m, s) - self._log_inside(self.loc, self.scale)

    def _log_inside(self, mean: Array, deviation: Array) -> Array:
        """log P(low < N(mean, deviation²) < high)."""
        if self.high is None:
            assert self.low is not None
            return log_tail((mean - self.low) / deviation)
        if self.low is None:
            return log_tail((self.high - mean) / deviation)
        lower, upper = (self.low - mean) / deviation, (self.high - mean) / deviation
        return log_normal_mass(lower, upper, (self.high - self.low) / deviation)


def noised_sample(
    noised: dist.Distribution, clean: dist.Distribution, key: Array, sample_shape: tuple[int, ...]
) -> Array:
    """Draws α·X + σ·ε from draws of X."""
    clean_key, normal_key = jax.random.split(key)
    shape = sample_shape + noised.batch_shape
    events = clean.expand(noised.batch_shape).sample(clean_key, sample_shape)
    return noised.alpha * events + noised.sigma * jax.random.normal(normal_key, shape)


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
    log_u, log_l = log_tail(u), log_tail(lo)
    return jnp.where(narrow, by_quadrature, log_u + jnp.log1p(-jnp.exp(log_l - log_u)))


def log_tail(x: Array) -> Array:
    """log Φ(x); below −20 by its asymptotic series, because the gradient of JAX's loses its digits there."""
    far = x < -20.0
    y = jnp.where(far, x, -20.0)
    term = series = jnp.ones_like(y)
    for n in range(1, 8):
        term = -term * (2 * n - 1) / y**2
        series = series + term
    by_series = -0.5 * y**2 - jnp.log(-y) - 0.5 * math.log(2 * math.pi) + jnp.log(series)
    return jnp.where(far, by_series, log_ndtr(jnp.where(far, 0.0, x)))
