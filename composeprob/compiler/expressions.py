"""Lowered expressions: log-density, score and Feynman–Kac rate of every node from those
of the leaves, and these by one call of each network for all of its uses.

The rate r of a density F along the forward diffusion dx = f·x dt + g dW is defined by
∂_t F = 𝓛F − g²·r·F, with 𝓛 the forward Fokker–Planck operator (Skreta et al. 2025,
arXiv 2503.02819). On a site of d entries, with S the node's score:

* a noised marginal of all d entries has r = 0; one that sees only d' of them has
  r = (f/g²)·(d' − d);
* a constant c that depends on the level alone has r = ∂_λ log c/σ² − (f/g²)·d, with λ
  the log-SNR;
* a product with powers w_i has r = Σ w_i·r_i + ½(‖S‖² − Σ w_i·‖S_i‖²) +
  (f/g²)·d·(Σ w_i − 1). Powers that depend on s = σ²/α², which grows by g²/α² a unit of
  time, subtract Σ (dw_i/ds)·log f_i/α²;
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
from jaxtyping import Float, Int, PyTree

from composeprob.compiler.latents import stays_normalised
from composeprob.density.evaluation import TrackedFactors
from composeprob.factors.nodes import Combination, Growth, Mixture, Product
from composeprob.factors.passes import Pass
from composeprob.factors.window import Cells, Region
from composeprob.ir.leaves import Group, Leaf, Member, Normaliser, dimension_of, leaves
from composeprob.schedule import Noise

Rows = TypeVar("Rows")
Values = TypeVar("Values")


class Scattered(eqx.Module):
    """Scores of factors that see a few cells of a site each, before they are spread
    over the site: n members of n cells would take n² numbers there.

    Attributes:
        values: the scores, with the axes of plates in front.
        cells: the entries of the site that these belong to.
        shape: the site's.
        ordered: True if the sets are the site's entries one after another.
    """

    values: Float[Array, "*plates size"]
    cells: Int[Array, "*plates size"]
    shape: tuple[int, ...] = eqx.field(static=True)
    ordered: bool = eqx.field(static=True)

    @property
    def dense(self) -> Float[Array, "*plates *site"]:
        """Each score as a function of the whole site."""
        rows = math.prod(self.cells.shape[:-1])
        cells = self.cells.reshape(rows, -1)
        values = self.values.reshape(rows, -1)
        zero = jnp.zeros((rows, math.prod(self.shape)), values.dtype)

        def put(zero: Array, cells: Array, values: Array) -> Array:
            return zero.at[cells].set(values, unique_indices=True)

        scores = jax.vmap(put)(zero, cells, values)
        return scores.reshape(self.cells.shape[:-1] + self.shape)

    def total(self, over_sets: bool) -> Array | Scattered:
        """The sum over the leading axis: ``over_sets`` of cells, or over uses of the
        same cells."""
        if over_sets:
            return self.sum
        values = jnp.sum(self.values, axis=0)
        return Scattered(values, self.cells[0], self.shape, self.ordered)

    @property
    def sum(self) -> Float[Array, "*site"]:
        """The sum of all scores."""
        if self.ordered and self.values.ndim == 2:
            # Each entry is in one set: a scatter would add nothing to zeros.
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

    log_density: Float[Array, "*plates"] | None
    score: PyTree[Array]
    rate: Float[Array, "*plates"] | None
    excess: Float[Array, "*plates"]


Outputs = Mapping[tuple[int, int], NodeValue]
"""The leaves by (batch, member)."""


class Expression(eqx.Module):
    """A lowered node."""

    @abc.abstractmethod
    def __call__(self, outputs: Outputs, noise: Noise) -> NodeValue:
        """The node's value, given the leaves' outputs and the level's noise."""

    def tracked(self, outputs: Outputs, noise: Noise) -> TrackedFactors | None:
        """The factors whose exponents grow although they have no log-density that can
        be compared along a path, with scores over the node's site; None where there are
        none."""
        return None

    @property
    def drawable(self) -> bool:
        """True if `draw` is exact: for closed forms over a whole site, and mixtures of
        them."""
        return False

    def draw(
        self, key: Array, batches: tuple[Group, ...], noise: Noise
    ) -> Float[Array, "*site"]:
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
        # x'·α/α': the same value of x/α, in the coordinates of the program's levels.
        event = marginal.at(noise_of_leaf).sample(key)
        return event * noise.alpha / noise_of_leaf.alpha


class Operands(eqx.Module):
    """The expressions that a product or a mixture combines, or the one that stands in a
    plate.

    Attributes:
        operands: the expressions.
        plate: for an operand in a plate, the slots of the leaves in it, and whether
            each runs over the plate; else None.
        over_sets: True if that plate runs over sets of cells.
    """

    operands: tuple[Expression, ...]
    plate: tuple[tuple[tuple[int, int], bool], ...] | None = eqx.field(static=True)
    over_sets: bool = eqx.field(static=True, default=False)

    def __call__(
        self,
        outputs: Outputs,
        noise: Noise,
        term: Callable[[NodeValue, int], NodeValue],
    ) -> NodeValue:
        """``term(value, index)`` of every operand, stacked along a leading axis; None
        in the fields that an operand lacks."""
        if self.plate is not None:
            return self._in_plate(outputs, noise, term)
        terms = []
        for i, operand in enumerate(self.operands):
            terms.append(term(operand(outputs, noise), i))
        return NodeValue(
            _stack([t.log_density for t in terms]),
            jnp.stack([dense(t.score) for t in terms]),
            _stack([t.rate for t in terms]),
            jnp.stack([t.excess for t in terms]),
        )

    def _in_plate(
        self,
        outputs: Outputs,
        noise: Noise,
        term: Callable[[NodeValue, int], NodeValue],
    ) -> NodeValue:
        assert self.plate is not None
        (operand,) = self.operands
        # Leaves that do not run over the plate have one value, which every row shares.
        running = {slot: outputs[slot] for slot, runs in self.plate if runs}
        constant = {slot: outputs[slot] for slot, runs in self.plate if not runs}

        def of_row(row: Outputs) -> NodeValue:
            return term(operand({**constant, **row}, noise), 0)

        return jax.vmap(of_row)(running)


def dense(score: Array | Scattered) -> Float[Array, "*plates *site"]:
    """A score over the whole site."""
    return score.dense if isinstance(score, Scattered) else score


def summed(score: Array | Scattered, shape: tuple[int, ...]) -> Float[Array, "*site"]:
    """The sum of a score over the axes of its plates, of the site's shape."""
    if isinstance(score, Scattered):
        return score.sum
    return jnp.sum(score.reshape(-1, *shape), axis=0)


def _stack(values: list[Array | None]) -> Array | None:
    """The values along a leading axis; None if one is missing."""
    arrays = [value for value in values if value is not None]
    return jnp.stack(arrays) if len(arrays) == len(values) else None


def operands_of(node: Combination, operands: list[Expression]) -> Operands:
    """The operands of a node, with the slots of the leaves that stand in its plate."""
    if node.plate is None:
        return Operands(tuple(operands), None)
    slots = {
        leaf.slot: node.plate in leaf.plates
        for leaf in leaves(node)
        if leaf.slot is not None
    }
    return Operands(tuple(operands), tuple(slots.items()), node.plate.cells)


lower_expression = Pass[Expression]("lower")
"""The executable form of a node over a site of this shape."""


@lower_expression.rule(Leaf)
def _leaf(leaf: Leaf, _: list[Expression], site_shape: tuple[int, ...]) -> Expression:
    assert leaf.slot is not None
    # A draw of a part of the site, or of one of many factors, does not draw the site.
    whole = leaf.region is None and not leaf.plates
    closed_form = whole and stays_normalised(leaf.factor.uncalibrated)
    return LeafExpression(leaf.slot, closed_form)


class ProductExpression(Expression):
    """Π_i f_i^{w_i}.

    The powers are arrays, so that other powers reuse the compiled code; the operand of
    a plate has one power for all of its members.
    """

    operands: Operands
    powers: Float[Array, " n"] | Growth
    size: int = eqx.field(static=True)

    def __call__(self, outputs: Outputs, noise: Noise) -> NodeValue:
        powers, slopes = self._powers_at(noise)

        def term(value: NodeValue, i: int) -> NodeValue:
            w = powers[i]
            squared = _squared(value.score)
            # One term each of the sums in the rate of a product; see the module's text.
            log_density = None
            if value.log_density is not None:
                log_density = w * value.log_density
            rate = None
            if value.rate is not None:
                rate = w * (value.rate - 0.5 * squared)
            if rate is not None and i in slopes:
                assert value.log_density is not None  # or else it is tracked
                rate = rate - slopes[i] * value.log_density / noise.alpha**2
            score = _times(w, value.score)
            return NodeValue(log_density, score, rate, w * (value.excess + self.size))

        def total_of(terms: Array | Scattered) -> Array | Scattered:
            if isinstance(terms, Scattered):
                return terms.total(self.operands.over_sets)
            return jnp.sum(terms, axis=0)

        terms = self.operands(outputs, noise, term)
        total: NodeValue = jax.tree.map(
            total_of, terms, is_leaf=lambda node: isinstance(node, Scattered)
        )
        rate = None
        if total.rate is not None:
            rate = total.rate + 0.5 * _squared(total.score)
        return NodeValue(total.log_density, total.score, rate, total.excess - self.size)

    def _powers_at(self, noise: Noise) -> tuple[Any, dict[int, Array]]:
        """The powers w_i at a level, and dw_i/ds of those that grow and are not
        tracked, by index."""
        growth = self.powers
        if not isinstance(growth, Growth):
            return growth, {}
        powers, slope = growth.slope(noise.variance)
        by_value = [i for i in growth.growing if i not in growth.tracked]
        return powers, {i: slope[i] for i in by_value}

    def tracked(self, outputs: Outputs, noise: Noise) -> TrackedFactors | None:
        growth = self.powers
        if not isinstance(growth, Growth) or not growth.tracked:
            return None
        values = [self.operands.operands[i](outputs, noise) for i in growth.tracked]
        _, slope = growth.slope(noise.variance)
        slopes = -slope[np.array(growth.tracked)] / noise.alpha**2
        return TrackedFactors(
            scores=tuple(value.score for value in values),
            log_densities=tuple(value.log_density for value in values),
            slopes=slopes,
            values=jnp.full_like(slopes, jnp.nan),
        )


def _squared(score: Array | Scattered) -> Float[Array, ""]:
    """‖S‖² of one score."""
    # Cells of one set are distinct, so the norm is that of the values.
    values = score.values if isinstance(score, Scattered) else score
    return jnp.sum(values**2)


def _times(w: Array, score: Array | Scattered) -> Array | Scattered:
    if isinstance(score, Scattered):
        return replace(score, values=w * score.values)
    return w * score


@lower_expression.rule(Product)
def _product(
    node: Product, operands: list[Expression], site_shape: tuple[int, ...]
) -> Expression:
    constant = node.powers[:1] if node.plate else node.powers
    exponents = node.growth or np.asarray(constant)
    powers = jax.tree.map(lambda a: jnp.asarray(a, jnp.result_type(float)), exponents)
    return ProductExpression(operands_of(node, operands), powers, math.prod(site_shape))


class MixtureExpression(Expression):
    """Σ_i exp(l_i)·f_i: score and rate are averages under the responsibilities."""

    operands: Operands
    log_weights: Float[Array, " n"]
    shares: bool = eqx.field(static=True)

    @property
    def drawable(self) -> bool:
        if not self.shares or self.operands.plate is not None:
            return False
        return all(component.drawable for component in self.operands.operands)

    def draw(self, key: Array, batches: tuple[Group, ...], noise: Noise) -> Array:
        choice_key, event_key = jax.random.split(key)
        index = jax.random.categorical(choice_key, self.log_weights)
        return drawn(index, self.operands.operands, event_key, batches, noise)

    def __call__(self, outputs: Outputs, noise: Noise) -> NodeValue:
        def term(value: NodeValue, _: int) -> NodeValue:
            return replace(value, score=dense(value.score))

        values = self.operands(outputs, noise, term)
        assert values.log_density is not None
        joint = self.log_weights + values.log_density
        responsibilities = jax.nn.softmax(joint)

        # At the highest precision: accelerators would round the scores' products to
        # bfloat16.
        def mean(values: Array) -> Array:
            return jnp.tensordot(responsibilities, values, axes=1, precision="highest")

        rate = None if values.rate is None else mean(values.rate)
        log_density = jax.nn.logsumexp(joint)
        return NodeValue(log_density, mean(values.score), rate, mean(values.excess))


@lower_expression.rule(Mixture)
def _mixture(
    node: Mixture, operands: list[Expression], site_shape: tuple[int, ...]
) -> Expression:
    log_weights = jnp.asarray(node.log_weights, jnp.result_type(float))
    return MixtureExpression(operands_of(node, operands), log_weights, node.calibrated)


def drawn(
    index: Int[Array, ""],
    expressions: Sequence[Expression],
    key: Array,
    batches: tuple[Group, ...],
    noise: Noise,
) -> Float[Array, "*site"]:
    """A draw from the expression of this index."""
    # Each draws, by the same key: the index is known in compiled code alone.
    draws = [expression.draw(key, batches, noise) for expression in expressions]
    return jnp.stack(draws)[index]


def evaluate(batch: Group, xs: dict[str, Array], noise: Noise) -> list[NodeValue]:
    """The value of every member, with an axis for each of its plates in front."""
    factor = batch.factor
    shape = factor.event_shape
    noise_of_leaf = noise_at(batch, noise)
    ratio = noise_of_leaf.alpha / noise.alpha
    events = [ratio * project(xs[m.site], m.region, shape) for m in batch.members]
    log_f, scores = _evaluate_rows(batch, events, noise_of_leaf)
    # A density of x is rescaled with x; a bounded potential (top power 0) is a function
    # of x and is not.
    jacobian = factor.traits.top_power * math.prod(shape) * jnp.log(ratio)
    growth: Array | float = 0.0
    if factor.traits.constant:
        growth = cast(Normaliser, factor).growth(noise_of_leaf)
    rate = growth / noise.sigma**2
    has_rate = "exact_marginals" in factor.capabilities
    outputs = []
    start = 0
    for member in batch.members:
        # The batch holds the rows of one member after those of the member before.
        rows = slice(start, start + member.rows)
        start += member.rows
        log_density = None
        if log_f is not None:
            log_density = in_plates(log_f[rows], member.counts) + jacobian
        # The leaf was evaluated at ratio·x, so the chain rule multiplies by the ratio.
        score_of_event = ratio * in_plates(scores[rows], member.counts)
        x = xs[member.site]
        rates = jnp.broadcast_to(rate, member.counts)
        excess = jnp.full(member.counts, dimension_of(factor) - x.size, rates.dtype)
        score = placed(score_of_event, member, x.shape)
        rate_of_member = rates if has_rate else None
        outputs.append(NodeValue(log_density, score, rate_of_member, excess))
    return outputs


def _evaluate_rows(
    batch: Group, events: list[Array], noise: Noise
) -> tuple[Float[Array, " rows"] | None, Float[Array, "rows ..."]]:
    """Log-density and score of every row of a batch, by one call of its factor:
    ``events`` are those of its members, ``noise`` is the factor's own."""
    factor = batch.factor
    members = batch.members
    conditions = rows_of(batch)
    plates = [plate for member in members for plate in member.plates]
    block = min((plate.block for plate in plates if plate.block), default=None)
    if batch.rows == 1:
        log_f, score = factor.evaluate(events[0], noise, batch.first)
        return None if log_f is None else log_f[None], score[None]
    over_sets = any(plate.cells for plate in plates)
    places = {(member.site, member.region) for member in members}
    if not over_sets and len(places) == 1:
        # One x for all rows: what depends on x alone is computed once.
        of_conditions = partial(factor.evaluate, events[0], noise)
        return in_blocks(of_conditions, conditions, batch.rows, block)

    def of_row(row: tuple[Array, dict[str, Array]]) -> tuple[Array | None, Array]:
        x, conditions = row
        return factor.evaluate(x, noise, conditions)

    pairs = zip(events, members, strict=True)
    x = jnp.concatenate([in_rows(e, member, factor.event_shape) for e, member in pairs])
    return in_blocks(of_row, (x, conditions), batch.rows, block)


def noise_at(batch: Group, noise: Noise) -> Noise:
    """The factor's own noise at a level of the program."""
    if batch.own_noise is None:
        return noise
    return jax.tree.map(lambda a: jnp.asarray(a)[noise.index], batch.own_noise)


def rows_of(batch: Group) -> dict[str, Array]:
    """The conditions of members as rows: the axes of their plates, then the members,
    become one axis."""

    def rows(value: Array, member: Member) -> Array:
        event = jnp.shape(value)[len(member.plates) :]
        return jnp.reshape(value, (member.rows, *event))

    pairs = list(zip(batch.conditions, batch.members, strict=True))
    conditions = {}
    for name in batch.conditions[0]:
        values = [rows(of_member[name], member) for of_member, member in pairs]
        conditions[name] = jnp.concatenate(values)
    return conditions


def in_plates(
    rows: Float[Array, "rows ..."], counts: tuple[int, ...]
) -> Float[Array, "*plates *event"]:
    """The rows of one member, with an axis for each of its plates in place of the rows'
    axis.

    `jax.vmap` moves axes about for a reshape, so it is left out where it changes
    nothing.
    """
    if not counts:
        return rows[0]
    if len(counts) == 1:
        return rows
    return rows.reshape(*counts, *rows.shape[1:])


def in_rows(
    events: Float[Array, "*sets"], member: Member, shape: tuple[int, ...]
) -> Float[Array, "rows ..."]:
    """A row for each value of a member's plates.

    ``events`` have an axis for each plate over sets of cells; plates over data share
    the event.
    """
    events = events.reshape(_axes_of_sets(member) + shape)
    return jnp.broadcast_to(events, member.counts + shape).reshape(-1, *shape)


def in_blocks(
    function: Callable[[Rows], Values], rows: Rows, size: int, block: int | None
) -> Values:
    """The function of every row, traced once: of all rows at once, or block after
    block. The last block is filled up with rows that are computed again."""
    if block is None or block >= size:
        return jax.vmap(function, axis_size=size)(rows)
    # As few blocks as their limit allows, then of as few rows as cover all.
    number = math.ceil(size / block)
    width = math.ceil(size / number)

    def divided(a: Array) -> Array:
        return jnp.resize(a, (number, width, *a.shape[1:]))

    def joined(a: Array) -> Array:
        return a.reshape(number * width, *a.shape[2:])[:size]

    values = jax.lax.map(jax.vmap(function), jax.tree.map(divided, rows))
    return jax.tree.map(joined, values)


def project(
    x: Float[Array, "*site"],
    region: Region | Cells | None,
    event_shape: tuple[int, ...],
) -> Float[Array, "*sets"]:
    """P x: the leaf's event; of cells, with a leading axis for each plate over sets."""
    if region is None:
        return x
    if isinstance(region, Cells):
        cells = region.array
        values = x if in_order(cells, x.shape) else x.ravel()[cells]
        return values.reshape(cells.shape[:-1] + event_shape)
    cut = x[region.slices]
    if region.averaged > 1:
        # Each axis becomes two, blocks and entries of a block, of which the second is
        # averaged.
        split: list[int] = []
        for extent, size in zip(region.extent, region.block, strict=True):
            split += [extent // size, size]
        cut = cut.reshape(split).mean(axis=tuple(range(1, 2 * cut.ndim, 2)))
    return cut.reshape(event_shape)


def placed(
    score: Float[Array, "*plates *event"], member: Member, shape: tuple[int, ...]
) -> Array | Scattered:
    """Pᵀ s of every value of a member's plates: the leaf's score as a function of the
    whole site."""
    region = member.region
    if not isinstance(region, Cells):
        place = partial(embed, region=region, site_shape=shape)
        for _ in member.plates:
            place = jax.vmap(place)
        return place(score)
    # Cells have an axis for each of the plates over sets, and need one for all others.
    sets = region.array
    size = sets.shape[-1]
    sets_in_plates = sets.reshape(*_axes_of_sets(member), size)
    cells = jnp.broadcast_to(sets_in_plates, (*member.counts, size))
    values = score.reshape(cells.shape)
    scattered = Scattered(values, cells, shape, in_order(sets, shape))
    return scattered if member.plates else scattered.dense


def _axes_of_sets(member: Member) -> tuple[int, ...]:
    """A member's plates as axes: an axis of its count for a plate over sets of cells,
    and one of length 1 for a plate over data."""
    axes = [1] * len(member.plates)
    for i, plate in enumerate(member.plates):
        if plate.cells:
            axes[i] = plate.count
    return tuple(axes)


def in_order(cells: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Return whether sets of cells, (n, size), are the site's entries one after
    another."""
    if cells.ndim != 2:
        return False
    return np.array_equal(cells.reshape(-1), np.arange(math.prod(shape)))


def embed(
    score: Float[Array, "*event"], region: Region | None, site_shape: tuple[int, ...]
) -> Float[Array, "*site"]:
    """Pᵀ s of one member."""
    if region is None:
        return score
    pairs = zip(region.extent, region.block, strict=True)
    # The derivative of a mean over a block is shared out evenly among its entries.
    score = score.reshape([extent // size for extent, size in pairs]) / region.averaged
    for axis, size in enumerate(region.block):
        if size > 1:
            score = jnp.repeat(score, size, axis=axis)
    return jnp.zeros(site_shape, score.dtype).at[region.slices].set(score)


class OnDemand(dict[tuple[int, int], NodeValue]):
    """The outputs of the batches by (batch, member), each batch evaluated when one of
    them is first read."""

    def __init__(self, batches: tuple[Group, ...], xs: dict[str, Array], noise: Noise):
        super().__init__()
        self.batches = batches
        self.xs = xs
        self.noise = noise

    def __missing__(self, slot: tuple[int, int]) -> NodeValue:
        index, _ = slot
        outputs = evaluate(self.batches[index], self.xs, self.noise)
        for member, output in enumerate(outputs):
            self[index, member] = output
        return self[slot]
