"""Unconstrained coordinates of static sites: the prior's bijection, or the prior's own location and scale."""

from __future__ import annotations

import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import Distribution, biject_to
from numpyro.distributions.transforms import AffineTransform, ComposeTransform, ExpTransform, Transform


def bijection_of(distribution: Distribution, standardised: bool) -> Transform:
    r"""The map from a static site's coordinate u, any real numbers, to its value: the usual bijection from the reals to
    the support of its prior, plates applied; or, ``standardised``,

    $z = g(\mu + s\,u)$, with μ and s the location and the scale that the prior has given the other latents, and g what
    a transformed distribution (a LogNormal's exp) does to its base. The prior of u then does not depend on the latents,
    so that where μ is a noised site, u can stay while x/α moves by many s from one noise level to the next
    (Papaspiliopoulos, Roberts and Sköld 2007, *A general framework for the parametrization of hierarchical models*).
    """
    if not standardised:
        return biject_to(distribution.support)
    base, transforms = _base(distribution)
    return ComposeTransform([AffineTransform(base.loc, base.scale), *transforms])


def located(distribution: Distribution) -> bool:
    """Whether a prior has a location and a scale, so that `bijection_of` can use them."""
    return _has_location(_base(distribution)[0])


def place_of(distribution: Distribution) -> tuple[Array, Array] | None:
    """Location and scale of a prior in its usual coordinate, which normal and log-normal ones have; None of others."""
    base, transforms = _base(distribution)
    usual = [type(each) for each in transforms] in ([], [ExpTransform])
    return (base.loc, base.scale) if usual and _has_location(base) else None


def _has_location(distribution: Distribution) -> bool:
    """Whether it is one of those on the real line that a location and a scale shift and stretch."""
    kinds = (dist.Cauchy, dist.Gumbel, dist.Laplace, dist.Logistic, dist.Normal, dist.StudentT)
    return isinstance(distribution, kinds)


def _base(distribution: Distribution) -> tuple[Distribution, list[Transform]]:
    """The distribution inside plates' expansions, masks and transforms, and these transforms."""
    transforms: list[Transform] = []
    while not _has_location(distribution):
        if isinstance(distribution, dist.TransformedDistribution):
            transforms = [*distribution.transforms, *transforms]
        elif not isinstance(distribution, (dist.ExpandedDistribution, dist.MaskedDistribution, dist.Independent)):
            break
        distribution = distribution.base_dist
    return distribution, transforms
