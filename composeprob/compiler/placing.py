"""Put a user's expression at its place in a site: every leaf learns the site's shape,
the region that it sees and the plates that it stands in."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from composeprob.factors.calibrated import CalibratedExpression
from composeprob.factors.factor import Factor, LeafFactor
from composeprob.factors.nodes import SETS, Combination, Plate, Product
from composeprob.factors.passes import Pass
from composeprob.factors.window import Cells, Region, Window, listed
from composeprob.ir.leaves import Leaf, Normaliser
from composeprob.ir.render import index


@dataclass(frozen=True)
class Place:
    """The place of a node: its site's shape, the region that it sees (None for all of
    it), the plates that it stands in."""

    shape: tuple[int, ...]
    region: Region | Cells | None = None
    plates: tuple[Plate, ...] = ()


placed_of = Pass[Factor]("placed")
"""Rules (node, `Place`) for the node with every leaf at its place."""


def placed(node: Factor, at: Place) -> Factor:
    """A user's expression at its place in a site."""
    return placed_of.rule_for(node)(node, at)


@placed_of.rule(LeafFactor)
def _leaf(factor: LeafFactor, at: Place) -> Leaf:
    conditions = set(factor.traits.conditions)
    plates = tuple(
        plate for plate in at.plates if plate.cells or set(plate.names) & conditions
    )
    # A condition that runs over the plate at depth i is printed with that index.
    running = {}
    for depth, plate in enumerate(at.plates):
        for name in plate.names:
            running[name] = f"{name}_{index(depth)}"
    given = tuple(
        f"{name}={running.get(name, value)}"
        for name, value in factor.shown_conditions.items()
    )
    return Leaf(
        factor=factor,
        event_shape=at.shape,
        region=at.region,
        label=factor.label,
        conditions=given,
        plates=plates,
    )


@placed_of.rule(Combination)
def _combination(node: Combination, at: Place) -> Factor:
    inner = at
    if node.plate:
        inner = replace(at, plates=(*at.plates, node.plate))
    factors = tuple(placed(factor, inner) for factor in node.factors)
    return replace(node, factors=factors, event_shape=at.shape)


@placed_of.rule(CalibratedExpression)
def _calibrated(node: CalibratedExpression, at: Place) -> Product:
    # c(λ)·f(x): the constant is a leaf, so that its rate is one too.
    factors = (placed(node.factor, at), placed(Normaliser(node), at))
    return Product(
        factors=factors, numbers=(1.0, 1.0), event_shape=at.shape, calibrated=True
    )


@placed_of.rule(Window)
def _window(node: Window, at: Place) -> Factor:
    if isinstance(node.region, Cells):
        return _cell_window(node, at)
    if node.event_shape == node.factor.event_shape:
        # A window over the whole canvas changes nothing.
        return placed(node.factor, at)
    region = _inside(at.region, node.region, node.entries)
    return placed(node.factor, replace(at, region=region))


def _cell_window(node: Window, at: Place) -> Factor:
    """A window over one set of cells, or a product over many in a plate."""
    cells = node.entries
    depth = sum(plate.cells for plate in at.plates)
    shown = f"cells_{index(len(at.plates))}"
    if node.plate is None and not depth:
        shown = listed(cells)
    outer = at.region
    if outer is None:
        outer = Cells.from_array(np.arange(math.prod(at.shape)))
    elif isinstance(outer, Region):
        outer = Cells.from_array(outer.entries(at.shape))
    inner = replace(at, region=outer.pick(cells, shown))
    if node.plate is None:
        return placed(node.factor, inner)
    # Sets of cells within sets of cells are plates of different names.
    sets = f"{SETS} {depth + 1}" if depth else SETS
    plate = replace(node.plate, names=(sets, *node.plate.names[1:]))
    factor = placed(node.factor, replace(inner, plates=(*at.plates, plate)))
    numbers = (1.0,) * plate.count
    return Product(
        factors=(factor,), numbers=numbers, event_shape=at.shape, plate=plate
    )


def _inside(
    outer: Region | Cells | None, window: Region, entries: np.ndarray
) -> Region | Cells:
    """The region of the site that a window inside of another region sees: offsets and
    blocks compose. ``entries`` are the window's entries of the outer event."""
    if outer is None:
        return window
    if isinstance(outer, Cells):
        return outer.pick(entries, outer.shown)
    # Axes of plates stand in front of the event's, and stay as they are.
    lead = len(outer.offset) - len(window.extent)
    offset = list(outer.offset[:lead])
    extent = list(outer.extent[:lead])
    block = list(outer.block[:lead])
    for axis, width in enumerate(outer.block[lead:]):
        # One entry of the outer event is an average over `width` entries of the site.
        start = outer.offset[lead + axis]
        offset.append(start + window.offset[axis] * width)
        extent.append(window.extent[axis] * width)
        block.append(window.block[axis] * width)
    return Region(tuple(offset), tuple(extent), tuple(block))
