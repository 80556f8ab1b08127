"""Let the exponents of powers and quotients grow as noise falls, where the factors'
log-densities have closed forms or were trained for it.

Only level 0 is the promise. There f^w sharpens f; but where noise hides the data it is
a multiple of the noise's own sharpness, and the mode that a chain falls into is decided
by w times the little that tells modes apart. The power of a Gaussian, noised, is the
power w_k of the noised one (`Growth`), and this path is followed here: for f^w the one
that starts as f, also for f·(f/g)^γ and for f/g^v, and for a product of many learned
factors, which sharpens as a power does. The log-weight increment of a chain is then
(dw/dτ)·log f along its path, so exponents grow only where log f is known with its
constants and the heights of its modes: given by closed forms, and by energies that were
trained for both, or carried by the chains of weighted samplers (`can_be_tracked`).
Elsewhere they are constant.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from jaxtyping import Float

from composeprob import tuning
from composeprob.compiler.check import has_rate, node_capabilities
from composeprob.compiler.top import site_top
from composeprob.factors.factor import Factor
from composeprob.factors.nodes import Growth, Product, growth_of, walk
from composeprob.factors.passes import Pass
from composeprob.ir.leaves import Graph, Leaf, Site, leaves
from composeprob.ir.render import formula


def grow(graph: Graph, tracking: bool = True) -> Graph:
    """Give growing exponents to every product whose factors allow it, and note each;
    without ``tracking`` none to factors whose log-density chains would have to carry.
    """
    clean = float(graph.levels.sigma[0] / graph.levels.alpha[0]) ** 2

    def grown_root(root: Factor, site: Site) -> Factor:
        tracks = tracking and _site_can_track(graph, site)
        return _grown(root, site.shape, clean, tracks)

    grown = graph.map_roots(grown_root)
    notes = []
    tracked = False
    for site in grown.sites:
        for node in walk(site.root):
            notes += _notes(node, site.name)
            tracked = tracked or bool(tracked_of(node))
    if not notes:
        return grown
    where = "in SMC, whose chains carry log f, " if tracked else ""
    text = f"{where}exponents grow as noise falls: {', '.join(notes)}"
    return grown.noted("grow", text)


def tracks(graph: Graph) -> bool:
    """Return whether chains must carry the log-density of a factor."""
    nodes = (node for site in graph.sites for node in walk(site.root))
    return any(tracked_of(node) for node in nodes)


def tracked_of(node: Factor) -> tuple[int, ...]:
    """Indices of a node's factors whose log-densities chains carry."""
    growth = growth_of(node)
    return () if growth is None else growth.tracked


def _site_can_track(graph: Graph, site: Site) -> bool:
    """Return whether chains can carry log-densities: of factors of the program's only
    site, of few numbers, without latents.

    Beside other sites or latents a block of a kernel sees a part of the chain alone,
    and of many numbers the fitted slopes leave too much of log f to chance.
    """
    alone = len(graph.sites) == 1 and not graph.statics
    return alone and math.prod(site.shape) <= tuning.TRACKING.most_numbers


def _notes(node: Factor, site: str) -> list[str]:
    """Text for each factor of a node whose exponent grows: its first and its last
    exponent."""
    growth = growth_of(node)
    if growth is None:
        return []
    notes = []
    for i in growth.growing:
        name = formula(node.children[i], site)
        notes.append(f"{name} from {growth.start[i]:.3g} to {growth.power[i]:.3g}")
    return notes


def grows(node: Factor) -> bool:
    """Return whether an exponent of an expression grows."""
    return any(growth_of(inner) is not None for inner in walk(node))


def _grown(node: Factor, shape: tuple[int, ...], clean: float, tracks: bool) -> Factor:
    """The expression with growing exponents. A calibrated node keeps the path that its
    normalisers were estimated on."""
    if not node.children or node.normalised:
        return node
    # Chains carry the log-densities of the root's own factors.
    children = [_grown(child, shape, clean, tracks=False) for child in node.children]
    node = node.with_children(tuple(children))
    return grown_of.rule_for(node)(node, shape, clean, tracks)


grown_of = Pass[Factor]("grown", lambda node, shape, clean, tracks: node)
"""Rules (node, the site's shape, σ²/α² of level 0, whether chains may carry
log-densities of its factors) for a node whose children have growing exponents, with its
own."""


@grown_of.rule(Product)
def _grown_product(
    node: Product, shape: tuple[int, ...], clean: float, tracks: bool
) -> Product:
    if node.plate is not None or node.powers == (1.0,):
        return node
    noise_powers = np.stack([site_top(f, shape).power.ravel() for f in node.children])
    learned = False
    for factor, power in zip(node.factors, noise_powers, strict=True):
        learned = learned or (power.any() and not _is_calibrated(factor))
    growth = None
    if learned and tracks:
        growth = _growth(node, noise_powers, clean, tracks, shared=True)
    if growth is None:
        growth = _growth(node, noise_powers, clean, tracks, shared=False)
    return node if growth is None else replace(node, growth=growth)


def _growth(
    node: Product,
    noise_powers: Float[np.ndarray, "n d"],
    clean: float,
    tracks: bool,
    shared: bool,
) -> Growth | None:
    """Return the growth of a product's exponents (`_start`); None where none grows, or
    a factor that has to be tracked cannot be."""
    powers = np.array(node.powers)
    start, sharpness = _start(powers, noise_powers, shared)
    growing = tuple(np.flatnonzero(start != powers).tolist())
    tracked = tuple(i for i in growing if not _is_calibrated(node.factors[i]))
    trackable = all(tracks and can_be_tracked(node.factors[i]) for i in tracked)
    if not growing or not trackable:
        return None
    return Growth(start, powers, sharpness, np.asarray(clean), growing, tracked)


def can_be_tracked(factor: Factor) -> bool:
    """Return whether chains can carry log f of a factor: a single noised marginal of
    the whole site, so that its reverse kernel follows from its score."""
    if not isinstance(factor, Leaf) or not has_rate(factor):
        return False
    return factor.region is None and not factor.plates


def _is_calibrated(factor: Factor) -> bool:
    """Return whether log f is given at every level, with its constant and the heights
    of its modes."""
    if not has_rate(factor):
        return False
    required = {"normalised", "mode_depth"}
    return all(required <= node_capabilities(leaf) for leaf in leaves(factor))


def _start(
    powers: Float[np.ndarray, " n"],
    noise_powers: Float[np.ndarray, "n d"],
    shared: bool,
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Return exponents e and sharpnesses κ of a product at the noisiest level, by its
    powers and its factors' powers of noise at each entry; see `Growth`.

    The exponents e leave the noisiest level the noise of a single factor where they
    can. A factor that multiplies has a power of at most 1 there. A factor that divides
    counts as far as the total stays at 1, so that it vanishes in guidance and
    negations, and counts in full in Bayes' rule, f·g/h. Powers below 1 are brought up
    to a total of 1.

    Where it is ``shared``, a total above `tuning.TRACKING.most_at_once` is 1 there, of
    which each factor has its part: a conjunction of many learned factors starts as a
    single one, as the power of one does. Its modes are else decided where noise hides
    what tells them apart.
    """
    # A factor with no power of noise anywhere, such as a classifier or a constant,
    # keeps its exponent.
    present = noise_powers != 0
    total = powers[:, None] * noise_powers
    multiplies = (total > 0).any(1)
    divides = (total < 0).any(1)
    start = np.where(multiplies, np.minimum(powers, 1.0), powers)
    # At every entry the multiplying factors' total, of which each has the greatest that
    # it stands in; where that is below 1 they are raised in proportion.
    totals = start[multiplies] @ noise_powers[multiplies]
    most = np.max(np.where(present, totals, 0.0), axis=1)
    raised = np.minimum(start / np.where(multiplies, most, 1.0), 1.0)
    start = np.where(multiplies & (most < 1), raised, start)
    is_large = most.max() > tuning.TRACKING.most_at_once
    if shared and is_large and not divides.any():
        uncapped = np.max(np.where(present, total.sum(0), 0.0), axis=1)
        start = powers / np.where(multiplies, uncapped, 1.0)
    # A divisor takes what is left above a total of 1, at the entry with the least room.
    left = start[multiplies] @ noise_powers[multiplies] - 1
    taken = -np.sum(total[divides], axis=0)
    is_taken = taken > 0
    share = np.where(present & is_taken, left / np.where(is_taken, taken, 1.0), np.inf)
    room = np.min(share, axis=1)
    start = np.where(divides, powers * np.clip(room, 0.0, 1.0), start)
    start = np.where(np.abs(start - powers) < 1e-9, powers, start) + 0.0  # no −0
    # A factor that multiplies at one entry and divides at another has the sharpness of
    # divisors.
    only_multiplies = multiplies & ~divides
    ratio = powers / np.where(only_multiplies, start, 1.0)
    sharpness = np.where(only_multiplies, ratio, 1.0)
    return start, np.where(divides, max(1.0, sharpness.max()), sharpness)
