"""A factor with exact noised marginals at every level: the distribution of α·X + σ·ε
for the X where it is known."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from numpy.typing import ArrayLike

from composeprob.errors import ShapeError, WrongTypeError
from composeprob.factors.factor import LeafFactor, Traits, check_leaf
from composeprob.factors.one_dimension import Noised, log_noised
from composeprob.factors.values import check_bounds, check_finite
from composeprob.factors.whitening import log_normal
from composeprob.schedule import Noise, Schedule

SUPPORTED = (
    "Normal, MultivariateNormal, Delta, Uniform, HalfNormal, TruncatedNormal, LogNormal, Gamma, Exponential, "
    "InverseGamma, Weibull, HalfCauchy, Beta, StudentT, Cauchy, these moved and scaled (AffineTransform), and mixtures "
    "(MixtureSameFamily, MixtureGeneral)"
)


class Analytic(LeafFactor):
    """A distribution whose noised marginals are known: log f(x, k) = log p(α_k·X +
    σ_k·ε = x), normalised.

    Args:
        distribution: a NumPyro ``Normal``, ``MultivariateNormal``, ``Uniform`` (a box),
            ``HalfNormal`` or ``TruncatedNormal``, a mixture of them, or an array of
            points, shape (n, \\*event_shape), for their empirical distribution: these
            have closed forms. Of a ``LogNormal``, ``Gamma``, ``Exponential``,
            ``InverseGamma``, ``Weibull``, ``HalfCauchy``, ``Beta``, ``StudentT`` or
            ``Cauchy`` the noised density is computed by quadrature, to the precision of
            floating-point numbers. All of them may be moved and scaled by an
            ``AffineTransform``. Batch dimensions count as dimensions of the event:
            ``Normal(zeros(2), 1)`` is one event of shape (2,). Boxes mix by
            `cp.mixture`. Samples are of the marginal at level 0: where the distribution
            has a bound, some lie beyond it, by about σ_0/α_0.
        schedule: the levels to offer. The factor is exact at any α and σ, so it fits
            every schedule.
        label: the name to show.

    Raises:
        WrongTypeError: a distribution whose noised marginal is not known here.
        InvalidValueError: NaN among its parameters or points.

    Example:
        >>> import composeprob as cp, numpyro.distributions as dist
        >>> f = cp.Analytic(dist.Normal(0.0, 0.5), cp.Schedule.cosine(100))
        >>> f.event_shape, "normalised" in f.capabilities
        ((), True)
    """

    distribution: dist.Distribution

    def __init__(
        self,
        distribution: dist.Distribution | ArrayLike,
        schedule: Schedule,
        *,
        label: str = "",
    ):
        self.label = label or (
            "points"
            if not isinstance(distribution, dist.Distribution)
            else type(distribution).__name__
        )
        if not isinstance(distribution, dist.Distribution):
            distribution = _empirical(distribution)
        check_bounds(distribution, f"The distribution of factor '{self.label}'")
        self.distribution = check_finite(
            distribution, f"The distribution of factor '{self.label}'"
        )
        self.schedule = schedule
        self.event_shape = check_leaf(
            schedule, distribution.batch_shape + distribution.event_shape
        )
        self.fixed = {}
        noised(
            distribution, schedule.at(0)
        )  # refuses what is not known, now rather than at compile time

    @property
    def traits(self) -> Traits:
        return Traits(Traits.EXACT, "any")

    def at(self, noise: Noise) -> dist.Distribution:
        """The noised marginal as a NumPyro distribution over one event: exact draws,
        exact log-density."""
        marginal = noised(self.distribution, noise)
        return marginal.to_event(len(marginal.batch_shape))

    def evaluate(
        self, x: Array, noise: Noise, conditions: Mapping[str, Array]
    ) -> tuple[Array | None, Array]:
        return jax.value_and_grad(self.at(noise).log_prob)(x)


def _empirical(points: ArrayLike) -> dist.Distribution:
    try:
        points = jnp.asarray(points, jnp.result_type(float))
    except (TypeError, ValueError) as error:
        raise WrongTypeError(
            f"Analytic takes a NumPyro distribution or an array of points; got {type(points).__name__}.",
            fix=f"use {SUPPORTED}.",
        ) from error
    if points.ndim == 0 or points.shape[0] == 0:
        raise ShapeError(
            f"An empirical distribution needs points of shape (n, *event), n ≥ 1; got {points.shape}.",
            fix="stack the points along a first axis; of a single one pass points[None].",
        )
    mixing = dist.Categorical(probs=jnp.full(points.shape[0], 1 / points.shape[0]))
    masses = dist.Normal(
        points, jnp.zeros(()), validate_args=False
    )  # of width 0, noised to N(α·point, σ²I)
    return dist.MixtureSameFamily(mixing, dist.Independent(masses, points.ndim - 1))


def noised(distribution: dist.Distribution, noise: Noise) -> dist.Distribution:
    """The distribution of α·X + σ·ε with ε ~ N(0, I), X ~ ``distribution``; refuses one
    whose is not known."""
    alpha, sigma = noise.alpha, noise.sigma
    match distribution:
        case dist.Independent():
            return noised(distribution.base_dist, noise).to_event(
                distribution.reinterpreted_batch_ndims
            )
        case dist.ExpandedDistribution():
            return noised(distribution.base_dist, noise).expand(
                distribution.batch_shape
            )
        case dist.MixtureSameFamily():
            components = noised(distribution.component_distribution, noise)
            return dist.MixtureSameFamily(distribution.mixing_distribution, components)
        case dist.MixtureGeneral():
            parts = [
                noised(part, noise) for part in distribution.component_distributions
            ]
            whole = dist.constraints.independent(
                dist.constraints.real, len(distribution.event_shape)
            )
            return dist.MixtureGeneral(
                distribution.mixing_distribution, parts, support=whole
            )
        case dist.Normal():
            return dist.Normal(
                alpha * jnp.asarray(distribution.loc),
                jnp.sqrt((alpha * jnp.asarray(distribution.scale)) ** 2 + sigma**2),
            )
        case dist.Delta() if distribution.event_dim == 0:
            return dist.Normal(alpha * jnp.asarray(distribution.v), sigma)
        case dist.MultivariateNormal():
            size = distribution.event_shape[-1]
            covariance = alpha**2 * distribution.covariance_matrix + sigma**2 * jnp.eye(
                size
            )
            return WhitenedNormal(alpha * jnp.asarray(distribution.loc), covariance)
        case _ if log_noised(distribution) is not None:
            return Noised(distribution, alpha, sigma)
        case dist.TransformedDistribution() if (
            distribution.base_dist.event_shape == ()
            and all(
                isinstance(transform, dist.transforms.AffineTransform)
                for transform in distribution.transforms
            )
        ):
            return _moved(distribution, noise)
        case _:
            raise WrongTypeError(
                f"A noised {type(distribution).__name__} has no closed form here.",
                fix=f"use {SUPPORTED}, or an array of points (n, *event_shape) for their empirical distribution.",
            )


class WhitenedNormal(dist.MultivariateNormal):
    """A multivariate normal whose density is that of `log_normal`: chains share no
    lock, and a level's covariance is factorised once for all of them."""

    def log_prob(self, value: Array) -> Array:
        return log_normal(value - self.loc, self.covariance_matrix)


def _moved(distribution: dist.Distribution, noise: Noise) -> dist.Distribution:
    """The noised distribution of loc + scale·Y: noised Y with as much noise for a
    signal of another strength, moved."""
    loc, scale = jnp.zeros(()), jnp.ones(())
    for transform in distribution.transforms:
        loc, scale = transform.loc + transform.scale * loc, transform.scale * scale
    whole = noised(
        distribution.base_dist,
        Noise(noise.index, noise.alpha * jnp.abs(scale), noise.sigma),
    )
    shift = dist.transforms.AffineTransform(
        noise.alpha * loc, jnp.sign(scale), domain=dist.constraints.real
    )
    return dist.TransformedDistribution(whole, shift)
