"""A factor that acts on a region of a larger canvas."""

from __future__ import annotations

import dataclasses

import equinox as eqx

from composeprob.errors import InvalidValueError, ShapeError
from composeprob.factors import show
from composeprob.factors.algebra import check_factors
from composeprob.factors.base import Factor, check_shape


class Window(Factor):
    """f(P x): f seen through the linear map P that cuts a region out of the canvas and averages blocks of it.

    Attributes:
        factor: f.
        event_shape: the canvas's shape.
        offset: where the region starts, one index per axis of the canvas.
        block: how many canvas entries per axis are averaged into one entry of f's event.
    """

    factor: Factor
    event_shape: tuple[int, ...] = eqx.field(static=True)
    offset: tuple[int, ...] = eqx.field(static=True)
    block: tuple[int, ...] = eqx.field(static=True)

    @property
    def children(self) -> tuple[Factor, ...]:
        return (self.factor,)

    @property
    def normalised(self) -> bool:  # one that leaves entries free has no finite integral
        return self.event_shape == self.factor.event_shape and self.factor.normalised

    def with_children(self, children: tuple[Factor, ...]) -> Factor:
        return dataclasses.replace(self, factor=children[0])

    def given(self, **conditions: object) -> Factor:
        return dataclasses.replace(self, factor=self.factor.given(**conditions))

    def terms(self) -> list[tuple[str, float]]:
        scale = f", scale {max(self.block)}" if max(self.block) > 1 else ""
        inner, canvas = show.formula(self.factor.terms()), show.shape(self.event_shape)
        return [(f"window({show.clipped(inner, 80)}; {canvas}, offset {self.offset}{scale})", 1.0)]


def window(factor: Factor, canvas_shape: tuple[int, ...], offset: tuple[int, ...], scale: int = 1) -> Factor:
    """f acting on a region of a larger canvas.

    With ``scale`` s > 1 the region is s times as large as f's event and f sees its block averages. Averages of s^n
    noisy entries carry s^n times less noise variance, so f is evaluated at the matching, higher log-SNR.

    Args:
        factor: f, over events of shape (h, w, …).
        canvas_shape: the canvas, with as many axes as f's events.
        offset: where the region starts; axes that are left out at the end start at 0.
        scale: s, a whole number; applied to every axis, except the last one (channels) of 3-axis events.

    Raises:
        ShapeError: the region leaves the canvas, or the number of axes differs.
        InvalidValueError, WrongTypeError: a scale below 1, shapes or offsets that are no whole numbers.

    References:
        Du et al. 2023, section 5.4 (tapestries).
    """
    check_factors("A window", (factor,))
    canvas, event = check_shape("canvas_shape", canvas_shape), factor.event_shape
    offset = check_shape("offset", offset)
    if len(canvas) != len(event):
        raise ShapeError(
            f"A window needs a canvas with as many axes as the factor's event; got {canvas} for events {event}.",
            fix=f"pass a canvas_shape of {len(event)} axes.",
        )
    if not isinstance(scale, int) or scale < 1:
        raise InvalidValueError(
            f"A window's scale must be a whole number ≥ 1; got {scale!r}.",
            fix="pass how many pixels of the canvas, along each axis, one of the window averages.",
        )
    if len(offset) > len(canvas):
        raise ShapeError(
            f"offset {offset} has more axes than the canvas {canvas}.", fix=f"pass at most {len(canvas)} numbers."
        )
    start = offset + (0,) * (len(canvas) - len(offset))
    block = (scale,) * len(canvas) if len(canvas) != 3 else (scale, scale, 1)
    for axis, (o, size, b, total) in enumerate(zip(start, event, block, canvas, strict=True)):
        if o < 0 or o + size * b > total:
            raise ShapeError(
                f"The window leaves the canvas on axis {axis}: it covers {o} to {o + size * b} of {total}.",
                fix=f"choose an offset between 0 and {total - size * b} there, or a larger canvas.",
            )
    return Window(factor=factor, event_shape=canvas, offset=start, block=block)
