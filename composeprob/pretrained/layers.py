"""Layers of other people's networks: images are (height, width, channels), sequences (length, channels), no batch axis.

A layer takes its arrays from `tensors.Arrays` and with them its sizes; what goes into it is checked against what comes
before. The names of the fields are the names in the files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from composeprob.errors import LoadError
from composeprob.pretrained.tensors import Arrays


def convolve(x: Array, kernel: Array, strides: tuple[int, int], padding: Sequence[tuple[int, int]]) -> Array:
    """An image (height, width, in) with a kernel (height, width, in, out)."""
    return jax.lax.conv_general_dilated(x[None], kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))[
        0
    ]


class Conv(eqx.Module):
    """A convolution with channels last, zero outside of the image; kernel (height, width, in, out).

    Args:
        inputs: channels of what comes before; None for any.
        size: of the kernel; None for any.
        stride: None for the kernel's size.
        padding: zeros at each side, or at the near and the far ones; left out, as many as keep the image's size.
        bias: whether there is one.
    """

    weight: Array
    bias: Array | None
    stride: int = eqx.field(static=True)
    padding: tuple[tuple[int, int], tuple[int, int]] = eqx.field(static=True)

    def __init__(
        self,
        arrays: Arrays,
        inputs: int | None = None,
        size: int | None = 3,
        *,
        stride: int | None = 1,
        padding: int | tuple[int, int] | None = None,
        bias: bool = True,
    ):
        self.weight = arrays.take("weight", None, inputs, size, size, axes=(2, 3, 1, 0))
        rows, columns, _, outputs = self.weight.shape
        if rows != columns:
            raise arrays.foreign(f"{arrays.prefix}weight is a convolution of {rows} by {columns} pixels")
        self.bias = arrays.take("bias", outputs) if bias else None
        pad = (rows - 1) // 2 if padding is None else padding
        sides = (pad, pad) if isinstance(pad, int) else pad
        self.stride, self.padding = rows if stride is None else stride, (sides, sides)

    @property
    def outputs(self) -> int:
        """Channels of the output."""
        return self.weight.shape[-1]

    def __call__(self, x: Array) -> Array:
        if self.weight.shape[:2] == (1, 1) and self.stride == 1:
            y = x @ self.weight[0, 0]
        else:
            y = convolve(x, self.weight, (self.stride, self.stride), self.padding)
        return y if self.bias is None else y + self.bias

    def enlarged(self, x: Array) -> Array:
        """The convolution, of 3×3, of the image with every pixel repeated 2×2.

        Of three neighbouring pixels two are the same, so that four convolutions of 2×2, one for each place in a block
        of 2×2, give it with 4/9 of the products.
        """
        first, middle, last = self.weight
        rows = [jnp.stack([first, middle + last]), jnp.stack([first + middle, last])]
        blocks = []
        for a, kernel in enumerate(rows):
            left, centre, right = kernel[:, 0], kernel[:, 1], kernel[:, 2]
            columns = [jnp.stack([left, centre + right], 1), jnp.stack([left + centre, right], 1)]
            blocks.append([convolve(x, k, (1, 1), [(1 - a, a), (1 - b, b)]) for b, k in enumerate(columns)])
        y = jnp.stack([jnp.stack(row, 2) for row in blocks], 1)
        y = y.reshape(2 * x.shape[0], 2 * x.shape[1], -1)
        return y if self.bias is None else y + self.bias


class Linear(eqx.Module):
    """x·W + b over the last axis; W (in, out)."""

    weight: Array
    bias: Array | None

    def __init__(self, arrays: Arrays, inputs: int | None = None, outputs: int | None = None, bias: bool = True):
        self.weight = arrays.take("weight", outputs, inputs, axes=(1, 0))
        self.bias = arrays.take("bias", self.outputs) if bias else None

    @property
    def inputs(self) -> int:
        """Channels of what goes in."""
        return self.weight.shape[0]

    @property
    def outputs(self) -> int:
        """Channels of the output."""
        return self.weight.shape[1]

    def __call__(self, x: Array) -> Array:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


class Embedding(eqx.Module):
    """A row of a table for each index."""

    weight: Array

    def __init__(self, arrays: Arrays, width: int | None = None):
        self.weight = arrays.take("weight", None, width)

    def __call__(self, index: Array) -> Array:
        return self.weight[jnp.asarray(index)]


class GroupNorm(eqx.Module):
    """Normalises each group of channels over the whole image, in float32."""

    weight: Array
    bias: Array
    groups: int = eqx.field(static=True)
    eps: float = eqx.field(static=True)

    def __init__(self, arrays: Arrays, groups: int, channels: int, eps: float):
        check_split(arrays, channels, groups, "groups of a norm")
        self.weight, self.bias = arrays.take("weight", channels), arrays.take("bias", channels)
        self.groups, self.eps = groups, float(eps)

    def __call__(self, x: Array) -> Array:
        # Sums over places first, channel by channel: along the channels, groups of few are slow on every processor.
        pixels = x.astype(jnp.float32).reshape(-1, x.shape[-1])
        mean = self._group_means(pixels.mean(0))
        scale = self.weight * jax.lax.rsqrt(self._group_means(jnp.mean((pixels - mean) ** 2, 0)) + self.eps)
        return (pixels * scale + (self.bias - mean * scale)).reshape(x.shape).astype(x.dtype)

    def _group_means(self, channels: Array) -> Array:
        """Each channel's mean over its group."""
        means = channels.reshape(self.groups, -1).mean(-1)
        return jnp.repeat(means, channels.shape[0] // self.groups)


def normalised(x: Array, eps: float) -> Array:
    """A layer norm without weights, in float32."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + eps)).astype(x.dtype)


class LayerNorm(eqx.Module):
    """Normalises the last axis, in float32; ``weight`` and ``bias`` are None where the file has none."""

    weight: Array | None
    bias: Array | None
    eps: float = eqx.field(static=True)

    def __init__(self, arrays: Arrays, width: int, eps: float, affine: bool = True):
        self.weight = arrays.take("weight", width) if affine else None
        self.bias = arrays.take("bias", width) if affine else None
        self.eps = float(eps)

    def __call__(self, x: Array) -> Array:
        y = normalised(x.astype(jnp.float32), self.eps)
        return (y if self.weight is None or self.bias is None else y * self.weight + self.bias).astype(x.dtype)


class RMSNorm(eqx.Module):
    """Divides by the root mean square of the last axis, in float32."""

    weight: Array
    eps: float = eqx.field(static=True)

    def __init__(self, arrays: Arrays, width: int, eps: float):
        self.weight, self.eps = arrays.take("weight", width), float(eps)

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        y = wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + self.eps)
        return (y * self.weight).astype(x.dtype)


def check_split(arrays: Arrays, channels: int, count: int, what: str) -> None:
    """Refuses channels that cannot be split into equal parts.

    Raises:
        LoadError: it names the layer and the two numbers.
    """
    if channels % count:
        raise LoadError(
            f"{arrays.prefix[:-1]} in {arrays.where} has {channels} channels, which {count} {what} cannot split.",
            fix="take config.json and the weights from one source: it gives the number of groups and of heads.",
        )


def exact_gelu(x: Array) -> Array:
    """x·Φ(x)."""
    return jax.nn.gelu(x, approximate=False)


def quick_gelu(x: Array) -> Array:
    """x·sigmoid(1.702·x), CLIP's approximation."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "elu": jax.nn.elu,
    "gelu": exact_gelu,
    "gelu_new": jax.nn.gelu,
    "identity": lambda x: x,
    "mish": jax.nn.mish,
    "quick_gelu": quick_gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}
"""By the names that config files use."""


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
