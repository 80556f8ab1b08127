"""Networks of known sizes without weights: what they would take can be compiled where
they do not fit.

composeprob devices benchmarks/sizes.py:sd15 --compile v5e:4x4
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

import composeprob as cp
from composeprob.pretrained import schedulers
from composeprob.pretrained.load import Adapted
from composeprob.pretrained.tensors import Arrays, Stored, abstract
from composeprob.pretrained.unet import SIZES, unet_condition

KNOWN = {
    "sd15": (
        {"sample_size": 64, "attention_head_dim": 8},
        (320, 640, 1280, 1280),
        (1, 1, 1, 0),
        768,
        0,
    ),
    "sdxl": (
        {
            "sample_size": 128,
            "attention_head_dim": [5, 10, 20],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
        },
        (320, 640, 1280),
        (0, 2, 10),
        2048,
        2816,
    ),
}
"""Stable Diffusion 1.5 (0.86 billion weights) and XL (2.57 billion): the options that
weights do not contain, channels and layers of transformers of each resolution, channels
of the prompt and of what is embedded beside it."""


def shapes(
    widths: tuple[int, ...],
    depths: tuple[int, ...],
    context: int,
    added: int,
    linear: bool,
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The names and shapes of the weights of a text-to-image UNet with two residual
    blocks at each resolution."""
    embedding = 4 * widths[0]
    n = len(widths)

    def layer(
        name: str, outputs: int, *inputs: int, bias: bool = True
    ) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (outputs, *inputs)
        yield from [(f"{name}.bias", (outputs,))] * bias

    def resnet(
        name: str, inputs: int, outputs: int
    ) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from layer(f"{name}.norm1", inputs)
        yield from layer(f"{name}.conv1", outputs, inputs, 3, 3)
        yield from layer(f"{name}.time_emb_proj", outputs, embedding)
        yield from layer(f"{name}.norm2", outputs)
        yield from layer(f"{name}.conv2", outputs, outputs, 3, 3)
        if inputs != outputs:
            yield from layer(f"{name}.conv_shortcut", outputs, inputs, 1, 1)

    def transformer(
        name: str, width: int, depth: int
    ) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from layer(f"{name}.norm", width)
        for side in ("in", "out"):
            yield from layer(
                f"{name}.proj_{side}", width, width, *(() if linear else (1, 1))
            )
        for i in range(depth):
            block = f"{name}.transformer_blocks.{i}"
            for j in (1, 2, 3):
                yield from layer(f"{block}.norm{j}", width)
            for j, other in ((1, width), (2, context)):
                yield from layer(f"{block}.attn{j}.to_q", width, width, bias=False)
                yield from layer(f"{block}.attn{j}.to_k", width, other, bias=False)
                yield from layer(f"{block}.attn{j}.to_v", width, other, bias=False)
                yield from layer(f"{block}.attn{j}.to_out.0", width, width)
            yield from layer(f"{block}.ff.net.0.proj", 8 * width, width)
            yield from layer(f"{block}.ff.net.2", width, 4 * width)

    yield from layer("conv_in", widths[0], 4, 3, 3)
    for name, inputs in (("time_embedding", widths[0]), ("add_embedding", added)):
        if inputs:
            yield from layer(f"{name}.linear_1", embedding, inputs)
            yield from layer(f"{name}.linear_2", embedding, embedding)
    skips = [widths[0]]
    for i, width in enumerate(widths):
        for j in range(2):
            yield from resnet(f"down_blocks.{i}.resnets.{j}", skips[-1], width)
            skips.append(width)
            if depths[i]:
                yield from transformer(
                    f"down_blocks.{i}.attentions.{j}", width, depths[i]
                )
        if i < n - 1:
            yield from layer(f"down_blocks.{i}.downsamplers.0.conv", width, width, 3, 3)
            skips.append(width)
    for j in range(2):
        yield from resnet(f"mid_block.resnets.{j}", widths[-1], widths[-1])
    yield from transformer("mid_block.attentions.0", widths[-1], depths[-1] or 1)
    before = widths[-1]
    for i, width in enumerate(reversed(widths)):
        for j in range(3):
            yield from resnet(f"up_blocks.{i}.resnets.{j}", before + skips.pop(), width)
            before = width
            if depths[n - 1 - i]:
                yield from transformer(
                    f"up_blocks.{i}.attentions.{j}", width, depths[n - 1 - i]
                )
        if i < n - 1:
            yield from layer(f"up_blocks.{i}.upsamplers.0.conv", width, width, 3, 3)
    yield from layer("conv_norm_out", widths[0])
    yield from layer("conv_out", 4, widths[0], 3, 3)


def of_size(
    name: str, dtype: DTypeLike = jnp.bfloat16
) -> tuple[cp.Diffusion, tuple[int, int]]:
    """A factor whose network has the shapes of a known one, and no weights; with the
    shape of a prompt.

    Args:
        name: of `KNOWN`.
        dtype: of the weights.

    Raises:
        InvalidValueError: no such size.
    """
    if name not in KNOWN:
        raise cp.errors.InvalidValueError(
            f"No size {name!r} is known.", fix=f"use one of: {', '.join(KNOWN)}."
        )
    options, widths, depths, context, added = KNOWN[name]
    stored = {
        key: Stored(Path(name), np.dtype(np.float32), shape, 0)
        for key, shape in shapes(
            widths, depths, context, added, "use_linear_projection" in options
        )
    }
    network = unet_condition(dict(options), Arrays(stored, name), name)
    module = abstract(network.module, dtype)
    conditions: dict[str, Array | None] = {"prompt": None}
    rows = 77  # of CLIP's tokens
    if network.pooled is not None:
        module = Adapted(module, None, network.channels, network.pooled, None)
        conditions = conditions | {"size": jnp.zeros(SIZES)}
        rows = rows + 1
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    schedule = schedulers.trained(
        {"_class_name": "DDIMScheduler", **betas}, name
    ).schedule
    side = options["sample_size"]
    factor = cp.Diffusion(
        module,
        schedule,
        event_shape=(side, side, network.channels),
        time=network.time,
        conditions=conditions,
        label=name,
    )
    return factor, (rows, context)


def two_prompts(name: str) -> cp.Program:
    """A product of two prompts under a network of a known size, whose weights are not
    there.

    Raises:
        InvalidValueError: no such size.
    """
    factor, prompt = of_size(name)

    @cp.program
    def both(model: cp.Diffusion = factor) -> Array:
        first, second = (
            model.given(prompt=np.full(prompt, value, np.float32))
            for value in (0.0, 1.0)
        )
        return cp.sample("x", first * second)

    return both


sampler = cp.Ancestral()
sd15, sdxl = two_prompts("sd15"), two_prompts("sdxl")
