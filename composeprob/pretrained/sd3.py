"""`SD3Transformer2DModel`: flow matching by a transformer over patches and prompt together (Esser et al. 2024)."""

from __future__ import annotations

from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from composeprob.json_data import JSONObject
from composeprob.pretrained.attention import FeedForward
from composeprob.pretrained.config import options
from composeprob.pretrained.dit import AdaptiveNorm, plain_norm, unpatched
from composeprob.pretrained.embeddings import EmbeddingMLP, Sinusoids
from composeprob.pretrained.layers import Conv, Linear, RMSNorm, parameter
from composeprob.pretrained.network import Network


class Patches(eqx.Module):
    """Patches of an image as a sequence, their places added from the middle of a table (1, places², width)."""

    proj: Conv
    pos_embed: Array
    size: int = eqx.field(static=True)
    places: int = eqx.field(static=True)

    def __init__(self, channels: int, width: int, size: int, places: int):
        self.proj = Conv(channels, width, size, stride=size, padding=0)
        self.pos_embed, self.size, self.places = parameter(1, places**2, width), size, places

    def __call__(self, x: Array) -> Array:
        hidden = self.proj(x)
        rows, columns, width = hidden.shape
        top, left = (self.places - rows) // 2, (self.places - columns) // 2
        table = self.pos_embed.reshape(self.places, self.places, width)
        return (hidden + table[top : top + rows, left : left + columns]).reshape(-1, width)


class TimeAndText(eqx.Module):
    """The sum of the time's and the pooled prompt's embeddings."""

    timestep_embedder: EmbeddingMLP
    text_embedder: EmbeddingMLP

    def __call__(self, t: Array, pooled: Array) -> Array:
        return self.timestep_embedder(Sinusoids(256, cosine_first=True, shift=0)(t)) + self.text_embedder(pooled)


class JointAttention(eqx.Module):
    """Attention of patches to themselves, and of patches and prompt to both where the layer has projections of it."""

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

    def __init__(self, width: int, heads: int, normed: bool, *, joint: bool, last: bool):
        def norm() -> RMSNorm | None:
            return RMSNorm(width // heads, 1e-6) if normed else None

        self.to_q, self.to_k, self.to_v = (Linear(width, width) for _ in range(3))
        self.to_out = (Linear(width, width),)
        self.norm_q, self.norm_k = norm(), norm()
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (Linear(width, width) if joint else None for _ in range(3))
        self.to_add_out = Linear(width, width) if joint and not last else None
        self.norm_added_q, self.norm_added_k = (norm(), norm()) if joint else (None, None)
        self.heads = heads

    def __call__(self, x: Array, context: Array | None = None) -> tuple[Array, Array | None]:
        def heads(y: Array, layer: Linear, norm: RMSNorm | None) -> Array:
            split = layer(y).reshape(y.shape[0], self.heads, -1)
            return split if norm is None else norm(split)

        query, key = heads(x, self.to_q, self.norm_q), heads(x, self.to_k, self.norm_k)
        value = heads(x, self.to_v, None)
        if context is not None:
            assert self.add_q_proj is not None
            assert self.add_k_proj is not None
            assert self.add_v_proj is not None
            query = jnp.concatenate([query, heads(context, self.add_q_proj, self.norm_added_q)])
            key = jnp.concatenate([key, heads(context, self.add_k_proj, self.norm_added_k)])
            value = jnp.concatenate([value, heads(context, self.add_v_proj, None)])
        found = jax.nn.dot_product_attention(query, key, value).reshape(query.shape[0], -1)
        of_x, of_context = found[: x.shape[0]], found[x.shape[0] :]
        beside = None if self.to_add_out is None else self.to_add_out(of_context)
        return self.to_out[0](of_x), beside


class Block(eqx.Module):
    """One layer over patches and prompt, each scaled, shifted and gated by time and pooled prompt."""

    norm1: AdaptiveNorm
    norm1_context: AdaptiveNorm
    attn: JointAttention
    attn2: JointAttention | None
    ff: FeedForward
    ff_context: FeedForward | None

    def __init__(self, width: int, heads: int, normed: bool, *, dual: bool, last: bool):
        self.norm1 = AdaptiveNorm(width, 9 if dual else 6)
        self.norm1_context = AdaptiveNorm(width, 2 if last else 6)
        self.attn = JointAttention(width, heads, normed, joint=True, last=last)
        self.attn2 = JointAttention(width, heads, normed, joint=False, last=True) if dual else None
        self.ff = FeedForward(width, "gelu-approximate")
        self.ff_context = None if last else FeedForward(width, "gelu-approximate")

    def __call__(self, x: Array, context: Array, conditioning: Array) -> tuple[Array, Array]:
        shift, scale, gate, shift_ff, scale_ff, gate_ff, *second = self.norm1.parts(
            conditioning, 9 if self.attn2 else 6
        )
        normed = plain_norm(x)
        if self.ff_context is None:
            scale_c, shift_c = self.norm1_context.parts(conditioning, 2)
        else:
            shift_c, scale_c, gate_c, shift_cf, scale_cf, gate_cf = self.norm1_context.parts(conditioning, 6)
        found, beside = self.attn(normed * (1 + scale) + shift, plain_norm(context) * (1 + scale_c) + shift_c)
        x = x + gate * found
        if self.attn2 is not None:
            shift_2, scale_2, gate_2 = second
            x = x + gate_2 * self.attn2(normed * (1 + scale_2) + shift_2)[0]
        x = x + gate_ff * self.ff(plain_norm(x) * (1 + scale_ff) + shift_ff)
        if self.ff_context is None or beside is None:
            return x, context
        context = context + gate_c * beside
        return x, context + gate_cf * self.ff_context(plain_norm(context) * (1 + scale_cf) + shift_cf)


class SD3(eqx.Module):
    """A transformer over patches of latents and a prompt."""

    pos_embed: Patches
    time_text_embed: TimeAndText
    context_embedder: Linear
    transformer_blocks: tuple[Block, ...]
    norm_out: AdaptiveNorm
    proj_out: Linear

    def __call__(self, x: Array, t: Array, prompt: Array, pooled: Array) -> Array:
        """The velocity of latents x (height, width, channels), at time t from 0 to 1000."""
        dtype = self.proj_out.weight.dtype
        conditioning = self.time_text_embed(t, pooled)
        hidden, context = self.pos_embed(x.astype(dtype)), self.context_embedder(prompt.astype(dtype))
        for block in self.transformer_blocks:
            hidden, context = block(hidden, context, conditioning)
        scale, shift = self.norm_out.parts(conditioning, 2)
        output = self.proj_out(plain_norm(hidden) * (1 + scale) + shift)
        return unpatched(output, x.shape[0], x.shape[1], self.pos_embed.size).astype(x.dtype)


def _options(config: JSONObject, where: str) -> SimpleNamespace:
    """The options of an `SD3Transformer2DModel`, with the original's defaults."""
    return options(
        config,
        where,
        defaults={
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "num_layers": 18,
            "attention_head_dim": 64,
            "num_attention_heads": 18,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1152,
            "pooled_projection_dim": 2048,
            "out_channels": 16,
            "pos_embed_max_size": 96,
            "dual_attention_layers": (),
            "qk_norm": None,
        },
        supported={"qk_norm": (None, "rms_norm")},
    )


def build(config: JSONObject, where: str) -> Network:
    """The skeleton of an `SD3Transformer2DModel` from its config.json.

    Raises:
        LoadError: an option that is not supported.
    """
    o = _options(config, where)
    width, outputs = o.num_attention_heads * o.attention_head_dim, o.out_channels or o.in_channels
    blocks = tuple(
        Block(
            width, o.num_attention_heads, o.qk_norm is not None, dual=i in o.dual_attention_layers,
            last=i == o.num_layers - 1,
        )
        for i in range(o.num_layers)
    )  # fmt: skip
    network = SD3(
        Patches(o.in_channels, width, o.patch_size, o.pos_embed_max_size),
        TimeAndText(EmbeddingMLP(256, width), EmbeddingMLP(o.pooled_projection_dim, width)),
        Linear(o.joint_attention_dim, o.caption_projection_dim),
        blocks,
        AdaptiveNorm(width, 2),
        Linear(width, o.patch_size**2 * outputs),
    )
    return Network(
        network, o.sample_size, o.in_channels, outputs, o.patch_size,
        conditions={"prompt": (0, o.joint_attention_dim), "pooled": (o.pooled_projection_dim,)},
    )  # fmt: skip
