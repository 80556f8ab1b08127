"""UNets of diffusers and of guided-diffusion: stages of convolutions, which
autoencoders have too, the network, and the options of each class's config.json."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from composeprob.json_data import JSONObject
from composeprob.pretrained import layers
from composeprob.pretrained.config import (
    Options,
    anything,
    flag,
    number,
    positive,
    text_list,
    unsupported,
    whole,
)
from composeprob.pretrained.layers import ACTIVATIONS
from composeprob.pretrained.tensors import Arrays, Network

Image = Float[Array, "height width channels"]
Prompt = Float[Array, "length features"]


@dataclass(frozen=True)
class Style:
    """Properties that the blocks of a stage have in common.

    Attributes:
        groups: groups of the norms.
        eps: ε of the norms.
        activation: the activation's name.
        skip_activation: true if the embedding of time enters without an activation.
        rescale: divisor of the outputs of residual blocks and of self-attention.
        heads: heads of attention.
        head_size: channels of each head of self-attention, instead of their number.
        attention_groups: groups of the norm before self-attention, if not `groups`.
        only_cross: true if transformers attend to the prompt only.
    """

    groups: int
    eps: float
    activation: str
    skip_activation: bool = False
    rescale: float = 1.0
    heads: int = 1
    head_size: int | None = None
    attention_groups: int | None = None
    only_cross: bool = False


def resnet(
    arrays: Arrays,
    x: Image,
    embedding: Array | None,
    style: Style,
    resize: Callable[[Array], Array] | None = None,
) -> Array:
    """Residual block: norm, activation, convolution, the embedding of time, and the
    same again.

    The embedding is added before the second norm; projected to twice the channels, it
    scales and shifts after it. ``resize`` changes the resolution after the first
    activation.
    """
    activation = ACTIVATIONS[style.activation]
    hidden = activation(layers.group_norm(arrays / "norm1", x, style.groups, style.eps))
    if resize is not None:
        x = resize(x)
        hidden = resize(hidden)
    hidden = layers.convolve(arrays / "conv1", hidden)
    channels = hidden.shape[-1]
    # As many numbers as channels are added, twice as many scale and shift.
    projected = _projected(arrays, embedding, channels, style)
    if projected is not None and projected.shape[0] == channels:
        hidden = hidden + projected
    hidden = layers.group_norm(arrays / "norm2", hidden, style.groups, style.eps)
    if projected is not None and projected.shape[0] > channels:
        scale, shift = jnp.split(projected, 2)
        hidden = hidden * (1 + scale) + shift
    hidden = layers.convolve(arrays / "conv2", activation(hidden), outputs=channels)
    if x.shape[-1] != channels:
        x = layers.convolve(arrays / "conv_shortcut", x, 1, channels)
    return (x + hidden) / style.rescale


def _projected(
    arrays: Arrays, embedding: Array | None, channels: int, style: Style
) -> Array | None:
    """The embedding of time, projected to a block's channels or to twice as many."""
    if embedding is None:
        return None
    if not style.skip_activation:
        embedding = ACTIVATIONS[style.activation](embedding)
    projected = layers.linear(arrays / "time_emb_proj", embedding)
    if projected.shape[0] not in (channels, 2 * channels):
        raise arrays.foreign(
            f"{arrays.prefix}time_emb_proj gives {projected.shape[0]} channels, "
            f"and {channels} or twice as many go into its block"
        )
    return projected


def enlarge(x: Image, size: tuple[int, ...]) -> Image:
    """Enlarge an image to another size by the nearest pixels."""
    # An odd size of the way down is not twice the next one.
    if size == doubled(x):
        return double(x)
    height, width = x.shape[:2]
    rows = jnp.arange(size[0]) * height // size[0]
    columns = jnp.arange(size[1]) * width // size[1]
    return x[rows][:, columns]


def double(x: Image) -> Image:
    """Repeat every pixel 2×2."""
    return jnp.repeat(jnp.repeat(x, 2, axis=0), 2, axis=1)


def doubled(x: Image) -> tuple[int, int]:
    """Twice the height and width of an image."""
    return 2 * x.shape[0], 2 * x.shape[1]


def halve(x: Image) -> Image:
    """Means of 2×2 pixels; an odd last row or column is left out."""
    height, width = x.shape[0] // 2, x.shape[1] // 2
    channels = x.shape[2]
    even = x[: 2 * height, : 2 * width]
    return even.reshape(height, 2, width, 2, channels).mean((1, 3))


def transformers(
    arrays: Arrays, x: Image, context: Prompt | None, style: Style
) -> Image:
    """Transformer blocks over the places of an image, which attend to these and to the
    prompt; added to the image."""
    if context is None:
        raise arrays.foreign(
            f"{arrays.prefix[:-1]} has transformers, "
            "and no network of this class has a prompt there"
        )
    # Old networks project by convolutions of one pixel.
    project: Callable[..., Array] = layers.linear
    if len(arrays.like(".proj_in.weight")) == 4:
        project = partial(layers.convolve, size=1)
    # The original's ε here, whatever the file's norm_eps.
    normed = layers.group_norm(arrays / "norm", x, style.groups, 1e-6)
    hidden = project(arrays / "proj_in", normed)
    sequence = hidden.reshape(-1, hidden.shape[-1])
    first = context if style.only_cross else None
    for block in arrays.items("transformer_blocks"):
        normed = layers.layer_norm(block / "norm1", sequence)
        sequence += layers.attention(block / "attn1", normed, style.heads, first)
        normed = layers.layer_norm(block / "norm2", sequence)
        sequence += layers.attention(block / "attn2", normed, style.heads, context)
        normed = layers.layer_norm(block / "norm3", sequence)
        sequence += layers.feed_forward(block / "ff", normed, "geglu")
    hidden = sequence.reshape(hidden.shape)
    return project(arrays / "proj_out", hidden, outputs=x.shape[-1]) + x


def self_attention(arrays: Arrays, x: Image, style: Style) -> Image:
    """Attention of an image's places to one another, after a norm; added to the
    image."""
    channels = x.shape[-1]
    layers.check_split(
        arrays,
        channels,
        style.head_size or style.heads,
        "heads of attention, or channels of a head,",
    )
    sequence = x.reshape(-1, channels)
    if "group_norm" in arrays:
        groups = style.attention_groups or style.groups
        sequence = layers.group_norm(arrays / "group_norm", sequence, groups, style.eps)
    heads = style.heads if style.head_size is None else channels // style.head_size
    attended = layers.attention(arrays, sequence, heads, bias=True)
    return (attended.reshape(x.shape) + x) / style.rescale


def attend(arrays: Arrays, x: Image, context: Prompt | None, style: Style) -> Image:
    """Apply transformers, or the self-attention of older networks."""
    if "transformer_blocks" in arrays:
        return transformers(arrays, x, context, style)
    return self_attention(arrays, x, style)


@dataclass(frozen=True)
class Body:
    """Convolutions of an image: stages down, a middle, and stages up; an autoencoder's
    halves have only one of the two.

    Attributes:
        down: style of each stage on the way down.
        mid: style of the middle.
        up: style of each stage on the way up.
        kernels: pixels of the first and the last kernel; None for any number.
        padding: padding where an image is halved; 0 stands for one row and column of
            zeros at the far ends.
        activation: activation before the last convolution.
    """

    down: tuple[Style, ...]
    mid: Style
    up: tuple[Style, ...]
    kernels: int | None = 3
    padding: int = 1
    activation: str = "silu"

    def __call__(
        self,
        arrays: Arrays,
        x: Array,
        embedding: Array | None = None,
        context: Array | None = None,
    ) -> Array:
        """Output for an image, the embedding of the time and the prompt."""
        inputs = _Inputs(embedding, context)
        hidden = layers.convolve(arrays / "conv_in", x, self.kernels)
        # Outputs on the way down are inputs on the way up, last in, first out.
        skips = [hidden] if self.down and self.up else None
        for block, style in zip(arrays.items("down_blocks"), self.down, strict=True):
            hidden = self._down(block, hidden, inputs, style, skips)
        if "mid_block" in arrays:
            hidden = self._middle(arrays / "mid_block", hidden, inputs)
        for block, style in zip(arrays.items("up_blocks"), self.up, strict=True):
            hidden = self._up(block, hidden, inputs, style, skips)
        if skips:
            raise arrays.foreign(
                f"its way up has {len(skips)} residual blocks too few for its way down"
            )
        hidden = layers.group_norm(
            arrays / "conv_norm_out", hidden, self.mid.groups, self.mid.eps
        )
        hidden = ACTIVATIONS[self.activation](hidden)
        return layers.convolve(arrays / "conv_out", hidden, self.kernels)

    def _down(
        self,
        arrays: Arrays,
        x: Image,
        inputs: _Inputs,
        style: Style,
        skips: list[Image] | None,
    ) -> Image:
        """Stage on the way down; every output is appended to ``skips``."""
        for block, attention in _blocks(arrays, without_attention=0):
            x = inputs.through(block, attention, x, style)
            if skips is not None:
                skips.append(x)
        for layer in arrays.items("downsamplers"):
            if "norm1" in layer:
                x = resnet(layer, x, inputs.embedding, style, halve)
            else:
                padding = self.padding or (0, 1)
                x = layers.convolve(layer / "conv", x, stride=2, padding=padding)
            if skips is not None:
                skips.append(x)
        return x

    def _middle(self, arrays: Arrays, x: Image, inputs: _Inputs) -> Image:
        """Stage at the lowest resolution; its last residual block has no attention."""
        for block, attention in _blocks(arrays, without_attention=1):
            x = inputs.through(block, attention, x, self.mid)
        return x

    def _up(
        self,
        arrays: Arrays,
        x: Image,
        inputs: _Inputs,
        style: Style,
        skips: list[Image] | None,
    ) -> Image:
        """Stage on the way up.

        Each residual block takes the last entry of ``skips``; the entry that is left
        last has the size to which the image is enlarged.
        """
        for block, attention in _blocks(arrays, without_attention=0):
            if skips is not None:
                if not skips:
                    raise arrays.foreign(
                        f"{block.prefix[:-1]} has no block on the way down whose "
                        "output it would take"
                    )
                x = jnp.concatenate([x, skips.pop()], axis=-1)
            x = inputs.through(block, attention, x, style)
        for layer in arrays.items("upsamplers"):
            if "norm1" in layer:
                x = resnet(layer, x, inputs.embedding, style, double)
                continue
            size = skips[-1].shape[:2] if skips else doubled(x)
            if size == doubled(x):
                x = layers.convolve_enlarged(layer / "conv", x)
            else:
                x = layers.convolve(layer / "conv", enlarge(x, size))
        return x


class _Inputs(NamedTuple):
    """The embedding of the time and the prompt, which every block takes."""

    embedding: Float[Array, " embedding"] | None
    context: Prompt | None

    def through(
        self, block: Arrays, attention: Arrays | None, x: Image, style: Style
    ) -> Image:
        """Output of a residual block, and of the attention after it if there is one."""
        x = resnet(block, x, self.embedding, style)
        if attention is None:
            return x
        return attend(attention, x, self.context, style)


def _blocks(
    arrays: Arrays, without_attention: int
) -> Iterator[tuple[Arrays, Arrays | None]]:
    """Residual blocks of a stage, each with its attention; None for a stage without
    attention, and for the last ``without_attention`` blocks."""
    resnets = arrays.items("resnets")
    attentions = arrays.items("attentions")
    if not resnets or len(attentions) not in (0, len(resnets) - without_attention):
        raise arrays.foreign(
            f"{arrays.prefix[:-1]} has {len(resnets)} residual blocks, "
            f"{len(attentions)} attentions"
        )
    return itertools.zip_longest(resnets, attentions)


def check_kinds(o: Options, arrays: Arrays, direction: str, patterns: str) -> list[str]:
    """Return the names of the blocks on the way ``"down"`` or ``"up"``, as the file
    gives them; "" where it gives none.

    ``patterns`` are the supported names, with ``*`` for "Down" or "Up". Their attention
    must be that of the weights.
    """
    name = f"{direction}_block_types"
    blocks = arrays.items(f"{direction}_blocks")
    if getattr(o, name) is None:
        return [""] * len(blocks)
    title = direction.capitalize()
    supported = tuple(patterns.replace("*", title).split())
    # Diffusers' first releases put UNetRes before the names.
    kinds = [kind.removeprefix("UNetRes") for kind in o.per_block(name, len(blocks))]
    for i, (kind, block) in enumerate(zip(kinds, blocks, strict=True)):
        if kind not in supported:
            unsupported(o.where, f"{name}[{i}]", kind, supported)
        attention = _attention_of(block)
        if kind.partition(title)[0].removeprefix("Resnet") != attention:
            raise arrays.foreign(
                f"{name}[{i}] is {kind!r}, and block {i} has attention of the kind "
                f"{attention!r}"
            )
    return kinds


def _attention_of(block: Arrays) -> str:
    """Kind of attention in a block's weights, as named in diffusers' classes."""
    if "transformer_blocks" in block / "attentions" / 0:
        return "CrossAttn"
    if "attentions" in block:
        return "Attn"
    return ""


SIZES = 6
"""Numbers about the image that SDXL takes."""


@dataclass(frozen=True)
class UNet:
    """A UNet over one image, given a time and conditions.

    Attributes:
        body: the convolutions.
        time: kind of the embedding of time: ``"positional"``, ``"fourier"`` or
            ``"learned"``.
        cosine_first: as of `layers.sinusoids`.
        shift: as of `layers.sinusoids`.
        scale: as of `layers.sinusoids`.
        inner_activation: activation in the embedding of time.
        outer_activation: activation after it.
        last_activation: activation after labels and sizes are added.
        label: kind of a label, diffusers' class_embed_type.
        concatenated: true if a label's embedding is concatenated with that of time, and
            not added.
        size_width: width of the sinusoids of each of an image's sizes; None for
            networks without them.
        centred: true if images are given from 0 to 1.
        takes_sigma: true if the time is the noise's standard deviation, which also
            divides the output.
    """

    body: Body
    time: str = "positional"
    cosine_first: bool = True
    shift: float = 0.0
    scale: float = 1.0
    inner_activation: str = "silu"
    outer_activation: str = "identity"
    last_activation: str = "identity"
    label: str | None = None
    concatenated: bool = False
    size_width: int | None = None
    centred: bool = False
    takes_sigma: bool = False

    def __call__(
        self, arrays: Arrays, x: Array, t: Array, **conditions: Array
    ) -> Array:
        """Output for one image or latents (height, width, channels), at a time.

        The conditions are a label; a prompt, hidden states (length, channels), and with
        it one vector, pooled; and the size (6,): the image's height and width before
        scaling, its crop's top and left, and its target size.
        """
        embedding = self._embedding(arrays, t, conditions)
        context = conditions.get("prompt")
        if context is not None:
            if "encoder_hid_proj" in arrays:
                context = layers.linear(arrays / "encoder_hid_proj", context)
            # Computed in the precision of the weights, like the image.
            weight = arrays.take("conv_in.weight", None, x.shape[-1], None, None)
            context = context.astype(weight.dtype)
        image = 2 * x - 1.0 if self.centred else x
        output = self.body(arrays, image, embedding, context).astype(x.dtype)
        # Networks of Song et al. (2021) compute σ·score up to here.
        if self.takes_sigma:
            return output / t
        return output

    def _embedding(
        self, arrays: Arrays, t: Array, conditions: dict[str, Array]
    ) -> Float[Array, " embedding"]:
        """Embedding of the time, the label, the sizes and the pooled prompt."""
        waves = self._waves(arrays, t)
        embedding = layers.mlp(
            arrays / "time_embedding", waves, activation=self.inner_activation
        )
        embedding = ACTIVATIONS[self.outer_activation](embedding)
        if self.label is not None or "class_embedding" in arrays:
            # Trained with a label always: without one it would compute something else.
            label = conditions["label"]
            of_label = self._of_label(arrays, label, embedding.shape[0])
            of_label = of_label.astype(embedding.dtype)
            if self.concatenated:
                embedding = jnp.concatenate([embedding, of_label])
            else:
                embedding = embedding + of_label
        if self.size_width is not None:
            wave = partial(
                layers.sinusoids,
                width=self.size_width,
                cosine_first=self.cosine_first,
                shift=self.shift,
            )
            sizes = jax.vmap(wave)(conditions["size"]).ravel()
            vector = jnp.concatenate([conditions["pooled"].astype(jnp.float32), sizes])
            embedding = embedding + layers.mlp(
                arrays / "add_embedding", vector, embedding.shape[0]
            )
        return ACTIVATIONS[self.last_activation](embedding)

    def _waves(self, arrays: Arrays, t: Array) -> Float[Array, " inputs"]:
        """Inputs of an embedding of a number: a row of a table, or sinusoids."""
        table = arrays / "time_proj"
        inputs = arrays.shape("time_embedding.linear_1.weight", 2)[1]
        if self.time == "learned":
            return table.take("weight", None, inputs)[t]
        if self.time == "fourier":
            number = jnp.log(t) if self.takes_sigma else t
            frequencies = table.take("weight", inputs // 2)
            turns = jnp.asarray(number, jnp.float32) * frequencies
            return layers.waves(turns * 2 * jnp.pi, self.cosine_first)
        return layers.sinusoids(t, inputs, self.cosine_first, self.shift, self.scale)

    def _of_label(
        self, arrays: Arrays, label: Array, width: int
    ) -> Float[Array, " {width}"]:
        """Embedding of a label."""
        below = arrays / "class_embedding"
        if self.label == "identity":
            return label
        if self.label is None:
            return below.take("weight", None, width)[label]
        if self.label == "simple_projection":
            return layers.linear(below, label, width)
        if self.label == "timestep":
            waves = self._waves(arrays, label)
            return layers.mlp(below, waves, width, self.inner_activation)
        return layers.mlp(below, label, width)


def _sizes(arrays: Arrays) -> JSONObject:
    """Options that follow from a UNet's weights, by the names of diffusers' files."""
    stages = arrays.items("down_blocks")
    up = arrays.items("up_blocks")
    if not stages or len(up) != len(stages):
        raise arrays.foreign(
            f"it has {len(stages)} blocks on the way down and {len(up)} on the way up"
        )
    resnets = [stage.items("resnets") for stage in stages]
    if [] in resnets:
        raise arrays.foreign("it has a block without residual blocks")
    first = resnets[0][0]
    projected = first.shape("time_emb_proj.weight", 2)[0]
    doubles = projected > first.shape("conv1.weight", 4)[0]
    labels = arrays / "class_embedding"
    # A table of numbered labels; a projection has a bias.
    table = "weight" in labels and "bias" not in labels
    return {
        "in_channels": arrays.shape("conv_in.weight", 4)[1],
        "out_channels": arrays.shape("conv_out.weight", 4)[0],
        "block_out_channels": [
            stage[-1].shape("conv1.weight", 4)[0] for stage in resnets
        ],
        "layers_per_block": [len(stage) for stage in resnets],
        "resnet_time_scale_shift": "scale_shift" if doubles else "default",
        "num_class_embeds": labels.shape("weight", 2)[0] if table else None,
        "time_embedding_dim": arrays.shape("time_embedding.linear_2.weight", 2)[0],
    }


def _label(o: Options, arrays: Arrays) -> dict[str, tuple[int, ...]]:
    """Condition ``label`` and its shape; empty for a network without labels."""
    if o.class_embed_type is None and "class_embedding" not in arrays:
        return {}
    if o.class_embed_type in (None, "timestep"):
        return {"label": ()}
    if o.class_embed_type == "identity":
        return {"label": arrays.shape("time_embedding.linear_2.weight", 2)[:1]}
    first = "weight" if o.class_embed_type == "simple_projection" else "linear_1.weight"
    return {"label": arrays.shape(f"class_embedding.{first}", 2)[1:]}


def unet_2d(config: JSONObject, arrays: Arrays, where: str) -> Network:
    """A `UNet2DModel`: unconditional and class-conditional images."""
    o = Options(
        config,
        where,
        sample_size=(None, anything),
        center_input_sample=(False, True),
        time_embedding_type=("positional", "fourier", "learned"),
        freq_shift=(0, number),
        flip_sin_to_cos=(True, False),
        down_block_types=(None, text_list),
        up_block_types=(None, text_list),
        mid_block_type=("UNetMidBlock2D", None),
        mid_block_scale_factor=(1, positive),
        downsample_padding=(1, 0),
        downsample_type=("conv", "resnet"),
        upsample_type=("conv", "resnet"),
        dropout=(0.0, anything),
        act_fn=("silu", *ACTIVATIONS),
        attention_head_dim=(8, whole, None),
        norm_num_groups=(32, whole),
        attn_norm_num_groups=(None, whole),
        norm_eps=(1e-5, positive),
        class_embed_type=(None, "timestep", "identity"),
    )
    # Names of blocks must agree with the weights: these decide what is computed.
    for direction in ("down", "up"):
        check_kinds(o, arrays, direction, "*Block2D Attn*Block2D Resnet*sampleBlock2D")
    sizes = _sizes(arrays)
    label = _label(o, arrays)
    n = len(sizes["layers_per_block"])
    fourier = o.time_embedding_type == "fourier"
    # A learned embedding has a row for each level; others leave the number open.
    steps = None
    if o.time_embedding_type == "learned":
        steps = arrays.shape("time_proj.weight", 2)[0]
    attention = None
    if "mid_block" in arrays:
        attention = "attentions" in arrays / "mid_block"
    o.agree(**sizes, add_attention=attention, num_train_timesteps=steps)
    style = Style(
        o.norm_num_groups, float(o.norm_eps), o.act_fn, head_size=o.attention_head_dim
    )
    middle = replace(
        style,
        rescale=float(o.mid_block_scale_factor),
        attention_groups=o.attn_norm_num_groups,
    )
    form = UNet(
        Body((style,) * n, middle, (style,) * n, padding=o.downsample_padding),
        o.time_embedding_type,
        # The original's Fourier embedding has the sines first in any case.
        o.flip_sin_to_cos and not fourier,
        o.freq_shift,
        label=o.class_embed_type,
        centred=o.center_input_sample,
        takes_sigma=fourier,
    )
    # Sinusoids of a timestep can be evaluated between the levels of the training.
    times = {"positional": "real_level", "fourier": "sigma", "learned": "level"}
    return Network.traced(
        form,
        arrays,
        sample_size=o.sample_size,
        channels=sizes["in_channels"],
        multiple=2 ** (n - 1),
        time=times[o.time_embedding_type],
        conditions=label,
        classes=sizes["num_class_embeds"],
    )


def unet_condition(config: JSONObject, arrays: Arrays, where: str) -> Network:
    """A `UNet2DConditionModel`: text to image, as in Stable Diffusion 1, 2 and XL."""
    o = Options(
        config,
        where,
        sample_size=(None, anything),
        center_input_sample=(False, True),
        flip_sin_to_cos=(True, False),
        freq_shift=(0, number),
        down_block_types=(None, text_list),
        up_block_types=(None, text_list),
        mid_block_type=("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
        only_cross_attention=(False, flag.each),
        downsample_padding=(1, 0),
        mid_block_scale_factor=(1, positive),
        dropout=(0.0, anything),
        act_fn=("silu", *ACTIVATIONS),
        norm_num_groups=(32, whole),
        norm_eps=(1e-5, positive),
        encoder_hid_dim_type=(None, "text_proj"),
        attention_head_dim=(8, whole.each),
        num_attention_heads=(None,),
        dual_cross_attention=(False,),
        class_embed_type=(
            None,
            "timestep",
            "identity",
            "projection",
            "simple_projection",
        ),
        addition_embed_type=(None, "text_time"),
        addition_time_embed_dim=(None, whole),
        # Attention is always summed in single precision here.
        upcast_attention=(False, True),
        resnet_skip_time_act=(False, True),
        resnet_out_scale_factor=(1.0, positive),
        time_embedding_type=("positional", "fourier"),
        time_embedding_act_fn=(None, *ACTIVATIONS),
        timestep_post_act=(None, *ACTIVATIONS),
        time_cond_proj_dim=(None,),
        attention_type=("default",),
        class_embeddings_concat=(False, True),
        mid_block_only_cross_attention=(None, anything),
        cross_attention_norm=(None,),
        addition_embed_type_num_heads=(64, anything),
    )
    patterns = "CrossAttn*Block2D *Block2D Attn*Block2D Resnet*sampleBlock2D"
    kinds_down = check_kinds(o, arrays, "down", patterns)
    kinds_up = check_kinds(o, arrays, "up", patterns)
    sizes = _sizes(arrays)
    label = _label(o, arrays)
    body = _body_of_condition(o, kinds_down, kinds_up)
    keys = arrays.like("attn2.to_k.weight")
    context = keys[-1] if keys else None
    prompt = context
    projected = None
    if "encoder_hid_proj" in arrays:
        projected = arrays.shape("encoder_hid_proj.weight", 2)[1]
        prompt = projected
    conditions: dict[str, tuple[int, ...]] = {}
    if prompt:
        conditions["prompt"] = (0, prompt)
    conditions |= label
    vector = label["label"][0] if label.get("label") else None
    size_width = None
    if o.addition_embed_type == "text_time":
        vector = _added_vector(o, arrays)
        size_width = o.addition_time_embed_dim
        conditions["pooled"] = (vector - SIZES * size_width,)
        conditions["size"] = (SIZES,)
    # One option for all transformers of the network.
    # None where there is no transformer, and False for convolutions of one pixel.
    linear = {0: None, 2: True}.get(len(arrays.like(".proj_in.weight")), False)
    o.agree(
        **sizes,
        cross_attention_dim=context,
        conv_in_kernel=arrays.shape("conv_in.weight", 4)[2],
        conv_out_kernel=arrays.shape("conv_out.weight", 4)[2],
        projection_class_embeddings_input_dim=vector,
        encoder_hid_dim=projected,
        transformer_layers_per_block=_depths(arrays, "down_blocks"),
        reverse_transformer_layers_per_block=_depths(arrays, "up_blocks"),
        use_linear_projection=linear,
    )
    form = UNet(
        body,
        o.time_embedding_type,
        o.flip_sin_to_cos,
        o.freq_shift,
        inner_activation=o.act_fn,
        outer_activation=o.timestep_post_act or "identity",
        last_activation=o.time_embedding_act_fn or "identity",
        label=o.class_embed_type,
        concatenated=o.class_embeddings_concat,
        centred=o.center_input_sample,
        size_width=size_width,
    )
    return Network.traced(
        form,
        arrays,
        sample_size=o.sample_size,
        channels=sizes["in_channels"],
        conditions=conditions,
        classes=sizes["num_class_embeds"],
    )


def _body_of_condition(o: Options, kinds_down: list[str], kinds_up: list[str]) -> Body:
    """Stages of a `UNet2DConditionModel`, which may differ in style."""
    n = len(kinds_down)
    # The file's name means numbers of heads in transformers, and sizes of heads in
    # self-attention.
    heads = o.per_block("attention_head_dim", n)
    only_cross = o.per_block("only_cross_attention", n)
    base = Style(o.norm_num_groups, float(o.norm_eps), o.act_fn)
    by_resnet = replace(
        base,
        rescale=float(o.resnet_out_scale_factor),
        skip_activation=o.resnet_skip_time_act,
    )

    def style(kind: str, stage: int, position: int) -> Style:
        """Style of a block at a stage, where 0 has the highest resolution, and at a
        position on its way."""
        common = by_resnet if kind.startswith("Resnet") else base
        return replace(
            common,
            heads=heads[stage],
            # The original has the sizes of self-attention's heads in the order of the
            # way down, also on the way up.
            head_size=heads[position],
            only_cross=only_cross[stage],
        )

    down = [style(kind, i, i) for i, kind in enumerate(kinds_down)]
    up = [style(kind, n - 1 - i, i) for i, kind in enumerate(kinds_up)]
    middle = replace(
        base,
        rescale=float(o.mid_block_scale_factor),
        heads=heads[-1],
        head_size=heads[0],
    )
    return Body(tuple(down), middle, tuple(up), None, o.downsample_padding, o.act_fn)


def _added_vector(o: Options, arrays: Arrays) -> int:
    """Width of the vector that SDXL embeds beside the time: the pooled prompt, and
    sinusoids of the sizes."""
    width = o.addition_time_embed_dim
    if width is None:
        unsupported(o.where, "addition_time_embed_dim", None, (whole,))
    vector = arrays.shape("add_embedding.linear_1.weight", 2)[1]
    if vector <= SIZES * width:
        supported = (f"less than {vector / SIZES:g}",)
        unsupported(o.where, "addition_time_embed_dim", width, supported)
    return vector


def _depths(arrays: Arrays, stages: str) -> list[list[int] | None]:
    """Layers of the transformers of each stage; None for a stage without them."""
    depths: list[list[int] | None] = []
    for stage in arrays.items(stages):
        attentions = stage.items("attentions")
        counts = [len(each.items("transformer_blocks")) for each in attentions]
        # Self-attention counts none.
        depths.append([count for count in counts if count] or None)
    return depths


GUIDED = "GuidedDiffusionUNet"
"""The class in a config.json that tools/convert_guided_diffusion.py wrote."""


def guided(config: JSONObject, arrays: Arrays, where: str) -> Network:
    """The UNet of guided-diffusion (ADM), and of improved-diffusion before it, its
    arrays by diffusers' names.

    The options are guided-diffusion's own, and ``time_scale``, a factor of the
    timestep.
    """
    o = Options(
        config,
        where,
        image_size=(None, anything),
        num_heads=(None, whole),
        num_head_channels=(None, whole),
        num_heads_upsample=(None, whole),
        time_scale=(1.0, positive),
    )
    if o.num_heads is None and o.num_head_channels is None:
        unsupported(where, "num_heads", None, (whole, "with num_head_channels null"))
    sizes = _sizes(arrays)
    stages = arrays.items("down_blocks")
    n = len(stages)
    samplers = [layer for stage in stages for layer in stage.items("downsamplers")]
    by_resnet = "norm1" in samplers[0] if samplers else None
    o.agree(
        in_channels=sizes["in_channels"],
        out_channels=sizes["out_channels"],
        num_channels=arrays.shape("time_embedding.linear_1.weight", 2)[1],
        block_channels=sizes["block_out_channels"],
        num_res_blocks=sizes["layers_per_block"],
        num_classes=sizes["num_class_embeds"],
        attention_blocks=["attentions" in stage for stage in stages],
        use_scale_shift_norm=sizes["resnet_time_scale_shift"] == "scale_shift",
        resblock_updown=by_resnet,
    )
    # The original's norms have 32 groups and this ε.
    style = Style(
        32, 1e-5, "silu", heads=o.num_heads or 1, head_size=o.num_head_channels
    )
    # The original may have another number of heads on the way up.
    style_up = replace(style, heads=o.num_heads_upsample or style.heads)
    form = UNet(Body((style,) * n, style, (style_up,) * n), scale=float(o.time_scale))
    classes = sizes["num_class_embeds"]
    conditions: dict[str, tuple[int, ...]] = {}
    if classes is not None:
        conditions["label"] = ()
    return Network.traced(
        form,
        arrays,
        sample_size=o.image_size,
        channels=sizes["in_channels"],
        multiple=2 ** (n - 1),
        conditions=conditions,
        classes=classes,
    )
