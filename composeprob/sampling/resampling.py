"""Weights of a particle system: effective sample size and systematic resampling."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def relative_ess(log_weights: Array) -> Array:
    """(Σ w)²/(N·Σ w²) in [0, 1], a scalar; 0 where every weight is 0.

    References:
        Kong, Liu and Wong 1994.
    """
    greatest = jnp.max(log_weights)
    weights = jnp.exp(log_weights - jnp.where(jnp.isfinite(greatest), greatest, 0.0))
    return jnp.sum(weights) ** 2 / (jnp.maximum(jnp.sum(weights**2), 1e-30) * log_weights.shape[0])


def systematic(key: Array, log_weights: Array) -> Array:
    """Indices (N,) of the chains that survive: one uniform number, evenly spaced ticks on the cumulated weights.

    Chain i appears ⌊N·w_i⌋ or ⌈N·w_i⌉ times, N·w_i on average. Where every weight is 0 each survives once.

    References:
        Carpenter, Clifford and Fearnhead 1999; Douc, Cappé and Moulines 2005.
    """
    n = log_weights.shape[0]
    log_weights = jnp.where(jnp.isfinite(jnp.max(log_weights)), log_weights, 0.0)
    cumulated = jnp.cumsum(jax.nn.softmax(log_weights))
    ticks = (jnp.arange(n) + jax.random.uniform(key)) / n
    return jnp.minimum(jnp.searchsorted(cumulated / cumulated[-1], ticks, side="right"), n - 1)


def log_mean_weight(log_weights: Array) -> Array:
    """log of the mean weight, a scalar."""
    return jax.nn.logsumexp(log_weights) - jnp.log(log_weights.shape[0])
