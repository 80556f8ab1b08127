"""Finds the objects of a scene, true or sampled, by matching templates; no learning,
and no part of the renderer.

A template is a shape of one colour at one of the places of a grid of half pixels,
anti-aliased by supersampling. What it explains of an image x is the energy that
subtracting it takes away, ‖x‖² − ‖x − T‖² = 2⟨x, T⟩ − ‖T‖², and its fit is that over
‖T‖²: 1 for an object exactly there, 0.5 where it is a quarter fainter, negative on
background. The template that explains most is taken out, and so on, while the best one
fits.
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
"""How far an object may be from where it was asked for, in image widths; an object is
some 6 pixels wide."""
_MOST = 8
_FINE, _CHUNK = 8, 64
_WINDOW = 10
"""Pixels per side of a template, whose centre is at 5 or 5.5 of them."""
_PAD = 2


class Found(NamedTuple):
    """What was found in n images; the first ``count`` entries of each row, best
    explained first, the others zero.

    Attributes:
        count: number of objects, at most 8, shape (n,).
        centres: (x, y) in image widths, to a quarter of a pixel, shape (n, 8, 2).
        shapes, colours: indices as in `Scenes`, shape (n, 8).
        fit: shape (n, 8).
    """

    count: np.ndarray
    centres: np.ndarray
    shapes: np.ndarray
    colours: np.ndarray
    fit: np.ndarray

    @property
    def present(self) -> np.ndarray:
        """Which entries are objects, shape (n, 8)."""
        return np.arange(_MOST) < self.count[:, None]


def detect(images: Any, least_fit: float = FIT) -> Found:
    """The objects in images (n, 32, 32, 3), in the units of `models.worlds.shapes`."""
    images = np.asarray(images, np.float32)
    parts = [
        _detect(images[i : i + _CHUNK], least_fit)
        for i in range(0, len(images), _CHUNK)
    ]
    return Found(*(np.concatenate(field) for field in zip(*parts, strict=True)))


def placed(found: Found, positions: Any, tolerance: float = TOLERANCE) -> np.ndarray:
    """Which of the positions (n, k, 2) have an object within the tolerance, shape (n,
    k).

    Positions further apart than twice the tolerance cannot share an object.
    """
    positions = np.asarray(positions)
    distance = np.linalg.norm(positions[:, :, None] - found.centres[:, None], axis=-1)
    return (np.where(found.present[:, None], distance, np.inf) <= tolerance).any(-1)


def matched(
    found: Found, centres: Any, shapes: Any, colours: Any, present: Any
) -> np.ndarray:
    """Which of the true objects (n, k) were found: within a pixel, with their shape and
    colour, shape (n, k)."""
    distance = np.linalg.norm(
        np.asarray(centres)[:, :, None] - found.centres[:, None], axis=-1
    )
    same = (np.asarray(shapes)[:, :, None] == found.shapes[:, None]) & (
        np.asarray(colours)[:, :, None] == found.colours[:, None]
    )
    return ((distance <= 1.0 / SIZE) & same & found.present[:, None]).any(
        -1
    ) & np.asarray(present)


def _detect(images: np.ndarray, least_fit: float) -> Found:
    templates, centres, kinds = _templates()
    energies = (templates**2).sum((1, 2))[:, None] * CHANNELS.sum(
        1
    )  # (templates, colours)
    n, within = len(images), np.arange(_WINDOW)
    rest = np.pad(images, ((0, 0), (_PAD, _PAD), (_PAD, _PAD), (0, 0)))
    found = Found(
        np.zeros(n, int),
        np.zeros((n, _MOST, 2)),
        *(np.zeros((n, _MOST), t) for t in (int, int, float)),
    )
    going = np.arange(n)
    for slot in range(_MOST):
        windows = sliding_window_view(
            rest[going], (_WINDOW, _WINDOW), axis=(1, 2)
        )  # (n, rows, columns, 3, 10, 10)
        inner = np.tensordot(windows, templates, ((4, 5), (1, 2)))
        explained = 2 * np.einsum("nijct,kc->nijtk", inner, CHANNELS) - energies
        best = explained.reshape(len(going), -1).argmax(1)
        row, column, template, colour = np.unravel_index(best, explained.shape[1:])
        fit = (
            explained.reshape(len(going), -1)[np.arange(len(going)), best]
            / energies[template, colour]
        )
        fits = fit >= least_fit
        going, row, column, template, colour = (
            a[fits] for a in (going, row, column, template, colour)
        )
        if len(going) == 0:
            break
        found.count[going] += 1
        found.centres[going, slot] = (
            np.stack([column, row], -1) - _PAD + centres[template]
        ) / SIZE
        found.shapes[going, slot], found.colours[going, slot] = kinds[template], colour
        found.fit[going, slot] = fit[fits]
        at = (
            going[:, None, None],
            (row[:, None] + within)[:, :, None],
            (column[:, None] + within)[:, None],
        )
        rest[at] -= templates[template][..., None] * CHANNELS[colour][:, None, None]
    return found


@functools.cache
def _templates() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Templates (12, 10, 10), their centres (x, y) in pixels of the window, and their
    shapes."""
    point = (np.arange(_WINDOW * _FINE) + 0.5) / _FINE
    centres = [(x, y) for x in (5.0, 5.5) for y in (5.0, 5.5)]
    fine = [
        inside(point - x, (point - y)[:, None])
        for inside in (_circle, _square, _triangle)
        for x, y in centres
    ]
    images = [
        image.reshape(_WINDOW, _FINE, _WINDOW, _FINE).mean((1, 3)) for image in fine
    ]
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
