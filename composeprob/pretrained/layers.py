"""Layers of other people's networks: images are (height, width, channels), sequences
(length, channels), no batch axis.

A layer takes its arrays from `tensors.Arrays`, by their names in the files, and with
them its sizes; the arrays are checked against what goes in whenever it is traced, the
first time before any of them is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

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
    """A convolution with channels last, zero outside of the image; kernel (height,
    width, in, out).

    A ``size`` of the kernel or ``outputs`` of None is any, a ``stride`` of None the
    kernel's size. The padding is that at each side, or at the near and the far ones;
    None keeps the image's size.
    """
    kernel = arrays.take("weight", outputs, x.shape[-1], size, size)
    rows, columns = kernel.shape[:2]
    if rows != columns:
        raise arrays.foreign(
            f"{arrays.prefix}weight is a convolution of {rows} by {columns} pixels"
        )
    x = x.astype(kernel.dtype)
    if rows == stride == 1:
        return _with_bias(arrays, x @ kernel[0, 0], bias)
    pad = (rows - 1) // 2 if padding is None else padding
    sides = (pad, pad) if isinstance(pad, int) else pad
    return _with_bias(
        arrays,
        _convolved(x, kernel, rows if stride is None else stride, (sides, sides)),
        bias,
    )


def convolve_enlarged(arrays: Arrays, x: Array) -> Array:
    """The convolution, of 3×3, of the image with every pixel repeated 2×2.

    Of three neighbouring pixels two are the same, so that four convolutions of 2×2, one
    for each place in a block of 2×2, give it with 4/9 of the products.
    """
    first, middle, last = arrays.take("weight", None, x.shape[-1], 3, 3)
    rows = [jnp.stack([first, middle + last]), jnp.stack([first + middle, last])]
    blocks = []
    for a, kernel in enumerate(rows):
        left, centre, right = kernel[:, 0], kernel[:, 1], kernel[:, 2]
        columns = [
            jnp.stack([left, centre + right], 1),
            jnp.stack([left + centre, right], 1),
        ]
        blocks.append(
            [
                _convolved(x, k, 1, [(1 - a, a), (1 - b, b)])
                for b, k in enumerate(columns)
            ]
        )
    y = jnp.stack([jnp.stack(row, 2) for row in blocks], 1)
    return _with_bias(arrays, y.reshape(2 * x.shape[0], 2 * x.shape[1], -1), True)


def _convolved(
    x: Array, kernel: Array, stride: int, padding: Sequence[tuple[int, int]]
) -> Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x[None], kernel, (stride, stride), padding, dimension_numbers=layout
    )[0]


def _with_bias(arrays: Arrays, y: Array, bias: bool) -> Array:
    return y + arrays.take("bias", y.shape[-1]) if bias else y


def linear(
    arrays: Arrays, x: Array, outputs: int | None = None, bias: bool = True
) -> Array:
    """x·Wᵀ + b over the last axis; W (out, in)."""
    weight = arrays.take("weight", outputs, x.shape[-1])
    return _with_bias(arrays, x.astype(weight.dtype) @ weight.T, bias)


def group_norm(arrays: Arrays, x: Array, groups: int, eps: float) -> Array:
    """Normalises each group of channels over the whole image, in float32."""
    channels = x.shape[-1]
    check_split(arrays, channels, groups, "groups of a norm")
    weight, bias = arrays.take("weight", channels), arrays.take("bias", channels)

    def group_means(each: Array) -> Array:
        return jnp.repeat(each.reshape(groups, -1).mean(-1), channels // groups)

    # Sums over places first, channel by channel: along the channels, groups of few are
    # slow on every processor.
    pixels = x.astype(jnp.float32).reshape(-1, channels)
    mean = group_means(pixels.mean(0))
    scale = weight * jax.lax.rsqrt(group_means(jnp.mean((pixels - mean) ** 2, 0)) + eps)
    return (pixels * scale + (bias - mean * scale)).reshape(x.shape).astype(x.dtype)


def normalised(x: Array, eps: float) -> Array:
    """A layer norm without weights, in float32."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    return (
        centred * jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + eps)
    ).astype(x.dtype)


def layer_norm(arrays: Arrays, x: Array, eps: float = 1e-5) -> Array:
    """Normalises the last axis, in float32."""
    width = x.shape[-1]
    y = normalised(x.astype(jnp.float32), eps)
    return (y * arrays.take("weight", width) + arrays.take("bias", width)).astype(
        x.dtype
    )


def rms_norm(arrays: Arrays, x: Array, eps: float) -> Array:
    """Divides by the root mean square of the last axis, in float32."""
    wide = x.astype(jnp.float32)
    y = wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + eps)
    return (y * arrays.take("weight", x.shape[-1])).astype(x.dtype)


def check_split(arrays: Arrays, channels: int, count: int, what: str) -> None:
    """Refuses channels that cannot be split into equal parts."""
    if channels % count:
        raise arrays.foreign(
            f"{arrays.prefix[:-1]} has {channels} channels, which {count} {what} cannot split"
        )


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "elu": jax.nn.elu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "identity": lambda x: x,
    "mish": jax.nn.mish,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # CLIP's approximation
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}
"""By the names that config files use."""


def sinusoids(
    t: Array,
    width: int,
    cosine_first: bool = True,
    shift: float = 0.0,
    scale: float = 1.0,
) -> Array:
    """sin(ω_i·s·t) and cos(ω_i·s·t) of one number, ω_i = 10000^(−i/(w/2 − shift)); w
    the width, s the scale; (w,)."""
    half = width // 2
    if half == shift:
        raise ValueError(f"no frequencies for {width} numbers with the shift {shift}")
    # In single precision as the networks were trained with: at t = 999 the seventh
    # digit of ω shows in the sine.
    exponent = (
        np.float32(-math.log(10000))
        * np.arange(half, dtype=np.float32)
        / np.float32(half - shift)
    )
    angle = (
        jnp.asarray(t, jnp.float32)
        * np.float32(scale)
        * np.exp(exponent, dtype=np.float32)
    )
    return jnp.pad(waves(angle, cosine_first), (0, width % 2))


def waves(angle: Array, cosine_first: bool) -> Array:
    """Sines and cosines, or the cosines first."""
    parts = [jnp.sin(angle), jnp.cos(angle)]
    return jnp.concatenate(parts[::-1] if cosine_first else parts)


def mlp(
    arrays: Arrays, x: Array, outputs: int | None = None, activation: str = "silu"
) -> Array:
    """Two linear layers with an activation between them."""
    return linear(
        arrays / "linear_2",
        ACTIVATIONS[activation](linear(arrays / "linear_1", x)),
        outputs,
    )


def patches(arrays: Arrays, x: Array, sample_size: int | None = None) -> Array:
    """Patches of an image as a sequence, the embeddings of their places added.

    Those are the middle of the table ``pos_embed`` (1, places², width), or sinusoids,
    scaled to the rows of the images of the training, ``sample_size``.
    """
    hidden = convolve(arrays / "proj", x, None, stride=None, padding=0)
    rows, columns, width = hidden.shape
    if sample_size is not None:
        places = jnp.asarray(
            grid_sinusoids(width, rows, columns, sample_size * rows // x.shape[0])
        )
    else:
        table = arrays.take("pos_embed", 1, None, width)
        side = math.isqrt(table.shape[1])
        if side**2 != table.shape[1] or side < max(rows, columns):
            raise arrays.foreign(
                f"its {table.shape[1]} embeddings of places are those of no square of {rows}×{columns} patches or more"
            )
        top, left = (side - rows) // 2, (side - columns) // 2
        places = table.reshape(side, side, width)[
            top : top + rows, left : left + columns
        ].reshape(-1, width)
    return hidden.reshape(-1, width) + places.astype(hidden.dtype)


def image_of(sequence: Array, height: int, width: int) -> Array:
    """The image of a sequence of square patches, each (size, size, channels) in a
    row."""
    size = math.isqrt(height * width // sequence.shape[0])
    split = sequence.reshape(height // size, width // size, size, size, -1)
    return split.transpose(0, 2, 1, 3, 4).reshape(height, width, -1)


def grid_sinusoids(width: int, rows: int, columns: int, base: float) -> np.ndarray:
    """Embeddings of a grid's places, which run from 0 to ``base``, (rows·columns,
    width): half column, half row."""
    omega = 1.0 / 10000 ** (np.arange(width // 4) / (width / 4))
    row, column = (
        np.arange(n, dtype=np.float32) / np.float32(n / base) for n in (rows, columns)
    )
    angles = [places.reshape(-1, 1) * omega for places in np.meshgrid(column, row)]
    return np.concatenate(
        [wave(angle) for angle in angles for wave in (np.sin, np.cos)], axis=1
    ).astype(np.float32)


def attend(query: Array, key: Array, value: Array, *, causal: bool = False) -> Array:
    """softmax(q·kᵀ/√d)·v of sequences (length, heads, d), each head separately;
    (query's length, heads·d).

    Two products of matrices for each head: `jax.nn.dot_product_attention` is the same
    in another layout, in which processors take up to three times as long.
    """
    exact = {"preferred_element_type": jnp.float32}
    logits = jnp.einsum("ihd,jhd->hij", query * query.shape[-1] ** -0.5, key, **exact)
    if causal:
        logits = jnp.where(
            jnp.tri(query.shape[0], key.shape[0], dtype=bool), logits, -jnp.inf
        )
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    found = jnp.einsum("hij,jhd->hid", weights.astype(value.dtype), value, **exact)
    found = jnp.swapaxes(found / weights.sum(-1, keepdims=True), 0, 1).astype(
        value.dtype
    )
    return found.reshape(query.shape[0], -1)


def projections(
    arrays: Arrays,
    x: Array,
    heads: int,
    context: Array | None = None,
    *,
    bias: bool,
    added: bool = False,
) -> list[Array]:
    """Queries of a sequence (length, channels), and keys and values of it or of a
    context, (length, heads, d) each. They are normed where there are norms; ``added``
    ones have the names of a second sequence's."""
    name, norm = ("add_{}_proj", "norm_added_{}") if added else ("to_{}", "norm_{}")
    found: list[Array] = []
    for letter, sequence in zip(
        "qkv", (x, *[x if context is None else context] * 2), strict=True
    ):
        inner = found[0].shape[1] * found[0].shape[2] if found else None
        y = linear(arrays / name.format(letter), sequence, inner, bias)
        check_split(arrays, y.shape[1], heads, "heads of attention")
        y, normed = y.reshape(y.shape[0], heads, -1), norm.format(letter)
        found.append(rms_norm(arrays / normed, y, 1e-6) if normed in arrays else y)
    return found


def attention(
    arrays: Arrays,
    x: Array,
    heads: int,
    context: Array | None = None,
    *,
    bias: bool = False,
    causal: bool = False,
) -> Array:
    """Attention of a sequence to itself or to a context; ``causal`` where a place sees
    only those before it."""
    found = attend(*projections(arrays, x, heads, context, bias=bias), causal=causal)
    return linear(arrays / "to_out" / 0, found, x.shape[-1])


def joint_attention(
    arrays: Arrays, x: Array, context: Array, heads: int, *, last: bool
) -> tuple[Array, Array]:
    """Attention of two sequences, each to both; of the second, in the last block, what
    goes into its output."""
    own = projections(arrays, x, heads, bias=True)
    added = projections(arrays, context, heads, bias=True, added=True)
    found, length = (
        attend(*map(jnp.concatenate, zip(own, added, strict=True))),
        x.shape[0],
    )
    beside = found[length:]
    if not last:
        beside = linear(arrays / "to_add_out", beside, context.shape[-1])
    return linear(arrays / "to_out" / 0, found[:length], x.shape[-1]), beside


FEED_FORWARD = {
    "gelu": ACTIVATIONS["gelu"],
    "gelu-approximate": ACTIVATIONS["gelu_new"],
    "geglu": ACTIVATIONS["gelu"],
    "geglu-approximate": ACTIVATIONS["quick_gelu"],
    "linear-silu": ACTIVATIONS["silu"],
    "swiglu": ACTIVATIONS["silu"],
}
"""By the names that config files use."""


def feed_forward(arrays: Arrays, x: Array, kind: str) -> Array:
    """Two layers, a(x·W + b) or h·a(g) with (h, g) the halves of that, and a linear
    one; ``net.1`` is dropout."""
    y, activation = (
        linear(arrays / "net" / 0 / "proj", x),
        (ACTIVATIONS | FEED_FORWARD)[kind],
    )
    if kind in ("geglu", "swiglu"):
        hidden, gate = jnp.split(y, 2, axis=-1)
        y = hidden * activation(gate)
    else:
        y = activation(y)
    return linear(arrays / "net" / 2, y, x.shape[-1])
