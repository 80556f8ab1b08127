"""Noised distributions in one dimension: boxes, half-normals and truncated normals in closed form, the others that have
a bound or heavy tails by quadrature.

The integral ∫ p(u)·N(x; α·u, σ²) du is taken over a coordinate z that leaves no wall and no singularity (Student's t is
a mixture of normals, over whose widths it is taken): u = T(z), with
q(z) = log p(T(z)) + log T'(z) smooth and concave. The nodes lie between edges of two kinds: evenly over where coarser
edges show that the integrand counts, and about x/α at distances of σ/α, which resolve the noise however small it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from jax.scipy.special import betaln, gammaln, log_ndtr
from jax.typing import ArrayLike, DTypeLike

from composeprob import tuning


class Noised(dist.Distribution):
    """α·X + σ·ε with X ~ ``clean`` and ε ~ N(0, 1), entry by entry."""

    arg_constraints: dict[str, dist.constraints.Constraint] = {}  # noqa: RUF012 - NumPyro's own class-level convention
    pytree_data_fields: tuple[str, ...] = ("clean", "alpha", "sigma")
    support = dist.constraints.real

    def __init__(
        self, clean: dist.Distribution, alpha: ArrayLike, sigma: ArrayLike, *, validate_args: bool | None = None
    ):
        batch_shape = jnp.broadcast_shapes(clean.batch_shape, jnp.shape(alpha), jnp.shape(sigma))
        self.clean = clean.expand(batch_shape) if clean.batch_shape != batch_shape else clean
        self.alpha, self.sigma = (jnp.broadcast_to(jnp.asarray(a), batch_shape) for a in (alpha, sigma))
        super().__init__(batch_shape=batch_shape, validate_args=validate_args)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        clean_key, normal_key = jax.random.split(key)
        events = self.clean.sample(clean_key, sample_shape)
        return self.alpha * events + self.sigma * jax.random.normal(normal_key, sample_shape + self.batch_shape)


class NoisedUniform(Noised):
    """α·U(low, high) + σ·ε: log[Φ((x−α·low)/σ) − Φ((x−α·high)/σ)] − log(α·(high−low)), accurate in both tails."""

    pytree_data_fields = ("low", "high")

    def __init__(self, low: ArrayLike, high: ArrayLike, alpha: ArrayLike, sigma: ArrayLike):
        super().__init__(dist.Uniform(low, high), alpha, sigma)
        self.low, self.high = (jnp.broadcast_to(jnp.asarray(a), self.batch_shape) for a in (low, high))

    def log_prob(self, value: Array) -> Array:
        upper = (value - self.alpha * self.low) / self.sigma
        lower = (value - self.alpha * self.high) / self.sigma
        width = self.alpha * (self.high - self.low) / self.sigma
        return log_normal_mass(lower, upper, width) - jnp.log(self.alpha * (self.high - self.low))


class NoisedTruncatedNormal(Noised):
    """α·U + σ·ε with U ~ N(loc, scale²) between ``low`` and ``high``, either of which may be None for none.

    Without bounds x = α·U + σ·ε is N(α·loc, v²), v² = α²·scale² + σ², and U given x is N(m, s²) with
    m = (α·scale²·x + σ²·loc)/v² and s = scale·σ/v. With them the density is
    N(x; α·loc, v²)·P(low < N(m, s²) < high)/P(low < N(loc, scale²) < high).
    """

    pytree_data_fields = ("loc", "scale", "low", "high")

    def __init__(
        self, clean: dist.Distribution, loc: ArrayLike, scale: ArrayLike, low: Array | float | None,
        high: Array | float | None, alpha: ArrayLike, sigma: ArrayLike,
    ):  # fmt: skip
        super().__init__(clean, alpha, sigma)
        self.loc, self.scale = (jnp.broadcast_to(jnp.asarray(a), self.batch_shape) for a in (loc, scale))
        self.low, self.high = low, high

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


class NoisedStudent(Noised):
    r"""α·U + σ·ε with U Student's t of ν degrees of freedom, 1 of a Cauchy distribution.

    U is N(loc, scale²·e^{−z}) with e^z ~ Γ(ν/2, ν/2), so that the density is

        ∫ q(z)·N(x; α·loc, α²·scale²·e^{−z} + σ²) dz,   log q = ½ν·(log ½ν + z − e^z) − log Γ(½ν),

    by quadrature between where q, and below where x pulls z to, the integrand is negligible: smooth however small the
    noise is, with a third of the nodes that an integral over U takes, and a sixth of the time.
    """

    def log_prob(self, value: Array) -> Array:
        clean = self.clean
        while isinstance(clean, dist.ExpandedDistribution):
            clean = clean.base_dist
        parts = (clean.df if isinstance(clean, dist.StudentT) else 1.0), clean.loc, clean.scale, self.alpha, self.sigma
        df, loc, scale, alpha, sigma = (jnp.broadcast_to(a, self.batch_shape)[..., None] for a in parts)
        half, wide, square = 0.5 * df, (alpha * scale) ** 2, (jnp.asarray(value)[..., None] - alpha * loc) ** 2
        left, right = (_negligible(df.dtype) / a for a in (half + 0.5, half))
        # Where e^{−z} + (σ/(α·scale))² is what x says of the variance; the rest is how far that may be off.
        pulled = -jnp.log(jnp.maximum((df + square / wide) / (df + 1) - sigma**2 / wide, 1.0))
        low = pulled - jnp.where(left < 0.5, 1.5 * jnp.sqrt(2 * left), left + 1) - jnp.minimum(0.25, 200 / df)
        high = jnp.minimum(jnp.sqrt(2 * right), jnp.log1p(right) + 1)
        edges = low + (high - low) * jnp.linspace(0.0, 1.0, (6 if single(df.dtype) else 10) + 1, dtype=low.dtype)
        z, log_weights = jax.lax.stop_gradient(_between(edges))
        variance = wide * jnp.exp(-z) + sigma**2
        log_q = half * (jnp.log(half) + z - jnp.exp(z)) - gammaln(half)
        log_joint = log_weights + log_q - 0.5 * (jnp.log(variance) + square / variance)
        return jax.nn.logsumexp(log_joint, axis=-1) - 0.5 * math.log(2 * math.pi)


class NoisedByQuadrature(Noised):
    """Of an X with a `coordinate`: exact to the precision of floating-point numbers wherever the log-density is above
    −80 or so; below that it stays finite, and leads back."""

    def log_prob(self, value: Array) -> Array:
        coordinates = coordinate(self.clean)
        assert coordinates is not None
        alpha, sigma = self.alpha[..., None], self.sigma[..., None]
        x = jnp.asarray(value)[..., None]

        def log_joint(z: Array) -> Array:
            return coordinates.log_density(z) - 0.5 * ((x - alpha * coordinates.value(z)) / sigma) ** 2

        # Nodes depend on x, but the integral does not depend on the nodes: derivatives pass them by.
        z, log_weights = jax.lax.stop_gradient(_nodes(coordinates, log_joint, x / alpha, sigma / alpha))
        total = jax.nn.logsumexp(log_weights + log_joint(z), axis=-1)
        return total - jnp.log(self.sigma) - 0.5 * math.log(2 * math.pi)


class Coordinate(NamedTuple):
    """A coordinate z of a distribution's values u.

    Attributes:
        value, inverse: u = T(z), and z of a u that may lie outside of the support, which is moved inside first.
        log_density: q(z), normalised.
        low, high: the range of z where q counts.
    """

    value: Callable[[Array], Array]
    inverse: Callable[[Array], Array]
    log_density: Callable[[Array], Array]
    low: Array
    high: Array


def _nodes(coordinates: Coordinate, log_joint: Callable[[Array], Array], x: Array, width: Array) -> tuple[Array, Array]:
    """Nodes z (…, n) and their log-weights, for x/α and σ/α, (…, 1), where the integrand is not negligible."""
    # About x/α, in units of σ/α, and evenly.
    near = coordinates.inverse(x + width * jnp.asarray((-8.0, -5.0, -2.5, 0.0, 2.5, 5.0, 8.0), x.dtype))
    even = coordinates.low + (coordinates.high - coordinates.low) * jnp.linspace(0.0, 1.0, 20 + 1, dtype=x.dtype)
    edges = _beside(jnp.clip(near, coordinates.low, coordinates.high), even)
    height = log_joint(edges)
    # All of them where x is so far that no height is a number.
    counts = ~(height < jnp.max(height, axis=-1, keepdims=True) - _negligible(x.dtype))
    first = jnp.min(edges, axis=-1, keepdims=True, where=counts, initial=jnp.inf)
    last = jnp.max(edges, axis=-1, keepdims=True, where=counts, initial=-jnp.inf)
    # As far as the next ones, where it is negligible.
    low = jnp.max(edges, axis=-1, keepdims=True, where=edges < first, initial=-jnp.inf)
    high = jnp.min(edges, axis=-1, keepdims=True, where=edges > last, initial=jnp.inf)
    low, high = jnp.maximum(low, coordinates.low), jnp.minimum(high, coordinates.high)
    within = low + (high - low) * jnp.linspace(0.0, 1.0, (12 if single(x.dtype) else 20) + 1, dtype=x.dtype)
    return _between(jnp.sort(_beside(jnp.clip(near, low, high), within), axis=-1))


def _beside(some: Array, others: Array) -> Array:
    """Numbers in a row with others, (…, m + n)."""
    shape = jnp.broadcast_shapes(some.shape[:-1], others.shape[:-1])
    return jnp.concatenate([jnp.broadcast_to(e, shape + e.shape[-1:]) for e in (some, others)], axis=-1)


def _between(edges: Array) -> tuple[Array, Array]:
    """Nodes and log-weights, (…, n·m), of Gauss–Legendre quadrature between each of m + 1 edges and the next."""
    nodes, weights = gauss_legendre(edges.dtype)
    half = 0.5 * (edges[..., 1:] - edges[..., :-1])[..., None]
    middle = 0.5 * (edges[..., 1:] + edges[..., :-1])[..., None]
    z, log_weights = middle + half * nodes, jnp.log(half) + jnp.log(weights)
    return z.reshape(*z.shape[:-2], -1), log_weights.reshape(*z.shape[:-2], -1)


def coordinate(distribution: dist.Distribution) -> Coordinate | None:
    """The coordinate of a distribution, its parameters with one more axis at the end; None if none is known here."""
    shape = distribution.batch_shape
    while isinstance(distribution, dist.ExpandedDistribution):
        distribution = distribution.base_dist

    def as_column(parameter: ArrayLike) -> Array:
        return jnp.broadcast_to(jnp.asarray(parameter, jnp.result_type(float)), shape)[..., None]

    match distribution:
        case dist.LogNormal():
            loc, scale = as_column(distribution.loc), as_column(distribution.scale)
            reach = jnp.full_like(loc, math.sqrt(8 * tuning.HALF_LINE_NEGLIGIBLE))
            return Coordinate(
                lambda z: jnp.exp(loc + scale * z),
                lambda u: (_log(u) - loc) / scale,
                lambda z: -0.5 * z**2 - 0.5 * math.log(2 * math.pi),
                -reach,
                reach,
            )
        case dist.Gamma():
            return _gamma(as_column(distribution.concentration), as_column(distribution.rate))
        case dist.Exponential():
            return _gamma(jnp.ones_like(as_column(distribution.rate)), as_column(distribution.rate))
        case dist.InverseGamma():
            inverse = _gamma(as_column(distribution.concentration), as_column(distribution.rate))
            return inverse._replace(
                value=lambda z: 1 / inverse.value(z), inverse=lambda u: inverse.inverse(jnp.exp(-_log(u)))
            )
        case dist.Weibull():
            scale, power = as_column(distribution.scale), as_column(distribution.concentration)
            return _gamma(jnp.ones_like(scale), jnp.ones_like(scale))._replace(
                value=lambda z: scale * jnp.exp(z / power), inverse=lambda u: power * (_log(u) - jnp.log(scale))
            )
        case dist.HalfCauchy():
            scale = as_column(distribution.scale)
            reach = jnp.full_like(scale, tuning.HALF_LINE_NEGLIGIBLE)
            return Coordinate(
                lambda z: scale * jnp.exp(z),
                lambda u: _log(u) - jnp.log(scale),
                lambda z: math.log(2 / math.pi) - jnp.logaddexp(z, -z),
                -reach,
                reach,
            )
        case dist.Beta():
            return _beta(as_column(distribution.concentration1), as_column(distribution.concentration0))
    return None


def _gamma(a: Array, rate: Array) -> Coordinate:
    """u = e^z/rate: q = a·z − e^z − log Γ(a), with its top and curvature at log a and a, and slope a on the left."""
    top, reach = jnp.log(a), jnp.sqrt(8 * tuning.HALF_LINE_NEGLIGIBLE / a)
    return Coordinate(
        lambda z: jnp.exp(z) / rate,
        lambda u: _log(u) + jnp.log(rate),
        lambda z: a * z - jnp.exp(z) - gammaln(a),
        top - reach - tuning.HALF_LINE_NEGLIGIBLE / a,
        top + jnp.minimum(reach, jnp.log1p(tuning.HALF_LINE_NEGLIGIBLE / a) + 2.0),
    )


def _beta(a: Array, b: Array) -> Coordinate:
    """u = 1/(1 + e^{−z}): q = a·log u + b·log(1 − u) − log B(a, b), slopes a and −b at the ends."""
    top, reach = jnp.log(a / b), jnp.sqrt(8 * tuning.HALF_LINE_NEGLIGIBLE * (a + b) / (a * b))

    def inverse(u: Array) -> Array:
        clear = jnp.finfo(u.dtype).eps
        inside = jnp.clip(u, jnp.finfo(u.dtype).tiny, 1 - clear)
        return jnp.log(inside) - jnp.log1p(-inside)

    return Coordinate(
        jax.nn.sigmoid,
        inverse,
        lambda z: a * jax.nn.log_sigmoid(z) + b * jax.nn.log_sigmoid(-z) - betaln(a, b),
        top - reach - tuning.HALF_LINE_NEGLIGIBLE / a,
        top + reach + tuning.HALF_LINE_NEGLIGIBLE / b,
    )


def _log(u: Array) -> Array:
    """log u of positive numbers; of others that of the least there is."""
    return jnp.log(jnp.maximum(u, jnp.finfo(u.dtype).tiny))


def log_normal_mass(lower: Array, upper: Array, width: Array) -> Array:
    """log[Φ(upper) − Φ(lower)], width = upper − lower > 0, with a value and gradient that no cancellation spoils.

    Wide intervals: the difference of two tails, on the side where neither rounds to 1. Narrow ones, whose tails agree
    in nearly all digits: Gauss–Legendre quadrature of exp(−z²/2) about the middle.
    """
    middle, half = 0.5 * (lower + upper), 0.5 * width
    narrow = (half < 0.5) & (half * jnp.abs(middle) < 2.0)
    nodes, weights = gauss_legendre(middle.dtype)
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


def gauss_legendre(dtype: DTypeLike) -> tuple[Array, Array]:
    """Sixteen nodes and weights on (−1, 1), twelve in single precision."""
    nodes, weights = np.polynomial.legendre.leggauss(12 if single(dtype) else 16)
    return jnp.asarray(nodes, dtype), jnp.asarray(weights, dtype)


def _negligible(dtype: DTypeLike) -> float:
    """Nats below its top from which on an integrand adds nothing to numbers of this kind."""
    return 2.0 - math.log(jnp.finfo(dtype).eps)


def single(dtype: DTypeLike) -> bool:
    """Whether numbers of this kind have no more digits than single precision."""
    return bool(jnp.finfo(dtype).eps > 1e-8)
