"""A factor with exact noised marginals at every level."""

from __future__ import annotations

from collections.abc import Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from numpy.typing import ArrayLike

from composeprob.errors import ShapeError, WrongTypeError
from composeprob.factors.base import LeafFactor, Traits, check_leaf
from composeprob.factors.marginals import SUPPORTED, noised
from composeprob.factors.values import check_bounds, check_finite
from composeprob.schedule import Noise, Schedule


class Analytic(LeafFactor):
    """A distribution whose noised marginals are known: log f(x, k) = log p(α_k·X + σ_k·ε = x), normalised.

    Args:
        distribution: a NumPyro ``Normal``, ``MultivariateNormal``, ``Uniform`` (a box), ``HalfNormal`` or
            ``TruncatedNormal``, a mixture of them, or an array of points, shape (n, \\*event_shape), for their
            empirical distribution: these have closed forms. Of a ``LogNormal``, ``Gamma``, ``Exponential``,
            ``InverseGamma``, ``Weibull``, ``HalfCauchy``, ``Beta``, ``StudentT`` or ``Cauchy`` the noised density
            is computed by quadrature, to the precision of floating-point numbers. All of them may be moved and scaled
            by an ``AffineTransform``.
            Batch dimensions count as dimensions of the event: ``Normal(zeros(2), 1)`` is one event of shape (2,).
            Boxes mix by `cp.mixture`. Samples are of the marginal at level 0: where the distribution has a bound, some
            lie beyond it, by about σ_0/α_0.
        schedule: the levels to offer. The factor is exact at any α and σ, so it fits every schedule.
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
    schedule: Schedule
    event_shape: tuple[int, ...] = eqx.field(static=True)
    fixed: Mapping[str, Array]
    label: str = eqx.field(static=True)

    def __init__(self, distribution: dist.Distribution | ArrayLike, schedule: Schedule, *, label: str = ""):
        self.label = label or (
            "points" if not isinstance(distribution, dist.Distribution) else type(distribution).__name__
        )
        if not isinstance(distribution, dist.Distribution):
            distribution = _empirical(distribution)
        check_bounds(distribution, f"The distribution of factor '{self.label}'")
        self.distribution = check_finite(distribution, f"The distribution of factor '{self.label}'")
        self.schedule = schedule
        self.event_shape = check_leaf(schedule, distribution.batch_shape + distribution.event_shape)
        self.fixed = {}
        noised(distribution, schedule.at(0))  # refuses what is not known, now rather than at compile time

    @property
    def traits(self) -> Traits:
        return Traits(Traits.EXACT, "any")

    def at(self, noise: Noise) -> dist.Distribution:
        """The noised marginal as a NumPyro distribution over one event: exact draws, exact log-density."""
        marginal = noised(self.distribution, noise)
        return marginal.to_event(len(marginal.batch_shape))

    def evaluate(self, x: Array, noise: Noise, conditions: Mapping[str, Array]) -> tuple[Array | None, Array]:
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
    # A Gaussian of zero width per point, noised to N(α·point, σ²I).
    return dist.MixtureSameFamily(mixing, dist.Independent(_Points(points), points.ndim - 1))


class _Points(dist.Normal):
    """Point masses, written as Normals of scale 0 so that mixtures of them stay in one family."""

    def __init__(self, loc: ArrayLike, *, validate_args: bool | None = None):
        super().__init__(loc, jnp.zeros(()), validate_args=False)
