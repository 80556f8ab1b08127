"""The prior of noised sites as mixtures of Gaussians, where its factors are such; else
the reason why not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NoReturn

import jax
import numpy as np
import numpyro.distributions as dist
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
    """Why a prior is no mixture of Gaussians."""


@dataclasses.dataclass(frozen=True, eq=False)
class Prior:
    """A site's factors without noise: a product of mixtures over different entries.

    Attributes:
        parts: the mixtures; together they cover the site.
        marginal: whether the site's density at level k is the noised marginal of this
            one. The product of noised factors is not the noised product, nor is the
            power of one.
    """

    parts: list[Gaussians]
    marginal: bool


def refuse(node: Factor, *_: object) -> NoReturn:
    """The rule of kinds of nodes that have none."""
    raise NotGaussian(f"{_a(type(node).__name__.lower())} is none")


prior_of = Pass[Prior]("prior", refuse)
"""The distribution of x₀ that an expression over a site of this shape declares;
`NotGaussian` with the reason."""


@prior_of.rule(Leaf)
def _leaf_prior(leaf: Leaf, _: list[Prior], shape: tuple[int, ...]) -> Prior:
    if leaf.plates:
        raise NotGaussian("a factor over data is a network")
    found = mixtures_of(leaf)
    if leaf.averaged > 1 and found:
        raise NotGaussian(f"factor '{leaf.label}' sees averages of the site")
    return Prior(
        [
            dataclasses.replace(part, entries=leaf.entries[part.entries])
            for part in found
        ],
        True,
    )


@prior_of.rule(Product)
def _product_prior(node: Product, priors: list[Prior], shape: tuple[int, ...]) -> Prior:
    """DensityTerms that share entries multiply to one mixture; the others stay apart."""
    pending = [
        (part, power) for power, prior in node.each(priors) for part in prior.parts
    ]
    marginal = all(prior.marginal for prior in priors)
    parts: list[Gaussians] = []
    for group in connected([part.entries for part, _ in pending]):
        members = [pending[i] for i in group]
        if len(members) == 1 and members[0][1] == 1.0:
            parts.append(members[0][0])
            continue
        marginal = False
        check_size([p for p, _ in members])
        found = product(members)
        if found is None:
            raise NotGaussian(
                "a power of a mixture, or a product with points or of negative precision, is none"
            )
        parts.append(found)
    return Prior(
        [part.normalised() for part in parts] if node.calibrated else parts, marginal
    )


@prior_of.rule(Mixture)
def _mixture_prior(node: Mixture, priors: list[Prior], shape: tuple[int, ...]) -> Prior:
    """A mixture of whole priors: their components side by side."""
    for prior in priors:
        check_size(prior.parts)
    whole = [
        (log_weight, _sorted(joint(prior.parts)))
        for log_weight, prior in node.each(priors)
    ]
    entries = whole[0][1].entries
    if any(not np.array_equal(part.entries, entries) for _, part in whole):
        raise NotGaussian("the parts of a mixture see different entries of the site")
    diagonal = all(part.covariances.ndim == 2 for _, part in whole)
    mixed = Gaussians(
        entries,
        np.concatenate([log_weight + part.log_weights for log_weight, part in whole]),
        np.concatenate([part.means for _, part in whole]),
        np.concatenate(
            [part.covariances if diagonal else part.full for _, part in whole]
        ),
    )
    return Prior([mixed], all(prior.marginal for prior in priors))


def _sorted(part: Gaussians) -> Gaussians:
    order = np.argsort(part.entries)
    covariances = part.covariances[:, order]
    covariances = covariances[:, :, order] if covariances.ndim == 3 else covariances
    return Gaussians(
        part.entries[order], part.log_weights, part.means[:, order], covariances
    )


def mixtures_of(leaf: Leaf, boxes: bool = False) -> list[Gaussians]:
    """The mixtures over different entries of its event that a leaf is without noise, of
    a constant none; `NotGaussian` with the reason where it is something else. With
    ``boxes`` a box counts as a point: its noised tails are those of the noise."""
    factor, name = leaf.factor, leaf.label
    if factor.traits.constant:
        return []
    if (distribution := getattr(factor, "distribution", None)) is None:
        raise NotGaussian(
            f"factor '{name}' is {_a(type(factor).__name__)}, not a cp.Analytic"
        )
    if leaf.latent is not None:
        raise NotGaussian(f"the numbers of factor '{name}' are latents")
    if any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(distribution)):
        raise NotGaussian(
            f"the numbers of factor '{name}' are not known when the program is compiled"
        )
    if boxes and isinstance(unwrap(distribution), dist.Uniform):
        n, middle = math.prod(factor.event_shape), np.asarray(distribution.mean)
        return [
            Gaussians(np.arange(n), np.zeros(1), middle.reshape(1, n), np.zeros((1, n)))
        ]
    found = components(distribution)
    if found is None:
        raise NotGaussian(
            f"factor '{name}' is {_a(type(distribution).__name__)}, not a mixture of Gaussians"
        )
    return found


def _a(noun: str) -> str:
    return f"a{'n' if noun[0] in 'AEIO' else ''} {noun}"


def check_size(parts: Sequence[Gaussians], measurements: int = 1) -> None:
    """Refuse to write out the product of mixtures that has too many components, with
    their number."""
    count = math.prod(len(p.log_weights) for p in parts)
    if (
        len(parts) > 1
        and count * sum(len(p.entries) for p in parts) > tuning.LARGEST_JOINT_MIXTURE
    ):
        raise NotGaussian(f"together its mixtures have {count:,} components")
    widths = max(
        (len(p.log_weights) for p in parts if len(p.log_weights) > 1 and not alike(p)),
        default=1,
    )
    widths = count if len(parts) > 1 and widths > 1 else widths
    if widths * measurements**2 > tuning.LARGEST_JOINT_MIXTURE:
        raise NotGaussian(
            f"{widths:,} components of different width under {measurements} measurements are too many"
        )


def alike(part: Gaussians) -> bool:
    """Whether all components have the same covariance."""
    return bool(np.all(part.covariances == part.covariances[:1]))


def connected(members: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Indices of sets of whole numbers, those that share some together, in order of
    their first."""
    count, columns = len(members), np.concatenate([np.zeros(0, int), *members])
    rows = np.array([i for i, member in enumerate(members) for _ in member], int)
    size = count + int(columns.max(initial=-1)) + 1
    shared = coo_array(
        (np.ones(len(rows)), (rows, count + columns)), shape=(size, size)
    )
    labels = connected_components(shared, directed=False)[1][:count]
    return [np.flatnonzero(labels == label) for label in dict.fromkeys(labels.tolist())]
