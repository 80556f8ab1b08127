"""Gaussian log-densities for batches of covariances, without the routines of LAPACK."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array


def log_normal(residual: Array, covariance: Array) -> Array:
    """log N(residual; 0, covariance), residuals (…, m) and covariances (…, m, m) that broadcast."""
    m = residual.shape[-1]
    whiten = whitener(covariance)
    white = (whiten @ residual[..., None])[..., 0]
    log_det = -jnp.sum(jnp.log(jnp.diagonal(whiten, axis1=-2, axis2=-1)), -1)
    return -0.5 * jnp.sum(white**2, -1) - log_det - 0.5 * m * math.log(2 * math.pi)


@jax.custom_jvp
def whitener(covariance: Array) -> Array:
    """L⁻¹, the inverse of the Cholesky factor C = L·Lᵀ, (…, m, m): L⁻¹·y has covariance I where y has C.

    Elimination turns (C | I) into (Lᵀ | L⁻¹), for all chains at once. LAPACK's routines, which JAX calls for batches
    on CPUs, can wait for each other for ever: two of them occupy both threads of a pool that their parts wait for.
    """
    m = covariance.shape[-1]
    one = jnp.broadcast_to(jnp.eye(m, dtype=covariance.dtype), covariance.shape)

    def eliminate(i: Array, both: Array) -> Array:
        row = both[..., i, :] / jnp.sqrt(both[..., i, i])[..., None]
        column = jnp.where(jnp.arange(m) > i, both[..., i] / jnp.sqrt(both[..., i, i])[..., None], 0.0)
        return (both - column[..., None] * row[..., None, :]).at[..., i, :].set(row)

    return jax.lax.fori_loop(0, m, eliminate, jnp.concatenate([covariance, one], -1))[..., m:]


@whitener.defjvp
def _derivative_of_whitener(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """dL⁻¹ = −Φ(L⁻¹·dC·L⁻ᵀ)·L⁻¹, with Φ the lower triangle and half of the diagonal."""
    inverse = whitener(primals[0])
    inner = inverse @ tangents[0] @ jnp.swapaxes(inverse, -1, -2)
    m = inner.shape[-1]
    lower = inner * (jnp.tril(jnp.ones((m, m), inner.dtype)) - 0.5 * jnp.eye(m, dtype=inner.dtype))
    return inverse, -lower @ inverse
