"""Layers of other people's networks: images are (height, width, channels), sequences (length, channels), no batch axis.

A layer takes its arrays from `tensors.Arrays`, by their names in the files, and with them its sizes; the arrays are
checked against what goes in whenever it is traced, the first time before any of them is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from composeprob.errors import LoadError
from composeprob.pretrained.tensors import Arrays


def convolve(
    arrays: Arrays,
    x: Array,
    size: int | None = 3,
    outputs: int | None = None,
    *,
    stride: int | None = 1,
    padding: int | tuple[int, int] | None = None,
    bias: bool = True,
) -> Array:
    """A convolution with channels last, zero outside of the image; kernel (height, width, in, out).

    Args:
        arrays: of the layer.
        x: the image.
        size: of the kernel; None for any.
        outputs: channels of the output; None for any.
        stride: None for the kernel's size.
        padding: zeros at each side, or at the near and the far ones; left out, as many as keep the image's size.
        bias: whether there is one.
    """
    kernel = arrays.take("weight", outputs, x.shape[-1], size, size)
    rows, columns = kernel.shape[:2]
    if rows != columns:
        raise arrays.foreign(f"{arrays.prefix}weight is a convolution of {rows} by {columns} pixels")
    x = x.astype(kernel.dtype)
    if rows == stride == 1:
        return _with_bias(arrays, x @ kernel[0, 0], bias)
    pad = (rows - 1) // 2 if padding is None else padding
    sides = (pad, pad) if isinstance(pad, int) else pad
    return _with_bias(arrays, _convolved(x, kernel, rows if stride is None else stride, (sides, sides)), bias)


def convolve_enlarged(arrays: Arrays, x: Array) -> Array:
    """The convolution, of 3×3, of the image with every pixel repeated 2×2.

    Of three neighbouring pixels two are the same, so that four convolutions of 2×2, one for each place in a block of
    2×2, give it with 4/9 of the products.
    """
    first, middle, last = arrays.take("weight", None, x.shape[-1], 3, 3)
    rows = [jnp.stack([first, middle + last]), jnp.stack([first + middle, last])]
    blocks = []
    for a, kernel in enumerate(rows):
        left, centre, right = kernel[:, 0], kernel[:, 1], kernel[:, 2]
        columns = [jnp.stack([left, centre + right], 1), jnp.stack([left + centre, right], 1)]
        blocks.append([_convolved(x, k, 1, [(1 - a, a), (1 - b, b)]) for b, k in enumerate(columns)])
    y = jnp.stack([jnp.stack(row, 2) for row in blocks], 1)
    return _with_bias(arrays, y.reshape(2 * x.shape[0], 2 * x.shape[1], -1), True)


def _convolved(x: Array, kernel: Array, stride: int, padding: Sequence[tuple[int, int]]) -> Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x[None], kernel, (stride, stride), padding, dimension_numbers=layout)[0]


def _with_bias(arrays: Arrays, y: Array, bias: bool) -> Array:
    return y + arrays.take("bias", y.shape[-1]) if bias else y


def linear(arrays: Arrays, x: Array, outputs: int | None = None, bias: bool = True) -> Array:
    """x·Wᵀ + b over the last axis; W (out, in)."""
    weight = arrays.take("weight", outputs, x.shape[-1])
    return _with_bias(arrays, x.astype(weight.dtype) @ weight.T, bias)


def embed(arrays: Arrays, index: Array, width: int | None = None) -> Array:
    """A row of a table for each index."""
    return arrays.take("weight", None, width)[index]


def group_norm(arrays: Arrays, x: Array, groups: int, eps: float) -> Array:
    """Normalises each group of channels over the whole image, in float32."""
    channels = x.shape[-1]
    check_split(arrays, channels, groups, "groups of a norm")
    weight, bias = arrays.take("weight", channels), arrays.take("bias", channels)

    def group_means(each: Array) -> Array:
        return jnp.repeat(each.reshape(groups, -1).mean(-1), channels // groups)

    # Sums over places first, channel by channel: along the channels, groups of few are slow on every processor.
    pixels = x.astype(jnp.float32).reshape(-1, channels)
    mean = group_means(pixels.mean(0))
    scale = weight * jax.lax.rsqrt(group_means(jnp.mean((pixels - mean) ** 2, 0)) + eps)
    return (pixels * scale + (bias - mean * scale)).reshape(x.shape).astype(x.dtype)


def normalised(x: Array, eps: float) -> Array:
    """A layer norm without weights, in float32."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + eps)).astype(x.dtype)


def layer_norm(arrays: Arrays, x: Array, eps: float) -> Array:
    """Normalises the last axis, in float32."""
    width = x.shape[-1]
    y = normalised(x.astype(jnp.float32), eps)
    return (y * arrays.take("weight", width) + arrays.take("bias", width)).astype(x.dtype)


def rms_norm(arrays: Arrays, x: Array, eps: float) -> Array:
    """Divides by the root mean square of the last axis, in float32."""
    wide = x.astype(jnp.float32)
    y = wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + eps)
    return (y * arrays.take("weight", x.shape[-1])).astype(x.dtype)


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


def sinusoids(t: Array, width: int, cosine_first: bool = True, shift: float = 0.0, scale: float = 1.0) -> Array:
    """sin(ω_i·s·t) and cos(ω_i·s·t) of one number, ω_i = 10000^(−i/(w/2 − shift)); shape (w,).

    Args:
        t: the number.
        width: w.
        cosine_first: whether the cosines come before the sines.
        shift: of the exponent's denominator.
        scale: s.
    """
    half = width // 2
    if half == shift:
        raise ValueError(f"no frequencies for {width} numbers with the shift {shift}")
    # In single precision as the networks were trained with: at t = 999 the seventh digit of ω shows in the sine.
    exponent = np.float32(-math.log(10000)) * np.arange(half, dtype=np.float32) / np.float32(half - shift)
    angle = jnp.asarray(t, jnp.float32) * np.float32(scale) * np.exp(exponent, dtype=np.float32)
    return jnp.pad(waves(angle, cosine_first), (0, width % 2))


def fourier(arrays: Arrays, t: Array, width: int, cosine_first: bool) -> Array:
    """sin(2π·w_i·t) and cos(2π·w_i·t) with given w; shape (2·len(w),)."""
    return waves(jnp.asarray(t, jnp.float32) * arrays.take("weight", width // 2) * 2 * np.pi, cosine_first)


def waves(angle: Array, cosine_first: bool) -> Array:
    """Sines and cosines, or the cosines first."""
    parts = [jnp.sin(angle), jnp.cos(angle)]
    return jnp.concatenate(parts[::-1] if cosine_first else parts)


def mlp(arrays: Arrays, x: Array, outputs: int | None = None, activation: str = "silu") -> Array:
    """Two linear layers with an activation between them."""
    return linear(arrays / "linear_2", ACTIVATIONS[activation](linear(arrays / "linear_1", x)), outputs)


def patches(arrays: Arrays, x: Array, sample_size: int | None = None) -> Array:
    """Patches of an image as a sequence, the embeddings of their places added.

    Args:
        arrays: with the places' embeddings ``pos_embed`` (1, places², width), of which an image gets the middle.
        x: the image.
        sample_size: rows of the images of the training, for sinusoids in their place.
    """
    hidden = convolve(arrays / "proj", x, None, stride=None, padding=0)
    rows, columns, width = hidden.shape
    if sample_size is not None:
        places = jnp.asarray(grid_sinusoids(width, rows, columns, sample_size * rows // x.shape[0]))
    else:
        table = arrays.take("pos_embed", 1, None, width)
        side = math.isqrt(table.shape[1])
        if side**2 != table.shape[1] or side < max(rows, columns):
            raise arrays.foreign(
                f"its {table.shape[1]} embeddings of places are those of no square of {rows}×{columns} patches or more"
            )
        top, left = (side - rows) // 2, (side - columns) // 2
        places = table.reshape(side, side, width)[top : top + rows, left : left + columns].reshape(-1, width)
    return hidden.reshape(-1, width) + places.astype(hidden.dtype)


def image_of(sequence: Array, height: int, width: int) -> Array:
    """The image of a sequence of square patches, each (size, size, channels) in a row."""
    size = math.isqrt(height * width // sequence.shape[0])
    split = sequence.reshape(height // size, width // size, size, size, -1)
    return split.transpose(0, 2, 1, 3, 4).reshape(height, width, -1)


def grid_sinusoids(width: int, rows: int, columns: int, base: float) -> np.ndarray:
    """Fixed embeddings of a grid's places, (rows·columns, width): half of each for the column, half for the row.

    Args:
        width: a multiple of 4.
        rows, columns: of the grid, whose places run from 0 to ``base``.
        base: the grid's size at which the network was trained.
    """
    omega = 1.0 / 10000 ** (np.arange(width // 4) / (width / 4))

    def of_places(places: np.ndarray) -> np.ndarray:
        angle = places.reshape(-1, 1) * omega
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)

    row = np.arange(rows, dtype=np.float32) / np.float32(rows / base)
    column = np.arange(columns, dtype=np.float32) / np.float32(columns / base)
    across, down = np.meshgrid(column, row)
    return np.concatenate([of_places(across), of_places(down)], axis=1).astype(np.float32)
