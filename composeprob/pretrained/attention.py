"""Attention, and the transformer blocks that UNets of text-to-image models have between their convolutions."""

from __future__ import annotations

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from composeprob.pretrained.layers import ACTIVATIONS, Conv, GroupNorm, LayerNorm, Linear, exact_gelu


def attend(query: Array, key: Array, value: Array, heads: int, *, causal: bool = False) -> Array:
    """softmax(q·kᵀ/√d)·v of sequences (length, heads·d), each head separately; (query's length, heads·d)."""

    def split(x: Array) -> Array:
        return x.reshape(x.shape[0], heads, -1)

    parts = split(query), split(key), split(value)
    elsewhere = partial(jax.nn.dot_product_attention, is_causal=causal)
    # On processors what JAX offers takes up to three times as long as the products written out.
    found = jax.lax.platform_dependent(*parts, cpu=partial(_products, causal=causal), default=elsewhere)
    return found.reshape(query.shape)


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
    """Attention of a sequence to itself, or to another one.

    Args:
        width: channels of the sequence.
        heads, size: number of heads and channels of each.
        context: channels of what is attended to; None for the sequence itself.
        bias: whether the projections to queries, keys and values have one.
        groups: of a group norm before; None without.
        residual: whether the input is added.
        rescale: divides the output.
    """

    group_norm: GroupNorm | None
    to_q: Linear
    to_k: Linear
    to_v: Linear
    to_out: tuple[Linear]
    heads: int = eqx.field(static=True)
    residual: bool = eqx.field(static=True)
    rescale: float = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        heads: int,
        size: int,
        *,
        context: int | None = None,
        bias: bool = False,
        groups: int | None = None,
        eps: float = 1e-5,
        residual: bool = False,
        rescale: float = 1.0,
    ):
        inner = heads * size
        self.group_norm = None if groups is None else GroupNorm(groups, width, eps)
        self.to_q = Linear(width, inner, bias)
        self.to_k, self.to_v = (Linear(width if context is None else context, inner, bias) for _ in range(2))
        self.to_out = (Linear(inner, width),)
        self.heads, self.residual, self.rescale = heads, residual, float(rescale)

    def __call__(self, x: Array, context: Array | None = None) -> Array:
        """The output for an image (height, width, channels) or a sequence (length, channels), of the same shape."""
        sequence = x.reshape(-1, x.shape[-1])
        if self.group_norm is not None:
            sequence = self.group_norm(sequence)
        other = sequence if context is None else context
        found = attend(self.to_q(sequence), self.to_k(other), self.to_v(other), self.heads)
        found = self.to_out[0](found).reshape(x.shape)
        return ((found + x) if self.residual else found) / self.rescale


class Gated(eqx.Module):
    """a(x·W + b), or h·a(g) with (h, g) the halves of that."""

    proj: Linear
    kind: str = eqx.field(static=True)

    def __init__(self, inputs: int, outputs: int, kind: str):
        self.kind = kind
        self.proj = Linear(inputs, outputs * (2 if self.has_gate else 1))

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
    """Two layers with four times the width between them; ``net.1`` is dropout in training."""

    net: tuple[Gated, None, Linear]

    def __init__(self, width: int, kind: str):
        self.net = (Gated(width, 4 * width, kind), None, Linear(4 * width, width))

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

    def __init__(self, width: int, heads: int, context: int, only_cross: bool):
        size = width // heads
        self.norm1, self.norm2, self.norm3 = (LayerNorm(width, 1e-5) for _ in range(3))
        self.attn1 = Attention(width, heads, size, context=context if only_cross else None)
        self.attn2 = Attention(width, heads, size, context=context)
        self.ff = FeedForward(width, "geglu")
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
        self, channels: int, heads: int, layers: int, context: int, groups: int, linear: bool, only_cross: bool = False
    ):
        inner = heads * (channels // heads)
        self.norm = GroupNorm(groups, channels, 1e-6)
        self.proj_in = Linear(channels, inner) if linear else Conv(channels, inner, 1)
        self.transformer_blocks = tuple(TransformerBlock(inner, heads, context, only_cross) for _ in range(layers))
        self.proj_out = Linear(inner, channels) if linear else Conv(inner, channels, 1)

    def __call__(self, x: Array, context: Array) -> Array:
        hidden = self.proj_in(self.norm(x))
        sequence = hidden.reshape(-1, hidden.shape[-1])
        for block in self.transformer_blocks:
            sequence = block(sequence, context)
        return self.proj_out(sequence.reshape(hidden.shape)) + x
