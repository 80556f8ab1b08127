"""Weights of a particle system: effective sample size, resampling by exact sums, and what ancestors tell of errors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

UNIT = 2.0**32
"""Parts that one expected copy is divided into, for sums that are exact."""


def relative_ess(log_weights: Array) -> Array:
    """(Σ w)²/(N·Σ w²) in [0, 1], a scalar; 0 where every weight is 0.

    References:
        Kong, Liu and Wong 1994.
    """
    weights = relative_weights(log_weights)
    return jnp.sum(weights) ** 2 / (jnp.maximum(jnp.sum(weights**2), 1e-30) * log_weights.shape[0])


def systematic(key: Array, log_weights: Array) -> Array:
    """Indices (N,) of the chains that survive: one uniform number, evenly spaced ticks on the cumulated weights.

    Chain i appears ⌊N·w_i⌋ or ⌈N·w_i⌉ times, N·w_i on average, and never where w_i = 0. Where every weight is 0 each
    survives once.

    The expected copies N·w_i are rounded to multiples of 2⁻³² and added up as whole numbers of 64 bits, each in two
    words. Such sums are exact, so they never fall and the answer is the same on any number of devices. A cumulative sum
    of floats is neither: computed in blocks it can fall from one entry to the next, and a tick between the two copies a
    chain whose weight is 0.

    References:
        Carpenter, Clifford and Fearnhead 1999; Douc, Cappé and Moulines 2005.
    """
    n = log_weights.shape[0]
    log_weights = jnp.where(jnp.isfinite(jnp.max(log_weights)), log_weights, 0.0)
    weights = relative_weights(log_weights)
    parts, whole = cumulated(jnp.zeros((n,), jnp.uint32), (weights * UNIT / 2).astype(jnp.uint32))
    total = 2 * (whole[-1].astype(jnp.float32) + parts[-1].astype(jnp.float32) / UNIT)  # Σ weights
    copies = weights * (n / total)
    parts, whole = cumulated(
        jnp.floor(copies).astype(jnp.uint32), ((copies - jnp.floor(copies)) * UNIT).astype(jnp.uint32)
    )
    # Tick j stands at j + u: so many of them lie below each cumulated number of copies.
    below = (whole + (jax.random.bits(key, dtype=jnp.uint32) < parts)).astype(jnp.int32)
    # The last chain that has a weight takes the ticks that rounding of the total leaves over.
    last = (parts == parts[-1]) & (whole == whole[-1])
    return jnp.searchsorted(jnp.where(last, n, below), jnp.arange(n), side="right")


def by_islands(key: Array, log_weights: Array, islands: int, threshold: Array) -> tuple[Array, Array]:
    """Resamples within each of I islands, N/I chains in a row, whose relative effective sample size is too small.

    An island's chains share what its weights were on average, so that islands keep their own evidence.

    Args:
        key: for all of them.
        log_weights: (N,).
        islands: I.
        threshold: islands below it are resampled.

    Returns:
        The indices of the chains that take their places, (N,), and their log-weights less the log of the mean of all.

    References:
        Vergé, Dubarry, Del Moral and Moulines 2015, *On parallel implementation of sequential Monte Carlo methods: the
        island particle model*.
    """
    rows = log_weights.reshape(islands, -1)
    size = rows.shape[1]
    chosen = jax.vmap(systematic)(jax.random.split(key, islands), rows) + size * jnp.arange(islands)[:, None]
    poor = (jax.vmap(relative_ess)(rows) < threshold)[:, None]
    means = jax.vmap(log_mean_weight)(rows)[:, None]
    chosen = jnp.where(poor, chosen, jnp.arange(islands * size).reshape(rows.shape)).reshape(-1)
    left = jnp.where(poor, means, rows).reshape(-1) - log_mean_weight(log_weights)
    return chosen, jnp.where(jnp.isnan(left), -jnp.inf, left)


def cumulated(whole: Array, parts: Array) -> tuple[Array, Array]:
    """Cumulative sums of whole + parts/2³², exact: (parts, whole), each unsigned of 32 bits."""
    parts_sum = jnp.cumsum(parts, dtype=jnp.uint32)
    carried = (parts_sum < parts).astype(jnp.uint32)  # the sum has just passed 2³²
    return parts_sum, jnp.cumsum(whole + carried, dtype=jnp.uint32)


def relative_weights(log_weights: Array) -> Array:
    """Weights in units of the largest one, (N,); all 0 where none is positive."""
    greatest = jnp.max(log_weights)
    return jnp.exp(log_weights - jnp.where(jnp.isfinite(greatest), greatest, 0.0))


def log_mean_weight(log_weights: Array) -> Array:
    """log of the mean weight, a scalar."""
    return jax.nn.logsumexp(log_weights) - jnp.log(log_weights.shape[0])


def evidence_variance(log_weights: Array, ancestors: Array) -> Array:
    """The relative variance of the estimated evidence, from one run, a scalar: Σ_e (W_e − 1/N)²·N/(N − 1).

    W_e is the share of the weight, before the last resampling, of all chains that descend from first chain e. Where no
    chain was ever copied it is the variance of the mean weight of N independent chains.

    Args:
        log_weights: (N,).
        ancestors: the first chain that each descends from, (N,) of 0 … N − 1.

    References:
        Chan and Lai 2013; Lee and Whiteley 2018, *Variance estimation in the particle filter*.
    """
    n = log_weights.shape[0]
    weights = relative_weights(log_weights)
    shares = jnp.zeros((n,)).at[ancestors].add(weights / jnp.maximum(jnp.sum(weights), 1e-30))
    return jnp.sum((shares - 1 / n) ** 2) * (n / max(n - 1, 1))


def step_taken(log_weights: Array, gains: Array, moved: Array) -> tuple[Array, Array]:
    """What a step to a level did to the weights and to the chains, two scalars.

    Args:
        log_weights: before it, (N,).
        gains: what it added to them, (N,); NaN counts as −∞.
        moved: how far its second order moved each chain, (N,).

    Returns:
        The relative variance of e^gain under the weights, Σ W·Σ W·w²/(Σ W·w)² − 1 = 1/CESS − 1, infinite where no chain
        is left; and the weighted mean of ``moved``, of those chains where it is finite.
    """
    weights, gains = relative_weights(log_weights), jnp.where(jnp.isnan(gains), -jnp.inf, gains)
    growth = relative_weights(jnp.where(weights > 0, gains, -jnp.inf))
    variance = jnp.sum(weights) * jnp.sum(weights * growth**2) / jnp.sum(weights * growth) ** 2 - 1
    fine = jnp.isfinite(moved)
    mean = jnp.sum(jnp.where(fine, weights * moved, 0.0)) / jnp.maximum(jnp.sum(weights * fine), 1e-30)
    return jnp.where(jnp.isnan(variance), jnp.inf, jnp.maximum(variance, 0.0)), mean


def distinct(ancestors: Array) -> Array:
    """How many different first chains are left, a scalar."""
    return jnp.sum(jnp.zeros((ancestors.shape[0],), jnp.int32).at[ancestors].max(1))
