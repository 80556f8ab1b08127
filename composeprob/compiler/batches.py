"""The leaves of a program, evaluated in batches: one call for all uses of one network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from composeprob.compiler.expressions import NodeValue, Scattered
from composeprob.factors.base import LeafFactor
from composeprob.factors.nodes import Plate
from composeprob.factors.window import Cells, Region
from composeprob.ir.nodes import Group, dimension_of, total_count
from composeprob.ir.normaliser import Normaliser
from composeprob.schedule import Noise


class Batch(eqx.Module):
    """One network with every use of it, evaluated together.

    Attributes:
        factor: the leaf, without the conditions given to it.
        own_noise: its own noise at each level of the program, fields (K,); None for the program's own.
        conditions: ``{name: (rows, …)}``, a row for each evaluation: of a member in a plate, as many as that counts.
        places: the site, region and plates of each member.
        latent: the site and leaf of the program that ``factor`` was when it was compiled, where latents move it.
    """

    factor: LeafFactor
    own_noise: Noise | None
    conditions: dict[str, Array]
    places: tuple[tuple[str, Region | Cells | None, tuple[Plate, ...]], ...] = eqx.field(static=True)
    latent: tuple[str, int] | None = eqx.field(static=True)

    def __call__(self, xs: dict[str, Array], noise: Noise) -> list[NodeValue]:
        """The value of every member, with an axis for each of its plates in front."""
        noise_of_leaf = self.noise_at(noise)
        ratio = noise_of_leaf.alpha / noise.alpha
        shape = self.factor.event_shape
        events = [ratio * project(xs[site], region, shape) for site, region, _ in self.places]
        sizes = [total_count(plates) for *_, plates in self.places]
        sets = any(plate.cells for *_, plates in self.places for plate in plates)
        if sum(sizes) == 1:
            conditions = {name: values[0] for name, values in self.conditions.items()}
            log_f, score = self.factor.evaluate(events[0], noise_of_leaf, conditions)
            log_f, score = None if log_f is None else log_f[None], score[None]
        elif not sets and all(place[:2] == self.places[0][:2] for place in self.places):
            # One x for all rows: what depends on x alone is computed once.
            rows = partial(self.factor.evaluate, events[0], noise_of_leaf)
            log_f, score = in_blocks(rows, self.conditions, sum(sizes), self.block)
        else:
            x = jnp.concatenate([in_rows(e, place[2], shape) for e, place in zip(events, self.places, strict=True)])
            log_f, score = in_blocks(
                lambda row: self.factor.evaluate(row[0], noise_of_leaf, row[1]),
                (x, self.conditions),
                sum(sizes),
                self.block,
            )
        # A density of x is rescaled with x; a bounded potential (top power 0) is a function of x and is not.
        jacobian = self.factor.traits.top_power * math.prod(shape) * jnp.log(ratio)
        growth = cast(Normaliser, self.factor).growth(noise_of_leaf) if self.factor.traits.constant else 0.0
        rate, marginal = growth / noise.sigma**2, "exact_marginals" in self.factor.capabilities
        outputs, start = [], 0
        for (site, region, plates), size in zip(self.places, sizes, strict=True):
            value = None if log_f is None else in_plates(log_f[start : start + size], plates) + jacobian
            own_score = ratio * in_plates(score[start : start + size], plates)
            axes = tuple(plate.count for plate in plates)
            rates = jnp.broadcast_to(rate, axes)
            excess = jnp.full(axes, dimension_of(self.factor) - xs[site].size, rates.dtype)
            whole_score = placed(own_score, region, plates, xs[site].shape)
            outputs.append(NodeValue(value, whole_score, rates if marginal else None, excess))
            start += size
        return outputs

    def noise_at(self, noise: Noise) -> Noise:
        """The factor's own noise at a level of the program."""
        if self.own_noise is None:
            return noise
        return jax.tree.map(lambda a: jnp.asarray(a)[noise.index], self.own_noise)

    @property
    def block(self) -> int | None:
        """How many rows are evaluated at once."""
        return min((plate.block for *_, plates in self.places for plate in plates if plate.block), default=None)


def in_plates(rows: Array, plates: tuple[Plate, ...]) -> Array:
    """The rows of one member with an axis for each of its plates in the place of theirs. `jax.vmap` moves axes about
    for a reshape, which is left out where it can be."""
    if len(plates) < 2:
        return rows if plates else rows[0]
    return rows.reshape(*(plate.count for plate in plates), *rows.shape[1:])


Rows = TypeVar("Rows")
Values = TypeVar("Values")


def in_rows(events: Array, plates: tuple[Plate, ...], shape: tuple[int, ...]) -> Array:
    """A row for each value of a member's plates, of its events with an axis for each of those over sets of cells."""
    leading = tuple(plate.count if plate.cells else 1 for plate in plates)
    counts = tuple(plate.count for plate in plates)
    return jnp.broadcast_to(events.reshape(leading + shape), counts + shape).reshape(-1, *shape)


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


def placed(
    score: Array, region: Region | Cells | None, plates: tuple[Plate, ...], shape: tuple[int, ...]
) -> Array | Scattered:
    """Pᵀ s of every value of a member's plates: the leaf's score as a function of the whole site."""
    if not isinstance(region, Cells):
        place = partial(embed, region=region, site_shape=shape)
        for _ in plates:
            place = jax.vmap(place)
        return place(score)
    own = region.array  # with an axis for each of the plates over sets, as all others have too
    ones = tuple(plate.count if plate.cells else 1 for plate in plates)
    axes = tuple(plate.count for plate in plates)
    cells = jnp.broadcast_to(own.reshape(*ones, own.shape[-1]), (*axes, own.shape[-1]))
    scattered = Scattered(score.reshape(cells.shape), cells, shape, in_order(own, shape))
    return scattered if axes else scattered.dense


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

    def __init__(self, batches: tuple[Batch, ...], xs: dict[str, Array], noise: Noise):
        super().__init__()
        self.evaluate = lambda b: batches[b](xs, noise)

    def __missing__(self, slot: tuple[int, int]) -> NodeValue:
        self.update({(slot[0], m): output for m, output in enumerate(self.evaluate(slot[0]))})
        return self[slot]


def batch_of(group: Group) -> Batch:
    """One batch of the graph, its conditions stacked."""
    places = tuple((member.site, member.region, member.plates) for member in group.members)
    conditions = stacked([member.conditions for member in group.members], [plates for *_, plates in places])
    return Batch(group.factor.holding({}), group.own_noise, conditions, places, group.latent)


def stacked(conditions: Sequence[Mapping[str, Array]], plates: Sequence[tuple[Plate, ...]]) -> dict[str, Array]:
    """The conditions of members as rows: the axes of their plates, then the members, become one axis."""

    def rows(value: Array, plates: tuple[Plate, ...]) -> Array:
        return jnp.reshape(value, (total_count(plates), *jnp.shape(value)[len(plates) :]))

    return {
        name: jnp.concatenate([rows(c[name], each) for c, each in zip(conditions, plates, strict=True)])
        for name in conditions[0]
    }
