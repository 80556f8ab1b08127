"""Models of handwritten digits: a diffusion given the class, and a classifier."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array

import composeprob as cp

from .networks.film_mlp import FiLMMLP
from .rates import cosine
from .worlds import digits

ANY = digits.CLASSES
"""The label that means "no label"."""
PIXELS = digits.SIZE**2
SETTINGS: dict[str, Any] = {
    "schedule": cp.Schedule.log_snr(60, -7.0, 6.0),
    "log_snr": (-8.0, 7.0),
    "batches": 128,
    "learning_rate": cosine(1e-3),
}
"""Settings of both recipes: σ is 0.05 at level 0, less than half a count of ink."""


class LabelledImage(nnx.Module):
    """Network of an image given its class, as a one-hot vector; `ANY` is no class."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.network = FiLMMLP(PIXELS, PIXELS, vector=digits.CLASSES, rngs=rngs)

    def __call__(self, x: Array, t: Array, label: Array) -> Array:
        """Return the output for one image x at log-SNR t.

        ``label`` is from 0 to 9, or `ANY`, whose one-hot vector is zero.
        """
        one_hot = jax.nn.one_hot(label, digits.CLASSES)
        return self.network(x, t, one_hot).reshape(x.shape)


def images(parameterization: str, **settings: Any) -> cp.training.Recipe:
    """Return the recipe of digits given their class, or given nothing.

    Args:
        parameterization: as in `Diffusion`.
        settings: settings of the recipe in place of `SETTINGS`.
    """

    def network(key: Array) -> Any:
        return LabelledImage(rngs=nnx.Rngs(params=key))

    conditions = cp.training.Conditions(
        {"label": ANY}, dropout=0.15, encoders={"label": to_label}
    )
    return _recipe(
        network, parameterization=parameterization, conditions=conditions, **settings
    )


def to_label(value: Any) -> np.ndarray:
    """Return a class of digits as an array.

    Raises:
        InvalidValueError: it is not one whole number from 0 to 9.
    """
    label = np.asarray(value)
    is_integer = label.shape == () and label.dtype.kind in "iu"
    if not is_integer or not 0 <= label < digits.CLASSES:
        raise cp.errors.InvalidValueError(
            f"There is no digit {label.tolist()!r}.",
            fix=f"pass label=0 to label={digits.CLASSES - 1}, or label={ANY} for any "
            "of them.",
        )
    return label


class LabelLogits(nnx.Module):
    """Logits of the ten classes from an image."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.network = FiLMMLP(PIXELS, digits.CLASSES, blocks=2, rngs=rngs)

    def __call__(self, x: Array, t: Array) -> Array:
        """Return ten logits for one image x at log-SNR t."""
        return self.network(x, t)


def classifier(**settings: Any) -> cp.training.Recipe:
    """Return the recipe of a classifier of noised digits.

    Args:
        settings: settings of the recipe in place of `SETTINGS`.
    """

    def network(key: Array) -> Any:
        return LabelLogits(rngs=nnx.Rngs(params=key))

    return _recipe(network, parameterization="classifier", **settings)


def _recipe(network: Any, **settings: Any) -> cp.training.Recipe:
    data = _labelled(digits.draw)
    return cp.training.Recipe(network=network, data=data, **(SETTINGS | settings))


def _labelled(draw: Any) -> Any:
    """Return a recipe's data: images, with their class as the condition ``label``."""

    def data(key: Array, n: int) -> tuple[Array, dict[str, Array]]:
        events, labels = draw(key, n)
        return events, {"label": labels}

    return data


held_out = _labelled(digits.held_out)
"""Data of images that no model is trained on, with their classes."""
