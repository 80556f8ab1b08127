"""Detector of the objects of a scene, true or sampled, by matching templates.

It learns nothing, and uses no part of the renderer. A template is a shape of one colour
at one of the places of a grid of half pixels, anti-aliased by supersampling. Its
subtraction from an image x reduces the energy by ‖x‖² − ‖x − T‖² = 2⟨x, T⟩ − ‖T‖², and
its fit is that reduction over ‖T‖²: 1 for an object exactly there, 0.5 where it is a
quarter fainter, negative on background. The template of the greatest reduction is
subtracted, and so on, while its fit is sufficient.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from .shapes import CHANNELS, CIRCUMRADIUS, HALF_SIDE, RADIUS, SIZE

FIT = 0.5
"""The least fit of an object."""
TOLERANCE = 2.0 / SIZE
"""Greatest distance of an object from its requested position, in image widths; an
object is about 6 pixels wide."""
_MOST = 8
_FINE = 8
"""Subpixels per side of a pixel, over which templates are averaged."""
_CHUNK = 64
_WINDOW = 10
"""Pixels per side of a template, whose centre is at 5 or 5.5 of them."""
_PAD = 2
"""Pixels around an image, so that windows reach beyond its border."""


class Found(NamedTuple):
    """Objects in n images: the first ``count`` entries of each row, the others zero.

    Objects with the greatest reduction of energy come first.

    Attributes:
        count: number of objects, at most 8, shape (n,).
        centres: (x, y) in image widths, to a quarter of a pixel, shape (n, 8, 2).
        shapes, colours: indices as in `Scenes`, shape (n, 8).
        fit: fit of each object, shape (n, 8).
    """

    count: np.ndarray
    centres: np.ndarray
    shapes: np.ndarray
    colours: np.ndarray
    fit: np.ndarray

    @property
    def present(self) -> np.ndarray:
        """Mask of the entries that are objects, shape (n, 8)."""
        return np.arange(_MOST) < self.count[:, None]


def detect(images: Any, least_fit: float = FIT) -> Found:
    """Return the objects in images (n, 32, 32, 3), in the units of `worlds.shapes`."""
    images = np.asarray(images, np.float32)
    chunks = []
    for start in range(0, len(images), _CHUNK):
        chunks.append(_detect(images[start : start + _CHUNK], least_fit))
    return Found(*(np.concatenate(field) for field in zip(*chunks, strict=True)))


def placed(found: Found, positions: Any, tolerance: float = TOLERANCE) -> np.ndarray:
    """Return for positions (n, k, 2) whether an object is within the tolerance, (n, k).

    Positions further apart than twice the tolerance cannot share an object.
    """
    positions = np.asarray(positions)
    distance = np.linalg.norm(positions[:, :, None] - found.centres[:, None], axis=-1)
    distance = np.where(found.present[:, None], distance, np.inf)
    return (distance <= tolerance).any(-1)


def matched(
    found: Found, centres: Any, shapes: Any, colours: Any, present: Any
) -> np.ndarray:
    """Return for true objects (n, k) whether they were found, shape (n, k).

    An object is found within a pixel, with its shape and colour.
    """
    offsets = np.asarray(centres)[:, :, None] - found.centres[:, None]
    near = np.linalg.norm(offsets, axis=-1) <= 1.0 / SIZE
    same_shape = np.asarray(shapes)[:, :, None] == found.shapes[:, None]
    same_colour = np.asarray(colours)[:, :, None] == found.colours[:, None]
    match = near & same_shape & same_colour & found.present[:, None]
    return match.any(-1) & np.asarray(present)


def _detect(images: np.ndarray, least_fit: float) -> Found:
    """Return the objects in one chunk of images."""
    templates, centres, kinds = _templates()
    # ‖T‖², (templates, colours)
    energies = (templates**2).sum((1, 2))[:, None] * CHANNELS.sum(1)
    n = len(images)
    within = np.arange(_WINDOW)
    rest = np.pad(images, ((0, 0), (_PAD, _PAD), (_PAD, _PAD), (0, 0)))
    found = Found(
        count=np.zeros(n, int),
        centres=np.zeros((n, _MOST, 2)),
        shapes=np.zeros((n, _MOST), int),
        colours=np.zeros((n, _MOST), int),
        fit=np.zeros((n, _MOST), float),
    )
    # Images in which the last object still fitted.
    active = np.arange(n)
    for slot in range(_MOST):
        # (n, rows, columns, 3, 10, 10)
        windows = sliding_window_view(rest[active], (_WINDOW, _WINDOW), axis=(1, 2))
        inner = np.tensordot(windows, templates, ((4, 5), (1, 2)))
        reduction = 2 * np.einsum("nijct,kc->nijtk", inner, CHANNELS) - energies
        flat = reduction.reshape(len(active), -1)
        best = flat.argmax(1)
        row, column, template, colour = np.unravel_index(best, reduction.shape[1:])
        fit = flat[np.arange(len(active)), best] / energies[template, colour]
        fits = fit >= least_fit
        active = active[fits]
        if len(active) == 0:
            break
        row = row[fits]
        column = column[fits]
        template = template[fits]
        colour = colour[fits]
        corner = np.stack([column, row], -1) - _PAD
        found.count[active] += 1
        found.centres[active, slot] = (corner + centres[template]) / SIZE
        found.shapes[active, slot] = kinds[template]
        found.colours[active, slot] = colour
        found.fit[active, slot] = fit[fits]
        window = (
            active[:, None, None],
            (row[:, None] + within)[:, :, None],
            (column[:, None] + within)[:, None],
        )
        colours = CHANNELS[colour][:, None, None]
        rest[window] -= templates[template][..., None] * colours
    return found


@functools.cache
def _templates() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return templates (12, 10, 10), their centres (x, y) in pixels, and their shapes.

    Pixels are counted within the window of a template.
    """
    point = (np.arange(_WINDOW * _FINE) + 0.5) / _FINE
    centres = [(x, y) for x in (5.0, 5.5) for y in (5.0, 5.5)]
    images = []
    for inside in (_circle, _square, _triangle):
        for x, y in centres:
            fine = inside(point - x, (point - y)[:, None])
            subpixels = fine.reshape(_WINDOW, _FINE, _WINDOW, _FINE)
            images.append(subpixels.mean((1, 3)))
    return (
        np.asarray(images, np.float32),
        np.asarray(3 * centres),
        np.repeat(np.arange(3), len(centres)),
    )


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return x**2 + y**2 <= RADIUS**2


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) <= HALF_SIDE


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    side = CIRCUMRADIUS / 2
    return (y <= side) & (np.sqrt(0.75) * np.abs(x) - 0.5 * y <= side)
