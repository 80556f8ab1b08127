"""Lets the exponents of powers and quotients grow as noise falls, where the factors'
log-densities are known.

Only level 0 is the promise. There f^w sharpens f; but where noise hides the data it is
a multiple of the noise's own sharpness, and which mode a chain is in is decided by w
times what little tells modes apart. The power of a Gaussian, noised, is the power w_k
of the noised one (`Growth`), and it is that path that is followed here: of f^w the one
that starts as f, of f·(f/g)^γ also, of f/g^v as well. The weights of chains then gain
(dw/dτ)·log f along their way, so exponents grow only where log f is known with its
constants and its modes' heights: closed forms, and energies that were trained for both.
Elsewhere they are constant.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from composeprob.compiler.check import has_rate, node_capabilities
from composeprob.compiler.top import site_top
from composeprob.factors.factor import Factor
from composeprob.factors.nodes import Growth, Product, growth_of, walk
from composeprob.factors.passes import Pass
from composeprob.ir.leaves import Graph, leaves
from composeprob.ir.render import formula


def grow(graph: Graph) -> Graph:
    """Every product whose factors allow it with exponents that grow, and a note of
    each.

    The exponents e from which they grow leave the noisiest level the noise of a single
    factor where they can: of a factor's power at most 1; what divides counts as far as
    the total stays at 1, so that it is gone in guidance and negations, and there in
    full in Bayes' rule, f·g/h; powers below 1 are brought up to a total of 1.
    """
    clean = float(graph.levels.sigma[0] / graph.levels.alpha[0]) ** 2
    sites = tuple(
        replace(site, root=_grown(site.root, site.shape, clean)) for site in graph.sites
    )
    notes = [
        f"{formula(node.children[i], site.name)} from {growth.start[i]:.3g} to {growth.power[i]:.3g}"
        for site in sites
        for node in walk(site.root)
        if (growth := growth_of(node)) is not None
        for i in growth.growing
    ]
    graph = replace(graph, sites=sites)
    return (
        graph.noted("grow", f"exponents grow as noise falls: {', '.join(notes)}")
        if notes
        else graph
    )


def grows(node: Factor) -> bool:
    """Whether an exponent of an expression does."""
    return any(growth_of(inner) is not None for inner in walk(node))


def _grown(node: Factor, shape: tuple[int, ...], clean: float) -> Factor:
    """The expression with growing exponents. What was calibrated keeps the path that
    its normalisers are those of."""
    if not node.children or node.normalised:
        return node
    node = node.with_children(
        tuple(_grown(child, shape, clean) for child in node.children)
    )
    return grown_of.rule_for(node)(node, shape, clean)


grown_of = Pass[Factor]("grown", lambda node, shape, clean: node)
"""Rules (node, the site's shape, σ²/α² of level 0) for a node whose children have
growing exponents, with its own."""


@grown_of.rule(Product)
def _grown_product(node: Product, shape: tuple[int, ...], clean: float) -> Product:
    if node.plate is not None or set(node.powers) == {1.0}:
        return node
    found = [site_top(child, shape).power for child in node.children]
    start, sharpness = _start(
        np.array(node.powers), np.stack([power.ravel() for power in found])
    )
    growing = tuple(np.flatnonzero(start != node.powers).tolist())
    if not growing or not all(_known(node.factors[i]) for i in growing):
        return node
    growth = Growth(start, np.array(node.powers), sharpness, np.asarray(clean), growing)
    return replace(node, growth=growth)


def _known(factor: Factor) -> bool:
    """Whether log f is known at every level, with its constant and the heights of its
    modes."""
    offered = [node_capabilities(leaf) for leaf in leaves(factor)]
    return has_rate(factor) and all(
        {"normalised", "mode_depth"} <= each for each in offered
    )


def _start(powers: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """e and κ of a product, both (n,), of its powers, (n,), and its factors' powers of
    noise at each entry, (n, D)."""
    # A factor with no power of noise anywhere, such as a classifier or a constant,
    # keeps its exponent.
    here = found != 0
    total = powers[:, None] * found
    multiplies, divides = (total > 0).any(1), (total < 0).any(1)
    start = np.where(multiplies, np.minimum(powers, 1.0), powers)
    most = np.max(np.where(here, start[multiplies] @ found[multiplies], 0.0), axis=1)
    start = np.where(
        multiplies & (most < 1),
        np.minimum(start / np.where(multiplies, most, 1.0), 1.0),
        start,
    )
    left = start[multiplies] @ found[multiplies] - 1
    taken = -np.sum(total[divides], axis=0)
    room = np.min(
        np.where(here & (taken > 0), left / np.where(taken > 0, taken, 1.0), np.inf),
        axis=1,
    )
    start = np.where(divides, powers * np.clip(room, 0.0, 1.0), start)
    start = np.where(np.abs(start - powers) < 1e-9, powers, start) + 0.0  # no −0
    only = (
        multiplies & ~divides
    )  # what multiplies at one entry and divides at another has the sharpness of divisors
    sharpness = np.where(only, powers / np.where(only, start, 1.0), 1.0)
    return start, np.where(divides, max(1.0, sharpness.max()), sharpness)
