"""Makes leaves with one network ONE batched evaluation; equal leaves are evaluated once."""

from __future__ import annotations

from dataclasses import replace

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from composeprob.factors.base import Factor
from composeprob.factors.nodes import rewrite_leaves
from composeprob.ir.nodes import Graph, Group, Leaf, Member, Site, same_conditions, same_network, spread


def share(graph: Graph) -> Graph:
    """Give every leaf a slot (group, member): one group for each network, one member for each distinct use of it."""
    groups: list[Group] = []

    def slot_of(leaf: Leaf, site: Site) -> tuple[int, int]:
        conditions = spread(leaf.factor.call_conditions(), leaf.plates)
        member = Member(site.name, leaf.region, conditions, leaf.plates)
        for g, group in enumerate(groups):
            if not _joins(leaf, member, group):
                continue
            for m, known in enumerate(group.members):
                if _equal(member, known):
                    return g, m
            groups[g] = replace(group, members=(*group.members, member))
            return g, len(group.members)
        groups.append(Group(leaf.factor, leaf.own_noise, (member,), leaf.label, leaf.latent))
        return len(groups) - 1, 0

    def rewrite(root: Factor, site: Site) -> Factor:
        return rewrite_leaves(root, lambda leaf: replace(leaf, slot=slot_of(leaf, site)))

    shared = graph.map_roots(rewrite)
    counted = [g for g in groups if not g.factor.traits.constant]
    batches = [f"{g.rows} × {g.name}" for g in counted if g.rows > 1]
    sentence = f"{sum(g.rows for g in counted)} evaluations in {len(counted)} batches"
    if batches:
        sentence += f" ({', '.join(batches)} as one)"
    return replace(shared, groups=tuple(groups)).noted("share", sentence)


def _joins(leaf: Leaf, member: Member, group: Group) -> bool:
    """Whether a use can be one row of the group's batch: one network, one noise, conditions of the same shapes."""
    return (
        leaf.latent == group.latent
        and same_network(leaf.factor, group.factor)
        and bool(eqx.tree_equal(leaf.own_noise, group.own_noise))
        and _signature(member) == _signature(group.members[0])
    )


def _signature(member: Member) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    axes = len(member.plates)
    return {name: (jnp.shape(value)[axes:], jnp.result_type(value)) for name, value in member.conditions.items()}


def _equal(a: Member, b: Member) -> bool:
    same_place = (a.site, a.region, a.plates) == (b.site, b.region, b.plates)
    return same_place and same_conditions(a.conditions, b.conditions)
