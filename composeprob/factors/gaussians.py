"""Distributions as mixtures of Gaussians: those with a closed-form posterior under a
linear measurement."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpyro.distributions as dist
from jaxtyping import Float, Int
from scipy.linalg import block_diag


@dataclasses.dataclass(frozen=True, eq=False)
class Gaussians:
    """Σ_j exp(log_weight_j)·N(mean_j, covariance_j) over some entries of a flattened
    site; host arrays.

    Attributes:
        entries: indices of the entries.
        log_weights: logs of the weights, which need not sum to 1.
        means: a mean for each component.
        covariances: variances (J, n) where all are diagonal, else (J, n, n).
    """

    entries: Int[np.ndarray, " n"]
    log_weights: Float[np.ndarray, " J"]
    means: Float[np.ndarray, "J n"]
    covariances: Float[np.ndarray, "J n"] | Float[np.ndarray, "J n n"]

    @property
    def full(self) -> Float[np.ndarray, "J n n"]:
        """Covariances as matrices."""
        if self.covariances.ndim == 3:
            return self.covariances
        return self.covariances[:, :, None] * np.eye(self.means.shape[1])

    @property
    def moments(self) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """Mean and variance of each entry, for weights that sum to 1."""
        weights = np.exp(self.log_weights)
        variances = self.covariances
        if variances.ndim == 3:
            variances = np.diagonal(variances, axis1=1, axis2=2)
        mean = weights @ self.means
        return mean, weights @ (variances + self.means**2) - mean**2

    def normalised(self) -> Gaussians:
        """Scale the weights to the sum 1."""
        log_total = np.logaddexp.reduce(self.log_weights)
        return dataclasses.replace(self, log_weights=self.log_weights - log_total)


class _Moments(NamedTuple):
    """Mean of a Gaussian, of some shape, and variances of that shape, or covariances
    ``(*shape, m)``."""

    mean: np.ndarray
    covariance: np.ndarray

    @property
    def diagonal(self) -> bool:
        """True if the covariance is given by variances."""
        return self.covariance.ndim == self.mean.ndim


def components(distribution: dist.Distribution) -> list[Gaussians] | None:
    """Return a distribution's density as a product of Gaussian mixtures over different
    entries of its flattened event.

    Batch dimensions count as dimensions of the event, as `Analytic` counts them. None
    for another distribution.
    """
    shape = distribution.batch_shape + distribution.event_shape
    entries = np.arange(int(np.prod(shape))).reshape(shape)
    distribution = base_of(distribution)
    # Events of the batch are independent: each becomes a mixture of its own.
    first_event_axis = entries.ndim - distribution.event_dim
    batch = entries.shape[:first_event_axis]
    event = entries.shape[first_event_axis:]
    weights: np.ndarray = np.ones(1)
    moments: list[_Moments | None]
    match distribution:
        case dist.MixtureSameFamily():
            weights = np.asarray(distribution.mixing_distribution.probs, np.float64)
            size = weights.shape[-1]
            stacked = _moments(
                distribution.component_distribution, (*batch, size, *event)
            )
            if stacked is None:
                return None
            # Components run along the axis behind those of the batch.
            moments = [
                _Moments(
                    stacked.mean.take(j, len(batch)),
                    stacked.covariance.take(j, len(batch)),
                )
                for j in range(size)
            ]
        case dist.MixtureGeneral():
            weights = np.asarray(distribution.mixing_distribution.probs, np.float64)
            moments = [
                _moments(component, entries.shape)
                for component in distribution.component_distributions
            ]
        case _:
            moments = [_moments(distribution, entries.shape)]
    gaussian = [moment for moment in moments if moment is not None]
    if len(gaussian) < len(moments):
        return None
    diagonal = all(moment.diagonal for moment in gaussian)
    n = int(np.prod(event))
    # Independent entries stay together: a product of single Gaussians is one.
    if diagonal and len(gaussian) == 1:
        n = entries.size
    means = np.stack([moment.mean.reshape(-1, n) for moment in gaussian], 1)
    covariances = np.stack([_blocks(moment, n, diagonal) for moment in gaussian], 1)
    # A row of weights for each event; where entries stay together there is one event.
    weights = np.broadcast_to(weights, (*batch, len(gaussian)))
    weights = weights.reshape(-1, len(gaussian))[: len(means)]
    mixtures = []
    for i, entries_of_event in enumerate(entries.reshape(-1, n)):
        positive = weights[i] > 0  # log 0 would make NaN of a product
        mixtures.append(
            Gaussians(
                entries_of_event,
                np.log(weights[i][positive]),
                means[i][positive],
                covariances[i][positive],
            )
        )
    return mixtures


def base_of(distribution: dist.Distribution) -> dist.Distribution:
    """Unwrap a distribution that repeats another, or takes its batch for an event."""
    while isinstance(distribution, (dist.Independent, dist.ExpandedDistribution)):
        distribution = distribution.base_dist
    return distribution


def _moments(
    distribution: dist.Distribution, shape: tuple[int, ...]
) -> _Moments | None:
    """Moments of a Gaussian of this shape; None for another distribution."""
    distribution = base_of(distribution)
    match distribution:
        case dist.MultivariateNormal():
            mean = distribution.loc
            covariance = np.asarray(distribution.covariance_matrix, np.float64)
            covariance = np.broadcast_to(covariance, (*shape, shape[-1]))
        case dist.Normal():
            mean = distribution.loc
            variance = np.asarray(distribution.scale, np.float64) ** 2
            covariance = np.broadcast_to(variance, shape)
        case dist.Delta() if distribution.event_dim == 0:
            # A point mass: a Gaussian without width.
            mean = distribution.v
            covariance = np.zeros(shape)
        case _:
            return None
    mean = np.broadcast_to(np.asarray(mean, np.float64), shape)
    return _Moments(mean, covariance)


def _blocks(moments: _Moments, n: int, diagonal: bool) -> np.ndarray:
    """Covariance of every event of n entries, (B, n) or (B, n, n)."""
    covariance = moments.covariance
    if diagonal:
        return covariance.reshape(-1, n)
    if moments.diagonal:
        return covariance.reshape(-1, n, 1) * np.eye(n)
    # An event may hold several vectors, each with its own covariance.
    m = moments.mean.shape[-1]
    return np.array(
        [block_diag(*blocks) for blocks in covariance.reshape(-1, n // m, m, m)]
    )


def joint(parts: Sequence[Gaussians]) -> Gaussians:
    """Return the product of mixtures over different entries, as one mixture: every
    choice of components is one."""
    are_diagonal = all(part.covariances.ndim == 2 for part in parts)
    # One part with correlated entries makes all of them matrices.
    if are_diagonal:
        spreads = [part.covariances for part in parts]
    else:
        spreads = [part.full for part in parts]
    log_weights = []
    means = []
    covariances = []
    for choice in itertools.product(*[range(len(p.log_weights)) for p in parts]):
        pairs = list(zip(parts, choice, strict=True))
        log_weights.append(sum(part.log_weights[j] for part, j in pairs))
        means.append(np.concatenate([part.means[j] for part, j in pairs]))
        chosen = [spread[j] for spread, j in zip(spreads, choice, strict=True)]
        if are_diagonal:
            covariances.append(np.concatenate(chosen))
        else:
            covariances.append(block_diag(*chosen))
    return Gaussians(
        np.concatenate([part.entries for part in parts]),
        np.array(log_weights),
        np.array(means),
        np.array(covariances),
    )


class _Natural(NamedTuple):
    """Natural parameters of exp(constant + shiftᵀ·x − ½·xᵀ·precision·x)."""

    constant: float
    shift: np.ndarray
    precision: np.ndarray


def product(parts: Sequence[tuple[Gaussians, float]]) -> Gaussians | None:
    """Π_i part_i^{power_i} over the union of their entries, normaliser included.

    None where it has no closed form of this kind: a power of several components, a
    point mass, a precision that is not positive definite.
    """
    # A power of a sum is not a sum of powers.
    if any(len(p.log_weights) > 1 and power != 1.0 for p, power in parts):
        return None
    entries = np.unique(np.concatenate([p.entries for p, _ in parts]))
    natural = []
    for part, power in parts:
        components = _natural(part, power, entries)
        if components is None:
            return None
        natural.append(components)
    log_weights = []
    means = []
    covariances = []
    # A component of the product is one of each factor: natural parameters add up.
    for first, *others in itertools.product(*natural):
        constant = sum((term.constant for term in others), first.constant)
        shift = sum((term.shift for term in others), first.shift)
        precision = sum((term.precision for term in others), first.precision)
        if np.linalg.eigvalsh(precision)[0] <= 0:
            return None
        covariance = np.linalg.inv(precision)
        _, log_det = np.linalg.slogdet(2 * np.pi * covariance)
        # log ∫ exp(c + hᵀx − ½·xᵀPx) dx = c + ½·log det(2π·P⁻¹) + ½·hᵀP⁻¹h.
        log_weights.append(constant + 0.5 * log_det + 0.5 * shift @ covariance @ shift)
        means.append(covariance @ shift)
        covariances.append(covariance)
    stacked = np.array(covariances)
    # Variances alone where they are enough: they cost less, and are exact.
    if np.allclose(stacked, stacked * np.eye(len(entries))):
        stacked = np.diagonal(stacked, axis1=1, axis2=2)
    return Gaussians(entries, np.array(log_weights), np.array(means), stacked)


def _natural(
    part: Gaussians, power: float, entries: np.ndarray
) -> list[_Natural] | None:
    """Natural parameters of each component's power over ``entries``; None of a point
    mass."""
    n = len(entries)
    places = np.searchsorted(entries, part.entries)
    components = []
    for j, covariance in enumerate(part.full):
        mean = part.means[j]
        sign, log_det = np.linalg.slogdet(2 * np.pi * covariance)
        if sign <= 0:
            return None
        # N(x; m, C)^w = exp(w·(−½ log det(2πC) − ½·mᵀC⁻¹m) + w·mᵀC⁻¹x − ½·w·xᵀC⁻¹x)
        inverse = np.linalg.inv(covariance)
        precision = np.zeros((n, n))
        precision[np.ix_(places, places)] = power * inverse
        shift = np.zeros(n)
        shift[places] = power * inverse @ mean
        log_height = part.log_weights[j] - 0.5 * log_det
        constant = power * (log_height - 0.5 * mean @ inverse @ mean)
        components.append(_Natural(constant, shift, precision))
    return components
