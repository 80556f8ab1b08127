"""The prior of noised sites as mixtures of Gaussians, or the reason against it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NoReturn

import jax
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from composeprob import tuning
from composeprob.factors.factor import Factor
from composeprob.factors.gaussians import Gaussians, components, joint, product
from composeprob.factors.nodes import Mixture, Product
from composeprob.factors.passes import Pass
from composeprob.ir.leaves import Leaf
from composeprob.language.interpret import unwrap


class NotGaussian(Exception):
    """The reason why a prior is not a mixture of Gaussians."""


@dataclasses.dataclass(frozen=True, eq=False)
class Prior:
    """A site's factors without noise: a product of mixtures over different entries.

    Attributes:
        parts: the mixtures; together they cover the site.
        marginal: True if the site's density at level k is the noised marginal of this
            one. The product of noised factors is not the noised product, nor is the
            power of one.
    """

    parts: list[Gaussians]
    marginal: bool


def refuse(node: Factor, *_: object) -> NoReturn:
    """Refuse a kind of node that has no rule."""
    kind = type(node).__name__.lower()
    raise NotGaussian(f"{_with_article(kind)} is not one")


prior_of = Pass[Prior]("prior", refuse)
"""The distribution of x₀ that an expression over a site of this shape declares;
`NotGaussian` with the reason."""


@prior_of.rule(Leaf)
def _leaf_prior(leaf: Leaf, _: list[Prior], shape: tuple[int, ...]) -> Prior:
    if leaf.plates:
        raise NotGaussian("a factor over data is a network")
    mixtures = mixtures_of(leaf)
    if leaf.averaged > 1 and mixtures:
        raise NotGaussian(f"factor '{leaf.label}' sees averages of the site")
    # From places in the event to places in the site.
    in_site = []
    for mixture in mixtures:
        entries = leaf.entries[mixture.entries]
        in_site.append(dataclasses.replace(mixture, entries=entries))
    return Prior(in_site, True)


@prior_of.rule(Product)
def _product_prior(node: Product, priors: list[Prior], shape: tuple[int, ...]) -> Prior:
    """Mixtures that share entries multiply to one mixture; the others stay separate."""
    powers: list[tuple[Gaussians, float]] = []
    for power, prior in node.each(priors):
        powers += [(mixture, power) for mixture in prior.parts]
    marginal = all(prior.marginal for prior in priors)
    parts: list[Gaussians] = []
    for group in connected([mixture.entries for mixture, _ in powers]):
        members = [powers[i] for i in group]
        if len(members) == 1 and members[0][1] == 1.0:
            parts.append(members[0][0])
            continue
        # From here on noising and multiplying do not commute.
        marginal = False
        check_size([mixture for mixture, _ in members])
        multiplied = product(members)
        if multiplied is None:
            raise NotGaussian(
                "a power of a mixture, or a product with points or of negative "
                "precision, is not one"
            )
        parts.append(multiplied)
    if node.calibrated:
        parts = [mixture.normalised() for mixture in parts]
    return Prior(parts, marginal)


@prior_of.rule(Mixture)
def _mixture_prior(node: Mixture, priors: list[Prior], shape: tuple[int, ...]) -> Prior:
    """A mixture of whole priors: their components side by side."""
    for prior in priors:
        check_size(prior.parts)
    log_weights = []
    wholes = []
    for log_weight, prior in node.each(priors):
        # Components can stand side by side where each covers the same entries.
        whole = _sorted(joint(prior.parts))
        log_weights.append(log_weight + whole.log_weights)
        wholes.append(whole)
    entries = wholes[0].entries
    if any(not np.array_equal(whole.entries, entries) for whole in wholes):
        raise NotGaussian("the parts of a mixture see different entries of the site")
    # Variances alone suffice while no component has correlations.
    covariances = [whole.covariances for whole in wholes]
    if any(covariance.ndim == 3 for covariance in covariances):
        covariances = [whole.full for whole in wholes]
    mixed = Gaussians(
        entries,
        np.concatenate(log_weights),
        np.concatenate([whole.means for whole in wholes]),
        np.concatenate(covariances),
    )
    return Prior([mixed], all(prior.marginal for prior in priors))


def _sorted(mixture: Gaussians) -> Gaussians:
    """The same mixture with its entries in order."""
    order = np.argsort(mixture.entries)
    covariances = mixture.covariances[:, order]
    if covariances.ndim == 3:
        covariances = covariances[:, :, order]
    entries = mixture.entries[order]
    return Gaussians(entries, mixture.log_weights, mixture.means[:, order], covariances)


def mixtures_of(leaf: Leaf, boxes: bool = False) -> list[Gaussians]:
    """The density of a leaf without noise: Gaussian mixtures over different entries of
    its event.

    A constant has no mixture. Another density raises `NotGaussian` with the reason.
    With ``boxes`` a box counts as a point: its noised tails are those of the noise.
    """
    factor = leaf.factor
    name = leaf.label
    if factor.traits.constant:
        return []
    distribution = getattr(factor, "distribution", None)
    if distribution is None:
        kind = _with_article(type(factor).__name__)
        raise NotGaussian(f"factor '{name}' is {kind}, not a cp.Analytic")
    # Groups are formed once, on the host, so the numbers must be constants.
    if leaf.latent is not None:
        raise NotGaussian(f"the numbers of factor '{name}' are latents")
    if any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(distribution)):
        raise NotGaussian(
            f"the numbers of factor '{name}' are not known when the program is compiled"
        )
    # The middle stands for the box.
    if boxes and isinstance(unwrap(distribution), dist.Uniform):
        n = math.prod(factor.event_shape)
        middle = np.asarray(distribution.mean).reshape(1, n)
        return [Gaussians(np.arange(n), np.zeros(1), middle, np.zeros((1, n)))]
    mixtures = components(distribution)
    if mixtures is None:
        kind = _with_article(type(distribution).__name__)
        raise NotGaussian(f"factor '{name}' is {kind}, not a mixture of Gaussians")
    return mixtures


def _with_article(noun: str) -> str:
    """The noun with its indefinite article."""
    article = "an" if noun[0] in "AEIO" else "a"
    return f"{article} {noun}"


def check_size(parts: Sequence[Gaussians], measurements: int = 1) -> None:
    """Refuse to write out the product of mixtures that has too many components, with
    their number."""
    count = math.prod(len(part.log_weights) for part in parts)
    entries = sum(len(part.entries) for part in parts)
    if len(parts) > 1 and count * entries > tuning.LARGEST_JOINT_MIXTURE:
        raise NotGaussian(f"together its mixtures have {count:,} components")
    # Components of one covariance share their M × M matrices.
    different = [len(part.log_weights) for part in parts if not alike(part)]
    widths = max(different, default=1)
    if len(parts) > 1 and widths > 1:
        widths = count
    if widths * measurements**2 > tuning.LARGEST_JOINT_MIXTURE:
        raise NotGaussian(
            f"{widths:,} components of different width under {measurements} "
            "measurements are too many"
        )


def alike(part: Gaussians) -> bool:
    """Return whether all components have the same covariance."""
    return bool(np.all(part.covariances == part.covariances[:1]))


def connected(members: Sequence[Int[np.ndarray, " _"]]) -> list[Int[np.ndarray, " _"]]:
    """Indices of sets of integers, grouped so that sets with a common number are in one
    group; groups in the order of their first set."""
    count = len(members)
    columns = np.concatenate([np.zeros(0, int), *members])
    sizes = np.array([len(member) for member in members], int)
    rows = np.repeat(np.arange(count), sizes)
    # A graph of sets and numbers, with an edge from each set to each of its numbers.
    size = count + int(columns.max(initial=-1)) + 1
    edges = (np.ones(len(rows)), (rows, count + columns))
    graph = coo_array(edges, shape=(size, size))
    _, labels = connected_components(graph, directed=False)
    labels_of_sets = labels[:count]
    ordered = dict.fromkeys(labels_of_sets.tolist())
    return [np.flatnonzero(labels_of_sets == label) for label in ordered]
