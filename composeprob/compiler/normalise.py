"""Flattens products, pushes powers to the leaves, merges powers of one factor, drops zero powers.

A mixture stays where it is, as one factor of a product: distributing the product over it would multiply the number
of leaves without saving an evaluation.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from composeprob.errors import ImproperError
from composeprob.ir.nodes import Graph, Leaf, Mixture, Node, Plate, Product, Site, leaves, same_leaf


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
        if node.plate and not _runs(children[0], node.plate):  # n times the same
            return Mixture(tuple(children), (float(np.logaddexp.reduce(node.log_weights)),), node.total)
        return replace(node, children=tuple(children))
    if node.powers == (1.0,):
        return _normal(node.children[0])
    terms: list[tuple[Node, float]] = []
    for child, power in _flatten(node, 1.0):
        for i, (known, known_power) in enumerate(terms):
            if _same(child, known):
                terms[i] = (known, known_power + power)
                break
        else:
            terms.append((child, power))
    terms = [_with_power(child, power) for child, power in terms if abs(power) > 1e-12]
    if not terms:
        return None
    if len(terms) == 1 and terms[0][1] == 1.0:
        return terms[0][0]
    return Product(tuple(child for child, _ in terms), tuple(power for _, power in terms), node.normalised)


def _flatten(node: Node, power: float) -> list[tuple[Node, float]]:
    """(child, power) pairs of nested products, each child a leaf, a normalised mixture, or such a one over data.

    Products over data are taken apart: Π_i f(x | c_i)^v·g(x)^w = (Π_i f(x | c_i))^v·g(x)^{n·w}.
    """
    if isinstance(node, Product) and node.plate:
        plate, pairs = node.plate, _flatten(node.children[0], power * node.powers[0])
        ones = (1.0,) * plate.count
        return [
            (Product((child,), ones, plate=plate), own) if _runs(child, plate) else (child, plate.count * own)
            for child, own in pairs
        ]
    if isinstance(node, Product):
        return [pair for child, own in node.terms for pair in _flatten(child, power * own)]
    normal = _normal(node)
    return [] if normal is None or power == 0.0 else [(normal, power)]


def _runs(node: Node, plate: Plate) -> bool:
    """Whether a node has one value for each value of the plate, and not one for all."""
    return any(plate in leaf.plates for leaf in leaves(node))


def _same(a: Node, b: Node) -> bool:
    """Whether two factors are known to be the same: leaves, or products of the same leaf over the same data."""
    if isinstance(a, Product) and isinstance(b, Product):
        return a.plate == b.plate and _same(a.children[0], b.children[0])
    return isinstance(a, Leaf) and isinstance(b, Leaf) and same_leaf(a, b)


def _with_power(node: Node, power: float) -> tuple[Node, float]:
    """The power of a product over data is the product over data of powers."""
    if isinstance(node, Product):
        return replace(node, powers=(power,) * len(node.powers)), 1.0
    return node, power
