"""Boards of n queens, one in each row: the rule of tokens that says which attack."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def peaceful(tokens: jax.Array, visible: jax.Array) -> jax.Array:
    """0 where no two of the visible queens attack one another, else −∞; tokens are the
    columns of the queens, (n,)."""
    i, j = np.triu_indices(len(tokens), 1)
    apart = jnp.abs(tokens[i] - tokens[j])
    attack = (apart == 0) | (apart == j - i)
    return jnp.where(jnp.any(attack & visible[i] & visible[j]), -jnp.inf, 0.0)


def are_peaceful(boards: np.ndarray) -> np.ndarray:
    """True for each board of (N, n) on which no queen attacks another."""
    lines = np.arange(boards.shape[1])
    kinds = np.stack([boards, boards + lines, boards - lines])
    return (np.diff(np.sort(kinds, -1), axis=-1) > 0).all((0, -1))
