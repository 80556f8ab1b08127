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
from composeprob.ir.leaves import Graph, Leaf, Site, dimension_of, leaves
from composeprob.ir.render import formula

Raised = list[tuple[Factor, float]]
"""Nodes that are experts, each with the product of the powers above it."""
experts_of = Pass[Raised]("experts", lambda *_: [])
"""The experts of an expression. The factors of a product count one by one, a mixture of
experts as one."""


def expert(node: Factor) -> Raised:
    """The node itself, if its density at every level is that of its noised draws; else
    nothing."""
    if "exact_marginals" not in node_capabilities(node):
        return []
    return [(node, 1.0)]


@experts_of.rule(Leaf)
def _leaf(leaf: Leaf, _: list[Raised]) -> Raised:
    return [] if leaf.factor.traits.constant else expert(leaf)


@experts_of.rule(Product)
def _product(node: Product, operands: list[Raised]) -> Raised:
    """Experts of the operands, to the product's powers.

    In a plate there is one factor, and the powers of its n uses are equal; mixtures in
    a plate are not examined.
    """
    raised = []
    for operand, w in zip(operands, node.powers, strict=False):
        for child, power in operand:
            if node.plate is None or not child.children:
                raised.append((child, w * power))
    return raised


@experts_of.rule(Mixture)
def _mixture(node: Mixture, operands: list[Raised]) -> Raised:
    """A mixture as a whole, not its components: a component may be improbable at a
    sample of the mixture."""
    return expert(node) if all(operands) else []


class ExpertExpression(eqx.Module):
    """The evaluation of an expert of a site.

    Attributes:
        site: the site's name.
        expression: the lowered expert.
        drawn: True if samples are taken from it; of an expert that the program divides
            by, none are.
    """

    site: str = eqx.field(static=True)
    expression: Expression
    drawn: bool = eqx.field(static=True)


def experts(graph: Graph) -> tuple[tuple[Expert, ...], tuple[ExpertExpression, ...]]:
    """Every expert, described and lowered."""
    described = []
    lowered = []
    for site in graph.sites:
        for node, power in experts_of(site.root):
            described.append(_described(node, power, site))
            expression = lower_expression(node, site.shape)
            is_drawn = power > 0 and expression.drawable
            lowered.append(ExpertExpression(site.name, expression, is_drawn))
    return tuple(described), tuple(lowered)


def _described(node: Factor, power: float, site: Site) -> Expert:
    below = leaves(node)
    # A mixture's components agree on region and plates, so the first tells them.
    first = below[0]
    # A closed form is exact at any level; a factor that knows levels has learned them.
    trained = not all(leaf.factor.traits.levels == "any" for leaf in below)
    return Expert(
        formula(node, site.name),
        site.name,
        power,
        dimension_of(first.factor),
        trained,
        math.prod(plate.count for plate in first.plates),
        float(first.averaged),
        _members(first.region, math.prod(site.shape)),
    )


def _members(region: Region | Cells | None, size: int) -> int:
    """Number of sets of cells, which count like members of a plate if every entry of
    the site is in one set; else 1."""
    if not isinstance(region, Cells):
        return 1
    cells = region.array
    if not np.array_equal(np.sort(cells, axis=None), np.arange(size)):
        return 1
    return cells.size // cells.shape[-1]
