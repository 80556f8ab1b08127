"""Lowered expressions: log-density, score and Feynman–Kac rate of every node from those of the leaves.

The rate r of a density F along the forward diffusion dx = f·x dt + g dW is defined by ∂_t F = 𝓛F − g²·r·F, with 𝓛 the
forward Fokker–Planck operator (Skreta et al. 2025, arXiv 2503.02819). On a site of d entries, with S the node's score:

* a noised marginal of all d entries has r = 0; one that sees only d' of them has r = (f/g²)·(d' − d);
* a constant c that depends on the level alone has r = ∂_λ log c/σ² − (f/g²)·d, with λ the log-SNR;
* a product with powers w_i has r = Σ w_i·r_i + ½(‖S‖² − Σ w_i·‖S_i‖²) + (f/g²)·d·(Σ w_i − 1); where they depend on
  s = σ²/α², which grows by g²/α² a unit of time, less Σ (dw_i/ds)·log f_i/α²;
* a mixture has the average of r_i under the responsibilities.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import PyTree

from composeprob.factors.nodes import Combination
from composeprob.factors.passes import Pass
from composeprob.ir.nodes import Leaf, leaves
from composeprob.schedule import Noise


class Scattered(eqx.Module):
    """Scores of factors that see a few cells each of a site, which are not spread over the whole site before they are
    summed: of n members that would be n² numbers.

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
        put = jax.vmap(lambda zero, cells, values: zero.at[cells].set(values, unique_indices=True))
        return put(zero, cells, values).reshape(self.cells.shape[:-1] + self.shape)

    def total(self, over_sets: bool) -> Array | Scattered:
        """The sum over the leading axis, which runs over sets of cells, or over uses of the same ones."""
        if over_sets:
            return self.sum
        return Scattered(jnp.sum(self.values, axis=0), self.cells[0], self.shape, self.ordered)

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
        score: its gradient, over the site; within a plate over sets of cells possibly `Scattered`.
        rate: the part of r that comes from scores; None if the node has no rate.
        excess: the part of r that comes from the drift, in units of f/g²; r = rate + (f/g²)·excess.
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


class LeafExpression(Expression):
    """Reads one member of one batch."""

    slot: tuple[int, int] = eqx.field(static=True)

    def __call__(self, outputs: Outputs, noise: Noise) -> NodeValue:
        return outputs[self.slot]


class Parts(eqx.Module):
    """What a product or a mixture combines: its parts, or the one part that stands in a plate.

    Attributes:
        parts: the parts.
        plate: of a part in a plate, the slots of the leaves in it, and whether each runs over the plate; else None.
        over_sets: whether that plate runs over sets of cells.
    """

    parts: tuple[Expression, ...]
    plate: tuple[tuple[tuple[int, int], bool], ...] | None = eqx.field(static=True)
    over_sets: bool = eqx.field(static=True, default=False)

    def __call__(self, outputs: Outputs, noise: Noise, term: Callable[[NodeValue, int], NodeValue]) -> NodeValue:
        """What ``term`` makes of the value and index of every part, along a leading axis; None where one has none."""
        if self.plate is not None:
            rows = {slot: outputs[slot] for slot, runs in self.plate if runs}
            others = {slot: outputs[slot] for slot, runs in self.plate if not runs}
            return jax.vmap(lambda row: term(self.parts[0]({**others, **row}, noise), 0))(rows)
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
    return score.sum if isinstance(score, Scattered) else jnp.sum(score.reshape(-1, *shape), axis=0)


def _stack(values: list[Array | None]) -> Array | None:
    known = [value for value in values if value is not None]
    return jnp.stack(known) if len(known) == len(values) else None


def parts_of(node: Combination, parts: list[Expression]) -> Parts:
    """What an expression combines, with the slots of what stands in its plate."""
    if node.plate is None:
        return Parts(tuple(parts), None)
    slots = {leaf.slot: node.plate in leaf.plates for leaf in leaves(node) if leaf.slot is not None}
    return Parts(tuple(parts), tuple(slots.items()), node.plate.cells)


lower_expression = Pass[Expression]("lower")
"""The executable form of a node over a site of this shape."""


@lower_expression.rule(Leaf)
def _leaf(leaf: Leaf, _: list[Expression], site_shape: tuple[int, ...]) -> Expression:
    assert leaf.slot is not None
    return LeafExpression(leaf.slot)
