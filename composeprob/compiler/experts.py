"""The experts of a program: its factors that are true noised marginals, each with the power that it has."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from composeprob.compiler.check import node_capabilities
from composeprob.compiler.draws import Draw, draw_of
from composeprob.compiler.expressions import Expression, lower_expression
from composeprob.density.described import Expert
from composeprob.factors.base import Factor
from composeprob.factors.passes import Pass
from composeprob.ir.cells import Cells
from composeprob.ir.nodes import Graph, Leaf, Region, leaves, total_count
from composeprob.ir.render import formula


@dataclasses.dataclass(frozen=True, eq=False)
class Raised:
    """A node that is an expert, with the product of the powers above it."""

    node: Factor
    power: float = 1.0


experts_of = Pass[list[Raised]]("experts", lambda *_: [])
"""The experts of an expression. What a product is made of counts one by one, a mixture of experts as one."""


def expert(node: Factor) -> list[Raised]:
    """The node itself, where its density at every level is that of its noised draws."""
    return [Raised(node)] if "exact_marginals" in node_capabilities(node) else []


@experts_of.rule(Leaf)
def _leaf(leaf: Leaf, _: list[list[Raised]]) -> list[Raised]:
    return [] if leaf.factor.traits.constant else expert(leaf)


def experts(graph: Graph) -> tuple[tuple[Expert, ...], tuple[tuple[str, Expression, Draw | None], ...]]:
    """A description of each expert, and how it is evaluated: its site, its expression, and what draws from it, where
    the program does not divide by it."""
    known, lowered = [], []
    for site in graph.sites:
        for raised in experts_of(site.root):
            below = leaves(raised.node)
            trained = not all(leaf.factor.traits.levels == "any" for leaf in below)
            name = formula(raised.node, site.name)
            region = below[0].region
            averaged = float(region.averaged) if isinstance(region, Region) else 1.0
            rows = total_count(below[0].plates)
            dimension = below[0].dimension
            members = _members(below[0].region, math.prod(site.shape))
            known.append(Expert(name, site.name, raised.power, dimension, trained, rows, averaged, members))
            draw = draw_of(raised.node) if raised.power > 0 else None
            lowered.append((site.name, lower_expression(raised.node, site.shape), draw))
    return tuple(known), tuple(lowered)


def _members(region: Region | Cells | None, size: int) -> int:
    """The number of sets of cells of which each of the site's entries is in one, as the members of a plate; else 1."""
    if not isinstance(region, Cells):
        return 1
    cells = region.indices.array
    return cells.size // cells.shape[-1] if np.array_equal(np.sort(cells, axis=None), np.arange(size)) else 1
