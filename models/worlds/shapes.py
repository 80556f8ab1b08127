"""Scenes of one to five coloured shapes on a dark background, 32×32 pixels.

An image is an array (32, 32, 3): rows from the top, columns from the left, channels
red, green, blue. Its units are chosen so that the background is 0 and a channel that is
on is 1: x = (rgb − 0.1)/0.85, with rgb in [0, 1]. A position is (x, y) in image widths:
(0, 0) is the upper left corner, (1, 1) the lower right one.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

SIZE = 32
"""Pixels per side."""
MOST = 5
"""Greatest number of objects of a scene."""
SHAPES = ("circle", "square", "triangle")
COLOURS = ("red", "green", "blue", "yellow", "magenta", "cyan")
CHANNELS = np.array(
    [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]], np.float32
)
"""The value of each colour, shape (6, 3)."""
RADIUS = 3.2
HALF_SIDE = 2.8
CIRCUMRADIUS = 4.0
"""Sizes of circle, square and triangle, in pixels: about 32, 31 and 21 of them are
covered."""
MARGIN = 4.0 / SIZE
"""Least distance of a centre from the border, in image widths: nothing is cut off."""
SEPARATION = 8.5 / SIZE
"""Least distance of two centres, in image widths: no two objects touch."""
_TRIES = 64


class Scenes(NamedTuple):
    """n scenes, with entries for five objects, of which the first ``count`` exist.

    Attributes:
        images: shape (n, 32, 32, 3).
        count: number of objects, shape (n,).
        centres: centres of objects, shape (n, 5, 2); a triangle's centre is that of its
            circumscribed circle.
        shapes: index into `SHAPES`, shape (n, 5).
        colours: index into `COLOURS`, shape (n, 5).
    """

    images: Array
    count: Array
    centres: Array
    shapes: Array
    colours: Array

    @property
    def present(self) -> Array:
        """Mask of the objects that exist, shape (n, 5)."""
        return jnp.arange(MOST) < self.count[:, None]


def draw(key: Array, n: int, fewest: int = 1, most: int = MOST) -> Scenes:
    """Draw n scenes with ``fewest`` to ``most`` objects.

    The number of objects, shapes and colours are uniform. Centres are drawn one after
    another, each uniform over the image without its margin and the surroundings of the
    earlier ones. (A scene in which 64 tries give no place is drawn again.) JAX can
    trace it, with n, fewest and most static.
    """
    return jax.vmap(lambda k: _one(k, fewest, most))(jax.random.split(key, n))


def render(centres: Array, shapes: Array, colours: Array, present: Array) -> Array:
    """Return the image (32, 32, 3) of k objects.

    They have centres (k, 2), shapes, colours and presence (k,). Edges are anti-aliased:
    a pixel's value is the share of it that is covered, exactly for squares, to 0.06 for
    circles and along a triangle's sides, to 0.2 at its corners.
    """
    pixel = jnp.arange(SIZE) + 0.5
    pixels = jnp.stack(jnp.meshgrid(pixel, pixel, indexing="xy"), axis=-1)
    offsets = pixels - SIZE * centres[:, None, None]
    covered = jax.vmap(_coverage)(offsets, shapes) * present[:, None, None]
    return jnp.einsum("khw,kc->hwc", covered, jnp.asarray(CHANNELS)[colours])


def to_rgb(images: Array) -> np.ndarray:
    """Return images for the screen: values in [0, 1], of the same shape."""
    return np.clip(0.1 + 0.85 * np.asarray(images), 0.0, 1.0)


def _one(key: Array, fewest: int, most: int) -> Scenes:
    """Draw one scene."""
    count_key, shape_key, colour_key, place_key = jax.random.split(key, 4)
    count = jax.random.randint(count_key, (), fewest, most + 1)
    shapes = jax.random.randint(shape_key, (MOST,), 0, len(SHAPES))
    colours = jax.random.randint(colour_key, (MOST,), 0, len(COLOURS))
    centres = _place(place_key, count)
    image = render(centres, shapes, colours, jnp.arange(MOST) < count)
    return Scenes(image, count, centres, shapes, colours)


def _place(key: Array, count: Array) -> Array:
    """Draw centres (5, 2), the first ``count`` of them separated."""

    def attempt(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        key, use = jax.random.split(state[0])
        tries = jax.random.uniform(
            use, (MOST, _TRIES, 2), minval=MARGIN, maxval=1 - MARGIN
        )
        centres = tries[:, 0]
        fits = jnp.ones((), bool)
        for i in range(1, MOST):
            offsets = tries[i, :, None] - centres[None, :i]
            separated = jnp.linalg.norm(offsets, axis=-1) >= SEPARATION
            free = jnp.all(separated, axis=-1)
            # The first free place; without one the scene is drawn again.
            centres = centres.at[i].set(tries[i, jnp.argmax(free)])
            fits &= jnp.any(free) | (i >= count)
        return key, centres, fits

    start = (key, jnp.zeros((MOST, 2)), jnp.zeros((), bool))
    return jax.lax.while_loop(lambda state: ~state[2], attempt, start)[1]


def _coverage(offset: Array, shape: Array) -> Array:
    """Return the share of each pixel that a shape covers.

    ``offset`` (32, 32, 2) is that of the pixels' centres from the shape's, in pixels.
    """
    circle = jnp.clip(RADIUS + 0.5 - jnp.linalg.norm(offset, axis=-1), 0.0, 1.0)
    square = jnp.prod(jnp.clip(HALF_SIDE + 0.5 - jnp.abs(offset), 0.0, 1.0), axis=-1)
    # The triangle points up: three half-planes, each a soft step as wide as a pixel is
    # across its edge.
    normals = jnp.array([[0.0, 1.0], [-np.sqrt(0.75), -0.5], [np.sqrt(0.75), -0.5]])
    inside = (CIRCUMRADIUS / 2 - offset @ normals.T) / jnp.abs(normals).sum(-1)
    triangle = jnp.prod(jnp.clip(inside + 0.5, 0.0, 1.0), axis=-1)
    return jnp.stack([circle, square, triangle])[shape]
