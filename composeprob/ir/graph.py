"""A program drawn as a graph: Graphviz source, and for notebooks an SVG or, without
Graphviz, nested boxes in HTML."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from html import escape
from typing import Any

import graphviz

from composeprob.factors.nodes import Combination, Plate
from composeprob.ir.leaves import Graph, Leaf
from composeprob.ir.render import formula


def digraph(graph: Graph) -> graphviz.Digraph:
    """Factors point to the site that they shape, sites to the observations that depend
    on them."""
    close, small = (
        {"nodesep": "0.2", "ranksep": "0.28"},
        {"fontname": "Helvetica", "fontsize": "11"},
    )
    small |= {
        "arrowsize": "0.7",
        "height": "0.3",
        "width": "0.3",
        "margin": "0.08,0.04",
    }
    drawing = graphviz.Digraph(
        graph.name, graph_attr=close, node_attr=small, edge_attr=small
    )
    numbers = itertools.count()
    for site in graph.sites:
        drawing.node(f"site {site.name}", site.name, shape="circle")
        drawing.edge(
            _draw(drawing, site.root, graph, numbers), f"site {site.name}", label=""
        )
    for static in graph.statics:
        drawing.node(
            f"site {static.name}",
            f"{static.name}\n{static.distribution}",
            shape="ellipse",
            style="dashed",
        )
    for o in graph.observations:
        label = f"{o.name}\n{o.kind if o.soft else o.distribution}" + (
            f"\n{o.anneal}" if o.looks_at else ""
        )
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
    """Draw a node and all below it; returns its name."""
    name_of_node = f"n{next(numbers)}"
    if not node.children:
        drawing.node(
            name_of_node, node.name + _shared(node, graph), shape="box", style="rounded"
        )
        return name_of_node
    drawing.node(
        name_of_node, node.sign, shape="square" if node.sign == "×" else "diamond"
    )
    for child, label in zip(node.children, _edges(node), strict=True):
        if node.plate is None:
            name = _draw(drawing, child, graph, numbers)
        else:
            with drawing.subgraph(name=f"cluster {name_of_node}") as plate:
                plate.attr(label=_plate(node.plate), labeljust="r", labelloc="b")
                name = _draw(plate, child, graph, numbers)
        drawing.edge(name, name_of_node, label=label)
    return name_of_node


def _plate(plate: Plate) -> str:
    return f"{plate.count} × {', '.join(plate.names)}"


def _shared(leaf: Leaf, graph: Graph) -> str:
    """Which row of a batched evaluation the leaf is."""
    if leaf.slot is None or len(graph.groups[leaf.slot[0]].members) == 1:
        return ""
    return f"\nrow {leaf.slot[1] + 1} of {len(graph.groups[leaf.slot[0]].members)}, one batch"


def _edges(node: Combination) -> list[str]:
    """What stands at each edge; once for what stands in a plate."""
    numbers = sorted(set(node.numbers)) if node.plate else node.numbers
    if node.plate and len(numbers) > 1:
        return [f"{node.edge(numbers[0])} … {numbers[-1]:.3g}"]
    return [node.edge(number) for number in numbers]


def html(graph: Graph) -> str:
    """An SVG where Graphviz is installed, else nested boxes."""
    try:
        drawing = digraph(graph).pipe(format="svg", encoding="utf-8")
        return drawing[
            max(drawing.find("<svg"), 0) :
        ]  # without the declaration that an SVG file begins with
    except graphviz.ExecutableNotFound:
        return _boxes(graph)


def _boxes(graph: Graph) -> str:
    rows = [
        f"<b>{escape(site.name)}</b> ∼ {_box(site.root, site.name, graph)}"
        for site in graph.sites
    ]
    rows += [
        f"<b>{escape(s.name)}</b> ∼ {escape(s.distribution)}" for s in graph.statics
    ]
    for o in graph.observations:
        policy = f", annealed '{o.anneal}'" if o.looks_at else ""
        parents = escape(", ".join(sorted(o.depends_on)))
        rows.append(
            f"<b>{escape(o.name)}</b> {escape(o.kind)} of {parents}{escape(policy)}"
        )
    return (
        "<div>"
        + "".join(f"<div style='margin:4px'>{row}</div>" for row in rows)
        + "</div>"
    )


def _box(node: Any, site: str, graph: Graph) -> str:
    if not node.children:
        shared = _shared(node, graph).replace("\n", "<br>")
        return _span(f"{escape(formula(node, site))}<small>{shared}</small>")
    parts = [
        _box(child, site, graph) + f"<sup>{escape(label.lstrip('^'))}</sup>"
        for child, label in zip(node.children, _edges(node), strict=True)
    ]
    plate = f"<small>{escape(_plate(node.plate))}</small>" if node.plate else ""
    return _span(f" {node.sign} ".join(parts) + plate)


def _span(inside: str) -> str:
    border = "display:inline-block;border:1px solid #999;border-radius:4px"
    return f"<span style='{border};padding:2px 8px;margin:2px;vertical-align:middle'>{inside}</span>"
