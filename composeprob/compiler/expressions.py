"""Lowered expressions: log-density, score and Feynman–Kac rate of every node from those
of the leaves, and these by one call of each network for all of its uses.

The rate r of a density F along the forward diffusion dx = f·x dt + g dW is defined by
∂_t F = 𝓛F − g²·r·F, with 𝓛 the forward Fokker–Planck operator (Skreta et al. 2025,
arXiv 2503.02819). On a site of d entries, with S the node's score:

* a noised marginal of all d entries has r = 0; one that sees only d' of them has r = (f/g²)·(d' − d);
* a constant c that depends on the level alone has r = ∂_λ log c/σ² − (f/g²)·d, with λ the log-SNR;
* a product with powers w_i has r = Σ w_i·r_i + ½(‖S‖² − Σ w_i·‖S_i‖²) + (f/g²)·d·(Σ w_i − 1); where they depend on
  s = σ²/α², which grows by g²/α² a unit of time, less Σ (dw_i/ds)·log f_i/α²;
* a mixture has the average of r_i under the responsibilities.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import PyTree

from composeprob.compiler.latents import stays_normalised
from composeprob.factors.nodes import Combination, Growth, Mixture, Product
from composeprob.factors.passes import Pass
from composeprob.factors.window import Cells, Region
from composeprob.ir.leaves import Group, Leaf, Member, Normaliser, dimension_of, leaves
from composeprob.schedule import Noise

Rows = TypeVar("Rows")
Values = TypeVar("Values")


class Scattered(eqx.Module):
    """Scores of factors that see a few cells each of a site, which are not spread over
    the whole site before they are summed: of n members that would be n² numbers.

    Attributes:
        values: with the axes of plates in front, (…, size).
        cells: what entries of the site these are, (…, size).
        shape: the site's.
        ordered: whether the sets are the site's entries one after another.
    """

    values: Array
    cells: Array
    shape: tuple[int, ...] = eqx.field(static=True)
    ordered: bool = eqx.field(static=True)

    @property
    def dense(self) -> Array:
        """Each as a function of the whole site, (…, *shape)."""
        rows = math.prod(self.cells.shape[:-1])
        cells, values = (a.reshape(rows, -1) for a in (self.cells, self.values))
        zero = jnp.zeros((rows, math.prod(self.shape)), values.dtype)
        put = jax.vmap(
            lambda zero, cells, values: zero.at[cells].set(values, unique_indices=True)
        )
        return put(zero, cells, values).reshape(self.cells.shape[:-1] + self.shape)

    def total(self, over_sets: bool) -> Array | Scattered:
        """The sum over the leading axis, which runs over sets of cells, or over uses of
        the same ones."""
        if over_sets:
            return self.sum
        return Scattered(
            jnp.sum(self.values, axis=0), self.cells[0], self.shape, self.ordered
        )

    @property
    def sum(self) -> Array:
        """The sum of all of them, of the site's shape."""
        if self.ordered and self.values.ndim == 2:
            return self.values.reshape(self.shape)
        zero = jnp.zeros((math.prod(self.shape),), self.values.dtype)
        return zero.at[self.cells].add(self.values).reshape(self.shape)


class NodeValue(eqx.Module):
    """A node at one position.

    Attributes:
        log_density: log of the node; None if score-only.
        score: its gradient, over the site; within a plate over sets of cells possibly
            `Scattered`.
        rate: the part of r that comes from scores; None if the node has no rate.
        excess: the part of r that comes from the drift, in units of f/g²; r = rate +
            (f/g²)·excess.
    """

    log_density: Array | None
    score: PyTree[Array]
    rate: Array | None
    excess: Array


Outputs = Mapping[tuple[int, int], NodeValue]
"""The leaves by (batch, member)."""


class Expression(eqx.Module):
    """A lowered node."""

    @abc.abstractmethod
    def __call__(self, outputs: Outputs, noise: Noise) -> NodeValue:
        """Its value, given the leaves' outputs and the level's noise."""

    @property
    def drawable(self) -> bool:
        """Whether `draw` draws from it exactly: closed forms over a whole site, and
        mixtures of them."""
        return False

    def draw(self, key: Array, batches: tuple[Group, ...], noise: Noise) -> Array:
        """An event of the site at this noise of the program."""
        raise NotImplementedError


class LeafExpression(Expression):
    """Reads one member of one batch."""

    slot: tuple[int, int] = eqx.field(static=True)
    closed_form: bool = eqx.field(static=True)

    def __call__(self, outputs: Outputs, noise: Noise) -> NodeValue:
        return outputs[self.slot]

    @property
    def drawable(self) -> bool:
        return self.closed_form

    def draw(self, key: Array, batches: tuple[Group, ...], noise: Noise) -> Array:
        batch = batches[self.slot[0]]
        marginal: Any = batch.factor.uncalibrated
        noise_of_leaf = noise_at(batch, noise)
        return (
            marginal.at(noise_of_leaf).sample(key) * noise.alpha / noise_of_leaf.alpha
        )


class Operands(eqx.Module):
    """What a product or a mixture combines: its parts, or the one part that stands in a
    plate.

    Attributes:
        parts: the parts.
        plate: of a part in a plate, the slots of the leaves in it, and whether each
            runs over the plate; else None.
        over_sets: whether that plate runs over sets of cells.
    """

    parts: tuple[Expression, ...]
    plate: tuple[tuple[tuple[int, int], bool], ...] | None = eqx.field(static=True)
    over_sets: bool = eqx.field(static=True, default=False)

    def __call__(
        self,
        outputs: Outputs,
        noise: Noise,
        term: Callable[[NodeValue, int], NodeValue],
    ) -> NodeValue:
        """What ``term`` makes of the value and index of every part, along a leading
        axis; None where one has none."""
        if self.plate is not None:
            rows = {slot: outputs[slot] for slot, runs in self.plate if runs}
            others = {slot: outputs[slot] for slot, runs in self.plate if not runs}
            return jax.vmap(
                lambda row: term(self.parts[0]({**others, **row}, noise), 0)
            )(rows)
        terms = [term(part(outputs, noise), i) for i, part in enumerate(self.parts)]
        return NodeValue(
            _stack([t.log_density for t in terms]),
            jnp.stack([dense(t.score) for t in terms]),
            _stack([t.rate for t in terms]),
            jnp.stack([t.excess for t in terms]),
        )


def dense(score: Array | Scattered) -> Array:
    """A score over the whole site."""
    return score.dense if isinstance(score, Scattered) else score


def summed(score: Array | Scattered, shape: tuple[int, ...]) -> Array:
    """The sum of a score over the axes of its plates, of the site's shape."""
    return (
        score.sum
        if isinstance(score, Scattered)
        else jnp.sum(score.reshape(-1, *shape), axis=0)
    )


def _stack(values: list[Array | None]) -> Array | None:
    known = [value for value in values if value is not None]
    return jnp.stack(known) if len(known) == len(values) else None


def parts_of(node: Combination, parts: list[Expression]) -> Operands:
    """What an expression combines, with the slots of what stands in its plate."""
    if node.plate is None:
        return Operands(tuple(parts), None)
    slots = {
        leaf.slot: node.plate in leaf.plates
        for leaf in leaves(node)
        if leaf.slot is not None
    }
    return Operands(tuple(parts), tuple(slots.items()), node.plate.cells)


lower_expression = Pass[Expression]("lower")
"""The executable form of a node over a site of this shape."""


@lower_expression.rule(Leaf)
def _leaf(leaf: Leaf, _: list[Expression], site_shape: tuple[int, ...]) -> Expression:
    assert leaf.slot is not None
    whole = leaf.region is None and not leaf.plates
    return LeafExpression(
        leaf.slot, whole and stays_normalised(leaf.factor.uncalibrated)
    )


class ProductExpression(Expression):
    """Π_i part_i^{w_i}; the powers, of a plate one for all, are arrays, so other powers
    reuse the compiled code."""

    parts: Operands
    powers: Array | Growth
    size: int = eqx.field(static=True)

    def __call__(self, outputs: Outputs, noise: Noise) -> NodeValue:
        powers, slopes = self.powers, dict[int, Array]()
        if isinstance(powers, Growth):
            growing, variance = powers.growing, noise.variance
            powers, slope = jax.jvp(powers, (variance,), (jnp.ones_like(variance),))
            slopes = {i: slope[i] for i in growing}

        def term(value: NodeValue, i: int) -> NodeValue:
            w, squared = powers[i], _squared(value.score)
            log_density = None if value.log_density is None else w * value.log_density
            rate = None if value.rate is None else w * (value.rate - 0.5 * squared)
            if rate is not None and i in slopes:
                assert value.log_density is not None  # no other exponent grows
                rate = rate - slopes[i] * value.log_density / noise.alpha**2
            return NodeValue(
                log_density,
                _times(w, value.score),
                rate,
                w * (value.excess + self.size),
            )

        def total_of(terms: Array | Scattered) -> Array | Scattered:
            return (
                terms.total(self.parts.over_sets)
                if isinstance(terms, Scattered)
                else jnp.sum(terms, axis=0)
            )

        terms = self.parts(outputs, noise, term)
        total: NodeValue = jax.tree.map(
            total_of, terms, is_leaf=lambda node: isinstance(node, Scattered)
        )
        rate = None if total.rate is None else total.rate + 0.5 * _squared(total.score)
        return NodeValue(total.log_density, total.score, rate, total.excess - self.size)


def _squared(score: Array | Scattered) -> Array:
    return jnp.sum((score.values if isinstance(score, Scattered) else score) ** 2)


def _times(w: Array, score: Array | Scattered) -> Array | Scattered:
    return (
        replace(score, values=w * score.values)
        if isinstance(score, Scattered)
        else w * score
    )


@lower_expression.rule(Product)
def _product(
    node: Product, parts: list[Expression], site_shape: tuple[int, ...]
) -> Expression:
    given = node.growth or np.asarray(node.powers[:1] if node.plate else node.powers)
    powers = jax.tree.map(lambda a: jnp.asarray(a, jnp.result_type(float)), given)
    return ProductExpression(parts_of(node, parts), powers, math.prod(site_shape))


class MixtureExpression(Expression):
    """Σ_i exp(l_i)·part_i: score and rate are averages under the responsibilities."""

    parts: Operands
    log_weights: Array
    shares: bool = eqx.field(static=True)

    @property
    def drawable(self) -> bool:
        return (
            self.shares
            and self.parts.plate is None
            and all(part.drawable for part in self.parts.parts)
        )

    def draw(self, key: Array, batches: tuple[Group, ...], noise: Noise) -> Array:
        choice, rest = jax.random.split(key)
        return drawn(
            jax.random.categorical(choice, self.log_weights),
            self.parts.parts,
            rest,
            batches,
            noise,
        )

    def __call__(self, outputs: Outputs, noise: Noise) -> NodeValue:
        values = self.parts(
            outputs, noise, lambda value, _: replace(value, score=dense(value.score))
        )
        assert values.log_density is not None
        joint = self.log_weights + values.log_density
        responsibilities = jax.nn.softmax(joint)

        def mean(values: Array) -> Array:
            return jnp.tensordot(responsibilities, values, axes=1, precision="highest")

        rate = None if values.rate is None else mean(values.rate)
        return NodeValue(
            jax.nn.logsumexp(joint), mean(values.score), rate, mean(values.excess)
        )


@lower_expression.rule(Mixture)
def _mixture(
    node: Mixture, parts: list[Expression], site_shape: tuple[int, ...]
) -> Expression:
    log_weights = jnp.asarray(node.log_weights, jnp.result_type(float))
    return MixtureExpression(parts_of(node, parts), log_weights, node.calibrated)


def drawn(
    which: Array,
    parts: Sequence[Expression],
    key: Array,
    batches: tuple[Group, ...],
    noise: Noise,
) -> Array:
    """A draw from one of the parts."""
    return jnp.stack([part.draw(key, batches, noise) for part in parts])[which]


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
    elif (
        not any(plate.cells for plate in plates)
        and len({member[:2] for member in members}) == 1
    ):
        # One x for all rows: what depends on x alone is computed once.
        rows = partial(factor.evaluate, events[0], noise_of_leaf)
        log_f, score = in_blocks(rows, conditions, sum(sizes), block)
    else:
        x = jnp.concatenate(
            [
                in_rows(e, member, shape)
                for e, member in zip(events, members, strict=True)
            ]
        )
        log_f, score = in_blocks(
            lambda row: factor.evaluate(row[0], noise_of_leaf, row[1]),
            (x, conditions),
            sum(sizes),
            block,
        )
    # A density of x is rescaled with x; a bounded potential (top power 0) is a function
    # of x and is not.
    jacobian = factor.traits.top_power * math.prod(shape) * jnp.log(ratio)
    growth = (
        cast(Normaliser, factor).growth(noise_of_leaf)
        if factor.traits.constant
        else 0.0
    )
    rate, marginal = growth / noise.sigma**2, "exact_marginals" in factor.capabilities
    outputs, start = [], 0
    for member, size in zip(members, sizes, strict=True):
        value = (
            None
            if log_f is None
            else in_plates(log_f[start : start + size], member.counts) + jacobian
        )
        own_score = ratio * in_plates(score[start : start + size], member.counts)
        x, rates = xs[member.site], jnp.broadcast_to(rate, member.counts)
        excess = jnp.full(member.counts, dimension_of(factor) - x.size, rates.dtype)
        whole_score = placed(own_score, member, x.shape)
        outputs.append(
            NodeValue(value, whole_score, rates if marginal else None, excess)
        )
        start += size
    return outputs


def noise_at(batch: Group, noise: Noise) -> Noise:
    """The factor's own noise at a level of the program."""
    if batch.own_noise is None:
        return noise
    return jax.tree.map(lambda a: jnp.asarray(a)[noise.index], batch.own_noise)


def rows_of(batch: Group) -> dict[str, Array]:
    """The conditions of members as rows: the axes of their plates, then the members,
    become one axis."""

    def rows(value: Array, member: Member) -> Array:
        return jnp.reshape(
            value, (math.prod(member.counts), *jnp.shape(value)[len(member.plates) :])
        )

    pairs = list(zip(batch.conditions, batch.members, strict=True))
    return {
        name: jnp.concatenate([rows(c[name], member) for c, member in pairs])
        for name in batch.conditions[0]
    }


def in_plates(rows: Array, counts: tuple[int, ...]) -> Array:
    """The rows of one member with an axis for each of its plates in the place of
    theirs. `jax.vmap` moves axes about for a reshape, which is left out where it can
    be."""
    if len(counts) < 2:
        return rows if counts else rows[0]
    return rows.reshape(*counts, *rows.shape[1:])


def in_rows(events: Array, member: Member, shape: tuple[int, ...]) -> Array:
    """A row for each value of a member's plates, of its events with an axis for each of
    those over sets of cells."""
    leading = tuple(plate.count if plate.cells else 1 for plate in member.plates)
    return jnp.broadcast_to(
        events.reshape(leading + shape), member.counts + shape
    ).reshape(-1, *shape)


def in_blocks(
    function: Callable[[Rows], Values], rows: Rows, size: int, block: int | None
) -> Values:
    """The function of every row, traced once: of all rows at once, or block after
    block. The last block is filled up with rows that are computed again."""
    if block is None or block >= size:
        return jax.vmap(function, axis_size=size)(rows)
    number = -(-size // block)
    width = -(-size // number)
    blocks = jax.tree.map(lambda a: jnp.resize(a, (number, width, *a.shape[1:])), rows)
    values = jax.lax.map(jax.vmap(function), blocks)
    return jax.tree.map(
        lambda a: a.reshape(number * width, *a.shape[2:])[:size], values
    )


def project(
    x: Array, region: Region | Cells | None, event_shape: tuple[int, ...]
) -> Array:
    """P x: the leaf's event; of cells with an axis for each of the plates over their
    sets in front."""
    if region is None:
        return x
    if isinstance(region, Cells):
        cells = region.array
        seen = x if in_order(cells, x.shape) else x.ravel()[cells]
        return seen.reshape(cells.shape[:-1] + event_shape)
    cut = x[region.slices]
    if region.averaged > 1:
        pairs = zip(region.extent, region.block, strict=True)
        cut = cut.reshape([n for e, b in pairs for n in (e // b, b)]).mean(
            axis=tuple(range(1, 2 * cut.ndim, 2))
        )
    return cut.reshape(event_shape)


def placed(score: Array, member: Member, shape: tuple[int, ...]) -> Array | Scattered:
    """Pᵀ s of every value of a member's plates: the leaf's score as a function of the
    whole site."""
    _, region, plates = member
    if not isinstance(region, Cells):
        place = partial(embed, region=region, site_shape=shape)
        for _ in plates:
            place = jax.vmap(place)
        return place(score)
    own = (
        region.array
    )  # with an axis for each of the plates over sets, as all others have too
    ones = tuple(plate.count if plate.cells else 1 for plate in plates)
    cells = jnp.broadcast_to(
        own.reshape(*ones, own.shape[-1]), (*member.counts, own.shape[-1])
    )
    scattered = Scattered(
        score.reshape(cells.shape), cells, shape, in_order(own, shape)
    )
    return scattered if plates else scattered.dense


def in_order(cells: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Whether sets of cells, (n, size), are the site's entries one after another."""
    return cells.ndim == 2 and np.array_equal(
        cells.reshape(-1), np.arange(math.prod(shape))
    )


def embed(score: Array, region: Region | None, site_shape: tuple[int, ...]) -> Array:
    """Pᵀ s of one member."""
    if region is None:
        return score
    score = (
        score.reshape(
            [e // b for e, b in zip(region.extent, region.block, strict=True)]
        )
        / region.averaged
    )
    for axis, b in enumerate(region.block):
        score = jnp.repeat(score, b, axis=axis) if b > 1 else score
    return jnp.zeros(site_shape, score.dtype).at[region.slices].set(score)


class OnDemand(dict[tuple[int, int], NodeValue]):
    """The outputs of the batches by (batch, member), each batch evaluated when one of
    them is first read."""

    def __init__(self, batches: tuple[Group, ...], xs: dict[str, Array], noise: Noise):
        super().__init__()
        self.evaluate = lambda b: evaluate(batches[b], xs, noise)

    def __missing__(self, slot: tuple[int, int]) -> NodeValue:
        self.update(
            {(slot[0], m): output for m, output in enumerate(self.evaluate(slot[0]))}
        )
        return self[slot]
