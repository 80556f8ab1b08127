"""Factors that act on a part of a larger canvas: a box, any of its entries, or many sets of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import equinox as eqx
import jax
import numpy as np
from jax.typing import ArrayLike

from composeprob.arguments import check_count
from composeprob.errors import InvalidValueError, ShapeError, WrongTypeError
from composeprob.factors import show
from composeprob.factors.algebra import check_factors
from composeprob.factors.base import Around, Factor, check_shape
from composeprob.factors.nodes import walk


class Window(Around):
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
    def normalised(self) -> bool:  # one that leaves entries free has no finite integral
        return self.event_shape == self.factor.event_shape and self.factor.normalised

    @property
    def slices(self) -> tuple[slice, ...]:
        """The box."""
        spans = zip(self.offset, self.factor.event_shape, self.block, strict=True)
        return tuple(slice(o, o + size * b) for o, size, b in spans)

    def tally(self, count: np.ndarray) -> None:
        """Adds 1 at every entry of the canvas that it sees."""
        count[self.slices] += 1

    def terms(self) -> list[tuple[str, float]]:
        scale = f", scale {max(self.block)}" if max(self.block) > 1 else ""
        inner, canvas = show.formula(self.factor.terms()), show.shape(self.event_shape)
        return [(f"window({show.clipped(inner, 80)}; {canvas}, offset {self.offset}{scale})", 1.0)]


@dataclasses.dataclass(frozen=True)
class Indices:
    """An array of whole numbers that is compared and hashed by its values."""

    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def from_array(cls, array: np.ndarray) -> Indices:
        """The indices of an array."""
        return cls(array.shape, np.ascontiguousarray(array, np.int64).tobytes())

    @property
    def array(self) -> np.ndarray:
        """The array."""
        return np.frombuffer(self.data, np.int64).reshape(self.shape)


class CellWindow(Around):
    """f(x[cells]), or Π_i f(x[cells_i]) over n sets of cells.

    Attributes:
        factor: f.
        event_shape: the canvas's shape.
        cells: flat indices into the canvas, (size,) with one for each entry of f's event, or (n, size).
        running: conditions of f's leaves that have one value for each set, along a leading axis.
        at_once: how many sets are evaluated at once; None for all.
    """

    factor: Factor
    event_shape: tuple[int, ...] = eqx.field(static=True)
    cells: Indices = eqx.field(static=True)
    running: tuple[str, ...] = eqx.field(static=True, default=())
    at_once: int | None = eqx.field(static=True, default=None)

    @property
    def count(self) -> int | None:
        """The number of sets; None of a single one, which is no product."""
        return self.cells.shape[0] if len(self.cells.shape) == 2 else None

    @property
    def runs(self) -> tuple[str, ...]:
        return self.running if self.count is not None else ()

    @property
    def normalised(self) -> bool:  # a window that leaves entries free has no finite integral
        return self.count is None and self.cells.shape[0] == np.prod(self.event_shape) and self.factor.normalised

    def tally(self, count: np.ndarray) -> None:
        """Adds 1 at every entry of the canvas that it sees, once for each set."""
        np.add.at(count.reshape(-1), self.cells.array, 1)

    def terms(self) -> list[tuple[str, float]]:
        inner, canvas = show.formula(self.factor.terms()), show.shape(self.event_shape)
        sets = f"{self.cells.shape[-1]} cells" if self.count is None else f"{self.count} sets of cells"
        return [(f"window({show.clipped(inner, 80)}; {canvas}, {sets})", 1.0)]


def window(
    factor: Factor,
    canvas_shape: tuple[int, ...],
    offset: tuple[int, ...] | None = None,
    scale: int = 1,
    *,
    index: ArrayLike | None = None,
    over: ArrayLike | Sequence[ArrayLike] | None = None,
) -> Factor:
    """f acting on a part of a larger canvas: a box, any set of entries, or many sets at once.

    With ``offset`` the part is a box. With ``scale`` s > 1 the box is s times as large as f's event and f sees its
    block averages. Averages of s^n noisy entries carry s^n times less noise variance, so f is evaluated at the
    matching, higher log-SNR.

    With ``index`` the part is any set of cells, such as a row, a diagonal or every third entry: f(x[index]). With
    ``over`` it is the product Π_i f(x[over_i]) over n sets: one network at n places, which is one batched evaluation.
    Sets may share cells, which then count once for each set.

    Args:
        factor: f, over events of shape (h, w, …).
        canvas_shape: the canvas; for a box, with as many axes as f's events.
        offset: where the box starts; axes that are left out at the end start at 0.
        scale: s, a whole number; applied to every axis, except the last one (channels) of 3-axis events.
        index: flat indices into the canvas in C order, of the shape of f's events, each cell once.
        over: n such sets, shape (n, \\*event_shape).

    Raises:
        ShapeError: the box leaves the canvas, or a number of axes or a shape differs.
        InvalidValueError, WrongTypeError: a scale below 1; shapes, offsets or cells that are no whole numbers; cells
            outside the canvas, or twice in one set.

    References:
        Du et al. 2023, section 5.4 (tapestries).

    Example:
        >>> import composeprob as cp, numpy as np, numpyro.distributions as dist
        >>> f = cp.Analytic(dist.Normal(0.0, 1.0).expand([3]), cp.Schedule.cosine(100), label="f")
        >>> grid = np.arange(9).reshape(3, 3)
        >>> cp.window(f, (3, 3), over=[*grid, *grid.T, grid.diagonal()])
        window(f; 3×3, 7 sets of cells)
    """
    check_factors("A window", (factor,))
    canvas, event = check_shape("canvas_shape", canvas_shape), factor.event_shape
    if sum(given is not None for given in (offset, index, over)) != 1:
        raise InvalidValueError(
            "A window needs one of offset, index and over.",
            fix="offset= places a box, index= names the cells of one set, over= those of n sets.",
        )
    if offset is None:
        if scale != 1:
            raise InvalidValueError(
                f"A window of cells averages nothing; got scale {scale!r}.", fix="leave it out, or use offset=."
            )
        if any(max(getattr(part, "block", (1,))) > 1 for part in walk(factor)):
            raise InvalidValueError(
                "A window of cells holds a window with scale > 1, whose averages are of neighbours.",
                fix="leave its scale out, or use a window with an offset here.",
            )
        return _cell_window(factor, canvas, index, over)
    offset = check_shape("offset", offset)
    if len(canvas) != len(event):
        raise ShapeError(
            f"A window needs a canvas with as many axes as the factor's event; got {canvas} for events {event}.",
            fix=f"pass a canvas_shape of {len(event)} axes.",
        )
    check_count(scale, "A window's scale")
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
    if scale > 1 and any(isinstance(part, CellWindow) for part in walk(factor)):
        raise InvalidValueError(
            f"A window with scale {scale} holds a window of cells, whose neighbours it would average.",
            fix="leave the scale out, or put the window of cells outside.",
        )
    return Window(factor=factor, event_shape=canvas, offset=start, block=block)


def _cell_window(factor: Factor, canvas: tuple[int, ...], index: object, over: object) -> CellWindow:
    """`window` of cells; one of ``index`` and ``over`` is given."""
    name, given = ("index", index) if over is None else ("over", over)
    cells = _whole_numbers(name, given)
    wanted = factor.event_shape if over is None else ("n", *factor.event_shape)
    if cells.shape[cells.ndim - len(factor.event_shape) :] != factor.event_shape or cells.ndim != len(wanted):
        raise ShapeError(
            f"A window's {name} needs the shape ({', '.join(map(str, wanted))}{',' * (len(wanted) == 1)}), one cell "
            f"for each entry of the factor's event; got {cells.shape}.",
            fix="for one set of cells use index=, of the event's shape; for n sets over=, with a leading axis of n.",
        )
    if cells.size == 0:
        raise InvalidValueError(f"A window's {name} has no cells.", fix="leave the window out.")
    size = int(np.prod(canvas))
    sets = cells.reshape(-1, int(np.prod(factor.event_shape)))
    outside = (sets < 0) | (sets >= size)
    if outside.any():
        i, j = np.argwhere(outside)[0]
        raise InvalidValueError(
            f"{_place(over, i)} of a window leaves the canvas: cell {sets[i, j]} of {size}, which are numbered from 0 "
            f"in C order over the shape {canvas}.",
            fix="numpy.ravel_multi_index makes such numbers of rows and columns.",
        )
    for i, row in enumerate(sets):
        values, counts = np.unique(row, return_counts=True)
        if counts.max() > 1:
            raise InvalidValueError(
                f"{_place(over, i)} of a window names cell {values[counts.argmax()]} {counts.max()} times.",
                fix="give each entry of the event a cell of its own; different sets may share cells.",
            )
    return CellWindow(factor=factor, event_shape=canvas, cells=Indices.from_array(sets[0] if len(sets) == 1 else sets))


def _place(over: object, i: int) -> str:
    return "The index" if over is None else f"Set {i}"


def _whole_numbers(name: str, value: object) -> np.ndarray:
    if any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(value)):
        raise WrongTypeError(
            f"A window's {name} is traced by JAX; which cells a factor sees must be known before compilation.",
            fix="make it with NumPy.",
        )
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise WrongTypeError(f"A window's {name} is no array: {error}", fix="use sets of one size.") from error
    if not (np.issubdtype(array.dtype, np.integer) or array.size == 0):
        raise WrongTypeError(
            f"A window's {name} must hold whole numbers; got {array.dtype}.",
            fix="pass flat indices into the canvas; numpy.flatnonzero(mask) makes them of a mask.",
        )
    return array
