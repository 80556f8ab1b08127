"""A program drawn as a graph: Graphviz source, and for notebooks an SVG or, without
Graphviz, nested boxes in HTML."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING, Any

from composeprob.extras import needed
from composeprob.factors.nodes import Combination, Plate
from composeprob.ir.leaves import Graph, Leaf
from composeprob.ir.render import formula

if TYPE_CHECKING:
    import graphviz

CLOSE = {"nodesep": "0.2", "ranksep": "0.28"}
SMALL = {
    "fontname": "Helvetica",
    "fontsize": "11",
    "arrowsize": "0.7",
    "height": "0.3",
    "width": "0.3",
    "margin": "0.08,0.04",
}
"""Attributes of the drawing, and of its nodes and edges: notebooks are narrow."""


def digraph(graph: Graph) -> graphviz.Digraph:
    """Factors point to the site that they shape, sites to the observations that depend
    on them."""
    with needed("graph", "The Graphviz source of a program"):
        import graphviz

    drawing = graphviz.Digraph(
        graph.name, graph_attr=CLOSE, node_attr=SMALL, edge_attr=SMALL
    )
    numbers = itertools.count()
    for site in graph.sites:
        drawing.node(f"site {site.name}", site.name, shape="circle")
        root = _draw(drawing, site.root, graph, numbers)
        drawing.edge(root, f"site {site.name}", label="")
    for static in graph.statics:
        drawing.node(
            f"site {static.name}",
            f"{static.name}\n{static.distribution}",
            shape="ellipse",
            style="dashed",
        )
    for o in graph.observations:
        kind = o.kind if o.soft else o.distribution
        label = f"{o.name}\n{kind}"
        if o.looks_at:
            label += f"\n{o.anneal}"
        drawing.node(
            f"site {o.name}",
            label,
            shape="ellipse",
            style="filled",
            fillcolor="lightgrey",
        )
        for name in sorted(o.depends_on):
            drawing.edge(f"site {name}", f"site {o.name}")
    return drawing


def _draw(
    drawing: graphviz.Digraph, node: Any, graph: Graph, numbers: Iterator[int]
) -> str:
    """Draw a node and all below it; return the node's name."""
    name_of_node = f"n{next(numbers)}"
    if not node.children:
        label = node.name + _shared(node, graph)
        drawing.node(name_of_node, label, shape="box", style="rounded")
        return name_of_node
    shape = "square" if node.sign == "×" else "diamond"
    drawing.node(name_of_node, node.sign, shape=shape)
    for child, label in zip(node.children, _edges(node), strict=True):
        if node.plate is None:
            name = _draw(drawing, child, graph, numbers)
        else:
            # Graphviz draws a box about a subgraph of this name alone.
            with drawing.subgraph(name=f"cluster {name_of_node}") as plate:
                plate.attr(label=_plate(node.plate), labeljust="r", labelloc="b")
                name = _draw(plate, child, graph, numbers)
        drawing.edge(name, name_of_node, label=label)
    return name_of_node


def _plate(plate: Plate) -> str:
    return f"{plate.count} × {', '.join(plate.names)}"


def _shared(leaf: Leaf, graph: Graph) -> str:
    """Text of the leaf's row in a batched evaluation; empty for a batch of one row."""
    if leaf.slot is None:
        return ""
    group, member = leaf.slot
    rows = len(graph.groups[group].members)
    if rows == 1:
        return ""
    return f"\nrow {member + 1} of {rows}, one batch"


def _edges(node: Combination) -> list[str]:
    """The label of each edge; one for all uses of a factor in a plate."""
    if node.plate is None:
        return [node.edge(number) for number in node.numbers]
    least = min(node.numbers)
    greatest = max(node.numbers)
    if least == greatest:
        return [node.edge(least)]
    return [f"{node.edge(least)} … {greatest:.3g}"]


def graph_source(graph: Graph) -> str:
    """Return the Graphviz source of a program."""
    return digraph(graph).source


def graph_html(graph: Graph) -> str:
    """An SVG where Graphviz and its package are installed, else nested boxes."""
    try:
        from graphviz import ExecutableNotFound
    except ModuleNotFoundError:
        return _boxes(graph)
    try:
        drawing = digraph(graph).pipe(format="svg", encoding="utf-8")
    except ExecutableNotFound:
        return _boxes(graph)
    # Without the declaration that an SVG file begins with.
    start = max(drawing.find("<svg"), 0)
    return drawing[start:]


def _boxes(graph: Graph) -> str:
    """A line for each statement, with a box for each node."""
    rows = []
    for site in graph.sites:
        root = _box(site.root, site.name, graph)
        rows.append(f"<b>{escape(site.name)}</b> ∼ {root}")
    for static in graph.statics:
        rows.append(f"<b>{escape(static.name)}</b> ∼ {escape(static.distribution)}")
    for o in graph.observations:
        policy = f", annealed '{o.anneal}'" if o.looks_at else ""
        parents = escape(", ".join(sorted(o.depends_on)))
        rows.append(
            f"<b>{escape(o.name)}</b> {escape(o.kind)} of {parents}{escape(policy)}"
        )
    lines = "".join(f"<div style='margin:4px'>{row}</div>" for row in rows)
    return f"<div>{lines}</div>"


def _box(node: Any, site: str, graph: Graph) -> str:
    if not node.children:
        shared = _shared(node, graph).replace("\n", "<br>")
        return _span(f"{escape(formula(node, site))}<small>{shared}</small>")
    boxes = []
    for child, label in zip(node.children, _edges(node), strict=True):
        superscript = escape(label.lstrip("^"))
        boxes.append(f"{_box(child, site, graph)}<sup>{superscript}</sup>")
    inside = f" {node.sign} ".join(boxes)
    if node.plate:
        inside += f"<small>{escape(_plate(node.plate))}</small>"
    return _span(inside)


def _span(inside: str) -> str:
    """A rounded box in a line of text."""
    style = (
        "display:inline-block;border:1px solid #999;border-radius:4px;"
        "padding:2px 8px;margin:2px;vertical-align:middle"
    )
    return f"<span style='{style}'>{inside}</span>"
