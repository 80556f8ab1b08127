"""Gaussian log-densities for batches of covariances, without the routines of LAPACK."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array


def log_normal(residual: Array, covariance: Array) -> Array:
    """log N(residual; 0, covariance), residuals (…, m) and covariances (…, m, m) that
    broadcast."""
    m = residual.shape[-1]
    whiten = whitener(covariance)
    white = _times(whiten, residual)
    log_det = -jnp.sum(jnp.log(jnp.diagonal(whiten, axis1=-2, axis2=-1)), -1)
    return -0.5 * jnp.sum(white**2, -1) - log_det - 0.5 * m * math.log(2 * math.pi)


def log_normal_of_sum(residual: Array, noise: Array, loadings: Array) -> Array:
    """log N(residual; 0, Σ + B·Bᵀ), residuals (…, m), L⁻¹ = ``noise`` of Σ = L·Lᵀ, (m,
    m), loadings B (…, m, n).

    As r = B·z + ε with z ~ N(0, I): rᵀ(Σ + B·Bᵀ)⁻¹r is the least of |L⁻¹(r − B·z)|² +
    |z|² over z, which is flat in z there. So a small Σ beside B, under which Σ + B·Bᵀ
    is singular to rounding, costs little accuracy; nor does δ·I, which is added where I
    alone would drown: log det M = log det(M + δ·I) − δ·tr(M + δ·I)⁻¹ − ½δ²·tr(M +
    δ·I)⁻² − ….
    """
    m, n = loadings.shape[-2:]
    white, whitened = _times(noise, residual), noise @ loadings
    small = whitened @ whitened.mT if m <= n else whitened.mT @ whitened
    added = 4 * jnp.finfo(small.dtype).eps * jnp.trace(small, axis1=-2, axis2=-1)
    whiten = whitener(
        small + (1 + added)[..., None, None] * jnp.eye(min(m, n), dtype=small.dtype)
    )
    inverse = whiten.mT @ whiten
    solved = _times(inverse, white if m <= n else _times(whitened.mT, white))
    latent = _times(whitened.mT, solved) if m <= n else solved
    left = white - _times(whitened, latent)
    log_det = -sum(
        jnp.sum(jnp.log(jnp.diagonal(w, axis1=-2, axis2=-1)), -1)
        for w in (whiten, noise)
    )
    log_det -= 0.5 * added * jnp.trace(
        inverse, axis1=-2, axis2=-1
    ) + 0.25 * added**2 * jnp.sum(inverse**2, (-2, -1))
    return (
        -0.5 * (jnp.sum(left**2, -1) + jnp.sum(latent**2, -1))
        - log_det
        - 0.5 * m * math.log(2 * math.pi)
    )


@jax.custom_jvp
def whitener(covariance: Array) -> Array:
    """L⁻¹, the inverse of the Cholesky factor C = L·Lᵀ, (…, m, m): L⁻¹·y has covariance
    I where y has C.

    By halves, in matrix products. LAPACK's routines, which JAX calls for batches on
    CPUs, can wait for each other for ever: two of them occupy both threads of a pool
    that their parts wait for.
    """
    m = covariance.shape[-1]
    if m <= 16:  # faster than LAPACK, row by row
        return _eliminated(covariance)
    h = m // 2
    first = whitener(covariance[..., :h, :h])
    below = covariance[..., h:, :h] @ first.mT
    second = whitener(covariance[..., h:, h:] - below @ below.mT)
    right = jnp.zeros_like(below.mT)
    return jnp.block([[first, right], [-second @ below @ first, second]])


def _eliminated(covariance: Array) -> Array:
    """`whitener` by elimination, which turns (C | I) into (Lᵀ | L⁻¹)."""
    m = covariance.shape[-1]
    identity = jnp.broadcast_to(jnp.eye(m, dtype=covariance.dtype), covariance.shape)

    def eliminate(i: Array, both: Array) -> Array:
        row = both[..., i, :] / jnp.sqrt(both[..., i, i])[..., None]
        column = jnp.where(
            jnp.arange(m) > i, both[..., i] / jnp.sqrt(both[..., i, i])[..., None], 0.0
        )
        return (both - column[..., None] * row[..., None, :]).at[..., i, :].set(row)

    return jax.lax.fori_loop(
        0, m, eliminate, jnp.concatenate([covariance, identity], -1)
    )[..., m:]


def _times(a: Array, x: Array) -> Array:
    return (a @ x[..., None])[..., 0]


@whitener.defjvp
def _derivative_of_whitener(
    primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    """dL⁻¹ = −Φ(L⁻¹·dC·L⁻ᵀ)·L⁻¹, with Φ the lower triangle and half of the diagonal."""
    inverse = whitener(primals[0])
    inner = inverse @ tangents[0] @ inverse.mT
    m = inner.shape[-1]
    lower = inner * (
        jnp.tril(jnp.ones((m, m), inner.dtype)) - 0.5 * jnp.eye(m, dtype=inner.dtype)
    )
    return inverse, -lower @ inverse
