"""Flatten products, push powers to the leaves, merge powers of one factor, drop zero
powers."""

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
    sentence = f"{after} leaves"
    if before > after:
        sentence += f", {before - after} merged or dropped"
    return result.noted("normalise", sentence)


def _site(root: Factor, site: Site) -> Factor:
    node = _normal(root)
    if node is None:
        raise ImproperError(
            f"At site {site.name!r} every factor cancels: the total power is 0 and no "
            "density is left.",
            where=site.where,
            fix="keep at least one factor with a positive power.",
        )
    return node


def _normal(node: Factor) -> Factor | None:
    """The normal form of a node; None where it is the constant 1."""
    return normal_of.rule_for(node)(node)


def _each_normal(node: Any) -> Any:
    """A combination with each of its factors in normal form."""
    children = tuple(map(_normal, node.children))
    if any(child is None for child in children):
        kind = type(node).__name__.lower()
        raise ImproperError(
            f"A component of a {kind} cancels to a constant, which is not a density.",
            fix=f"drop that component from cp.{kind}.",
        )
    return node.with_children(children)


def _single(node: Factor, power: float) -> list[tuple[Factor, float]]:
    normal = _normal(node)
    if normal is None or power == 0.0:
        return []
    return [(normal, power)]


normal_of = Pass[Factor | None]("normal", _each_normal)
"""Rules (node) for its normal form; None where it is the constant 1."""
factors_of = Pass[list[tuple[Factor, float]]]("factors", _single)
"""Rules (node, power) for the (factor, power) pairs that node^power multiplies. Each
factor is in normal form, and not a product, except for products over data."""
same_of = Pass[bool]("same", lambda node, other: False)
"""Rules (node, another of its kind); True if the two are certain to be the same
factor."""


def same(a: Factor, b: Factor) -> bool:
    """Return whether two factors are certainly the same: equal leaves, or products of
    one leaf over the same data."""
    if type(a) is not type(b):
        return False
    return same_of.rule_for(a)(a, b)


def runs(node: Factor, plate: Plate) -> bool:
    """Return whether a node's value differs between the values of a plate."""
    return any(plate in leaf.plates for leaf in leaves(node))


normal_of.rule(Leaf)(lambda leaf: leaf)
same_of.rule(Leaf)(same_leaf)


@normal_of.rule(Product)
def _normal_product(node: Product) -> Factor | None:
    if node.powers == (1.0,):
        return _normal(node.factors[0])
    merged: list[tuple[Factor, float]] = []
    for child, power in factors_of.rule_for(node)(node, 1.0):
        _merge(merged, child, power)
    # Powers that cancel, as in f^0.1·f^0.2/f^0.3, leave what rounding leaves.
    terms = [_raised(child, power) for child, power in merged if abs(power) > 1e-12]
    if not terms:
        return None
    if len(terms) == 1 and terms[0][1] == 1.0:
        return terms[0][0]
    children, powers = zip(*terms, strict=True)
    # Data are in the factors' plates from here on.
    return replace(node, factors=children, numbers=powers, plate=None)


def _merge(terms: list[tuple[Factor, float]], factor: Factor, power: float) -> None:
    """Multiply terms by a power of a factor: f^v·f^w = f^{v+w}."""
    for i, (other, exponent) in enumerate(terms):
        if same(factor, other):
            terms[i] = (other, exponent + power)
            return
    terms.append((factor, power))


def _raised(node: Factor, power: float) -> tuple[Factor, float]:
    """A factor and its power, which a product over data takes inside: (Π_i f_i)^w =
    Π_i f_i^w."""
    if not isinstance(node, Product):
        return node, power
    return replace(node, numbers=(power,) * len(node.numbers)), 1.0


@normal_of.rule(Mixture)
def _normal_mixture(node: Mixture) -> Mixture:
    """A mixture is left as one factor of a product.

    To distribute the product over its components would multiply the number of leaves
    and save no evaluation. A mixture over data whose component does not depend on them
    is n times that component.
    """
    node = _each_normal(node)
    if node.plate is None or runs(node.factors[0], node.plate):
        return node
    log_weight = float(np.logaddexp.reduce(node.log_weights))
    return replace(node, numbers=(log_weight,), plate=None)


@factors_of.rule(Product)
def _factors_of_product(node: Product, power: float) -> list[tuple[Factor, float]]:
    """The factors of a product, whose products over data are divided:
    Π_i f(x | c_i)^v·g(x)^w = (Π_i f(x | c_i))^v·g(x)^{n·w}."""
    inner: list[tuple[Factor, float]] = []
    # In a plate there is one factor, and equal powers.
    for child, exponent in zip(node.factors, node.powers, strict=False):
        inner += factors_of.rule_for(child)(child, power * exponent)
    plate = node.plate
    if plate is None:
        return inner
    bare = replace(node, numbers=(1.0,) * plate.count)
    divided: list[tuple[Factor, float]] = []
    for child, exponent in inner:
        if runs(child, plate):
            divided.append((bare.with_children((child,)), exponent))
        else:
            divided.append((child, plate.count * exponent))
    return divided


@same_of.rule(Product)
def _same_product(node: Product, other: Product) -> bool:
    return node.plate == other.plate and same(node.factors[0], other.factors[0])
