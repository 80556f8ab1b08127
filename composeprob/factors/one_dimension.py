"""Noised distributions in one dimension: boxes, half-normals and truncated normals in
closed form, the others that have a bound or heavy tails by quadrature.

The integral ∫ p(u)·N(x; α·u, σ²) du is taken over a coordinate z without walls and
singularities (Student's t is a mixture of normals, over whose widths it is taken):
u = T(z), with q(z) = log p(T(z)) + log T'(z) smooth and concave, and without features
much narrower than 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.scipy.special import gammaln, log_ndtr
from jax.typing import ArrayLike, DTypeLike
from numpyro.distributions.truncated import (
    LeftTruncatedDistribution,
    RightTruncatedDistribution,
    TwoSidedTruncatedDistribution,
)

from composeprob import tuning
from composeprob.factors.gaussians import base_of

Bound = Array | float | None
LogNoised = Callable[[Array, Array, Array], Array]
"""(x, α, σ) → the log-density of α·X + σ·ε at x, entry by entry."""


class Noised(dist.Distribution):
    """α·X + σ·ε with X ~ ``clean``, which `log_noised` knows, and ε ~ N(0, 1), entry by
    entry."""

    # NumPyro's own convention for attributes of the class.
    arg_constraints: dict[str, dist.constraints.Constraint] = {}  # noqa: RUF012
    pytree_data_fields: tuple[str, ...] = ("clean", "alpha", "sigma")
    support = dist.constraints.real

    def __init__(self, clean: dist.Distribution, alpha: ArrayLike, sigma: ArrayLike):
        batch_shape = jnp.broadcast_shapes(
            clean.batch_shape, jnp.shape(alpha), jnp.shape(sigma)
        )
        if clean.batch_shape != batch_shape:
            clean = clean.expand(batch_shape)
        self.clean = clean
        self.alpha = jnp.broadcast_to(jnp.asarray(alpha), batch_shape)
        self.sigma = jnp.broadcast_to(jnp.asarray(sigma), batch_shape)
        super().__init__(batch_shape=batch_shape)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        clean_key, normal_key = jax.random.split(key)
        events = self.clean.sample(clean_key, sample_shape)
        noise = jax.random.normal(normal_key, sample_shape + self.batch_shape)
        return self.alpha * events + self.sigma * noise

    def log_prob(self, value: Array) -> Array:
        log_density = log_noised(self.clean)
        assert log_density is not None
        return log_density(value, self.alpha, self.sigma)


def log_noised(clean: dist.Distribution) -> LogNoised | None:
    """Return the log-density of a distribution's noised marginals; None where it has
    neither a closed form nor a quadrature here."""
    base = base_of(clean)
    shape = clean.batch_shape

    def in_shape(*parameters: ArrayLike) -> Iterator[Array]:
        return (
            jnp.broadcast_to(jnp.asarray(parameter), shape) for parameter in parameters
        )

    match base:
        case dist.Uniform():
            return partial(_uniform, *in_shape(base.low, base.high))
        case dist.HalfNormal():
            loc, scale = in_shape(0.0, base.scale)
            return partial(_truncated_normal, loc, scale, 0.0, None)
        case (
            LeftTruncatedDistribution()
            | RightTruncatedDistribution()
            | TwoSidedTruncatedDistribution()
        ) if isinstance(base.base_dist, dist.Normal):
            # NumPyro's function ``TruncatedNormal`` returns these.
            loc, scale = in_shape(base.base_dist.loc, base.base_dist.scale)
            low = getattr(base, "low", None)
            high = getattr(base, "high", None)
            return partial(_truncated_normal, loc, scale, low, high)
        case dist.StudentT():
            return partial(_student, *in_shape(base.df, base.loc, base.scale))
        case dist.Cauchy():
            return partial(_student, *in_shape(1.0, base.loc, base.scale))
    coordinate = _coordinate(base, shape)
    return None if coordinate is None else partial(_by_quadrature, coordinate)


def _uniform(low: Array, high: Array, x: Array, alpha: Array, sigma: Array) -> Array:
    """log[Φ((x−α·low)/σ) − Φ((x−α·high)/σ)] − log(α·(high−low)), accurate in both
    tails."""
    mass = log_normal_mass(
        (x - alpha * high) / sigma,
        (x - alpha * low) / sigma,
        alpha * (high - low) / sigma,
    )
    return mass - jnp.log(alpha * (high - low))


def _truncated_normal(
    loc: Array,
    scale: Array,
    low: Bound,
    high: Bound,
    x: Array,
    alpha: Array,
    sigma: Array,
) -> Array:
    """Log-density of α·U + σ·ε, U ~ N(loc, scale²) between ``low`` and ``high``; None
    for a bound that is not there.

    Without bounds x = α·U + σ·ε is N(α·loc, v²), v² = α²·scale² + σ², and U given x is
    N(m, s²) with m = (α·scale²·x + σ²·loc)/v² and s = scale·σ/v. With them the density
    is N(x; α·loc, v²)·P(low < N(m, s²) < high)/P(low < N(loc, scale²) < high).
    """

    def log_inside(mean: Array, deviation: Array) -> Array:
        """log P(low < N(mean, deviation²) < high)."""
        if high is None:
            assert low is not None
            return log_tail((mean - low) / deviation)
        if low is None:
            return log_tail((high - mean) / deviation)
        return log_normal_mass(
            (low - mean) / deviation,
            (high - mean) / deviation,
            (high - low) / deviation,
        )

    v = jnp.sqrt((alpha * scale) ** 2 + sigma**2)
    standard = (x - alpha * loc) / v
    # m by its distance from loc, which loses no digits where the noise is small or
    # large.
    m = loc + alpha * scale**2 / v * standard
    s = scale * sigma / v
    normal = -0.5 * standard**2 - jnp.log(v) - 0.5 * math.log(2 * math.pi)
    return normal + log_inside(m, s) - log_inside(loc, scale)


def _student(
    df: Array, loc: Array, scale: Array, x: Array, alpha: Array, sigma: Array
) -> Array:
    r"""Log-density of α·U + σ·ε, with U of Student's t with ν degrees of freedom (1 for
    a Cauchy distribution).

    U is N(loc, scale²/g) with g ~ Γ(½ν, ½ν), so that the density is ∫ p(g)·N(x; α·loc,
    α²·scale²/g + σ²) dg, by quadrature: smooth however small the noise is.
    """
    half = 0.5 * df
    signal = (alpha * scale) ** 2
    square = (x - alpha * loc) ** 2
    mixing = _gamma(half, half)
    noise = sigma**2

    def log_joint(z: Array) -> Array:
        variance = signal / mixing.value(z) + noise
        return mixing.log_density(z) - 0.5 * (jnp.log(variance) + square / variance)

    # A distant x pulls g below its own range; noise explains a part of the distance.
    # The wide `width` makes nodes lie nearly evenly.
    pull = jnp.maximum((df + square / signal) / (df + 1) - noise / signal, 1.0)
    low = mixing.low - jnp.log(pull)
    total = log_integral(log_joint, low, mixing.high, mixing.high, mixing.high - low)
    return total - 0.5 * math.log(2 * math.pi)


def _by_quadrature(
    coordinate: Coordinate, x: Array, alpha: Array, sigma: Array
) -> Array:
    """Log-density by quadrature.

    It is exact to the precision of floating-point numbers above −80 or so. Below that
    it is finite, and its gradient leads back to larger values.
    """
    x = x / sigma
    alpha = alpha / sigma

    def log_joint(z: Array) -> Array:
        return coordinate.log_density(z) - 0.5 * (x - alpha * coordinate.value(z)) ** 2

    # The noise is narrowest about x/α, or about as far from a wall as it is wide.
    width = jnp.minimum(1 / alpha, 0.5 * coordinate.upper)
    u = jnp.clip(x / alpha, width, coordinate.upper - width)
    middle = coordinate.inverse(u)
    below = coordinate.inverse(u - width)
    above = coordinate.inverse(u + width)
    nearest = jnp.minimum(jnp.abs(below - middle), jnp.abs(above - middle))
    narrow = jnp.minimum(1.0, nearest)
    total = log_integral(log_joint, coordinate.low, coordinate.high, middle, 2 * narrow)
    return total - jnp.log(sigma) - 0.5 * math.log(2 * math.pi)


def log_integral(
    log_joint: Callable[[Array], Array],
    low: Array,
    high: Array,
    middle: Array,
    width: Array,
) -> Array:
    r"""log ∫ exp(log_joint(z)) dz between ``low`` and ``high``, outside of which the
    integrand is negligible, entry by entry. No feature of it is narrower than ``width``
    about ``middle``, and than about |z − middle| elsewhere.

    By the trapezoidal rule in c, z = middle + width·sinh(c), whose error falls as
    $e^{-2\pi a/h}$ for a step h where an integrand that vanishes at both ends is
    analytic in a strip of half width a (Trefethen and Weideman 2014, *The exponentially
    convergent trapezoidal rule*). The nodes lie where coarser ones show that the
    integrand is not negligible. The integral does not depend on them: derivatives pass
    them by.
    """
    low, high, middle, width = jax.lax.stop_gradient(
        jnp.broadcast_arrays(low, high, middle, width)
    )
    shape = middle.shape
    dtype = jnp.result_type(low, high, middle, width)
    coarse = tuning.QUADRATURE.coarse
    middle = jnp.clip(middle, low, high).astype(dtype)
    # Nodes of one z would be one number to rounding.
    width = jnp.maximum(width, 8 * jnp.finfo(dtype).eps * (1 + jnp.abs(middle)))
    # The integrand as a function of its parameters, which derivatives are taken by.
    log_integrand, captured = jax.closure_convert(log_joint, jnp.zeros(shape, dtype))
    parameters = tuple(jnp.broadcast_to(a, shape) for a in captured)
    constants = jax.lax.stop_gradient(parameters)

    def log_heights(start: Array, step: Array) -> Array:
        def log_height(i: Array) -> Array:
            z = middle + width * jnp.sinh(start + i * step)
            return log_integrand(z, *constants)

        return jax.lax.map(log_height, jnp.arange(coarse + 1))

    start = jnp.arcsinh((low - middle) / width)
    step = (jnp.arcsinh((high - middle) / width) - start) / coarse
    heights = log_heights(start, step)
    # All nodes count where x is so far that all heights are NaN.
    counts = ~(heights < jnp.max(heights, axis=0) - _negligible(dtype))
    index = jnp.arange(coarse + 1).reshape(-1, *(1 for _ in shape))
    # One interval more on each side: the integrand may rise within it.
    first = jnp.min(index, axis=0, where=counts, initial=coarse) - 1
    last = jnp.max(index, axis=0, where=counts, initial=0) + 1
    first = jnp.maximum(first, 0)
    last = jnp.minimum(last, coarse)
    start = start + step * first
    step = step * (last - first) / coarse
    # Terms are exponentials of differences from the highest one.
    top = jnp.max(log_heights(start, step), axis=0)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    in_single, in_double = tuning.QUADRATURE.nodes
    count = in_single if _is_single(dtype) else in_double
    fine = step * coarse / count

    def term(i: Array, *parameters: Array) -> list[Array]:
        c = start + (i + 0.5) * fine
        log_height = log_integrand(middle + width * jnp.sinh(c), *parameters)
        # dz/dc = width·cosh(c)
        return [jnp.cosh(c) * jnp.exp(log_height - top)]

    (total,) = _sums(term, 1, count, jnp.zeros(shape, dtype), parameters)
    return top + jnp.log(total) + jnp.log(width * fine)


def _sums(
    terms: Callable[..., list[Array]],
    many: int,
    count: int,
    nothing: Array,
    parameters: tuple[Array, ...],
) -> list[Array]:
    """Σ_i terms(i, *parameters), i < ``count``: ``many`` arrays shaped as ``nothing``
    and each parameter, entry by entry.

    Derivatives of all orders are such sums themselves: none keeps an array over i.
    """

    @jax.custom_jvp
    def total(*parameters: Array) -> list[Array]:
        def add(i: Array, so_far: list[Array]) -> list[Array]:
            return [a + b for a, b in zip(so_far, terms(i, *parameters), strict=True)]

        return jax.lax.fori_loop(0, count, add, [nothing] * many)

    def tangents(
        at: tuple[Array, ...], along: tuple[Array, ...]
    ) -> tuple[list[Array], list[Array]]:
        moving = [
            j
            for j, tangent in enumerate(along)
            if not isinstance(tangent, SymbolicZero)
        ]

        def slopes(i: Array, *at: Array) -> list[Array]:
            """∂/∂parameter_j of all terms, for each j that moves."""

            def slopes_along(j: int) -> list[Array]:
                def terms_at(parameter: Array) -> list[Array]:
                    return terms(i, *at[:j], parameter, *at[j + 1 :])

                return jax.jvp(terms_at, (at[j],), (jnp.ones_like(at[j]),))[1]

            return [slope for j in moving for slope in slopes_along(j)]

        all_slopes = iter(_sums(slopes, many * len(moving), count, nothing, at))
        changes = [[next(all_slopes) * along[j] for _ in range(many)] for j in moving]
        value = total(*at)
        # The chain rule: the changes of each sum, added over parameters.
        return value, [
            sum(column[1:], column[0]) for column in zip(*changes, strict=True)
        ]

    total.defjvp(tangents, symbolic_zeros=True)
    return total(*parameters)


class Coordinate(NamedTuple):
    """A coordinate z of a distribution's values u.

    Attributes:
        value, inverse: u = T(z), and z of a u that may lie outside of the support,
            which is moved inside first.
        log_density: q(z), normalised.
        low, high: the range of z where q counts.
        upper: the upper end of the support, whose lower end is 0.
    """

    value: Callable[[Array], Array]
    inverse: Callable[[Array], Array]
    log_density: Callable[[Array], Array]
    low: Array
    high: Array
    upper: float = math.inf


def _coordinate(
    distribution: dist.Distribution, shape: tuple[int, ...]
) -> Coordinate | None:
    """Return the coordinate of a distribution, its parameters brought to this shape;
    None for an unknown distribution."""

    def in_shape(parameter: ArrayLike) -> Array:
        return jnp.broadcast_to(jnp.asarray(parameter, jnp.result_type(float)), shape)

    match distribution:
        case dist.LogNormal():
            loc, scale = in_shape(distribution.loc), in_shape(distribution.scale)
            reach = jnp.full_like(loc, math.sqrt(8 * tuning.QUADRATURE.negligible))
            return Coordinate(
                lambda z: jnp.exp(loc + scale * z),
                lambda u: (_log(u) - loc) / scale,
                lambda z: -0.5 * z**2 - 0.5 * math.log(2 * math.pi),
                -reach,
                reach,
            )
        case dist.Gamma():
            return _gamma(
                in_shape(distribution.concentration), in_shape(distribution.rate)
            )
        case dist.Exponential():
            return _gamma(
                jnp.ones_like(in_shape(distribution.rate)), in_shape(distribution.rate)
            )
        case dist.InverseGamma():
            inverse = _gamma(
                in_shape(distribution.concentration), in_shape(distribution.rate)
            )
            return inverse._replace(
                value=lambda z: 1 / inverse.value(z),
                inverse=lambda u: inverse.inverse(jnp.exp(-_log(u))),
            )
        case dist.Weibull():
            # (u/scale)^power is exponential.
            scale = in_shape(distribution.scale)
            power = in_shape(distribution.concentration)
            return _gamma(jnp.ones_like(scale), jnp.ones_like(scale))._replace(
                value=lambda z: scale * jnp.exp(z / power),
                inverse=lambda u: power * _log(u / scale),
            )
        case dist.HalfCauchy():
            scale = in_shape(distribution.scale)
            reach = jnp.full_like(scale, tuning.QUADRATURE.negligible)
            return Coordinate(
                lambda z: scale * jnp.exp(z),
                lambda u: _log(u / scale),
                lambda z: math.log(2 / math.pi) - jnp.logaddexp(z, -z),
                -reach,
                reach,
            )
        case dist.Beta():
            return _beta(
                in_shape(distribution.concentration1),
                in_shape(distribution.concentration0),
            )
    return None


def _gamma(a: Array, rate: Array) -> Coordinate:
    """Coordinate of a gamma distribution, u = e^z·a/rate.

    q = a·(z − e^z) + a·log a − log Γ(a): its top is at 0, its curvature there a, its
    slope on the left a.
    """
    reach = jnp.sqrt(8 * tuning.QUADRATURE.negligible / a)
    scale = a / rate
    height = _log_height(a)
    return Coordinate(
        lambda z: jnp.exp(z) * scale,
        lambda u: _log(u / scale),
        lambda z: a * (z - jnp.expm1(z)) + height,
        -reach - tuning.QUADRATURE.negligible / a,
        jnp.minimum(reach, jnp.log1p(tuning.QUADRATURE.negligible / a) + 2.0),
    )


def _beta(a: Array, b: Array) -> Coordinate:
    """Coordinate of a beta distribution, u = 1/(1 + e^{−z}).

    q = a·log u + b·log(1 − u) − log B(a, b), with slopes a and −b at the ends.
    """
    top = jnp.log(a / b)
    # The curvature at the top is a·b/(a + b).
    reach = jnp.sqrt(8 * tuning.QUADRATURE.negligible * (a + b) / (a * b))
    # By differences from the top, so that large terms do not cancel.
    height = _log_height(a) + _log_height(b) - _log_height(a + b)
    log_u = jax.nn.log_sigmoid(top)
    log_rest = jax.nn.log_sigmoid(-top)

    def inverse(u: Array) -> Array:
        limits = jnp.finfo(u.dtype)
        inside = jnp.clip(u, limits.tiny, 1 - limits.eps)
        return jnp.log(inside) - jnp.log1p(-inside)

    return Coordinate(
        jax.nn.sigmoid,
        inverse,
        lambda z: (
            a * (jax.nn.log_sigmoid(z) - log_u)
            + b * (jax.nn.log_sigmoid(-z) - log_rest)
            + height
        ),
        top - reach - tuning.QUADRATURE.negligible / a,
        top + reach + tuning.QUADRATURE.negligible / b,
        1.0,
    )


def _log_height(a: Array) -> Array:
    """a·log a − a − log Γ(a), by Stirling's series where these terms cancel."""
    far = jnp.maximum(a, 32.0)
    series = (
        0.5 * jnp.log(far / (2 * math.pi))
        - 1 / (12 * far)
        + 1 / (360 * far**3)
        - 1 / (1260 * far**5)
    )
    return jnp.where(a > 32.0, series, a * jnp.log(a) - a - gammaln(a))


def _log(u: Array) -> Array:
    """log u of positive numbers; of others, log of the least positive number."""
    return jnp.log(jnp.maximum(u, jnp.finfo(u.dtype).tiny))


def log_normal_mass(lower: Array, upper: Array, width: Array) -> Array:
    """log[Φ(upper) − Φ(lower)], width = upper − lower > 0, without cancellation in the
    value and the gradient.

    Wide intervals: the difference of two tails, on the side where neither rounds to 1.
    Narrow ones, whose tails agree in nearly all digits: Gauss–Legendre quadrature of
    exp(−z²/2) about the middle.
    """
    middle = 0.5 * (lower + upper)
    half = 0.5 * width
    narrow = (half < 0.5) & (half * jnp.abs(middle) < 2.0)
    num_nodes = 12 if _is_single(middle.dtype) else 16
    rule = np.polynomial.legendre.leggauss(num_nodes)
    nodes, weights = (jnp.asarray(numbers, middle.dtype) for numbers in rule)
    # `where` evaluates both forms: harmless numbers enter the one that is not taken,
    # so that its gradient is not NaN.
    h = jnp.where(narrow, half, 0.25)[..., None]
    m = jnp.where(narrow, middle, 0.0)[..., None]
    # log Σ w·exp(−½(m + h·node)²) + ½m²
    inside = jax.nn.logsumexp(-h * nodes * (m + 0.5 * h * nodes), b=weights, axis=-1)
    by_quadrature = (
        inside + jnp.log(h[..., 0]) - 0.5 * m[..., 0] ** 2 - 0.5 * math.log(2 * math.pi)
    )
    # Φ(upper) − Φ(lower) = Φ(−lower) − Φ(−upper): on the left side both are tails.
    is_right = middle > 0
    high = jnp.where(is_right, -lower, upper)
    low = jnp.where(is_right, -upper, lower)
    high = jnp.where(narrow, 1.0, high)
    low = jnp.where(narrow, -1.0, low)
    log_high = log_tail(high)
    log_low = log_tail(low)
    by_tails = log_high + jnp.log1p(-jnp.exp(log_low - log_high))
    return jnp.where(narrow, by_quadrature, by_tails)


def log_tail(x: Array) -> Array:
    """log Φ(x); below −20 by its asymptotic series, because the gradient of JAX's loses
    its digits there."""
    far = x < -20.0
    y = jnp.where(far, x, -20.0)
    term = series = jnp.ones_like(y)
    for n in range(1, 8):
        term = -term * (2 * n - 1) / y**2
        series = series + term
    by_series = (
        -0.5 * y**2 - jnp.log(-y) - 0.5 * math.log(2 * math.pi) + jnp.log(series)
    )
    return jnp.where(far, by_series, log_ndtr(jnp.where(far, 0.0, x)))


def _negligible(dtype: DTypeLike) -> float:
    """Nats below its maximum at which an integrand contributes nothing in numbers of
    this type."""
    return 2.0 - math.log(jnp.finfo(dtype).eps)


def _is_single(dtype: DTypeLike) -> bool:
    """Return whether this type has at most the digits of single precision."""
    return bool(jnp.finfo(dtype).eps > 1e-8)
