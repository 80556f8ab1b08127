"""Layers of other people's networks: images are (height, width, channels), sequences
(length, channels), no batch axis.

A layer takes its arrays from `tensors.Arrays`, by their names in the files, and its
sizes from the arrays. Each trace checks the arrays against the layer's inputs, the
first time before any array is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Shaped

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
    """Convolution with channels last, zero outside of the image; kernel (height, width,
    in, out).

    Args:
        arrays: ``weight`` and ``bias``.
        x: the image, (height, width, in).
        size: rows and columns of the kernel; None for any number.
        outputs: output channels; None for any number.
        stride: None for the kernel's size.
        padding: at each side, or at the near and the far sides; None keeps the image's
            size.
        bias: true if the layer has one.
    """
    kernel = arrays.take("weight", outputs, x.shape[-1], size, size)
    rows, columns = kernel.shape[:2]
    if rows != columns:
        raise arrays.foreign(
            f"{arrays.prefix}weight is a convolution of {rows} by {columns} pixels"
        )
    x = x.astype(kernel.dtype)
    if rows == stride == 1:
        # A product of matrices, of which no convolution needs to be made.
        return _with_bias(arrays, x @ kernel[0, 0], bias)
    if padding is None:
        padding = (rows - 1) // 2
    if isinstance(padding, int):
        padding = (padding, padding)
    if stride is None:
        stride = rows
    return _with_bias(arrays, _convolved(x, kernel, stride, (padding, padding)), bias)


def convolve_enlarged(
    arrays: Arrays, x: Float[Array, "height width channels"]
) -> Float[Array, "2*height 2*width outputs"]:
    """Convolution by a 3×3 kernel of the image with every pixel repeated 2×2.

    Of three neighbouring pixels two are the same, so that four convolutions by 2×2
    kernels, one for each place in a block of 2×2, give it with 4/9 of the products.
    """
    first, middle, last = arrays.take("weight", None, x.shape[-1], 3, 3)
    # The upper row of a block sees its own pixel twice below, the lower row above.
    rows = [jnp.stack([first, middle + last]), jnp.stack([first + middle, last])]
    blocks = []
    for a, kernel in enumerate(rows):
        left, centre, right = kernel[:, 0], kernel[:, 1], kernel[:, 2]
        columns = [
            jnp.stack([left, centre + right], 1),
            jnp.stack([left + centre, right], 1),
        ]
        row = []
        for b, corner in enumerate(columns):
            row.append(_convolved(x, corner, 1, [(1 - a, a), (1 - b, b)]))
        blocks.append(row)
    # (height, 2, width, 2, outputs): places within blocks beside the blocks.
    y = jnp.stack([jnp.stack(row, 2) for row in blocks], 1)
    return _with_bias(arrays, y.reshape(2 * x.shape[0], 2 * x.shape[1], -1), True)


def _convolved(
    x: Array, kernel: Array, stride: int, padding: Sequence[tuple[int, int]]
) -> Array:
    layout = ("NHWC", "HWIO", "NHWC")
    images = jax.lax.conv_general_dilated(
        x[None], kernel, (stride, stride), padding, dimension_numbers=layout
    )
    return images[0]


def _with_bias(arrays: Arrays, y: Array, bias: bool) -> Array:
    if not bias:
        return y
    return y + arrays.take("bias", y.shape[-1])


def linear(
    arrays: Arrays, x: Array, outputs: int | None = None, bias: bool = True
) -> Array:
    """x·Wᵀ + b over the last axis; W (out, in)."""
    # As torch stores it: (out, in).
    weight = arrays.take("weight", outputs, x.shape[-1])
    return _with_bias(arrays, x.astype(weight.dtype) @ weight.T, bias)


def group_norm(arrays: Arrays, x: Array, groups: int, eps: float) -> Array:
    """Normalise each group of channels over the whole image, in float32."""
    channels = x.shape[-1]
    check_split(arrays, channels, groups, "groups of a norm")
    weight = arrays.take("weight", channels)
    bias = arrays.take("bias", channels)

    def group_means(of_channels: Array) -> Array:
        means = of_channels.reshape(groups, -1).mean(-1)
        return jnp.repeat(means, channels // groups)

    # Sums over places first, channel by channel: sums along the channels are slow on
    # every processor, as a group has few.
    pixels = x.astype(jnp.float32).reshape(-1, channels)
    mean = group_means(pixels.mean(0))
    variance = group_means(jnp.mean((pixels - mean) ** 2, 0))
    scale = weight * jax.lax.rsqrt(variance + eps)
    return (pixels * scale + (bias - mean * scale)).reshape(x.shape).astype(x.dtype)


def normalised(x: Array, eps: float) -> Array:
    """Layer norm without weights, in float32."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    variance = jnp.mean(centred**2, -1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + eps)).astype(x.dtype)


def layer_norm(arrays: Arrays, x: Array, eps: float = 1e-5) -> Array:
    """Normalise the last axis, in float32."""
    width = x.shape[-1]
    y = normalised(x.astype(jnp.float32), eps)
    y = y * arrays.take("weight", width) + arrays.take("bias", width)
    return y.astype(x.dtype)


def rms_norm(arrays: Arrays, x: Array, eps: float) -> Array:
    """Divide by the root mean square of the last axis, in float32."""
    wide = x.astype(jnp.float32)
    y = wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + eps)
    return (y * arrays.take("weight", x.shape[-1])).astype(x.dtype)


def check_split(arrays: Arrays, channels: int, count: int, noun: str) -> None:
    """Refuse channels that cannot be split into equal groups."""
    if channels % count:
        raise arrays.foreign(
            f"{arrays.prefix[:-1]} has {channels} channels, "
            f"which {count} {noun} cannot split"
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
"""Activations by their names in config files."""


def sinusoids(
    t: Shaped[Array, ""],
    width: int,
    cosine_first: bool = True,
    shift: float = 0.0,
    scale: float = 1.0,
) -> Float[Array, " {width}"]:
    """sin(ω_i·s·t) and cos(ω_i·s·t), ω_i = 10000^(−i/(w/2 − shift)); w the width, s the
    scale."""
    half = width // 2
    if half == shift:
        raise ValueError(f"no frequencies for {width} numbers with the shift {shift}")
    # In single precision, in which the networks were trained: at t = 999 the seventh
    # digit of ω shows in the sine.
    log_base = np.float32(-math.log(10000))
    steps = np.arange(half, dtype=np.float32)
    omega = np.exp(log_base * steps / np.float32(half - shift), dtype=np.float32)
    angle = jnp.asarray(t, jnp.float32) * np.float32(scale) * omega
    return jnp.pad(waves(angle, cosine_first), (0, width % 2))


def waves(angle: Float[Array, " n"], cosine_first: bool) -> Float[Array, " 2*n"]:
    """Sines and cosines, or the cosines first."""
    sine = jnp.sin(angle)
    cosine = jnp.cos(angle)
    if cosine_first:
        return jnp.concatenate([cosine, sine])
    return jnp.concatenate([sine, cosine])


def mlp(
    arrays: Arrays, x: Array, outputs: int | None = None, activation: str = "silu"
) -> Array:
    """Two linear layers with an activation between them."""
    hidden = ACTIVATIONS[activation](linear(arrays / "linear_1", x))
    return linear(arrays / "linear_2", hidden, outputs)


def patches(
    arrays: Arrays,
    x: Float[Array, "height width channels"],
    sample_size: int | None = None,
) -> Float[Array, "length features"]:
    """Patches of an image as a sequence, with embeddings of their places added.

    The embeddings are the middle of the table ``pos_embed`` (1, places², features), or
    sinusoids, scaled to the rows of the images of the training, ``sample_size``.
    """
    hidden = convolve(arrays / "proj", x, None, stride=None, padding=0)
    rows, columns, features = hidden.shape
    if sample_size is None:
        places = _middle_of_table(arrays, rows, columns, features)
    else:
        base = sample_size * rows // x.shape[0]
        places = jnp.asarray(grid_sinusoids(features, rows, columns, base))
    return hidden.reshape(-1, features) + places.astype(hidden.dtype)


def _middle_of_table(arrays: Arrays, rows: int, columns: int, features: int) -> Array:
    """Embeddings of a grid's places from the middle of a table for a larger square."""
    table = arrays.take("pos_embed", 1, None, features)
    side = math.isqrt(table.shape[1])
    if side**2 != table.shape[1] or side < max(rows, columns):
        raise arrays.foreign(
            f"its {table.shape[1]} embeddings of places do not form a square that "
            f"holds {rows}×{columns} patches"
        )
    top = (side - rows) // 2
    left = (side - columns) // 2
    # Trained on the largest images, of which others are the middle.
    square = table.reshape(side, side, features)
    return square[top : top + rows, left : left + columns].reshape(-1, features)


def image_of(
    sequence: Float[Array, "length features"], height: int, width: int
) -> Float[Array, "{height} {width} channels"]:
    """The image of a sequence of square patches, each (size, size, channels) in a
    row."""
    size = math.isqrt(height * width // sequence.shape[0])
    split = sequence.reshape(height // size, width // size, size, size, -1)
    return split.transpose(0, 2, 1, 3, 4).reshape(height, width, -1)


def grid_sinusoids(
    width: int, rows: int, columns: int, base: float
) -> Float[np.ndarray, "{rows}*{columns} {width}"]:
    """Embeddings of a grid's places, which run from 0 to ``base``: half of the width
    for the column, half for the row."""
    omega = 1.0 / 10000 ** (np.arange(width // 4) / (width / 4))
    row = np.arange(rows, dtype=np.float32) / np.float32(rows / base)
    column = np.arange(columns, dtype=np.float32) / np.float32(columns / base)
    halves = []
    for places in np.meshgrid(column, row):
        angles = places.reshape(-1, 1) * omega
        halves += [np.sin(angles), np.cos(angles)]
    return np.concatenate(halves, axis=1).astype(np.float32)


def attend(
    query: Float[Array, "i heads d"],
    key: Float[Array, "j heads d"],
    value: Float[Array, "j heads d"],
    *,
    causal: bool = False,
) -> Float[Array, "i heads*d"]:
    """softmax(q·kᵀ/√d)·v, each head separately.

    Two products of matrices for each head: `jax.nn.dot_product_attention` is the same
    in another layout, in which processors take up to three times as long.
    """
    # Sums in single precision also where the weights are of half precision.
    exact = jnp.float32
    scaled = query * query.shape[-1] ** -0.5
    logits = jnp.einsum("ihd,jhd->hij", scaled, key, preferred_element_type=exact)
    if causal:
        earlier = jnp.tri(query.shape[0], key.shape[0], dtype=bool)
        logits = jnp.where(earlier, logits, -jnp.inf)
    # The maximum cancels in the quotient, and so does its gradient.
    maximum = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    weights = jnp.exp(logits - maximum)
    weights_of_values = weights.astype(value.dtype)
    summed = jnp.einsum(
        "hij,jhd->hid", weights_of_values, value, preferred_element_type=exact
    )
    mean = jnp.swapaxes(summed / weights.sum(-1, keepdims=True), 0, 1)
    return mean.astype(value.dtype).reshape(query.shape[0], -1)


class Projections(NamedTuple):
    """Queries, keys and values of attention."""

    query: Float[Array, "i heads d"]
    key: Float[Array, "j heads d"]
    value: Float[Array, "j heads d"]


def projections(
    arrays: Arrays,
    x: Float[Array, "i channels"],
    heads: int,
    context: Float[Array, "j features"] | None = None,
    *,
    bias: bool,
    added: bool = False,
) -> Projections:
    """Queries of a sequence, and keys and values of it or of a context.

    They are normed where the file has norms. ``added`` projections have the names of a
    second sequence's.
    """
    if context is None:
        context = x
    query = _projection(arrays, "q", x, heads, None, bias, added)
    width = query.shape[1] * query.shape[2]
    key = _projection(arrays, "k", context, heads, width, bias, added)
    value = _projection(arrays, "v", context, heads, width, bias, added)
    return Projections(query, key, value)


def _projection(
    arrays: Arrays,
    letter: str,
    x: Array,
    heads: int,
    width: int | None,
    bias: bool,
    added: bool,
) -> Array:
    """One linear projection, split into heads and normed if it has a norm."""
    name = f"add_{letter}_proj" if added else f"to_{letter}"
    norm = f"norm_added_{letter}" if added else f"norm_{letter}"
    y = linear(arrays / name, x, width, bias)
    check_split(arrays, y.shape[1], heads, "heads of attention")
    y = y.reshape(y.shape[0], heads, -1)
    if norm in arrays:
        y = rms_norm(arrays / norm, y, 1e-6)
    return y


def attention(
    arrays: Arrays,
    x: Float[Array, "i channels"],
    heads: int,
    context: Float[Array, "j features"] | None = None,
    *,
    bias: bool = False,
    causal: bool = False,
) -> Float[Array, "i channels"]:
    """Attention of a sequence to itself or to a context.

    With ``causal`` each place attends only to itself and those before it.
    """
    qkv = projections(arrays, x, heads, context, bias=bias)
    attended = attend(*qkv, causal=causal)
    return linear(arrays / "to_out" / 0, attended, x.shape[-1])


def joint_attention(
    arrays: Arrays,
    x: Float[Array, "i channels"],
    context: Float[Array, "j features"],
    heads: int,
    *,
    last: bool,
) -> tuple[Float[Array, "i channels"], Float[Array, "j features"]]:
    """Attention of two sequences, each to both.

    The last block of a network has no output layer for the second sequence, which it
    returns without.
    """
    of_x = projections(arrays, x, heads, bias=True)
    of_context = projections(arrays, context, heads, bias=True, added=True)
    joint = Projections(*map(jnp.concatenate, zip(of_x, of_context, strict=True)))
    attended = attend(*joint)
    length = x.shape[0]
    second = attended[length:]
    if not last:
        second = linear(arrays / "to_add_out", second, context.shape[-1])
    return linear(arrays / "to_out" / 0, attended[:length], x.shape[-1]), second


FEED_FORWARD = {
    "gelu": ACTIVATIONS["gelu"],
    "gelu-approximate": ACTIVATIONS["gelu_new"],
    "geglu": ACTIVATIONS["gelu"],
    "geglu-approximate": ACTIVATIONS["quick_gelu"],
    "linear-silu": ACTIVATIONS["silu"],
    "swiglu": ACTIVATIONS["silu"],
}
"""Activations of feed-forward layers by their names in config files."""


def feed_forward(
    arrays: Arrays, x: Float[Array, "length channels"], kind: str
) -> Float[Array, "length channels"]:
    """a(x·W + b), or h·a(g) with (h, g) the halves of x·W + b, and a linear layer.

    ``net.1`` of the files is dropout, which has no weights.
    """
    activation = (ACTIVATIONS | FEED_FORWARD)[kind]
    y = linear(arrays / "net" / 0 / "proj", x)
    if kind in ("geglu", "swiglu"):
        hidden, gate = jnp.split(y, 2, axis=-1)
        y = hidden * activation(gate)
    else:
        y = activation(y)
    return linear(arrays / "net" / 2, y, x.shape[-1])
