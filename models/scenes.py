"""Models of scenes of shapes: data with conditions, networks, and recipes."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

import composeprob as cp

from .networks.matcher import Matcher
from .networks.text import TextEncoder
from .networks.unet import UNet, heat_map
from .rates import cosine
from .worlds import captions, shapes

NOWHERE = (-9.0, -9.0)
"""The position for "no position": its heat map is zero."""
VECTOR = 128
"""Length of the vector that encodes a caption."""
SETTINGS: dict[str, Any] = {
    "schedule": cp.Schedule.log_snr(60, -7.0, 7.0),
    "log_snr": (-8.0, 8.0),
    "batches": cp.training.Batches(32, chunk=8),
    "learning_rate": cosine(8e-4),
}
"""Settings of all recipes: σ is 0.03 at level 0, a hundredth of an object's contrast in
each pixel's variance."""


class PositionUNet(nnx.Module):
    """The UNet with a position as a heat map."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.unet = UNet(3, spatial=1, rngs=rngs)

    def __call__(self, x: Array, t: Array, position: Array) -> Array:
        """Return the output for one image x at log-SNR t.

        ``position`` is (x, y) in image widths.
        """
        return self.unet(x, t, spatial=heat_map(position, x.shape[:2]))


class CaptionedScenes(nnx.Module):
    """Network (s, b) of scenes given a text, with log f(x | text) = −½‖x − s‖²/σ + b.

    s is of `PositionUNet` without a position, and stays as it is; b is trained. b
    estimates log p(text | x)/p(text), which equals log p(x | text)/p(x); without a text
    it is 0.

    Args:
        encoder: function from the condition ``caption`` to a vector of length
            ``vector``: a `TextEncoder` of tokens, or another with its call, such as the
            identity for embeddings made elsewhere. Zeros are no text.
    """

    def __init__(self, encoder: Any, vector: int, *, rngs: nnx.Rngs):
        self.scenes = PositionUNet(rngs=rngs)
        self.encoder = encoder
        self.matcher = Matcher(3, vector, rngs=rngs)

    def __call__(self, x: Array, t: Array, caption: Array) -> tuple[Array, Array]:
        """Return the pair (s, b) for one image x at log-SNR t."""
        graph, state = nnx.split(self.scenes)
        scenes = nnx.merge(graph, jax.lax.stop_gradient(state))
        fit = self.matcher(x, t, self.encoder(caption))
        s = scenes(x, t, jnp.asarray(NOWHERE))
        return s, jnp.where(jnp.any(caption != 0), fit, 0.0)


def caption(**settings: Any) -> cp.training.Recipe:
    """Return the recipe of an energy of scenes given a caption, or given nothing.

    The caption is true of one of the scene's objects. It changes the denoising loss by
    a percent or less, since it leaves most of the image's objects open; it is learned
    by classifying the captions of different scenes, and similar shapes. The focus is
    where there is little noise: with more, a circle and a square are so close that
    their words would get one meaning.

    Args:
        settings: settings of the recipe in place of its defaults.
    """

    def network(key: Array) -> Any:
        rngs = nnx.Rngs(params=key)
        words = len(captions.WORDS)
        encoder = TextEncoder(words, captions.LENGTH, VECTOR, rngs=rngs)
        return CaptionedScenes(encoder, VECTOR, rngs=rngs)

    def data(key: Array, n: int) -> tuple[Array, dict[str, Array]]:
        scene_key, caption_key = jax.random.split(key)
        scenes = shapes.draw(scene_key, n)
        return scenes.images, {"caption": captions.describe(caption_key, scenes)}

    def similar(key: Array, conditions: dict[str, Array]) -> dict[str, Array]:
        return {"caption": captions.reshaped(key, conditions["caption"])}

    conditions = cp.training.Conditions(
        {"caption": captions.EMPTY},
        dropout=0.1,
        encoders={"caption": captions.tokens},
    )
    chosen = SETTINGS | {
        "conditions": conditions,
        "batches": cp.training.Batches(32, chunk=32),
        "learning_rate": cosine(2.5e-3),
        "log_snr": cp.training.LogSNR(-8.0, 8.0, focus=(-1.0, 5.0)),
        "losses": (cp.training.CrossCondition(others=31, vary=similar),),
    }
    return cp.training.Recipe(
        network=network,
        data=data,
        parameterization="energy_residual",
        **(chosen | settings),
    )


def from_positions(network: Any) -> Any:
    """Return an untrained model of captions with the scenes of `shapes-position`.

    Args:
        network: a `CaptionedScenes`, as a factor has adapted it.
    """
    trained = cp.load("shapes-position").network.state
    return eqx.tree_at(lambda n: n.state, network, {**network.state, "scenes": trained})


def position(parameterization: str, **settings: Any) -> cp.training.Recipe:
    """Return the recipe of scenes given the centre of one of their objects, or nothing.

    The loss has weight σ²/(α² + 0.02) + 0.1: positions of objects are decided at the
    noisiest levels, where the unweighted loss hardly depends on them.

    Args:
        parameterization: as in `Diffusion`.
        settings: settings of the recipe in place of `SETTINGS`.
    """

    def network(key: Array) -> Any:
        return PositionUNet(rngs=nnx.Rngs(params=key))

    def data(key: Array, n: int) -> tuple[Array, dict[str, Array]]:
        scene_key, choice_key = jax.random.split(key)
        scenes = shapes.draw(scene_key, n)
        chosen = jax.random.randint(choice_key, (n,), 0, scenes.count)
        return scenes.images, {"position": scenes.centres[jnp.arange(n), chosen]}

    conditions = cp.training.Conditions(
        {"position": NOWHERE}, dropout=0.2, encoders={"position": to_position}
    )
    chosen = SETTINGS | {
        "conditions": conditions,
        "losses": (cp.training.Denoising(weight=noisy_weight),),
    }
    return cp.training.Recipe(
        network=network,
        data=data,
        parameterization=parameterization,
        **(chosen | settings),
    )


def to_position(value: Any) -> np.ndarray:
    """Return a position in the image as an array.

    Raises:
        ShapeError: it is not a pair of numbers.
        InvalidValueError: it lies outside of the image.
    """
    position = np.asarray(value, np.float32)
    if position.shape != (2,):
        raise cp.errors.ShapeError(
            f"A position is a pair (x, y); got an array of shape {position.shape}.",
            fix="one factor for each position: scenes.given(position=(0.3, 0.5)).",
        )
    if not np.all((position >= 0) & (position <= 1)):
        x, y = position.tolist()
        raise cp.errors.InvalidValueError(
            f"Position ({x:g}, {y:g}) lies outside of the image.",
            fix="positions are (x, y) in image widths: (0, 0) is the upper left "
            "corner, (1, 1) the lower right one. Whole objects fit between "
            f"{shapes.MARGIN:g} and {1 - shapes.MARGIN:g}.",
        )
    return position


def noisy_weight(log_snr: Array) -> Array:
    """Return σ²/(α² + 0.02) + 0.1, on a variance-preserving schedule."""
    alpha2 = jax.nn.sigmoid(log_snr)
    sigma2 = jax.nn.sigmoid(-log_snr)
    return sigma2 / (alpha2 + 0.02) + 0.1
