"""Layers of other people's networks: images are (height, width, channels), sequences (length, channels), no batch axis.

A network is first built as a skeleton, whose arrays are `Parameter`s with a shape only; `tensors.fill` puts the
arrays of a file in their place. The names of the fields are the names in the files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array


@dataclass(frozen=True)
class Parameter:
    """An array that a file will give: its shape here, and the axes of the file's array that are moved here.

    Attributes:
        shape: as the layer wants it.
        axes: of the file's array, in the layer's order: convolution kernels are stored (out, in, height, width).
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape in the file."""
        return tuple(self.shape[self.axes.index(axis)] for axis in range(len(self.axes)))


def parameter(*shape: int, axes: tuple[int, ...] | None = None) -> Any:
    """A `Parameter`, in the place of an array, which its layer takes it for."""
    return Parameter(shape, tuple(range(len(shape))) if axes is None else axes)


def convolve(x: Array, kernel: Array, strides: tuple[int, int], padding: Sequence[tuple[int, int]]) -> Array:
    """An image (height, width, in) with a kernel (height, width, in, out)."""
    return jax.lax.conv_general_dilated(x[None], kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))[
        0
    ]


class Conv(eqx.Module):
    """A convolution with channels last, zero outside of the image; kernel (height, width, in, out)."""

    weight: Array
    bias: Array | None
    stride: int = eqx.field(static=True)
    padding: tuple[tuple[int, int], tuple[int, int]] = eqx.field(static=True)

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int = 3,
        *,
        stride: int = 1,
        padding: int | tuple[int, int] | None = None,
        bias: bool = True,
    ):
        self.weight = parameter(size, size, inputs, outputs, axes=(2, 3, 1, 0))
        self.bias = parameter(outputs) if bias else None
        pad = (size - 1) // 2 if padding is None else padding
        sides = (pad, pad) if isinstance(pad, int) else pad
        self.stride, self.padding = stride, (sides, sides)

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

    def __init__(self, inputs: int, outputs: int, bias: bool = True):
        self.weight = parameter(inputs, outputs, axes=(1, 0))
        self.bias = parameter(outputs) if bias else None

    def __call__(self, x: Array) -> Array:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


class Embedding(eqx.Module):
    """A row of a table for each index."""

    weight: Array

    def __init__(self, count: int, width: int):
        self.weight = parameter(count, width)

    def __call__(self, index: Array) -> Array:
        return self.weight[jnp.asarray(index)]


class GroupNorm(eqx.Module):
    """Normalises each group of channels over the whole image, in float32."""

    weight: Array
    bias: Array
    groups: int = eqx.field(static=True)
    eps: float = eqx.field(static=True)

    def __init__(self, groups: int, channels: int, eps: float):
        if groups < 1 or channels % groups:
            raise ValueError(f"{channels} channels cannot be split into {groups} groups.")
        self.weight, self.bias = parameter(channels), parameter(channels)
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


class LayerNorm(eqx.Module):
    """Normalises the last axis, in float32; ``weight`` and ``bias`` are None where the layer has none."""

    weight: Array | None
    bias: Array | None
    eps: float = eqx.field(static=True)

    def __init__(self, width: int, eps: float, affine: bool = True):
        self.weight = parameter(width) if affine else None
        self.bias = parameter(width) if affine else None
        self.eps = float(eps)

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + self.eps)
        y = y if self.weight is None else y * self.weight
        y = y if self.bias is None else y + self.bias
        return y.astype(x.dtype)


class RMSNorm(eqx.Module):
    """Divides by the root mean square of the last axis, in float32."""

    weight: Array
    eps: float = eqx.field(static=True)

    def __init__(self, width: int, eps: float):
        self.weight, self.eps = parameter(width), float(eps)

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        y = wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + self.eps)
        return (y * self.weight).astype(x.dtype)


def exact_gelu(x: Array) -> Array:
    """x·Φ(x)."""
    return jax.nn.gelu(x, approximate=False)


def quick_gelu(x: Array) -> Array:
    """x·sigmoid(1.702·x), CLIP's approximation."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": exact_gelu,
    "gelu_new": jax.nn.gelu,
    "identity": lambda x: x,
    "mish": jax.nn.mish,
    "quick_gelu": quick_gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}
"""By the names that config files use."""
