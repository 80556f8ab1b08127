"""Flatten products, push powers to the leaves, merge powers of one factor, drop zero powers.

A mixture stays where it is, as one factor of a product: distributing the product over it would multiply the number
of leaves without saving an evaluation.
"""

from __future__ import annotations

from dataclasses import replace

from composeprob.errors import ImproperError
from composeprob.ir.nodes import Graph, Leaf, Mixture, Node, Product, Site, leaves, same_leaf


def normalise(graph: Graph) -> Graph:
    """Every site's expression in normal form: a leaf, a mixture, or a product of distinct ones.

    Raises:
        ImproperError: nothing is left of a site's expression (f / f).
    """
    before = sum(len(leaves(site.root)) for site in graph.sites)
    result = graph.map_roots(_site)
    after = sum(len(leaves(site.root)) for site in result.sites)
    merged = f", {before - after} merged or dropped" if before > after else ""
    return result.noted("normalise", f"{after} leaves{merged}")


def _site(root: Node, site: Site) -> Node:
    node = _normal(root)
    if node is None:
        raise ImproperError(
            f"At site {site.name!r} every factor cancels: the total power is 0 and no density is left.",
            where=site.where,
            fix="keep at least one factor with a positive power.",
        )
    return node


def _normal(node: Node) -> Node | None:
    """The normal form; None where it is the constant 1."""
    if isinstance(node, Leaf):
        return node
    if isinstance(node, Mixture):
        children = [_normal(child) or Product((), ()) for child in node.children]
        if any(isinstance(child, Product) and not child.children for child in children):
            raise ImproperError(
                "A component of a mixture cancels to a constant, which is no density.",
                fix="drop that component from cp.mixture.",
            )
        return replace(node, children=tuple(children))
    if node.powers == (1.0,):
        return _normal(node.children[0])
    terms: list[tuple[Node, float]] = []
    for child, power in _flatten(node, 1.0):
        for i, (known, known_power) in enumerate(terms):
            if isinstance(child, Leaf) and isinstance(known, Leaf) and same_leaf(child, known):
                terms[i] = (known, known_power + power)
                break
        else:
            terms.append((child, power))
    terms = [(child, power) for child, power in terms if abs(power) > 1e-12]
    if not terms:
        return None
    if len(terms) == 1 and terms[0][1] == 1.0:
        return terms[0][0]
    return Product(tuple(child for child, _ in terms), tuple(power for _, power in terms), node.normalised)


def _flatten(node: Node, power: float) -> list[tuple[Node, float]]:
    """(child, power) pairs of nested products, each child a leaf or a normalised mixture."""
    if isinstance(node, Product):
        pairs = zip(node.children, node.powers, strict=True)
        return [pair for child, own in pairs for pair in _flatten(child, power * own)]
    normal = _normal(node)
    return [] if normal is None or power == 0.0 else [(normal, power)]
