"""The UNet of guided-diffusion (ADM), and of improved-diffusion before it, from a folder that `convert` wrote."""

from __future__ import annotations

from types import SimpleNamespace

from composeprob.errors import LoadError
from composeprob.json_data import JSONObject
from composeprob.pretrained.attention import Attention
from composeprob.pretrained.blocks import Middle, Stage, Style, down_stage, skip_inputs, up_stage
from composeprob.pretrained.config import options, per_block
from composeprob.pretrained.embeddings import EmbeddingMLP, Sinusoids
from composeprob.pretrained.layers import Conv, Embedding, GroupNorm
from composeprob.pretrained.network import Network
from composeprob.pretrained.unet import UNet

NAME = "GuidedDiffusionUNet"


def heads(width: int, number: int | None, channels: int | None, where: str) -> int:
    """The number of heads of an attention of ``width`` channels: ``number``, or heads of ``channels`` each.

    Raises:
        LoadError: neither is given, or the heads cannot have equally many channels.
    """
    found = number if channels is None else width // channels
    if not found or width % found or (channels is not None and width % channels):
        option = f"num_heads={number}" if channels is None else f"num_head_channels={channels}"
        raise LoadError(
            f"{where} has attention over {width} channels, which {option} cannot split.",
            fix="give the number of heads, or the channels of each, that the model was trained with; weights do not "
            "tell it.",
        )
    return found


def _options(config: JSONObject, where: str) -> SimpleNamespace:
    """The options of a UNet of guided-diffusion, with the original's defaults."""
    return options(
        config,
        where,
        defaults={
            "image_size": None,
            "in_channels": 3,
            "out_channels": 3,
            "num_channels": 128,
            "block_channels": (128, 256, 384, 512),
            "attention_blocks": (False, False, True, True),
            "num_res_blocks": 2,
            "num_classes": None,
            "num_heads": None,
            "num_head_channels": None,
            "num_heads_upsample": None,
            "use_scale_shift_norm": True,
            "resblock_updown": False,
            "time_scale": 1.0,
        },
        supported={"use_scale_shift_norm": (True, False), "resblock_updown": (True, False)},
    )


def build(config: JSONObject, where: str) -> Network:
    """The skeleton of a UNet of guided-diffusion.

    Args:
        config: ``block_channels`` has the channels of each resolution, ``attention_blocks`` states which of them have
            attention; ``time_scale`` multiplies the timestep; the others are guided-diffusion's own options.
        where: the file, for errors.

    Raises:
        LoadError: an option that is not supported.
    """
    o = _options(config, where)
    widths, layers = list(o.block_channels), o.num_res_blocks
    attends = per_block(o.attention_blocks, len(widths), "attention_blocks", where)
    embedding = 4 * o.num_channels
    groups, eps = 32, 1e-5  # of every norm of the original
    style = Style(embedding, groups, eps, "silu", o.use_scale_shift_norm)

    def attend(channels: int, number: int | None = o.num_heads) -> Attention:
        count = heads(channels, number, o.num_head_channels, where)
        return Attention(channels, count, channels // count, bias=True, groups=groups, eps=eps, residual=True)

    def attend_up(channels: int) -> Attention:
        return attend(channels, o.num_heads_upsample or o.num_heads)

    how = "resnet" if o.resblock_updown else "conv"
    down: list[Stage] = []
    before = widths[0]
    for i, width in enumerate(widths):
        shrink = how if i < len(widths) - 1 else None
        here = attend if attends[i] else None
        down.append(down_stage(before, width, layers, style, here, shrink=shrink, padding=1))
        before = width
    up: list[Stage] = []
    for i in reversed(range(len(widths))):
        inputs = skip_inputs(before, widths[i], widths[max(i - 1, 0)], layers + 1)
        up.append(up_stage(inputs, widths[i], style, attend_up if attends[i] else None, grow=how if i else None))
        before = widths[i]
    unet = UNet(
        conv_in=Conv(o.in_channels, widths[0]),
        time_proj=Sinusoids(o.num_channels, cosine_first=True, shift=0, scale=o.time_scale),
        time_embedding=EmbeddingMLP(o.num_channels, embedding),
        class_embedding=None if o.num_classes is None else Embedding(o.num_classes, embedding),
        add_time_proj=None,
        add_embedding=None,
        encoder_hid_proj=None,
        down_blocks=tuple(down),
        mid_block=Middle(widths[-1], style, attend),
        up_blocks=tuple(up),
        conv_norm_out=GroupNorm(groups, widths[0], eps),
        conv_out=Conv(widths[0], o.out_channels),
        class_embed_type=None,
        concatenated=False,
        embedding_activation="identity",
        activation="silu",
        centred=False,
        takes_sigma=False,
    )
    return Network(
        unet, o.image_size, o.in_channels, o.out_channels, 2 ** (len(widths) - 1),
        conditions={} if o.num_classes is None else {"label": ()}, classes=o.num_classes,
    )  # fmt: skip
