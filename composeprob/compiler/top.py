"""The distribution of a level that is noise alone: every diffusion factor is N(0, σ²I)
raised to its power there."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import numpy as np
from jaxtyping import Float

from composeprob.errors import ImproperError
from composeprob.factors.factor import Factor
from composeprob.factors.nodes import Mixture, Plate, Product, plate_of, rewrite_leaves
from composeprob.factors.passes import Pass
from composeprob.factors.window import Cells
from composeprob.ir.leaves import Leaf, Normaliser, Site, dimension_of, leaves


@dataclass(frozen=True)
class Top:
    """At the noisiest levels a node is
    exp(constant)·(2πσ²)^{−degree/2}·exp(−½·Σ power·x²/σ²).

    Attributes:
        power: the total power at each entry of the site.
        degree: Σ w_i·d_i over the leaves of d_i entries, counted as normalised; NaN
            where a constant is unknown.
        constant: the sum of mixtures' weights and normalisers.
        entries: Σ |w_i|·d_i, to which the rest of the data at these levels is
            proportional.
        exact: True if the node really has this form (no mixture of different widths, no
            block averages, no energy of the user's that promises a power).
    """

    power: Float[np.ndarray, "*site"]
    degree: float
    constant: float
    entries: float
    exact: bool


top_of = Pass[Top]("top")
"""The form of a node over a site of this shape at the noisiest levels, built from its
leaves."""


@top_of.rule(Leaf)
def _leaf_top(leaf: Leaf, _: list[Top], shape: tuple[int, ...]) -> Top:
    traits = leaf.factor.traits
    power = np.zeros(shape)
    # Block averages constrain only means: they make no entry proper.
    whole_entries = leaf.averaged == 1
    if whole_entries:
        powers = traits.entry_powers
        if powers is None:
            powers = traits.top_power
        of_event = np.broadcast_to(powers, leaf.factor.event_shape)
        power.reshape(-1)[leaf.entries] = of_event.ravel()
    is_marginal = "exact_marginals" in traits.offers
    is_bounded = traits.top_power == 0
    degree = math.nan
    if is_marginal and whole_entries:
        degree = dimension_of(leaf.factor)
    if is_bounded and not is_marginal:
        # A bounded potential is not a density: it changes nothing where there is
        # noise alone.
        degree = 0.0
    constant = 0.0
    if traits.constant:
        constant = cast(Normaliser, leaf.factor).top_constant
    entries = float(np.abs(power).sum())
    # A user's energy only promises to be close to its power of N(0, σ²I).
    exact = whole_entries and (is_marginal or is_bounded)
    return Top(power, degree, constant, entries, exact)


@top_of.rule(Product)
def _product_top(node: Product, tops: list[Top], shape: tuple[int, ...]) -> Top:
    pairs = node.each(tops)
    power = sum((w * top.power for w, top in pairs), np.zeros(shape))
    degree = sum(w * top.degree for w, top in pairs)
    constant = sum(w * top.constant for w, top in pairs)
    entries = sum(abs(w) * top.entries for w, top in pairs)
    return Top(power, degree, constant, entries, all(top.exact for top in tops))


@top_of.rule(Mixture)
def _mixture_top(node: Mixture, tops: list[Top], shape: tuple[int, ...]) -> Top:
    first = tops[0]
    exact = all(top.exact and np.allclose(top.power, first.power) for top in tops)
    degree = math.nan
    if exact and all(top.degree == first.degree for top in tops):
        degree = first.degree
    constant = np.logaddexp.reduce([w + top.constant for w, top in node.each(tops)])
    entries = max(top.entries for top in tops)
    # The widest component decides how the tails fall.
    power = np.min([top.power for top in tops], axis=0)
    return Top(power, degree, float(constant), entries, exact)


def unrolled(node: Factor) -> Factor:
    """The expression, with a product of one factor for each set of cells in place of
    each plate over sets.

    Passes that need a property of every entry of a site read it.
    """
    plate = plate_of(node)
    if plate is not None and plate.cells:
        child = node.children[0]
        factors = []
        for i in range(plate.count):
            of_set = partial(_leaf_of_set, plate=plate, i=i)
            factors.append(rewrite_leaves(child, of_set))
        node = replace(cast(Product, node), factors=tuple(factors), plate=None)
    if not node.children:
        return node
    return node.with_children(tuple(map(unrolled, node.children)))


def _leaf_of_set(leaf: Leaf, plate: Plate, i: int) -> Leaf:
    """The leaf at set i of the outermost plate over sets around it."""
    assert isinstance(leaf.region, Cells)
    fixed = dict(leaf.factor.fixed)
    for name in fixed:
        if name in plate.names:
            fixed[name] = fixed[name][i]
    return replace(
        leaf,
        factor=leaf.factor.holding(fixed),
        region=leaf.region.row(i),
        plates=tuple(other for other in leaf.plates if other != plate),
    )


def site_top(root: Factor, shape: tuple[int, ...]) -> Top:
    """The `Top` of a site's expression, after its plates over sets of cells are written
    out."""
    return top_of(unrolled(root), shape)


def check_proper(site: Site) -> None:
    """Refuse a site whose noisiest level cannot be normalised: entries that no factor
    covers, or whose total power is not positive."""
    power = site_top(site.root, site.shape).power
    if np.all(power > 1e-9):  # a sum of powers that cancels leaves rounding
        return
    least = np.unravel_index(int(np.argmin(power)), power.shape)
    index = tuple(int(i) for i in least)
    covered = np.zeros(site.shape, bool)
    for leaf in leaves(unrolled(site.root)):
        covered.reshape(-1)[leaf.entries] = True
    if not covered[index]:
        raise ImproperError(
            f"The canvas of site {site.name!r} is not covered: no window reaches entry "
            f"{index}.",
            where=site.where,
            fix="add a window there, or multiply a factor over the whole canvas.",
        )
    at = "" if np.ptp(power) == 0 else f" at entry {index}"
    raise ImproperError(
        f"Site {site.name!r} is improper: the total power of its factors is "
        f"{power[index]:.4g}{at}. At noisy levels, where all factors are alike, it "
        "would be a Gaussian of negative or infinite variance.",
        where=site.where,
        fix="make the powers of the diffusion factors sum to more than 0 (classifiers "
        "and bounded energies count 0).",
    )
