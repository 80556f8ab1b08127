"""Make leaves with one network ONE batched evaluation; equal leaves are evaluated
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
    groups: list[Group] = []
    labels: list[str] = []  # of each group's first leaf

    def slot_of(leaf: Leaf, site: Site) -> tuple[int, int]:
        member = Member(site.name, leaf.region, leaf.plates)
        spread_out = spread(leaf.factor.call_conditions(), leaf.plates)
        conditions = jax.tree.map(jnp.asarray, spread_out)
        for g, group in enumerate(groups):
            if not _joins(leaf, conditions, group):
                continue
            # Another row of the network's batch, or one that is there already.
            m = _place_in(group, member, conditions)
            if m is None:
                m = len(group.members)
                groups[g] = _extended(group, member, conditions)
            return g, m
        # The factor without its conditions, which the group holds member by member.
        groups.append(
            Group(
                leaf.factor.holding({}),
                leaf.own_noise,
                (conditions,),
                (member,),
                leaf.latent,
            )
        )
        labels.append(leaf.label)
        return len(groups) - 1, 0

    def rewrite(root: Factor, site: Site) -> Factor:
        return rewrite_leaves(
            root, lambda leaf: replace(leaf, slot=slot_of(leaf, site))
        )

    shared = graph.map_roots(rewrite)
    evaluations = 0
    num_batches = 0
    batches = []  # of more than one row
    for group, label in zip(groups, labels, strict=True):
        if group.factor.traits.constant:
            continue  # it costs nothing
        evaluations += group.rows
        num_batches += 1
        if group.rows > 1:
            batches.append(f"{group.rows} × {label}")
    sentence = f"{evaluations} evaluations in {num_batches} batches"
    if batches:
        sentence += f" ({', '.join(batches)} as one)"
    return replace(shared, groups=tuple(groups)).noted("share", sentence)


def _place_in(group: Group, member: Member, conditions: dict[str, Array]) -> int | None:
    """Index of the group's member that equals this use; None if no member does."""
    uses = zip(group.members, group.conditions, strict=True)
    for m, (other, values) in enumerate(uses):
        if member == other and same_conditions(conditions, values):
            return m
    return None


def _extended(group: Group, member: Member, conditions: dict[str, Array]) -> Group:
    """The group with one more use."""
    return replace(
        group,
        members=(*group.members, member),
        conditions=(*group.conditions, conditions),
    )


def _joins(leaf: Leaf, conditions: dict[str, Array], group: Group) -> bool:
    """Return whether a use can be a row of the group's batch: it has the same network,
    the same noise, and conditions of the same shapes."""
    first_plates = group.members[0].plates
    return (
        leaf.latent == group.latent
        and same_network(leaf.factor, group.factor)
        and bool(eqx.tree_equal(leaf.own_noise, group.own_noise))
        and _signature(conditions, leaf.plates)
        == _signature(group.conditions[0], first_plates)
    )


def _signature(
    conditions: dict[str, Array], plates: tuple[Plate, ...]
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of each condition's value in one row."""
    return {
        name: (value.shape[len(plates) :], value.dtype)
        for name, value in conditions.items()
    }
