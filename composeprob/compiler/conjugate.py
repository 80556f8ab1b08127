"""The prior of noised sites as mixtures of Gaussians, where its factors are such; else the reason why not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence, Set
from typing import TypeVar

import jax
import numpy as np

from composeprob import tuning
from composeprob.factors.analytic import Analytic
from composeprob.factors.base import Factor
from composeprob.factors.gaussians import Gaussians, components
from composeprob.factors.passes import Pass
from composeprob.ir.nodes import Leaf

Member = TypeVar("Member")


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


def _refuse(node: Factor, *_: object) -> Prior:
    raise NotGaussian(f"{_a(type(node).__name__.lower())} is none")


prior_of = Pass[Prior]("prior", _refuse)
"""The distribution of x₀ that an expression over a site of this shape declares; `NotGaussian` with the reason."""


@prior_of.rule(Leaf)
def _leaf_prior(leaf: Leaf, _: list[Prior], shape: tuple[int, ...]) -> Prior:
    factor, name = leaf.factor, leaf.label
    if factor.traits.constant:
        return Prior([], True)
    if leaf.plates:
        raise NotGaussian("a factor over data is a network")
    if not isinstance(factor, Analytic):
        raise NotGaussian(f"factor '{name}' is {_a(type(factor).__name__)}, not a cp.Analytic")
    if leaf.latent is not None:
        raise NotGaussian(f"the numbers of factor '{name}' are latents")
    distribution = factor.distribution
    if any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(distribution)):
        raise NotGaussian(f"the numbers of factor '{name}' are not known when the program is compiled")
    found = components(distribution)
    if found is None:
        raise NotGaussian(f"factor '{name}' is {_a(type(distribution).__name__)}, not a mixture of Gaussians")
    if leaf.averaged > 1:
        raise NotGaussian(f"factor '{name}' sees averages of the site")
    return Prior([dataclasses.replace(part, entries=leaf.entries[part.entries]) for part in found], True)


def _a(noun: str) -> str:
    return f"a{'n' if noun[0] in 'AEIO' else ''} {noun}"


def check_size(parts: Sequence[Gaussians], measurements: int = 1) -> None:
    """Refuse to write out the product of mixtures that has too many components, with their number."""
    count = math.prod(len(p.log_weights) for p in parts)
    if len(parts) > 1 and count * sum(len(p.entries) for p in parts) > tuning.LARGEST_JOINT_MIXTURE:
        raise NotGaussian(f"together its mixtures have {count:,} components")
    widths = max((len(p.log_weights) for p in parts if len(p.log_weights) > 1 and not alike(p)), default=1)
    widths = count if len(parts) > 1 and widths > 1 else widths
    if widths * measurements**2 > tuning.LARGEST_JOINT_MIXTURE:
        raise NotGaussian(f"{widths:,} components of different width under {measurements} measurements are too many")


def alike(part: Gaussians) -> bool:
    """Whether all components have the same covariance."""
    return bool(np.all(part.covariances == part.covariances[:1]))


def connected(members: Sequence[Set[Member]]) -> list[list[int]]:
    """Indices of sets, those that share elements together, in order of their first."""
    groups: list[tuple[Set[Member], list[int]]] = []
    for i, member in enumerate(members):
        touching = [g for g in groups if g[0] & member]
        merged = (
            frozenset().union(member, *[g[0] for g in touching]),
            sorted([i, *[j for g in touching for j in g[1]]]),
        )
        groups = [g for g in groups if not g[0] & member] + [merged]
    return sorted((g[1] for g in groups), key=lambda group: group[0])
