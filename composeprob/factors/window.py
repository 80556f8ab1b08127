"""Factors that act on a part of a larger canvas: a box, any of its entries, or many
sets of them; and tapestries of windows that overlap, with every entry of the canvas
counted once."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import cast

import equinox as eqx
import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Int

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
from composeprob.text import clipped, spoken_shape


@dataclasses.dataclass(frozen=True)
class Region:
    """The linear map P from a site to a leaf's event: cut out a box, average its
    blocks, drop leading axes.

    Attributes:
        offset: the first index of the box on each axis of the site.
        extent: the number of entries that the box covers on each axis.
        block: the number of entries on each axis that are averaged into one.
    """

    offset: tuple[int, ...]
    extent: tuple[int, ...]
    block: tuple[int, ...]

    @property
    def averaged(self) -> int:
        """Number of entries of the site that are averaged into one of the event."""
        return math.prod(self.block)

    @property
    def shown(self) -> str:
        return ", ".join(f"{part.start}:{part.stop}" for part in self.slices)

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(
            slice(start, start + size)
            for start, size in zip(self.offset, self.extent, strict=True)
        )

    def entries(self, shape: tuple[int, ...]) -> Int[np.ndarray, " entries"]:
        """Indices of the entries of a flattened site of this shape in the box."""
        return np.arange(math.prod(shape)).reshape(shape)[self.slices].ravel()


@dataclasses.dataclass(frozen=True)
class Cells:
    """The linear map from a site to a leaf's event that picks any entries; compared by
    their values.

    Attributes:
        shape: (*counts, size): an axis for each of the leaf's plates that run over sets
            of cells, the outermost first, then one for the entries of the event.
        data: the indices of the flattened site, as bytes.
        shown: the cells as they are printed.
    """

    shape: tuple[int, ...]
    data: bytes
    shown: str = dataclasses.field(compare=False)

    averaged = 1

    @classmethod
    def from_array(cls, array: np.ndarray, shown: str = "") -> Cells:
        """Make cells of indices."""
        # Bytes, as an array in a static field can neither be compared nor hashed.
        return cls(array.shape, np.ascontiguousarray(array, np.int64).tobytes(), shown)

    @property
    def array(self) -> Int[np.ndarray, "*counts size"]:
        """The indices."""
        return np.frombuffer(self.data, np.int64).reshape(self.shape)

    def entries(self, shape: tuple[int, ...]) -> Int[np.ndarray, "*counts size"]:
        """Indices of the entries of a flattened site of this shape that are seen."""
        return self.array

    def row(self, i: int) -> Cells:
        """Return the cells of the outermost plate's set i."""
        return Cells.from_array(self.array[i], listed(self.array[i]))

    def pick(self, cells: Int[np.ndarray, "*counts size"], shown: str) -> Cells:
        """Return the cells that a window of the event sees."""
        return Cells.from_array(self.array[..., cells], shown)


def listed(cells: np.ndarray) -> str:
    """Format the first few cells."""
    flat = cells.ravel()
    first = ", ".join(map(str, flat[:4]))
    return f"{first}, …" if len(flat) > 4 else first


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
        """Indices of the flattened canvas that it sees, (size,), or (n, size) of n
        sets."""
        return self.region.entries(self.event_shape)

    @property
    def normalised(self) -> bool:
        # A window that leaves entries free has no finite integral.
        if self.plate is not None or self.region.averaged != 1:
            return False
        sees_all = self.entries.size == math.prod(self.event_shape)
        return sees_all and self.factor.normalised

    def terms(self) -> list[tuple[str, float]]:
        inner = clipped(show.formula(self.factor.terms()), 80)
        canvas = spoken_shape(self.event_shape)
        return [(f"window({inner}; {canvas}, {self._place()})", 1.0)]

    def _place(self) -> str:
        """Text of the window's place on the canvas."""
        if not isinstance(self.region, Region):
            if self.plate is None:
                return f"{self.entries.size} cells"
            return f"{self.plate.count} sets of cells"
        place = f"offset {self.region.offset}"
        if self.region.averaged > 1:
            place += f", scale {max(self.region.block)}"
        return place


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
            that are not whole numbers; cells outside the canvas, or twice in one set.

    References:
        Du et al. 2023, section 5.4 (tapestries).

    Example:
        >>> import composeprob as cp, numpy as np, numpyro.distributions as dist
        >>> normal = dist.Normal(0.0, 1.0).expand([3])
        >>> f = cp.Analytic(normal, cp.Schedule.cosine(100), label="f")
        >>> grid = np.arange(9).reshape(3, 3)
        >>> cp.window(f, (3, 3), over=[*grid, *grid.T, grid.diagonal()])
        window(f; 3×3, 7 sets of cells)
    """
    check_factors("A window", (factor,))
    canvas = check_shape("canvas_shape", canvas_shape)
    if sum(given is not None for given in (offset, index, over)) != 1:
        raise InvalidValueError(
            "A window needs one of offset, index and over.",
            fix="offset= places a box, index= names the cells of one set, over= those "
            "of n sets.",
        )
    inner = [node.region for node in walk(factor) if isinstance(node, Window)]
    if offset is not None:
        return _box_window(factor, canvas, check_shape("offset", offset), scale, inner)
    if scale != 1:
        raise InvalidValueError(
            f"A window of cells averages nothing; got scale {scale!r}.",
            fix="leave it out, or use offset=.",
        )
    if any(region.averaged > 1 for region in inner):
        raise InvalidValueError(
            "A window of cells holds a window with scale > 1, whose averages are of "
            "neighbours.",
            fix="leave its scale out, or use a window with an offset here.",
        )
    return _cell_window(factor, canvas, index, over)


def _box_window(
    factor: Factor,
    canvas: tuple[int, ...],
    offset: tuple[int, ...],
    scale: int,
    inner: Sequence[Region | Cells],
) -> Window:
    """Return the `window` of a box around a factor, whose windows see ``inner``
    regions."""
    event = factor.event_shape
    if len(canvas) != len(event):
        raise ShapeError(
            "A window needs a canvas with as many axes as the factor's event; got "
            f"{canvas} for events {event}.",
            fix=f"pass a canvas_shape of {len(event)} axes.",
        )
    check_count(scale, "A window's scale")
    if len(offset) > len(canvas):
        raise ShapeError(
            f"offset {offset} has more axes than the canvas {canvas}.",
            fix=f"pass at most {len(canvas)} numbers.",
        )
    offset = offset + (0,) * (len(canvas) - len(offset))
    block = (scale,) * len(canvas)
    if len(canvas) == 3:
        block = (*block[:2], 1)  # the last axis is one of channels
    extent = tuple(size * b for size, b in zip(event, block, strict=True))
    for axis, total in enumerate(canvas):
        start = offset[axis]
        end = start + extent[axis]
        if start < 0 or end > total:
            raise ShapeError(
                f"The window leaves the canvas on axis {axis}: it covers {start} to "
                f"{end} of {total}.",
                fix=f"choose an offset between 0 and {total - extent[axis]} there, or "
                "a larger canvas.",
            )
    if scale > 1 and any(isinstance(region, Cells) for region in inner):
        raise InvalidValueError(
            f"A window with scale {scale} holds a window of cells, whose neighbours it "
            "would average.",
            fix="leave the scale out, or put the window of cells outside.",
        )
    region = Region(offset, extent, block)
    return Window(factor=factor, event_shape=canvas, region=region)


def _cell_window(
    factor: Factor, canvas: tuple[int, ...], index: object, over: object
) -> Window:
    """Return the `window` of cells; one of ``index`` and ``over`` is given."""
    event = factor.event_shape
    shape: tuple[int | str, ...]
    if over is None:
        name = "index"
        cells = _whole_numbers(name, index)
        shape = event
    else:
        name = "over"
        cells = _whole_numbers(name, over)
        shape = ("n", *event)
    has_shape = cells.ndim == len(shape)
    if not has_shape or cells.shape[cells.ndim - len(event) :] != event:
        comma = "," if len(shape) == 1 else ""
        raise ShapeError(
            f"A window's {name} needs the shape "
            f"({', '.join(map(str, shape))}{comma}), one cell for each entry of the "
            f"factor's event; got {cells.shape}.",
            fix="for one set of cells use index=, of the event's shape; for n sets "
            "over=, with a leading axis of n.",
        )
    if cells.size == 0:
        raise InvalidValueError(
            f"A window's {name} has no cells.", fix="leave the window out."
        )
    # An entry of the event is a cell, in C order of both.
    sets = cells.reshape(-1, math.prod(event))
    _check_cells(sets, canvas, over is not None)
    # A single set needs no plate.
    if len(sets) == 1:
        region = Cells.from_array(sets[0])
        return Window(factor=factor, event_shape=canvas, region=region)
    return Window(
        factor=factor,
        event_shape=canvas,
        region=Cells.from_array(sets),
        plate=Plate((SETS,), len(sets)),
    )


def _check_cells(
    sets: Int[np.ndarray, "n size"], canvas: tuple[int, ...], are_many: bool
) -> None:
    """Refuse cells outside of the canvas, and cells that stand twice in a set."""

    def name(i: int) -> str:
        return f"Set {i}" if are_many else "The index"

    size = math.prod(canvas)
    outside = (sets < 0) | (sets >= size)
    if outside.any():
        i, j = np.argwhere(outside)[0]
        raise InvalidValueError(
            f"{name(i)} of a window leaves the canvas: cell {sets[i, j]} of {size}, "
            f"which are numbered from 0 in C order over the shape {canvas}.",
            fix="numpy.ravel_multi_index makes such numbers of rows and columns.",
        )
    for i, row in enumerate(sets):
        values, counts = np.unique(row, return_counts=True)
        if counts.max() > 1:
            repeated = values[counts.argmax()]
            raise InvalidValueError(
                f"{name(i)} of a window names cell {repeated} {counts.max()} times.",
                fix="give each entry of the event a cell of its own; different sets "
                "may share cells.",
            )


def _whole_numbers(name: str, value: object) -> np.ndarray:
    if any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(value)):
        raise WrongTypeError(
            f"A window's {name} is traced by JAX; the cells that a factor sees must be "
            "known before compilation.",
            fix="make it with NumPy.",
        )
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise WrongTypeError(
            f"A window's {name} is not an array: {error}", fix="use sets of one size."
        ) from error
    if not (np.issubdtype(array.dtype, np.integer) or array.size == 0):
        raise WrongTypeError(
            f"A window's {name} must hold whole numbers; got {array.dtype}.",
            fix="pass flat indices into the canvas; numpy.flatnonzero(mask) makes them "
            "of a mask.",
        )
    return array


def tapestry(*windows: Factor) -> Factor:
    """The product of windows on one canvas, in which every entry of the canvas counts
    once however many overlap there.

    Where n windows see an entry of the canvas, its weight is 1/n in each: an energy
    that is a sum over entries, log f(x) = −Σ_i E_i(x)/σ, becomes −Σ_i m_i·E_i(x)/σ, and
    the score of a score-only model m·∇log f, the average of the windows' scores. An
    averaged entry of a window with ``scale`` > 1 has the mean of the weights of the
    entries that it averages; a scalar that a network returns beside its array is added
    without a weight. At the noisiest level the canvas then is N(0, σ²I) wherever
    windows of scale 1 lie. In an unweighted product of windows overlaps count twice,
    and images there are sharper than the model's.

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
        WrongTypeError: an argument that is not a window.
        ShapeError: canvases of different shape.
        CapabilityError: a model with a scalar energy, which is not a sum over entries,
            or a factor that is not a diffusion model.

    References:
        Du et al. 2023, section 5.4, and Bar-Tal et al. 2023, *MultiDiffusion*, average
        scores so; for energies it is a composite likelihood with weights (Varin, Reid
        and Firth 2011).

    Example:
        >>> import composeprob as cp
        >>> scenes = cp.load("shapes-position")
        >>> canvas = (32, 48, 3)
        >>> left = cp.window(scenes, canvas, (0, 0))
        >>> right = cp.window(scenes, canvas, (0, 16))
        >>> cp.tapestry(left, right).event_shape
        (32, 48, 3)
    """
    for factor in windows:
        if not isinstance(factor, Window):
            raise WrongTypeError(
                f"A tapestry is made of windows; got {type(factor).__name__}.",
                fix="cp.window(factor, canvas_shape, offset); multiply factors over "
                "the whole canvas with its result.",
            )
    canvas = common_shape("A tapestry", windows)
    count: np.ndarray = np.zeros(canvas, np.float32)
    for window in cast("tuple[Window, ...]", windows):
        # `add.at` counts an entry as often as it stands among the indices.
        np.add.at(count.reshape(-1), window.entries, 1)
    weights = 1 / np.maximum(count, 1)
    return Product(
        factors=tuple(_with_weights(factor, weights) for factor in windows),
        numbers=(1.0,) * len(windows),
        event_shape=canvas,
    )


def _with_weights(factor: Factor, weights: np.ndarray) -> Factor:
    """Return the expression with weights of the entries of its events."""
    return weighted.rule_for(factor)(factor, weights)


def _refuse(factor: Factor, weights: np.ndarray) -> Factor:
    label = getattr(factor, "label", None)
    if label is None:
        name = f"a {type(factor).__name__.lower()}"
    else:
        name = f"'{label}'"
    raise CapabilityError(
        "A tapestry weights the entries of the events in its windows, and the "
        f"log-density of {name} is not a sum over entries.",
        fix="use diffusion models of the energy_residual form, or score-only ones, and "
        "their products and powers; multiply anything else with the tapestry: "
        "cp.tapestry(…) * cp.window(f, canvas_shape, offset).",
    )


weighted = Pass[Factor]("weighted", _refuse)
"""Rules (factor, weights) for the same expression with weights of the entries of its
events."""


@weighted.rule(Window)
def _window(window: Window, weights: np.ndarray) -> Factor:
    event = window.factor.event_shape
    region = window.region
    # Axes of sets of cells lead, where the window stands in such a plate.
    lead = weights.shape[: weights.ndim - len(window.event_shape)]
    if isinstance(region, Cells):
        inner = weights.reshape(*lead, -1)[..., window.entries]
        inner = inner.reshape(*inner.shape[:-1], *event)
    else:
        # Each axis of the box becomes two: blocks, and entries within a block.
        box = weights[(slice(None),) * len(lead) + region.slices]
        pairs = zip(event, region.block, strict=True)
        blocks = box.reshape([*lead, *itertools.chain.from_iterable(pairs)])
        inner = blocks.mean(axis=tuple(range(len(lead) + 1, blocks.ndim, 2)))
    plate = window.plate
    if plate is not None:
        plate = dataclasses.replace(plate, names=(SETS, WEIGHTS))
    factor = _with_weights(window.factor, inner)
    return dataclasses.replace(window, factor=factor, plate=plate)


@weighted.rule(Product)
def _product(product: Product, weights: np.ndarray) -> Factor:
    factors = tuple(_with_weights(factor, weights) for factor in product.factors)
    return product.with_children(factors)


@weighted.rule(Calibrated)
def _calibrated(factor: Calibrated, weights: np.ndarray) -> Factor:
    # The constants of the calibration are those of the factor without weights.
    return _with_weights(factor.uncalibrated, weights)


@weighted.rule(Diffusion)
def _diffusion(factor: Diffusion, weights: np.ndarray) -> Factor:
    # The scalar energy of a network is not a sum over entries that could have weights;
    # other energies, and scores, are.
    if factor.parameterization == "energy" or WEIGHTS in factor.fixed:
        return _refuse(factor, weights)
    added = {WEIGHTS: np.asarray(weights, np.float32)}
    return factor.holding({**factor.fixed, **added})  # type: ignore[dict-item]
