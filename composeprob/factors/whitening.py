"""Gaussian log-densities for batches of covariances, without the routines of LAPACK."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float


def log_normal(
    residual: Float[Array, "*#batch m"], covariance: Float[Array, "*#batch m m"]
) -> Float[Array, "*batch"]:
    """log N(residual; 0, covariance), residuals and covariances broadcast."""
    m = residual.shape[-1]
    whiten = whitener(covariance)
    white = _times(whiten, residual)
    log_det = -jnp.sum(jnp.log(jnp.diagonal(whiten, axis1=-2, axis2=-1)), -1)
    return -0.5 * jnp.sum(white**2, -1) - log_det - 0.5 * m * math.log(2 * math.pi)


def log_normal_of_sum(
    residual: Float[Array, "*#batch m"],
    noise: Float[Array, "m m"],
    loadings: Float[Array, "*#batch m n"],
) -> Float[Array, "*batch"]:
    """log N(residual; 0, Σ + B·Bᵀ), with L⁻¹ = ``noise`` of Σ = L·Lᵀ, and loadings B.

    As r = B·z + ε with z ~ N(0, I): rᵀ(Σ + B·Bᵀ)⁻¹r is the least of |L⁻¹(r − B·z)|² +
    |z|² over z, which is flat in z there. So a small Σ beside B, under which Σ + B·Bᵀ
    is singular to rounding, costs little accuracy; nor does δ·I, which is added where I
    alone would drown: log det M = log det(M + δ·I) − δ·tr(M + δ·I)⁻¹ − ½δ²·tr(M +
    δ·I)⁻² − ….
    """
    m, n = loadings.shape[-2:]
    white = _times(noise, residual)
    whitened = noise @ loadings  # W = L⁻¹·B
    # M = I + W·Wᵀ or I + WᵀW, whichever is smaller; both have one determinant.
    by_rows = m <= n
    gram = whitened @ whitened.mT if by_rows else whitened.mT @ whitened
    added = 4 * jnp.finfo(gram.dtype).eps * jnp.trace(gram, axis1=-2, axis2=-1)  # δ
    identity = jnp.eye(min(m, n), dtype=gram.dtype)
    whiten = whitener(gram + (1 + added)[..., None, None] * identity)
    inverse = whiten.mT @ whiten
    # z = Wᵀ(I + W·Wᵀ)⁻¹·L⁻¹r = (I + WᵀW)⁻¹·Wᵀ·L⁻¹r.
    if by_rows:
        latent = _times(whitened.mT, _times(inverse, white))
    else:
        latent = _times(inverse, _times(whitened.mT, white))
    remaining = white - _times(whitened, latent)
    log_det = -sum(
        jnp.sum(jnp.log(jnp.diagonal(w, axis1=-2, axis2=-1)), -1)
        for w in (whiten, noise)
    )
    first_order = 0.5 * added * jnp.trace(inverse, axis1=-2, axis2=-1)
    second_order = 0.25 * added**2 * jnp.sum(inverse**2, (-2, -1))
    log_det -= first_order + second_order
    return (
        -0.5 * (jnp.sum(remaining**2, -1) + jnp.sum(latent**2, -1))
        - log_det
        - 0.5 * m * math.log(2 * math.pi)
    )


@jax.custom_jvp
def whitener(covariance: Float[Array, "... m m"]) -> Float[Array, "... m m"]:
    """L⁻¹, the inverse of the Cholesky factor C = L·Lᵀ: L⁻¹·y has covariance I where y
    has C.

    By halves, in matrix products. LAPACK's routines, which JAX calls for batches on
    CPUs, can wait for each other for ever: two of them occupy both threads of a pool
    that their parts wait for.
    """
    m = covariance.shape[-1]
    if m <= 16:  # faster than LAPACK, row by row
        return _eliminated(covariance)
    # C = [A Kᵀ; K D]: L⁻¹ = [A^-½ 0; −S^-½·K·A⁻¹ S^-½] with S = D − K·A⁻¹·Kᵀ, and ^-½
    # for the inverse of a Cholesky factor.
    h = m // 2
    first = whitener(covariance[..., :h, :h])
    below = covariance[..., h:, :h] @ first.mT
    second = whitener(covariance[..., h:, h:] - below @ below.mT)
    right = jnp.zeros_like(below.mT)
    return jnp.block([[first, right], [-second @ below @ first, second]])


def _eliminated(covariance: Float[Array, "... m m"]) -> Float[Array, "... m m"]:
    """`whitener` by elimination, which turns (C | I) into (Lᵀ | L⁻¹)."""
    m = covariance.shape[-1]
    if m == 0:  # of an entry that sees no site; a loop cannot index nothing
        return covariance
    identity = jnp.broadcast_to(jnp.eye(m, dtype=covariance.dtype), covariance.shape)

    def eliminate(i: Array, both: Array) -> Array:
        row = both[..., i, :] / jnp.sqrt(both[..., i, i])[..., None]
        below = jnp.arange(m) > i
        scaled = both[..., i] / jnp.sqrt(both[..., i, i])[..., None]
        column = jnp.where(below, scaled, 0.0)
        return (both - column[..., None] * row[..., None, :]).at[..., i, :].set(row)

    both = jnp.concatenate([covariance, identity], -1)
    return jax.lax.fori_loop(0, m, eliminate, both)[..., m:]


def _times(a: Float[Array, "... m n"], x: Float[Array, "... n"]) -> Array:
    return (a @ x[..., None])[..., 0]


@whitener.defjvp
def _derivative_of_whitener(
    primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    """dL⁻¹ = −Φ(L⁻¹·dC·L⁻ᵀ)·L⁻¹, with Φ the lower triangle and half of the diagonal."""
    inverse = whitener(primals[0])
    inner = inverse @ tangents[0] @ inverse.mT
    m = inner.shape[-1]
    lower = jnp.tril(jnp.ones((m, m), inner.dtype))
    phi = inner * (lower - 0.5 * jnp.eye(m, dtype=inner.dtype))
    return inverse, -phi @ inverse
