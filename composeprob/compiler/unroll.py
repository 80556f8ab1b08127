"""Products over sets of cells written out, for those passes that ask of every entry of a site what is known of it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import cast

from composeprob.factors.base import Factor
from composeprob.factors.nodes import Plate, Product, plate_of, rewrite_leaves
from composeprob.ir.cells import Cells
from composeprob.ir.nodes import Leaf


def unrolled(node: Factor) -> Factor:
    """The same expression with one factor for each set of cells in the place of a plate over sets."""
    plate = plate_of(node)
    if plate is not None and plate.cells:
        each = (rewrite_leaves(node.children[0], partial(_leaf_of_set, plate=plate, i=i)) for i in range(plate.count))
        node = replace(cast(Product, node), factors=tuple(each), plate=None)
    return node.with_children(tuple(map(unrolled, node.children))) if node.children else node


def _leaf_of_set(leaf: Leaf, plate: Plate, i: int) -> Leaf:
    """The leaf at set i of the outermost plate over sets that it stands in."""
    assert isinstance(leaf.region, Cells)
    others = tuple(other for other in leaf.plates if other != plate)
    fixed = {name: value[i] if name in plate.names else value for name, value in leaf.factor.fixed.items()}
    return replace(leaf, factor=leaf.factor.holding(fixed), region=leaf.region.row(i), plates=others)
