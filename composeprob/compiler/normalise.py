"""Flattens products, pushes powers to the leaves, merges powers of one factor, drops zero powers."""

from __future__ import annotations

from typing import Any

from composeprob.errors import ImproperError
from composeprob.factors.base import Factor
from composeprob.factors.nodes import Plate
from composeprob.factors.passes import Pass
from composeprob.ir.nodes import Graph, Leaf, Site, leaves, same_leaf


def normalise(graph: Graph) -> Graph:
    """Every site's expression in normal form: a leaf, a mixture, or a product of distinct ones. Refused where nothing
    is left of it (f / f)."""
    before = sum(len(leaves(site.root)) for site in graph.sites)
    result = graph.map_roots(_site)
    after = sum(len(leaves(site.root)) for site in result.sites)
    merged = f", {before - after} merged or dropped" if before > after else ""
    return result.noted("normalise", f"{after} leaves{merged}")


def _site(root: Factor, site: Site) -> Factor:
    node = _normal(root)
    if node is None:
        raise ImproperError(
            f"At site {site.name!r} every factor cancels: the total power is 0 and no density is left.",
            where=site.where,
            fix="keep at least one factor with a positive power.",
        )
    return node


def _normal(node: Factor) -> Factor | None:
    return normal_of.rule_for(node)(node)


def each_normal(node: Any) -> Any:
    """A combination with each of its factors in normal form."""
    children = tuple(map(_normal, node.children))
    if any(child is None for child in children):
        kind = type(node).__name__.lower()
        raise ImproperError(
            f"A component of a {kind} cancels to a constant, which is no density.",
            fix=f"drop that component from cp.{kind}.",
        )
    return node.with_children(children)


def _single(node: Factor, power: float) -> list[tuple[Factor, float]]:
    normal = _normal(node)
    return [] if normal is None or power == 0.0 else [(normal, power)]


normal_of = Pass[Factor | None]("normal", each_normal)
"""Rules (node) for its normal form; None where it is the constant 1."""
factors_of = Pass[list[tuple[Factor, float]]]("factors", _single)
"""Rules (node, power) for the (factor, power) pairs that node^power multiplies, each factor in normal form and no
product, but for products over data."""
same_of = Pass[bool]("same", lambda node, other: False)
"""Rules (node, another of its kind) for whether the two are known to be the same factor."""


def same(a: Factor, b: Factor) -> bool:
    """Whether two factors are known to be the same: leaves, or products of the same leaf over the same data."""
    return type(a) is type(b) and same_of.rule_for(a)(a, b)


def runs(node: Factor, plate: Plate) -> bool:
    """Whether a node has one value for each value of the plate, and not one for all."""
    return any(plate in leaf.plates for leaf in leaves(node))


normal_of.rule(Leaf)(lambda leaf: leaf)
same_of.rule(Leaf)(same_leaf)
