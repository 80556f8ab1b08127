"""Latents: where a factor's normaliser allows that it depends on them, and what must be
held if it is unknown; the unconstrained coordinates of static sites, by the prior's
bijection or by its own location and scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import Distribution, biject_to
from numpyro.distributions.transforms import (
    AffineTransform,
    ComposeTransform,
    ExpTransform,
    Transform,
)

from composeprob.errors import DoublyIntractableError, ProgramError
from composeprob.factors.analytic import Analytic
from composeprob.factors.nodes import Mixture
from composeprob.factors.passes import Pass
from composeprob.language.interpret import Statement

Statements = Mapping[str, Statement]
Dependencies = Mapping[str, frozenset[str]]


def held_for(
    site: Statement, statements: Statements, dependencies: Dependencies
) -> frozenset[str]:
    """The static sites that must be held at their prior draws so that the factor of a
    noised site may depend on latents. Refused where ancestral order is not the
    program's distribution, and where the factor depends on a noised site.

    A factor that is a density whatever its parameters are (`stays_normalised`) needs
    none. For any other f(x; c) the program means p(c)·f(x; c)/Z(c) with Z unknown: no
    chain can move c. Ancestral order needs no Z: c is drawn from its prior and held
    while x is annealed. That is right where nothing else depends on x, and no data
    depend on c. ``dependencies`` has the latents that each statement depends on
    directly.
    """
    direct = sorted(dependencies[site.name])
    above, known = ancestors(site.name, dependencies), stays_normalised(site.factor)
    if not known:
        _check_ancestral(site, ", ".join(map(repr, direct)), statements, dependencies)
    noised = [
        name
        for name in (direct if known else above)
        if statements[name].kind == "noised"
    ]
    if noised:
        raise ProgramError(
            f"The factor at site {site.name!r} depends on the noised site {noised[0]!r}: above level 0 its noised "
            "marginal would be that of another noisy value.",
            where=site.where,
            fix=f"put both sites into one factor, or let {noised[0]!r} act through cp.observe or cp.factor.",
        )
    return frozenset() if known else frozenset(above)


stays_normalised = Pass[bool]("stays normalised", lambda factor, parts: False)
"""Whether a factor is a density whatever its parameters are."""
stays_normalised.rule(Analytic)(lambda factor, parts: True)
stays_normalised.rule(Mixture)(lambda node, parts: node.calibrated and all(parts))


def _check_ancestral(
    site: Statement, others: str, statements: Statements, dependencies: Dependencies
) -> None:
    """Refuse a factor of unknown normaliser where its parents' priors are not their
    distribution in the program."""
    found = (
        f"The factor at site {site.name!r} depends on the unobserved latent {others}: its normaliser, which is not "
        "known, would depend on it too"
    )
    kinds = {
        name: s.kind for name, s in statements.items() if s.kind != "deterministic"
    }
    below = [name for name in kinds if site.name in dependencies[name]]
    if below:
        raise DoublyIntractableError(
            f"{found}, and {below[0]!r} depends on {site.name!r}.",
            where=site.where,
            fix=f"observe {others}; or calibrate over it (a cp.mixture of the factor calibrated under each of its "
            "values); or let it act through a classifier, cp.observe or cp.factor. Only cp.Analytic factors, and "
            "mixtures of them with weights=, may depend on latents.",
        )
    # Whichever way the arrows point.
    connected = _reached(
        [site.name],
        lambda here: [
            n for n in kinds if n in dependencies[here] or here in dependencies[n]
        ],
    )
    data = [
        name for name, kind in kinds.items() if kind == "observed" and name in connected
    ]
    if data:
        raise DoublyIntractableError(
            f"{found}, and {data[0]!r} depends on {others}.",
            where=site.where,
            fix=f"as nothing else depends on {site.name!r}, ancestral order is exact: infer {others} by a program "
            "without it, then draw it for each value by cp.as_distribution(factor.given(…)).sample(key).",
        )


def ancestors(name: str, dependencies: Dependencies) -> list[str]:
    """Every latent that a statement depends on, directly or through others."""
    return _reached(
        sorted(dependencies[name]), lambda current: sorted(dependencies[current])
    )


def _reached(pending: list[str], neighbours: Callable[[str], list[str]]) -> list[str]:
    """All that is connected to these statements, the nearest first."""
    found: list[str] = []
    while pending:
        current = pending.pop(0)
        if current not in found:
            found.append(current)
            pending += neighbours(current)
    return found


def bijection_of(distribution: Distribution, standardised: bool) -> Transform:
    r"""The map from a static site's coordinate u, any real numbers, to its value: the
    usual bijection from the reals to the support of its prior, plates applied; or,
    ``standardised``,

    $z = g(\mu + s\,u)$, with μ and s the location and the scale that the prior has
    given the other latents, and g what a transformed distribution (a LogNormal's exp)
    does to its base. The prior of u then does not depend on the latents, so that where
    μ is a noised site, u can stay while x/α moves by many s from one noise level to the
    next (Papaspiliopoulos, Roberts and Sköld 2007, *A general framework for the
    parametrization of hierarchical models*).
    """
    if not standardised:
        return biject_to(distribution.support)
    base, transforms = _base(distribution)
    return ComposeTransform([AffineTransform(base.loc, base.scale), *transforms])


def located(distribution: Distribution) -> bool:
    """Whether a prior has a location and a scale, so that `bijection_of` can use
    them."""
    return _has_location(_base(distribution)[0])


def place_of(distribution: Distribution) -> tuple[Array, Array] | None:
    """Location and scale of a prior in its usual coordinate, which normal and
    log-normal ones have; None of others."""
    base, transforms = _base(distribution)
    usual = [type(each) for each in transforms] in ([], [ExpTransform])
    return (base.loc, base.scale) if usual and _has_location(base) else None


def _has_location(distribution: Distribution) -> bool:
    """Whether it is one of those on the real line that a location and a scale shift and
    stretch."""
    kinds = (
        dist.Cauchy,
        dist.Gumbel,
        dist.Laplace,
        dist.Logistic,
        dist.Normal,
        dist.StudentT,
    )
    return isinstance(distribution, kinds)


def _base(distribution: Distribution) -> tuple[Distribution, list[Transform]]:
    """The distribution inside plates' expansions, masks and transforms, and these
    transforms."""
    transforms: list[Transform] = []
    while not _has_location(distribution):
        if isinstance(distribution, dist.TransformedDistribution):
            transforms = [*distribution.transforms, *transforms]
        elif not isinstance(
            distribution,
            (dist.ExpandedDistribution, dist.MaskedDistribution, dist.Independent),
        ):
            break
        distribution = distribution.base_dist
    return distribution, transforms
