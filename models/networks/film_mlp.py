"""A residual MLP for small images, in Flax NNX: every pixel an input, time and a class by FiLM."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array

from .conditioning import log_snr_features


class Block(nnx.Module):
    """x + W₂·swish(FiLM(LayerNorm(W₁·swish(LayerNorm(x))))), with W₂ = 0 at first; FiLM as in `unet.Block`."""

    def __init__(self, width: int, embedding: int, *, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.enter = nnx.Linear(width, width, rngs=rngs)
        self.inner_norm = nnx.LayerNorm(width, rngs=rngs)
        self.film = nnx.Linear(embedding, 2 * width, kernel_init=nnx.initializers.zeros, rngs=rngs)
        self.leave = nnx.Linear(width, width, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, x: Array, embedding: Array) -> Array:
        gain, shift = jnp.split(self.film(embedding), 2)
        h = self.inner_norm(self.enter(nnx.swish(self.norm(x))))
        return x + self.leave(nnx.swish(h * (1 + gain) + shift))


class FiLMMLP(nnx.Module):
    """From an event of n numbers, whatever its shape, to a vector, zero at first.

    Args:
        size: n.
        outputs: length of the result.
        vector: length of a vector that joins the time in the embedding; 0 without one.
        width, blocks, embedding: of the residual blocks, and of the embedding of time and vector.
        rngs: for the initial weights.
    """

    def __init__(
        self,
        size: int,
        outputs: int,
        *,
        vector: int = 0,
        width: int = 256,
        blocks: int = 4,
        embedding: int = 128,
        rngs: nnx.Rngs,
    ):
        self.features = 32
        self.time = nnx.Linear(self.features, embedding, rngs=rngs)
        self.vector = nnx.Linear(vector, embedding, rngs=rngs) if vector else None
        self.mix = nnx.Linear(embedding, embedding, rngs=rngs)
        self.first = nnx.Linear(size, width, rngs=rngs)
        self.blocks = nnx.List(Block(width, embedding, rngs=rngs) for _ in range(blocks))
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.last = nnx.Linear(width, outputs, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, x: Array, t: Array, vector: Array | None = None) -> Array:
        """The result (outputs,) for one event x at log-SNR t, with ``vector`` (v,)."""
        h = self.time(log_snr_features(t, self.features))
        if self.vector is not None:
            h = h + self.vector(vector)
        embedding = nnx.swish(self.mix(nnx.swish(h)))
        h = self.first(x.reshape(-1))
        for block in self.blocks:
            h = block(h, embedding)
        return self.last(nnx.swish(self.norm(h)))
