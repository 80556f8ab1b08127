"""A factor with exact noised marginals at every level: the distribution of α·X + σ·ε,
for X with a closed form or a quadrature."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from jaxtyping import Float
from numpy.typing import ArrayLike

from composeprob.arguments import check_finite
from composeprob.errors import ShapeError, WrongTypeError
from composeprob.factors.categorical import ClosedCategorical, is_discrete
from composeprob.factors.factor import (
    Factor,
    LeafFactor,
    OrOfTokens,
    Traits,
    check_leaf,
)
from composeprob.factors.one_dimension import Noised, log_noised
from composeprob.factors.values import check_bounds
from composeprob.factors.whitening import log_normal
from composeprob.schedule import Noise, Schedule

SUPPORTED = (
    "Normal, MultivariateNormal, Delta, Uniform, HalfNormal, TruncatedNormal, "
    "LogNormal, Gamma, Exponential, InverseGamma, Weibull, HalfCauchy, Beta, StudentT, "
    "Cauchy, these moved and scaled (AffineTransform), and mixtures "
    "(MixtureSameFamily, MixtureGeneral)"
)


class Analytic(LeafFactor, metaclass=OrOfTokens):
    """A distribution whose noised marginals are known: log f(x, k) = log p(α_k·X +
    σ_k·ε = x), normalised.

    Of tokens it takes no schedule: ``cp.Analytic(dist.Categorical(probs))`` of
    independent entries, `chain` and `table`, whose marginals over any positions are
    known.

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
            has a bound, some lie beyond it, by about σ_0/α_0. A ``Categorical`` or
            ``Bernoulli``, of one entry or of many, makes a factor of tokens.
        schedule: the levels to offer. The factor is exact at any α and σ, so it fits
            every schedule.
        label: the name to show.

    Raises:
        WrongTypeError: a distribution without a noised marginal here.
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
        if isinstance(distribution, dist.Distribution):
            self.label = label or type(distribution).__name__
        else:
            self.label = label or "points"
            distribution = _empirical(distribution)
        what = f"The distribution of factor '{self.label}'"
        check_bounds(distribution, what)
        self.distribution = check_finite(distribution, what)
        self.schedule = schedule
        self.event_shape = check_leaf(
            schedule, distribution.batch_shape + distribution.event_shape
        )
        self.fixed = {}

        def noised_at_level_0() -> None:
            noised(distribution, schedule.at(0))

        # Refuses an unknown distribution now rather than at compile time. Traced, as
        # each operation on its arrays would be compiled by itself.
        jax.eval_shape(noised_at_level_0)

    @classmethod
    def of_tokens(cls, *args: object, **kwargs: object) -> Factor | None:
        """Return the factor of tokens for a distribution of independent categorical
        entries."""
        arguments = dict(zip(("distribution", "schedule"), args, strict=False)) | kwargs
        distribution = arguments.get("distribution")
        if not is_discrete(distribution):
            return None
        if not arguments.keys() <= {"distribution", "label"}:
            raise WrongTypeError(
                "Analytic of tokens takes a distribution and a label, and no schedule: "
                "its levels are the positions that become visible.",
                fix="write cp.Analytic(dist.Categorical(probs)).",
            )
        label = str(arguments.get("label", ""))
        assert isinstance(distribution, dist.Distribution)
        return ClosedCategorical.independent(distribution, label)

    @staticmethod
    def chain(
        initial: ArrayLike, transition: ArrayLike, *, length: int, label: str = ""
    ) -> ClosedCategorical:
        """Make a Markov chain of tokens.

        Args:
            initial: probabilities of the first token, (values,).
            transition: transition[i, j] is the probability of j after i.
            length: the number of tokens.
            label: the name to show.

        Example:
            >>> import composeprob as cp, jax.numpy as jnp
            >>> stay = jnp.array([[0.9, 0.1], [0.1, 0.9]])
            >>> cp.Analytic.chain(jnp.ones(2) / 2, stay, length=5)
            chain (2 values, 5)
        """
        return ClosedCategorical.chain(initial, transition, length, label)

    @staticmethod
    def table(probs: ArrayLike, *, label: str = "") -> ClosedCategorical:
        """Make a distribution of a few tokens of the table of its probabilities.

        Args:
            probs: an axis of V entries for each position; they are normalised.
            label: the name to show.

        Example:
            >>> import composeprob as cp, jax.numpy as jnp
            >>> cp.Analytic.table(jnp.eye(3))
            table (3 values, 2)
        """
        return ClosedCategorical.table(probs, label)

    @property
    def traits(self) -> Traits:
        return Traits(Traits.EXACT, "any")

    def at(self, noise: Noise) -> dist.Distribution:
        """Return the noised marginal as a NumPyro distribution over one event, with
        exact samples and an exact log-density."""
        marginal = noised(self.distribution, noise)
        return marginal.to_event(len(marginal.batch_shape))

    def evaluate(
        self, x: Float[Array, "*event"], noise: Noise, conditions: Mapping[str, Array]
    ) -> tuple[Float[Array, ""] | None, Float[Array, "*event"]]:
        return jax.value_and_grad(self.at(noise).log_prob)(x)


def _empirical(points: ArrayLike) -> dist.Distribution:
    """Empirical distribution of points, as a mixture of point masses."""
    try:
        points = jnp.asarray(points, jnp.result_type(float))
    except (TypeError, ValueError) as error:
        raise WrongTypeError(
            "Analytic takes a NumPyro distribution or an array of points; got "
            f"{type(points).__name__}.",
            fix=f"use {SUPPORTED}.",
        ) from error
    if points.ndim == 0 or points.shape[0] == 0:
        raise ShapeError(
            "An empirical distribution needs points of shape (n, *event), n ≥ 1; got "
            f"{points.shape}.",
            fix="stack the points along a first axis; for a single point pass "
            "points[None].",
        )
    mixing = dist.Categorical(probs=jnp.full(points.shape[0], 1 / points.shape[0]))
    # Normals of width 0, noised to N(α·point, σ²I); NumPyro refuses that width.
    masses = dist.Normal(points, jnp.zeros(()), validate_args=False)
    return dist.MixtureSameFamily(mixing, dist.Independent(masses, points.ndim - 1))


def noised(distribution: dist.Distribution, noise: Noise) -> dist.Distribution:
    """Return the distribution of α·X + σ·ε with ε ~ N(0, I), X ~ ``distribution``;
    refuse one without a closed form or a quadrature here."""
    alpha = noise.alpha
    sigma = noise.sigma
    match distribution:
        case dist.Independent():
            base = noised(distribution.base_dist, noise)
            return base.to_event(distribution.reinterpreted_batch_ndims)
        case dist.ExpandedDistribution():
            base = noised(distribution.base_dist, noise)
            return base.expand(distribution.batch_shape)
        case dist.MixtureSameFamily():
            components = noised(distribution.component_distribution, noise)
            return dist.MixtureSameFamily(distribution.mixing_distribution, components)
        case dist.MixtureGeneral():
            components = [
                noised(component, noise)
                for component in distribution.component_distributions
            ]
            # Components with bounds have none once they are noised.
            support = dist.constraints.independent(
                dist.constraints.real, len(distribution.event_shape)
            )
            return dist.MixtureGeneral(
                distribution.mixing_distribution, components, support=support
            )
        case dist.Normal():
            # Variances of independent terms add up.
            loc = alpha * jnp.asarray(distribution.loc)
            scale = alpha * jnp.asarray(distribution.scale)
            return dist.Normal(loc, jnp.sqrt(scale**2 + sigma**2))
        case dist.Delta() if distribution.event_dim == 0:
            return dist.Normal(alpha * jnp.asarray(distribution.v), sigma)
        case dist.MultivariateNormal():
            clean = alpha**2 * distribution.covariance_matrix
            added = sigma**2 * jnp.eye(distribution.event_shape[-1])
            covariance = clean + added
            return WhitenedNormal(alpha * jnp.asarray(distribution.loc), covariance)
        case _ if log_noised(distribution) is not None:
            # Bounds and heavy tails, in one dimension.
            return Noised(distribution, alpha, sigma)
        case dist.TransformedDistribution() if _is_affine(distribution):
            return _moved(distribution, noise)
        case _:
            raise WrongTypeError(
                f"A noised {type(distribution).__name__} has no closed form here.",
                fix=f"use {SUPPORTED}, or an array of points (n, *event_shape) for "
                "their empirical distribution.",
            )


class WhitenedNormal(dist.MultivariateNormal):
    """A multivariate normal with the density of `log_normal`: chains share no lock, and
    a level's covariance is factorised once for all of them."""

    def log_prob(self, value: Array) -> Array:
        return log_normal(value - self.loc, self.covariance_matrix)


def _is_affine(distribution: dist.TransformedDistribution) -> bool:
    """Return whether a distribution is loc + scale·Y of a Y in one dimension."""
    return distribution.base_dist.event_shape == () and all(
        isinstance(transform, dist.transforms.AffineTransform)
        for transform in distribution.transforms
    )


def _moved(distribution: dist.Distribution, noise: Noise) -> dist.Distribution:
    """Return the noised distribution of loc + scale·Y.

    α·(loc + scale·Y) + σ·ε = α·loc + sign(scale)·(α·|scale|·Y + σ·ε') for a symmetric
    ε: Y noised at another signal strength, with its sign, moved.
    """
    loc = jnp.zeros(())
    scale = jnp.ones(())
    # The composition of all transformations, the first one innermost.
    for transform in distribution.transforms:
        loc = transform.loc + transform.scale * loc
        scale = transform.scale * scale
    rescaled = Noise(noise.index, noise.alpha * jnp.abs(scale), noise.sigma)
    base = noised(distribution.base_dist, rescaled)
    shift = dist.transforms.AffineTransform(
        noise.alpha * loc, jnp.sign(scale), domain=dist.constraints.real
    )
    return dist.TransformedDistribution(base, shift)
