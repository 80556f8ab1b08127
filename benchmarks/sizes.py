"""Networks of known sizes without weights, which compile where they do not fit.

python -m benchmarks tpu benchmarks/sizes.py:sd15 --topology v5e:4x4
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

import composeprob as cp
from composeprob.language.decorator import Program
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


Shapes = Iterator[tuple[str, tuple[int, ...]]]
"""Names of weights, with their shapes."""


@dataclass(frozen=True)
class Layout:
    """Sizes of a text-to-image UNet with two residual blocks at each resolution.

    Attributes:
        widths: channels of each resolution.
        depths: layers of the transformers of each resolution, 0 for none.
        context: channels of the prompt.
        added: channels of the vector that is embedded beside the time, 0 for none.
        linear: whether transformers project by matrices, not by convolutions.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    context: int
    added: int
    linear: bool

    @property
    def embedding(self) -> int:
        """Channels of the embedded time."""
        return 4 * self.widths[0]

    def shapes(self) -> Shapes:
        """Names and shapes of all weights."""
        yield from _layer("conv_in", self.widths[0], 4, 3, 3)
        inputs = {"time_embedding": self.widths[0], "add_embedding": self.added}
        for name, channels in inputs.items():
            if channels:
                yield from _layer(f"{name}.linear_1", self.embedding, channels)
                yield from _layer(f"{name}.linear_2", self.embedding, self.embedding)
        for i in range(len(self.widths)):
            yield from self._down(i)
        yield from self._middle()
        skips = self._skips()
        for i in range(len(self.widths)):
            yield from self._up(i, skips)
        yield from _layer("conv_norm_out", self.widths[0])
        yield from _layer("conv_out", 4, self.widths[0], 3, 3)

    def _down(self, i: int) -> Shapes:
        """Blocks that halve the resolution, at resolution i."""
        width = self.widths[i]
        for j in range(2):
            before = width if j else self.widths[max(i - 1, 0)]
            yield from self._resnet(f"down_blocks.{i}.resnets.{j}", before, width)
            name = f"down_blocks.{i}.attentions.{j}"
            yield from self._transformer(name, width, self.depths[i])
        if i < len(self.widths) - 1:
            name = f"down_blocks.{i}.downsamplers.0.conv"
            yield from _layer(name, width, width, 3, 3)

    def _middle(self) -> Shapes:
        width = self.widths[-1]
        for j in range(2):
            yield from self._resnet(f"mid_block.resnets.{j}", width, width)
        depth = self.depths[-1] or 1
        yield from self._transformer("mid_block.attentions.0", width, depth)

    def _up(self, i: int, skips: list[int]) -> Shapes:
        """Blocks that double the resolution, the i-th from the coarsest.

        Each residual block also takes the last of ``skips``, and removes it.
        """
        width = self.widths[-1 - i]
        for j in range(3):
            before = width if j else self.widths[min(-i, -1)]
            inputs = before + skips.pop()
            yield from self._resnet(f"up_blocks.{i}.resnets.{j}", inputs, width)
            name = f"up_blocks.{i}.attentions.{j}"
            yield from self._transformer(name, width, self.depths[-1 - i])
        if i < len(self.widths) - 1:
            yield from _layer(f"up_blocks.{i}.upsamplers.0.conv", width, width, 3, 3)

    def _skips(self) -> list[int]:
        """Channels of the outputs on the way down, which the way up takes."""
        skips = [self.widths[0]]
        for i, width in enumerate(self.widths):
            is_last = i == len(self.widths) - 1
            skips += [width] * (2 if is_last else 3)
        return skips

    def _resnet(self, name: str, inputs: int, outputs: int) -> Shapes:
        yield from _layer(f"{name}.norm1", inputs)
        yield from _layer(f"{name}.conv1", outputs, inputs, 3, 3)
        yield from _layer(f"{name}.time_emb_proj", outputs, self.embedding)
        yield from _layer(f"{name}.norm2", outputs)
        yield from _layer(f"{name}.conv2", outputs, outputs, 3, 3)
        if inputs != outputs:
            yield from _layer(f"{name}.conv_shortcut", outputs, inputs, 1, 1)

    def _transformer(self, name: str, width: int, depth: int) -> Shapes:
        """A transformer of so many layers; none of depth 0."""
        if not depth:
            return
        kernel = () if self.linear else (1, 1)
        yield from _layer(f"{name}.norm", width)
        for side in ("in", "out"):
            yield from _layer(f"{name}.proj_{side}", width, width, *kernel)
        for i in range(depth):
            block = f"{name}.transformer_blocks.{i}"
            for j in (1, 2, 3):
                yield from _layer(f"{block}.norm{j}", width)
            for j, other in ((1, width), (2, self.context)):
                yield from _layer(f"{block}.attn{j}.to_q", width, width, bias=False)
                yield from _layer(f"{block}.attn{j}.to_k", width, other, bias=False)
                yield from _layer(f"{block}.attn{j}.to_v", width, other, bias=False)
                yield from _layer(f"{block}.attn{j}.to_out.0", width, width)
            yield from _layer(f"{block}.ff.net.0.proj", 8 * width, width)
            yield from _layer(f"{block}.ff.net.2", width, 4 * width)


def _layer(name: str, outputs: int, *inputs: int, bias: bool = True) -> Shapes:
    yield f"{name}.weight", (outputs, *inputs)
    if bias:
        yield f"{name}.bias", (outputs,)


def of_size(
    name: str, dtype: DTypeLike = jnp.bfloat16
) -> tuple[cp.Diffusion, tuple[int, int]]:
    """A factor with the shapes of a known network and without weights, and the shape of
    a prompt.

    Args:
        name: of `KNOWN`.
        dtype: of the weights.

    Raises:
        InvalidValueError: no such size.
    """
    if name not in KNOWN:
        raise cp.errors.InvalidValueError(
            f"There is no size {name!r}.", fix=f"use one of: {', '.join(KNOWN)}."
        )
    options, widths, depths, context, added = KNOWN[name]
    linear = "use_linear_projection" in options
    layout = Layout(widths, depths, context, added, linear)
    stored = {
        key: Stored(key, np.dtype(np.float32), shape) for key, shape in layout.shapes()
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


def two_prompts(name: str) -> Program:
    """A product of two prompts under a network of a known size, without its weights.

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
