"""The UNet that `UNet2DModel` and `UNet2DConditionModel` have in common; unet_2d.py and unet_condition.py build it."""

from __future__ import annotations

from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from composeprob.pretrained.blocks import Middle, Stage
from composeprob.pretrained.config import unsupported
from composeprob.pretrained.embeddings import EmbeddingMLP, Fourier, Sinusoids
from composeprob.pretrained.layers import ACTIVATIONS, Conv, Embedding, GroupNorm, Linear


class UNet(eqx.Module):
    """A UNet over one image, given a time and conditions.

    Attributes:
        time_proj, time_embedding: make the embedding of the time.
        class_embedding: of the label; ``class_embed_type`` states what a label is.
        add_time_proj, add_embedding: of the pooled prompt and the image's sizes.
        encoder_hid_proj: applied to the prompt first.
        activation: after the last norm.
        told_sigma: the time is the noise's standard deviation, which also divides the output.
    """

    conv_in: Conv
    time_proj: Sinusoids | Fourier | Embedding
    time_embedding: EmbeddingMLP
    class_embedding: Embedding | EmbeddingMLP | Linear | None
    add_time_proj: Sinusoids | None
    add_embedding: EmbeddingMLP | None
    encoder_hid_proj: Linear | None
    down_blocks: tuple[Stage, ...]
    mid_block: Middle | None
    up_blocks: tuple[Stage, ...]
    conv_norm_out: GroupNorm
    conv_out: Conv
    class_embed_type: str | None = eqx.field(static=True)
    concatenated: bool = eqx.field(static=True)
    embedding_activation: str = eqx.field(static=True)
    activation: str = eqx.field(static=True)
    centred: bool = eqx.field(static=True)
    takes_sigma: bool = eqx.field(static=True)

    def __call__(
        self,
        x: Array,
        t: Array,
        prompt: Array | None = None,
        pooled: Array | None = None,
        size: Array | None = None,
        label: Array | None = None,
    ) -> Array:
        """The output for one event.

        Args:
            x: an image or latents, (height, width, channels).
            t: the time, a scalar.
            prompt: hidden states of the prompt, (length, channels).
            pooled: the prompt as one vector.
            size: height and width of the image before scaling, its crop's top and left, and its target size, (6,).
            label: a class, or what stands for one.
        """
        dtype = self.conv_in.weight.dtype
        embedding = self.time_embedding(self.time_proj(t)).astype(dtype)
        if label is not None:
            embedding = self._with_label(embedding, label)
        if self.add_embedding is not None and self.add_time_proj is not None:
            assert pooled is not None
            assert size is not None  # its factor gives both
            sizes = jax.vmap(self.add_time_proj)(size).ravel()
            embedding = embedding + self.add_embedding(jnp.concatenate([pooled.astype(jnp.float32), sizes]))
        embedding = ACTIVATIONS[self.embedding_activation](embedding)
        context = None if prompt is None else prompt.astype(dtype)
        if self.encoder_hid_proj is not None and context is not None:
            context = self.encoder_hid_proj(context)
        hidden = self.conv_in((2 * x - 1.0 if self.centred else x).astype(dtype))
        skips = [hidden]
        for stage in self.down_blocks:
            hidden, stage_skips = stage.down(hidden, embedding, context)
            skips += stage_skips
        if self.mid_block is not None:
            hidden = self.mid_block(hidden, embedding, context)
        for stage in self.up_blocks:
            hidden = stage.up(hidden, skips, embedding, context)
        output = self.conv_out(ACTIVATIONS[self.activation](self.conv_norm_out(hidden))).astype(x.dtype)
        return output / t if self.takes_sigma else output

    def _with_label(self, embedding: Array, label: Array) -> Array:
        if self.class_embed_type == "timestep":
            assert isinstance(self.time_proj, Sinusoids | Fourier)
            label = self.time_proj(label)
        embedded = label if self.class_embedding is None else self.class_embedding(label)
        embedded = embedded.astype(embedding.dtype)
        return jnp.concatenate([embedding, embedded]) if self.concatenated else embedding + embedded


def label_embedding(
    o: SimpleNamespace, width: int, inputs: int, where: str
) -> Embedding | EmbeddingMLP | Linear | None:
    """The layer that embeds labels; None where there are none, or a label is an embedding itself."""
    if o.class_embed_type is None:
        return None if o.num_class_embeds is None else Embedding(o.num_class_embeds, width)
    if o.class_embed_type == "timestep":
        return EmbeddingMLP(inputs, width, getattr(o, "time_embedding_act", "silu"))
    if o.class_embed_type == "identity":
        return None
    projected = getattr(o, "projection_class_embeddings_input_dim", None)
    if projected is not None and o.class_embed_type == "projection":
        return EmbeddingMLP(projected, width)
    if projected is not None and o.class_embed_type == "simple_projection":
        return Linear(projected, width)
    return unsupported(where, "class_embed_type", o.class_embed_type, (None, "timestep", "identity"))


def label_kind(o: SimpleNamespace) -> str | None:
    """What a label is: ``"index"``, ``"number"``, ``"vector"``, or None where the network knows none."""
    if o.class_embed_type is None:
        return None if o.num_class_embeds is None else "index"
    return "number" if o.class_embed_type == "timestep" else "vector"
