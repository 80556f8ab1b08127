"""Closes the user's plain functions: what they read beside their arguments has its values of now from here on."""

from __future__ import annotations

from dataclasses import replace

from composeprob.factors.base import Factor, LeafFactor
from composeprob.factors.functions import closed, has_functions
from composeprob.factors.nodes import leaves
from composeprob.ir.nodes import Graph, Group


def close(graph: Graph) -> Graph:
    """The graph with the functions in its batched evaluations closed."""
    return replace(graph, groups=tuple(map(_closed, graph.groups)))


def _closed(group: Group) -> Group:
    if not has_functions(group.factor):
        return group
    member = group.members[0]
    conditions = {name: value[(0,) * len(member.plates)] for name, value in member.conditions.items()}
    return replace(group, factor=closed(group.factor, conditions))


def closed_leaves(node: Factor, runs: tuple[str, ...] = ()) -> list[LeafFactor]:
    """The leaves of an expression as it was written, with their functions closed.

    Args:
        node: the expression, under tracers or numbers.
        runs: the conditions that run over data around it.

    Raises:
        ComposeProbError: a function cannot be called with the conditions that its leaf has.
    """
    below = (*runs, *node.runs)
    if node.children:
        return [leaf for child in node.children for leaf in closed_leaves(child, below)]
    (leaf,) = leaves(node)
    if not has_functions(leaf):
        return [leaf]
    depth = {name: runs.count(name) for name in leaf.fixed}
    first = leaf.holding({name: v[(0,) * depth[name]] if depth[name] else v for name, v in leaf.fixed.items()})
    try:
        return [closed(first, first.call_conditions())]
    except Exception:
        first.check_network()  # has the better message
        raise
