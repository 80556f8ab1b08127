"""Handwritten digits of 8×8 pixels, scikit-learn's set of 1,797, and a judge that never
saw what the models learn from.

An image is an array (8, 8, 1), rows from the top, in units where paper is −1 and ink is
1: x = count/8 − 1, with count the number of inked pixels among the 16 of the original
scan that a pixel stands for. Counts are whole numbers; images to learn from are
smoothed by a uniform fraction of a count, so that they have a density.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

SIZE = 8
"""Pixels per side."""
CLASSES = 10
COUNTS = 16
"""The largest count of a pixel."""
LEARNED = 1000
"""Images that models learn from; the other 797 are the judge's."""
_SHIFT, _TURN, _STRETCH = 0.1, 0.05, 0.03
"""Standard deviations of how an image is moved (pixels), turned (radians) and stretched
before it is learned from."""


class Digits(NamedTuple):
    """n images with their labels.

    Attributes:
        images: counts, shape (n, 8, 8), whole numbers from 0 to 16.
        labels: shape (n,), from 0 to 9.
    """

    images: np.ndarray
    labels: np.ndarray


@functools.cache
def split() -> tuple[Digits, Digits]:
    """What models learn from, and what the judge learns from and models are tested on:
    a fixed random split."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    images, labels = (
        found.images[order].astype(np.float32),
        found.target[order].astype(np.int32),
    )
    return Digits(images[:LEARNED], labels[:LEARNED]), Digits(
        images[LEARNED:], labels[LEARNED:]
    )


def draw(key: Array, n: int) -> tuple[Array, Array]:
    """n images (n, 8, 8, 1) to learn from and their labels (n,): drawn with
    replacement, slightly moved, turned and stretched, and smoothed. Traceable."""
    chosen_key, move_key, smooth_key = jax.random.split(key, 3)
    known, _ = split()
    chosen = jax.random.randint(chosen_key, (n,), 0, len(known.labels))
    counts = jax.vmap(_moved)(
        jax.random.split(move_key, n), jnp.asarray(known.images)[chosen]
    )
    return _scaled(smooth_key, counts), jnp.asarray(known.labels)[chosen]


def held_out(key: Array, n: int) -> tuple[Array, Array]:
    """n images that no model learned from, smoothed but not moved, and their labels; as
    `draw`."""
    chosen_key, smooth_key = jax.random.split(key)
    _, other = split()
    chosen = jax.random.randint(chosen_key, (n,), 0, len(other.labels))
    return _scaled(smooth_key, jnp.asarray(other.images)[chosen]), jnp.asarray(
        other.labels
    )[chosen]


def judge(images: Any) -> np.ndarray:
    """What a support-vector machine, trained on the images that no model learned from,
    takes images (n, 8, 8, 1) for.

    Shape (n,). It is right on 98 % of the images that models learn from.
    """
    return _machine().predict(to_counts(images).reshape(len(images), -1))


def decisions(images: Any) -> np.ndarray:
    """The judge's decision value for each class, shape (n, 10): features to compare
    sets of images in."""
    return _machine().decision_function(to_counts(images).reshape(len(images), -1))


def to_counts(images: Any) -> np.ndarray:
    """Images (n, 8, 8, 1) as counts (n, 8, 8), clipped to 0 … 16."""
    return np.clip(COUNTS / 2 * (np.asarray(images)[..., 0] + 1), 0, COUNTS)


@functools.cache
def _machine() -> Any:
    from sklearn.svm import SVC

    _, other = split()
    return SVC(gamma=0.001, C=10.0).fit(
        other.images.reshape(len(other.labels), -1), other.labels
    )


def _scaled(key: Array, counts: Array) -> Array:
    """Counts (n, 8, 8) with a fraction of a count added, in the units of images, shape
    (n, 8, 8, 1)."""
    smooth = counts + jax.random.uniform(key, counts.shape, minval=-0.5, maxval=0.5)
    return (smooth / (COUNTS / 2) - 1)[..., None]


def _moved(key: Array, counts: Array) -> Array:
    """One image seen through a small random affine map, by bilinear interpolation;
    beyond its border there is paper."""
    keys = jax.random.split(key, 3)
    centre = (SIZE - 1) / 2
    turn = _TURN * jax.random.normal(keys[0])
    stretch = jnp.exp(_STRETCH * jax.random.normal(keys[1], (2,)))
    rotation = jnp.array(
        [[jnp.cos(turn), -jnp.sin(turn)], [jnp.sin(turn), jnp.cos(turn)]]
    )
    pixel = (
        jnp.stack(jnp.meshgrid(jnp.arange(SIZE), jnp.arange(SIZE), indexing="ij"), -1)
        - centre
    )
    seen = (
        (pixel * stretch) @ rotation.T
        + centre
        + _SHIFT * jax.random.normal(keys[2], (2,))
    )
    return jax.scipy.ndimage.map_coordinates(
        counts, [seen[..., 0], seen[..., 1]], order=1
    )
