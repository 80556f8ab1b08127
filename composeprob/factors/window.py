"""Factors that act on a part of a larger canvas: a box, any of its entries, or many
sets of them; and tapestries of windows that overlap, with every entry of the canvas
counted once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import cast

import equinox as eqx
import jax
import numpy as np
from jax.typing import ArrayLike

from composeprob.arguments import check_count
from composeprob.errors import (
    CapabilityError,
    InvalidValueError,
    ShapeError,
    WrongTypeError,
)
from composeprob.factors import show
from composeprob.factors.algebra import check_factors, common_shape
from composeprob.factors.calibrated import Calibrated
from composeprob.factors.diffusion import WEIGHTS, Diffusion
from composeprob.factors.factor import Around, Factor, check_shape
from composeprob.factors.nodes import SETS, Plate, Product, walk
from composeprob.factors.passes import Pass


@dataclasses.dataclass(frozen=True)
class Region:
    """The linear map P from a site to a leaf's event: cut out a box, average its
    blocks, drop leading axes.

    Attributes:
        offset: where the box starts, one index per axis of the site.
        extent: how many entries the box covers per axis.
        block: how many entries per axis are averaged into one.
    """

    offset: tuple[int, ...]
    extent: tuple[int, ...]
    block: tuple[int, ...]

    @property
    def averaged(self) -> int:
        """How many entries of the site make one entry of the event."""
        return math.prod(self.block)

    @property
    def shown(self) -> str:
        return ", ".join(
            f"{o}:{o + e}" for o, e in zip(self.offset, self.extent, strict=True)
        )

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(
            slice(o, o + e) for o, e in zip(self.offset, self.extent, strict=True)
        )

    def entries(self, shape: tuple[int, ...]) -> np.ndarray:
        """Which entries of a flattened site of this shape the box covers."""
        return np.arange(math.prod(shape)).reshape(shape)[self.slices].ravel()


@dataclasses.dataclass(frozen=True)
class Cells:
    """The linear map from a site to a leaf's event that picks entries, where they are
    no box; compared by their values.

    Attributes:
        shape: (*counts, size): an axis for each of the leaf's plates that run over sets
            of cells, the outermost first, then one for the entries of the event.
        data: the indices of the flattened site, as bytes.
        shown: how the cells are printed.
    """

    shape: tuple[int, ...]
    data: bytes
    shown: str = dataclasses.field(compare=False)

    averaged = 1

    @classmethod
    def from_array(cls, array: np.ndarray, shown: str = "") -> Cells:
        """The cells of these indices."""
        return cls(array.shape, np.ascontiguousarray(array, np.int64).tobytes(), shown)

    @property
    def array(self) -> np.ndarray:
        """The indices, of this shape."""
        return np.frombuffer(self.data, np.int64).reshape(self.shape)

    def entries(self, shape: tuple[int, ...]) -> np.ndarray:
        """Which entries of a flattened site of this shape are seen."""
        return self.array

    def row(self, i: int) -> Cells:
        """The cells of the outermost plate's set i."""
        return Cells.from_array(self.array[i], listed(self.array[i]))

    def pick(self, cells: np.ndarray, shown: str) -> Cells:
        """The cells that a window (*counts, size) of the event sees."""
        return Cells.from_array(self.array[..., cells], shown)


def listed(cells: np.ndarray) -> str:
    """The first few cells, for printing."""
    flat = cells.ravel()
    return ", ".join(map(str, flat[:4])) + (", …" if len(flat) > 4 else "")


class Window(Around):
    """f(P x): f seen through the linear map P that cuts its event out of the canvas;
    over n sets of cells Π_i f(P_i x).

    Attributes:
        factor: f.
        event_shape: the canvas's shape.
        region: P, or all P_i.
        plate: the n sets, with the conditions of f's leaves that have one value for
            each; None of a single region.
    """

    factor: Factor
    event_shape: tuple[int, ...] = eqx.field(static=True)
    region: Region | Cells = eqx.field(static=True)
    plate: Plate | None = eqx.field(static=True, default=None)

    @property
    def entries(self) -> np.ndarray:
        """The entries of the flattened canvas that it sees, of n sets (n, size)."""
        return self.region.entries(self.event_shape)

    @property
    def normalised(self) -> bool:  # one that leaves entries free has no finite integral
        whole = (
            self.plate is None
            and self.region.averaged == 1
            and self.entries.size == np.prod(self.event_shape)
        )
        return bool(whole) and self.factor.normalised

    def terms(self) -> list[tuple[str, float]]:
        if isinstance(self.region, Region):
            scale = (
                f", scale {max(self.region.block)}" if self.region.averaged > 1 else ""
            )
            place = f"offset {self.region.offset}{scale}"
        else:
            place = (
                f"{self.entries.size} cells"
                if self.plate is None
                else f"{self.plate.count} sets of cells"
            )
        inner, canvas = show.formula(self.factor.terms()), show.shape(self.event_shape)
        return [(f"window({show.clipped(inner, 80)}; {canvas}, {place})", 1.0)]


def window(
    factor: Factor,
    canvas_shape: tuple[int, ...],
    offset: tuple[int, ...] | None = None,
    scale: int = 1,
    *,
    index: ArrayLike | None = None,
    over: ArrayLike | Sequence[ArrayLike] | None = None,
) -> Factor:
    """f acting on a part of a larger canvas: a box, any set of entries, or many sets at
    once.

    With ``offset`` the part is a box. With ``scale`` s > 1 the box is s times as large
    as f's event and f sees its block averages. Averages of s^n noisy entries carry s^n
    times less noise variance, so f is evaluated at the matching, higher log-SNR.

    With ``index`` the part is any set of cells, such as a row, a diagonal or every
    third entry: f(x[index]). With ``over`` it is the product Π_i f(x[over_i]) over n
    sets: one network at n places, which is one batched evaluation. Sets may share
    cells, which then count once for each set.

    Args:
        factor: f, over events of shape (h, w, …).
        canvas_shape: the canvas; for a box, with as many axes as f's events.
        offset: where the box starts; axes that are left out at the end start at 0.
        scale: s, a whole number; applied to every axis, except the last one (channels)
            of 3-axis events.
        index: flat indices into the canvas in C order, of the shape of f's events, each
            cell once.
        over: n such sets, shape (n, \\*event_shape).

    Raises:
        ShapeError: the box leaves the canvas, or a number of axes or a shape differs.
        InvalidValueError, WrongTypeError: a scale below 1; shapes, offsets or cells
            that are no whole numbers; cells outside the canvas, or twice in one set.

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
    inner = [part.region for part in walk(factor) if isinstance(part, Window)]
    if offset is None:
        if scale != 1:
            raise InvalidValueError(
                f"A window of cells averages nothing; got scale {scale!r}.",
                fix="leave it out, or use offset=.",
            )
        if any(region.averaged > 1 for region in inner):
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
            f"offset {offset} has more axes than the canvas {canvas}.",
            fix=f"pass at most {len(canvas)} numbers.",
        )
    start = offset + (0,) * (len(canvas) - len(offset))
    block = (scale,) * len(canvas) if len(canvas) != 3 else (scale, scale, 1)
    for axis, (o, size, b, total) in enumerate(
        zip(start, event, block, canvas, strict=True)
    ):
        if o < 0 or o + size * b > total:
            raise ShapeError(
                f"The window leaves the canvas on axis {axis}: it covers {o} to {o + size * b} of {total}.",
                fix=f"choose an offset between 0 and {total - size * b} there, or a larger canvas.",
            )
    if scale > 1 and any(isinstance(region, Cells) for region in inner):
        raise InvalidValueError(
            f"A window with scale {scale} holds a window of cells, whose neighbours it would average.",
            fix="leave the scale out, or put the window of cells outside.",
        )
    extent = tuple(size * b for size, b in zip(event, block, strict=True))
    return Window(
        factor=factor, event_shape=canvas, region=Region(start, extent, block)
    )


def _cell_window(
    factor: Factor, canvas: tuple[int, ...], index: object, over: object
) -> Window:
    """`window` of cells; one of ``index`` and ``over`` is given."""
    name, given = ("index", index) if over is None else ("over", over)
    cells = _whole_numbers(name, given)
    wanted = factor.event_shape if over is None else ("n", *factor.event_shape)
    if cells.shape[
        cells.ndim - len(factor.event_shape) :
    ] != factor.event_shape or cells.ndim != len(wanted):
        raise ShapeError(
            f"A window's {name} needs the shape ({', '.join(map(str, wanted))}{',' * (len(wanted) == 1)}), one cell "
            f"for each entry of the factor's event; got {cells.shape}.",
            fix="for one set of cells use index=, of the event's shape; for n sets over=, with a leading axis of n.",
        )
    if cells.size == 0:
        raise InvalidValueError(
            f"A window's {name} has no cells.", fix="leave the window out."
        )
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
    cells, plate = (
        (sets[0], None) if len(sets) == 1 else (sets, Plate((SETS,), len(sets)))
    )
    return Window(
        factor=factor, event_shape=canvas, region=Cells.from_array(cells), plate=plate
    )


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
        raise WrongTypeError(
            f"A window's {name} is no array: {error}", fix="use sets of one size."
        ) from error
    if not (np.issubdtype(array.dtype, np.integer) or array.size == 0):
        raise WrongTypeError(
            f"A window's {name} must hold whole numbers; got {array.dtype}.",
            fix="pass flat indices into the canvas; numpy.flatnonzero(mask) makes them of a mask.",
        )
    return array


def tapestry(*windows: Factor) -> Factor:
    """The product of windows on one canvas, in which every entry of the canvas counts
    once however many overlap there.

    Where n windows see an entry of the canvas, its weight is 1/n in each: an energy
    that is a sum over entries, log f(x) = −Σ_i E_i(x)/σ, becomes −Σ_i m_i·E_i(x)/σ, and
    the score of a score-only model m·∇log f, the average of the windows' scores. An
    averaged entry of a window with ``scale`` > 1 has the mean of the weights of what it
    averages; a scalar that a network returns beside its array is added whole. At the
    noisiest level the canvas then is N(0, σ²I) wherever windows of scale 1 lie. In a
    plain product of windows overlaps count twice, and images there are sharper than the
    model's.

    The energy keeps its gradient, so MALA and HMC are exact for it; weighted scores are
    no gradient field. Neither is a noised marginal, so there are no Feynman–Kac
    weights.

    Args:
        windows: made by `window`, boxes or cells, of diffusion models, their products,
            powers and guidance.

    Returns:
        A factor over the canvas. A window of scale s leaves the differences within its
        blocks free: where no other window lies, multiply a factor over the canvas for
        them.

    Raises:
        WrongTypeError: something that is no window.
        ShapeError: canvases of different shape.
        CapabilityError: a model with a scalar energy, which is no sum over entries, or
            no diffusion model.

    References:
        Du et al. 2023, section 5.4, and Bar-Tal et al. 2023, *MultiDiffusion*, average
        scores so; for energies it is a composite likelihood with weights (Varin, Reid
        and Firth 2011).

    Example:
        >>> import composeprob as cp
        >>> scenes = cp.load("shapes-position")
        >>> canvas = (32, 48, 3)
        >>> left, right = cp.window(scenes, canvas, (0, 0)), cp.window(scenes, canvas, (0, 16))
        >>> cp.tapestry(left, right).event_shape
        (32, 48, 3)
    """
    for factor in windows:
        if not isinstance(factor, Window):
            raise WrongTypeError(
                f"A tapestry is made of windows; got {type(factor).__name__}.",
                fix="cp.window(factor, canvas_shape, offset); multiply factors over the whole canvas with its result.",
            )
    canvas = common_shape("A tapestry", windows)
    count: np.ndarray = np.zeros(canvas, np.float32)
    for window in cast("tuple[Window, ...]", windows):
        np.add.at(count.reshape(-1), window.entries, 1)
    weights = 1 / np.maximum(count, 1)
    return Product(
        factors=tuple(_weigh(factor, weights) for factor in windows),
        numbers=(1.0,) * len(windows),
        event_shape=canvas,
    )


def _weigh(factor: Factor, weights: np.ndarray) -> Factor:
    """The same expression, the entries of its events weighed."""
    return weighed.rule_for(factor)(factor, weights)


def _refuse(factor: Factor, weights: np.ndarray) -> Factor:
    label = getattr(factor, "label", None)
    what = f"a {type(factor).__name__.lower()}" if label is None else f"'{label}'"
    raise CapabilityError(
        f"A tapestry weighs the entries of what its windows show, and {what} is not a sum over entries.",
        fix="use diffusion models of the energy_residual form, or score-only ones, and their products and powers; "
        "multiply anything else with the tapestry: cp.tapestry(…) * cp.window(f, canvas_shape, offset).",
    )


weighed = Pass[Factor]("weighed", _refuse)
"""Rules (factor, weights) for the same expression with the entries of its events
weighed."""


@weighed.rule(Window)
def _window(window: Window, weights: np.ndarray) -> Factor:
    event, region = window.factor.event_shape, window.region
    lead = weights.shape[
        : weights.ndim - len(window.event_shape)
    ]  # axes of sets of cells
    if isinstance(region, Cells):
        inner = weights.reshape(*lead, -1)[..., window.entries]
        inner = inner.reshape(*inner.shape[:-1], *event)
    else:
        pairs = zip(event, region.block, strict=True)
        blocks = weights[(slice(None),) * len(lead) + region.slices]
        blocks = blocks.reshape([*lead, *(n for pair in pairs for n in pair)])
        inner = blocks.mean(axis=tuple(range(len(lead) + 1, blocks.ndim, 2)))
    plate = window.plate and dataclasses.replace(window.plate, names=(SETS, WEIGHTS))
    return dataclasses.replace(window, factor=_weigh(window.factor, inner), plate=plate)


@weighed.rule(Product)
def _product(product: Product, weights: np.ndarray) -> Factor:
    return product.with_children(
        tuple(_weigh(part, weights) for part in product.factors)
    )


@weighed.rule(Calibrated)
def _calibrated(factor: Calibrated, weights: np.ndarray) -> Factor:
    return _weigh(factor.uncalibrated, weights)  # its constants would not hold


@weighed.rule(Diffusion)
def _diffusion(factor: Diffusion, weights: np.ndarray) -> Factor:
    # A scalar head is no sum over entries, so that they cannot be weighed; other
    # energies and scores are.
    if factor.parameterization == "energy" or WEIGHTS in factor.fixed:
        return _refuse(factor, weights)
    return factor.holding({**factor.fixed, WEIGHTS: np.asarray(weights, np.float32)})  # type: ignore[dict-item]
