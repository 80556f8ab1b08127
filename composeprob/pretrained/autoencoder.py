"""Images to latents and back: `AutoencoderKL` (Rombach et al. 2022), and
`AutoencoderTiny`, which does the same with less."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

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
from composeprob.pretrained.tensors import Arrays, Loaded, Shaped
from composeprob.pretrained.unet import Body, Style, check_kinds


@dataclass(frozen=True)
class Coder:
    """An autoencoder of images with values from −1 to 1."""

    channels: int
    latents: int  # their channels
    shrinks: int  # pixels of an image's side for each of the latents'
    mean: tuple[float, ...]
    scale: tuple[float, ...]

    def scaled(self, z: Array) -> Array:
        """The latents (z − mean)·scale of what the encoder gives."""
        return (z - jnp.asarray(self.mean)) * jnp.asarray(self.scale)

    def raw(self, latents: Array) -> Array:
        """What the decoder takes of latents."""
        return latents / jnp.asarray(self.scale) + jnp.asarray(self.mean)


@dataclass(frozen=True)
class Autoencoder(Coder):
    """An `AutoencoderKL`: of an image to the mean and log-variance of its latents, and
    of latents to an image."""

    encoder: Body
    decoder: Body

    def encode(self, arrays: Arrays, x: Array) -> Array:
        """The latents of one image (height, width, channels), the mean of their
        distribution."""
        moments = self.encoder(arrays / "encoder", x)
        if "quant_conv" in arrays:
            moments = convolve(arrays / "quant_conv", moments, 1, moments.shape[-1])
        return self.scaled(jnp.split(moments, 2, axis=-1)[0].astype(x.dtype))

    def decode(self, arrays: Arrays, z: Array) -> Array:
        """The image of one event of latents."""
        raw = self.raw(z)
        if "post_quant_conv" in arrays:
            raw = convolve(arrays / "post_quant_conv", raw, 1, raw.shape[-1])
        return self.decoder(arrays / "decoder", raw).astype(z.dtype)


@dataclass(frozen=True)
class TinyAutoencoder(Coder):
    """An `AutoencoderTiny`: layers by their numbers, those without weights left out of
    the file."""

    activation: str
    factor: int  # by which the decoder enlarges at each resolution

    def encode(self, arrays: Arrays, x: Array) -> Array:
        return self.scaled(
            self._chain(
                arrays / "encoder" / "layers", (x + 1) / 2, decodes=False
            ).astype(x.dtype)
        )

    def decode(self, arrays: Arrays, z: Array) -> Array:
        raw = 3 * jnp.tanh(self.raw(z) / 3)
        return (
            2
            * self._chain(arrays / "decoder" / "layers", raw, decodes=True).astype(
                z.dtype
            )
            - 1
        )

    def _chain(self, arrays: Arrays, x: Array, decodes: bool) -> Array:
        """Convolutions and residual blocks. The first and the last convolution alone
        have a bias; at the others the encoder halves the image. Of the decoder's layers
        an activation after the first, and those that repeat every pixel, before such a
        convolution, have no weights."""
        numbers, activation = arrays.numbers(), ACTIVATIONS[self.activation]
        for before, i in zip([-1, *numbers], numbers, strict=False):
            below, outer = arrays / i, i in (0, numbers[-1])
            block, first = "conv" in below, before == 0
            between = decodes and (first or not (block or outer))
            if i - before - 1 != between:
                raise arrays.foreign(
                    f"{arrays.prefix}{i} does not follow on {arrays.prefix}{before}"
                )
            if between and first:
                x = activation(x)
            elif between:
                x = jnp.repeat(jnp.repeat(x, self.factor, axis=0), self.factor, axis=1)
            # its three convolutions, added to their input; then what is negative
            # becomes 0
            if block:
                hidden = activation(convolve(below / "conv" / 0, x))
                hidden = activation(convolve(below / "conv" / 2, hidden))
                x = jax.nn.relu(
                    convolve(below / "conv" / 4, hidden, outputs=x.shape[-1]) + x
                )
            else:
                x = convolve(below, x, stride=1 if decodes or outer else 2, bias=outer)
        return x


def autoencoder_kl(config: JSONObject, arrays: Arrays, where: str) -> Loaded:
    """An `AutoencoderKL`."""
    o = Options(
        config, where, down_block_types=(None, text_list), up_block_types=(None, text_list),
        act_fn=("silu", *ACTIVATIONS), norm_num_groups=(32, whole), sample_size=(32, anything),
        scaling_factor=(0.18215, positive),
        shift_factor=(None, number), latents_mean=(None, number.listed), latents_std=(None, positive.listed),
        # of half precision, in which nothing is evaluated here unless asked for
        force_upcast=(True, False),
    )  # fmt: skip
    check_kinds(
        o, arrays / "encoder", "down", "DownEncoderBlock2D AttnDownEncoderBlock2D"
    )
    check_kinds(o, arrays / "decoder", "up", "UpDecoderBlock2D AttnUpDecoderBlock2D")
    down, up = (
        (arrays / "encoder").items("down_blocks"),
        (arrays / "decoder").items("up_blocks"),
    )
    if not down or not up or "mid_block" not in arrays / "encoder":
        raise arrays.foreign("it lacks blocks of its encoder or decoder")
    resnets = [stage.items("resnets") for stage in down]
    channels, moments = (
        arrays.shape("encoder.conv_in.weight", 4)[1],
        arrays.shape("encoder.conv_out.weight", 4)[0],
    )
    latents = moments // 2
    o.agree(
        in_channels=channels, out_channels=arrays.shape("decoder.conv_out.weight", 4)[0],
        block_out_channels=[stage[-1].shape("conv1.weight", 4)[0] for stage in resnets if stage],
        latent_channels=latents, layers_per_block=[len(stage) for stage in resnets],
        use_quant_conv="quant_conv" in arrays, use_post_quant_conv="post_quant_conv" in arrays,
        mid_block_add_attention="attentions" in arrays / "encoder" / "mid_block",
    )  # fmt: skip
    factor = float(o.scaling_factor)
    mean, scale = (float(o.shift_factor or 0.0),) * latents, (factor,) * latents
    if o.latents_mean is not None and o.latents_std is not None:
        mean, scale = (
            tuple(map(float, o.latents_mean)),
            tuple(factor / float(sd) for sd in o.latents_std),
        )
        if not len(mean) == len(scale) == latents:
            unsupported(
                where,
                "latents_mean",
                o.latents_mean,
                (f"{latents} numbers, as latents_std",),
            )
    style = Style(o.norm_num_groups, 1e-6, o.act_fn)
    encoder = Body((style,) * len(down), style, (), padding=0)
    decoder = Body((), style, (style,) * len(up))
    return _loaded(
        Autoencoder(
            channels, latents, 2 ** (len(down) - 1), mean, scale, encoder, decoder
        ),
        arrays,
    )


def autoencoder_tiny(config: JSONObject, arrays: Arrays, where: str) -> Loaded:
    """An `AutoencoderTiny`."""
    o = Options(
        config, where, act_fn=("relu", *ACTIVATIONS), upsample_fn=("nearest",), upsampling_scaling_factor=(2, whole),
        block_out_channels=(None, anything),  # noted by the original, and not read
        latent_magnitude=(3, anything), latent_shift=(0.5, anything), force_upcast=(False, True),
        scaling_factor=(1.0, positive), shift_factor=(0.0, number, None),
    )  # fmt: skip
    inward, outward = arrays / "encoder" / "layers", arrays / "decoder" / "layers"
    down, up = _blocks(inward), _blocks(outward)
    channels, latents = inward.shape("0.weight", 4)[1], outward.shape("0.weight", 4)[1]
    outputs = (outward / outward.numbers()[-1]).shape("weight", 4)[0]
    o.agree(
        in_channels=channels, out_channels=outputs, latent_channels=latents, num_encoder_blocks=tuple(map(len, down)),
        num_decoder_blocks=tuple(map(len, up)), encoder_block_out_channels=[widths[0] for widths in down],
        decoder_block_out_channels=[widths[0] for widths in up],
    )  # fmt: skip
    mean, scale = (
        (float(o.shift_factor or 0.0),) * latents,
        (float(o.scaling_factor),) * latents,
    )
    form = TinyAutoencoder(
        channels,
        latents,
        2 ** (len(down) - 1),
        mean,
        scale,
        o.act_fn,
        o.upsampling_scaling_factor,
    )
    return _loaded(form, arrays)


def _loaded(form: Autoencoder | TinyAutoencoder, arrays: Arrays) -> Loaded:
    """The autoencoder of a form and its arrays, traced both ways."""
    arrays.trace(
        form.encode, Shaped((form.shrinks, form.shrinks, form.channels), jnp.float32)
    )
    arrays.trace(form.decode, Shaped((1, 1, form.latents), jnp.float32))
    return arrays.finish(form)


def _blocks(layers: Arrays) -> list[list[int]]:
    """The channels of the residual blocks of each resolution."""
    runs = itertools.groupby(layers.numbers(), lambda i: "conv" in layers / i)
    return [
        [(layers / i).shape("conv.0.weight", 4)[0] for i in run]
        for is_block, run in runs
        if is_block
    ]
