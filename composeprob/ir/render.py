"""A program written as mathematics."""

from __future__ import annotations

import math

from composeprob.factors.factor import Factor
from composeprob.factors.nodes import Mixture, Product, plate_of
from composeprob.factors.passes import Pass
from composeprob.factors.window import Region
from composeprob.ir.leaves import Graph, Leaf, Observation

formula_of = Pass[str]("formula")
"""Rules (node, the children's formulas, site, index of a plate) for an expression in
the usual notation."""


def formula(node: Factor, site: str, depth: int = 0) -> str:
    """An expression inside of ``depth`` plates in the usual notation, such as
    ``ring(x)·bar(x)^0.5``."""
    inner = depth + (plate_of(node) is not None)
    return formula_of.rule_for(node)(
        node,
        [formula(child, site, inner) for child in node.children],
        site,
        index(depth),
    )


def index(depth: int) -> str:
    """The letter that runs over a plate inside of ``depth`` others."""
    return "ijklmn"[depth % 6]


@formula_of.rule(Leaf)
def _leaf(leaf: Leaf, _: list[str], site: str, letter: str) -> str:
    if leaf.factor.traits.constant:
        return leaf.factor.label
    place = site
    if leaf.region is not None:
        place = f"{site}[{leaf.region.shown}]"
    if isinstance(leaf.region, Region) and leaf.region.averaged > 1:
        place += f"↓{max(leaf.region.block)}"
    return leaf.printed_at(place)


@formula_of.rule(Product)
def _product(node: Product, parts: list[str], site: str, letter: str) -> str:
    bracketed = [
        f"({p})" if isinstance(child, Product) else p
        for child, p in zip(node.factors, parts, strict=True)
    ]
    factors = "·".join(
        map(raised, bracketed, node.powers)
    )  # in a plate there is one part
    return (
        f"Π_{{{letter}=1}}^{{{node.plate.count}}} {factors}" if node.plate else factors
    )


@formula_of.rule(Mixture)
def _mixture(node: Mixture, parts: list[str], site: str, letter: str) -> str:
    shares = [f"{math.exp(w):.3g}·{part}" for w, part in node.each(parts)]
    if node.plate is None:
        return f"[{' + '.join(shares)}]"
    share = shares[0] if len(set(node.log_weights)) == 1 else f"w_{letter}·{parts[0]}"
    return f"[Σ_{{{letter}=1}}^{{{node.plate.count}}} {share}]"


def raised(base: str, exponent: float) -> str:
    """A base with its exponent."""
    if exponent == 1.0:
        return base
    text = f"{exponent:.3g}"
    superscript = str.maketrans("0123456789-.", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻·")
    return base + (
        text.translate(superscript)
        if "e" not in text and "." not in text
        else f"^{text}"
    )


def headline(graph: Graph) -> str:
    """The density at level k as one formula, such as ``π_k(x, z) ∝ p(z) · ring(x) ·
    L_k(y | x, z)``."""
    names = [*(site.name for site in graph.sites), *(s.name for s in graph.statics)]
    terms = [f"p({s.name})" for s in graph.statics]
    terms += [formula(site.root, site.name) for site in graph.sites]
    terms += [_evidence_term(o, bool(graph.sites)) for o in graph.observations]
    return f"π_k({', '.join(names)}) ∝ {' · '.join(terms)}"


def describe(graph: Graph, capabilities: list[str]) -> str:
    """The whole program: its density, its sites, its levels, and what each pass did."""
    lines = [
        f"AnnealedDensity of program '{graph.name}' ({graph.where})",
        f"  {headline(graph)}",
        "  sites",
    ]
    for site in graph.sites:
        kind = type(site.root).__name__.lower() if site.root.children else "factor"
        lines.append(f"    {site.name}: noised {site.shape}, a {kind}, at {site.where}")
    for s in graph.statics:
        coordinate = ", its coordinate standardised by that" if s.standardised else ""
        lines.append(
            f"    {s.name}: static {s.shape}, {s.distribution} prior{coordinate}, at {s.where}"
        )
    for o in graph.observations:
        policy = f"annealed '{o.anneal}'"
        if not o.looks_at:
            policy = "its power rising to 1" if graph.sites else "not annealed"
        lines.append(f"    {o.name}: {o.kind}, {policy}, at {o.where}")
    if graph.schedule is not None:
        lines.append(f"  levels  {graph.schedule!r}")
    lines.append("  passes")
    lines += [
        f"    {name}: {sentence}" for name, sentence in graph.notes if name != "check"
    ]
    note = (
        ""
        if "energy" in capabilities
        else "; no log-density: Metropolis tests need cp.LineIntegral"
    )
    lines.append(f"  offers  {', '.join(capabilities)}{note}")
    return "\n".join(lines)


def _evidence_term(observation: Observation, annealed: bool) -> str:
    """L(y | x), or exp(w(x)) of soft evidence; with the level's index where it is
    annealed."""
    level = "_k" if annealed else ""
    given = ", ".join(sorted(observation.depends_on))
    return (
        f"exp({observation.name}{level}({given}))"
        if observation.soft
        else f"L{level}({observation.name} | {given})"
    )
