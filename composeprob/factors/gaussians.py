"""Distributions as mixtures of Gaussians: the ones whose posterior under a linear
measurement has a closed form."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import numpyro.distributions as dist
from scipy.linalg import block_diag


@dataclasses.dataclass(frozen=True, eq=False)
class Gaussians:
    """Σ_j exp(log_weight_j)·N(mean_j, covariance_j) over some entries of a flattened
    site; host arrays.

    Attributes:
        entries: which entries, (n,).
        log_weights: (J,); they need not sum to 1.
        means: (J, n).
        covariances: variances (J, n) where all are diagonal, else (J, n, n).
    """

    entries: np.ndarray
    log_weights: np.ndarray
    means: np.ndarray
    covariances: np.ndarray

    @property
    def full(self) -> np.ndarray:
        """Covariances as matrices, (J, n, n)."""
        if self.covariances.ndim == 3:
            return self.covariances
        return self.covariances[:, :, None] * np.eye(self.means.shape[1])

    @property
    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of each entry, (n,) each, of weights that sum to 1."""
        weights, diagonal = np.exp(self.log_weights), self.covariances
        diagonal = (
            diagonal if diagonal.ndim == 2 else np.diagonal(diagonal, axis1=1, axis2=2)
        )
        mean = weights @ self.means
        return mean, weights @ (diagonal + self.means**2) - mean**2

    def normalised(self) -> Gaussians:
        """The same with weights that sum to 1."""
        return dataclasses.replace(
            self, log_weights=self.log_weights - np.logaddexp.reduce(self.log_weights)
        )


def components(distribution: dist.Distribution) -> list[Gaussians] | None:
    """A distribution's density as a product of Gaussian mixtures over different entries
    of its flattened event.

    Batch dimensions count as dimensions of the event, as `Analytic` counts them. None
    for another distribution.
    """
    shape = distribution.batch_shape + distribution.event_shape
    entries = np.arange(int(np.prod(shape))).reshape(shape)
    distribution = base_of(distribution)
    batch, event = np.split(
        np.array(entries.shape, int), [entries.ndim - distribution.event_dim]
    )
    n = int(np.prod(event))
    weights: np.ndarray = np.ones(1)
    parts: list[tuple[np.ndarray, np.ndarray] | None]
    match distribution:
        case dist.MixtureSameFamily():
            weights = np.asarray(distribution.mixing_distribution.probs, np.float64)
            size = weights.shape[-1]
            stacked = _moments(
                distribution.component_distribution, (*batch, size, *event)
            )
            parts = [
                stacked and tuple(a.take(j, len(batch)) for a in stacked)
                for j in range(size)
            ]
        case dist.MixtureGeneral():
            weights = np.asarray(distribution.mixing_distribution.probs, np.float64)
            parts = [
                _moments(part, entries.shape)
                for part in distribution.component_distributions
            ]
        case _:
            parts = [_moments(distribution, entries.shape)]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    diagonal = all(covariance.ndim == mean.ndim for mean, covariance in known)
    if (
        diagonal and len(parts) == 1
    ):  # independent entries stay together: a product of single Gaussians is one
        n = entries.size
    means = np.stack([mean.reshape(-1, n) for mean, _ in known], 1)
    covariances = np.stack(
        [_blocks(mean, covariance, n, diagonal) for mean, covariance in known], 1
    )
    weights = np.broadcast_to(weights, (*batch, len(parts))).reshape(-1, len(parts))[
        : len(means)
    ]
    rows = zip(entries.reshape(-1, n), weights, means, covariances, strict=True)
    return [
        Gaussians(entries, np.log(w[w > 0]), m[w > 0], c[w > 0])
        for entries, w, m, c in rows
    ]


def base_of(distribution: dist.Distribution) -> dist.Distribution:
    """The distribution inside of those that repeat it, or take its batch for an
    event."""
    while isinstance(distribution, (dist.Independent, dist.ExpandedDistribution)):
        distribution = distribution.base_dist
    return distribution


def _moments(
    distribution: dist.Distribution, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Mean, of ``shape``, and variances of that shape, or covariances ``(*shape, m)``;
    None if it is no Gaussian."""
    match distribution := base_of(distribution):
        case dist.MultivariateNormal():
            mean, covariance = (
                distribution.loc,
                np.asarray(distribution.covariance_matrix, np.float64),
            )
            covariance = np.broadcast_to(covariance, (*shape, shape[-1]))
        case dist.Normal():
            mean = distribution.loc
            covariance = np.broadcast_to(
                np.asarray(distribution.scale, np.float64) ** 2, shape
            )
        case dist.Delta() if distribution.event_dim == 0:
            mean, covariance = distribution.v, np.zeros(shape)
        case _:
            return None
    return np.broadcast_to(np.asarray(mean, np.float64), shape), covariance


def _blocks(
    mean: np.ndarray, covariance: np.ndarray, n: int, diagonal: bool
) -> np.ndarray:
    """The covariance of every event of n entries, (B, n) or (B, n, n)."""
    if diagonal:
        return covariance.reshape(-1, n)
    if covariance.ndim == mean.ndim:
        return covariance.reshape(-1, n, 1) * np.eye(n)
    m = mean.shape[
        -1
    ]  # an event may hold several vectors, each with a covariance of its own
    return np.array(
        [block_diag(*blocks) for blocks in covariance.reshape(-1, n // m, m, m)]
    )


def joint(parts: Sequence[Gaussians]) -> Gaussians:
    """The product of mixtures over different entries, as one mixture: every choice of
    components is one."""
    entries = np.concatenate([p.entries for p in parts])
    choices = list(itertools.product(*[range(len(p.log_weights)) for p in parts]))
    pairs = [list(zip(parts, choice, strict=True)) for choice in choices]
    log_weights = np.array([sum(p.log_weights[j] for p, j in pair) for pair in pairs])
    means = np.array([np.concatenate([p.means[j] for p, j in pair]) for pair in pairs])
    if all(p.covariances.ndim == 2 for p in parts):
        covariances = np.array(
            [np.concatenate([p.covariances[j] for p, j in pair]) for pair in pairs]
        )
    else:
        matrices = [p.full for p in parts]
        blocks = [
            [full[j] for full, j in zip(matrices, choice, strict=True)]
            for choice in choices
        ]
        covariances = np.array([block_diag(*each) for each in blocks])
    return Gaussians(entries, log_weights, means, covariances)


def product(parts: Sequence[tuple[Gaussians, float]]) -> Gaussians | None:
    """Π_i part_i^{power_i} over the union of their entries, normaliser included.

    None where it has no closed form of this kind: a power of several components, a
    point mass, a precision that is not positive definite.
    """
    entries = np.unique(np.concatenate([p.entries for p, _ in parts]))
    n = len(entries)
    if any(len(p.log_weights) > 1 and power != 1.0 for p, power in parts):
        return None
    natural = []
    for p, power in parts:
        places = np.searchsorted(entries, p.entries)
        terms = []
        for log_weight, mean, covariance in zip(
            p.log_weights, p.means, p.full, strict=True
        ):
            sign, log_det = np.linalg.slogdet(2 * np.pi * covariance)
            if sign <= 0:
                return None
            inverse = np.linalg.inv(covariance)
            precision, shift = np.zeros((n, n)), np.zeros(n)
            precision[np.ix_(places, places)] = power * inverse
            shift[places] = power * inverse @ mean
            terms.append(
                (
                    power * (log_weight - 0.5 * log_det - 0.5 * mean @ inverse @ mean),
                    shift,
                    precision,
                )
            )
        natural.append(terms)
    log_weights, means, covariances = [], [], []
    for choice in itertools.product(*natural):
        constant, shift, precision = (
            sum(terms[1:], terms[0]) for terms in zip(*choice, strict=True)
        )
        if np.linalg.eigvalsh(precision)[0] <= 0:
            return None
        covariance = np.linalg.inv(precision)
        log_det = np.linalg.slogdet(2 * np.pi * covariance)[1]
        log_weights.append(constant + 0.5 * log_det + 0.5 * shift @ covariance @ shift)
        means.append(covariance @ shift)
        covariances.append(covariance)
    found = np.array(covariances)
    if np.allclose(found, found * np.eye(n)):
        found = np.diagonal(found, axis1=1, axis2=2)
    return Gaussians(entries, np.array(log_weights), np.array(means), found)
