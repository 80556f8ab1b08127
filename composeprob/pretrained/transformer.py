"""Transformers over patches of latents: `DiTTransformer2DModel` (Peebles & Xie 2023), `SD3Transformer2DModel` (Esser
et al. 2024)."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from composeprob.json_data import JSONObject
from composeprob.pretrained.attention import FEED_FORWARD, Attention, FeedForward
from composeprob.pretrained.config import Options, anything, positive, whole
from composeprob.pretrained.layers import Embedding, EmbeddingMLP, LayerNorm, Linear, Patches, Sinusoids, normalised
from composeprob.pretrained.network import Network
from composeprob.pretrained.tensors import Arrays


class Conditioning(eqx.Module):
    """The sum of a time's embedding and that of a label, or of a pooled prompt."""

    timestep_embedder: EmbeddingMLP
    beside: Embedding | EmbeddingMLP
    shift: float = eqx.field(static=True)

    def __init__(self, arrays: Arrays, width: int):
        self.timestep_embedder = EmbeddingMLP(arrays / "timestep_embedder", None, width)
        labels = "class_embedder" in arrays
        table = arrays / "class_embedder" / "embedding_table"
        self.beside = Embedding(table, width) if labels else EmbeddingMLP(arrays / "text_embedder", None, width)
        self.shift = 1.0 if labels else 0.0  # of the frequencies, in the originals

    def __call__(self, t: Array, beside: Array) -> Array:
        waves = Sinusoids(self.timestep_embedder.linear_1.inputs, cosine_first=True, shift=self.shift)(t)
        return self.timestep_embedder(waves) + self.beside(beside)


class AdaptiveNorm(eqx.Module):
    """A layer norm without weights, and scales, shifts and gates made of an embedding.

    Attributes:
        emb: makes the embedding, where a block makes its own.
        linear: to ``count`` scales, shifts and gates.
    """

    emb: Conditioning | None
    linear: Linear
    count: int = eqx.field(static=True)

    def __init__(self, arrays: Arrays, width: int, count: int):
        self.emb = Conditioning(arrays / "emb", width) if "emb" in arrays else None
        self.linear, self.count = Linear(arrays / "linear", width, count * width), count

    def parts(self, embedding: Array) -> list[Array]:
        """The parts of the projected embedding."""
        return jnp.split(self.linear(jax.nn.silu(embedding)), self.count)


def modulate(x: Array, scale: Array, shift: Array, norm: LayerNorm | None = None) -> Array:
    """The normalised sequence, by default without weights, scaled and shifted."""
    normed = normalised(x, 1e-6) if norm is None else norm(x)
    return normed * (1 + scale) + shift


class LabelBlock(eqx.Module):
    """Attention and a feed-forward layer, each scaled, shifted and gated by time and label."""

    norm1: AdaptiveNorm
    attn1: Attention
    norm3: LayerNorm
    ff: FeedForward

    def __call__(self, x: Array, t: Array, label: Array) -> Array:
        assert self.norm1.emb is not None
        shift, scale, gate, shift_ff, scale_ff, gate_ff = self.norm1.parts(self.norm1.emb(t, label))
        x = x + gate * self.attn1(modulate(x, scale, shift))
        return x + gate_ff * self.ff(modulate(x, scale_ff, shift_ff, self.norm3))


class DiT(eqx.Module):
    """A transformer over patches of latents, given a time and a label."""

    pos_embed: Patches
    transformer_blocks: tuple[LabelBlock, ...]
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
        output = self.proj_out_2(modulate(hidden, scale, shift))
        return self.pos_embed.image(output, *x.shape[:2]).astype(x.dtype)


class PromptBlock(eqx.Module):
    """One layer over patches and prompt, each scaled, shifted and gated by time and pooled prompt."""

    norm1: AdaptiveNorm
    norm1_context: AdaptiveNorm
    attn: Attention
    attn2: Attention | None
    ff: FeedForward
    ff_context: FeedForward | None

    def __init__(self, arrays: Arrays, width: int, heads: int):
        last = "ff_context" not in arrays
        second = "attn2" in arrays
        self.norm1 = AdaptiveNorm(arrays / "norm1", width, 9 if second else 6)
        self.norm1_context = AdaptiveNorm(arrays / "norm1_context", width, 2 if last else 6)
        self.attn = Attention(arrays / "attn", width, heads, bias=True)
        self.attn2 = Attention(arrays / "attn2", width, heads, bias=True) if second else None
        self.ff = FeedForward(arrays / "ff", width, "gelu-approximate")
        self.ff_context = None if last else FeedForward(arrays / "ff_context", width, "gelu-approximate")
        if self.attn.added is None or (self.attn.to_add_out is None) != last:
            raise arrays.foreign(f"{arrays.prefix}attn has not the projections of a prompt that its block needs")

    def __call__(self, x: Array, context: Array, conditioning: Array) -> tuple[Array, Array]:
        shift, scale, gate, shift_ff, scale_ff, gate_ff, *second = self.norm1.parts(conditioning)
        if self.ff_context is None:
            scale_c, shift_c = self.norm1_context.parts(conditioning)
        else:
            shift_c, scale_c, gate_c, shift_cf, scale_cf, gate_cf = self.norm1_context.parts(conditioning)
        found, beside = self.attn.both(modulate(x, scale, shift), modulate(context, scale_c, shift_c))
        before, x = x, x + gate * found
        if self.attn2 is not None:
            shift_2, scale_2, gate_2 = second
            x = x + gate_2 * self.attn2(modulate(before, scale_2, shift_2))
        x = x + gate_ff * self.ff(modulate(x, scale_ff, shift_ff))
        if self.ff_context is None or beside is None:
            return x, context
        context = context + gate_c * beside
        return x, context + gate_cf * self.ff_context(modulate(context, scale_cf, shift_cf))


class SD3(eqx.Module):
    """A transformer over patches of latents and a prompt."""

    pos_embed: Patches
    time_text_embed: Conditioning
    context_embedder: Linear
    transformer_blocks: tuple[PromptBlock, ...]
    norm_out: AdaptiveNorm
    proj_out: Linear

    def __call__(self, x: Array, t: Array, prompt: Array, pooled: Array) -> Array:
        """The velocity of latents x (height, width, channels), at time t from 0 to 1000."""
        dtype = self.proj_out.weight.dtype
        conditioning = self.time_text_embed(t, pooled)
        hidden, context = self.pos_embed(x.astype(dtype)), self.context_embedder(prompt.astype(dtype))
        for block in self.transformer_blocks:
            hidden, context = block(hidden, context, conditioning)
        scale, shift = self.norm_out.parts(conditioning)
        output = self.proj_out(modulate(hidden, scale, shift))
        return self.pos_embed.image(output, *x.shape[:2]).astype(x.dtype)


def dit(config: JSONObject, arrays: Arrays, where: str) -> Network:
    """A `DiTTransformer2DModel`: class-conditional latents.

    Raises:
        LoadError: an option that is not supported, or weights of another network.
    """
    o = Options(
        config, where, num_attention_heads=(16, whole), dropout=(0.0, anything),
        norm_num_groups=(32, anything),  # the original has no group norm here either
        attention_bias=(True, False), sample_size=(32, whole), activation_fn=("gelu-approximate", *FEED_FORWARD),
        upcast_attention=(False, True), norm_type=("ada_norm_zero",), norm_elementwise_affine=(False, True),
        norm_eps=(1e-5, positive),
    )  # fmt: skip
    proj_out = Linear(arrays / "proj_out_2")
    width, heads = proj_out.inputs, o.num_attention_heads
    blocks = tuple(
        LabelBlock(
            AdaptiveNorm(block / "norm1", width, 6),
            Attention(block / "attn1", width, heads, bias=o.attention_bias),
            LayerNorm(block / "norm3", width, o.norm_eps, o.norm_elementwise_affine),
            FeedForward(block / "ff", width, o.activation_fn),
        )
        for block in arrays.items("transformer_blocks")
    )
    if not blocks or blocks[0].norm1.emb is None:
        raise arrays.foreign("it lacks transformer_blocks.0.norm1.emb")
    patches = Patches(arrays / "pos_embed", sample_size=o.sample_size)
    size = patches.size
    network = DiT(patches, blocks, Linear(arrays / "proj_out_1", width, 2 * width), proj_out)
    table = blocks[0].norm1.emb.beside
    assert isinstance(table, Embedding)
    classes = table.weight.shape[0] - 1  # the last is for no label
    channels, outputs = patches.proj.weight.shape[2], proj_out.outputs // size**2
    arrays.finish()
    o.agree(
        in_channels=channels, out_channels=outputs, num_layers=len(blocks), patch_size=size,
        attention_head_dim=width // heads, num_embeds_ada_norm=classes,
    )  # fmt: skip
    return Network(
        network, o.sample_size, channels, outputs, size, conditions={"label": ()}, classes=classes, null_label=classes
    )


def sd3(config: JSONObject, arrays: Arrays, where: str) -> Network:
    """An `SD3Transformer2DModel`: flow matching by a transformer over patches and prompt together.

    Raises:
        LoadError: an option that is not supported, or weights of another network.
    """
    o = Options(config, where, sample_size=(128, anything), num_attention_heads=(18, whole))
    patches, heads = Patches(arrays / "pos_embed"), o.num_attention_heads
    width = patches.proj.outputs
    context, time = Linear(arrays / "context_embedder", None, width), Conditioning(arrays / "time_text_embed", width)
    blocks = tuple(PromptBlock(block, width, heads) for block in arrays.items("transformer_blocks"))
    proj_out = Linear(arrays / "proj_out", width)
    network = SD3(patches, time, context, blocks, AdaptiveNorm(arrays / "norm_out", width, 2), proj_out)
    channels, outputs = patches.proj.weight.shape[2], proj_out.outputs // patches.size**2
    arrays.finish()
    if not blocks or not isinstance(time.beside, EmbeddingMLP):
        raise arrays.foreign("it lacks transformer_blocks or time_text_embed.text_embedder")
    pooled = time.beside.linear_1.inputs
    o.agree(
        patch_size=patches.size, in_channels=channels, out_channels=outputs, num_layers=len(blocks),
        attention_head_dim=width // heads, joint_attention_dim=context.inputs, caption_projection_dim=width,
        pooled_projection_dim=pooled, pos_embed_max_size=patches.places,
        dual_attention_layers=tuple(i for i, block in enumerate(blocks) if block.attn2 is not None),
        qk_norm=None if blocks[0].attn.own.norms[0] is None else "rms_norm",
    )  # fmt: skip
    return Network(
        network, o.sample_size, channels, outputs, patches.size,
        conditions={"prompt": (0, context.inputs), "pooled": (pooled,)},
    )  # fmt: skip
