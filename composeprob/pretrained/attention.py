"""Attention, and the transformer blocks that UNets of text-to-image models have between their convolutions."""

from __future__ import annotations

from functools import partial

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
    to_q: Linear
    to_k: Linear
    to_v: Linear
    to_out: tuple[Linear]
    norm_q: RMSNorm | None
    norm_k: RMSNorm | None
    add_q_proj: Linear | None
    add_k_proj: Linear | None
    add_v_proj: Linear | None
    to_add_out: Linear | None
    norm_added_q: RMSNorm | None
    norm_added_k: RMSNorm | None
    heads: int = eqx.field(static=True)
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
        other = width if context is None else context
        self.to_q = Linear(arrays / "to_q", width, None, bias)
        inner = self.to_q.outputs
        check_split(arrays, inner, heads, "heads of attention")
        self.to_k, self.to_v = (Linear(arrays / f"to_{part}", other, inner, bias) for part in "kv")
        self.to_out = (Linear(arrays / "to_out" / 0, inner, width),)
        norms = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
        self.norm_q, self.norm_k, self.norm_added_q, self.norm_added_k = (
            RMSNorm(arrays / name, inner // heads, 1e-6) if name in arrays else None for name in norms
        )
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (
            Linear(arrays / f"add_{part}_proj", width, inner) if "add_q_proj" in arrays else None for part in "qkv"
        )
        self.to_add_out = Linear(arrays / "to_add_out", inner, width) if "to_add_out" in arrays else None
        self.heads, self.residual, self.rescale, self.causal = heads, residual, float(rescale), causal

    def __call__(self, x: Array, context: Array | None = None) -> Array:
        """The output for an image (height, width, channels) or a sequence (length, channels), of the same shape."""
        sequence = x.reshape(-1, x.shape[-1])
        if self.group_norm is not None:
            sequence = self.group_norm(sequence)
        other = sequence if context is None else context
        parts = zip(
            (sequence, other, other), (self.to_q, self.to_k, self.to_v), (self.norm_q, self.norm_k, None), strict=True
        )
        found = self.to_out[0](attend(*(self._split(*part) for part in parts), causal=self.causal)).reshape(x.shape)
        return ((found + x) if self.residual else found) / self.rescale

    def both(self, x: Array, context: Array) -> tuple[Array, Array | None]:
        """The outputs for two sequences, each of which attends to both; None for the second where it has none."""
        assert self.add_q_proj is not None and self.add_k_proj is not None and self.add_v_proj is not None  # noqa: PT018
        layers = (
            (self.to_q, self.norm_q, self.add_q_proj, self.norm_added_q),
            (self.to_k, self.norm_k, self.add_k_proj, self.norm_added_k),
            (self.to_v, None, self.add_v_proj, None),
        )
        joined = (
            jnp.concatenate([self._split(x, of_x, norm), self._split(context, of_context, norm_of_context)])
            for of_x, norm, of_context, norm_of_context in layers
        )
        found = attend(*joined)
        beside = None if self.to_add_out is None else self.to_add_out(found[x.shape[0] :])
        return self.to_out[0](found[: x.shape[0]]), beside

    def _split(self, x: Array, layer: Linear, norm: RMSNorm | None) -> Array:
        """One projection of a sequence, head by head."""
        heads = layer(x).reshape(x.shape[0], self.heads, -1)
        return heads if norm is None else norm(heads)


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
            return FEED_FORWARD[self.kind](y)
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
    """Attention to itself, attention to the prompt, and a feed-forward layer, each after a norm and added."""

    norm1: LayerNorm
    attn1: Attention
    norm2: LayerNorm
    attn2: Attention
    norm3: LayerNorm
    ff: FeedForward
    only_cross: bool = eqx.field(static=True)

    def __init__(self, arrays: Arrays, width: int, heads: int, context: int, only_cross: bool):
        self.norm1, self.norm2, self.norm3 = (LayerNorm(arrays / f"norm{i}", width, 1e-5) for i in (1, 2, 3))
        self.attn2 = Attention(arrays / "attn2", width, heads, context=context)
        self.attn1 = Attention(arrays / "attn1", width, heads, context=context if only_cross else None)
        self.ff = FeedForward(arrays / "ff", width, "geglu")
        self.only_cross = only_cross

    def __call__(self, x: Array, context: Array) -> Array:
        x = self.attn1(self.norm1(x), context if self.only_cross else None) + x
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
