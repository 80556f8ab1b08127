"""Before the passes, where it is asked for: networks with rounded products take the place of the program's own."""

from __future__ import annotations

from dataclasses import replace

from composeprob.factors.nodes import rewrite_leaves
from composeprob.factors.precision import in_precision
from composeprob.ir.nodes import Graph, Leaf


def round_networks(graph: Graph, precision: str | None) -> Graph:
    """Every leaf's networks in this precision; the graph itself where it is None."""
    if precision is None:
        return graph

    def rewrite(leaf: Leaf) -> Leaf:
        return replace(leaf, factor=in_precision(leaf.factor, precision))

    rounded = graph.map_roots(lambda root, site: rewrite_leaves(root, rewrite))
    return rounded.noted("precision", f"networks multiply in {precision}")
