"""What networks that are told the time by FiLM share: the embedding of time and vector,
and the residual block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from .conditioning import log_snr_features

FEATURES = 32
"""Sines and cosines of the log-SNR."""


class Embedded(nnx.Module):
    """A network with an embedding of the log-SNR and, where ``vector`` > 0, of a vector
    of that length."""

    def __init__(self, vector: int, embedding: int, *, rngs: nnx.Rngs):
        self.time = nnx.Linear(FEATURES, embedding, rngs=rngs)
        self.vector = nnx.Linear(vector, embedding, rngs=rngs) if vector else None
        self.mix = nnx.Linear(embedding, embedding, rngs=rngs)

    def embed(self, t: Array, vector: Array | None) -> Array:
        """The embedding of log-SNR t and of ``vector``."""
        h = self.time(log_snr_features(t, FEATURES))
        if self.vector is not None:
            h = h + self.vector(vector)
        return nnx.swish(self.mix(nnx.swish(h)))


class FiLMBlock(nnx.Module):
    """x + W₂·swish(FiLM(norm(W₁·swish(norm(x))))), with W₂ = 0 at first.

    FiLM is h·(1 + a) + b with (a, b) a linear function of the embedding.

    Args:
        norm: makes a normalisation.
        layer: makes W, ``layer(zero)``.
        width: of x and h.
        embedding: its length.
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
        self.norm, self.enter, self.inner_norm = norm(), layer(False), norm()
        self.film = nnx.Linear(
            embedding, 2 * width, kernel_init=nnx.initializers.zeros, rngs=rngs
        )
        self.leave = layer(True)

    def __call__(self, x: Array, embedding: Array) -> Array:
        # Two products: where halves of one are cut out, XLA's CPU backend does not
        # vectorise the activation after them.
        kernel, bias = self.film.kernel[...], self.film.bias[...]
        gain, shift = (
            embedding @ k + b
            for k, b in zip(
                jnp.split(kernel, 2, axis=1), jnp.split(bias, 2), strict=True
            )
        )
        h = self.inner_norm(self.enter(nnx.swish(self.norm(x))))
        return x + self.leave(nnx.swish(h * (1 + gain) + shift))
