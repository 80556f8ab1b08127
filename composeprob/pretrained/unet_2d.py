"""`UNet2DModel`: unconditional and class-conditional images."""

from __future__ import annotations

from types import SimpleNamespace

from composeprob.json_data import JSONObject
from composeprob.pretrained.attention import Attention
from composeprob.pretrained.blocks import Middle, Stage, Style, down_stage, skip_inputs, up_stage
from composeprob.pretrained.config import check_block, options, per_block
from composeprob.pretrained.embeddings import EmbeddingMLP, Fourier, Sinusoids
from composeprob.pretrained.layers import ACTIVATIONS, Conv, Embedding, GroupNorm
from composeprob.pretrained.network import Network
from composeprob.pretrained.unet import UNet, label_embedding, label_kind


def _options(config: JSONObject, where: str) -> SimpleNamespace:
    """The options of a `UNet2DModel`, with the original's defaults."""
    return options(
        config,
        where,
        defaults={
            "sample_size": None,
            "in_channels": 3,
            "out_channels": 3,
            "center_input_sample": False,
            "time_embedding_type": "positional",
            "time_embedding_dim": None,
            "freq_shift": 0,
            "flip_sin_to_cos": True,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            "mid_block_type": "UNetMidBlock2D",
            "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (224, 448, 672, 896),
            "layers_per_block": 2,
            "mid_block_scale_factor": 1,
            "downsample_padding": 1,
            "downsample_type": "conv",
            "upsample_type": "conv",
            "dropout": 0.0,
            "act_fn": "silu",
            "attention_head_dim": 8,
            "norm_num_groups": 32,
            "attn_norm_num_groups": None,
            "norm_eps": 1e-5,
            "resnet_time_scale_shift": "default",
            "add_attention": True,
            "class_embed_type": None,
            "num_class_embeds": None,
            "num_train_timesteps": None,
        },
        supported={
            "time_embedding_type": ("positional", "fourier", "learned"),
            "mid_block_type": ("UNetMidBlock2D", None),
            "downsample_type": ("conv", "resnet"),
            "upsample_type": ("conv", "resnet"),
            "downsample_padding": (0, 1),
            "act_fn": tuple(ACTIVATIONS),
            "resnet_time_scale_shift": ("default", "scale_shift"),
            "class_embed_type": (None, "timestep", "identity"),
        },
    )


def build(config: JSONObject, where: str) -> Network:
    """The skeleton of a `UNet2DModel` from its config.json.

    Raises:
        LoadError: an option or block that is not supported.
    """
    o = _options(config, where)
    widths = list(o.block_out_channels)
    downs = [
        kind.removeprefix("UNetRes") for kind in per_block(o.down_block_types, len(widths), "down_block_types", where)
    ]
    ups = [kind.removeprefix("UNetRes") for kind in per_block(o.up_block_types, len(widths), "up_block_types", where)]
    embedding = o.time_embedding_dim or widths[0] * 4
    scale_shift = o.resnet_time_scale_shift == "scale_shift"
    style = Style(embedding, o.norm_num_groups, o.norm_eps, o.act_fn, scale_shift)

    def attend(channels: int, groups: int | None = o.norm_num_groups, rescale: float = 1.0) -> Attention:
        size = o.attention_head_dim or channels
        return Attention(
            channels, channels // size, size, bias=True, groups=groups, eps=o.norm_eps, residual=True, rescale=rescale
        )

    known_down = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
    down, channels = [], widths[0]
    for i, kind in enumerate(downs):
        check_block(where, f"down_block_types[{i}]", kind, known_down)
        how = {"DownBlock2D": "conv", "AttnDownBlock2D": o.downsample_type}.get(kind, "resnet")
        down.append(
            down_stage(
                channels, widths[i], o.layers_per_block, style, attend if kind == "AttnDownBlock2D" else None,
                shrink=how if i < len(widths) - 1 else None, padding=o.downsample_padding,
            )
        )  # fmt: skip
        channels = widths[i]
    middle = None
    if o.mid_block_type is not None:
        rescale = float(o.mid_block_scale_factor)
        inside = Style(embedding, o.norm_num_groups, o.norm_eps, o.act_fn, scale_shift, rescale=rescale)
        groups = o.attn_norm_num_groups or (None if scale_shift else o.norm_num_groups)
        middle = Middle(channels, inside, (lambda c: attend(c, groups, rescale)) if o.add_attention else None)
    known_up = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")
    up: list[Stage] = []
    outward = widths[::-1]
    for i, kind in enumerate(ups):
        check_block(where, f"up_block_types[{i}]", kind, known_up)
        below = outward[min(i + 1, len(outward) - 1)]
        inputs = skip_inputs(channels, outward[i], below, o.layers_per_block + 1)
        how = {"UpBlock2D": "conv", "AttnUpBlock2D": o.upsample_type}.get(kind, "resnet")
        grow = how if i < len(outward) - 1 else None
        up.append(up_stage(inputs, outward[i], style, attend if kind == "AttnUpBlock2D" else None, grow=grow))
        channels = outward[i]

    fourier = o.time_embedding_type == "fourier"
    inputs_of_time = 2 * widths[0] if fourier else widths[0]
    time_proj: Sinusoids | Fourier | Embedding = Sinusoids(widths[0], o.flip_sin_to_cos, o.freq_shift)
    if fourier:
        time_proj = Fourier(widths[0], log=True, cosine_first=False)
    elif o.time_embedding_type == "learned":
        time_proj = Embedding(o.num_train_timesteps, widths[0])
    unet = UNet(
        conv_in=Conv(o.in_channels, widths[0]),
        time_proj=time_proj,
        time_embedding=EmbeddingMLP(inputs_of_time, embedding),
        class_embedding=label_embedding(o, embedding, inputs_of_time, where),
        add_time_proj=None,
        add_embedding=None,
        encoder_hid_proj=None,
        down_blocks=tuple(down),
        mid_block=middle,
        up_blocks=tuple(up),
        conv_norm_out=GroupNorm(o.norm_num_groups, widths[0], o.norm_eps),
        conv_out=Conv(widths[0], o.out_channels),
        class_embed_type=o.class_embed_type,
        concatenated=False,
        embedding_activation="identity",
        activation="silu",
        centred=o.center_input_sample,
        takes_sigma=fourier,
    )
    time = {"fourier": "sigma", "learned": "level"}.get(o.time_embedding_type, "real_level")
    label = label_kind(o)
    return Network(
        unet, o.sample_size, o.in_channels, o.out_channels, 2 ** (len(widths) - 1), time,
        conditions={} if label is None else {"label": ((embedding,) if label == "vector" else ())},
        classes=o.num_class_embeds if label == "index" else None,
    )  # fmt: skip
