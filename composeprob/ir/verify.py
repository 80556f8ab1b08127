"""The rules of the intermediate representation, checked after each pass. A broken rule
is a defect of a pass."""

from __future__ import annotations

import math
from collections.abc import Callable

from composeprob.errors import VerificationError
from composeprob.factors.nodes import Combination, Product, walk
from composeprob.factors.passes import Pass
from composeprob.factors.window import Cells, Region
from composeprob.ir.leaves import Graph, Leaf, Site, leaves

Rule = Callable[[bool, str], None]
STAGES = ("build", "normalise", "align", "share", "grow", "check", "anneal")


def verify(graph: Graph, stage: str) -> Graph:
    """The graph itself, or a `VerificationError`.

    Rules from ``build`` on: one finite power per child of a product and one finite
    log-weight per child of a mixture, neither empty; over a plate one child, some leaf
    of which runs over it, and a number for each of its values, in a product the same;
    regions lie inside their site and hold one event of their leaf, cells one for each
    of the plates over sets; sites have different names. From ``normalise`` on: no
    product holds a product or a zero power, no product is a single child to the power
    1. From ``align`` on: a schedule, and each leaf's own noise has one entry per level.
    From ``share`` on: each leaf has a slot that exists and reads the leaf's site and
    region, and each slot is used. From ``grow`` on: exponents that grow are the powers
    at level 0. From ``anneal`` on: every observation has a policy.
    """

    def reached(name: str) -> bool:
        return STAGES.index(stage) >= STAGES.index(name)

    def rule(holds: bool, message: str) -> None:
        if not holds:
            raise VerificationError(
                f"After pass '{stage}': {message}.",
                fix="please report this as a bug of composeprob.",
            )

    _names(graph, rule)
    if reached("align"):
        rule(graph.schedule is not None, "the graph has no schedule")
    for site in graph.sites:
        _site(site, graph, reached, rule)
    if reached("anneal"):
        _policies(graph, rule)
    if reached("share"):
        _unused_slots(graph, rule)
    return graph


def _names(graph: Graph, rule: Rule) -> None:
    """The names of a graph's statements are unique."""
    names = [site.name for site in graph.sites]
    names += [static.name for static in graph.statics]
    names += [observation.name for observation in graph.observations]
    rule(len(set(names)) == len(names), f"names are not unique: {names}")


def _site(site: Site, graph: Graph, reached: Callable[[str], bool], rule: Rule) -> None:
    """The nodes of a site, then its leaves: their rules presume sound nodes."""
    for node in walk(site.root):
        if isinstance(node, Combination):
            _combination(node, reached("normalise"), rule)
        else:
            rule(isinstance(node, Leaf), f"an unknown node {type(node).__name__}")
    for leaf in leaves(site.root):
        _place(leaf, site, rule)
        if reached("align"):
            _levels(leaf, graph, rule)
        if reached("share"):
            _slot(leaf, site, graph, rule)


def _levels(leaf: Leaf, graph: Graph, rule: Rule) -> None:
    """A leaf's own noise has an entry for each level."""
    if leaf.own_noise is None:
        return
    levels = graph.levels.num_levels
    aligned = leaf.own_noise.alpha.shape == (levels,)
    rule(aligned, f"leaf {leaf.name} is not aligned to {levels} levels")


def _slot(leaf: Leaf, site: Site, graph: Graph, rule: Rule) -> None:
    """A leaf's slot exists and reads the leaf's place."""
    rule(leaf.slot is not None, f"leaf {leaf.name} has no slot")
    rule(leaf.slot in _slots(graph), f"slot {leaf.slot} does not exist")
    # The rules above have raised where there is no slot.
    group, member = leaf.slot or (0, 0)
    use = graph.groups[group].members[member]
    reads_place = use == (site.name, leaf.region, leaf.plates)
    rule(reads_place, f"slot {leaf.slot} of leaf {leaf.name} reads another place")


def _slots(graph: Graph) -> set[tuple[int, int]]:
    """The slots (group, member) of all batches."""
    slots = set()
    for g, group in enumerate(graph.groups):
        slots |= {(g, m) for m in range(len(group.members))}
    return slots


def _unused_slots(graph: Graph, rule: Rule) -> None:
    """Every slot belongs to a leaf."""
    used = {leaf.slot for site in graph.sites for leaf in leaves(site.root)}
    unused = sorted(_slots(graph) - used)
    rule(not unused, f"slots {unused} are evaluated but not used")


def _policies(graph: Graph, rule: Rule) -> None:
    """Each observation has a policy."""
    for observation in graph.observations:
        has_policy = observation.anneal is not None
        rule(has_policy, f"observation {observation.name} has no policy")


def _place(leaf: Leaf, site: Site, rule: Rule) -> None:
    """A leaf's region lies inside its site and holds one event."""
    if leaf.region is None:
        same_shape = leaf.factor.event_shape == site.shape
        rule(same_shape, f"events of {leaf.name} have another shape than {site.name}")
    elif isinstance(leaf.region, Cells):
        _cells(leaf, leaf.region, site, rule)
    else:
        _box(leaf, leaf.region, site, rule)


def _cells(leaf: Leaf, region: Cells, site: Site, rule: Rule) -> None:
    sets = tuple(plate.count for plate in leaf.plates if plate.cells)
    cells = region.array
    one_event_each = cells.shape == (*sets, math.prod(leaf.factor.event_shape))
    rule(one_event_each, f"the cells of {leaf.name} are not events of its plates")
    inside = cells.min() >= 0 and cells.max() < math.prod(site.shape)
    rule(inside, f"cells of {leaf.name} leave site {site.name}")


def _box(leaf: Leaf, region: Region, site: Site, rule: Rule) -> None:
    axes = {len(region.offset), len(region.extent), len(region.block), len(site.shape)}
    same_axes = len(axes) == 1
    rule(same_axes, f"the region of {leaf.name} has other axes than site {site.name}")
    inside = True
    sides = zip(region.offset, region.extent, region.block, site.shape, strict=True)
    for offset, extent, block, size in sides:
        in_site = offset >= 0 and offset + extent <= size
        whole_blocks = block > 0 and extent % block == 0
        inside = inside and in_site and whole_blocks
    rule(inside, f"the region of {leaf.name} leaves site {site.name}")
    event = leaf.factor.event_shape
    holds = math.prod(region.extent) == math.prod(event) * region.averaged
    rule(holds, f"the region of {leaf.name} does not hold one event of shape {event}")


def _combination(node: Combination, normal: bool, rule: Rule) -> None:
    """A number for each of a node's factors, and the rules of its kind."""
    kind = type(node).__name__
    counted = len(node.children)
    rule(counted > 0, f"an empty {kind}")
    if node.plate is not None:
        rule(counted == 1, "a plate over more than one child")
        runs = any(node.plate in leaf.plates for leaf in leaves(node))
        rule(runs, "a plate that nothing runs over")
        counted = node.plate.count
    given = len(node.numbers)
    rule(given == counted, f"a {kind} with {given} numbers for its children")
    finite = all(math.isfinite(number) for number in node.numbers)
    rule(finite, f"a {kind} with a number that is not finite")
    rules_of.rule_for(node)(node, normal, rule)


rules_of = Pass[None]("rules", lambda node, normal, rule: None)
"""Further rules of a combination (the node; True if it is in normal form; a function
that asserts a rule)."""


@rules_of.rule(Product)
def _product(node: Product, normal: bool, rule: Rule) -> None:
    one_power = node.plate is None or len(set(node.powers)) == 1
    rule(one_power, "a product over data with different powers")
    if node.growth is not None:
        growth = node.growth
        at_level_0 = tuple(growth(growth.clean).tolist())
        reaches = node.plate is None and at_level_0 == node.powers
        rule(reaches, "exponents do not grow to the powers")
    if normal:
        flat = True
        for child in node.children:
            # A product over data is its own only term, and may stand in a product.
            flat = flat and all(term is child for term, _ in child.split())
        rule(flat, "a product holds a product that does not run over data")
        rule(0.0 not in node.powers, "a product holds a zero power")
        rule(node.powers != (1.0,), "a product is a single child to the power 1")
