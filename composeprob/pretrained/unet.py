"""UNets of diffusers and of guided-diffusion: one network, and what each class's config.json adds to its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from composeprob.json_data import JSON, JSONObject
from composeprob.pretrained.attention import Attention, SpatialTransformer
from composeprob.pretrained.blocks import Attend, Body, Of, Resnet, Stage, Style, check_kinds
from composeprob.pretrained.config import Options, anything, flag, number, positive, text_list, unsupported, whole
from composeprob.pretrained.layers import ACTIVATIONS, Embedding, EmbeddingMLP, Fourier, Linear, Sinusoids, check_split
from composeprob.pretrained.network import Network
from composeprob.pretrained.tensors import Arrays

SIZES = 6
"""Numbers about the image that SDXL takes: height and width, the crop's top and left, the target's height and width."""


class UNet(eqx.Module):
    """A UNet over one image, given a time and conditions.

    Attributes:
        time_proj, time_embedding: make the embedding of the time.
        class_embedding: of the label; ``class_embed_type`` states what a label is.
        add_time_proj, add_embedding: of the pooled prompt and the image's sizes.
        encoder_hid_proj: applied to the prompt first.
        takes_sigma: the time is the noise's standard deviation, which also divides the output.
    """

    body: Body
    time_proj: Sinusoids | Fourier | Embedding
    time_embedding: EmbeddingMLP
    class_embedding: Embedding | EmbeddingMLP | Linear | None = None
    add_time_proj: Sinusoids | None = None
    add_embedding: EmbeddingMLP | None = None
    encoder_hid_proj: Linear | None = None
    class_embed_type: str | None = eqx.field(static=True, default=None)
    concatenated: bool = eqx.field(static=True, default=False)
    embedding_activation: str = eqx.field(static=True, default="identity")
    centred: bool = eqx.field(static=True, default=False)
    takes_sigma: bool = eqx.field(static=True, default=False)

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
        dtype = self.body.conv_in.weight.dtype
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
        output = self.body((2 * x - 1.0 if self.centred else x).astype(dtype), embedding, context).astype(x.dtype)
        return output / t if self.takes_sigma else output

    def _with_label(self, embedding: Array, label: Array) -> Array:
        if self.class_embed_type == "timestep":
            assert isinstance(self.time_proj, Sinusoids | Fourier)
            label = self.time_proj(label)
        embedded = label if self.class_embedding is None else self.class_embedding(label)
        embedded = embedded.astype(embedding.dtype)
        return jnp.concatenate([embedding, embedded]) if self.concatenated else embedding + embedded

    @property
    def sizes(self) -> JSONObject:
        """Options that the weights contain, by the names of diffusers' files."""
        label, stages = self.class_embedding, self.body.down_blocks
        return {
            "in_channels": self.body.conv_in.weight.shape[2],
            "out_channels": self.body.conv_out.outputs,
            "block_out_channels": [stage.outputs for stage in stages],
            "layers_per_block": [len(stage.resnets) for stage in stages],
            "resnet_time_scale_shift": "scale_shift" if stages[0].resnets[0].scale_shift else "default",
            "num_class_embeds": label.weight.shape[0] if isinstance(label, Embedding) else None,
            "time_embedding_dim": self.time_embedding.linear_2.outputs,
        }

    def network(
        self,
        sample_size: JSON,
        label: tuple[int, ...] | None,
        multiple: int,
        time: str,
        conditions: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    ) -> Network:
        """What a factor must know of it; ``label`` is a label's shape, None where it takes none."""
        sizes = self.sizes
        labels = {} if label is None else {"label": label}
        return Network(
            self, sample_size, sizes["in_channels"], sizes["out_channels"], multiple, time, {**conditions, **labels},
            sizes["num_class_embeds"],
        )  # fmt: skip


def _body(arrays: Arrays, style: Of[Style], attend: Of[Attend], **options: Any) -> Body:
    """A UNet's convolutions, which are made last; arguments as of `Body`.

    Raises:
        LoadError: arrays that are missing, do not fit together, or are no part of such a network.
    """
    body = Body(arrays, style, attend, **options)
    down, up = len(body.down_blocks), len(body.up_blocks)
    if not down or up != down:
        raise arrays.foreign(f"it has {down} blocks on the way down and {up} on the way up")
    arrays.finish()
    return body


def _plain(arrays: Arrays, channels: int, size: int | None, style: Style) -> Attention:
    """Attention of an image to itself with heads of ``size`` channels; None for one head."""
    check_split(arrays, channels, size or channels, "channels of a head")
    return Attention(
        arrays, channels, channels // (size or channels), bias=True, groups=style.groups, eps=style.eps, residual=True,
        rescale=style.rescale,
    )  # fmt: skip


def _label(
    o: Options, arrays: Arrays, time: EmbeddingMLP
) -> tuple[Embedding | EmbeddingMLP | Linear | None, tuple[int, ...] | None]:
    """The layer that embeds labels, None without one; and a label's shape, None where there are none."""
    below, width = arrays / "class_embedding", time.linear_2.outputs
    if o.class_embed_type is None:
        return (Embedding(below, width), ()) if "class_embedding" in arrays else (None, None)
    if o.class_embed_type == "timestep":
        return EmbeddingMLP(below, time.linear_1.inputs, width, time.activation), ()
    if o.class_embed_type == "identity":
        return None, (width,)
    if o.class_embed_type == "projection":
        vector = EmbeddingMLP(below, None, width)
        return vector, (vector.linear_1.inputs,)
    linear = Linear(below, None, width)
    return linear, (linear.inputs,)


def unet_2d(config: JSONObject, arrays: Arrays, where: str) -> Network:
    """A `UNet2DModel`: unconditional and class-conditional images.

    Raises:
        LoadError: an option or block that is not supported, or weights of another network.
    """
    kinds = ("UNetMidBlock2D", None)
    o = Options(
        config, where, sample_size=(None, anything), center_input_sample=(False, True),
        time_embedding_type=("positional", "fourier", "learned"), freq_shift=(0, number), flip_sin_to_cos=(True, False),
        down_block_types=(None, text_list), up_block_types=(None, text_list), mid_block_type=kinds,
        mid_block_scale_factor=(1, positive), downsample_padding=(1, 0), downsample_type=("conv", "resnet"),
        upsample_type=("conv", "resnet"), dropout=(0.0, anything), act_fn=("silu", *ACTIVATIONS),
        attention_head_dim=(8, whole, None), norm_num_groups=(32, whole), attn_norm_num_groups=(None, whole),
        norm_eps=(1e-5, positive), class_embed_type=(None, "timestep", "identity"),
    )  # fmt: skip
    for way in ("down", "up"):
        check_kinds(o, arrays, way, "*Block2D Attn*Block2D Resnet*sampleBlock2D")
    embedding = EmbeddingMLP(arrays / "time_embedding")
    width, inputs = embedding.linear_2.outputs, embedding.linear_1.inputs
    style = Style(width, o.norm_num_groups, o.norm_eps, o.act_fn)
    inside = replace(style, rescale=float(o.mid_block_scale_factor))
    in_attention = replace(inside, groups=o.attn_norm_num_groups or o.norm_num_groups)

    def attend(place: str, i: int) -> Attend:
        return partial(_plain, size=o.attention_head_dim, style=in_attention if place == "mid" else style)

    time: Sinusoids | Fourier | Embedding = Sinusoids(inputs, o.flip_sin_to_cos, o.freq_shift)
    fourier = o.time_embedding_type == "fourier"
    if fourier:
        time = Fourier(arrays / "time_proj", inputs, log=True, cosine_first=False)
    elif o.time_embedding_type == "learned":
        time = Embedding(arrays / "time_proj", inputs)
    label, shape = _label(o, arrays, embedding)
    padding = o.downsample_padding
    body = _body(arrays, lambda place, i: inside if place == "mid" else style, attend, padding=padding)
    unet = UNet(
        body, time, embedding, class_embedding=label, class_embed_type=o.class_embed_type,
        centred=o.center_input_sample, takes_sigma=fourier,
    )  # fmt: skip
    attention = None if body.mid_block is None else bool(body.mid_block.attentions)
    steps = time.weight.shape[0] if isinstance(time, Embedding) else None
    o.agree(**unet.sizes, add_attention=attention, num_train_timesteps=steps)
    return unet.network(
        o.sample_size, shape, 2 ** (len(body.down_blocks) - 1),
        {"fourier": "sigma", "learned": "level"}.get(o.time_embedding_type, "real_level"),
    )  # fmt: skip


def unet_condition(config: JSONObject, arrays: Arrays, where: str) -> Network:
    """A `UNet2DConditionModel`: text to image, as in Stable Diffusion 1, 2 and XL.

    Raises:
        LoadError: an option or block that is not supported, or weights of another network.
    """
    o = Options(
        config, where, sample_size=(None, anything), center_input_sample=(False, True), flip_sin_to_cos=(True, False),
        freq_shift=(0, number), down_block_types=(None, text_list), up_block_types=(None, text_list),
        mid_block_type=("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
        only_cross_attention=(False, flag.each), downsample_padding=(1, 0), mid_block_scale_factor=(1, positive),
        dropout=(0.0, anything), act_fn=("silu", *ACTIVATIONS), norm_num_groups=(32, whole), norm_eps=(1e-5, positive),
        encoder_hid_dim_type=(None, "text_proj"), attention_head_dim=(8, whole.each), num_attention_heads=(None,),
        dual_cross_attention=(False,), use_linear_projection=(False, True),
        class_embed_type=(None, "timestep", "identity", "projection", "simple_projection"),
        addition_embed_type=(None, "text_time"), addition_time_embed_dim=(None, whole),
        upcast_attention=(False, True),  # attention is always summed in single precision here
        resnet_skip_time_act=(False, True), resnet_out_scale_factor=(1.0, positive),
        time_embedding_type=("positional", "fourier"), time_embedding_act_fn=(None, *ACTIVATIONS),
        timestep_post_act=(None, *ACTIVATIONS), time_cond_proj_dim=(None,), attention_type=("default",),
        class_embeddings_concat=(False, True), mid_block_only_cross_attention=(None, anything),
        cross_attention_norm=(None,), addition_embed_type_num_heads=(64, anything),
    )  # fmt: skip
    known = "CrossAttn*Block2D *Block2D Attn*Block2D Resnet*sampleBlock2D"
    kinds = {way: check_kinds(o, arrays, way, known) for way in ("down", "up")}
    n = len(kinds["down"])
    heads = o.per_block("attention_head_dim", n)  # the original's name for numbers of heads
    only_cross = o.per_block("only_cross_attention", n)
    context = arrays.inputs_of("attn2.to_k.weight") or 0
    embedding = EmbeddingMLP(arrays / "time_embedding", None, None, o.act_fn, o.timestep_post_act)
    width, inputs = embedding.linear_2.outputs, embedding.linear_1.inputs
    plain = Style(width * (1 + o.class_embeddings_concat), o.norm_num_groups, o.norm_eps, o.act_fn)
    inside = replace(plain, rescale=float(o.mid_block_scale_factor))
    by_resnet = replace(plain, rescale=float(o.resnet_out_scale_factor), skip_activation=o.resnet_skip_time_act)

    def style(place: str, i: int) -> Style:
        return inside if place == "mid" else by_resnet if kinds[place][i].startswith("Resnet") else plain

    def attend(place: str, i: int) -> Attend:
        j = {"down": i, "mid": n - 1, "up": n - 1 - i}[place]

        def made(arrays: Arrays, channels: int) -> Attention | SpatialTransformer:
            if "transformer_blocks" in arrays:
                only = only_cross[j] and place != "mid"
                linear = o.use_linear_projection
                return SpatialTransformer(arrays, channels, heads[j], context, o.norm_num_groups, linear, only)
            # The original has the sizes of plain attention's heads in the order of the way down, also on the way up.
            return _plain(arrays, channels, heads[i], plain)

        return made

    time: Sinusoids | Fourier = Sinusoids(inputs, o.flip_sin_to_cos, o.freq_shift)
    if o.time_embedding_type == "fourier":
        time = Fourier(arrays / "time_proj", inputs, log=False, cosine_first=o.flip_sin_to_cos)
    sizes = None
    if o.addition_embed_type == "text_time":
        if o.addition_time_embed_dim is None:
            unsupported(where, "addition_time_embed_dim", None, (whole,))
        sizes = Sinusoids(o.addition_time_embed_dim, o.flip_sin_to_cos, o.freq_shift)
    added = None if sizes is None else EmbeddingMLP(arrays / "add_embedding", None, width)
    projection = Linear(arrays / "encoder_hid_proj", None, context or None) if "encoder_hid_proj" in arrays else None
    label, shape = _label(o, arrays, embedding)
    body = _body(arrays, style, attend, padding=o.downsample_padding, kernels=None, activation=o.act_fn)
    unet = UNet(
        body, time, embedding, class_embedding=label, add_time_proj=sizes, add_embedding=added,
        encoder_hid_proj=projection, class_embed_type=o.class_embed_type, concatenated=o.class_embeddings_concat,
        embedding_activation=o.time_embedding_act_fn or "identity", centred=o.center_input_sample,
    )  # fmt: skip
    prompt = context if projection is None else projection.inputs
    conditions: dict[str, tuple[int, ...]] = {"prompt": (0, prompt)} if prompt else {}
    vector = shape[0] if shape else None
    if added is not None:
        vector = added.linear_1.inputs
        conditions |= {"pooled": (vector - SIZES * o.addition_time_embed_dim,), "size": (SIZES,)}
        if vector <= SIZES * o.addition_time_embed_dim:
            unsupported(where, "addition_time_embed_dim", o.addition_time_embed_dim, (f"less than {vector / SIZES:g}",))
    o.agree(
        **unet.sizes, cross_attention_dim=context or None, conv_in_kernel=body.conv_in.weight.shape[0],
        conv_out_kernel=body.conv_out.weight.shape[0], projection_class_embeddings_input_dim=vector,
        encoder_hid_dim=None if projection is None else projection.inputs,
        transformer_layers_per_block=_depths(body.down_blocks),
        reverse_transformer_layers_per_block=_depths(body.up_blocks),
    )  # fmt: skip
    return unet.network(o.sample_size, shape, 1, "real_level", conditions)


def _depths(stages: tuple[Stage, ...]) -> list[list[int] | None]:
    """The layers of every transformer of each stage; None where it has none."""
    found = [[len(a.transformer_blocks) for a in s.attentions if isinstance(a, SpatialTransformer)] for s in stages]
    return [depths or None for depths in found]


GUIDED = "GuidedDiffusionUNet"
"""The class in a config.json that tools/convert_guided_diffusion.py wrote."""


def guided(config: JSONObject, arrays: Arrays, where: str) -> Network:
    """The UNet of guided-diffusion (ADM), and of improved-diffusion before it.

    Args:
        config: what the weights do not contain, by guided-diffusion's own options; ``time_scale`` multiplies the
            timestep.
        arrays: by diffusers' names.
        where: the file, for errors.

    Raises:
        LoadError: an option that is not supported, or weights of another network.
    """
    o = Options(
        config, where, image_size=(None, anything), num_heads=(None, whole), num_head_channels=(None, whole),
        num_heads_upsample=(None, whole), time_scale=(1.0, positive),
    )  # fmt: skip
    embedding = EmbeddingMLP(arrays / "time_embedding")
    inputs, width = embedding.linear_1.inputs, embedding.linear_2.outputs
    style = Style(width, 32, 1e-5, "silu")  # norms of the original

    def attend(place: str, i: int) -> Attend:
        def made(arrays: Arrays, channels: int) -> Attention:
            count = (o.num_heads_upsample if place == "up" else None) or o.num_heads
            if o.num_head_channels is None and count is None:
                unsupported(where, "num_heads", None, (whole, "with num_head_channels null"))
            if o.num_head_channels is None:
                check_split(arrays, channels, count, "heads of attention")
            return _plain(arrays, channels, o.num_head_channels or channels // count, style)

        return made

    time = Sinusoids(inputs, cosine_first=True, shift=0, scale=o.time_scale)
    label = Embedding(arrays / "class_embedding", width) if "class_embedding" in arrays else None
    body = _body(arrays, lambda place, i: style, attend)
    unet, stages = UNet(body, time, embedding, class_embedding=label), body.down_blocks
    sizes, samplers = unet.sizes, [layer for stage in stages for layer in stage.samplers]
    o.agree(
        in_channels=sizes["in_channels"], out_channels=sizes["out_channels"], num_channels=inputs,
        block_channels=sizes["block_out_channels"], num_res_blocks=sizes["layers_per_block"],
        num_classes=sizes["num_class_embeds"], attention_blocks=[bool(stage.attentions) for stage in stages],
        use_scale_shift_norm=stages[0].resnets[0].scale_shift,
        resblock_updown=isinstance(samplers[0], Resnet) if samplers else None,
    )  # fmt: skip
    shape = None if label is None else ()
    return unet.network(o.image_size, shape, 2 ** (len(stages) - 1), "real_level")
