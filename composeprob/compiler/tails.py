"""The tails of an expression at one level, where all its factors have those of Gaussians.

In a direction u and far out a mixture of Gaussians is its widest component there, so log f ~ −½·r²·uᵀP(u)u with P(u)
that component's precision. A product adds its factors' precisions times their powers, a mixture takes the least.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
import numpyro.distributions as dist

from composeprob.factors.analytic import Analytic
from composeprob.factors.classifier import Classifier
from composeprob.factors.gaussians import Gaussians, components
from composeprob.factors.passes import Pass
from composeprob.ir.nodes import Leaf, Region
from composeprob.schedule import Schedule


class Undecided(Exception):
    """The tails of an expression are not known."""


@dataclasses.dataclass(frozen=True, eq=False)
class Tail:
    """A precision that depends on the direction.

    Attributes:
        matrix: what does not depend on it: the diagonal (D,) over the flattened site, or the whole, (D, D).
        terms: (power, tail) pairs that are added to it.
        choices: tails of which the least along the direction is added to it.
    """

    matrix: np.ndarray
    terms: tuple[tuple[float, Tail], ...] = ()
    choices: tuple[Tail, ...] = ()

    @property
    def fixed(self) -> bool:
        """Whether the precision is the same in every direction."""
        return not self.terms and not self.choices

    def along(self, u: np.ndarray) -> np.ndarray:
        """P(u), a diagonal or a whole matrix."""
        total = self.matrix
        for power, tail in self.terms:
            total = add(total, power * tail.along(u))
        if self.choices:
            total = add(total, min((tail.along(u) for tail in self.choices), key=lambda p: square(p, u)))
        return total


def square(matrix: np.ndarray, u: np.ndarray) -> float:
    """uᵀMu of a diagonal or a whole matrix."""
    return float(u @ (matrix * u if matrix.ndim == 1 else matrix @ u))


def add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The sum of diagonals or whole matrices."""
    if a.ndim == b.ndim:
        return a + b
    return (np.diag(a) if a.ndim == 1 else a) + (np.diag(b) if b.ndim == 1 else b)


Parts = dict[int, list[Gaussians]]
"""What each leaf is without noise, as `known_parts` found it, by its identity."""


def _undecided(*_: object) -> Tail:
    raise Undecided


tail_of = Pass[Tail]("tail", _undecided)
"""The tail of an expression, from the parts of its leaves, over a site of this shape, under a schedule, at a level.

It raises `Undecided` where a matrix would be too large.
"""


@tail_of.rule(Leaf)
def _leaf_tail(leaf: Leaf, _: list[Tail], known: Parts, shape: tuple[int, ...], schedule: Schedule, level: int) -> Tail:
    parts, size = known[id(leaf)], math.prod(shape)
    noise = schedule if leaf.own_noise is None else leaf.own_noise
    alpha, sigma = float(noise.alpha[level]), float(noise.sigma[level])
    ratio = alpha / float(schedule.alpha[level])
    places = np.arange(size).reshape(shape)
    averages = leaf.region is not None and leaf.region.averaged > 1
    whole = averages or any(part.covariances.ndim == 3 for part in parts)
    if whole and size > 1024:  # no matrix over so many entries is made
        raise Undecided
    to_event = _averages(leaf.region, places) if isinstance(leaf.region, Region) and averages else None
    entries = places.ravel() if leaf.region is None else leaf.region.entries(shape)
    total, terms = np.zeros((size, size) if whole else size), []
    for part in parts:
        rows = part.entries if averages else entries[part.entries]
        options = []
        for covariance in np.unique(part.covariances, axis=0):
            if not whole:
                matrix = np.zeros(size)
                matrix[rows] = ratio**2 / (alpha**2 * covariance + sigma**2)
            else:
                full = np.diag(covariance) if covariance.ndim == 1 else covariance
                precision = ratio**2 * np.linalg.inv(alpha**2 * full + sigma**2 * np.eye(len(full)))
                event = np.eye(size)[rows] if to_event is None else to_event[rows]
                matrix = event.T @ precision @ event
            options.append(Tail(matrix))
        if len(options) == 1:
            total = total + options[0].matrix
        else:
            terms.append((1.0, Tail(np.zeros(size), choices=tuple(options))))
    return Tail(total, tuple(terms))


def _averages(region: Region, places: np.ndarray) -> np.ndarray:
    """The matrix that takes the flattened site to the flattened event, whose entries are averages of blocks."""
    pairs = zip(region.extent, region.block, strict=True)
    grid = places[region.slices].reshape([n for e, b in pairs for n in (e // b, b)])
    lead = [*range(0, grid.ndim, 2), *range(1, grid.ndim, 2)]
    blocks = grid.transpose(lead).reshape(-1, region.averaged)
    matrix = np.zeros((len(blocks), places.size))
    matrix[np.arange(len(blocks))[:, None], blocks] = 1 / region.averaged
    return matrix


def known_parts(leaf: Leaf) -> list[Gaussians] | None:
    """The mixtures of Gaussians over different entries that a leaf is without noise; None where it is none, or where
    its numbers are not known. A box counts as a point: its noised tails are those of the noise. A constant, and
    logits, which grow no faster than x, have no entries."""
    return None if leaf.latent else law_of.rule_for(leaf.factor)(leaf.factor)


law_of = Pass[list[Gaussians] | None]("law", lambda factor: [] if factor.traits.constant else None)
"""Rules (leaf factor) for `known_parts`."""


@law_of.rule(Classifier)
def _bounded(factor: Classifier) -> list[Gaussians]:
    return []


@law_of.rule(Analytic)
def _law(factor: Analytic) -> list[Gaussians] | None:
    if any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(factor.distribution)):
        return None
    inner = factor.distribution
    while isinstance(inner, (dist.Independent, dist.ExpandedDistribution)):
        inner = inner.base_dist
    if isinstance(inner, dist.Uniform):
        n = math.prod(factor.event_shape)
        middle = np.broadcast_to((np.asarray(inner.low) + np.asarray(inner.high)) / 2, factor.event_shape)
        return [Gaussians(np.arange(n), np.zeros(1), middle.reshape(1, n), np.zeros((1, n)))]
    return components(factor.distribution)
