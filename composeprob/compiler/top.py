"""The law of the noisiest level, where every diffusion factor is N(0, σ²I) raised to its power."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from composeprob.compiler.unroll import unrolled
from composeprob.errors import ImproperError
from composeprob.ir.nodes import Leaf, Mixture, Node, Product, Site, fold, leaves


@dataclass(frozen=True)
class Top:
    """At the noisiest levels a node is exp(constant)·(2πσ²)^{−degree/2}·exp(−½·Σ power·x²/σ²).

    Attributes:
        power: the total power at each entry of the site, an array of the site's shape.
        degree: Σ w_i·d_i over the leaves of d_i entries, counted as normalised; NaN where a constant is unknown.
        constant: what mixture weights and normalisers add.
        exact: whether the node really has this form (no mixture of different widths, no block averages, no energy of
            the user's that promises a power).
    """

    power: np.ndarray
    degree: float
    constant: float
    exact: bool


def top_of(node: Node, shape: tuple[int, ...]) -> Top:
    """The form of a node at the noisiest levels, built from its leaves."""
    return fold(
        unrolled(node), lambda leaf: _of_leaf(leaf, shape), lambda n, tops: _of_product(n, tops, shape), _of_mixture
    )


def _of_leaf(leaf: Leaf, shape: tuple[int, ...]) -> Top:
    power = np.zeros(shape)
    averaged = leaf.region.averaged if leaf.region else 1
    if averaged == 1:  # block averages constrain only means: they make no entry proper
        here = leaf.region.entries(shape) if leaf.region else ...
        power.reshape(-1)[here] = np.broadcast_to(leaf.factor.entry_powers, leaf.factor.event_shape).ravel()
    marginal, bounded = "exact_marginals" in leaf.factor.capabilities, leaf.factor.top_power == 0
    degree = leaf.factor.dimension if marginal and averaged == 1 else math.nan
    if not marginal and bounded:
        degree = 0.0  # a bounded potential is no density: it changes nothing where there is no signal
    # A user's energy only promises to be close to its power of N(0, σ²I).
    return Top(power, degree, leaf.factor.top_constant, averaged == 1 and (marginal or bounded))


def _of_product(node: Product, tops: list[Top], shape: tuple[int, ...]) -> Top:
    pairs = list(zip(node.powers, tops, strict=True))
    power = sum((w * top.power for w, top in pairs), np.zeros(shape))
    degree, constant = sum(w * top.degree for w, top in pairs), sum(w * top.constant for w, top in pairs)
    return Top(power, degree, constant, all(top.exact for top in tops))


def _of_mixture(node: Mixture, tops: list[Top]) -> Top:
    exact = all(top.exact and np.allclose(top.power, tops[0].power) for top in tops)
    degree = tops[0].degree if exact and all(top.degree == tops[0].degree for top in tops) else math.nan
    constant = np.logaddexp.reduce([w + top.constant for w, top in zip(node.log_weights, tops, strict=True)])
    return Top(np.min([top.power for top in tops], axis=0), degree, float(constant), exact)


def check_proper(top: Top, site: Site) -> None:
    """Refuse a site whose noisiest level cannot be normalised.

    Raises:
        ImproperError: entries that no factor covers, or whose total power is not positive.
    """
    if np.all(top.power > 1e-9):
        return
    index = tuple(int(i) for i in np.unravel_index(int(np.argmin(top.power)), top.power.shape))
    covered = np.zeros(site.shape, bool)
    for leaf in leaves(unrolled(site.root)):
        covered.reshape(-1)[leaf.region.entries(site.shape) if leaf.region else ...] = True
    if not covered[index]:
        raise ImproperError(
            f"The canvas of site {site.name!r} is not covered: no window reaches entry {index}.",
            where=site.where,
            fix="add a window there, or multiply a factor over the whole canvas.",
        )
    at = "" if np.ptp(top.power) == 0 else f" at entry {index}"
    raise ImproperError(
        f"Site {site.name!r} is improper: the total power of its factors is {top.power[index]:.4g}{at}, and at the "
        "noisiest level it would be a Gaussian of negative or infinite variance.",
        where=site.where,
        fix="make the powers of the diffusion factors sum to more than 0 (classifiers and bounded energies count 0).",
    )
