"""Attention, and the transformer blocks that UNets of text-to-image models have between their convolutions."""

from __future__ import annotations

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from composeprob.pretrained.layers import (
    ACTIVATIONS,
    Conv,
    GroupNorm,
    LayerNorm,
    Linear,
    RMSNorm,
    check_split,
    exact_gelu,
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


class Heads(eqx.Module):
    """Queries of a sequence, and keys and values of it or of another one, (length, heads, d) each.

    Args:
        arrays: with the projections, and norms where there are any.
        width: channels of the sequence.
        context: channels of the other one.
        heads: their number.
        bias: whether the projections have one.
        inner: channels of all heads together; None for any.
        added: whether they are those of a second sequence, by their names.
    """

    layers: tuple[Linear, ...]
    norms: tuple[RMSNorm | None, ...]
    heads: int = eqx.field(static=True)

    def __init__(
        self,
        arrays: Arrays,
        width: int,
        context: int,
        heads: int,
        bias: bool,
        inner: int | None = None,
        added: bool = False,
    ):
        name, norm = ("add_{}_proj", "norm_added_{}") if added else ("to_{}", "norm_{}")
        first = Linear(arrays / name.format("q"), width, inner, bias)
        check_split(arrays, first.outputs, heads, "heads of attention")
        others = (Linear(arrays / name.format(each), context, first.outputs, bias) for each in "kv")
        self.layers, self.heads = (first, *others), heads
        size, norms = first.outputs // heads, map(norm.format, "qkv")
        self.norms = tuple(RMSNorm(arrays / each, size, 1e-6) if each in arrays else None for each in norms)

    def __call__(self, x: Array, context: Array | None = None) -> list[Array]:
        found, other = [], x if context is None else context
        for sequence, layer, norm in zip((x, other, other), self.layers, self.norms, strict=True):
            split = layer(sequence).reshape(sequence.shape[0], self.heads, -1)
            found.append(split if norm is None else norm(split))
        return found


class Attention(eqx.Module):
    """Attention of a sequence to itself, to another one, or of two sequences to both.

    Args:
        arrays: with or without a group norm before, norms of queries and keys, and projections of a second sequence.
        width: channels of the sequence.
        heads: their number.
        context: channels of what is attended to; None for the sequence itself.
        bias: whether the projections to queries, keys and values have one.
        groups, eps: of the group norm.
        residual: whether the input is added.
        rescale: divides the output.
        causal: whether a place sees only those before it.
    """

    group_norm: GroupNorm | None
    own: Heads
    added: Heads | None
    to_out: tuple[Linear]
    to_add_out: Linear | None
    residual: bool = eqx.field(static=True)
    rescale: float = eqx.field(static=True)
    causal: bool = eqx.field(static=True)

    def __init__(
        self,
        arrays: Arrays,
        width: int,
        heads: int,
        *,
        context: int | None = None,
        bias: bool = False,
        groups: int = 1,
        eps: float = 1e-5,
        residual: bool = False,
        rescale: float = 1.0,
        causal: bool = False,
    ):
        self.group_norm = GroupNorm(arrays / "group_norm", groups, width, eps) if "group_norm" in arrays else None
        self.own = Heads(arrays, width, width if context is None else context, heads, bias)
        inner, two = self.own.layers[0].outputs, "add_q_proj" in arrays
        self.added = Heads(arrays, width, width, heads, True, inner, added=True) if two else None
        self.to_out = (Linear(arrays / "to_out" / 0, inner, width),)
        self.to_add_out = Linear(arrays / "to_add_out", inner, width) if "to_add_out" in arrays else None
        self.residual, self.rescale, self.causal = residual, float(rescale), causal

    def __call__(self, x: Array, context: Array | None = None) -> Array:
        """The output for an image (height, width, channels) or a sequence (length, channels), of the same shape."""
        sequence = x.reshape(-1, x.shape[-1])
        if self.group_norm is not None:
            sequence = self.group_norm(sequence)
        found = self.to_out[0](attend(*self.own(sequence, context), causal=self.causal)).reshape(x.shape)
        return ((found + x) if self.residual else found) / self.rescale

    def both(self, x: Array, context: Array) -> tuple[Array, Array | None]:
        """The outputs for two sequences, each of which attends to both; None for the second where it has none."""
        assert self.added is not None
        found = attend(*map(jnp.concatenate, zip(self.own(x), self.added(context), strict=True)))
        beside = None if self.to_add_out is None else self.to_add_out(found[x.shape[0] :])
        return self.to_out[0](found[: x.shape[0]]), beside


class Gated(eqx.Module):
    """a(x·W + b), or h·a(g) with (h, g) the halves of that."""

    proj: Linear
    kind: str = eqx.field(static=True)

    def __init__(self, arrays: Arrays, inputs: int, outputs: int, kind: str):
        self.kind = kind
        self.proj = Linear(arrays / "proj", inputs, outputs * (2 if self.has_gate else 1))

    @property
    def has_gate(self) -> bool:
        """Whether half of the projection multiplies the other half."""
        return self.kind in ("geglu", "swiglu")

    def __call__(self, x: Array) -> Array:
        y = self.proj(x)
        if not self.has_gate:
            return (ACTIVATIONS | FEED_FORWARD)[self.kind](y)
        hidden, gate = jnp.split(y, 2, axis=-1)
        return hidden * FEED_FORWARD[self.kind](gate)


FEED_FORWARD = {
    "gelu": exact_gelu,
    "gelu-approximate": jax.nn.gelu,
    "geglu": exact_gelu,
    "geglu-approximate": ACTIVATIONS["quick_gelu"],
    "linear-silu": jax.nn.silu,
    "swiglu": jax.nn.silu,
}
"""By the names that config files use."""


class FeedForward(eqx.Module):
    """Two layers; ``net.1`` is dropout in training."""

    net: tuple[Gated, None, Linear]

    def __init__(self, arrays: Arrays, width: int, kind: str):
        last = Linear(arrays / "net" / 2, None, width)
        self.net = (Gated(arrays / "net" / 0, width, last.inputs, kind), None, last)

    def __call__(self, x: Array) -> Array:
        return self.net[2](self.net[0](x))


class TransformerBlock(eqx.Module):
    """Attention to itself, attention to the prompt where there is one, and a feed-forward layer, each after a norm and
    added.

    Args:
        arrays: of the block.
        width: channels of the sequence.
        heads: their number.
        context: channels of the prompt; None without.
        only_cross: whether the first attention is to the prompt too.
        kind: of the feed-forward layer.
        eps: of the norms.
        options: of attention to itself.
    """

    norm1: LayerNorm
    attn1: Attention
    norm2: LayerNorm | None
    attn2: Attention | None
    norm3: LayerNorm
    ff: FeedForward
    only_cross: bool = eqx.field(static=True)

    def __init__(
        self,
        arrays: Arrays,
        width: int,
        heads: int,
        context: int | None = None,
        only_cross: bool = False,
        *,
        kind: str = "geglu",
        eps: float = 1e-5,
        **options: Any,
    ):
        self.norm1, self.norm3 = (LayerNorm(arrays / f"norm{i}", width, eps) for i in (1, 3))
        self.attn1 = Attention(arrays / "attn1", width, heads, context=context if only_cross else None, **options)
        self.norm2 = None if context is None else LayerNorm(arrays / "norm2", width, eps)
        self.attn2 = None if context is None else Attention(arrays / "attn2", width, heads, context=context)
        self.ff = FeedForward(arrays / "ff", width, kind)
        self.only_cross = only_cross

    def __call__(self, x: Array, context: Array | None = None) -> Array:
        x = self.attn1(self.norm1(x), context if self.only_cross else None) + x
        if self.attn2 is not None and self.norm2 is not None:
            x = self.attn2(self.norm2(x), context) + x
        return self.ff(self.norm3(x)) + x


class SpatialTransformer(eqx.Module):
    """Transformer blocks over the places of an image, whose output is added to it."""

    norm: GroupNorm
    proj_in: Linear | Conv
    transformer_blocks: tuple[TransformerBlock, ...]
    proj_out: Linear | Conv

    def __init__(
        self,
        arrays: Arrays,
        channels: int,
        heads: int,
        context: int,
        groups: int,
        linear: bool,
        only_cross: bool = False,
    ):
        def project(name: str, inputs: int, outputs: int | None = None) -> Linear | Conv:
            return Linear(arrays / name, inputs, outputs) if linear else Conv(arrays / name, inputs, 1)

        self.norm = GroupNorm(arrays / "norm", groups, channels, 1e-6)
        self.proj_in = project("proj_in", channels)
        inner = self.proj_in.outputs
        blocks = arrays.items("transformer_blocks")
        self.transformer_blocks = tuple(TransformerBlock(block, inner, heads, context, only_cross) for block in blocks)
        self.proj_out = project("proj_out", inner, channels)

    def __call__(self, x: Array, context: Array) -> Array:
        hidden = self.proj_in(self.norm(x))
        sequence = hidden.reshape(-1, hidden.shape[-1])
        for block in self.transformer_blocks:
            sequence = block(sequence, context)
        return self.proj_out(sequence.reshape(hidden.shape)) + x
