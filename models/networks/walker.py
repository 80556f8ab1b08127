"""A network of walks through rooms: it corrects a Gaussian, and sees each point beside
the doors around it."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from ..worlds import rooms
from .residual_mlp_eqx import ResidualMLP

SHARP = 0.3
"""Doors are averaged around a place with a Gaussian of at least this width."""
BESIDE = (-0.5, 0.0, 0.5)
"""Where the doors are looked at, beside a point."""
COARSEST = 0.5
"""Above this standard deviation of a principal component, scores vary on this scale,
not on that of the component."""


class Walker(eqx.Module):
    """The noise ε̂ in walks (points, 2), on a variance-preserving schedule.

    z are the principal components of the walk, divided by their standard deviation c =
    √(α²·v + σ²) under noise,

        ε̂ = σ·U(z + F·c/d)/c,   d² = α²·min(v, COARSEST²) + σ²,

    so that F = 0 is the Gaussian of the data's covariance U·v·Uᵀ. F sees z, and for
    each point what that Gaussian says of where it is, a mean and a spread s: the place
    within a room by sine and cosine; and how near doors are, and how high, averaged
    over places with a kernel of width √(s² + SHARP²). These features are the same in
    every room.

    Args:
        points: of a walk.
        samples: walks (n, points, 2), of which to take the covariance.
        hidden, blocks: of the residual MLP.
        key: for the initial weights.
    """

    network: ResidualMLP
    axes: Array
    variances: Array
    points: int = eqx.field(static=True)

    def __init__(
        self, points: int, samples: Array, *, hidden: int, blocks: int, key: Array
    ):
        inputs = points * (2 + 2 + 2 * len(BESIDE))
        self.network = ResidualMLP(
            inputs, hidden=hidden, widen=1, blocks=blocks, outputs=2 * points, key=key
        )
        second = jnp.einsum("npc,nqc->cpq", samples, samples) / len(samples)
        self.variances, self.axes = jnp.linalg.eigh(second)
        self.points = points

    def __call__(self, x: Array, t: Array, doors: Array) -> Array:
        """ε̂, shape (points, 2), for one walk x (points, 2) at log-SNR t, in rooms with
        ``doors``."""
        axes, variances = jax.lax.stop_gradient((self.axes, self.variances))
        alpha, sigma2 = jnp.sqrt(jax.nn.sigmoid(t)), jax.nn.sigmoid(-t)
        c2 = alpha**2 * variances + sigma2
        d2 = alpha**2 * jnp.minimum(variances, COARSEST**2) + sigma2
        parts = jnp.einsum("cpi,pc->ci", axes, x)
        z = parts / jnp.sqrt(c2)
        mean = jnp.einsum("pi,i->p", axes[0], alpha * variances[0] * parts[0] / c2[0])
        spread2 = jnp.einsum("pi,i->p", axes[0] ** 2, variances[0] * sigma2 / c2[0])
        inputs = jnp.concatenate([z.reshape(-1), _around(mean, spread2, doors)])
        correction = self.network(inputs, t).reshape(z.shape) / jnp.sqrt(d2)
        return jnp.sqrt(sigma2) * jnp.einsum(
            "cpi,ci->pc", axes, parts / c2 + correction
        )


def _around(mean: Array, spread2: Array, doors: Array) -> Array:
    """What lies around points of which x is known by mean and variance, for the
    network: flat."""
    angle, damped = 2 * jnp.pi * mean, jnp.exp(-2 * jnp.pi**2 * spread2)
    away = (mean[:, None] + jnp.array(BESIDE))[:, :, None] - jnp.asarray(rooms.WALLS)
    logits = -0.5 * away**2 / (spread2[:, None, None] + SHARP**2)
    near, high = jnp.exp(logits).sum(-1), jax.nn.softmax(logits, axis=-1) @ doors
    return jnp.concatenate(
        [
            damped * jnp.sin(angle),
            damped * jnp.cos(angle),
            near.reshape(-1),
            high.reshape(-1),
        ]
    )
