"""Latents: factors that may depend on them, latents that are held at their prior draws,
and the unconstrained coordinates of static sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax.numpy as jnp
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
from composeprob.factors.diffusion import Diffusion
from composeprob.factors.nodes import Mixture
from composeprob.factors.passes import Pass
from composeprob.language.finite import is_discrete, values_of
from composeprob.language.interpret import Statement

Statements = Mapping[str, Statement]
Dependencies = Mapping[str, frozenset[str]]


def held_for(
    site: Statement, statements: Statements, dependencies: Dependencies
) -> frozenset[str]:
    """The static sites that must be held at their prior draws, because the factor of a
    noised site depends on latents.

    Refused if ancestral order is not the program's distribution, or if the factor
    depends on a noised site.

    A factor that is a density whatever its parameters are (`stays_normalised`) needs
    none. For any other f(x; c) the program means p(c)·f(x; c)/Z(c) with Z unknown: no
    chain can move c. Ancestral order needs no Z: c is drawn from its prior and held
    while x is annealed. That is right where nothing else depends on x, and no data
    depend on c. ``dependencies`` has the latents that each statement depends on
    directly.
    """
    direct = sorted(dependencies[site.name])
    above = ancestors(site.name, dependencies)
    normalised = stays_normalised(site.factor)
    if not normalised and not awaits_result(site, statements, dependencies):
        others = ", ".join(map(repr, direct))
        _check_ancestral(site, others, statements, dependencies)
    # A normalised factor may follow static sites that follow noised ones.
    parents = direct if normalised else above
    noised = [name for name in parents if statements[name].kind == "noised"]
    if noised:
        raise ProgramError(
            f"The factor at site {site.name!r} depends on the noised site "
            f"{noised[0]!r}: above level 0 its noised marginal would be that of "
            "another noisy value.",
            where=site.where,
            fix=f"put both sites into one factor, or let {noised[0]!r} act through "
            "cp.observe or cp.factor.",
        )
    return frozenset() if normalised else frozenset(above)


def awaits_result(
    site: Statement, statements: Statements, dependencies: Dependencies
) -> bool:
    """Return whether the latents of a site's factor wait for the samples of an earlier
    result.

    One conditional model f(x; c) is a density of x for every c, Z(c) = 1, so that
    chains with different c can be weighted by data on x (`Result.extend`). Nothing can
    move c, as f offers no derivative by it. The site's data alone may depend on x.
    """
    if not is_conditional_model(site.factor):
        return False
    below = [name for name in statements if site.name in dependencies[name]]
    kinds = {statements[name].kind for name in below}
    return "observed" in kinds and kinds <= {"observed", "deterministic"}


is_conditional_model = Pass[bool]("is one model", lambda factor, parts: False)
"""True of a single diffusion model, a density of the event whatever its condition."""
is_conditional_model.rule(Diffusion)(
    lambda factor, parts: "exact_marginals" in factor.capabilities
)


stays_normalised = Pass[bool]("stays normalised", lambda factor, parts: False)
"""True of a factor that is a density whatever its parameters are."""
stays_normalised.rule(Analytic)(lambda factor, parts: True)
stays_normalised.rule(Mixture)(lambda node, parts: node.calibrated and all(parts))


def _check_ancestral(
    site: Statement, others: str, statements: Statements, dependencies: Dependencies
) -> None:
    """Refuse a factor of unknown normaliser if its parents do not follow their priors
    in the program."""
    sentence = (
        f"The factor at site {site.name!r} depends on the unobserved latent {others}: "
        "its unknown normaliser would depend on it too"
    )
    kinds = {
        name: s.kind for name, s in statements.items() if s.kind != "deterministic"
    }
    # Given a statement below the site, c would not follow its prior.
    below = [name for name in kinds if site.name in dependencies[name]]
    if below:
        raise DoublyIntractableError(
            f"{sentence}, and {below[0]!r} depends on {site.name!r}.",
            where=site.where,
            fix=f"observe {others}; or calibrate over it (a cp.mixture of the factor "
            "calibrated under each of its values); or let it act through a classifier, "
            "cp.observe or cp.factor. Only cp.Analytic factors, and mixtures of them "
            "with weights=, may depend on latents.",
        )

    def neighbours(here: str) -> list[str]:
        """The statements that a statement depends on, or that depend on it."""
        return [n for n in kinds if n in dependencies[here] or here in dependencies[n]]

    # Data change the parents' distribution however they are connected to them.
    connected = _reached([site.name], neighbours)
    data = [
        name for name, kind in kinds.items() if kind == "observed" and name in connected
    ]
    if data:
        raise DoublyIntractableError(
            f"{sentence}, and {data[0]!r} depends on {others}.",
            where=site.where,
            fix=f"as nothing else depends on {site.name!r}, ancestral order is exact: "
            f"infer {others} by a program without it, then draw it for each value by "
            "cp.as_distribution(factor.given(…)).sample(key).",
        )


def ancestors(name: str, dependencies: Dependencies) -> list[str]:
    """Every latent that a statement depends on, directly or through others."""

    def parents(latent: str) -> list[str]:
        return sorted(dependencies[latent])

    return _reached(parents(name), parents)


def _reached(pending: list[str], neighbours: Callable[[str], list[str]]) -> list[str]:
    """All statements that are reached from the ``pending`` ones, the nearest first."""
    reached: list[str] = []
    while pending:
        current = pending.pop(0)
        if current not in reached:
            reached.append(current)
            pending += neighbours(current)
    return reached


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
    if is_discrete(distribution):
        values = values_of(distribution)
        assert values is not None
        return WholeNumbers(values.low)
    if not standardised:
        return biject_to(distribution.support)
    # z = g(μ + s·u): an affine map, then the prior's own transforms.
    base, transforms = _base(distribution)
    return ComposeTransform([AffineTransform(base.loc, base.scale), *transforms])


class WholeNumbers(Transform):
    """The map from the index of a discrete latent's value, which a position holds as a
    float, to the value: low + index."""

    def __init__(self, low: int):
        self.low = low

    def __call__(self, index: Array) -> Array:
        return self.low + jnp.round(index).astype(jnp.result_type(int))

    def _inverse(self, value: Array) -> Array:
        return (value - self.low).astype(jnp.result_type(float))

    def log_abs_det_jacobian(
        self, index: Array, value: Array, intermediates: object = None
    ) -> Array:
        return jnp.zeros(jnp.shape(value))

    def tree_flatten(self) -> tuple[tuple[int], tuple[tuple[str], dict[str, object]]]:
        return (self.low,), (("low",), {})


def located(distribution: Distribution) -> bool:
    """Return whether a prior has a location and a scale, which `bijection_of` can
    use."""
    base, _ = _base(distribution)
    return _has_location(base)


def place_of(distribution: Distribution) -> tuple[Array, Array] | None:
    """Location and scale of a normal or log-normal prior in its usual coordinate; None
    for other priors."""
    base, transforms = _base(distribution)
    # In other coordinates the prior is not the base shifted and stretched.
    usual = [type(transform) for transform in transforms] in ([], [ExpTransform])
    if usual and _has_location(base):
        return base.loc, base.scale
    return None


def _has_location(distribution: Distribution) -> bool:
    """Return whether a distribution belongs to a location–scale family on the real
    line."""
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
    """The distribution inside of plates' expansions, masks and transforms; and these
    transforms."""
    wrappers = (dist.ExpandedDistribution, dist.MaskedDistribution, dist.Independent)
    # The transforms of an inner distribution are applied first.
    transforms: list[Transform] = []
    while not _has_location(distribution):
        if isinstance(distribution, dist.TransformedDistribution):
            transforms = [*distribution.transforms, *transforms]
        elif not isinstance(distribution, wrappers):
            break
        distribution = distribution.base_dist
    return distribution, transforms
