"""Transformers over patches of latents: `DiTTransformer2DModel` (Peebles & Xie 2023),
`SD3Transformer2DModel` (Esser et al. 2024)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from composeprob.json_data import JSONObject
from composeprob.pretrained import layers
from composeprob.pretrained.config import Options, anything, positive, whole
from composeprob.pretrained.tensors import Arrays, Network


def embed_time(arrays: Arrays, t: Array, shift: float = 0.0) -> Array:
    """The embedding of a time; the shift is that of its frequencies."""
    inputs = arrays.shape("timestep_embedder.linear_1.weight", 2)[1]
    return layers.mlp(
        arrays / "timestep_embedder", layers.sinusoids(t, inputs, shift=shift)
    )


def adaptive(arrays: Arrays, embedding: Array, width: int, count: int) -> list[Array]:
    """The scales, shifts and gates of a layer norm that are made of an embedding,
    (width,) each."""
    return jnp.split(
        layers.linear(arrays, jax.nn.silu(embedding), count * width), count
    )


def modulate(x: Array, scale: Array, shift: Array) -> Array:
    """The sequence, normalised without weights, scaled and shifted."""
    return layers.normalised(x, 1e-6) * (1 + scale) + shift


@dataclass(frozen=True)
class DiT:
    """A transformer over patches of latents, given a time and a label."""

    heads: int
    bias: bool  # of attention
    activation: str  # of the feed-forward layers
    eps: float  # of the norms before them
    affine: bool  # whether these have weights
    sample_size: int  # rows of the latents of the training

    def __call__(self, arrays: Arrays, x: Array, t: Array, label: Array) -> Array:
        """The noise of latents x (height, width, channels), and its variance where that
        is learned."""
        hidden = layers.patches(arrays / "pos_embed", x, self.sample_size)
        embeddings = []
        for block in arrays.items("transformer_blocks"):
            below = block / "norm1" / "emb"
            time = embed_time(below, t, shift=1.0)
            table = below.take(
                "class_embedder.embedding_table.weight", None, time.shape[0]
            )
            embeddings.append(time + table[label])
            hidden = self._block(block, hidden, embeddings[-1])
        shift, scale = adaptive(
            arrays / "proj_out_1", embeddings[0], hidden.shape[-1], 2
        )
        output = layers.linear(arrays / "proj_out_2", modulate(hidden, scale, shift))
        return layers.image_of(output, *x.shape[:2]).astype(x.dtype)

    def _block(self, arrays: Arrays, x: Array, embedding: Array) -> Array:
        """Attention and a feed-forward layer, each scaled, shifted and gated by time
        and label."""
        parts = adaptive(arrays / "norm1" / "linear", embedding, x.shape[-1], 6)
        shift, scale, gate, shift_ff, scale_ff, gate_ff = parts
        x = x + gate * layers.attention(
            arrays / "attn1", modulate(x, scale, shift), self.heads, bias=self.bias
        )
        normed = (
            layers.layer_norm(arrays / "norm3", x, self.eps)
            if self.affine
            else layers.normalised(x, self.eps)
        )
        return x + gate_ff * layers.feed_forward(
            arrays / "ff", normed * (1 + scale_ff) + shift_ff, self.activation
        )


@dataclass(frozen=True)
class SD3:
    """A transformer over patches of latents and a prompt, given a time and the pooled
    prompt."""

    heads: int

    def __call__(
        self, arrays: Arrays, x: Array, t: Array, prompt: Array, pooled: Array
    ) -> Array:
        """The velocity of latents x (height, width, channels), at time t from 0 to
        1000."""
        below = arrays / "time_text_embed"
        embedding = embed_time(below, t)
        embedding += layers.mlp(below / "text_embedder", pooled, embedding.shape[0])
        hidden = layers.patches(arrays / "pos_embed", x)
        width = hidden.shape[-1]
        context = layers.linear(arrays / "context_embedder", prompt, width)
        for block in arrays.items("transformer_blocks"):
            hidden, context = self._block(block, hidden, context, embedding)
        scale, shift = adaptive(arrays / "norm_out" / "linear", embedding, width, 2)
        output = layers.linear(arrays / "proj_out", modulate(hidden, scale, shift))
        return layers.image_of(output, *x.shape[:2]).astype(x.dtype)

    def _block(
        self, arrays: Arrays, x: Array, context: Array, embedding: Array
    ) -> tuple[Array, Array]:
        """One layer over patches and prompt, each scaled, shifted and gated; the last
        one returns no new prompt."""
        width, kind = x.shape[-1], "gelu-approximate"
        last, second = "ff_context" not in arrays, "attn2" in arrays
        parts = adaptive(
            arrays / "norm1" / "linear", embedding, width, 9 if second else 6
        )
        shift, scale, gate, shift_ff, scale_ff, gate_ff, *of_second = parts
        parts = adaptive(
            arrays / "norm1_context" / "linear", embedding, width, 2 if last else 6
        )
        shift_c, scale_c, *of_context = (
            parts[::-1] if last else parts
        )  # the last one has the scale first
        normed, normed_c = (
            modulate(x, scale, shift),
            modulate(context, scale_c, shift_c),
        )
        found, beside = layers.joint_attention(
            arrays / "attn", normed, normed_c, self.heads, last=last
        )
        before, x = x, x + gate * found
        if second:
            shift_2, scale_2, gate_2 = of_second
            normed = modulate(before, scale_2, shift_2)
            x = x + gate_2 * layers.attention(
                arrays / "attn2", normed, self.heads, bias=True
            )
        x = x + gate_ff * layers.feed_forward(
            arrays / "ff", modulate(x, scale_ff, shift_ff), kind
        )
        if last:
            return x, context
        gate_c, shift_cf, scale_cf, gate_cf = of_context
        context = context + gate_c * beside
        changed = layers.feed_forward(
            arrays / "ff_context", modulate(context, scale_cf, shift_cf), kind
        )
        return x, context + gate_cf * changed


def dit(config: JSONObject, arrays: Arrays, where: str) -> Network:
    """A `DiTTransformer2DModel`: class-conditional latents."""
    o = Options(
        config, where, num_attention_heads=(16, whole), dropout=(0.0, anything),
        norm_num_groups=(32, anything),  # the original has no group norm here either
        attention_bias=(True, False), sample_size=(32, whole), activation_fn=("gelu-approximate", *layers.FEED_FORWARD),
        upcast_attention=(False, True), norm_type=("ada_norm_zero",), norm_elementwise_affine=(False, True),
        norm_eps=(1e-5, positive),
    )  # fmt: skip
    width, channels, size, _ = arrays.shape("pos_embed.proj.weight", 4)
    block = "transformer_blocks.0.norm1.emb"
    classes = (
        arrays.shape(f"{block}.class_embedder.embedding_table.weight", 2)[0] - 1
    )  # the last is for no label
    o.agree(
        in_channels=channels, out_channels=arrays.shape("proj_out_2.weight", 2)[0] // size**2, patch_size=size,
        num_layers=len(arrays.items("transformer_blocks")), attention_head_dim=width // o.num_attention_heads,
        num_embeds_ada_norm=classes,
    )  # fmt: skip
    form = DiT(
        o.num_attention_heads,
        o.attention_bias,
        o.activation_fn,
        o.norm_eps,
        o.norm_elementwise_affine,
        o.sample_size,
    )
    return Network.traced(
        form, arrays, sample_size=o.sample_size, channels=channels, multiple=size, conditions={"label": ()},
        classes=classes, null_label=classes,
    )  # fmt: skip


def sd3(config: JSONObject, arrays: Arrays, where: str) -> Network:
    """An `SD3Transformer2DModel`: flow matching by a transformer over patches and
    prompt together."""
    o = Options(
        config, where, sample_size=(128, anything), num_attention_heads=(18, whole)
    )
    width, channels, size, _ = arrays.shape("pos_embed.proj.weight", 4)
    context = arrays.shape("context_embedder.weight", 2)[1]
    pooled = arrays.shape("time_text_embed.text_embedder.linear_1.weight", 2)[1]
    blocks = arrays.items("transformer_blocks")
    if not blocks:
        raise arrays.foreign("it lacks transformer_blocks")
    o.agree(
        patch_size=size, in_channels=channels, out_channels=arrays.shape("proj_out.weight", 2)[0] // size**2,
        num_layers=len(blocks), attention_head_dim=width // o.num_attention_heads, joint_attention_dim=context,
        caption_projection_dim=width, pooled_projection_dim=pooled,
        pos_embed_max_size=math.isqrt(arrays.shape("pos_embed.pos_embed", 3)[1]),
        dual_attention_layers=tuple(i for i, block in enumerate(blocks) if "attn2" in block),
        qk_norm="rms_norm" if "attn.norm_q" in blocks[0] else None,
    )  # fmt: skip
    return Network.traced(
        SD3(o.num_attention_heads), arrays, sample_size=o.sample_size, channels=channels, multiple=size,
        conditions={"prompt": (0, context), "pooled": (pooled,)},
    )  # fmt: skip
