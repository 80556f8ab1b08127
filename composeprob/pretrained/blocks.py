"""Blocks of UNets and autoencoders: residual blocks, changes of resolution, and stages of them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
from jax import Array

from composeprob.pretrained import layers
from composeprob.pretrained.config import Options, unsupported
from composeprob.pretrained.tensors import Arrays


@dataclass(frozen=True)
class Style:
    """What the blocks of a stage have in common."""

    groups: int  # of the norms
    eps: float  # of the norms
    activation: str
    skip_activation: bool = False  # whether the embedding of time enters as it is
    rescale: float = 1.0  # divides the outputs of residual blocks and of plain attention
    heads: int = 1
    head_size: int | None = None  # channels of each head of plain attention, instead of their number
    attention_groups: int | None = None  # of the norm before plain attention, where they are others
    only_cross: bool = False  # whether transformers attend to the prompt only


def resnet(arrays: Arrays, x: Array, embedding: Array | None, style: Style, change: str | None = None) -> Array:
    """A residual block: norm, activation, convolution, the embedding of time, and the same again.

    The embedding is added before the second norm; projected to twice the channels, it scales and shifts after it. A
    change ``"up"`` or ``"down"`` is that of the resolution, after the first activation.
    """
    activation = layers.ACTIVATIONS[style.activation]
    hidden = activation(layers.group_norm(arrays / "norm1", x, style.groups, style.eps))
    if change is not None:
        x, hidden = (enlarge(each, doubled(each)) if change == "up" else halve(each) for each in (x, hidden))
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
    beside = x if x.shape[-1] == channels else layers.convolve(arrays / "conv_shortcut", x, 1, channels)
    return (beside + hidden) / style.rescale


def enlarge(x: Array, size: tuple[int, ...]) -> Array:
    """The nearest pixel for each of another size."""
    if size == doubled(x):
        return jnp.repeat(jnp.repeat(x, 2, axis=0), 2, axis=1)
    rows, columns = (jnp.arange(n) * old // n for n, old in zip(size, x.shape[:2], strict=True))
    return x[rows][:, columns]


def doubled(x: Array) -> tuple[int, int]:
    """Twice the height and width of an image."""
    return 2 * x.shape[0], 2 * x.shape[1]


def halve(x: Array) -> Array:
    """Means of 2×2 pixels; an odd last row or column is left out."""
    height, width, channels = x.shape[0] // 2, x.shape[1] // 2, x.shape[2]
    return x[: 2 * height, : 2 * width].reshape(height, 2, width, 2, channels).mean((1, 3))


def transformers(arrays: Arrays, x: Array, context: Array | None, style: Style) -> Array:
    """Transformer blocks over the places of an image, which attend to these and to the context; added to the image."""
    if context is None:
        raise arrays.foreign(f"{arrays.prefix[:-1]} has transformers, and no network of this class has a prompt there")
    project = partial(layers.convolve, size=1) if len(arrays.like(".proj_in.weight")) == 4 else layers.linear
    hidden = project(arrays / "proj_in", layers.group_norm(arrays / "norm", x, style.groups, 1e-6))
    sequence = hidden.reshape(-1, hidden.shape[-1])
    for block in arrays.items("transformer_blocks"):
        for i, seen in (1, context if style.only_cross else None), (2, context):
            normed = layers.layer_norm(block / f"norm{i}", sequence)
            sequence += layers.attention(block / f"attn{i}", normed, style.heads, seen)
        sequence += layers.feed_forward(block / "ff", layers.layer_norm(block / "norm3", sequence), "geglu")
    return project(arrays / "proj_out", sequence.reshape(hidden.shape), outputs=x.shape[-1]) + x


def attended(arrays: Arrays, x: Array, context: Array | None, style: Style) -> Array:
    """Attention of an image to itself, after a norm and added, or transformers."""
    if "transformer_blocks" in arrays:
        return transformers(arrays, x, context, style)
    channels = x.shape[-1]
    layers.check_split(arrays, channels, style.head_size or style.heads, "heads of attention, or channels of a head,")
    sequence = x.reshape(-1, channels)
    if "group_norm" in arrays:
        sequence = layers.group_norm(arrays / "group_norm", sequence, style.attention_groups or style.groups, style.eps)
    heads = style.heads if style.head_size is None else channels // style.head_size
    return (layers.attention(arrays, sequence, heads, bias=True).reshape(x.shape) + x) / style.rescale


@dataclass(frozen=True)
class Body:
    """Convolutions of an image: down, a middle, and up again; an autoencoder's halves go only one way."""

    down: tuple[Style, ...]  # of each stage
    mid: Style
    up: tuple[Style, ...]
    kernels: int | None = 3  # pixels of the first and the last; None for any
    padding: int = 1  # where an image is halved; 0 stands for one row and column of zeros at the far ends
    activation: str = "silu"  # before the last convolution

    def __call__(self, arrays: Arrays, x: Array, embedding: Array | None = None, context: Array | None = None) -> Array:
        """The output for an image (height, width, channels), the embedding of the time and the prompt."""
        hidden, given = layers.convolve(arrays / "conv_in", x, self.kernels), [embedding, context]
        skips = [hidden] if self.down and self.up else None
        for block, style in zip(arrays.items("down_blocks"), self.down, strict=True):
            hidden = self._stage(block, hidden, given, style, "down", skips)
        if "mid_block" in arrays:
            hidden = self._stage(arrays / "mid_block", hidden, given, self.mid, "mid", None)
        for block, style in zip(arrays.items("up_blocks"), self.up, strict=True):
            hidden = self._stage(block, hidden, given, style, "up", skips)
        if skips:
            raise arrays.foreign(f"its way up has {len(skips)} residual blocks too few for its way down")
        hidden = layers.group_norm(arrays / "conv_norm_out", hidden, self.mid.groups, self.mid.eps)
        return layers.convolve(arrays / "conv_out", layers.ACTIVATIONS[self.activation](hidden), self.kernels)

    def _stage(
        self, arrays: Arrays, x: Array, given: list[Array | None], style: Style, way: str, skips: list[Array] | None
    ) -> Array:
        """Residual blocks at one resolution, each followed by attention where the stage has it (in the middle, the last
        one by none), and what changes the resolution after them. On the way down ``skips`` gets everything that the way
        up will see again; there it loses its last entries, one for each residual block, and the next gives the size."""
        (embedding, context), seen = given, skips if way == "down" else None
        resnets, attentions = arrays.items("resnets"), arrays.items("attentions")
        if not resnets or len(attentions) not in (0, len(resnets) - (way == "mid")):
            found = f"{len(resnets)} residual blocks, {len(attentions)} attentions"
            raise arrays.foreign(f"{arrays.prefix[:-1]} has {found}")
        for block, attends in itertools.zip_longest(resnets, attentions):
            if way == "up" and skips is not None:
                if not skips:
                    raise arrays.foreign(f"{block.prefix[:-1]} has no block on the way down whose output it would see")
                x = jnp.concatenate([x, skips.pop()], axis=-1)
            x = resnet(block, x, embedding, style)
            x = x if attends is None else attended(attends, x, context, style)
            if seen is not None:
                seen.append(x)
        for layer in arrays.items(f"{way}samplers"):
            if "norm1" in layer:
                x = resnet(layer, x, embedding, style, way)
            elif way == "down":
                x = layers.convolve(layer / "conv", x, stride=2, padding=self.padding or (0, 1))
            else:
                size, conv = skips[-1].shape[:2] if skips else doubled(x), layer / "conv"
                x = layers.convolve_enlarged(conv, x) if size == doubled(x) else layers.convolve(conv, enlarge(x, size))
            if seen is not None:
                seen.append(x)
        return x


def check_kinds(o: Options, arrays: Arrays, way: str, known: str) -> list[str]:
    """The names of the blocks on one way, ``"down"`` or ``"up"``, as the file gives them; "" where it gives none.
    ``known`` are those that are supported, with ``*`` for "Down" or "Up"; they must be of the weights' attention."""
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
