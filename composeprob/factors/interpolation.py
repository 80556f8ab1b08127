"""A function of log-SNR known at some levels: a smooth curve through them."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def interpolate(knots: Array, values: Array, at: Array) -> Array:
    """The cubic Hermite curve through ``values``, whose slopes are those of the parabolas through three knots.

    Exact at the knots; straight lines outside of them, as log-normalisers are in log-SNR where there is no signal, and
    (with slope 0) where there is no noise.

    Args:
        knots: increasing, shape (n,).
        values: shape (n, …).
        at: where to evaluate, a scalar; differentiable.

    Returns:
        Shape (…).
    """
    if len(knots) == 1:
        return values[0]
    i = jnp.clip(jnp.searchsorted(knots, at, side="right") - 1, 0, len(knots) - 2)
    slopes = _slopes(knots, values)
    width = knots[i + 1] - knots[i]
    t = (at - knots[i]) / width
    inside = jnp.clip(t, 0.0, 1.0)
    rest = (t - inside) * width
    rise = values[i + 1] - values[i]
    curve = (
        values[i]
        + inside**2 * (3 - 2 * inside) * rise
        + inside * (1 - inside) * width * ((1 - inside) * slopes[i] - inside * slopes[i + 1])
    )
    return curve + rest * jnp.where(t < 0, slopes[i], slopes[i + 1])


def _slopes(knots: Array, values: Array) -> Array:
    width = jnp.diff(knots).reshape((-1,) + (1,) * (values.ndim - 1))
    secant = jnp.diff(values, axis=0) / width
    inner = (secant[:-1] * width[1:] + secant[1:] * width[:-1]) / (width[1:] + width[:-1])
    return jnp.concatenate([secant[:1], inner, secant[-1:]])
