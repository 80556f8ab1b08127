"""Images to latents and back: `AutoencoderKL` (Rombach et al. 2022), and `AutoencoderTiny`, which does the same with
less."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from composeprob.json_data import JSONObject
from composeprob.pretrained.attention import Attention
from composeprob.pretrained.blocks import Body, Style, check_kinds
from composeprob.pretrained.config import Options, anything, number, positive, text_list, unsupported, whole
from composeprob.pretrained.layers import ACTIVATIONS, Conv
from composeprob.pretrained.tensors import Arrays


class Autoencoder(eqx.Module):
    """An autoencoder of images with values from −1 to 1.

    Attributes:
        encoder: an image to the mean and log-variance of its latents, before they are scaled.
        decoder: latents to an image.
        channels, latents: of images and of latents.
        shrinks: pixels of an image's side for each of the latents'.
        mean, scale: latents are (z − mean)·scale, z the encoder's.
    """

    encoder: Body
    decoder: Body
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

    def __init__(self, arrays: Arrays, channels: int, activation: str):
        a, b, c = (Conv(arrays / "conv" / i, channels) for i in (0, 2, 4))
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


def autoencoder_kl(config: JSONObject, arrays: Arrays, where: str) -> Autoencoder:
    """An `AutoencoderKL`.

    Raises:
        LoadError: an option or block that is not supported, or weights of another network.
    """
    o = Options(
        config, where, down_block_types=(None, text_list), up_block_types=(None, text_list),
        act_fn=("silu", *ACTIVATIONS), norm_num_groups=(32, whole), sample_size=(32, anything),
        scaling_factor=(0.18215, positive),
        shift_factor=(None, number), latents_mean=(None, number.listed), latents_std=(None, positive.listed),
        force_upcast=(True, False),  # of half precision, in which nothing is evaluated here unless asked for
    )  # fmt: skip
    check_kinds(o, arrays / "encoder", "down", "DownEncoderBlock2D AttnDownEncoderBlock2D")
    check_kinds(o, arrays / "decoder", "up", "UpDecoderBlock2D AttnUpDecoderBlock2D")
    style = Style(None, o.norm_num_groups, 1e-6, o.act_fn)

    def attend(arrays: Arrays, channels: int) -> Attention:
        return Attention(arrays, channels, 1, bias=True, groups=o.norm_num_groups, eps=1e-6, residual=True)

    of_stages = (lambda way, i: style), (lambda way, i: attend)
    encoder = Body(arrays / "encoder", *of_stages, padding=0)
    moments = encoder.conv_out.outputs
    quant_conv = Conv(arrays / "quant_conv", moments, 1) if "quant_conv" in arrays else None
    latents = moments // 2
    post_conv = Conv(arrays / "post_quant_conv", latents, 1) if "post_quant_conv" in arrays else None
    decoder = Body(arrays / "decoder", *of_stages, inputs=latents)
    down, middle = encoder.down_blocks, encoder.mid_block
    if not down or not decoder.up_blocks or middle is None:
        raise arrays.foreign("it lacks blocks of its encoder or decoder")
    arrays.finish()
    channels = encoder.conv_in.weight.shape[2]
    o.agree(
        in_channels=channels, out_channels=decoder.conv_out.outputs,
        block_out_channels=[stage.outputs for stage in down], latent_channels=latents,
        layers_per_block=[len(stage.resnets) for stage in down], use_quant_conv=quant_conv is not None,
        use_post_quant_conv=post_conv is not None, mid_block_add_attention=bool(middle.attentions),
    )  # fmt: skip
    factor = float(o.scaling_factor)
    mean, scale = (float(o.shift_factor or 0.0),) * latents, (factor,) * latents
    if o.latents_mean is not None and o.latents_std is not None:
        mean, scale = tuple(map(float, o.latents_mean)), tuple(factor / float(sd) for sd in o.latents_std)
        if not len(mean) == len(scale) == latents:
            unsupported(where, "latents_mean", o.latents_mean, (f"{latents} numbers, as latents_std",))
    return Autoencoder(encoder, decoder, quant_conv, post_conv, channels, latents, 2 ** (len(down) - 1), mean, scale)


def autoencoder_tiny(config: JSONObject, arrays: Arrays, where: str) -> TinyAutoencoder:
    """An `AutoencoderTiny`: layers by their numbers, those without weights left out of the file.

    Raises:
        LoadError: an option that is not supported, or weights of another network.
    """
    o = Options(
        config, where, act_fn=("relu", *ACTIVATIONS), upsample_fn=("nearest",), upsampling_scaling_factor=(2, whole),
        block_out_channels=(None, anything),  # noted by the original, and not read
        latent_magnitude=(3, anything), latent_shift=(0.5, anything), force_upcast=(False, True),
        scaling_factor=(1.0, positive), shift_factor=(0.0, number, None),
        num_encoder_blocks=((1, 3, 3, 3), whole.listed), num_decoder_blocks=((3, 3, 3, 1), whole.listed),
    )  # fmt: skip
    inward, outward = arrays / "encoder" / "layers", arrays / "decoder" / "layers"
    encoder: list[Layer] = []
    widths: list[list[int]] = [[], []]
    channels = None
    for i, blocks in enumerate(o.num_encoder_blocks):
        encoder.append(first := Conv(inward / len(encoder), channels, stride=2 if i else 1, bias=not i))
        channels = first.outputs
        widths[0].append(channels)
        encoder += [Residual(inward / (len(encoder) + j), channels, o.act_fn) for j in range(blocks)]
    encoder.append(last := Conv(inward / len(encoder), channels))
    latents = last.outputs
    decoder: list[Layer] = [first := Conv(outward / 0, latents), Activation(o.act_fn)]
    channels = first.outputs
    for i, blocks in enumerate(o.num_decoder_blocks):
        widths[1].append(channels)
        decoder += [Residual(outward / (len(decoder) + j), channels, o.act_fn) for j in range(blocks)]
        end = i == len(o.num_decoder_blocks) - 1
        decoder += [] if end else [Grow(o.upsampling_scaling_factor)]
        decoder.append(last := Conv(outward / len(decoder), channels, bias=end))
        channels = last.outputs
    arrays.finish()
    inputs = Conv(inward / 0).weight.shape[2]
    o.agree(
        in_channels=inputs, out_channels=channels, latent_channels=latents, encoder_block_out_channels=widths[0],
        decoder_block_out_channels=widths[1],
    )  # fmt: skip
    shrinks = 2 ** (len(o.num_encoder_blocks) - 1)
    return TinyAutoencoder(
        Chain(tuple(encoder)), Chain(tuple(decoder)), inputs, latents, shrinks, float(o.shift_factor or 0.0),
        float(o.scaling_factor),
    )  # fmt: skip
