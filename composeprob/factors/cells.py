"""A factor that acts on any entries of a larger canvas, or on many sets of them."""

from __future__ import annotations

import dataclasses

import equinox as eqx
import jax
import numpy as np

from composeprob.errors import InvalidValueError, ShapeError, WrongTypeError
from composeprob.factors import show
from composeprob.factors.base import Around, Factor


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


def cell_window(factor: Factor, canvas: tuple[int, ...], index: object, over: object) -> CellWindow:
    """See `window`; one of ``index`` and ``over`` is given."""
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
