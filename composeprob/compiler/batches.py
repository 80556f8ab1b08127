"""The leaves of a program, evaluated in batches: one call for all uses of one network."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from composeprob.compiler.expressions import NodeValue, Scattered
from composeprob.factors.window import Cells, Region
from composeprob.ir.nodes import Group, Member, dimension_of
from composeprob.ir.normaliser import Normaliser
from composeprob.schedule import Noise


def evaluate(batch: Group, xs: dict[str, Array], noise: Noise) -> list[NodeValue]:
    """The value of every member, with an axis for each of its plates in front."""
    factor, members, noise_of_leaf = batch.factor, batch.members, noise_at(batch, noise)
    ratio = noise_of_leaf.alpha / noise.alpha
    shape = factor.event_shape
    events = [ratio * project(xs[site], region, shape) for site, region, _ in members]
    conditions, sizes = rows_of(batch), [math.prod(member.counts) for member in members]
    plates = [plate for member in members for plate in member.plates]
    block = min((plate.block for plate in plates if plate.block), default=None)
    if sum(sizes) == 1:
        log_f, score = factor.evaluate(events[0], noise_of_leaf, batch.first)
        log_f, score = None if log_f is None else log_f[None], score[None]
    elif not any(plate.cells for plate in plates) and len({member[:2] for member in members}) == 1:
        # One x for all rows: what depends on x alone is computed once.
        rows = partial(factor.evaluate, events[0], noise_of_leaf)
        log_f, score = in_blocks(rows, conditions, sum(sizes), block)
    else:
        x = jnp.concatenate([in_rows(e, member, shape) for e, member in zip(events, members, strict=True)])
        log_f, score = in_blocks(
            lambda row: factor.evaluate(row[0], noise_of_leaf, row[1]), (x, conditions), sum(sizes), block
        )
    # A density of x is rescaled with x; a bounded potential (top power 0) is a function of x and is not.
    jacobian = factor.traits.top_power * math.prod(shape) * jnp.log(ratio)
    growth = cast(Normaliser, factor).growth(noise_of_leaf) if factor.traits.constant else 0.0
    rate, marginal = growth / noise.sigma**2, "exact_marginals" in factor.capabilities
    outputs, start = [], 0
    for member, size in zip(members, sizes, strict=True):
        value = None if log_f is None else in_plates(log_f[start : start + size], member.counts) + jacobian
        own_score = ratio * in_plates(score[start : start + size], member.counts)
        x, rates = xs[member.site], jnp.broadcast_to(rate, member.counts)
        excess = jnp.full(member.counts, dimension_of(factor) - x.size, rates.dtype)
        whole_score = placed(own_score, member, x.shape)
        outputs.append(NodeValue(value, whole_score, rates if marginal else None, excess))
        start += size
    return outputs


def noise_at(batch: Group, noise: Noise) -> Noise:
    """The factor's own noise at a level of the program."""
    if batch.own_noise is None:
        return noise
    return jax.tree.map(lambda a: jnp.asarray(a)[noise.index], batch.own_noise)


def rows_of(batch: Group) -> dict[str, Array]:
    """The conditions of members as rows: the axes of their plates, then the members, become one axis."""

    def rows(value: Array, member: Member) -> Array:
        return jnp.reshape(value, (math.prod(member.counts), *jnp.shape(value)[len(member.plates) :]))

    pairs = list(zip(batch.conditions, batch.members, strict=True))
    return {name: jnp.concatenate([rows(c[name], member) for c, member in pairs]) for name in batch.conditions[0]}


def in_plates(rows: Array, counts: tuple[int, ...]) -> Array:
    """The rows of one member with an axis for each of its plates in the place of theirs. `jax.vmap` moves axes about
    for a reshape, which is left out where it can be."""
    if len(counts) < 2:
        return rows if counts else rows[0]
    return rows.reshape(*counts, *rows.shape[1:])


Rows = TypeVar("Rows")
Values = TypeVar("Values")


def in_rows(events: Array, member: Member, shape: tuple[int, ...]) -> Array:
    """A row for each value of a member's plates, of its events with an axis for each of those over sets of cells."""
    leading = tuple(plate.count if plate.cells else 1 for plate in member.plates)
    return jnp.broadcast_to(events.reshape(leading + shape), member.counts + shape).reshape(-1, *shape)


def in_blocks(function: Callable[[Rows], Values], rows: Rows, size: int, block: int | None) -> Values:
    """The function of every row, traced once: of all rows at once, or block after block. The last block is filled up
    with rows that are computed again."""
    if block is None or block >= size:
        return jax.vmap(function, axis_size=size)(rows)
    number = -(-size // block)
    width = -(-size // number)
    blocks = jax.tree.map(lambda a: jnp.resize(a, (number, width, *a.shape[1:])), rows)
    values = jax.lax.map(jax.vmap(function), blocks)
    return jax.tree.map(lambda a: a.reshape(number * width, *a.shape[2:])[:size], values)


def project(x: Array, region: Region | Cells | None, event_shape: tuple[int, ...]) -> Array:
    """P x: the leaf's event; of cells with an axis for each of the plates over their sets in front."""
    if region is None:
        return x
    if isinstance(region, Cells):
        cells = region.array
        seen = x if in_order(cells, x.shape) else x.ravel()[cells]
        return seen.reshape(cells.shape[:-1] + event_shape)
    cut = x[region.slices]
    if region.averaged > 1:
        pairs = zip(region.extent, region.block, strict=True)
        cut = cut.reshape([n for e, b in pairs for n in (e // b, b)]).mean(axis=tuple(range(1, 2 * cut.ndim, 2)))
    return cut.reshape(event_shape)


def placed(score: Array, member: Member, shape: tuple[int, ...]) -> Array | Scattered:
    """Pᵀ s of every value of a member's plates: the leaf's score as a function of the whole site."""
    _, region, plates = member
    if not isinstance(region, Cells):
        place = partial(embed, region=region, site_shape=shape)
        for _ in plates:
            place = jax.vmap(place)
        return place(score)
    own = region.array  # with an axis for each of the plates over sets, as all others have too
    ones = tuple(plate.count if plate.cells else 1 for plate in plates)
    cells = jnp.broadcast_to(own.reshape(*ones, own.shape[-1]), (*member.counts, own.shape[-1]))
    scattered = Scattered(score.reshape(cells.shape), cells, shape, in_order(own, shape))
    return scattered if plates else scattered.dense


def in_order(cells: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Whether sets of cells, (n, size), are the site's entries one after another."""
    return cells.ndim == 2 and np.array_equal(cells.reshape(-1), np.arange(math.prod(shape)))


def embed(score: Array, region: Region | None, site_shape: tuple[int, ...]) -> Array:
    """Pᵀ s of one member."""
    if region is None:
        return score
    score = score.reshape([e // b for e, b in zip(region.extent, region.block, strict=True)]) / region.averaged
    for axis, b in enumerate(region.block):
        score = jnp.repeat(score, b, axis=axis) if b > 1 else score
    return jnp.zeros(site_shape, score.dtype).at[region.slices].set(score)


class OnDemand(dict[tuple[int, int], NodeValue]):
    """The outputs of the batches by (batch, member), each batch evaluated when one of them is first read."""

    def __init__(self, batches: tuple[Group, ...], xs: dict[str, Array], noise: Noise):
        super().__init__()
        self.evaluate = lambda b: evaluate(batches[b], xs, noise)

    def __missing__(self, slot: tuple[int, int]) -> NodeValue:
        self.update({(slot[0], m): output for m, output in enumerate(self.evaluate(slot[0]))})
        return self[slot]
