"""Densities written down from their definitions in NumPy, and their scores by complex
steps: no JAX, none of our code.

A `Reference` is log f(x; α, σ): the log-density of the noised event α·X + σ·ε at x. It
is analytic in x and takes complex x, so that Im log f(x + i·h·e_j)/h is ∂_j log f to
the last digit.
"""

from collections.abc import Callable, Sequence

import numpy as np

Reference = Callable[[np.ndarray, float, float], complex]


def gaussians(
    weights: np.ndarray, means: np.ndarray, covariances: np.ndarray
) -> Reference:
    """Σ_i w_i·N(α·μ_i, α²·Σ_i + σ²·I) over the flattened event; means (n, d),
    covariances (n, d, d)."""

    def log_density(x: np.ndarray, alpha: float, sigma: float) -> complex:
        terms = []
        for weight, mean, covariance in zip(weights, means, covariances, strict=True):
            noised = alpha**2 * covariance + sigma**2 * np.eye(mean.size)
            away = x.ravel() - alpha * mean
            _, log_det = np.linalg.slogdet(2 * np.pi * noised)
            square = 0.5 * away @ np.linalg.solve(noised, away)
            terms.append(np.log(weight) - 0.5 * log_det - square)
        return log_sum_exp(terms)

    return log_density


def product(parts: Sequence[Reference], powers: Sequence[float]) -> Reference:
    """Π_i f_i^{w_i}."""

    def log_density(x: np.ndarray, alpha: float, sigma: float) -> complex:
        return sum(w * f(x, alpha, sigma) for f, w in zip(parts, powers, strict=True))

    return log_density


def mixture(parts: Sequence[Reference], multipliers: Sequence[float]) -> Reference:
    """Σ_i m_i·f_i."""

    def log_density(x: np.ndarray, alpha: float, sigma: float) -> complex:
        return log_sum_exp(
            [
                np.log(m) + f(x, alpha, sigma)
                for f, m in zip(parts, multipliers, strict=True)
            ]
        )

    return log_density


def window(
    part: Reference, offset: Sequence[int], extent: Sequence[int], scale: int
) -> Reference:
    """f of the block averages of a box: averages of s^n noisy entries have noise
    σ/√(s^n)."""

    def log_density(x: np.ndarray, alpha: float, sigma: float) -> complex:
        box = x[tuple(slice(o, o + e) for o, e in zip(offset, extent, strict=True))]
        event = np.zeros([e // scale for e in extent], box.dtype)
        for index in np.ndindex(*event.shape):
            block = tuple(slice(i * scale, (i + 1) * scale) for i in index)
            event[index] = box[block].mean()
        return part(event, alpha, sigma / np.sqrt(scale ** len(extent)))

    return log_density


def log_softmax(matrix: np.ndarray, label: int) -> Reference:
    """log softmax(M·x/√(α²+σ²))[label]."""

    def log_density(x: np.ndarray, alpha: float, sigma: float) -> complex:
        logits = matrix @ x.ravel() / np.hypot(alpha, sigma)
        return logits[label] - log_sum_exp(list(logits))

    return log_density


def log_sum_exp(terms: list[complex]) -> complex:
    largest = max(np.real(term) for term in terms)
    return largest + np.log(sum(np.exp(term - largest) for term in terms))


def value_and_score(
    f: Reference, x: np.ndarray, alpha: float, sigma: float
) -> tuple[float, np.ndarray]:
    """log f and its gradient, by complex steps."""
    step = 1e-30
    score = np.zeros(x.shape)
    for index in np.ndindex(*x.shape):
        moved = x.astype(complex)
        moved[index] += 1j * step
        score[index] = np.imag(f(moved, alpha, sigma)) / step
    return float(np.real(f(x.astype(complex), alpha, sigma))), score
