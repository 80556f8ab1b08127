"""A program written as mathematics."""

from __future__ import annotations

import math

from composeprob.ir.nodes import Graph, Leaf, Node, Observation, Product, Region, Site, fold

_SUPERSCRIPT = str.maketrans("0123456789-.", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻·")


def formula(node: Node, site: str) -> str:
    """An expression in the usual notation, such as ``ring(x)·bar(x)^0.5``."""
    return _formula(node, site, 0)


def _formula(node: Node, site: str, depth: int) -> str:
    """An expression inside of ``depth`` plates."""
    if isinstance(node, Leaf):
        return _leaf(node, site)
    letter, plate = index(depth), node.plate
    parts = [_formula(child, site, depth + (plate is not None)) for child in node.children]
    runs = f"_{{{letter}=1}}^{{{plate.count}}} " if plate else ""
    if isinstance(node, Product):
        factors = "·".join(map(_factor, node.children, parts, node.powers))  # in a plate there is one part
        return f"Π{runs}{factors}" if plate else factors
    if plate is None:
        return "[" + " + ".join(map(_share, parts, node.log_weights)) + "]"
    equal = len(set(node.log_weights)) == 1
    share = _share(parts[0], node.log_weights[0]) if equal else f"w_{letter}·{parts[0]}"
    return f"[Σ{runs}{share}]"


def index(depth: int) -> str:
    """The letter that runs over a plate inside of ``depth`` others."""
    return "ijklmn"[depth % 6]


def _factor(node: Node, part: str, power: float) -> str:
    """A factor of a product: one over data in brackets, with its power."""
    return _power(f"({part})" if isinstance(node, Product) else part, power)


def _leaf(leaf: Leaf, site: str) -> str:
    if leaf.factor.constant:
        return leaf.factor.label
    seen = site
    if leaf.region is not None:
        seen = f"{site}[{leaf.region.shown}]"
    if isinstance(leaf.region, Region) and leaf.region.averaged > 1:
        seen += f"↓{max(leaf.region.block)}"
    base, _, given = leaf.name.rpartition("(x")  # "name(x)" or "name(x | conditions)"
    return f"{base}({seen}{given}"


def _share(part: str, log_weight: float) -> str:
    return f"{math.exp(log_weight):.3g}·{part}"


def _power(base: str, exponent: float) -> str:
    if exponent == 1.0:
        return base
    text = f"{exponent:.3g}"
    return base + (text.translate(_SUPERSCRIPT) if "e" not in text and "." not in text else f"^{text}")


def describe(graph: Graph, capabilities: list[str]) -> str:
    """The whole program: its density, its sites, its levels, and what each pass did."""
    noised = [site.name for site in graph.sites]
    statics = [s.name for s in graph.statics]
    terms = [f"p({s.name})" for s in graph.statics]
    terms += [formula(site.root, site.name) for site in graph.sites]
    terms += [_evidence_term(o, bool(graph.sites)) for o in graph.observations]
    lines = [
        f"AnnealedDensity of program '{graph.name}' ({graph.where})",
        f"  π_k({', '.join(noised + statics)}) ∝ {' · '.join(terms)}",
        "  sites",
    ]
    lines += [f"    {_site_line(site)}" for site in graph.sites]
    for s in graph.statics:
        coordinate = ", its coordinate standardised by that" if s.standardised else ""
        lines.append(f"    {s.name}: static {s.shape}, {s.distribution} prior{coordinate}, at {s.where}")
    for o in graph.observations:
        policy = f"annealed '{o.anneal}'"
        if not o.looks_at:
            policy = "its power rising to 1" if graph.sites else "not annealed"
        lines.append(f"    {o.name}: {o.kind}, {policy}, at {o.where}")
    if graph.schedule is not None:
        lines.append(f"  levels  {graph.schedule!r}")
    lines.append("  passes")
    lines += [f"    {name}: {sentence}" for name, sentence in graph.notes if name != "check"]
    lines.append(f"  offers  {', '.join(capabilities)}")
    return "\n".join(lines)


def _evidence_term(observation: Observation, annealed: bool) -> str:
    """L(y | x), or exp(w(x)) of soft evidence; with the level's index where it is annealed."""
    level = "_k" if annealed else ""
    given = ", ".join(sorted(observation.depends_on))
    return f"exp({observation.name}{level}({given}))" if observation.soft else f"L{level}({observation.name} | {given})"


def _site_line(site: Site) -> str:
    kind = fold(site.root, lambda _: "factor", lambda *_: "product", lambda *_: "mixture")
    return f"{site.name}: noised {site.shape}, a {kind}, at {site.where}"
