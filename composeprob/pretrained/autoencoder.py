"""`AutoencoderKL`: images to latents and back (Rombach et al. 2022)."""

from __future__ import annotations

from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from composeprob.json_data import JSONObject
from composeprob.pretrained.attention import Attention
from composeprob.pretrained.blocks import Middle, Stage, Style, down_stage, up_stage
from composeprob.pretrained.config import check_block, options, per_block
from composeprob.pretrained.layers import ACTIVATIONS, Conv, GroupNorm


class Encoder(eqx.Module):
    """An image to the mean and log-variance of its latents, before they are scaled."""

    conv_in: Conv
    down_blocks: tuple[Stage, ...]
    mid_block: Middle
    conv_norm_out: GroupNorm
    conv_out: Conv

    def __call__(self, x: Array) -> Array:
        hidden = self.conv_in(x)
        for stage in self.down_blocks:
            hidden, _ = stage.down(hidden, None, None)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(hidden))))


class Decoder(eqx.Module):
    """Latents to an image."""

    conv_in: Conv
    mid_block: Middle
    up_blocks: tuple[Stage, ...]
    conv_norm_out: GroupNorm
    conv_out: Conv

    def __call__(self, z: Array) -> Array:
        hidden = self.mid_block(self.conv_in(z))
        for stage in self.up_blocks:
            hidden = stage.up(hidden, None)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(hidden)))


class Autoencoder(eqx.Module):
    """An autoencoder of images with values from −1 to 1.

    Attributes:
        channels, latents: of images and of latents.
        shrinks: pixels of an image's side for each of the latents'.
        mean, scale: latents are (z − mean)·scale, z the encoder's.
    """

    encoder: Encoder
    decoder: Decoder
    quant_conv: Conv | None
    post_quant_conv: Conv | None
    channels: int = eqx.field(static=True)
    latents: int = eqx.field(static=True)
    shrinks: int = eqx.field(static=True)
    mean: tuple[float, ...] = eqx.field(static=True)
    scale: tuple[float, ...] = eqx.field(static=True)

    def encode(self, x: Array) -> Array:
        """The latents of one image (height, width, channels), the mean of their distribution."""
        found = self.encoder(x.astype(self.encoder.conv_in.weight.dtype))
        if self.quant_conv is not None:
            found = self.quant_conv(found)
        mean = jnp.split(found, 2, axis=-1)[0].astype(x.dtype)
        return (mean - jnp.asarray(self.mean)) * jnp.asarray(self.scale)

    def decode(self, z: Array) -> Array:
        """The image of one event of latents."""
        raw = (z / jnp.asarray(self.scale) + jnp.asarray(self.mean)).astype(self.decoder.conv_in.weight.dtype)
        if self.post_quant_conv is not None:
            raw = self.post_quant_conv(raw)
        return self.decoder(raw).astype(z.dtype)


def _options(config: JSONObject, where: str) -> SimpleNamespace:
    """The options of an `AutoencoderKL`, with the original's defaults."""
    return options(
        config,
        where,
        defaults={
            "in_channels": 3,
            "out_channels": 3,
            "down_block_types": ("DownEncoderBlock2D",),
            "up_block_types": ("UpDecoderBlock2D",),
            "block_out_channels": (64,),
            "layers_per_block": 1,
            "act_fn": "silu",
            "latent_channels": 4,
            "norm_num_groups": 32,
            "sample_size": 32,
            "scaling_factor": 0.18215,
            "shift_factor": None,
            "latents_mean": None,
            "latents_std": None,
            "force_upcast": True,  # of half precision, in which nothing is evaluated here unless asked for
            "use_quant_conv": True,
            "use_post_quant_conv": True,
            "mid_block_add_attention": True,
        },
        supported={"act_fn": tuple(ACTIVATIONS)},
    )


def build(config: JSONObject, where: str) -> Autoencoder:
    """The skeleton of an `AutoencoderKL` from its config.json.

    Raises:
        LoadError: an option or block that is not supported.
    """
    o = _options(config, where)
    widths, n = list(o.block_out_channels), len(o.block_out_channels)
    downs, ups = (per_block(getattr(o, f"{way}_block_types"), n, f"{way}_block_types", where) for way in ("down", "up"))
    style = Style(None, o.norm_num_groups, 1e-6, o.act_fn)

    def attend(channels: int) -> Attention:
        return Attention(channels, 1, channels, bias=True, groups=o.norm_num_groups, eps=1e-6, residual=True)

    def middle() -> Middle:
        return Middle(widths[-1], style, attend if o.mid_block_add_attention else None)

    down, channels = [], widths[0]
    for i, kind in enumerate(downs):
        check_block(where, f"down_block_types[{i}]", kind, ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"))
        attention, shrink = attend if kind.startswith("Attn") else None, "conv" if i < n - 1 else None
        down.append(down_stage(channels, widths[i], o.layers_per_block, style, attention, shrink=shrink, padding=0))
        channels = widths[i]
    up = []
    for i, kind in enumerate(ups):
        check_block(where, f"up_block_types[{i}]", kind, ("UpDecoderBlock2D", "AttnUpDecoderBlock2D"))
        outputs = widths[n - 1 - i]
        inputs = [channels, *[outputs] * o.layers_per_block]
        attention = attend if kind.startswith("Attn") else None
        up.append(up_stage(inputs, outputs, style, attention, grow="conv" if i < n - 1 else None))
        channels = outputs
    latents = o.latent_channels
    encoder = Encoder(
        Conv(o.in_channels, widths[0]), tuple(down), middle(), GroupNorm(o.norm_num_groups, widths[-1], 1e-6),
        Conv(widths[-1], 2 * latents),
    )  # fmt: skip
    decoder = Decoder(
        Conv(latents, widths[-1]), middle(), tuple(up), GroupNorm(o.norm_num_groups, widths[0], 1e-6),
        Conv(widths[0], o.out_channels),
    )  # fmt: skip
    mean, scale = latent_scale(o, latents)
    return Autoencoder(
        encoder, decoder, Conv(2 * latents, 2 * latents, 1) if o.use_quant_conv else None,
        Conv(latents, latents, 1) if o.use_post_quant_conv else None, o.in_channels, latents, 2 ** (n - 1), mean, scale,
    )  # fmt: skip


def latent_scale(o: SimpleNamespace, latents: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and scale of (z − mean)·scale, one number for each channel of the latents."""
    factor = float(o.scaling_factor)
    if o.latents_mean is not None and o.latents_std is not None:
        return tuple(map(float, o.latents_mean)), tuple(factor / float(sd) for sd in o.latents_std)
    return (float(o.shift_factor or 0.0),) * latents, (factor,) * latents
