"""Blocks of UNets and autoencoders: residual blocks, changes of resolution, and stages of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import equinox as eqx
import jax.numpy as jnp
from jax import Array

from composeprob.pretrained.attention import Attention, SpatialTransformer
from composeprob.pretrained.layers import ACTIVATIONS, Conv, GroupNorm, Linear

Attends = Attention | SpatialTransformer
Attend = Callable[[int], Attends]
"""Makes the attention that follows a residual block, from its number of channels."""


@dataclass(frozen=True)
class Style:
    """What all residual blocks of a network have in common.

    Attributes:
        embedding: width of the embedding of time; None without one.
        groups: of the norms.
        eps: of the norms.
        activation: its name.
        scale_shift: whether the embedding scales and shifts after the second norm, instead of being added before it.
        skip_activation: whether the embedding enters as it is.
        rescale: divides the output.
    """

    embedding: int | None
    groups: int
    eps: float
    activation: str
    scale_shift: bool = False
    skip_activation: bool = False
    rescale: float = 1.0


class Resnet(eqx.Module):
    """A residual block: norm, activation, convolution, the embedding of time, and the same again."""

    norm1: GroupNorm
    conv1: Conv
    time_emb_proj: Linear | None
    norm2: GroupNorm
    conv2: Conv
    conv_shortcut: Conv | None
    style: Style = eqx.field(static=True)
    change: str | None = eqx.field(static=True)

    def __init__(self, inputs: int, outputs: int, style: Style, change: str | None = None):
        self.norm1 = GroupNorm(style.groups, inputs, style.eps)
        self.conv1 = Conv(inputs, outputs)
        width = outputs * (2 if style.scale_shift else 1)
        self.time_emb_proj = None if style.embedding is None else Linear(style.embedding, width)
        self.norm2 = GroupNorm(style.groups, outputs, style.eps)
        self.conv2 = Conv(outputs, outputs)
        self.conv_shortcut = None if inputs == outputs else Conv(inputs, outputs, 1)
        self.style, self.change = style, change

    def __call__(self, x: Array, embedding: Array | None = None) -> Array:
        activation = ACTIVATIONS[self.style.activation]
        hidden = activation(self.norm1(x))
        if self.change == "up":
            x, hidden = enlarge(x), enlarge(hidden)
        elif self.change == "down":
            x, hidden = halve(x), halve(hidden)
        hidden = self.conv1(hidden)
        if self.time_emb_proj is None or embedding is None:
            hidden = self.norm2(hidden)
        else:
            projected = self.time_emb_proj(embedding if self.style.skip_activation else activation(embedding))
            if self.style.scale_shift:
                scale, shift = jnp.split(projected, 2)
                hidden = self.norm2(hidden) * (1 + scale) + shift
            else:
                hidden = self.norm2(hidden + projected)
        hidden = self.conv2(activation(hidden))
        beside = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return (beside + hidden) / self.style.rescale


def enlarge(x: Array, size: tuple[int, int] | None = None) -> Array:
    """Every pixel repeated 2×2, or the nearest pixel for each of another size."""
    if size is None:
        return jnp.repeat(jnp.repeat(x, 2, axis=0), 2, axis=1)
    rows, columns = (jnp.arange(n) * old // n for n, old in zip(size, x.shape[:2], strict=True))
    return x[rows][:, columns]


def halve(x: Array) -> Array:
    """Means of 2×2 pixels; an odd last row or column is left out."""
    height, width, channels = x.shape[0] // 2, x.shape[1] // 2, x.shape[2]
    return x[: 2 * height, : 2 * width].reshape(height, 2, width, 2, channels).mean((1, 3))


class Downsample(eqx.Module):
    """A convolution with stride 2. Padding 0 stands for one row and column of zeros at the far ends."""

    conv: Conv

    def __init__(self, channels: int, padding: int):
        self.conv = Conv(channels, channels, stride=2, padding=(0, 1) if padding == 0 else padding)

    def __call__(self, x: Array, embedding: Array | None = None) -> Array:
        return self.conv(x)


class Upsample(eqx.Module):
    """Pixels repeated, and a convolution."""

    conv: Conv

    def __init__(self, channels: int):
        self.conv = Conv(channels, channels)

    def __call__(self, x: Array, embedding: Array | None = None, size: tuple[int, int] | None = None) -> Array:
        if size in (None, (2 * x.shape[0], 2 * x.shape[1])):
            return self.conv.enlarged(x)
        return self.conv(enlarge(x, size))


class Stage(eqx.Module):
    """Residual blocks at one resolution, each followed by attention where the stage has it.

    Attributes:
        resnets: the residual blocks.
        attentions: one for each, or none.
        downsamplers, upsamplers: what follows them, at most one.
    """

    resnets: tuple[Resnet, ...]
    attentions: tuple[Attends, ...]
    downsamplers: tuple[Downsample | Resnet, ...] = ()
    upsamplers: tuple[Upsample | Resnet, ...] = ()

    def down(self, x: Array, embedding: Array | None, context: Array | None) -> tuple[Array, list[Array]]:
        """The output, and everything that the way up will see again."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, embedding)
            if self.attentions:
                x = attended(self.attentions[i], x, context)
            skips.append(x)
        for layer in self.downsamplers:
            x = layer(x, embedding)
            skips.append(x)
        return x, skips

    def up(
        self, x: Array, skips: list[Array] | None, embedding: Array | None = None, context: Array | None = None
    ) -> Array:
        """The output; ``skips`` loses its last entries, one for each residual block, and the next gives the size."""
        for i, resnet in enumerate(self.resnets):
            x = x if skips is None else jnp.concatenate([x, skips.pop()], axis=-1)
            x = resnet(x, embedding)
            if self.attentions:
                x = attended(self.attentions[i], x, context)
        for layer in self.upsamplers:
            size = (skips[-1].shape[0], skips[-1].shape[1]) if skips else None
            x = layer(x, embedding, size) if isinstance(layer, Upsample) else layer(x, embedding)
        return x


class Middle(eqx.Module):
    """A residual block, and attention and another one as often as there are."""

    resnets: tuple[Resnet, ...]
    attentions: tuple[Attends, ...]

    def __init__(self, channels: int, style: Style, attend: Attend | None, blocks: int = 1):
        self.resnets = tuple(Resnet(channels, channels, style) for _ in range(blocks + 1))
        self.attentions = () if attend is None else tuple(attend(channels) for _ in range(blocks))

    def __call__(self, x: Array, embedding: Array | None = None, context: Array | None = None) -> Array:
        x = self.resnets[0](x, embedding)
        for i, resnet in enumerate(self.resnets[1:]):
            if self.attentions:
                x = attended(self.attentions[i], x, context)
            x = resnet(x, embedding)
        return x


def attended(layer: Attends, x: Array, context: Array | None) -> Array:
    """Attention of an image to itself, and to the context where the layer wants one."""
    if isinstance(layer, SpatialTransformer):
        assert context is not None  # such networks have a prompt
        return layer(x, context)
    return layer(x)


def down_stage(
    inputs: int, outputs: int, layers: int, style: Style, attend: Attend | None, *, shrink: str | None, padding: int
) -> Stage:
    """Residual blocks from ``inputs`` to ``outputs`` channels, then half the resolution: by ``shrink`` a ``"conv"``, a
    ``"resnet"`` or not at all."""
    resnets = tuple(Resnet(inputs if i == 0 else outputs, outputs, style) for i in range(layers))
    attentions = () if attend is None else tuple(attend(outputs) for _ in range(layers))
    last: tuple[Downsample | Resnet, ...] = ()
    if shrink is not None:
        last = (Downsample(outputs, padding) if shrink == "conv" else Resnet(outputs, outputs, style, "down"),)
    return Stage(resnets, attentions, downsamplers=last)


def up_stage(inputs: Sequence[int], outputs: int, style: Style, attend: Attend | None, *, grow: str | None) -> Stage:
    """Residual blocks to ``outputs`` channels, the i-th from ``inputs[i]`` with its skip, then twice the resolution."""
    resnets = tuple(Resnet(channels, outputs, style) for channels in inputs)
    attentions = () if attend is None else tuple(attend(outputs) for _ in inputs)
    last: tuple[Upsample | Resnet, ...] = ()
    if grow is not None:
        last = (Upsample(outputs) if grow == "conv" else Resnet(outputs, outputs, style, "up"),)
    return Stage(resnets, attentions, upsamplers=last)


def skip_inputs(before: int, here: int, below: int, layers: int) -> list[int]:
    """Channels that enter each residual block of a stage on the way up: its own and those of the skip.

    Args:
        before: channels of the stage before.
        here: of this one.
        below: of the skip of its last block, which comes from a stage further out.
        layers: how many blocks.
    """
    widths = [before, *[here] * (layers - 1)]
    skips = [*[here] * (layers - 1), below]
    return [a + b for a, b in zip(widths, skips, strict=True)]
