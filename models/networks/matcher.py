"""Fit of a text to a place in an image, in Flax NNX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from .convolution import Conv3x3
from .film import Embedded
from .unet import block, coordinates, group_norm, to_patches


class Matcher(Embedded):
    """Fit of a text to an image, log mean_p exp⟨u_p(x, t), v⟩ over its places p.

    v is the text's vector. Features u_p are of patches of 2×2 pixels, from residual
    blocks with a receptive field of about 26 pixels and coordinates as inputs.

    Args:
        channels: channels of the image.
        vector: length of v.
        width: channels of the blocks.
        blocks: number of blocks.
        embedding: length of the embedding of the log-SNR.
        rngs: for the initial weights.
    """

    def __init__(
        self,
        channels: int,
        vector: int,
        *,
        width: int = 48,
        blocks: int = 3,
        embedding: int = 128,
        rngs: nnx.Rngs,
    ):
        super().__init__(0, embedding, rngs=rngs)
        self.stem = Conv3x3(4 * (channels + 2), width, rngs=rngs)
        self.blocks = nnx.List(block(width, embedding, rngs) for _ in range(blocks))
        self.norm = group_norm(width, rngs)
        self.leave = nnx.Linear(width, vector, rngs=rngs)

    def __call__(self, x: Array, t: Array, vector: Array) -> Array:
        """Return the fit of one image x at log-SNR t with one vector, a scalar."""
        embedding = self.embed(t, None)
        located = jnp.concatenate([x, coordinates(x.shape[:2])], axis=-1)
        h = self.stem(to_patches(located))
        for residual in self.blocks:
            h = residual(h, embedding)
        features = self.leave(nnx.swish(self.norm(h)))
        fits = features @ vector / vector.size**0.5
        return jax.nn.logsumexp(fits) - jnp.log(fits.size)
