"""Checks capabilities, propriety at the noisiest level, shapes. Nothing is compiled
before this has passed."""

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
from composeprob.ir.leaves import Graph, Leaf, leaves


def check(graph: Graph, networks: bool = True) -> Graph:
    """Refuse what cannot be sampled: levels that cannot be normalised, a noisiest one
    that is not noise alone, a mixture over a score-only factor, networks that cannot be
    called with their conditions or, where ``networks``, whose values are not what their
    factors declare. Note what the density offers."""
    for site in graph.sites:
        check_proper(site)
        for leaf in leaves(site.root):
            try:
                leaf.first.check_network()
            except ComposeProbError as error:
                raise type(error)(
                    error.found, where=site.where, fix=_shared(leaf) + (error.fix or "")
                ) from error
    check_tails(graph)
    check_signal(graph)
    # The user's plain functions can be called, and what they read has its values of now
    # from here on.
    groups = [
        replace(group, factor=closed(group.factor, group.first))
        for group in graph.groups
    ]
    graph = replace(graph, groups=tuple(groups))
    graph = check_plausible(graph) if networks else graph
    for doubt in graph.doubts:
        graph = graph.noted("doubt", doubt)
    return graph.noted("check", f"offers {', '.join(sorted(capabilities(graph)))}")


def _shared(leaf: Leaf) -> str:
    """How to fix conditions that all members of a plate have in common, where they may
    have been meant one by one."""
    running = {name for plate in leaf.plates for name in plate.names}
    shapes = {
        name: jnp.shape(value)
        for name, value in leaf.factor.fixed.items()
        if name not in running
    }
    found = [f"{name!r} of shape {shape}" for name, shape in shapes.items() if shape]
    if not found or not leaf.plates:
        return ""
    return (
        f"in a plate of {leaf.plates[-1].count} members condition {', '.join(found)} is one value for all of them: for "
        "one each give it a first axis of that size. Otherwise "
    )


def capabilities(graph: Graph) -> frozenset[str]:
    """What the program's density offers: what every noised site offers, less what
    observations take away.

    ``feynman_kac`` is there where every site has a marginal part with a rate, and the
    rest, which enters the weights by its values, can be trusted between modes. Where
    static sites are held, densities under different values of these cannot be compared,
    and nothing that weighs chains against one another is offered.
    """
    if not graph.sites:
        return frozenset({"score", "energy", "conservative", "mode_depth"})
    offered = []
    for site in graph.sites:
        marginal, rest = site_parts(site.root)
        weighable = marginal is not None and (
            rest is None or "mode_depth" in node_capabilities(rest)
        )
        offered.append(
            node_capabilities(site.root) | ({"feynman_kac"} if weighable else set())
        )
    joined = frozenset.intersection(*offered)
    if graph.held:
        joined -= {"feynman_kac", "mode_depth"}
    return (
        joined - {"normalised", "exact_marginals"}
        if graph.observations or graph.statics
        else joined
    )


node_capabilities = Pass[frozenset[str]]("offers")
"""What an expression offers, from what its leaves offer."""
has_rate = Pass[bool]("rate", lambda *_: False)
"""Whether the Feynman–Kac rate of an expression follows from its scores, for which
every leaf must be a noised marginal."""
has_rate.rule(Leaf)(lambda leaf, _: "exact_marginals" in leaf.factor.capabilities)
has_rate.rule(Product)(lambda node, parts: all(parts))


@has_rate.rule(Mixture)
def _rate_of_mixture(node: Mixture, parts: list[bool]) -> bool:
    """Its parts must be normalised: with unknown constants that change from level to
    level its shares would drift, and no rate describes that."""
    return all(parts) and all(
        "normalised" in leaf.factor.capabilities for leaf in leaves(node)
    )


@node_capabilities.rule(Leaf)
def _leaf_capabilities(leaf: Leaf, _: list[frozenset[str]]) -> frozenset[str]:
    return (
        leaf.factor.capabilities
        if leaf.averaged == 1
        else leaf.factor.capabilities - {"normalised"}
    )


@node_capabilities.rule(Product)
def _product_capabilities(node: Product, parts: list[frozenset[str]]) -> frozenset[str]:
    """Its normaliser is unknown, unless it was calibrated, and its level-k density is
    not a noised marginal."""
    offered = frozenset.intersection(*parts) - {"normalised", "exact_marginals"}
    return offered | {"normalised"} if node.calibrated else offered


@node_capabilities.rule(Mixture)
def _mixture_capabilities(node: Mixture, parts: list[frozenset[str]]) -> frozenset[str]:
    """Of normalised parts with shares it keeps everything."""
    common = frozenset.intersection(*parts)
    if "energy" not in common:
        raise CapabilityError(
            f"A mixture needs the log-density of its parts, but one of {', '.join(leaf.name for leaf in leaves(node))} "
            "offers only its score.",
            fix="use a model trained with an energy parameterization.",
        )
    return common if "normalised" in common else common - {"exact_marginals"}


def site_parts(root: Factor) -> tuple[Factor | None, Factor | None]:
    """Split a site's expression into F, made of noised marginals, and the potential G:
    everything else. A user's energy or a classifier has no rate, but its values are
    known: it enters the weights between levels as a ratio instead."""
    return divided(root, has_rate)


def divided(
    node: Factor, holds: Callable[[Factor], bool]
) -> tuple[Factor | None, Factor | None]:
    """The product of those factors of a product that something holds of, and that of
    the others; None of none."""
    chosen = [holds(factor) for factor, _ in node.split()]
    return part(node, chosen), part(node, [not here for here in chosen])
