"""The experts of a program: its factors that are true noised marginals, each with the
power that it has."""

from __future__ import annotations

import math

import equinox as eqx
import numpy as np

from composeprob.compiler.check import node_capabilities
from composeprob.compiler.expressions import Expression, lower_expression
from composeprob.density.described import Expert
from composeprob.factors.factor import Factor
from composeprob.factors.nodes import Mixture, Product
from composeprob.factors.passes import Pass
from composeprob.factors.window import Cells, Region
from composeprob.ir.leaves import Graph, Leaf, dimension_of, leaves
from composeprob.ir.render import formula

Raised = list[tuple[Factor, float]]
"""Nodes that are experts, each with the product of the powers above it."""
experts_of = Pass[Raised]("experts", lambda *_: [])
"""The experts of an expression. What a product is made of counts one by one, a mixture
of experts as one."""


def expert(node: Factor) -> Raised:
    """The node itself, where its density at every level is that of its noised draws."""
    return [(node, 1.0)] if "exact_marginals" in node_capabilities(node) else []


@experts_of.rule(Leaf)
def _leaf(leaf: Leaf, _: list[Raised]) -> Raised:
    return [] if leaf.factor.traits.constant else expert(leaf)


@experts_of.rule(Product)
def _product(node: Product, parts: list[Raised]) -> Raised:
    """In a plate there is one factor, and the powers of its n uses are equal; mixtures
    in it are not examined."""
    found = [
        (child, w * power)
        for part, w in zip(parts, node.powers, strict=False)
        for child, power in part
    ]
    return [
        (child, power)
        for child, power in found
        if node.plate is None or not child.children
    ]


@experts_of.rule(Mixture)
def _mixture(node: Mixture, parts: list[Raised]) -> Raised:
    """A part that is improbable at a sample is what mixtures are for: they are
    evaluated as a whole."""
    return expert(node) if all(parts) else []


class ExpertExpression(eqx.Module):
    """How an expert of a site is evaluated, and whether draws are taken from it: of one
    that the program divides by, none are."""

    site: str = eqx.field(static=True)
    expression: Expression
    drawn: bool = eqx.field(static=True)


def experts(graph: Graph) -> tuple[tuple[Expert, ...], tuple[ExpertExpression, ...]]:
    """Every expert, described and lowered."""
    known, lowered = [], []
    for site in graph.sites:
        for node, power in experts_of(site.root):
            below = leaves(node)
            first = below[0]
            trained = not all(leaf.factor.traits.levels == "any" for leaf in below)
            rows, averaged = (
                math.prod(plate.count for plate in first.plates),
                float(first.averaged),
            )
            name, members = (
                formula(node, site.name),
                _members(first.region, math.prod(site.shape)),
            )
            dimension = dimension_of(first.factor)
            known.append(
                Expert(
                    name, site.name, power, dimension, trained, rows, averaged, members
                )
            )
            expression = lower_expression(node, site.shape)
            lowered.append(
                ExpertExpression(
                    site.name, expression, power > 0 and expression.drawable
                )
            )
    return tuple(known), tuple(lowered)


def _members(region: Region | Cells | None, size: int) -> int:
    """The number of sets of cells of which each of the site's entries is in one, as the
    members of a plate; else 1."""
    if not isinstance(region, Cells):
        return 1
    cells = region.array
    return (
        cells.size // cells.shape[-1]
        if np.array_equal(np.sort(cells, axis=None), np.arange(size))
        else 1
    )
