"""A network of walks through rooms, which corrects a Gaussian.

Each point of a walk enters with the doors around it.
"""

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
"""Offsets from a point at which doors are features."""
COARSEST = 0.5
"""Greatest scale on which scores vary, in a principal component of larger deviation."""


class Walker(eqx.Module):
    """Network of the noise ε̂ in walks (points, 2), on a variance-preserving schedule.

    z are the principal components of the walk, divided by their standard deviation c =
    √(α²·v + σ²) under noise,

        ε̂ = σ·U(z + F·c/d)/c,   d² = α²·min(v, COARSEST²) + σ²,

    so that F = 0 is the Gaussian of the data's covariance U·v·Uᵀ. F takes z, and
    features of each point's x, whose mean and spread s are those of that Gaussian: the
    place within a room by sine and cosine; and distance and height of doors, averaged
    over places with a kernel of width √(s² + SHARP²). These features are the same in
    every room.

    Args:
        points: number of points of a walk.
        samples: walks (n, points, 2), from which the covariance is estimated.
        hidden, blocks: width and number of blocks of the residual MLP.
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
        """Return ε̂, shape (points, 2), for one walk x at log-SNR t, given ``doors``."""
        axes, variances = jax.lax.stop_gradient((self.axes, self.variances))
        alpha = jnp.sqrt(jax.nn.sigmoid(t))
        sigma2 = jax.nn.sigmoid(-t)
        c2 = alpha**2 * variances + sigma2
        d2 = alpha**2 * jnp.minimum(variances, COARSEST**2) + sigma2
        components = jnp.einsum("cpi,pc->ci", axes, x)
        z = components / jnp.sqrt(c2)
        # Mean and variance of the points' first coordinates given the noised walk.
        mean_components = alpha * variances[0] * components[0] / c2[0]
        mean = jnp.einsum("pi,i->p", axes[0], mean_components)
        spread2 = jnp.einsum("pi,i->p", axes[0] ** 2, variances[0] * sigma2 / c2[0])
        inputs = jnp.concatenate([z.reshape(-1), _around(mean, spread2, doors)])
        correction = self.network(inputs, t).reshape(z.shape) / jnp.sqrt(d2)
        corrected = components / c2 + correction
        return jnp.sqrt(sigma2) * jnp.einsum("cpi,ci->pc", axes, corrected)


def _around(mean: Array, spread2: Array, doors: Array) -> Array:
    """Return features of the surroundings of points, given mean and variance of x."""
    angle = 2 * jnp.pi * mean
    # E sin and E cos of a Gaussian angle are those of its mean, damped.
    damping = jnp.exp(-2 * jnp.pi**2 * spread2)
    away = (mean[:, None] + jnp.array(BESIDE))[:, :, None] - jnp.asarray(rooms.WALLS)
    logits = -0.5 * away**2 / (spread2[:, None, None] + SHARP**2)
    nearness = jnp.exp(logits).sum(-1)
    height = jax.nn.softmax(logits, axis=-1) @ doors
    return jnp.concatenate(
        [
            damping * jnp.sin(angle),
            damping * jnp.cos(angle),
            nearness.reshape(-1),
            height.reshape(-1),
        ]
    )
