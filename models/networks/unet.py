"""A small UNet for images, in Flax NNX: patches of 2×2 pixels, three resolutions, conditions by FiLM or as channels."""

from __future__ import annotations

from itertools import pairwise

import jax.numpy as jnp
from flax import nnx
from jax import Array

from .conditioning import log_snr_features
from .convolution import Conv3x3


class Block(nnx.Module):
    """x + W₂·swish(FiLM(GroupNorm(W₁·swish(GroupNorm(x))))), W convolutions of 3×3, with W₂ = 0 at first.

    FiLM is h·(1 + a) + b with (a, b) a linear function of the embedding.
    """

    def __init__(self, width: int, embedding: int, *, rngs: nnx.Rngs):
        self.norm = group_norm(width, rngs)
        self.enter = Conv3x3(width, width, rngs=rngs)
        self.inner_norm = group_norm(width, rngs)
        self.film = nnx.Linear(embedding, 2 * width, kernel_init=nnx.initializers.zeros, rngs=rngs)
        self.leave = Conv3x3(width, width, zero=True, rngs=rngs)

    def __call__(self, x: Array, embedding: Array) -> Array:
        gain, shift = jnp.split(self.film(embedding), 2)
        h = self.inner_norm(self.enter(nnx.swish(self.norm(x))))
        return x + self.leave(nnx.swish(h * (1 + gain) + shift))


class UNet(nnx.Module):
    """From an image (h, w, channels) with sides divisible by 8 to an array of the same shape, zero at first.

    Args:
        channels: of the image.
        spatial: further channels of input, of the image's height and width.
        vector: length of a vector that joins the time in the embedding; 0 without one.
        widths: channels at each resolution, from half the image's down to an eighth.
        blocks: residual blocks at each resolution on the way down, and again on the way up.
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
        self.features = 32
        self.time = nnx.Linear(self.features, embedding, rngs=rngs)
        self.vector = nnx.Linear(vector, embedding, rngs=rngs) if vector else None
        self.mix = nnx.Linear(embedding, embedding, rngs=rngs)
        self.stem = Conv3x3(4 * (channels + spatial), widths[0], rngs=rngs)

        def stage(width: int) -> nnx.List:
            return nnx.List(Block(width, embedding, rngs=rngs) for _ in range(blocks))

        steps = list(pairwise(widths))
        self.down = nnx.List(stage(width) for width in widths)
        self.shrink = nnx.List(nnx.Linear(4 * narrow, wide, rngs=rngs) for narrow, wide in steps)
        self.grow = nnx.List(nnx.Linear(wide, 4 * narrow, rngs=rngs) for narrow, wide in steps)
        self.up = nnx.List(stage(width) for width in widths[:-1])
        self.norm = group_norm(widths[0], rngs)
        self.head = Conv3x3(widths[0], 4 * channels, zero=True, rngs=rngs)

    def __call__(self, x: Array, t: Array, spatial: Array | None = None, vector: Array | None = None) -> Array:
        """The output for one image x at log-SNR t, with ``spatial`` (h, w, s) and ``vector`` (v,)."""
        h = self.time(log_snr_features(t, self.features))
        if self.vector is not None:
            h = h + self.vector(vector)
        embedding = nnx.swish(self.mix(nnx.swish(h)))
        h = self.stem(to_patches(x if spatial is None else jnp.concatenate([x, spatial], axis=-1)))
        skips = []
        for i, stage in enumerate(self.down):
            if i:
                skips.append(h)
                h = self.shrink[i - 1](to_patches(h))
            for block in stage:
                h = block(h, embedding)
        for i in reversed(range(len(self.up))):
            h = skips[i] + from_patches(self.grow[i](h))
            for block in self.up[i]:
                h = block(h, embedding)
        return from_patches(self.head(nnx.swish(self.norm(h))))


def to_patches(x: Array) -> Array:
    """(h, w, c) to (h/2, w/2, 4c): every 2×2 pixels as one."""
    height, width, channels = x.shape
    blocks = x.reshape(height // 2, 2, width // 2, 2, channels)
    return blocks.transpose(0, 2, 1, 3, 4).reshape(height // 2, width // 2, 4 * channels)


def from_patches(x: Array) -> Array:
    """(h, w, 4c) to (2h, 2w, c): the inverse of `to_patches`."""
    height, width, channels = x.shape
    blocks = x.reshape(height, width, 2, 2, channels // 4)
    return blocks.transpose(0, 2, 1, 3, 4).reshape(2 * height, 2 * width, channels // 4)


def heat_map(position: Array, shape: tuple[int, int], width: float = 0.06) -> Array:
    """A bump exp(−‖p − position‖²/2·width²) over the image's points p, shape (h, w, 1).

    Positions are (x, y) in image widths; one far outside gives zeros, which is how "no position" is said.
    """
    height, columns = shape
    y, x = ((jnp.arange(size) + 0.5) / columns for size in (height, columns))
    squared = (y - position[1])[:, None] ** 2 + (x - position[0])[None, :] ** 2
    return jnp.exp(-squared / (2 * width**2))[..., None]


def coordinates(shape: tuple[int, int]) -> Array:
    """Every pixel's (x, y) from −1 to 1, shape (h, w, 2)."""
    y, x = (2 * (jnp.arange(size) + 0.5) / size - 1 for size in shape)
    return jnp.stack(jnp.meshgrid(x, y), axis=-1)


def group_norm(width: int, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """GroupNorm over 8 groups."""
    return nnx.GroupNorm(width, num_groups=8, rngs=rngs)
