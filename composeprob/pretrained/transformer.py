"""Transformers over patches of latents: `DiTTransformer2DModel` (Peebles & Xie 2023),
`SD3Transformer2DModel` (Esser et al. 2024)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from composeprob.json_data import JSONObject
from composeprob.pretrained import layers
from composeprob.pretrained.config import Options, anything, positive, whole
from composeprob.pretrained.tensors import Arrays, Network


class Modulation(NamedTuple):
    """Shift and scale of a normalised sequence, and the gate of the layer after it."""

    shift: Float[Array, " channels"]
    scale: Float[Array, " channels"]
    gate: Float[Array, " channels"]

    def apply(
        self, x: Float[Array, "length channels"]
    ) -> Float[Array, "length channels"]:
        """The sequence, normalised without weights, scaled and shifted."""
        return modulate(x, self.scale, self.shift)


def embed_time(
    arrays: Arrays, t: Float[Array, ""], shift: float = 0.0
) -> Float[Array, " embedding"]:
    """Embedding of a time; the shift is that of its frequencies."""
    inputs = arrays.shape("timestep_embedder.linear_1.weight", 2)[1]
    sinusoids = layers.sinusoids(t, inputs, shift=shift)
    return layers.mlp(arrays / "timestep_embedder", sinusoids)


def adaptive(
    arrays: Arrays, embedding: Float[Array, " embedding"], width: int, count: int
) -> list[Float[Array, " {width}"]]:
    """Scales, shifts and gates of a layer norm, a linear function of an embedding."""
    numbers = layers.linear(arrays, jax.nn.silu(embedding), count * width)
    return jnp.split(numbers, count)


def modulations(
    arrays: Arrays, embedding: Float[Array, " embedding"], width: int, count: int
) -> list[Modulation]:
    """Modulations of ``count`` sublayers of a block by an embedding."""
    numbers = adaptive(arrays, embedding, width, 3 * count)
    return [Modulation(*numbers[3 * i : 3 * i + 3]) for i in range(count)]


def modulate(
    x: Float[Array, "length channels"],
    scale: Float[Array, " channels"],
    shift: Float[Array, " channels"],
) -> Float[Array, "length channels"]:
    """The sequence, normalised without weights, scaled and shifted."""
    return layers.normalised(x, 1e-6) * (1 + scale) + shift


@dataclass(frozen=True)
class DiT:
    """A transformer over patches of latents, given a time and a label."""

    heads: int
    bias: bool  # of attention
    activation: str  # of the feed-forward layers
    eps: float  # of the norms before them
    affine: bool  # true if these norms have weights
    sample_size: int  # rows of the latents of the training

    def __call__(self, arrays: Arrays, x: Array, t: Array, label: Array) -> Array:
        """The noise of latents x (height, width, channels), and its variance where that
        is learned."""
        hidden = layers.patches(arrays / "pos_embed", x, self.sample_size)
        embeddings = []
        for block in arrays.items("transformer_blocks"):
            # Each block embeds time and label anew; the output takes the first one's.
            embedding = self._embedding(block / "norm1" / "emb", t, label)
            embeddings.append(embedding)
            hidden = self._block(block, hidden, embedding)
        width = hidden.shape[-1]
        shift, scale = adaptive(arrays / "proj_out_1", embeddings[0], width, 2)
        output = layers.linear(arrays / "proj_out_2", modulate(hidden, scale, shift))
        return layers.image_of(output, *x.shape[:2]).astype(x.dtype)

    def _embedding(self, arrays: Arrays, t: Array, label: Array) -> Array:
        time = embed_time(arrays, t, shift=1.0)
        name = "class_embedder.embedding_table.weight"
        return time + arrays.take(name, None, time.shape[0])[label]

    def _block(self, arrays: Arrays, x: Array, embedding: Array) -> Array:
        """Attention and a feed-forward layer, each scaled, shifted and gated by time
        and label."""
        to_modulation = arrays / "norm1" / "linear"
        attention, feed_forward = modulations(to_modulation, embedding, x.shape[-1], 2)
        x = x + attention.gate * layers.attention(
            arrays / "attn1", attention.apply(x), self.heads, bias=self.bias
        )
        # Not `Modulation.apply`: this norm has an ε of its own, and may have weights.
        if self.affine:
            normed = layers.layer_norm(arrays / "norm3", x, self.eps)
        else:
            normed = layers.normalised(x, self.eps)
        modulated = normed * (1 + feed_forward.scale) + feed_forward.shift
        return x + feed_forward.gate * layers.feed_forward(
            arrays / "ff", modulated, self.activation
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
        """One layer over patches and prompt, each scaled, shifted and gated.

        The last layer returns the prompt unchanged: nothing reads it any more.
        """
        width = x.shape[-1]
        last = "ff_context" not in arrays
        # Of some layers the patches also attend to themselves alone, beside the joint
        # attention.
        dual = "attn2" in arrays
        count = 3 if dual else 2
        to_patches = arrays / "norm1" / "linear"
        joint, feed_forward, *others = modulations(to_patches, embedding, width, count)
        to_prompt = arrays / "norm1_context" / "linear"
        if last:
            # Without gates, and with the scale first.
            scale, shift = adaptive(to_prompt, embedding, width, 2)
            normed_context = modulate(context, scale, shift)
        else:
            joint_c, feed_forward_c = modulations(to_prompt, embedding, width, 2)
            normed_context = joint_c.apply(context)
        attended, attended_context = layers.joint_attention(
            arrays / "attn", joint.apply(x), normed_context, self.heads, last=last
        )
        hidden = x + joint.gate * attended
        if dual:
            alone = others[0]
            hidden = hidden + alone.gate * layers.attention(
                arrays / "attn2", alone.apply(x), self.heads, bias=True
            )
        hidden = hidden + feed_forward.gate * layers.feed_forward(
            arrays / "ff", feed_forward.apply(hidden), "gelu-approximate"
        )
        if last:
            return hidden, context
        context = context + joint_c.gate * attended_context
        change = layers.feed_forward(
            arrays / "ff_context", feed_forward_c.apply(context), "gelu-approximate"
        )
        return hidden, context + feed_forward_c.gate * change


def dit(config: JSONObject, arrays: Arrays, where: str) -> Network:
    """A `DiTTransformer2DModel`: class-conditional latents."""
    o = Options(
        config,
        where,
        num_attention_heads=(16, whole),
        dropout=(0.0, anything),
        # The original has no group norm here either.
        norm_num_groups=(32, anything),
        attention_bias=(True, False),
        sample_size=(32, whole),
        activation_fn=("gelu-approximate", *layers.FEED_FORWARD),
        upcast_attention=(False, True),
        norm_type=("ada_norm_zero",),
        norm_elementwise_affine=(False, True),
        norm_eps=(1e-5, positive),
    )
    width, channels, size, _ = arrays.shape("pos_embed.proj.weight", 4)
    embedder = "transformer_blocks.0.norm1.emb.class_embedder"
    # The last row of the table stands for "no label".
    classes = arrays.shape(f"{embedder}.embedding_table.weight", 2)[0] - 1
    o.agree(
        in_channels=channels,
        out_channels=arrays.shape("proj_out_2.weight", 2)[0] // size**2,
        patch_size=size,
        num_layers=len(arrays.items("transformer_blocks")),
        attention_head_dim=width // o.num_attention_heads,
        num_embeds_ada_norm=classes,
    )
    form = DiT(
        heads=o.num_attention_heads,
        bias=o.attention_bias,
        activation=o.activation_fn,
        eps=o.norm_eps,
        affine=o.norm_elementwise_affine,
        sample_size=o.sample_size,
    )
    return Network.traced(
        form,
        arrays,
        sample_size=o.sample_size,
        channels=channels,
        multiple=size,
        conditions={"label": ()},
        classes=classes,
        null_label=classes,
    )


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
    dual = tuple(i for i, block in enumerate(blocks) if "attn2" in block)
    qk_norm = "rms_norm" if "attn.norm_q" in blocks[0] else None
    o.agree(
        patch_size=size,
        in_channels=channels,
        out_channels=arrays.shape("proj_out.weight", 2)[0] // size**2,
        num_layers=len(blocks),
        attention_head_dim=width // o.num_attention_heads,
        joint_attention_dim=context,
        caption_projection_dim=width,
        pooled_projection_dim=pooled,
        pos_embed_max_size=math.isqrt(arrays.shape("pos_embed.pos_embed", 3)[1]),
        dual_attention_layers=dual,
        qk_norm=qk_norm,
    )
    return Network.traced(
        SD3(o.num_attention_heads),
        arrays,
        sample_size=o.sample_size,
        channels=channels,
        multiple=size,
        conditions={"prompt": (0, context), "pooled": (pooled,)},
    )
