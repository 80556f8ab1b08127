"""Models of scenes of shapes: their data with conditions, their networks, and how they
are trained."""

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
"""The position that means "no position": its heat map is zero."""
VECTOR = 128
"""Length of the vector that stands for a caption."""
SETTINGS: dict[str, Any] = {
    "schedule": cp.Schedule.log_snr(60, -7.0, 7.0),
    "log_snr": (-8.0, 8.0),
    "batches": cp.training.Batches(32, chunk=8),
    "learning_rate": cosine(8e-4),
}
"""What all of them share: σ is 0.03 at level 0, a hundredth of an object's contrast in
each pixel's variance."""


class PositionUNet(nnx.Module):
    """The UNet with a position as a heat map."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.unet = UNet(3, spatial=1, rngs=rngs)

    def __call__(self, x: Array, t: Array, position: Array) -> Array:
        """The output for one image x at log-SNR t; ``position`` is (x, y) in image
        widths."""
        return self.unet(x, t, spatial=heat_map(position, x.shape[:2]))


class CaptionedScenes(nnx.Module):
    """Scenes as `PositionUNet` knows them without a position, and how well a text fits:
    the pair (s, b) of which log f(x | text) = −½‖x − s‖²/σ + b is made. Only what makes
    b is trained.

    b estimates log p(text | x)/p(text), or log p(x | text)/p(x), which is the same;
    without a text it is 0.

    Args:
        encoder: from the condition ``caption`` to a vector of length ``vector``: a
            `TextEncoder` of tokens, or anything else that is called so, such as the
            identity for embeddings made elsewhere. Zeros are no text.
    """

    def __init__(self, encoder: Any, vector: int, *, rngs: nnx.Rngs):
        self.scenes = PositionUNet(rngs=rngs)
        self.encoder = encoder
        self.matcher = Matcher(3, vector, rngs=rngs)

    def __call__(self, x: Array, t: Array, caption: Array) -> tuple[Array, Array]:
        """The pair (s, b) for one image x at log-SNR t."""
        graph, state = nnx.split(self.scenes)
        scenes = nnx.merge(graph, jax.lax.stop_gradient(state))
        fit = self.matcher(x, t, self.encoder(caption))
        return scenes(x, t, jnp.asarray(NOWHERE)), jnp.where(
            jnp.any(caption != 0), fit, 0.0
        )


def caption(**settings: Any) -> cp.training.Recipe:
    """A model of scenes given a caption that is true of one of their objects, or given
    nothing: an energy.

    A caption changes the denoising loss by a percent or less, since it leaves open
    where most of the image's objects are; it is learned by telling apart the captions
    of different scenes, and shapes that are alike from one another where there is
    little noise: with more, a circle and a square are so close that they come to mean
    the same.

    Args:
        settings: what the recipe changes of its own.
    """

    def network(key: Array) -> Any:
        rngs = nnx.Rngs(params=key)
        return CaptionedScenes(
            TextEncoder(len(captions.WORDS), captions.LENGTH, VECTOR, rngs=rngs),
            VECTOR,
            rngs=rngs,
        )

    def data(key: Array, n: int) -> tuple[Array, dict[str, Array]]:
        scene_key, caption_key = jax.random.split(key)
        scenes = shapes.draw(scene_key, n)
        return scenes.images, {"caption": captions.describe(caption_key, scenes)}

    close = lambda key, given: {"caption": captions.reshaped(key, given["caption"])}  # noqa: E731
    chosen = SETTINGS | {
        "conditions": cp.training.Conditions(
            {"caption": captions.EMPTY},
            dropout=0.1,
            encoders={"caption": captions.tokens},
        ),
        "batches": cp.training.Batches(32, chunk=32),
        "learning_rate": cosine(2.5e-3),
        "log_snr": cp.training.LogSNR(-8.0, 8.0, focus=(-1.0, 5.0)),
        "losses": (cp.training.CrossCondition(others=31, vary=close),),
    }
    return cp.training.Recipe(
        network=network,
        data=data,
        parameterization="energy_residual",
        **(chosen | settings),
    )


def from_positions(network: Any) -> Any:
    """An untrained model of captions with the scenes of `shapes-position`.

    Args:
        network: a `CaptionedScenes`, as a factor has adapted it.
    """
    trained = cp.load("shapes-position").network.state
    return eqx.tree_at(lambda n: n.state, network, {**network.state, "scenes": trained})


def position(parameterization: str, **settings: Any) -> cp.training.Recipe:
    """A model of scenes given the centre of one of their objects, or given nothing.

    The loss has weight σ²/(α² + 0.02) + 0.1: where things are is decided at the
    noisiest levels, where the plain loss hardly depends on it.

    Args:
        parameterization: as of `Diffusion`.
        settings: what the recipe changes of `SETTINGS`.
    """

    def network(key: Array) -> Any:
        return PositionUNet(rngs=nnx.Rngs(params=key))

    def data(key: Array, n: int) -> tuple[Array, dict[str, Array]]:
        scene_key, choice_key = jax.random.split(key)
        scenes = shapes.draw(scene_key, n)
        named = jax.random.randint(choice_key, (n,), 0, scenes.count)
        return scenes.images, {"position": scenes.centres[jnp.arange(n), named]}

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
    """A position in the image as an array.

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
            fix=f"positions are (x, y) in image widths: (0, 0) is the upper left corner, (1, 1) the lower right one. "
            f"Whole objects fit between {shapes.MARGIN:g} and {1 - shapes.MARGIN:g}.",
        )
    return position


def noisy_weight(log_snr: Array) -> Array:
    """σ²/(α² + 0.02) + 0.1 at a log-SNR, on a variance-preserving schedule."""
    alpha2, sigma2 = jax.nn.sigmoid(log_snr), jax.nn.sigmoid(-log_snr)
    return sigma2 / (alpha2 + 0.02) + 0.1
