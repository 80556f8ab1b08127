"""UNets of diffusers and of guided-diffusion: stages of convolutions, of which
autoencoders are made too, the network, and what each class's config.json adds to its
weights."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

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


@dataclass(frozen=True)
class Style:
    """What the blocks of a stage have in common."""

    groups: int  # of the norms
    eps: float  # of the norms
    activation: str
    skip_activation: bool = False  # whether the embedding of time enters as it is
    rescale: float = (
        1.0  # divides the outputs of residual blocks and of plain layers.attention
    )
    heads: int = 1
    head_size: int | None = (
        None  # channels of each head of plain attention, instead of their number
    )
    attention_groups: int | None = (
        None  # of the norm before plain attention, where they are others
    )
    only_cross: bool = False  # whether transformers attend to the prompt only


def resnet(
    arrays: Arrays,
    x: Array,
    embedding: Array | None,
    style: Style,
    change: str | None = None,
) -> Array:
    """A residual block: norm, activation, convolution, the embedding of time, and the
    same again.

    The embedding is added before the second norm; projected to twice the channels, it
    scales and shifts after it. A change ``"up"`` or ``"down"`` is that of the
    resolution, after the first activation.
    """
    activation = ACTIVATIONS[style.activation]
    hidden = activation(layers.group_norm(arrays / "norm1", x, style.groups, style.eps))
    if change is not None:
        x, hidden = (
            enlarge(each, doubled(each)) if change == "up" else halve(each)
            for each in (x, hidden)
        )
    hidden = layers.convolve(arrays / "conv1", hidden)
    channels, projected = hidden.shape[-1], None
    if embedding is not None:
        given = embedding if style.skip_activation else activation(embedding)
        projected = layers.linear(arrays / "time_emb_proj", given)
        if projected.shape[0] not in (channels, 2 * channels):
            raise arrays.foreign(
                f"{arrays.prefix}time_emb_proj gives {projected.shape[0]} channels, and {channels} or twice as many go "
                "into its block"
            )
        hidden = hidden + projected if projected.shape[0] == channels else hidden
    hidden = layers.group_norm(arrays / "norm2", hidden, style.groups, style.eps)
    if projected is not None and projected.shape[0] > channels:
        scale, shift = jnp.split(projected, 2)
        hidden = hidden * (1 + scale) + shift
    hidden = layers.convolve(arrays / "conv2", activation(hidden), outputs=channels)
    beside = (
        x
        if x.shape[-1] == channels
        else layers.convolve(arrays / "conv_shortcut", x, 1, channels)
    )
    return (beside + hidden) / style.rescale


def enlarge(x: Array, size: tuple[int, ...]) -> Array:
    """The nearest pixel for each of another size."""
    if size == doubled(x):
        return jnp.repeat(jnp.repeat(x, 2, axis=0), 2, axis=1)
    rows, columns = (
        jnp.arange(n) * old // n for n, old in zip(size, x.shape[:2], strict=True)
    )
    return x[rows][:, columns]


def doubled(x: Array) -> tuple[int, int]:
    """Twice the height and width of an image."""
    return 2 * x.shape[0], 2 * x.shape[1]


def halve(x: Array) -> Array:
    """Means of 2×2 pixels; an odd last row or column is left out."""
    height, width, channels = x.shape[0] // 2, x.shape[1] // 2, x.shape[2]
    return (
        x[: 2 * height, : 2 * width].reshape(height, 2, width, 2, channels).mean((1, 3))
    )


def transformers(
    arrays: Arrays, x: Array, context: Array | None, style: Style
) -> Array:
    """Transformer blocks over the places of an image, which attend to these and to the
    context; added to the image."""
    if context is None:
        raise arrays.foreign(
            f"{arrays.prefix[:-1]} has transformers, and no network of this class has a prompt there"
        )
    project = (
        partial(layers.convolve, size=1)
        if len(arrays.like(".proj_in.weight")) == 4
        else layers.linear
    )
    hidden = project(
        arrays / "proj_in", layers.group_norm(arrays / "norm", x, style.groups, 1e-6)
    )
    sequence = hidden.reshape(-1, hidden.shape[-1])
    for block in arrays.items("transformer_blocks"):
        for i, seen in (1, context if style.only_cross else None), (2, context):
            normed = layers.layer_norm(block / f"norm{i}", sequence)
            sequence += layers.attention(block / f"attn{i}", normed, style.heads, seen)
        sequence += layers.feed_forward(
            block / "ff", layers.layer_norm(block / "norm3", sequence), "geglu"
        )
    return (
        project(
            arrays / "proj_out", sequence.reshape(hidden.shape), outputs=x.shape[-1]
        )
        + x
    )


def attended(arrays: Arrays, x: Array, context: Array | None, style: Style) -> Array:
    """Attention of an image to itself, after a norm and added, or transformers."""
    if "transformer_blocks" in arrays:
        return transformers(arrays, x, context, style)
    channels = x.shape[-1]
    layers.check_split(
        arrays,
        channels,
        style.head_size or style.heads,
        "heads of attention, or channels of a head,",
    )
    sequence = x.reshape(-1, channels)
    if "group_norm" in arrays:
        sequence = layers.group_norm(
            arrays / "group_norm",
            sequence,
            style.attention_groups or style.groups,
            style.eps,
        )
    heads = style.heads if style.head_size is None else channels // style.head_size
    return (
        layers.attention(arrays, sequence, heads, bias=True).reshape(x.shape) + x
    ) / style.rescale


@dataclass(frozen=True)
class Body:
    """Convolutions of an image: down, a middle, and up again; an autoencoder's halves
    go only one way."""

    down: tuple[Style, ...]  # of each stage
    mid: Style
    up: tuple[Style, ...]
    kernels: int | None = 3  # pixels of the first and the last; None for any
    # where an image is halved; 0 stands for one row and column of zeros at the far ends
    padding: int = 1
    activation: str = "silu"  # before the last convolution

    def __call__(
        self,
        arrays: Arrays,
        x: Array,
        embedding: Array | None = None,
        context: Array | None = None,
    ) -> Array:
        """The output for an image (height, width, channels), the embedding of the time
        and the prompt."""
        hidden, given = (
            layers.convolve(arrays / "conv_in", x, self.kernels),
            [embedding, context],
        )
        skips = [hidden] if self.down and self.up else None
        for block, style in zip(arrays.items("down_blocks"), self.down, strict=True):
            hidden = self._stage(block, hidden, given, style, "down", skips)
        if "mid_block" in arrays:
            hidden = self._stage(
                arrays / "mid_block", hidden, given, self.mid, "mid", None
            )
        for block, style in zip(arrays.items("up_blocks"), self.up, strict=True):
            hidden = self._stage(block, hidden, given, style, "up", skips)
        if skips:
            raise arrays.foreign(
                f"its way up has {len(skips)} residual blocks too few for its way down"
            )
        hidden = layers.group_norm(
            arrays / "conv_norm_out", hidden, self.mid.groups, self.mid.eps
        )
        return layers.convolve(
            arrays / "conv_out", ACTIVATIONS[self.activation](hidden), self.kernels
        )

    def _stage(
        self,
        arrays: Arrays,
        x: Array,
        given: list[Array | None],
        style: Style,
        way: str,
        skips: list[Array] | None,
    ) -> Array:
        """Residual blocks at one resolution, each followed by attention where the stage
        has it (in the middle, the last one by none), and what changes the resolution
        after them. On the way down ``skips`` gets everything that the way up will see
        again; there it loses its last entries, one for each residual block, and the
        next gives the size."""
        (embedding, context), seen = given, skips if way == "down" else None
        resnets, attentions = arrays.items("resnets"), arrays.items("attentions")
        if not resnets or len(attentions) not in (0, len(resnets) - (way == "mid")):
            found = f"{len(resnets)} residual blocks, {len(attentions)} attentions"
            raise arrays.foreign(f"{arrays.prefix[:-1]} has {found}")
        for block, attends in itertools.zip_longest(resnets, attentions):
            if way == "up" and skips is not None:
                if not skips:
                    raise arrays.foreign(
                        f"{block.prefix[:-1]} has no block on the way down whose output it would see"
                    )
                x = jnp.concatenate([x, skips.pop()], axis=-1)
            x = resnet(block, x, embedding, style)
            x = x if attends is None else attended(attends, x, context, style)
            if seen is not None:
                seen.append(x)
        for layer in arrays.items(f"{way}samplers"):
            if "norm1" in layer:
                x = resnet(layer, x, embedding, style, way)
            elif way == "down":
                x = layers.convolve(
                    layer / "conv", x, stride=2, padding=self.padding or (0, 1)
                )
            else:
                size, conv = (
                    skips[-1].shape[:2] if skips else doubled(x),
                    layer / "conv",
                )
                x = (
                    layers.convolve_enlarged(conv, x)
                    if size == doubled(x)
                    else layers.convolve(conv, enlarge(x, size))
                )
            if seen is not None:
                seen.append(x)
        return x


def check_kinds(o: Options, arrays: Arrays, way: str, known: str) -> list[str]:
    """The names of the blocks on one way, ``"down"`` or ``"up"``, as the file gives
    them; "" where it gives none. ``known`` are those that are supported, with ``*`` for
    "Down" or "Up"; they must be of the weights' attention."""
    name, blocks, title = (
        f"{way}_block_types",
        arrays.items(f"{way}_blocks"),
        way.capitalize(),
    )
    if getattr(o, name) is None:
        return [""] * len(blocks)
    supported = tuple(known.replace("*", title).split())
    kinds = [kind.removeprefix("UNetRes") for kind in o.per_block(name, len(blocks))]
    for i, (kind, block) in enumerate(zip(kinds, blocks, strict=True)):
        if kind not in supported:
            unsupported(o.where, f"{name}[{i}]", kind, supported)
        first = block / "attentions" / 0
        has = (
            "CrossAttn"
            if "transformer_blocks" in first
            else "Attn"
            if "attentions" in block
            else ""
        )
        if kind.partition(title)[0].removeprefix("Resnet") != has:
            raise arrays.foreign(
                f"{name}[{i}] is {kind!r}, and block {i} has attention of the kind {has!r}"
            )
    return kinds


SIZES = 6
"""Numbers about the image that SDXL takes."""


@dataclass(frozen=True)
class UNet:
    """A UNet over one image, given a time and conditions."""

    body: Body
    time: str = "positional"  # how its embedding begins, or "fourier" or "learned"
    cosine_first: bool = True  # this and the next two as of `sinusoids`
    shift: float = 0.0
    scale: float = 1.0
    inner_activation: str = "silu"  # in the embedding of the time
    outer_activation: str = "identity"  # after it
    last_activation: str = "identity"  # after labels and sizes are added
    label: str | None = None  # what a label is, diffusers' class_embed_type
    concatenated: bool = (
        False  # whether a label's embedding is put beside the time's, and not added
    )
    size_width: int | None = (
        None  # of the sinusoids of each of an image's sizes; None where it takes none
    )
    centred: bool = False  # whether images are given from 0 to 1
    # the time is the noise's standard deviation, which also divides the output
    takes_sigma: bool = False

    def __call__(
        self, arrays: Arrays, x: Array, t: Array, **conditions: Array
    ) -> Array:
        """The output for one image or latents (height, width, channels), at a time.

        The conditions are a label, a prompt, hidden states (length, channels), and with
        it one vector, pooled; and the size (6,): the image's height and width before
        scaling, its crop's top and left, and its target size.
        """
        prompt, label = conditions.get("prompt"), conditions.get("label")
        embedding = layers.mlp(
            arrays / "time_embedding",
            self._waves(arrays, t),
            activation=self.inner_activation,
        )
        embedding = ACTIVATIONS[self.outer_activation](embedding)
        if label is not None:
            embedded = self._labelled(arrays, label, embedding.shape[0]).astype(
                embedding.dtype
            )
            embedding = (
                jnp.concatenate([embedding, embedded])
                if self.concatenated
                else embedding + embedded
            )
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
        embedding = ACTIVATIONS[self.last_activation](embedding)
        if prompt is not None and "encoder_hid_proj" in arrays:
            prompt = layers.linear(arrays / "encoder_hid_proj", prompt)
        dtype = arrays.take("conv_in.weight", None, x.shape[-1], None, None).dtype
        context = None if prompt is None else prompt.astype(dtype)
        output = self.body(
            arrays, 2 * x - 1.0 if self.centred else x, embedding, context
        ).astype(x.dtype)
        return output / t if self.takes_sigma else output

    def _waves(self, arrays: Arrays, t: Array) -> Array:
        """What the embedding of a number is made of."""
        below, inputs = (
            arrays / "time_proj",
            arrays.shape("time_embedding.linear_1.weight", 2)[1],
        )
        if self.time == "learned":
            return below.take("weight", None, inputs)[t]
        if self.time == "fourier":
            turns = jnp.asarray(
                jnp.log(t) if self.takes_sigma else t, jnp.float32
            ) * below.take("weight", inputs // 2)
            return layers.waves(turns * 2 * jnp.pi, self.cosine_first)
        return layers.sinusoids(t, inputs, self.cosine_first, self.shift, self.scale)

    def _labelled(self, arrays: Arrays, label: Array, width: int) -> Array:
        below = arrays / "class_embedding"
        if self.label == "identity":
            return label
        if self.label is None:
            return below.take("weight", None, width)[label]
        if self.label == "simple_projection":
            return layers.linear(below, label, width)
        given = self._waves(arrays, label) if self.label == "timestep" else label
        return layers.mlp(
            below,
            given,
            width,
            self.inner_activation if self.label == "timestep" else "silu",
        )


def _sizes(arrays: Arrays) -> JSONObject:
    """Options that a UNet's weights contain, by the names of diffusers' files."""
    stages, up = arrays.items("down_blocks"), arrays.items("up_blocks")
    if not stages or len(up) != len(stages):
        raise arrays.foreign(
            f"it has {len(stages)} blocks on the way down and {len(up)} on the way up"
        )
    resnets = [stage.items("resnets") for stage in stages]
    if [] in resnets:
        raise arrays.foreign("it has a block without residual blocks")
    first, labels = resnets[0][0], arrays / "class_embedding"
    doubled = (
        first.shape("time_emb_proj.weight", 2)[0] > first.shape("conv1.weight", 4)[0]
    )
    return {
        "in_channels": arrays.shape("conv_in.weight", 4)[1],
        "out_channels": arrays.shape("conv_out.weight", 4)[0],
        "block_out_channels": [
            stage[-1].shape("conv1.weight", 4)[0] for stage in resnets
        ],
        "layers_per_block": [len(stage) for stage in resnets],
        "resnet_time_scale_shift": "scale_shift" if doubled else "default",
        "num_class_embeds": labels.shape("weight", 2)[0]
        if "weight" in labels and "bias" not in labels
        else None,
        "time_embedding_dim": arrays.shape("time_embedding.linear_2.weight", 2)[0],
    }


def _label(o: Options, arrays: Arrays) -> dict[str, tuple[int, ...]]:
    """The condition ``label`` and its shape; empty for a network without labels."""
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
    sizes, label = _sizes(arrays), _label(o, arrays)
    n, fourier = len(sizes["layers_per_block"]), o.time_embedding_type == "fourier"
    steps = (
        arrays.shape("time_proj.weight", 2)[0]
        if o.time_embedding_type == "learned"
        else None
    )
    middle = arrays / "mid_block"
    o.agree(
        **sizes,
        add_attention="attentions" in middle if "mid_block" in arrays else None,
        num_train_timesteps=steps,
    )
    style = Style(
        o.norm_num_groups, float(o.norm_eps), o.act_fn, head_size=o.attention_head_dim
    )
    inside = replace(
        style,
        rescale=float(o.mid_block_scale_factor),
        attention_groups=o.attn_norm_num_groups,
    )
    form = UNet(
        Body((style,) * n, inside, (style,) * n, padding=o.downsample_padding), o.time_embedding_type,
        o.flip_sin_to_cos and not fourier, o.freq_shift, label=o.class_embed_type, centred=o.center_input_sample,
        takes_sigma=fourier,
    )  # fmt: skip
    time = {"fourier": "sigma", "learned": "level"}.get(
        o.time_embedding_type, "real_level"
    )
    return Network.traced(
        form, arrays, sample_size=o.sample_size, channels=sizes["in_channels"], multiple=2 ** (n - 1), time=time,
        conditions=label, classes=sizes["num_class_embeds"],
    )  # fmt: skip


def unet_condition(config: JSONObject, arrays: Arrays, where: str) -> Network:
    """A `UNet2DConditionModel`: text to image, as in Stable Diffusion 1, 2 and XL."""
    o = Options(
        config, where, sample_size=(None, anything), center_input_sample=(False, True), flip_sin_to_cos=(True, False),
        freq_shift=(0, number), down_block_types=(None, text_list), up_block_types=(None, text_list),
        mid_block_type=("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
        only_cross_attention=(False, flag.each), downsample_padding=(1, 0), mid_block_scale_factor=(1, positive),
        dropout=(0.0, anything), act_fn=("silu", *ACTIVATIONS), norm_num_groups=(32, whole), norm_eps=(1e-5, positive),
        encoder_hid_dim_type=(None, "text_proj"), attention_head_dim=(8, whole.each), num_attention_heads=(None,),
        dual_cross_attention=(False,),
        class_embed_type=(None, "timestep", "identity", "projection", "simple_projection"),
        addition_embed_type=(None, "text_time"), addition_time_embed_dim=(None, whole),
        # attention is always summed in single precision here
        upcast_attention=(False, True),
        resnet_skip_time_act=(False, True), resnet_out_scale_factor=(1.0, positive),
        time_embedding_type=("positional", "fourier"), time_embedding_act_fn=(None, *ACTIVATIONS),
        timestep_post_act=(None, *ACTIVATIONS), time_cond_proj_dim=(None,), attention_type=("default",),
        class_embeddings_concat=(False, True), mid_block_only_cross_attention=(None, anything),
        cross_attention_norm=(None,), addition_embed_type_num_heads=(64, anything),
    )  # fmt: skip
    known = "CrossAttn*Block2D *Block2D Attn*Block2D Resnet*sampleBlock2D"
    kinds = {way: check_kinds(o, arrays, way, known) for way in ("down", "up")}
    sizes, label, n = _sizes(arrays), _label(o, arrays), len(kinds["down"])
    heads = o.per_block(
        "attention_head_dim", n
    )  # the original's name for numbers of heads
    only_cross = o.per_block("only_cross_attention", n)
    depths = {
        way: [_depths(stage) for stage in arrays.items(f"{way}_blocks")]
        for way in ("down", "up")
    }
    keys, projected = arrays.like("attn2.to_k.weight"), "encoder_hid_proj" in arrays
    context, ranks = keys[-1] if keys else None, {0: None, 2: True}
    prompt = arrays.shape("encoder_hid_proj.weight", 2)[1] if projected else context
    conditions = {"prompt": (0, prompt)} | label if prompt else label
    vector = label["label"][0] if label.get("label") else None
    if o.addition_embed_type == "text_time":
        if o.addition_time_embed_dim is None:
            unsupported(where, "addition_time_embed_dim", None, (whole,))
        vector = arrays.shape("add_embedding.linear_1.weight", 2)[1]
        conditions |= {
            "pooled": (vector - SIZES * o.addition_time_embed_dim,),
            "size": (SIZES,),
        }
        if vector <= SIZES * o.addition_time_embed_dim:
            unsupported(
                where,
                "addition_time_embed_dim",
                o.addition_time_embed_dim,
                (f"less than {vector / SIZES:g}",),
            )
    o.agree(
        **sizes, cross_attention_dim=context, conv_in_kernel=arrays.shape("conv_in.weight", 4)[2],
        conv_out_kernel=arrays.shape("conv_out.weight", 4)[2], projection_class_embeddings_input_dim=vector,
        encoder_hid_dim=prompt if projected else None, transformer_layers_per_block=depths["down"],
        reverse_transformer_layers_per_block=depths["up"],
        use_linear_projection=ranks.get(len(arrays.like(".proj_in.weight")), False),
    )  # fmt: skip
    plain = Style(o.norm_num_groups, float(o.norm_eps), o.act_fn)
    by_resnet = replace(
        plain,
        rescale=float(o.resnet_out_scale_factor),
        skip_activation=o.resnet_skip_time_act,
    )

    def style(way: str, i: int, kind: str) -> Style:
        j = i if way == "down" else n - 1 - i
        # The original has the sizes of plain attention's heads in the order of the way
        # down, also on the way up.
        each = {"heads": heads[j], "head_size": heads[i], "only_cross": only_cross[j]}
        return replace(by_resnet if kind.startswith("Resnet") else plain, **each)

    down, up = (
        tuple(style(way, i, kind) for i, kind in enumerate(kinds[way]))
        for way in ("down", "up")
    )
    inside = replace(
        plain,
        rescale=float(o.mid_block_scale_factor),
        heads=heads[-1],
        head_size=heads[0],
    )
    body = Body(down, inside, up, None, o.downsample_padding, o.act_fn)
    form = UNet(
        body, o.time_embedding_type, o.flip_sin_to_cos, o.freq_shift, inner_activation=o.act_fn,
        outer_activation=o.timestep_post_act or "identity", last_activation=o.time_embedding_act_fn or "identity",
        label=o.class_embed_type, concatenated=o.class_embeddings_concat, centred=o.center_input_sample,
        size_width=o.addition_time_embed_dim if o.addition_embed_type else None,
    )  # fmt: skip
    return Network.traced(
        form, arrays, sample_size=o.sample_size, channels=sizes["in_channels"], conditions=conditions,
        classes=sizes["num_class_embeds"],
    )  # fmt: skip


def _depths(stage: Arrays) -> list[int] | None:
    """The layers of every transformer of a stage; None where it has none."""
    return [
        n
        for each in stage.items("attentions")
        if (n := len(each.items("transformer_blocks")))
    ] or None


GUIDED = "GuidedDiffusionUNet"
"""The class in a config.json that tools/convert_guided_diffusion.py wrote."""


def guided(config: JSONObject, arrays: Arrays, where: str) -> Network:
    """The UNet of guided-diffusion (ADM), and of improved-diffusion before it, its
    arrays by diffusers' names. The options are guided-diffusion's own, and
    ``time_scale``, which multiplies the timestep."""
    o = Options(
        config, where, image_size=(None, anything), num_heads=(None, whole), num_head_channels=(None, whole),
        num_heads_upsample=(None, whole), time_scale=(1.0, positive),
    )  # fmt: skip
    if o.num_heads is None and o.num_head_channels is None:
        unsupported(where, "num_heads", None, (whole, "with num_head_channels null"))
    sizes, stages = _sizes(arrays), arrays.items("down_blocks")
    samplers, n = (
        [layer for stage in stages for layer in stage.items("downsamplers")],
        len(stages),
    )
    o.agree(
        in_channels=sizes["in_channels"], out_channels=sizes["out_channels"],
        num_channels=arrays.shape("time_embedding.linear_1.weight", 2)[1], block_channels=sizes["block_out_channels"],
        num_res_blocks=sizes["layers_per_block"], num_classes=sizes["num_class_embeds"],
        attention_blocks=["attentions" in stage for stage in stages],
        use_scale_shift_norm=sizes["resnet_time_scale_shift"] == "scale_shift",
        resblock_updown="norm1" in samplers[0] if samplers else None,
    )  # fmt: skip
    style = Style(
        32, 1e-5, "silu", heads=o.num_heads or 1, head_size=o.num_head_channels
    )  # norms of the original
    upwards = replace(style, heads=o.num_heads_upsample or style.heads)
    form = UNet(Body((style,) * n, style, (upwards,) * n), scale=float(o.time_scale))
    classes = sizes["num_class_embeds"]
    return Network.traced(
        form, arrays, sample_size=o.image_size, channels=sizes["in_channels"], multiple=2 ** (n - 1),
        conditions={} if classes is None else {"label": ()}, classes=classes,
    )  # fmt: skip
