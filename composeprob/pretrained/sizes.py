"""Networks of known sizes without weights: what they would take can be compiled where they do not fit."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from composeprob.errors import InvalidValueError
from composeprob.factors.diffusion import Diffusion
from composeprob.json_data import JSONObject
from composeprob.pretrained import schedulers, unet_condition
from composeprob.pretrained.adapted import Adapted
from composeprob.pretrained.tensors import abstract

SIZES: dict[str, JSONObject] = {
    "sd15": {
        "sample_size": 64,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
"""Options of the networks of Stable Diffusion 1.5 (0.86 billion weights) and XL (2.57 billion)."""


def of_size(name: str, dtype: DTypeLike = jnp.bfloat16) -> tuple[Diffusion, tuple[int, int]]:
    """A factor whose network has the shapes of a known one, and no weights; with the shape of a prompt.

    Args:
        name: of `SIZES`.
        dtype: of the weights.

    Raises:
        InvalidValueError: no such size.
    """
    if name not in SIZES:
        raise InvalidValueError(f"No size {name!r} is known.", fix=f"use one of: {', '.join(SIZES)}.")
    network = unet_condition.build(SIZES[name], name)
    size, (_, width) = SIZES[name]["sample_size"], network.conditions["prompt"]
    module = abstract(network.module, dtype)
    conditions: dict[str, Array | None] = {"prompt": None}
    rows = 77  # of CLIP's tokens
    if "pooled" in network.conditions:
        module = Adapted(module, None, network.channels, network.conditions["pooled"][0], None)
        conditions, rows = conditions | {"size": jnp.zeros(unet_condition.SIZES)}, rows + 1
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    schedule = schedulers.trained({"_class_name": "DDIMScheduler", **betas}, name).schedule
    factor = Diffusion(
        module,
        schedule,
        event_shape=(size, size, network.channels),
        time=network.time,
        conditions=conditions,
        label=name,
    )
    return factor, (rows, width)
