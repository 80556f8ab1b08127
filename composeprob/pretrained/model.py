"""The factor that `from_diffusers` makes: a `Diffusion` that can also encode, decode and read prompts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from composeprob.errors import CapabilityError, ShapeError
from composeprob.factors.base import Traits
from composeprob.factors.diffusion import Diffusion
from composeprob.pretrained.tensors import Loaded
from composeprob.pretrained.text import Prompts, TextEncoder


class Parts:
    """What lies beside a network in its folder, equal to no other's: an autoencoder, which models of pixels have not,
    and up to two text encoders."""

    def __init__(self, name: str, autoencoder: Loaded | None, text_encoders: tuple[TextEncoder, ...]):
        self.name, self.autoencoder, self.text_encoders = name, autoencoder, text_encoders

    def __repr__(self) -> str:
        return f"Parts({self.name})"

    def pictures(self, latents: object) -> np.ndarray:
        """Images of latents (…, height, width, channels), their values from 0 to 1."""
        return pixels(self.coded("decode", latents))

    def coded(self, way: str, given: object) -> Array:
        """Images of latents (``"decode"``), or latents of images (``"encode"``), (…, height, width, channels)."""
        coder, x = self.autoencoder, jnp.asarray(given, jnp.result_type(float))
        assert coder is not None
        what, channels, multiple = "Latents", coder.form.latents, 1
        if way == "encode":
            what, channels, multiple = "Images", coder.form.channels, coder.form.shrinks
        if x.ndim < 3 or x.shape[-1] != channels or any(side % multiple or not side for side in x.shape[-3:-1]):
            sides = f", sides multiples of {multiple}" if multiple > 1 else ""
            raise ShapeError(
                f"{what} of this model have shape (…, height, width, {channels}){sides}; got {x.shape}.",
                fix="channels come last; crop or scale the sides." if multiple > 1 else "channels come last.",
            )
        stack = x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])
        found = coder.mapped(way, stack)
        return found.reshape(*x.shape[:-3], *found.shape[1:])


def pixels(images: object) -> np.ndarray:
    """Images (…, height, width, channels) with values from −1 to 1, brought to 0 to 1: all models of pixels agree."""
    return np.clip(np.asarray(images, np.float32) / 2 + 0.5, 0.0, 1.0)


class Adapted(eqx.Module):
    """A network whose output has the variance beside, or that takes another time than the factor's."""

    network: Callable[..., Array]
    known: Array | None  # evaluated by log-SNR: that of its training's levels, from the noisiest to the cleanest
    channels: int = eqx.field(static=True)  # of events: the first of the output's
    pooled: int | None = eqx.field(static=True)  # width of the vector in the prompt's last row
    flow: float | None = eqx.field(static=True)  # times of flow matching: this number times σ/(σ + α)

    def __call__(self, x: Array, t: Array, /, **conditions: Array) -> Array:
        if self.pooled is not None:
            prompt = conditions["prompt"]
            conditions = {**conditions, "prompt": prompt[:-1], "pooled": prompt[-1, : self.pooled]}
        if self.known is not None:
            levels = jnp.arange(self.known.shape[0], dtype=jnp.float32)[::-1]
            t = jnp.interp(t, self.known, levels)
        if self.flow is not None:
            t = self.flow * t / (1 + t)
        return self.network(x, t, **conditions)[..., : self.channels]


class Preconditioned(eqx.Module):
    """x̂_0 = c_skip·x + c_out·F(c_in·x, ¼·log σ), for a network F of unit inputs and outputs.

    c_skip = s²/(σ² + s²), c_in = 1/√(σ² + s²), c_out = ±σ·s/√(σ² + s²), with s the data's standard deviation, `scale`,
    and − where F gives a velocity (Karras et al. 2022, table 1).
    """

    network: Callable[..., Array]
    scale: float = eqx.field(static=True)
    sign: float = eqx.field(static=True)

    def __call__(self, x: Array, sigma: Array, /, **conditions: Array) -> Array:
        total = sigma**2 + self.scale**2
        inner = self.network(x / jnp.sqrt(total), 0.25 * jnp.log(sigma), **conditions)
        return self.scale**2 / total * x + self.sign * sigma * self.scale / jnp.sqrt(total) * inner


class Pretrained(Diffusion):
    """A `Pretrained` is a diffusion model from a folder of someone else's; made by `from_diffusers`.

    Its parts are the autoencoder and text encoders beside the network, which no density is made of: they are no leaves.
    """

    parts: Parts = eqx.field(static=True)
    declared: ClassVar[bool] = True

    def __init__(self, network: Callable[..., Array], parts: Parts, **options: Any):
        self.parts = parts
        super().__init__(network, **options)

    @property
    def traits(self) -> Traits:
        pictures = pixels if self.parts.autoencoder is None else self.parts.pictures
        return dataclasses.replace(super().traits, pictures=pictures)

    @property
    def shown_conditions(self) -> dict[str, str]:
        prompts = {name: encoder for name, encoder in self.encoders if isinstance(encoder, Prompts)}
        texts = {name: prompts[name].text_of(self.fixed[name]) for name in self.fixed if name in prompts}
        return super().shown_conditions | {name: repr(text) for name, text in texts.items() if text is not None}

    @property
    def text_encoder(self) -> TextEncoder:
        """The text encoder: ``model.text_encoder(token_ids)`` gives hidden states (length, width).

        Raises:
            CapabilityError: the model has none.
        """
        return self._encoder(0, "text encoder", "use a text-to-image folder, with text_encoder/ in it.")

    @property
    def text_encoder_2(self) -> TextEncoder:
        """The second text encoder of two.

        Raises:
            CapabilityError: the model has no second one.
        """
        return self._encoder(1, "second text encoder", "use model.text_encoder, or another folder.")

    def _encoder(self, index: int, what: str, fix: str) -> TextEncoder:
        if len(self.parts.text_encoders) <= index:
            raise CapabilityError(f"The model '{self.label}' has no {what}.", fix=fix)
        return self.parts.text_encoders[index]

    def decode(self, latents: ArrayLike) -> Array:
        """Makes images of latents.

        Args:
            latents: (…, height, width, channels), such as ``result["x"]``.

        Returns:
            Images (…, height, width, channels), their values from about −1 to 1; `Result.images` has them from 0 to 1.

        Raises:
            CapabilityError: the model is one of pixels.
            ShapeError: no latents of this model.
        """
        return self._coded("decode", latents)

    def encode(self, images: ArrayLike) -> Array:
        """Makes latents of images: the mean of the encoder's distribution, scaled as the network was trained.

        Args:
            images: (…, height, width, channels), their values from −1 to 1.

        Returns:
            Latents (…, height, width, channels).

        Raises:
            CapabilityError: the model is one of pixels.
            ShapeError: no images of this model, or sides that the encoder cannot halve as often as it does.
        """
        return self._coded("encode", images)

    def _coded(self, way: str, given: ArrayLike) -> Array:
        if self.parts.autoencoder is None:
            raise CapabilityError(
                f"The model '{self.label}' has no autoencoder: its events {self.event_shape} are images themselves.",
                fix="use the events as they are; their values go from −1 to 1.",
            )
        return self.parts.coded(way, given)
