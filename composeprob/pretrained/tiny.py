"""`AutoencoderTiny`: small autoencoders that were trained to do what a large one does."""

from __future__ import annotations

from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from composeprob.json_data import JSONObject
from composeprob.pretrained.config import options, per_block
from composeprob.pretrained.layers import ACTIVATIONS, Conv


class Activation(eqx.Module):
    """An activation by its name."""

    name: str = eqx.field(static=True)

    def __call__(self, x: Array) -> Array:
        return ACTIVATIONS[self.name](x)


class Grow(eqx.Module):
    """Every pixel repeated."""

    factor: int = eqx.field(static=True)

    def __call__(self, x: Array) -> Array:
        return jnp.repeat(jnp.repeat(x, self.factor, axis=0), self.factor, axis=1)


class Residual(eqx.Module):
    """Three convolutions, added to their input; then what is negative becomes 0."""

    conv: tuple[Conv, Activation, Conv, Activation, Conv]

    def __init__(self, channels: int, activation: str):
        a, b, c = (Conv(channels, channels) for _ in range(3))
        self.conv = (a, Activation(activation), b, Activation(activation), c)

    def __call__(self, x: Array) -> Array:
        hidden = x
        for layer in self.conv:
            hidden = layer(hidden)
        return jax.nn.relu(hidden + x)


Layer = Conv | Activation | Residual | Grow


class Chain(eqx.Module):
    """Layers, one after the other."""

    layers: tuple[Layer, ...]

    @property
    def dtype(self) -> jnp.dtype:
        """In which it is evaluated, that of the first convolution."""
        assert isinstance(self.layers[0], Conv)
        return self.layers[0].weight.dtype

    def __call__(self, x: Array) -> Array:
        for layer in self.layers:
            x = layer(x)
        return x


class TinyAutoencoder(eqx.Module):
    """An autoencoder of images with values from −1 to 1; fields as of `Autoencoder`."""

    encoder: Chain
    decoder: Chain
    channels: int = eqx.field(static=True)
    latents: int = eqx.field(static=True)
    shrinks: int = eqx.field(static=True)
    mean: float = eqx.field(static=True)
    scale: float = eqx.field(static=True)

    def encode(self, x: Array) -> Array:
        """The latents of one image (height, width, channels)."""
        found = self.encoder(((x + 1) / 2).astype(self.encoder.dtype))
        return (found.astype(x.dtype) - self.mean) * self.scale

    def decode(self, z: Array) -> Array:
        """The image of one event of latents."""
        raw = 3 * jnp.tanh((z / self.scale + self.mean) / 3)
        return 2 * self.decoder(raw.astype(self.decoder.dtype)).astype(z.dtype) - 1


def _options(config: JSONObject, where: str) -> SimpleNamespace:
    """The options of an `AutoencoderTiny`, with the original's defaults."""
    return options(
        config,
        where,
        defaults={
            "in_channels": 3,
            "out_channels": 3,
            "encoder_block_out_channels": (64, 64, 64, 64),
            "decoder_block_out_channels": (64, 64, 64, 64),
            "block_out_channels": None,  # noted by the original, and not read
            "act_fn": "relu",
            "upsample_fn": "nearest",
            "latent_channels": 4,
            "upsampling_scaling_factor": 2,
            "num_encoder_blocks": (1, 3, 3, 3),
            "num_decoder_blocks": (3, 3, 3, 1),
            "latent_magnitude": 3,
            "latent_shift": 0.5,
            "force_upcast": False,
            "scaling_factor": 1.0,
            "shift_factor": 0.0,
        },
        supported={"act_fn": tuple(ACTIVATIONS), "upsample_fn": ("nearest",)},
    )


def build(config: JSONObject, where: str) -> TinyAutoencoder:
    """The skeleton of an `AutoencoderTiny` from its config.json.

    Raises:
        LoadError: an option that is not supported.
    """
    o = _options(config, where)
    stages = len(o.num_encoder_blocks)
    inward = per_block(o.encoder_block_out_channels, stages, "encoder_block_out_channels", where)
    encoder: list[Layer] = []
    for i, (blocks, channels) in enumerate(zip(o.num_encoder_blocks, inward, strict=True)):
        encoder.append(Conv(channels, channels, stride=2, bias=False) if i else Conv(o.in_channels, channels))
        encoder += [Residual(channels, o.act_fn) for _ in range(blocks)]
    encoder.append(Conv(inward[-1], o.latent_channels))
    last = len(o.num_decoder_blocks) - 1
    outward = per_block(o.decoder_block_out_channels, last + 1, "decoder_block_out_channels", where)
    decoder: list[Layer] = [Conv(o.latent_channels, outward[0]), Activation(o.act_fn)]
    for i, (blocks, channels) in enumerate(zip(o.num_decoder_blocks, outward, strict=True)):
        decoder += [Residual(channels, o.act_fn) for _ in range(blocks)]
        if i < last:
            decoder.append(Grow(o.upsampling_scaling_factor))
        decoder.append(Conv(channels, o.out_channels if i == last else channels, bias=i == last))
    return TinyAutoencoder(
        Chain(tuple(encoder)), Chain(tuple(decoder)), o.in_channels, o.latent_channels, 2 ** (stages - 1),
        float(o.shift_factor or 0.0), float(o.scaling_factor),
    )  # fmt: skip
