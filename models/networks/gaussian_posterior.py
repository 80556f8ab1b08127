"""The score of a posterior that is nearly Gaussian: a Gaussian told from the data, and
what a network adds to it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from .film_mlp import FiLMMLP


class GaussianPosterior(nnx.Module):
    """The noise in α·θ + σ·ε, on a variance-preserving schedule, for θ whose posterior
    given x is about N(c(x), L·Lᵀ).

        ε̂ = σ·M⁻ᵀ(r + F),   r = M⁻¹(θ_k − α·c),   M·Mᵀ = α²·L·Lᵀ + σ²·I,

    so that F = 0 gives the noised Gaussian's score, at every level. c and L are of a
    network that sees x alone, which many chains share; F is of a small one that sees r.

    Args:
        size: length of θ.
        centre, scale: of the prior, in which c and L are told.
        data: some x (n, d); the first layer starts as one of these in uncorrelated
            units.
        width, blocks: of the network of r.
        embedding: of the networks of x.
        rngs: for the initial weights.
    """

    def __init__(
        self,
        size: int,
        data: Array,
        *,
        centre: tuple[float, ...],
        scale: tuple[float, ...],
        width: int,
        blocks: int,
        embedding: int,
        rngs: nnx.Rngs,
    ):
        self.size, self.centre, self.scale = size, centre, scale
        self.enter = nnx.Linear(data.shape[1], embedding, rngs=rngs)
        variances, axes = jnp.linalg.eigh(jnp.cov(data.T))
        kernel = (
            axes
            / jnp.sqrt(jnp.maximum(variances, 1e-6 * variances[-1]))
            @ self.enter.kernel[...]
        )
        self.enter.kernel[...], self.enter.bias[...] = kernel, -data.mean(0) @ kernel
        self.inner = nnx.Linear(embedding, embedding, rngs=rngs)
        self.features = nnx.Linear(embedding, embedding, rngs=rngs)
        zeros = nnx.initializers.zeros
        self.gaussian = nnx.Linear(
            embedding, size * (size + 3) // 2, kernel_init=zeros, rngs=rngs
        )
        self.body = FiLMMLP(
            size,
            size,
            vector=embedding,
            width=width,
            blocks=blocks,
            embedding=embedding,
            rngs=rngs,
        )

    def __call__(self, event: Array, t: Array, x: Array) -> Array:
        """ε̂, shape (size,), for one event at log-SNR t and one x."""
        alpha2, sigma2 = jax.nn.sigmoid(t), jax.nn.sigmoid(-t)
        h = nnx.swish(self.inner(nnx.swish(self.enter(x))))
        features = nnx.swish(self.features(h))
        told = self.gaussian(features)
        scale = jnp.array(self.scale)
        mean = jnp.array(self.centre) + scale * told[: self.size]
        log_diagonal, below = (
            told[self.size : 2 * self.size] - 2.0,
            told[2 * self.size :],
        )
        lower = (
            jnp.zeros((self.size, self.size))
            .at[jnp.tril_indices(self.size, -1)]
            .set(below)
        )
        root = (
            scale[:, None]
            * (jnp.eye(self.size) + lower)
            * jnp.exp(log_diagonal)[None, :]
        )
        factor = jnp.linalg.cholesky(
            alpha2 * root @ root.T + sigma2 * jnp.eye(self.size)
        )
        inverse = jax.scipy.linalg.solve_triangular(
            factor, jnp.eye(self.size), lower=True
        )
        r = inverse @ (event - jnp.sqrt(alpha2) * mean)
        return jnp.sqrt(sigma2) * ((r + self.body(r, t, features)) @ inverse)
