"""Handwritten digits of 8×8 pixels, scikit-learn's set of 1,797, and a judge.

The judge is trained on images that no model learns from. An image is an array (8, 8,
1), rows from the top, in units where paper is −1 and ink is 1: x = count/8 − 1, with
count the number of inked pixels among the 16 of the original scan in a pixel's place.
Counts are whole numbers; images to learn from are smoothed by a uniform fraction of a
count, so that they have a density.
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
"""Number of images that models learn from; the other 797 are the judge's."""
_SHIFT = 0.1
_TURN = 0.05
_STRETCH = 0.03
"""Standard deviations of the shift (pixels), rotation (radians) and log of stretching
of images to learn from."""


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
    """Return the images that models learn from, and those of the judge and of tests.

    The split is random and fixed.
    """
    from sklearn.datasets import load_digits

    dataset = load_digits()
    order = np.random.default_rng(0).permutation(len(dataset.target))
    images = dataset.images[order].astype(np.float32)
    labels = dataset.target[order].astype(np.int32)
    training = Digits(images[:LEARNED], labels[:LEARNED])
    return training, Digits(images[LEARNED:], labels[LEARNED:])


def draw(key: Array, n: int) -> tuple[Array, Array]:
    """Draw n images (n, 8, 8, 1) to learn from, and their labels (n,).

    They are drawn with replacement, slightly moved, turned and stretched, and smoothed.
    JAX can trace it.
    """
    index_key, move_key, smooth_key = jax.random.split(key, 3)
    training, _ = split()
    index = jax.random.randint(index_key, (n,), 0, len(training.labels))
    images = jnp.asarray(training.images)[index]
    counts = jax.vmap(_moved)(jax.random.split(move_key, n), images)
    return _scaled(smooth_key, counts), jnp.asarray(training.labels)[index]


def held_out(key: Array, n: int) -> tuple[Array, Array]:
    """Draw n images that no model learned from, and their labels, like `draw`.

    They are smoothed but not moved.
    """
    index_key, smooth_key = jax.random.split(key)
    _, tested = split()
    index = jax.random.randint(index_key, (n,), 0, len(tested.labels))
    images = _scaled(smooth_key, jnp.asarray(tested.images)[index])
    return images, jnp.asarray(tested.labels)[index]


def judge(images: Any) -> np.ndarray:
    """Return the judge's labels of images (n, 8, 8, 1), shape (n,).

    The judge is a support-vector machine, trained on the images that no model learned
    from. It is right on 98 % of the images that models learn from.
    """
    return _machine().predict(to_counts(images).reshape(len(images), -1))


def decisions(images: Any) -> np.ndarray:
    """Return the judge's decision value for each class, shape (n, 10).

    They are features in which sets of images are compared.
    """
    return _machine().decision_function(to_counts(images).reshape(len(images), -1))


def to_counts(images: Any) -> np.ndarray:
    """Return images (n, 8, 8, 1) as counts (n, 8, 8), clipped to 0 … 16."""
    return np.clip(COUNTS / 2 * (np.asarray(images)[..., 0] + 1), 0, COUNTS)


@functools.cache
def _machine() -> Any:
    """Train the judge."""
    from sklearn.svm import SVC

    _, tested = split()
    features = tested.images.reshape(len(tested.labels), -1)
    return SVC(gamma=0.001, C=10.0).fit(features, tested.labels)


def _scaled(key: Array, counts: Array) -> Array:
    """Return counts (n, 8, 8), smoothed by a fraction of a count, as images."""
    smooth = counts + jax.random.uniform(key, counts.shape, minval=-0.5, maxval=0.5)
    return (smooth / (COUNTS / 2) - 1)[..., None]


def _moved(key: Array, counts: Array) -> Array:
    """Return an image under a small random affine map, by bilinear interpolation.

    Beyond its border there is paper.
    """
    keys = jax.random.split(key, 3)
    centre = (SIZE - 1) / 2
    turn = _TURN * jax.random.normal(keys[0])
    stretch = jnp.exp(_STRETCH * jax.random.normal(keys[1], (2,)))
    rotation = jnp.array(
        [[jnp.cos(turn), -jnp.sin(turn)], [jnp.sin(turn), jnp.cos(turn)]]
    )
    shift = _SHIFT * jax.random.normal(keys[2], (2,))
    index = jnp.arange(SIZE)
    pixel = jnp.stack(jnp.meshgrid(index, index, indexing="ij"), -1) - centre
    source = (pixel * stretch) @ rotation.T + centre + shift
    return jax.scipy.ndimage.map_coordinates(
        counts, [source[..., 0], source[..., 1]], order=1
    )
