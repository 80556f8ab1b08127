"""Check capabilities, propriety and networks. Nothing is compiled before this has
passed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import jax.numpy as jnp

from composeprob.compiler.plausible import check_plausible
from composeprob.compiler.proper import check_signal, check_tails
from composeprob.compiler.top import check_proper
from composeprob.errors import CapabilityError, ComposeProbError
from composeprob.factors.factor import Factor
from composeprob.factors.networks import closed
from composeprob.factors.nodes import Mixture, Product, part
from composeprob.factors.passes import Pass
from composeprob.ir.leaves import Graph, Leaf, Site, leaves


def check(graph: Graph, networks: bool = True) -> Graph:
    """Refuse a program that cannot be sampled, and note what its density offers.

    Refused are levels that cannot be normalised, a noisiest one that is not noise
    alone, a mixture over a score-only factor, networks that cannot be called with their
    conditions and, where ``networks``, those whose values are not what their factors
    declare.
    """
    for site in graph.sites:
        check_proper(site)
        for leaf in leaves(site.root):
            _check_network(leaf, site)
    # Linear algebra comes first, and the evaluation of networks last.
    check_tails(graph)
    check_signal(graph)
    # The user's functions can be called, so they are closed: values that they read
    # from outside are those of now from here on.
    groups = [
        replace(group, factor=closed(group.factor, group.first))
        for group in graph.groups
    ]
    graph = replace(graph, groups=tuple(groups))
    if networks:
        graph = check_plausible(graph)
    for doubt in graph.doubts:
        graph = graph.noted("doubt", doubt)
    return graph.noted("check", f"offers {', '.join(sorted(capabilities(graph)))}")


def check_networks(graph: Graph) -> None:
    """Refuse networks that cannot be called with the conditions of their factors."""
    for site in graph.sites:
        for leaf in leaves(site.root):
            _check_network(leaf, site)


def _check_network(leaf: Leaf, site: Site) -> None:
    """Refuse a network that cannot be called with the first of its conditions."""
    try:
        leaf.first.check_network()
    except ComposeProbError as error:
        # The site's line says more to the user than the library's.
        fix = _shared_conditions(leaf) + (error.fix or "")
        raise type(error)(error.found, where=site.where, fix=fix) from error


def _shared_conditions(leaf: Leaf) -> str:
    """The fix for array conditions that all members of a plate share, as one value for
    each member may have been meant; empty without such conditions."""
    if not leaf.plates:
        return ""
    running = {name for plate in leaf.plates for name in plate.names}
    shared = []
    for name, value in leaf.factor.fixed.items():
        shape = jnp.shape(value)
        if shape and name not in running:
            shared.append(f"{name!r} of shape {shape}")
    if not shared:
        return ""
    return (
        f"in a plate of {leaf.plates[-1].count} members condition {', '.join(shared)} "
        "is one value for all of them: for a value for each member, give it a first "
        "axis of that size. Otherwise "
    )


def capabilities(graph: Graph) -> frozenset[str]:
    """The capabilities that all noised sites offer, less those that observations take
    away.

    ``feynman_kac`` is there where every site has a marginal part with a rate, and the
    rest, which enters the weights by its values, can be trusted between modes. Where
    static sites are held, densities under different values of these cannot be compared,
    and nothing that weighs chains against one another is offered.
    """
    if not graph.sites:
        return frozenset({"score", "energy", "conservative", "mode_depth"})
    by_site = []
    for site in graph.sites:
        offered = node_capabilities(site.root)
        marginal, rest = site_parts(site.root)
        trusted = rest is None or "mode_depth" in node_capabilities(rest)
        if marginal is not None and trusted:
            offered = offered | {"feynman_kac"}
        by_site.append(offered)
    common = frozenset.intersection(*by_site)
    if graph.held:
        common -= {"feynman_kac", "mode_depth"}
    # Observations and priors multiply the sites by what has no known normaliser.
    if graph.observations or graph.statics:
        common -= {"normalised", "exact_marginals"}
    return common


node_capabilities = Pass[frozenset[str]]("offers")
"""The capabilities of an expression, from those of its leaves."""
has_rate = Pass[bool]("rate", lambda *_: False)
"""True of an expression whose Feynman–Kac rate follows from its scores: every leaf must
be a noised marginal."""
has_rate.rule(Leaf)(lambda leaf, _: "exact_marginals" in leaf.factor.capabilities)
has_rate.rule(Product)(lambda node, parts: all(parts))


@has_rate.rule(Mixture)
def _rate_of_mixture(node: Mixture, parts: list[bool]) -> bool:
    """A mixture has a rate if its components are normalised: unknown constants that
    change with the level would make its shares drift, which no rate describes."""
    return all(parts) and all(
        "normalised" in leaf.factor.capabilities for leaf in leaves(node)
    )


@node_capabilities.rule(Leaf)
def _leaf_capabilities(leaf: Leaf, _: list[frozenset[str]]) -> frozenset[str]:
    # A density of block averages is not one of the site.
    if leaf.averaged > 1:
        return leaf.factor.capabilities - {"normalised"}
    return leaf.factor.capabilities


@node_capabilities.rule(Product)
def _product_capabilities(node: Product, parts: list[frozenset[str]]) -> frozenset[str]:
    """The capabilities of a product: its normaliser is unknown unless it was
    calibrated, and its density at level k is not a noised marginal."""
    # The product of noised densities is not the noised product.
    offered = frozenset.intersection(*parts) - {"normalised", "exact_marginals"}
    return offered | {"normalised"} if node.calibrated else offered


@node_capabilities.rule(Mixture)
def _mixture_capabilities(node: Mixture, parts: list[frozenset[str]]) -> frozenset[str]:
    """The capabilities of a mixture: all that its components share, if they are
    normalised."""
    common = frozenset.intersection(*parts)
    if "energy" not in common:
        names = ", ".join(leaf.name for leaf in leaves(node))
        raise CapabilityError(
            "A mixture needs the log-density of its parts, but one of "
            f"{names} offers only its score.",
            fix="use a model trained with an energy parameterization.",
        )
    if "normalised" in common:
        return common
    return common - {"exact_marginals"}


def site_parts(root: Factor) -> tuple[Factor | None, Factor | None]:
    """Split a site's expression into F, made of noised marginals, and the potential G:
    all other factors. A user's energy or a classifier has no rate, but it has values:
    it enters the weights between levels as a ratio instead."""
    return split_by(root, has_rate)


def split_by(
    node: Factor, holds: Callable[[Factor], bool]
) -> tuple[Factor | None, Factor | None]:
    """Return the product of a product's factors that satisfy a condition, and that of
    the others; None where there are none."""
    chosen = [holds(factor) for factor, _ in node.split()]
    others = [not holding for holding in chosen]
    return part(node, chosen), part(node, others)
