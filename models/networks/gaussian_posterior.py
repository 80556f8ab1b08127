"""Scores of nearly Gaussian posteriors: a Gaussian of the data, and a correction."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from .film_mlp import FiLMMLP


class GaussianPosterior(nnx.Module):
    """Network of the noise in α·θ + σ·ε, for θ with posterior of about N(c(x), L·Lᵀ).

    The schedule is variance preserving.

        ε̂ = σ·M⁻ᵀ(r + F),   r = M⁻¹(θ_k − α·c),   M·Mᵀ = α²·L·Lᵀ + σ²·I,

    so that F = 0 gives the noised Gaussian's score, at every level. c and L are outputs
    of a network of x alone, whose evaluation many chains share; F is that of a small
    network of r.

    Args:
        size: length of θ.
        centre, scale: location and scale of the prior, the units of c and L.
        data: some x (n, d); the first layer starts with their decorrelation.
        width, blocks: width and number of blocks of the network of r.
        embedding: width of the networks of x.
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
        self.size = size
        self.centre = centre
        self.scale = scale
        self.enter = nnx.Linear(data.shape[1], embedding, rngs=rngs)
        variances, axes = jnp.linalg.eigh(jnp.cov(data.T))
        deviations = jnp.sqrt(jnp.maximum(variances, 1e-6 * variances[-1]))
        kernel = axes / deviations @ self.enter.kernel[...]
        self.enter.kernel[...] = kernel
        self.enter.bias[...] = -data.mean(0) @ kernel
        self.inner = nnx.Linear(embedding, embedding, rngs=rngs)
        self.features = nnx.Linear(embedding, embedding, rngs=rngs)
        zeros = nnx.initializers.zeros
        # c, log of L's diagonal, and L below its diagonal.
        numbers = size * (size + 3) // 2
        self.gaussian = nnx.Linear(embedding, numbers, kernel_init=zeros, rngs=rngs)
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
        """Return ε̂, shape (size,), for one event at log-SNR t and one x."""
        size = self.size
        alpha2 = jax.nn.sigmoid(t)
        sigma2 = jax.nn.sigmoid(-t)
        h = nnx.swish(self.inner(nnx.swish(self.enter(x))))
        features = nnx.swish(self.features(h))
        numbers = self.gaussian(features)
        scale = jnp.array(self.scale)
        mean = jnp.array(self.centre) + scale * numbers[:size]
        # L = scale·(I + below)·diagonal. At first its diagonal is e⁻² of the prior's.
        log_diagonal = numbers[size : 2 * size] - 2.0
        lower = jnp.zeros((size, size))
        lower = lower.at[jnp.tril_indices(size, -1)].set(numbers[2 * size :])
        root = scale[:, None] * (jnp.eye(size) + lower) * jnp.exp(log_diagonal)[None, :]
        covariance = alpha2 * root @ root.T + sigma2 * jnp.eye(size)
        factor = jnp.linalg.cholesky(covariance)
        inverse = jax.scipy.linalg.solve_triangular(factor, jnp.eye(size), lower=True)
        r = inverse @ (event - jnp.sqrt(alpha2) * mean)
        return jnp.sqrt(sigma2) * ((r + self.body(r, t, features)) @ inverse)
