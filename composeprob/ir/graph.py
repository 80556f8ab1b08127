"""A program drawn as a graph: Graphviz source, and an SVG (or the source, without Graphviz) for notebooks."""

from __future__ import annotations

from html import escape

import graphviz

from composeprob.ir.nodes import Graph, Leaf, Mixture, Node


def digraph(graph: Graph) -> graphviz.Digraph:
    """Factors point to the site that they shape, sites to the observations that look at them."""
    drawing = graphviz.Digraph(graph.name, graph_attr={"rankdir": "TB"}, node_attr={"fontname": "Helvetica"})
    for group, batch in enumerate(graph.groups):
        if len(batch.members) > 1:
            drawing.node(f"batch{group}", f"{batch.name}: one batch of {len(batch.members)}", shape="note")
    for site in graph.sites:
        drawing.node(f"site {site.name}", site.name, shape="circle")
        _draw(drawing, site.root, f"site {site.name}", "")
    for static in graph.statics:
        drawing.node(f"site {static.name}", f"{static.name}\n{static.distribution}", shape="circle", style="dashed")
    for o in graph.observations:
        label = f"{o.name}\n{o.distribution}" + ("" if o.anneal == "static" else f"\n{o.anneal}")
        drawing.node(f"site {o.name}", label, shape="circle", style="filled", fillcolor="lightgrey")
        for name in sorted(o.depends_on):
            drawing.edge(f"site {name}", f"site {o.name}")
    return drawing


def _draw(drawing: graphviz.Digraph, node: Node, parent: str, label: str) -> None:
    own = f"{parent}/{id(node)}"
    if isinstance(node, Leaf):
        drawing.node(own, node.name, shape="box", style="rounded")
        if node.slot is not None:
            drawing.body.append(f"\t// {node.name} is row {node.slot[1]} of batch {node.slot[0]}\n")
    else:
        mixture = isinstance(node, Mixture)
        drawing.node(own, "+" if mixture else "×", shape="diamond" if mixture else "square")
        numbers = node.log_weights if isinstance(node, Mixture) else node.powers
        for child, number in zip(node.children, numbers, strict=True):
            sign = f"log w = {number:.3g}" if mixture else "" if number == 1.0 else f"^{number:.3g}"
            _draw(drawing, child, own, sign)
    drawing.edge(own, parent, label=label)


def dot(graph: Graph) -> str:
    """Graphviz source."""
    return digraph(graph).source


def html(graph: Graph) -> str:
    """An SVG where Graphviz is installed, else its source."""
    try:
        return digraph(graph).pipe(format="svg", encoding="utf-8")
    except graphviz.ExecutableNotFound:
        return f"<pre>{escape(dot(graph))}</pre>"
