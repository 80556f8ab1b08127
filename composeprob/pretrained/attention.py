"""Attention, and the transformer blocks that UNets of text-to-image models have between their convolutions."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from composeprob.pretrained.layers import (
    ACTIVATIONS,
    check_split,
    convolve,
    exact_gelu,
    group_norm,
    layer_norm,
    linear,
    rms_norm,
)
from composeprob.pretrained.tensors import Arrays


def attend(query: Array, key: Array, value: Array, *, causal: bool = False) -> Array:
    """softmax(q·kᵀ/√d)·v of sequences (length, heads, d), each head separately; (query's length, heads·d)."""
    elsewhere = partial(jax.nn.dot_product_attention, is_causal=causal)
    # On processors what JAX offers takes up to three times as long as the products written out.
    found = jax.lax.platform_dependent(query, key, value, cpu=partial(_products, causal=causal), default=elsewhere)
    return found.reshape(query.shape[0], -1)


def _products(query: Array, key: Array, value: Array, *, causal: bool) -> Array:
    """`jax.nn.dot_product_attention` as two products of matrices for each head; (length, heads, d)."""
    exact = {"preferred_element_type": jnp.float32}
    logits = jnp.einsum("ihd,jhd->hij", query * query.shape[-1] ** -0.5, key, **exact)
    if causal:
        logits = jnp.where(jnp.tri(query.shape[0], key.shape[0], dtype=bool), logits, -jnp.inf)
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    found = jnp.einsum("hij,jhd->hid", weights.astype(value.dtype), value, **exact)
    return jnp.swapaxes(found / weights.sum(-1, keepdims=True), 0, 1).astype(value.dtype)


def projections(
    arrays: Arrays, x: Array, heads: int, context: Array | None = None, *, bias: bool, added: bool = False
) -> list[Array]:
    """Queries of a sequence, and keys and values of it or of another one, (length, heads, d) each.

    Args:
        arrays: with the projections, and norms where there are any.
        x: the sequence, (length, channels).
        heads: their number.
        context: the other one.
        bias: whether the projections have one.
        added: whether they are those of a second sequence, by their names.
    """
    name, norm = ("add_{}_proj", "norm_added_{}") if added else ("to_{}", "norm_{}")
    found: list[Array] = []
    for letter, sequence in zip("qkv", (x, *[x if context is None else context] * 2), strict=True):
        inner = found[0].shape[1] * found[0].shape[2] if found else None
        y = linear(arrays / name.format(letter), sequence, inner, bias)
        check_split(arrays, y.shape[1], heads, "heads of attention")
        y, normed = y.reshape(y.shape[0], heads, -1), norm.format(letter)
        found.append(rms_norm(arrays / normed, y, 1e-6) if normed in arrays else y)
    return found


def attention(
    arrays: Arrays, x: Array, heads: int, context: Array | None = None, *, bias: bool = False, causal: bool = False
) -> Array:
    """Attention of a sequence to itself or to another one; the output has the sequence's shape.

    Args:
        arrays, x, heads, context, bias: as of `projections`.
        causal: whether a place sees only those before it.
    """
    found = attend(*projections(arrays, x, heads, context, bias=bias), causal=causal)
    return linear(arrays / "to_out" / 0, found, x.shape[-1])


def joint_attention(arrays: Arrays, x: Array, context: Array, heads: int, *, last: bool) -> tuple[Array, Array]:
    """Attention of two sequences, each to both; of the second, in the last block, what goes into its output."""
    own = projections(arrays, x, heads, bias=True)
    added = projections(arrays, context, heads, bias=True, added=True)
    found, length = attend(*map(jnp.concatenate, zip(own, added, strict=True))), x.shape[0]
    beside = found[length:]
    if not last:
        beside = linear(arrays / "to_add_out", beside, context.shape[-1])
    return linear(arrays / "to_out" / 0, found[:length], x.shape[-1]), beside


FEED_FORWARD = {
    "gelu": exact_gelu,
    "gelu-approximate": jax.nn.gelu,
    "geglu": exact_gelu,
    "geglu-approximate": ACTIVATIONS["quick_gelu"],
    "linear-silu": jax.nn.silu,
    "swiglu": jax.nn.silu,
}
"""By the names that config files use."""


def feed_forward(arrays: Arrays, x: Array, kind: str) -> Array:
    """Two layers, a(x·W + b) or h·a(g) with (h, g) the halves of that, and a linear one; ``net.1`` is dropout."""
    y, activation = linear(arrays / "net" / 0 / "proj", x), (ACTIVATIONS | FEED_FORWARD)[kind]
    if kind in ("geglu", "swiglu"):
        hidden, gate = jnp.split(y, 2, axis=-1)
        y = hidden * activation(gate)
    else:
        y = activation(y)
    return linear(arrays / "net" / 2, y, x.shape[-1])


def transformer_block(
    arrays: Arrays,
    x: Array,
    heads: int,
    context: Array | None = None,
    *,
    only_cross: bool = False,
    kind: str = "geglu",
    eps: float = 1e-5,
    bias: bool = False,
    causal: bool = False,
) -> Array:
    """Attention to itself, attention to the prompt where there is one, and a feed-forward layer, each after a norm and
    added.

    Args:
        arrays: of the block.
        x: the sequence, (length, channels).
        heads: their number.
        context: the prompt.
        only_cross: whether the first attention is to the prompt too.
        kind: of the feed-forward layer.
        eps: of the norms.
        bias, causal: of attention to itself.
    """
    first, normed = context if only_cross else None, layer_norm(arrays / "norm1", x, eps)
    x = attention(arrays / "attn1", normed, heads, first, bias=bias, causal=causal) + x
    if context is not None:
        x = attention(arrays / "attn2", layer_norm(arrays / "norm2", x, eps), heads, context) + x
    return feed_forward(arrays / "ff", layer_norm(arrays / "norm3", x, eps), kind) + x


def spatial_transformer(
    arrays: Arrays, x: Array, context: Array, heads: int, groups: int, only_cross: bool = False
) -> Array:
    """Transformer blocks over the places of an image, whose output is added to it."""

    def project(name: str, x: Array, outputs: int | None = None) -> Array:
        below = arrays / name
        return convolve(below, x, 1, outputs) if below.rank("weight") == 4 else linear(below, x, outputs)

    hidden = project("proj_in", group_norm(arrays / "norm", x, groups, 1e-6))
    sequence = hidden.reshape(-1, hidden.shape[-1])
    for block in arrays.items("transformer_blocks"):
        sequence = transformer_block(block, sequence, heads, context, only_cross=only_cross)
    return project("proj_out", sequence.reshape(hidden.shape), x.shape[-1]) + x
