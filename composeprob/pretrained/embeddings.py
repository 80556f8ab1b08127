"""Embeddings of times, numbers and places: one for all networks."""

from __future__ import annotations

import math

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import Array

from composeprob.pretrained.layers import ACTIVATIONS, Conv, Linear
from composeprob.pretrained.tensors import Arrays


class Sinusoids(eqx.Module):
    """sin(ω_i·s·t) and cos(ω_i·s·t) of one number, ω_i = 10000^(−i/(w/2 − shift)); shape (w,).

    Attributes:
        width: w.
        cosine_first: whether the cosines come before the sines.
        shift: of the exponent's denominator.
        scale: s.
    """

    width: int = eqx.field(static=True)
    cosine_first: bool = eqx.field(static=True)
    shift: float = eqx.field(static=True)
    scale: float = eqx.field(static=True, default=1.0)

    def __call__(self, t: Array) -> Array:
        half = self.width // 2
        # In single precision as the networks were trained with: at t = 999 the seventh digit of ω shows in the sine.
        exponent = np.float32(-math.log(10000)) * np.arange(half, dtype=np.float32) / np.float32(half - self.shift)
        angle = jnp.asarray(t, jnp.float32) * np.float32(self.scale) * np.exp(exponent, dtype=np.float32)
        parts = [jnp.sin(angle), jnp.cos(angle)]
        embedding = jnp.concatenate(parts[::-1] if self.cosine_first else parts)
        return jnp.pad(embedding, (0, self.width % 2))


class Fourier(eqx.Module):
    """sin(2π·w_i·t) and cos(2π·w_i·t) with given w, t the logarithm of the number where ``log``; shape (2·len(w),)."""

    weight: Array
    log: bool = eqx.field(static=True)
    cosine_first: bool = eqx.field(static=True)

    def __init__(self, arrays: Arrays, width: int, log: bool, cosine_first: bool):
        self.weight, self.log, self.cosine_first = arrays.take("weight", width // 2), log, cosine_first

    def __call__(self, t: Array) -> Array:
        t = jnp.asarray(t, jnp.float32)
        angle = (jnp.log(t) if self.log else t) * self.weight * 2 * np.pi
        parts = [jnp.sin(angle), jnp.cos(angle)]
        return jnp.concatenate(parts[::-1] if self.cosine_first else parts)


class EmbeddingMLP(eqx.Module):
    """Two linear layers with an activation between them, and one after them where a network has that."""

    linear_1: Linear
    linear_2: Linear
    activation: str = eqx.field(static=True)
    last: str = eqx.field(static=True)

    def __init__(
        self,
        arrays: Arrays,
        inputs: int | None = None,
        outputs: int | None = None,
        activation: str = "silu",
        last: str | None = None,
    ):
        self.linear_1 = Linear(arrays / "linear_1", inputs)
        self.linear_2 = Linear(arrays / "linear_2", self.linear_1.outputs, outputs)
        self.activation, self.last = activation, last or "identity"

    def __call__(self, x: Array) -> Array:
        hidden = ACTIVATIONS[self.activation](self.linear_1(x.astype(self.linear_1.weight.dtype)))
        return ACTIVATIONS[self.last](self.linear_2(hidden))


class Patches(eqx.Module):
    """Patches of an image as a sequence, the embeddings of their places added.

    Attributes:
        pos_embed: the places' embeddings (1, places², width), of which an image gets the middle; None for sinusoids.
        base: rows of patches in the images of the training, which sinusoids are scaled to.

    Args:
        sample_size: rows of the images of the training, for sinusoids; None for a table.
    """

    proj: Conv
    pos_embed: Array | None
    base: int = eqx.field(static=True)

    def __init__(self, arrays: Arrays, sample_size: int | None = None):
        self.proj = Conv(arrays / "proj", size=None, stride=None, padding=0)
        self.pos_embed = arrays.take("pos_embed", 1, None, self.proj.outputs) if sample_size is None else None
        self.base = (sample_size or 0) // self.size
        if self.pos_embed is not None and self.places**2 != self.pos_embed.shape[1]:
            raise arrays.foreign(f"its {self.pos_embed.shape[1]} embeddings of places are those of no square")

    @property
    def size(self) -> int:
        """Rows and columns of a patch."""
        return self.proj.stride

    @property
    def places(self) -> int:
        """Rows and columns of the table."""
        return 0 if self.pos_embed is None else math.isqrt(self.pos_embed.shape[1])

    def __call__(self, x: Array) -> Array:
        hidden = self.proj(x)
        rows, columns, width = hidden.shape
        if self.pos_embed is None:
            places = jnp.asarray(grid_sinusoids(width, rows, columns, self.base))
        else:
            top, left = (self.places - rows) // 2, (self.places - columns) // 2
            table = self.pos_embed.reshape(self.places, self.places, width)
            places = table[top : top + rows, left : left + columns].reshape(-1, width)
        return hidden.reshape(-1, width) + places.astype(hidden.dtype)

    def image(self, sequence: Array, height: int, width: int) -> Array:
        """The image of a sequence of patches, each (size, size, channels) in a row."""
        patches = sequence.reshape(height // self.size, width // self.size, self.size, self.size, -1)
        return patches.transpose(0, 2, 1, 3, 4).reshape(height, width, -1)


def grid_sinusoids(width: int, rows: int, columns: int, base: float) -> np.ndarray:
    """Fixed embeddings of a grid's places, (rows·columns, width): half of each for the column, half for the row.

    Args:
        width: a multiple of 4.
        rows, columns: of the grid, whose places run from 0 to ``base``.
        base: the grid's size at which the network was trained.
    """
    omega = 1.0 / 10000 ** (np.arange(width // 4) / (width / 4))

    def waves(places: np.ndarray) -> np.ndarray:
        angle = places.reshape(-1, 1) * omega
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)

    row = np.arange(rows, dtype=np.float32) / np.float32(rows / base)
    column = np.arange(columns, dtype=np.float32) / np.float32(columns / base)
    across, down = np.meshgrid(column, row)
    return np.concatenate([waves(across), waves(down)], axis=1).astype(np.float32)
