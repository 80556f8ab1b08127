"""Exact draws of the posterior of all observations, and the distance between sets of
draws."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from .instances import Instance

ENUMERATED = 12
"""Observations up to which all 2ⁿ choices of components are written out."""
SWEEPS = 400


def exact_draws(instance: Instance, rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, m) draws of prior·Π_i (posterior_i/prior).

    A product of mixtures is a mixture over the choices of one component each. For few
    observations all choices are weighed; for many, where the posterior has one mode,
    they are drawn in turn with θ (Gibbs), by chains of their own.
    """
    if len(instance.covariances) == 1:
        precision, shift = _natural(instance, np.zeros((1, len(instance.xs)), int))
        covariance = np.linalg.inv(precision[0])
        return rng.multivariate_normal(covariance @ shift[0], covariance, count)
    return (
        _enumerated(instance, rng, count)
        if len(instance.xs) <= ENUMERATED
        else _gibbs(instance, rng, count)
    )


def _natural(instance: Instance, choices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Precision (c, m, m) and precision·mean (c, m) of the Gaussian that each choice
    (c, n) makes."""
    n = len(instance.xs)
    inverses = np.linalg.inv(instance.covariances)
    counts = np.stack([(choices == j).sum(1) for j in range(len(inverses))], axis=1)
    prior = np.diag(1 / instance.prior_variance)
    precision = np.einsum("cj,jab->cab", counts, inverses) + (1 - n) * prior
    shifts = np.einsum("jab,njb->nja", inverses, instance.means)
    shift = (
        sum(shifts[i, choices[:, i]] for i in range(n))
        + (1 - n) * instance.prior_mean / instance.prior_variance
    )
    return precision, shift


def exact_mean(instance: Instance) -> np.ndarray:
    """The exact mean of θ, (m,), for few observations."""
    components = _components(instance)
    return components.weights @ components.means


class Components(NamedTuple):
    """The mixture that the posterior is: a Gaussian for every choice."""

    weights: np.ndarray
    means: np.ndarray
    covariance: np.ndarray


def _enumerated(instance: Instance, rng: np.random.Generator, count: int) -> np.ndarray:
    weights, means, covariance = _components(instance)
    chosen = rng.choice(len(weights), count, p=weights)
    factors = np.linalg.cholesky(covariance[chosen])
    return means[chosen] + np.einsum(
        "cab,cb->ca", factors, rng.standard_normal((count, instance.size))
    )


def _components(instance: Instance) -> Components:
    n = len(instance.xs)
    choices = np.array(
        list(itertools.product(range(len(instance.covariances)), repeat=n))
    )
    precision, shift = _natural(instance, choices)
    covariance = np.linalg.inv(precision)
    means = np.einsum("cab,cb->ca", covariance, shift)
    log_weights = (
        0.5 * np.einsum("ca,ca->c", shift, means)
        - 0.5 * np.linalg.slogdet(precision)[1]
    )
    inverses = np.linalg.inv(instance.covariances)
    log_dets = np.linalg.slogdet(instance.covariances)[1]
    squares = np.einsum("nja,jab,njb->nj", instance.means, inverses, instance.means)
    single = instance.log_weights - 0.5 * (squares + log_dets)
    log_weights = log_weights + sum(single[i, choices[:, i]] for i in range(n))
    weights = np.exp(log_weights - log_weights.max())
    return Components(weights / weights.sum(), means, covariance)


def _gibbs(instance: Instance, rng: np.random.Generator, count: int) -> np.ndarray:
    """Covariances are diagonal here."""
    variances = np.diagonal(instance.covariances, axis1=1, axis2=2)
    theta = np.broadcast_to(instance.xs.mean(0), (count, instance.size))
    for _ in range(SWEEPS):
        away = theta[:, None, None] - instance.means
        joint = instance.log_weights - 0.5 * np.sum(
            away**2 / variances + np.log(variances), axis=-1
        )
        shares = np.exp(joint - joint.max(-1, keepdims=True))
        second = rng.uniform(size=shares.shape[:2]) * shares.sum(-1) > shares[..., 0]
        own = np.where(second[..., None], 1 / variances[1], 1 / variances[0])
        means = np.where(second[..., None], instance.means[:, 1], instance.means[:, 0])
        rest = (1 - len(instance.xs)) / instance.prior_variance
        precision = own.sum(1) + rest
        shift = (own * means).sum(1) + rest * instance.prior_mean
        theta = shift / precision + rng.standard_normal(theta.shape) / np.sqrt(
            precision
        )
    return theta


def whitened_variance(instance: Instance, draws: np.ndarray) -> float:
    """The mean variance of draws in coordinates in which the exact law, one Gaussian,
    has 1."""
    precision = _natural(instance, np.zeros((1, len(instance.xs)), int))[0][0]
    return float(np.var(draws @ np.linalg.cholesky(precision), axis=0, ddof=1).mean())


def max_sliced(a: np.ndarray, b: np.ndarray, projections: int, seed: int = 0) -> float:
    """The greatest Wasserstein-2 distance of as many draws over random directions; NaN
    where a draw is NaN."""
    if not (np.all(np.isfinite(a)) and np.all(np.isfinite(b))):
        return float("nan")
    directions = np.random.default_rng(seed).standard_normal((a.shape[1], projections))
    directions /= np.linalg.norm(directions, axis=0)
    apart = np.sort(a @ directions, axis=0) - np.sort(b @ directions, axis=0)
    return float(np.sqrt(np.mean(apart**2, axis=0)).max())
