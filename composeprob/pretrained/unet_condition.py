"""`UNet2DConditionModel`: text to image, as in Stable Diffusion 1, 2 and XL."""

from __future__ import annotations

from types import SimpleNamespace

from composeprob.json_data import JSONObject
from composeprob.pretrained.attention import Attention, SpatialTransformer
from composeprob.pretrained.blocks import Attend, Middle, Stage, Style, down_stage, skip_inputs, up_stage
from composeprob.pretrained.config import check_block, options, per_block, unsupported
from composeprob.pretrained.embeddings import EmbeddingMLP, Fourier, Sinusoids
from composeprob.pretrained.layers import ACTIVATIONS, Conv, GroupNorm, Linear
from composeprob.pretrained.network import Network
from composeprob.pretrained.unet import UNet, label_embedding, label_kind

SIZES = 6
"""Numbers about the image that SDXL takes: height and width, the crop's top and left, the target's height and width."""


def _options(config: JSONObject, where: str) -> SimpleNamespace:
    """The options of a `UNet2DConditionModel`, with the original's defaults."""
    return options(
        config,
        where,
        defaults={
            "sample_size": None,
            "in_channels": 4,
            "out_channels": 4,
            "center_input_sample": False,
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "mid_block_type": "UNetMidBlock2DCrossAttn",
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            "only_cross_attention": False,
            "block_out_channels": (320, 640, 1280, 1280),
            "layers_per_block": 2,
            "downsample_padding": 1,
            "mid_block_scale_factor": 1,
            "dropout": 0.0,
            "act_fn": "silu",
            "norm_num_groups": 32,
            "norm_eps": 1e-5,
            "cross_attention_dim": 1280,
            "transformer_layers_per_block": 1,
            "reverse_transformer_layers_per_block": None,
            "encoder_hid_dim": None,
            "encoder_hid_dim_type": None,
            "attention_head_dim": 8,
            "num_attention_heads": None,
            "dual_cross_attention": False,
            "use_linear_projection": False,
            "class_embed_type": None,
            "addition_embed_type": None,
            "addition_time_embed_dim": None,
            "num_class_embeds": None,
            "upcast_attention": False,  # attention is always summed in single precision here
            "resnet_time_scale_shift": "default",
            "resnet_skip_time_act": False,
            "resnet_out_scale_factor": 1.0,
            "time_embedding_type": "positional",
            "time_embedding_dim": None,
            "time_embedding_act_fn": None,
            "timestep_post_act": None,
            "time_cond_proj_dim": None,
            "conv_in_kernel": 3,
            "conv_out_kernel": 3,
            "projection_class_embeddings_input_dim": None,
            "attention_type": "default",
            "class_embeddings_concat": False,
            "mid_block_only_cross_attention": None,
            "cross_attention_norm": None,
            "addition_embed_type_num_heads": 64,
        },
        supported={
            "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
            "downsample_padding": (0, 1),
            "act_fn": tuple(ACTIVATIONS),
            "encoder_hid_dim_type": (None, "text_proj"),
            "num_attention_heads": (None,),
            "dual_cross_attention": (False,),
            "class_embed_type": (None, "timestep", "identity", "projection", "simple_projection"),
            "addition_embed_type": (None, "text_time"),
            "resnet_time_scale_shift": ("default", "scale_shift"),
            "time_embedding_type": ("positional", "fourier"),
            "time_embedding_act_fn": (None, *ACTIVATIONS),
            "timestep_post_act": (None, *ACTIVATIONS),
            "time_cond_proj_dim": (None,),
            "attention_type": ("default",),
            "cross_attention_norm": (None,),
        },
    )


def build(config: JSONObject, where: str) -> Network:
    """The skeleton of a `UNet2DConditionModel` from its config.json.

    Raises:
        LoadError: an option or block that is not supported.
    """
    o = _options(config, where)
    widths, n = list(o.block_out_channels), len(o.block_out_channels)
    downs, ups = (per_block(getattr(o, f"{way}_block_types"), n, f"{way}_block_types", where) for way in ("down", "up"))
    layers = per_block(o.layers_per_block, n, "layers_per_block", where)
    heads = per_block(o.attention_head_dim, n, "attention_head_dim", where)  # the original's name for numbers of heads
    contexts = per_block(o.cross_attention_dim, n, "cross_attention_dim", where)
    only_cross = per_block(o.only_cross_attention, n, "only_cross_attention", where)
    depths = per_block(o.transformer_layers_per_block, n, "transformer_layers_per_block", where)
    depths_up = depths[::-1]
    if o.reverse_transformer_layers_per_block is not None:
        depths_up = per_block(o.reverse_transformer_layers_per_block, n, "reverse_transformer_layers_per_block", where)
    fourier = o.time_embedding_type == "fourier"
    embedding = o.time_embedding_dim or widths[0] * (2 if fourier else 4)
    inputs_of_time = embedding if fourier else widths[0]
    inside = embedding * (2 if o.class_embeddings_concat else 1)
    scale_shift = o.resnet_time_scale_shift == "scale_shift"

    def style(rescale: float = 1.0, skip: bool = False) -> Style:
        return Style(inside, o.norm_num_groups, o.norm_eps, o.act_fn, scale_shift, skip, rescale)

    def cross(block: int, layer_depths: list[int]) -> Attend:
        remaining = iter(layer_depths)
        return lambda channels: SpatialTransformer(
            channels, heads[block], next(remaining), contexts[block], o.norm_num_groups, o.use_linear_projection,
            only_cross[block],
        )  # fmt: skip

    def attention(kind: str, block: int, depth: int | list[int], count: int, head: int | None) -> Attend | None:
        if kind.startswith("CrossAttn"):
            return cross(block, per_block(depth, count, "transformer_layers_per_block", where))
        if not kind.startswith("Attn"):
            return None

        def plain(channels: int) -> Attention:
            size = head or channels
            return Attention(
                channels, channels // size, size, bias=True, groups=o.norm_num_groups, eps=o.norm_eps, residual=True
            )

        return plain

    known_down = ("CrossAttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
    down, channels = [], widths[0]
    for i, kind in enumerate(downs):
        check_block(where, f"down_block_types[{i}]", kind, known_down)
        by_resnet = kind == "ResnetDownsampleBlock2D"
        block_style = style(o.resnet_out_scale_factor, o.resnet_skip_time_act) if by_resnet else style()
        shrink = ("resnet" if by_resnet else "conv") if i < n - 1 else None
        attend = attention(kind, i, depths[i], layers[i], heads[i])
        down.append(
            down_stage(channels, widths[i], layers[i], block_style, attend, shrink=shrink, padding=o.downsample_padding)
        )
        channels = widths[i]
    middle = None
    if o.mid_block_type == "UNetMidBlock2D":
        middle = Middle(channels, style(o.mid_block_scale_factor), None, blocks=0)
    elif o.mid_block_type is not None:
        depth = depths[-1] if isinstance(depths[-1], list | tuple) else [depths[-1]]
        last = SpatialTransformer(
            channels, heads[-1], depth[0], contexts[-1], o.norm_num_groups, o.use_linear_projection
        )
        middle = Middle(channels, style(o.mid_block_scale_factor), lambda _: last)
    known_up = ("CrossAttnUpBlock2D", "UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")
    up: list[Stage] = []
    for i, kind in enumerate(ups):
        check_block(where, f"up_block_types[{i}]", kind, known_up)
        j, count = n - 1 - i, layers[n - 1 - i] + 1
        by_resnet = kind == "ResnetUpsampleBlock2D"
        block_style = style(o.resnet_out_scale_factor, o.resnet_skip_time_act) if by_resnet else style()
        inputs = skip_inputs(channels, widths[j], widths[max(j - 1, 0)], count)
        grow = ("resnet" if by_resnet else "conv") if i < n - 1 else None
        # The original has the sizes of plain attention's heads in the order of the way down, also on the way up.
        attend = attention(kind, j, depths_up[i], count, heads[i])
        up.append(up_stage(inputs, widths[j], block_style, attend, grow=grow))
        channels = widths[j]

    time_proj: Sinusoids | Fourier = Sinusoids(widths[0], o.flip_sin_to_cos, o.freq_shift)
    if fourier:
        time_proj = Fourier(embedding // 2, log=False, cosine_first=o.flip_sin_to_cos)
    text_time = o.addition_embed_type == "text_time"
    if text_time:
        vector = o.projection_class_embeddings_input_dim
        if vector is None or o.addition_time_embed_dim is None:
            unsupported(
                where, "projection_class_embeddings_input_dim", vector, ("a number, with addition_time_embed_dim",)
            )
    projected = o.encoder_hid_dim is not None
    o.time_embedding_act = o.act_fn
    unet = UNet(
        conv_in=Conv(o.in_channels, widths[0], o.conv_in_kernel),
        time_proj=time_proj,
        time_embedding=EmbeddingMLP(inputs_of_time, embedding, o.act_fn, o.timestep_post_act),
        class_embedding=label_embedding(o, embedding, inputs_of_time, where),
        add_time_proj=Sinusoids(o.addition_time_embed_dim, o.flip_sin_to_cos, o.freq_shift) if text_time else None,
        add_embedding=EmbeddingMLP(vector, embedding) if text_time else None,
        encoder_hid_proj=Linear(o.encoder_hid_dim, contexts[0]) if projected else None,
        down_blocks=tuple(down),
        mid_block=middle,
        up_blocks=tuple(up),
        conv_norm_out=GroupNorm(o.norm_num_groups, widths[0], o.norm_eps),
        conv_out=Conv(widths[0], o.out_channels, o.conv_out_kernel),
        class_embed_type=o.class_embed_type,
        concatenated=o.class_embeddings_concat,
        embedding_activation=o.time_embedding_act_fn or "identity",
        activation=o.act_fn,
        centred=o.center_input_sample,
        takes_sigma=False,
    )
    label = label_kind(o)
    conditions: dict[str, tuple[int, ...]] = {"prompt": (0, o.encoder_hid_dim if projected else contexts[0])}
    if text_time:
        conditions |= {"pooled": (vector - SIZES * o.addition_time_embed_dim,), "size": (SIZES,)}
    if label is not None:
        width = o.projection_class_embeddings_input_dim if "projection" in str(o.class_embed_type) else embedding
        conditions["label"] = (width,) if label == "vector" else ()
    return Network(
        unet, o.sample_size, o.in_channels, o.out_channels, 1, conditions=conditions,
        classes=o.num_class_embeds if label == "index" else None,
    )  # fmt: skip
