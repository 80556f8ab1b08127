"""A program written as mathematics."""

from __future__ import annotations

import math
from collections.abc import Iterator

from composeprob.density.categorical import Reveals
from composeprob.density.reward import SiteReward
from composeprob.factors.factor import Factor
from composeprob.factors.nodes import Mixture, Product, plate_of
from composeprob.factors.passes import Pass
from composeprob.factors.window import Region
from composeprob.ir.leaves import Graph, Leaf, Observation

SUPERSCRIPTS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
formula_of = Pass[str]("formula")
"""Rules (node, the children's formulas, site, index of a plate) for an expression in
the usual notation."""


def formula(node: Factor, site: str, depth: int = 0) -> str:
    """An expression inside of ``depth`` plates in the usual notation, such as
    ``ring(x)·bar(x)^0.5``."""
    inner = depth if plate_of(node) is None else depth + 1
    children = [formula(child, site, inner) for child in node.children]
    return formula_of.rule_for(node)(node, children, site, index(depth))


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
def _product(node: Product, texts: list[str], site: str, letter: str) -> str:
    powers = []
    # In a plate there is one factor, and equal powers.
    for child, text, power in zip(node.factors, texts, node.powers, strict=False):
        base = f"({text})" if isinstance(child, Product) else text
        powers.append(raised(base, power))
    product = "·".join(powers)
    if node.plate is None:
        return product
    # The letter is that of the plate's index in its factor's conditions.
    return f"Π_{{{letter}=1}}^{{{node.plate.count}}} {product}"


@formula_of.rule(Mixture)
def _mixture(node: Mixture, texts: list[str], site: str, letter: str) -> str:
    terms = [f"{math.exp(w):.3g}·{text}" for w, text in node.each(texts)]
    if node.plate is None:
        return f"[{' + '.join(terms)}]"
    # One term stands for all, with a number where they have it in common.
    term = terms[0]
    if len(set(node.log_weights)) > 1:
        term = f"w_{letter}·{texts[0]}"
    return f"[Σ_{{{letter}=1}}^{{{node.plate.count}}} {term}]"


def raised(base: str, exponent: float) -> str:
    """A base with an exponent."""
    if exponent == 1.0:
        return base
    text = f"{exponent:.3g}"
    # Unicode has no superscript for a decimal point.
    if "e" in text or "." in text:
        return f"{base}^{text}"
    return base + text.translate(SUPERSCRIPTS)


def headline(graph: Graph) -> str:
    """The density at level k as one formula, such as ``π_k(x, z) ∝ p(z) · ring(x) ·
    L_k(y | x, z)``."""
    names = [*(site.name for site in graph.sites), *(s.name for s in graph.statics)]
    terms = [f"p({s.name})" for s in graph.statics]
    terms += [formula(site.root, site.name) for site in graph.sites]
    terms += [_evidence_term(o, bool(graph.sites)) for o in graph.observations]
    terms += [f"exp({_reward(reward)})" for reward in graph.rewards]
    return f"π_k({', '.join(names)}) ∝ {' · '.join(terms)}"


def describe(graph: Graph, capabilities: list[str]) -> str:
    """The whole program: its density, its sites, its levels, and what each pass did."""
    lines = [
        f"AnnealedDensity of program '{graph.name}' ({graph.where})",
        f"  {headline(graph)}",
        "  sites",
    ]
    lines += [f"    {line}" for line in _statements(graph)]
    lines += [f"    {_called(reward)}" for reward in graph.rewards]
    if graph.schedule is not None:
        lines.append(f"  levels  {graph.schedule!r}")
    lines.append("  passes")
    for name, sentence in graph.notes:
        # The note of `check` lists capabilities, which the last line does.
        if name != "check":
            lines.append(f"    {name}: {sentence}")
    offers = f"  offers  {', '.join(capabilities)}"
    if "energy" not in capabilities:
        offers += "; no log-density: Metropolis tests need cp.LineIntegral"
    lines.append(offers)
    return "\n".join(lines)


def _statements(graph: Graph) -> Iterator[str]:
    """A line for each site, latent and observation."""
    for site in graph.sites:
        kind = type(site.root).__name__.lower() if site.root.children else "factor"
        what = f"noised {site.shape}"
        if site.num_values:
            what = f"categorical {site.shape} of {site.num_values} values"
        yield f"{site.name}: {what}, a {kind}, at {site.where}"
    for s in graph.statics:
        prior = f"{s.distribution} prior"
        if s.standardised:
            prior += ", its coordinate standardised by that"
        if s.summed:
            prior += f", summed over {s.num_values} values"
        elif s.num_values:
            prior += f" of {s.num_values} values"
        yield f"{s.name}: static {s.shape}, {prior}, at {s.where}"
    for o in graph.observations:
        yield f"{o.name}: {o.kind}, {_policy(o, graph)}, at {o.where}"


def _policy(observation: Observation, graph: Graph) -> str:
    """Words for an observation at the levels above 0."""
    if observation.anneal is None and isinstance(graph.schedule, Reveals):
        return "visible first"
    if observation.anneal is None:
        return "never noised"
    if observation.looks_at:
        return f"annealed '{observation.anneal}'"
    return "its power rising to 1" if graph.sites else "not annealed"


def _called(reward: SiteReward) -> str:
    """The line of a reward among the statements."""
    function = f"{reward.reward.name}, called on the host by a run alone"
    return f"{reward.name}: {function}, at {reward.where}"


def _reward(reward: SiteReward) -> str:
    """The exponent of a reward: ``2·dock(x)``."""
    text = f"{reward.name}({reward.site})"
    scale = reward.reward.scale
    return text if scale == 1 else f"{scale:.3g}·{text}"


def _evidence_term(observation: Observation, annealed: bool) -> str:
    """L(y | x), or exp(w(x)) of soft evidence; with the level's index where it is
    annealed."""
    level = "_k" if annealed else ""
    given = ", ".join(sorted(observation.depends_on))
    if observation.soft:
        return f"exp({observation.name}{level}({given}))"
    return f"L{level}({observation.name} | {given})"
