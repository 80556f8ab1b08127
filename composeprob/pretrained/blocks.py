"""Blocks of UNets and autoencoders: residual blocks, changes of resolution, and stages of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import equinox as eqx
import jax.numpy as jnp
from jax import Array

from composeprob.pretrained.attention import Attention, SpatialTransformer
from composeprob.pretrained.config import Options, unsupported
from composeprob.pretrained.layers import ACTIVATIONS, Conv, GroupNorm, Linear
from composeprob.pretrained.tensors import Arrays

Attends = Attention | SpatialTransformer
Attend = Callable[[Arrays, int], Attends]
"""Makes the attention that follows a residual block, from its arrays and its number of channels."""
Made = TypeVar("Made")
Of = Callable[[str, int], Made]
"""What the i-th stage ``"down"``, ``"mid"`` or ``"up"`` has."""


@dataclass(frozen=True)
class Style:
    """What all residual blocks of a network have in common.

    Attributes:
        embedding: width of the embedding of time; None without one.
        groups: of the norms.
        eps: of the norms.
        activation: its name.
        skip_activation: whether the embedding enters as it is.
        rescale: divides the output.
    """

    embedding: int | None
    groups: int
    eps: float
    activation: str
    skip_activation: bool = False
    rescale: float = 1.0


class Resnet(eqx.Module):
    """A residual block: norm, activation, convolution, the embedding of time, and the same again.

    The embedding is added before the second norm; projected to twice the channels, it scales and shifts after it.
    """

    norm1: GroupNorm
    conv1: Conv
    time_emb_proj: Linear | None
    norm2: GroupNorm
    conv2: Conv
    conv_shortcut: Conv | None
    style: Style = eqx.field(static=True)
    change: str | None = eqx.field(static=True)

    def __init__(self, arrays: Arrays, inputs: int, style: Style, change: str | None = None):
        self.norm1 = GroupNorm(arrays / "norm1", style.groups, inputs, style.eps)
        self.conv1 = Conv(arrays / "conv1", inputs)
        outputs = self.outputs
        self.time_emb_proj = None if style.embedding is None else Linear(arrays / "time_emb_proj", style.embedding)
        if self.time_emb_proj is not None and self.time_emb_proj.outputs not in (outputs, 2 * outputs):
            raise arrays.foreign(
                f"{arrays.prefix}time_emb_proj gives {self.time_emb_proj.outputs} channels, and {outputs} or twice as "
                "many go into its block"
            )
        self.norm2 = GroupNorm(arrays / "norm2", style.groups, outputs, style.eps)
        self.conv2 = Conv(arrays / "conv2", outputs)
        if self.conv2.outputs != outputs:
            raise arrays.foreign(f"{arrays.prefix}conv2 gives {self.conv2.outputs} channels, and conv1 {outputs}")
        self.conv_shortcut = None if inputs == outputs else Conv(arrays / "conv_shortcut", inputs, 1)
        self.style, self.change = style, change

    @property
    def outputs(self) -> int:
        """Channels of the output."""
        return self.conv1.outputs

    @property
    def scale_shift(self) -> bool:
        """Whether the embedding scales and shifts."""
        return self.time_emb_proj is not None and self.time_emb_proj.outputs == 2 * self.outputs

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
            if self.scale_shift:
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

    def __init__(self, arrays: Arrays, channels: int, padding: int):
        self.conv = Conv(arrays / "conv", channels, stride=2, padding=(0, 1) if padding == 0 else padding)

    def __call__(self, x: Array, embedding: Array | None = None) -> Array:
        return self.conv(x)


class Upsample(eqx.Module):
    """Pixels repeated, and a convolution."""

    conv: Conv

    def __init__(self, arrays: Arrays, channels: int):
        self.conv = Conv(arrays / "conv", channels)

    def __call__(self, x: Array, embedding: Array | None = None, size: tuple[int, int] | None = None) -> Array:
        if size in (None, (2 * x.shape[0], 2 * x.shape[1])):
            return self.conv.enlarged(x)
        return self.conv(enlarge(x, size))


class Stage(eqx.Module):
    """Residual blocks at one resolution, each followed by attention where the stage has it.

    Attributes:
        resnets: the residual blocks.
        attentions: one for each, or none.
        samplers: what changes the resolution after them, at most one.
        upwards: whether it is on the way up.
    """

    resnets: tuple[Resnet, ...]
    attentions: tuple[Attends, ...]
    samplers: tuple[Downsample | Upsample | Resnet, ...]
    upwards: bool = eqx.field(static=True)

    @property
    def outputs(self) -> int:
        """Channels of the output."""
        return self.resnets[-1].outputs

    def __call__(
        self, x: Array, embedding: Array | None, context: Array | None, skips: list[Array] | None = None
    ) -> Array:
        """The output. On the way down ``skips`` gets everything that the way up will see again; there it loses its last
        entries, one for each residual block, and the next gives the size."""
        for i, resnet in enumerate(self.resnets):
            x = jnp.concatenate([x, skips.pop()], axis=-1) if self.upwards and skips is not None else x
            x = resnet(x, embedding)
            if self.attentions:
                x = attended(self.attentions[i], x, context)
            if skips is not None and not self.upwards:
                skips.append(x)
        for layer in self.samplers:
            size = (skips[-1].shape[0], skips[-1].shape[1]) if skips else None
            x = layer(x, embedding, size) if isinstance(layer, Upsample) else layer(x, embedding)
            if skips is not None and not self.upwards:
                skips.append(x)
        return x


class Middle(eqx.Module):
    """A residual block, and attention and another one as often as there are."""

    resnets: tuple[Resnet, ...]
    attentions: tuple[Attends, ...]

    def __init__(self, arrays: Arrays, channels: int, style: Style, attend: Attend):
        self.resnets = tuple(Resnet(block, channels, style) for block in arrays.items("resnets"))
        self.attentions = tuple(attend(block, channels) for block in arrays.items("attentions"))
        if not self.resnets or len(self.attentions) not in (0, len(self.resnets) - 1):
            raise arrays.foreign(
                f"its middle has {len(self.resnets)} residual blocks, {len(self.attentions)} attentions"
            )

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


class Body(eqx.Module):
    """Convolutions of an image: down, a middle, and up again; an autoencoder's halves go only one way.

    Args:
        arrays: of the whole network.
        style, attend: of the i-th stage, as ``style("down", i)``.
        inputs: channels of what goes in; None for any.
        padding: as of `Downsample`.
        kernels: pixels of the first and the last kernel; None for any.
        activation: before the last convolution.

    Raises:
        LoadError: arrays that are missing, or do not fit together.
    """

    conv_in: Conv
    down_blocks: tuple[Stage, ...]
    mid_block: Middle | None
    up_blocks: tuple[Stage, ...]
    conv_norm_out: GroupNorm
    conv_out: Conv
    activation: str = eqx.field(static=True)

    def __init__(
        self,
        arrays: Arrays,
        style: Of[Style],
        attend: Of[Attend],
        *,
        inputs: int | None = None,
        padding: int = 1,
        kernels: int | None = 3,
        activation: str = "silu",
    ):
        self.conv_in, middle = Conv(arrays / "conv_in", inputs, kernels), arrays / "mid_block"
        skips = [self.conv_in.outputs] if "down_blocks" in arrays and "up_blocks" in arrays else None
        self.down_blocks = _stages(arrays, "down", self.conv_in.outputs, style, attend, skips, padding)
        channels = self.down_blocks[-1].outputs if self.down_blocks else self.conv_in.outputs
        self.mid_block = Middle(middle, channels, style("mid", 0), attend("mid", 0)) if "mid_block" in arrays else None
        self.up_blocks = _stages(arrays, "up", channels, style, attend, skips)
        last = self.up_blocks[-1].outputs if self.up_blocks else channels
        outer = style("up", len(self.up_blocks) - 1) if self.up_blocks else style("mid", 0)
        self.conv_norm_out = GroupNorm(arrays / "conv_norm_out", outer.groups, last, outer.eps)
        self.conv_out, self.activation = Conv(arrays / "conv_out", last, kernels), activation

    def __call__(self, x: Array, embedding: Array | None = None, context: Array | None = None) -> Array:
        hidden = self.conv_in(x)
        skips = [hidden] if self.down_blocks and self.up_blocks else None
        for stage in self.down_blocks:
            hidden = stage(hidden, embedding, context, skips)
        if self.mid_block is not None:
            hidden = self.mid_block(hidden, embedding, context)
        for stage in self.up_blocks:
            hidden = stage(hidden, embedding, context, skips)
        return self.conv_out(ACTIVATIONS[self.activation](self.conv_norm_out(hidden)))


def _stages(
    arrays: Arrays,
    way: str,
    channels: int,
    style: Of[Style],
    attend: Of[Attend],
    skips: list[int] | None,
    padding: int = 1,
) -> tuple[Stage, ...]:
    """The stages on one way; ``skips``, the channels of everything that the way up sees again, grow on the way down."""
    stages, upwards = [], way == "up"
    for i, block in enumerate(arrays.items(f"{way}_blocks")):
        resnets: list[Resnet] = []
        for each in block.items("resnets"):
            if upwards and skips == []:
                raise arrays.foreign(f"{each.prefix[:-1]} has no block on the way down whose output it would see")
            beside = skips.pop() if upwards and skips else 0
            resnets.append(Resnet(each, channels + beside, style(way, i)))
            channels = resnets[-1].outputs
            if skips is not None and not upwards:
                skips.append(channels)
        found = block.items("attentions")
        if not resnets or len(found) not in (0, len(resnets)):
            raise arrays.foreign(f"{block.prefix[:-1]} has {len(resnets)} residual blocks, {len(found)} attentions")
        attentions = [attend(way, i)(each, resnet.outputs) for each, resnet in zip(found, resnets, strict=False)]
        samplers: list[Downsample | Upsample | Resnet] = []
        for each in block.items(f"{way}samplers"):
            if "norm1" in each:
                samplers.append(Resnet(each, channels, style(way, i), way))
            else:
                samplers.append(Upsample(each, channels) if upwards else Downsample(each, channels, padding))
            if skips is not None and not upwards:
                skips.append(channels)
        stages.append(Stage(tuple(resnets), tuple(attentions), tuple(samplers), upwards))
    if upwards and skips:
        raise arrays.foreign(f"its way up has {len(skips)} residual blocks too few for its way down")
    return tuple(stages)


def check_kinds(o: Options, arrays: Arrays, way: str, known: str) -> list[str]:
    """The names of the blocks on one way; "" where the file gives none.

    Args:
        o: the network's options, with ``down_block_types`` and ``up_block_types``.
        arrays: with those blocks.
        way: ``"down"`` or ``"up"``.
        known: names that are supported, with ``*`` for "Down" or "Up".

    Raises:
        LoadError: another number of names than the weights have blocks, one that is not known, or one of another
            attention than the weights'.
    """
    name, blocks, title = f"{way}_block_types", arrays.items(f"{way}_blocks"), way.capitalize()
    if getattr(o, name) is None:
        return [""] * len(blocks)
    supported = tuple(known.replace("*", title).split())
    kinds = [kind.removeprefix("UNetRes") for kind in o.per_block(name, len(blocks))]
    for i, (kind, block) in enumerate(zip(kinds, blocks, strict=True)):
        if kind not in supported:
            unsupported(o.where, f"{name}[{i}]", kind, supported)
        first = block / "attentions" / 0
        has = "CrossAttn" if "transformer_blocks" in first else "Attn" if "attentions" in block else ""
        if kind.partition(title)[0].removeprefix("Resnet") != has:
            raise arrays.foreign(f"{name}[{i}] is {kind!r}, and block {i} has attention of the kind {has!r}")
    return kinds
