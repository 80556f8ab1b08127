"""The rules of the intermediate representation, checked after each pass. A broken rule
is a defect of a pass."""

from __future__ import annotations

import math
from collections.abc import Callable

from composeprob.errors import VerificationError
from composeprob.factors.nodes import Combination, Product, walk
from composeprob.factors.passes import Pass
from composeprob.factors.window import Cells
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
    reached = STAGES.index(stage)

    def rule(holds: bool, message: str) -> None:
        if not holds:
            raise VerificationError(
                f"After pass '{stage}': {message}.",
                fix="please report this as a bug of composeprob.",
            )

    names = (
        [s.name for s in graph.sites]
        + [s.name for s in graph.statics]
        + [o.name for o in graph.observations]
    )
    rule(len(set(names)) == len(names), f"names are not unique: {names}")
    rule(reached < 2 or graph.schedule is not None, "the graph has no schedule")
    used: set[tuple[int, int]] = set()
    for site in graph.sites:
        for node in walk(site.root):
            if isinstance(node, Combination):
                _combination(node, reached, rule)
            else:
                rule(isinstance(node, Leaf), f"an unknown node {type(node).__name__}")
        for leaf in leaves(site.root):
            _region(leaf, site, rule)
            if reached >= 2 and leaf.own_noise is not None:
                levels = graph.schedule.num_levels if graph.schedule else 0
                rule(
                    leaf.own_noise.alpha.shape == (levels,),
                    f"leaf {leaf.name} is not aligned to {levels} levels",
                )
            if reached >= 3:
                rule(leaf.slot is not None, f"leaf {leaf.name} has no slot")
                group, member = leaf.slot or (0, 0)
                exists = 0 <= group < len(graph.groups) and 0 <= member < len(
                    graph.groups[group].members
                )
                rule(exists, f"slot {leaf.slot} does not exist")
                use = graph.groups[group].members[member]
                here = use == (site.name, leaf.region, leaf.plates)
                rule(here, f"slot {leaf.slot} of leaf {leaf.name} reads another place")
                used.add((group, member))
    for o in graph.observations:
        rule(
            reached < STAGES.index("anneal") or o.anneal is not None,
            f"observation {o.name} has no policy",
        )
    if reached >= 3:
        slots = {
            (g, m)
            for g, group in enumerate(graph.groups)
            for m in range(len(group.members))
        }
        rule(used == slots, f"slots {sorted(slots - used)} are evaluated but not used")
    return graph


def _region(leaf: Leaf, site: Site, rule: Rule) -> None:
    region, event = leaf.region, leaf.factor.event_shape
    if region is None:
        rule(
            event == site.shape,
            f"events of {leaf.name} have another shape than {site.name}",
        )
        return
    if isinstance(region, Cells):
        sets = tuple(plate.count for plate in leaf.plates if plate.cells)
        cells = region.array
        rule(
            cells.shape == (*sets, math.prod(event)),
            f"the cells of {leaf.name} are no events of its plates",
        )
        rule(
            cells.min() >= 0 and cells.max() < math.prod(site.shape),
            f"cells of {leaf.name} leave site {site.name}",
        )
        return
    axes = {len(region.offset), len(region.extent), len(region.block), len(site.shape)}
    rule(
        len(axes) == 1,
        f"the region of {leaf.name} has other axes than site {site.name}",
    )
    inside = all(
        o >= 0 and o + e <= s and b > 0 and e % b == 0
        for o, e, b, s in zip(
            region.offset, region.extent, region.block, site.shape, strict=True
        )
    )
    rule(inside, f"the region of {leaf.name} leaves site {site.name}")
    holds = math.prod(region.extent) == math.prod(event) * region.averaged
    rule(holds, f"the region of {leaf.name} does not hold one event of shape {event}")


def _combination(node: Combination, reached: int, rule: Rule) -> None:
    numbers, kind = node.numbers, type(node).__name__
    rule(len(node.children) > 0, f"an empty {kind}")
    if node.plate is not None:
        rule(len(node.children) == 1, "a plate over more than one child")
        rule(
            any(node.plate in leaf.plates for leaf in leaves(node)),
            "a plate that nothing runs over",
        )
    counted = len(node.children) if node.plate is None else node.plate.count
    rule(
        len(numbers) == counted,
        f"a {kind} with {len(numbers)} numbers for its children",
    )
    rule(
        all(math.isfinite(n) for n in numbers),
        f"a {kind} with a number that is not finite",
    )
    rules_of.rule_for(node)(node, reached >= 1, rule)


rules_of = Pass[None]("rules", lambda node, normal, rule: None)
"""Further rules of a combination (node, whether it is in normal form, how to assert a
rule)."""


@rules_of.rule(Product)
def _product(node: Product, normal: bool, rule: Rule) -> None:
    rule(
        node.plate is None or len(set(node.powers)) == 1,
        "a product over data with different powers",
    )
    if (growth := node.growth) is not None:
        clean = growth(growth.clean).tolist()
        rule(
            node.plate is None and tuple(clean) == node.powers,
            "exponents grow to others than the powers",
        )
    if normal:
        flat = all(
            term is child for child in node.children for term, _ in child.split()
        )
        rule(flat, "a product holds a product that is none over data")
        rule(0.0 not in node.powers, "a product holds a zero power")
        rule(node.powers != (1.0,), "a product is a single child to the power 1")
