"""Noised distributions in one dimension whose noised density has no closed form, by quadrature: of a bound, or of heavy
tails.

The integral ∫ p(u)·N(x; α·u, σ²) du is taken over a coordinate z that leaves no wall and no singularity: u = T(z), with
q(z) = log p(T(z)) + log T'(z) smooth and concave. The nodes lie between edges of two kinds: evenly over the range
where q counts, and about x/α at distances of σ/α, which resolve the noise however small it is.
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
from jax.scipy.special import betaln, gammaln
from jax.typing import ArrayLike

from composeprob import tuning
from composeprob.factors.truncated import noised_sample


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


class NoisedByQuadrature(dist.Distribution):
    """α·X + σ·ε for an X with a `coordinate`.

    The log-density is exact to the precision of floating-point numbers at every α and σ wherever it is above −80 or so;
    below that it stays finite, and leads back.
    """

    arg_constraints: dict[str, dist.constraints.Constraint] = {}  # noqa: RUF012 - NumPyro's own class-level convention
    support = dist.constraints.real

    def __init__(
        self, clean: dist.Distribution, alpha: ArrayLike, sigma: ArrayLike, *, validate_args: bool | None = None
    ):
        batch_shape = jnp.broadcast_shapes(clean.batch_shape, jnp.shape(alpha), jnp.shape(sigma))
        self.clean = clean.expand(batch_shape) if clean.batch_shape != batch_shape else clean
        self.alpha, self.sigma = (jnp.broadcast_to(jnp.asarray(a), batch_shape) for a in (alpha, sigma))
        super().__init__(batch_shape=batch_shape, validate_args=validate_args)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        return noised_sample(self, self.clean, key, sample_shape)

    def log_prob(self, value: Array) -> Array:
        coordinates = coordinate(self.clean)
        assert coordinates is not None
        alpha, sigma = self.alpha[..., None], self.sigma[..., None]
        x = jnp.asarray(value)[..., None]
        # Nodes depend on x, but the integral does not depend on the nodes: derivatives pass them by.
        z, log_weights = jax.lax.stop_gradient(_nodes(coordinates, x / alpha, sigma / alpha))
        away = (x - alpha * coordinates.value(z)) / sigma
        log_joint = log_weights + coordinates.log_density(z) - 0.5 * away**2
        return jax.nn.logsumexp(log_joint, axis=-1) - jnp.log(self.sigma) - 0.5 * math.log(2 * math.pi)


def _nodes(coordinates: Coordinate, x: Array, width: Array) -> tuple[Array, Array]:
    """Nodes z (…, n) and their log-weights, for x/α and σ/α, (…, 1)."""
    steps = jnp.linspace(0.0, 1.0, 20 + 1, dtype=x.dtype)
    even = coordinates.low + (coordinates.high - coordinates.low) * steps
    # Further edges about x/α, in units of σ/α.
    near = coordinates.inverse(x + width * jnp.asarray((-8.0, -5.0, -2.5, 0.0, 2.5, 5.0, 8.0), x.dtype))
    shape = jnp.broadcast_shapes(even.shape[:-1], near.shape[:-1])
    edges = jnp.sort(
        jnp.concatenate([jnp.broadcast_to(e, shape + e.shape[-1:]) for e in (even, near)], axis=-1), axis=-1
    )
    nodes, weights = (jnp.asarray(a, x.dtype) for a in np.polynomial.legendre.leggauss(16))
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
        case dist.StudentT() | dist.Cauchy():
            heavy = as_column(distribution.df if isinstance(distribution, dist.StudentT) else 1.0)
            return _student(heavy, as_column(distribution.loc), as_column(distribution.scale))
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


def _student(df: Array, loc: Array, scale: Array) -> Coordinate:
    """u = loc + scale·√ν·sinh z: q = −ν·log cosh z + log Γ((ν + 1)/2) − log Γ(ν/2) − ½ log π."""
    low, width = tuning.HALF_LINE_NEGLIGIBLE / df, scale * jnp.sqrt(df)
    reach = low + jnp.log1p(jnp.sqrt(-jnp.expm1(-2 * low)))  # where ν·log cosh z has grown to that
    return Coordinate(
        lambda z: loc + width * jnp.sinh(z),
        lambda u: jnp.arcsinh((u - loc) / width),
        lambda z: (
            gammaln((df + 1) / 2)
            - gammaln(df / 2)
            - 0.5 * math.log(math.pi)
            - df * (jnp.logaddexp(z, -z) - math.log(2.0))
        ),
        -reach,
        reach,
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
