"""A small UNet of images, in Flax NNX.

It has patches of 2×2 pixels, three resolutions, and conditions by FiLM or as channels.
"""

from __future__ import annotations

from itertools import pairwise

import jax.numpy as jnp
from flax import nnx
from jax import Array

from .convolution import Conv3x3
from .film import Embedded, FiLMBlock


def block(width: int, embedding: int, rngs: nnx.Rngs) -> FiLMBlock:
    """Return a block with GroupNorm of rows and convolutions of 3×3."""

    def norm() -> nnx.GroupNorm:
        return group_norm(width, rngs)

    def layer(zero: bool) -> Conv3x3:
        return Conv3x3(width, width, zero=zero, rngs=rngs)

    return FiLMBlock(norm, layer, width, embedding, rngs=rngs)


class UNet(Embedded):
    """Network from an image to an array of the same shape, zero at first.

    Images are (h, w, channels), with sides divisible by 8.

    Args:
        channels: channels of the image.
        spatial: further channels of input, of the image's height and width.
        vector: length of a vector that joins the time in the embedding; 0 without one.
        widths: channels at each resolution, from half the image's down to an eighth.
        blocks: residual blocks at each resolution on the way down, and again on the way
            up.
        embedding: length of the embedding of time and vector.
        rngs: for the initial weights.

    References:
        Ronneberger et al. 2015, *U-Net*; Perez et al. 2018, *FiLM*.
    """

    def __init__(
        self,
        channels: int,
        *,
        spatial: int = 0,
        vector: int = 0,
        widths: tuple[int, ...] = (32, 64, 128),
        blocks: int = 2,
        embedding: int = 128,
        rngs: nnx.Rngs,
    ):
        super().__init__(vector, embedding, rngs=rngs)
        self.stem = Conv3x3(4 * (channels + spatial), widths[0], rngs=rngs)

        def stage(width: int) -> nnx.List:
            return nnx.List(block(width, embedding, rngs) for _ in range(blocks))

        steps = list(pairwise(widths))
        self.down = nnx.List(stage(width) for width in widths)
        self.shrink = nnx.List(
            nnx.Linear(4 * narrow, wide, rngs=rngs) for narrow, wide in steps
        )
        self.grow = nnx.List(
            nnx.Linear(wide, 4 * narrow, rngs=rngs) for narrow, wide in steps
        )
        self.up = nnx.List(stage(width) for width in widths[:-1])
        self.norm = group_norm(widths[0], rngs)
        self.head = Conv3x3(widths[0], 4 * channels, zero=True, rngs=rngs)

    def __call__(
        self,
        x: Array,
        t: Array,
        spatial: Array | None = None,
        vector: Array | None = None,
    ) -> Array:
        """Return the output for one image x at log-SNR t.

        ``spatial`` is (h, w, s), and ``vector`` (v,).
        """
        embedding = self.embed(t, vector)
        inputs = x
        if spatial is not None:
            inputs = jnp.concatenate([x, spatial], axis=-1)
        h = self.stem(to_patches(inputs))
        skips = []
        for i, stage in enumerate(self.down):
            if i:
                skips.append(h)
                h = self.shrink[i - 1](to_patches(h))
            for residual in stage:
                h = residual(h, embedding)
        for i in reversed(range(len(self.up))):
            h = skips[i] + from_patches(self.grow[i](h))
            for residual in self.up[i]:
                h = residual(h, embedding)
        return from_patches(self.head(nnx.swish(self.norm(h))))


def to_patches(x: Array) -> Array:
    """Return (h, w, c) as (h/2, w/2, 4c): every 2×2 pixels as one."""
    height, width, channels = x.shape
    rows = height // 2
    columns = width // 2
    blocks = x.reshape(rows, 2, columns, 2, channels)
    return blocks.transpose(0, 2, 1, 3, 4).reshape(rows, columns, 4 * channels)


def from_patches(x: Array) -> Array:
    """Return (h, w, 4c) as (2h, 2w, c): the inverse of `to_patches`."""
    height, width, channels = x.shape
    blocks = x.reshape(height, width, 2, 2, channels // 4)
    return blocks.transpose(0, 2, 1, 3, 4).reshape(2 * height, 2 * width, channels // 4)


def heat_map(position: Array, shape: tuple[int, int], width: float = 0.06) -> Array:
    """Return a bump exp(−‖p − position‖²/2·width²) over an image's points p, (h, w, 1).

    Positions are (x, y) in image widths. One far outside gives zeros, the encoding of
    "no position".
    """
    rows, columns = shape
    y = (jnp.arange(rows) + 0.5) / columns
    x = (jnp.arange(columns) + 0.5) / columns
    squared = (y - position[1])[:, None] ** 2 + (x - position[0])[None, :] ** 2
    return jnp.exp(-squared / (2 * width**2))[..., None]


def coordinates(shape: tuple[int, int]) -> Array:
    """Return every pixel's (x, y) from −1 to 1, shape (h, w, 2)."""
    y, x = (2 * (jnp.arange(size) + 0.5) / size - 1 for size in shape)
    return jnp.stack(jnp.meshgrid(x, y), axis=-1)


def group_norm(width: int, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """Return GroupNorm over 8 groups, of each row of an image (h, w, channels) alone.

    Flax takes the first axis for a batch's. The zoo's weights were trained with it.
    """
    return nnx.GroupNorm(width, num_groups=8, rngs=rngs)
