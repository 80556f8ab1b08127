"""The distribution of a level that is noise alone: every diffusion factor is N(0, σ²I)
raised to its power there."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import numpy as np

from composeprob.errors import ImproperError
from composeprob.factors.factor import Factor
from composeprob.factors.nodes import Mixture, Plate, Product, plate_of, rewrite_leaves
from composeprob.factors.passes import Pass
from composeprob.factors.window import Cells
from composeprob.ir.leaves import Leaf, Normaliser, Site, dimension_of, leaves


@dataclass(frozen=True)
class Top:
    """At the noisiest levels a node is exp(constant)·(2πσ²)^{−degree/2}·exp(−½·Σ
    power·x²/σ²).

    Attributes:
        power: the total power at each entry of the site, an array of the site's shape.
        degree: Σ w_i·d_i over the leaves of d_i entries, counted as normalised; NaN
            where a constant is unknown.
        constant: what mixture weights and normalisers add.
        entries: Σ |w_i|·d_i, to which what is left of the data at these levels is
            proportional.
        exact: whether the node really has this form (no mixture of different widths, no
            block averages, no energy of the user's that promises a power).
    """

    power: np.ndarray
    degree: float
    constant: float
    entries: float
    exact: bool


top_of = Pass[Top]("top")
"""The form of a node over a site of this shape at the noisiest levels, built from its
leaves."""


@top_of.rule(Leaf)
def _leaf_top(leaf: Leaf, _: list[Top], shape: tuple[int, ...]) -> Top:
    power, traits = np.zeros(shape), leaf.factor.traits
    powers = traits.top_power if traits.entry_powers is None else traits.entry_powers
    averaged = leaf.averaged
    if averaged == 1:  # block averages constrain only means: they make no entry proper
        power.reshape(-1)[leaf.entries] = np.broadcast_to(
            powers, leaf.factor.event_shape
        ).ravel()
    marginal, bounded = "exact_marginals" in traits.offers, traits.top_power == 0
    degree = dimension_of(leaf.factor) if marginal and averaged == 1 else math.nan
    if not marginal and bounded:
        # a bounded potential is no density: it changes nothing where there is no signal
        degree = 0.0
    # A user's energy only promises to be close to its power of N(0, σ²I).
    entries = float(np.abs(power).sum())
    constant = cast(Normaliser, leaf.factor).top_constant if traits.constant else 0.0
    return Top(
        power, degree, constant, entries, averaged == 1 and (marginal or bounded)
    )


@top_of.rule(Product)
def _product_top(node: Product, tops: list[Top], shape: tuple[int, ...]) -> Top:
    pairs = node.each(tops)
    power = sum((w * top.power for w, top in pairs), np.zeros(shape))
    degree, constant = (
        sum(w * top.degree for w, top in pairs),
        sum(w * top.constant for w, top in pairs),
    )
    entries = sum(abs(w) * top.entries for w, top in pairs)
    return Top(power, degree, constant, entries, all(top.exact for top in tops))


@top_of.rule(Mixture)
def _mixture_top(node: Mixture, tops: list[Top], shape: tuple[int, ...]) -> Top:
    exact = all(top.exact and np.allclose(top.power, tops[0].power) for top in tops)
    degree = (
        tops[0].degree
        if exact and all(top.degree == tops[0].degree for top in tops)
        else math.nan
    )
    constant = np.logaddexp.reduce([w + top.constant for w, top in node.each(tops)])
    entries = max(top.entries for top in tops)
    return Top(
        np.min([top.power for top in tops], axis=0),
        degree,
        float(constant),
        entries,
        exact,
    )


def unrolled(node: Factor) -> Factor:
    """The same expression with one factor for each set of cells in the place of a plate
    over sets, for passes that ask of every entry of a site what is known of it."""
    plate = plate_of(node)
    if plate is not None and plate.cells:
        each = (
            rewrite_leaves(node.children[0], partial(_leaf_of_set, plate=plate, i=i))
            for i in range(plate.count)
        )
        node = replace(cast(Product, node), factors=tuple(each), plate=None)
    return (
        node.with_children(tuple(map(unrolled, node.children)))
        if node.children
        else node
    )


def _leaf_of_set(leaf: Leaf, plate: Plate, i: int) -> Leaf:
    """The leaf at set i of the outermost plate over sets that it stands in."""
    assert isinstance(leaf.region, Cells)
    others = tuple(other for other in leaf.plates if other != plate)
    fixed = {
        name: value[i] if name in plate.names else value
        for name, value in leaf.factor.fixed.items()
    }
    return replace(
        leaf,
        factor=leaf.factor.holding(fixed),
        region=leaf.region.row(i),
        plates=others,
    )


def site_top(root: Factor, shape: tuple[int, ...]) -> Top:
    """The form of a site's expression, its plates over sets of cells written out."""
    return top_of(unrolled(root), shape)


def check_proper(site: Site) -> None:
    """Refuse a site whose noisiest level cannot be normalised: entries that no factor
    covers, or whose total power is not positive."""
    top = site_top(site.root, site.shape)
    if np.all(top.power > 1e-9):
        return
    index = tuple(
        int(i) for i in np.unravel_index(int(np.argmin(top.power)), top.power.shape)
    )
    covered = np.zeros(site.shape, bool)
    for leaf in leaves(unrolled(site.root)):
        covered.reshape(-1)[leaf.entries] = True
    if not covered[index]:
        raise ImproperError(
            f"The canvas of site {site.name!r} is not covered: no window reaches entry {index}.",
            where=site.where,
            fix="add a window there, or multiply a factor over the whole canvas.",
        )
    at = "" if np.ptp(top.power) == 0 else f" at entry {index}"
    raise ImproperError(
        f"Site {site.name!r} is improper: the total power of its factors is {top.power[index]:.4g}{at}, and where they "
        "are all alike, as at noisy levels, it would be a Gaussian of negative or infinite variance.",
        where=site.where,
        fix="make the powers of the diffusion factors sum to more than 0 (classifiers and bounded energies count 0).",
    )
