"""Embedding of time and vector, and residual block, of networks with FiLM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from .conditioning import log_snr_features

FEATURES = 32
"""Number of sines and cosines of the log-SNR."""


class Embedded(nnx.Module):
    """A network with an embedding of the log-SNR, and of a vector.

    ``vector`` is the length of the vector, or 0 without one.
    """

    def __init__(self, vector: int, embedding: int, *, rngs: nnx.Rngs):
        self.time = nnx.Linear(FEATURES, embedding, rngs=rngs)
        self.vector = nnx.Linear(vector, embedding, rngs=rngs) if vector else None
        self.mix = nnx.Linear(embedding, embedding, rngs=rngs)

    def embed(self, t: Array, vector: Array | None) -> Array:
        """Return the embedding of log-SNR t and of ``vector``."""
        h = self.time(log_snr_features(t, FEATURES))
        if self.vector is not None:
            h = h + self.vector(vector)
        return nnx.swish(self.mix(nnx.swish(h)))


class FiLMBlock(nnx.Module):
    """x + W₂·swish(FiLM(norm(W₁·swish(norm(x))))), with W₂ = 0 at first.

    FiLM is h·(1 + a) + b with (a, b) a linear function of the embedding.

    Args:
        norm: ``norm()`` makes a normalisation.
        layer: ``layer(zero)`` makes W.
        width: length of x and h, or their channels.
        embedding: length of the embedding.
        rngs: for the initial weights of FiLM.

    References:
        Perez et al. 2018, *FiLM*.
    """

    def __init__(
        self,
        norm: Callable[[], Any],
        layer: Callable[[bool], Any],
        width: int,
        embedding: int,
        *,
        rngs: nnx.Rngs,
    ):
        self.norm = norm()
        self.enter = layer(False)
        self.inner_norm = norm()
        self.film = nnx.Linear(
            embedding, 2 * width, kernel_init=nnx.initializers.zeros, rngs=rngs
        )
        self.leave = layer(True)

    def __call__(self, x: Array, embedding: Array) -> Array:
        # Two products: where halves of one are cut out, XLA's CPU backend does not
        # vectorise the activation after them.
        gain_kernel, shift_kernel = jnp.split(self.film.kernel[...], 2, axis=1)
        gain_bias, shift_bias = jnp.split(self.film.bias[...], 2)
        gain = embedding @ gain_kernel + gain_bias
        shift = embedding @ shift_kernel + shift_bias
        h = self.inner_norm(self.enter(nnx.swish(self.norm(x))))
        return x + self.leave(nnx.swish(h * (1 + gain) + shift))
