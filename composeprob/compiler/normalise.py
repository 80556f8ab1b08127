"""Flattens products, pushes powers to the leaves, merges powers of one factor, drops
zero powers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from composeprob.errors import ImproperError
from composeprob.factors.factor import Factor
from composeprob.factors.nodes import Mixture, Plate, Product
from composeprob.factors.passes import Pass
from composeprob.ir.leaves import Graph, Leaf, Site, leaves, same_leaf


def normalise(graph: Graph) -> Graph:
    """Every site's expression in normal form: a leaf, a mixture, or a product of
    distinct ones. Refused where nothing is left of it (f / f)."""
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


def _each_normal(node: Any) -> Any:
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


normal_of = Pass[Factor | None]("normal", _each_normal)
"""Rules (node) for its normal form; None where it is the constant 1."""
factors_of = Pass[list[tuple[Factor, float]]]("factors", _single)
"""Rules (node, power) for the (factor, power) pairs that node^power multiplies, each
factor in normal form and no product, but for products over data."""
same_of = Pass[bool]("same", lambda node, other: False)
"""Rules (node, another of its kind) for whether the two are known to be the same
factor."""


def same(a: Factor, b: Factor) -> bool:
    """Whether two factors are known to be the same: leaves, or products of the same
    leaf over the same data."""
    return type(a) is type(b) and same_of.rule_for(a)(a, b)


def runs(node: Factor, plate: Plate) -> bool:
    """Whether a node has one value for each value of the plate, and not one for all."""
    return any(plate in leaf.plates for leaf in leaves(node))


normal_of.rule(Leaf)(lambda leaf: leaf)
same_of.rule(Leaf)(same_leaf)


@normal_of.rule(Product)
def _normal_product(node: Product) -> Factor | None:
    if node.powers == (1.0,):
        return _normal(node.factors[0])
    terms: list[tuple[Factor, float]] = []
    for child, power in factors_of.rule_for(node)(node, 1.0):
        for i, (known, known_power) in enumerate(terms):
            if same(child, known):
                terms[i] = (known, known_power + power)
                break
        else:
            terms.append((child, power))
    terms = [_raised(child, power) for child, power in terms if abs(power) > 1e-12]
    if not terms:
        return None
    if len(terms) == 1 and terms[0][1] == 1.0:
        return terms[0][0]
    children, powers = zip(*terms, strict=True)
    return replace(node, factors=children, numbers=powers, plate=None)


def _raised(node: Factor, power: float) -> tuple[Factor, float]:
    """The power of a product over data is the product over data of powers."""
    return (
        (replace(node, numbers=(power,) * len(node.numbers)), 1.0)
        if isinstance(node, Product)
        else (node, power)
    )


@normal_of.rule(Mixture)
def _normal_mixture(node: Mixture) -> Mixture:
    """A mixture stays where it is, as one factor of a product: to distribute the
    product over it would multiply the number of leaves and save no evaluation. One over
    data that does not depend on them is n times the same."""
    node = _each_normal(node)
    if node.plate is None or runs(node.factors[0], node.plate):
        return node
    return replace(
        node, numbers=(float(np.logaddexp.reduce(node.log_weights)),), plate=None
    )


@factors_of.rule(Product)
def _factors_of_product(node: Product, power: float) -> list[tuple[Factor, float]]:
    """Products over data are taken apart: Π_i f(x | c_i)^v·g(x)^w = (Π_i f(x |
    c_i))^v·g(x)^{n·w}."""
    pairs = zip(
        node.factors, node.powers, strict=False
    )  # in a plate there is one factor, and equal powers
    inner = [
        pair
        for child, exponent in pairs
        for pair in factors_of.rule_for(child)(child, power * exponent)
    ]
    if (plate := node.plate) is None:
        return inner
    bare = replace(node, numbers=(1.0,) * plate.count)
    return [
        (bare.with_children((child,)), exponent)
        if runs(child, plate)
        else (child, plate.count * exponent)
        for child, exponent in inner
    ]


@same_of.rule(Product)
def _same_product(node: Product, other: Product) -> bool:
    return node.plate == other.plate and same(node.factors[0], other.factors[0])
