"""Products over sets of cells written out, for those passes that ask of every entry of a site what is known of it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from composeprob.ir.cells import Cells
from composeprob.ir.nodes import Leaf, Node, Plate, Product, rewrite_leaves


def unrolled(node: Node) -> Node:
    """The same expression with one factor for each set of cells in the place of a plate over sets."""
    if isinstance(node, Leaf):
        return node
    if isinstance(node, Product) and node.plate is not None and node.plate.cells:
        plate, (child,) = node.plate, node.children
        each = (rewrite_leaves(child, partial(_at, plate=plate, i=i)) for i in range(plate.count))
        node = replace(node, children=tuple(each), plate=None)
    return replace(node, children=tuple(map(unrolled, node.children)))


def _at(leaf: Leaf, plate: Plate, i: int) -> Leaf:
    """The leaf at set i of the outermost plate over sets that it stands in."""
    assert isinstance(leaf.region, Cells)
    others = tuple(own for own in leaf.plates if own != plate)
    fixed = {name: value[i] if name in plate.names else value for name, value in leaf.factor.fixed.items()}
    return replace(leaf, factor=leaf.factor.holding(fixed), region=leaf.region.row(i), plates=others)
