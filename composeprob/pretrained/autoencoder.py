"""Images to latents and back: `AutoencoderKL` (Rombach et al. 2022), and the far
smaller `AutoencoderTiny`."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from composeprob.json_data import JSONObject
from composeprob.pretrained.config import (
    Options,
    anything,
    number,
    positive,
    text_list,
    unsupported,
    whole,
)
from composeprob.pretrained.layers import ACTIVATIONS, convolve
from composeprob.pretrained.tensors import Arrays, Loaded, ShapeDtype
from composeprob.pretrained.unet import Body, Style, check_kinds


@dataclass(frozen=True)
class Coder:
    """An autoencoder of images with values from −1 to 1."""

    channels: int  # of images
    latents: int  # channels of latents
    shrinks: int  # pixels of an image's side for each of the latents'
    mean: tuple[float, ...]  # of the encoder's output, for each channel
    scale: tuple[float, ...]

    def scaled(
        self, z: Float[Array, "*image latents"]
    ) -> Float[Array, "*image latents"]:
        """Latents (z − mean)·scale of the encoder's output z."""
        return (z - jnp.asarray(self.mean)) * jnp.asarray(self.scale)

    def raw(
        self, latents: Float[Array, "*image latents"]
    ) -> Float[Array, "*image latents"]:
        """Input of the decoder for latents: latents/scale + mean."""
        return latents / jnp.asarray(self.scale) + jnp.asarray(self.mean)


@dataclass(frozen=True)
class Autoencoder(Coder):
    """An `AutoencoderKL`: an image to the mean and log-variance of its latents, and
    latents to an image."""

    encoder: Body
    decoder: Body

    def encode(self, arrays: Arrays, x: Array) -> Array:
        """Latents of one image (height, width, channels): the mean of their
        distribution."""
        moments = self.encoder(arrays / "encoder", x)
        if "quant_conv" in arrays:
            moments = convolve(arrays / "quant_conv", moments, 1, moments.shape[-1])
        mean, _ = jnp.split(moments, 2, axis=-1)
        return self.scaled(mean.astype(x.dtype))

    def decode(self, arrays: Arrays, z: Array) -> Array:
        """Image of one event of latents."""
        raw = self.raw(z)
        if "post_quant_conv" in arrays:
            raw = convolve(arrays / "post_quant_conv", raw, 1, raw.shape[-1])
        return self.decoder(arrays / "decoder", raw).astype(z.dtype)


@dataclass(frozen=True)
class TinyAutoencoder(Coder):
    """An `AutoencoderTiny`: layers by their numbers, which the file lacks for layers
    without weights."""

    activation: str
    factor: int  # enlargement by the decoder at each resolution

    def encode(self, arrays: Arrays, x: Array) -> Array:
        unit = (x + 1) / 2
        z = self._chain(arrays / "encoder" / "layers", unit, decodes=False)
        return self.scaled(z.astype(x.dtype))

    def decode(self, arrays: Arrays, z: Array) -> Array:
        raw = 3 * jnp.tanh(self.raw(z) / 3)
        unit = self._chain(arrays / "decoder" / "layers", raw, decodes=True)
        return 2 * unit.astype(z.dtype) - 1

    def _chain(self, arrays: Arrays, x: Array, decodes: bool) -> Array:
        """Convolutions and residual blocks.

        Only the first and the last convolution have a bias; at the others the encoder
        halves the image. Two kinds of the decoder's layers have no weights: the
        activation after the first, and those that repeat every pixel, before a
        convolution without a bias.
        """
        activation = ACTIVATIONS[self.activation]
        numbers = arrays.numbers()
        for before, i in zip([-1, *numbers], numbers, strict=False):
            layer = arrays / i
            outer = i in (0, numbers[-1])
            is_block = "conv" in layer
            after_first = before == 0
            skipped = decodes and (after_first or not (is_block or outer))
            if i - before - 1 != skipped:
                raise arrays.foreign(
                    f"{arrays.prefix}{i} does not follow on {arrays.prefix}{before}"
                )
            if skipped and after_first:
                x = activation(x)
            elif skipped:
                x = jnp.repeat(jnp.repeat(x, self.factor, axis=0), self.factor, axis=1)
            if is_block:
                x = self._block(layer / "conv", x)
            else:
                stride = 1 if decodes or outer else 2
                x = convolve(layer, x, stride=stride, bias=outer)
        return x

    def _block(self, arrays: Arrays, x: Array) -> Array:
        """Three convolutions, added to their input, and the positive part of that."""
        activation = ACTIVATIONS[self.activation]
        hidden = activation(convolve(arrays / 0, x))
        hidden = activation(convolve(arrays / 2, hidden))
        return jax.nn.relu(convolve(arrays / 4, hidden, outputs=x.shape[-1]) + x)


def autoencoder_kl(config: JSONObject, arrays: Arrays, where: str) -> Loaded:
    """An `AutoencoderKL`."""
    o = Options(
        config,
        where,
        down_block_types=(None, text_list),
        up_block_types=(None, text_list),
        act_fn=("silu", *ACTIVATIONS),
        norm_num_groups=(32, whole),
        sample_size=(32, anything),
        scaling_factor=(0.18215, positive),
        shift_factor=(None, number),
        latents_mean=(None, number.listed),
        latents_std=(None, positive.listed),
        # Concerns half precision, in which nothing is evaluated here unless asked for.
        force_upcast=(True, False),
    )
    encoder, decoder = arrays / "encoder", arrays / "decoder"
    check_kinds(o, encoder, "down", "DownEncoderBlock2D AttnDownEncoderBlock2D")
    check_kinds(o, decoder, "up", "UpDecoderBlock2D AttnUpDecoderBlock2D")
    down = encoder.items("down_blocks")
    up = decoder.items("up_blocks")
    if not down or not up or "mid_block" not in encoder:
        raise arrays.foreign("it lacks blocks of its encoder or decoder")
    resnets = [stage.items("resnets") for stage in down]
    widths = [stage[-1].shape("conv1.weight", 4)[0] for stage in resnets if stage]
    channels = encoder.shape("conv_in.weight", 4)[1]
    # The encoder gives a mean and a log-variance of each latent.
    latents = encoder.shape("conv_out.weight", 4)[0] // 2
    o.agree(
        in_channels=channels,
        out_channels=decoder.shape("conv_out.weight", 4)[0],
        block_out_channels=widths,
        latent_channels=latents,
        layers_per_block=[len(stage) for stage in resnets],
        use_quant_conv="quant_conv" in arrays,
        use_post_quant_conv="post_quant_conv" in arrays,
        mid_block_add_attention="attentions" in encoder / "mid_block",
    )
    mean, scale = _standardisation(o, latents)
    style = Style(o.norm_num_groups, 1e-6, o.act_fn)
    form = Autoencoder(
        channels=channels,
        latents=latents,
        shrinks=2 ** (len(down) - 1),
        mean=mean,
        scale=scale,
        encoder=Body((style,) * len(down), style, (), padding=0),
        decoder=Body((), style, (style,) * len(up)),
    )
    return _loaded(form, arrays)


def _standardisation(
    o: Options, latents: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and scale of each channel of latents; the file has one for all, or one for
    each."""
    factor = float(o.scaling_factor)
    if o.latents_mean is None or o.latents_std is None:
        return (float(o.shift_factor or 0.0),) * latents, (factor,) * latents
    if not len(o.latents_mean) == len(o.latents_std) == latents:
        supported = (f"{latents} numbers, as latents_std",)
        unsupported(o.where, "latents_mean", o.latents_mean, supported)
    scale = tuple(factor / float(deviation) for deviation in o.latents_std)
    return tuple(map(float, o.latents_mean)), scale


def autoencoder_tiny(config: JSONObject, arrays: Arrays, where: str) -> Loaded:
    """An `AutoencoderTiny`."""
    o = Options(
        config,
        where,
        act_fn=("relu", *ACTIVATIONS),
        upsample_fn=("nearest",),
        upsampling_scaling_factor=(2, whole),
        # Files have it, and the original does not read it.
        block_out_channels=(None, anything),
        latent_magnitude=(3, anything),
        latent_shift=(0.5, anything),
        force_upcast=(False, True),
        scaling_factor=(1.0, positive),
        shift_factor=(0.0, number, None),
    )
    encoder = arrays / "encoder" / "layers"
    decoder = arrays / "decoder" / "layers"
    down = _block_widths(encoder)
    up = _block_widths(decoder)
    channels = encoder.shape("0.weight", 4)[1]
    latents = decoder.shape("0.weight", 4)[1]
    last = decoder / decoder.numbers()[-1]
    o.agree(
        in_channels=channels,
        out_channels=last.shape("weight", 4)[0],
        latent_channels=latents,
        num_encoder_blocks=tuple(map(len, down)),
        num_decoder_blocks=tuple(map(len, up)),
        encoder_block_out_channels=[widths[0] for widths in down],
        decoder_block_out_channels=[widths[0] for widths in up],
    )
    form = TinyAutoencoder(
        channels=channels,
        latents=latents,
        shrinks=2 ** (len(down) - 1),
        mean=(float(o.shift_factor or 0.0),) * latents,
        scale=(float(o.scaling_factor),) * latents,
        activation=o.act_fn,
        factor=o.upsampling_scaling_factor,
    )
    return _loaded(form, arrays)


def _loaded(form: Autoencoder | TinyAutoencoder, arrays: Arrays) -> Loaded:
    """The autoencoder of a form and its arrays, traced in both directions."""
    # The smallest image that the encoder can halve as often as it does.
    image = ShapeDtype((form.shrinks, form.shrinks, form.channels), jnp.float32)
    arrays.trace(form.encode, image)
    arrays.trace(form.decode, ShapeDtype((1, 1, form.latents), jnp.float32))
    return arrays.finish(form)


def _block_widths(layers: Arrays) -> list[list[int]]:
    """Channels of the residual blocks of each resolution."""
    widths: list[list[int]] = []
    after_block = False
    for i in layers.numbers():
        layer = layers / i
        is_block = "conv" in layer
        # A convolution between blocks changes the resolution.
        if is_block and not after_block:
            widths.append([])
        if is_block:
            widths[-1].append(layer.shape("conv.0.weight", 4)[0])
        after_block = is_block
    return widths
