"""Makes leaves with one network ONE batched evaluation; equal leaves are evaluated
once."""

from __future__ import annotations

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from composeprob.factors.factor import Factor
from composeprob.factors.nodes import Plate, rewrite_leaves
from composeprob.ir.leaves import (
    Graph,
    Group,
    Leaf,
    Member,
    Site,
    same_conditions,
    same_network,
    spread,
)


def share(graph: Graph) -> Graph:
    """Give every leaf a slot (group, member): one group for each network, one member
    for each distinct use of it."""
    groups, names = list[Group](), list[str]()

    def slot_of(leaf: Leaf, site: Site) -> tuple[int, int]:
        member = Member(site.name, leaf.region, leaf.plates)
        conditions = jax.tree.map(
            jnp.asarray, spread(leaf.factor.call_conditions(), leaf.plates)
        )
        for g, group in enumerate(groups):
            if not _joins(leaf, conditions, group):
                continue
            for m, known in enumerate(
                zip(group.members, group.conditions, strict=True)
            ):
                if member == known[0] and same_conditions(conditions, known[1]):
                    return g, m
            more = (*group.members, member), (*group.conditions, conditions)
            groups[g] = replace(group, members=more[0], conditions=more[1])
            return g, len(group.members)
        groups.append(
            Group(
                leaf.factor.holding({}),
                leaf.own_noise,
                (conditions,),
                (member,),
                leaf.latent,
            )
        )
        names.append(leaf.label)
        return len(groups) - 1, 0

    def rewrite(root: Factor, site: Site) -> Factor:
        return rewrite_leaves(
            root, lambda leaf: replace(leaf, slot=slot_of(leaf, site))
        )

    shared = graph.map_roots(rewrite)
    counted = [
        (g.rows, name)
        for g, name in zip(groups, names, strict=True)
        if not g.factor.traits.constant
    ]
    batches = [f"{rows} × {name}" for rows, name in counted if rows > 1]
    sentence = (
        f"{sum(rows for rows, _ in counted)} evaluations in {len(counted)} batches"
    )
    if batches:
        sentence += f" ({', '.join(batches)} as one)"
    return replace(shared, groups=tuple(groups)).noted("share", sentence)


def _joins(leaf: Leaf, conditions: dict[str, Array], group: Group) -> bool:
    """Whether a use can be one row of the group's batch: one network, one noise,
    conditions of the same shapes."""
    return (
        leaf.latent == group.latent
        and same_network(leaf.factor, group.factor)
        and bool(eqx.tree_equal(leaf.own_noise, group.own_noise))
        and _signature(conditions, leaf.plates)
        == _signature(group.conditions[0], group.members[0].plates)
    )


def _signature(
    conditions: dict[str, Array], plates: tuple[Plate, ...]
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    return {
        name: (value.shape[len(plates) :], value.dtype)
        for name, value in conditions.items()
    }
