"""The prior of noised sites as mixtures of Gaussians, where its factors are such; else the reason why not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from composeprob.compiler.unroll import unrolled
from composeprob.factors.analytic import Analytic
from composeprob.factors.gaussians import Gaussians, components, joint, product
from composeprob.ir.nodes import Leaf, Mixture, Node

LARGEST = 2**16
"""A joint mixture of more numbers than this is not built: components times entries, or times squared measurements."""


class NotGaussian(Exception):
    """Why a prior is no mixture of Gaussians."""


@dataclasses.dataclass(frozen=True, eq=False)
class Prior:
    """A site's factors without noise: a product of mixtures over different entries.

    Attributes:
        parts: the mixtures; together they cover the site.
        marginal: whether the site's density at level k is the noised marginal of this one. The product of noised
            factors is not the noised product, nor is the power of one.
    """

    parts: list[Gaussians]
    marginal: bool


def prior_of(node: Node, shape: tuple[int, ...]) -> Prior:
    """The law of x₀ that an expression over a site of this shape declares.

    Raises:
        NotGaussian: with the reason.
    """
    if isinstance(node, Leaf):
        return Prior(_of_leaf(node, shape), True)
    node = unrolled(node)
    children = [(c, w) for c, w in _pairs(node) if not (isinstance(c, Leaf) and c.factor.constant)]
    priors = [(prior_of(child, shape), w) for child, w in children]
    if isinstance(node, Mixture):
        return _mixed(priors)
    # Parts that share entries multiply to one mixture; the others stay apart.
    pending = [(part, power) for prior, power in priors for part in prior.parts]
    marginal = all(prior.marginal for prior, _ in priors)
    parts: list[Gaussians] = []
    for group in connected([set(part.entries.tolist()) for part, _ in pending]):
        members = [pending[i] for i in group]
        if len(members) == 1 and members[0][1] == 1.0:
            parts.append(members[0][0])
            continue
        marginal = False
        check_size([p for p, _ in members])
        found = product(members)
        if found is None:
            raise NotGaussian("a power of a mixture, or a product with points or of negative precision, is none")
        parts.append(found)
    if getattr(node, "normalised", False):
        parts = [part.normalised() for part in parts]
    return Prior(parts, marginal)


def _pairs(node: Node) -> list[tuple[Node, float]]:
    assert not isinstance(node, Leaf)
    if node.plate is not None:
        raise NotGaussian("a factor over data is a network")
    return list(zip(node.children, node.log_weights if isinstance(node, Mixture) else node.powers, strict=True))


def _of_leaf(leaf: Leaf, shape: tuple[int, ...]) -> list[Gaussians]:
    name = leaf.name.rpartition("(x")[0]
    if not isinstance(leaf.factor, Analytic):
        raise NotGaussian(f"factor '{name}' is {_a(type(leaf.factor).__name__)}, not a cp.Analytic")
    if leaf.latent is not None:
        raise NotGaussian(f"the numbers of factor '{name}' are latents")
    distribution = leaf.factor.distribution
    if any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(distribution)):
        raise NotGaussian(f"the numbers of factor '{name}' are not known when the program is compiled")
    found = components(distribution)
    if found is None:
        raise NotGaussian(f"factor '{name}' is {_a(type(distribution).__name__)}, not a mixture of Gaussians")
    if leaf.region is None:
        return found
    if leaf.region.averaged > 1:
        raise NotGaussian(f"factor '{name}' sees averages of the site")
    places = leaf.region.entries(shape)
    return [dataclasses.replace(part, entries=places[part.entries]) for part in found]


def _a(noun: str) -> str:
    return f"a{'n' if noun[0] in 'AEIO' else ''} {noun}"


def _mixed(priors: list[tuple[Prior, float]]) -> Prior:
    """A mixture of whole priors: their components side by side."""
    for prior, _ in priors:
        check_size(prior.parts)
    whole = [(_sorted(joint(prior.parts)), log_weight) for prior, log_weight in priors]
    entries = whole[0][0].entries
    if any(not np.array_equal(part.entries, entries) for part, _ in whole):
        raise NotGaussian("the parts of a mixture see different entries of the site")
    diagonal = all(part.covariances.ndim == 2 for part, _ in whole)
    return Prior(
        [
            Gaussians(
                entries,
                np.concatenate([log_weight + part.log_weights for part, log_weight in whole]),
                np.concatenate([part.means for part, _ in whole]),
                np.concatenate([part.covariances if diagonal else part.full for part, _ in whole]),
            )
        ],
        all(prior.marginal for prior, _ in priors),
    )


def _sorted(part: Gaussians) -> Gaussians:
    order = np.argsort(part.entries)
    covariances = part.covariances[:, order]
    covariances = covariances[:, :, order] if covariances.ndim == 3 else covariances
    return Gaussians(part.entries[order], part.log_weights, part.means[:, order], covariances)


def check_size(parts: Sequence[Gaussians], measurements: int = 1) -> None:
    """Refuse to write out the product of mixtures that has too many components.

    Raises:
        NotGaussian: with their number.
    """
    count = math.prod(len(p.log_weights) for p in parts)
    if len(parts) > 1 and count * sum(len(p.entries) for p in parts) > LARGEST:
        raise NotGaussian(f"together its mixtures have {count:,} components")
    widths = max((len(p.log_weights) for p in parts if len(p.log_weights) > 1 and not alike(p)), default=1)
    widths = count if len(parts) > 1 and widths > 1 else widths
    if widths * measurements**2 > LARGEST:
        raise NotGaussian(f"{widths:,} components of different width under {measurements} measurements are too many")


def alike(part: Gaussians) -> bool:
    """Whether all components have the same covariance."""
    return bool(np.all(part.covariances == part.covariances[:1]))


def connected(members: Sequence[set[Any]]) -> list[list[int]]:
    """Indices of sets, those that share elements together, in order of their first."""
    groups: list[tuple[set[Any], list[int]]] = []
    for i, own in enumerate(members):
        touching = [g for g in groups if g[0] & own]
        merged = (own.union(*[g[0] for g in touching]), sorted([i, *[j for g in touching for j in g[1]]]))
        groups = [g for g in groups if not g[0] & own] + [merged]
    return sorted((g[1] for g in groups), key=lambda group: group[0])
