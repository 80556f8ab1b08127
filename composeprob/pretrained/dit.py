"""`DiTTransformer2DModel`: class-conditional transformers over patches of latents (Peebles & Xie 2023)."""

from __future__ import annotations

from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from composeprob.json_data import JSONObject
from composeprob.pretrained.attention import FEED_FORWARD, Attention, FeedForward
from composeprob.pretrained.config import options
from composeprob.pretrained.embeddings import EmbeddingMLP, Sinusoids, grid_sinusoids
from composeprob.pretrained.layers import Conv, Embedding, LayerNorm, Linear
from composeprob.pretrained.network import Network


class Patches(eqx.Module):
    """Patches of an image as a sequence, their places added."""

    proj: Conv
    size: int = eqx.field(static=True)
    base: int = eqx.field(static=True)

    def __init__(self, channels: int, width: int, size: int, base: int):
        self.proj = Conv(channels, width, size, stride=size, padding=0)
        self.size, self.base = size, base

    def __call__(self, x: Array) -> Array:
        hidden = self.proj(x)
        rows, columns, width = hidden.shape
        return hidden.reshape(-1, width) + grid_sinusoids(width, rows, columns, self.base).astype(hidden.dtype)


class LabelTable(eqx.Module):
    """Embeddings of labels, the last of them for no label."""

    embedding_table: Embedding


class TimeAndLabel(eqx.Module):
    """The sum of a time's and a label's embeddings."""

    timestep_embedder: EmbeddingMLP
    class_embedder: LabelTable

    def __init__(self, classes: int, width: int):
        self.timestep_embedder = EmbeddingMLP(256, width)
        self.class_embedder = LabelTable(Embedding(classes + 1, width))

    def __call__(self, t: Array, label: Array) -> Array:
        waves = Sinusoids(256, cosine_first=True, shift=1)(t)
        return self.timestep_embedder(waves) + self.class_embedder.embedding_table(label)


class AdaptiveNorm(eqx.Module):
    """A layer norm without weights, and scales, shifts and gates made of an embedding.

    Attributes:
        emb: makes the embedding, where a block makes its own.
        linear: to the scales, shifts and gates.
    """

    emb: TimeAndLabel | None
    linear: Linear

    def __init__(self, width: int, count: int, classes: int | None = None):
        self.emb = None if classes is None else TimeAndLabel(classes, width)
        self.linear = Linear(width, count * width)

    def parts(self, embedding: Array, count: int) -> list[Array]:
        """The parts of the projected embedding."""
        return jnp.split(self.linear(jax.nn.silu(embedding)), count)


def plain_norm(x: Array) -> Array:
    """A layer norm without weights."""
    return LayerNorm(x.shape[-1], 1e-6, affine=False)(x)


class Block(eqx.Module):
    """Attention and a feed-forward layer, each scaled, shifted and gated by time and label."""

    norm1: AdaptiveNorm
    attn1: Attention
    norm3: LayerNorm
    ff: FeedForward

    def __call__(self, x: Array, t: Array, label: Array) -> Array:
        assert self.norm1.emb is not None
        embedding = self.norm1.emb(t, label)
        shift, scale, gate, shift_ff, scale_ff, gate_ff = self.norm1.parts(embedding, 6)
        x = x + gate * self.attn1(plain_norm(x) * (1 + scale) + shift)
        return x + gate_ff * self.ff(self.norm3(x) * (1 + scale_ff) + shift_ff)


class DiT(eqx.Module):
    """A transformer over patches of latents, given a time and a label."""

    pos_embed: Patches
    transformer_blocks: tuple[Block, ...]
    proj_out_1: Linear
    proj_out_2: Linear

    def __call__(self, x: Array, t: Array, label: Array) -> Array:
        """The noise of latents x (height, width, channels), and its variance where that is learned."""
        hidden = self.pos_embed(x.astype(self.proj_out_1.weight.dtype))
        for block in self.transformer_blocks:
            hidden = block(hidden, t, label)
        first = self.transformer_blocks[0].norm1.emb
        assert first is not None
        shift, scale = jnp.split(self.proj_out_1(jax.nn.silu(first(t, label))), 2)
        output = self.proj_out_2(plain_norm(hidden) * (1 + scale) + shift)
        return unpatched(output, x.shape[0], x.shape[1], self.pos_embed.size).astype(x.dtype)


def unpatched(sequence: Array, height: int, width: int, size: int) -> Array:
    """The image of a sequence of patches, each (size, size, channels) in a row."""
    rows, columns = height // size, width // size
    patches = sequence.reshape(rows, columns, size, size, -1)
    return patches.transpose(0, 2, 1, 3, 4).reshape(height, width, -1)


def _options(config: JSONObject, where: str) -> SimpleNamespace:
    """The options of a `DiTTransformer2DModel`, with the original's defaults."""
    return options(
        config,
        where,
        defaults={
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "in_channels": 4,
            "out_channels": None,
            "num_layers": 28,
            "dropout": 0.0,
            "norm_num_groups": 32,  # the original has no group norm here either
            "attention_bias": True,
            "sample_size": 32,
            "patch_size": 2,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "upcast_attention": False,
            "norm_type": "ada_norm_zero",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-5,
        },
        supported={"activation_fn": tuple(FEED_FORWARD), "norm_type": ("ada_norm_zero",)},
    )


def build(config: JSONObject, where: str) -> Network:
    """The skeleton of a `DiTTransformer2DModel` from its config.json.

    Raises:
        LoadError: an option that is not supported.
    """
    o = _options(config, where)
    width = o.num_attention_heads * o.attention_head_dim
    outputs = o.in_channels if o.out_channels is None else o.out_channels
    blocks = tuple(
        Block(
            AdaptiveNorm(width, 6, o.num_embeds_ada_norm),
            Attention(width, o.num_attention_heads, o.attention_head_dim, bias=o.attention_bias),
            LayerNorm(width, o.norm_eps, o.norm_elementwise_affine),
            FeedForward(width, o.activation_fn),
        )
        for _ in range(o.num_layers)
    )
    network = DiT(
        Patches(o.in_channels, width, o.patch_size, o.sample_size // o.patch_size),
        blocks,
        Linear(width, 2 * width),
        Linear(width, o.patch_size**2 * outputs),
    )
    return Network(
        network, o.sample_size, o.in_channels, outputs, o.patch_size, conditions={"label": ()},
        classes=o.num_embeds_ada_norm, null_label=o.num_embeds_ada_norm,
    )  # fmt: skip
