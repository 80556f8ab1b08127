"""Lowered expressions: log-density, score and Feynman–Kac rate of every node from those of the leaves.

The rate r of a density F along the forward diffusion dx = f·x dt + g dW is defined by ∂_t F = 𝓛F − g²·r·F, with 𝓛 the
forward Fokker–Planck operator (Skreta et al. 2025, arXiv 2503.02819). On a site of d entries, with S the node's score:

* a noised marginal of all d entries has r = 0; one that sees only d' of them has r = (f/g²)·(d' − d);
* a constant c that depends on the level alone has r = ∂_λ log c/σ² − (f/g²)·d, with λ the log-SNR;
* a product with powers w_i has r = Σ w_i·r_i + ½(‖S‖² − Σ w_i·‖S_i‖²) + (f/g²)·d·(Σ w_i − 1);
* a mixture has the average of r_i under the responsibilities.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from composeprob.ir.nodes import Leaf, Mixture, Node, Product, fold, leaves


class NodeValue(eqx.Module):
    """A node at one position.

    Attributes:
        log_density: log of the node; None if score-only.
        score: its gradient, over the site.
        rate: the part of r that comes from scores; None if the node has no rate.
        excess: the part of r that comes from the drift, in units of f/g²; r = rate + (f/g²)·excess.
    """

    log_density: Array | None
    score: Array
    rate: Array | None
    excess: Array


Outputs = Mapping[tuple[int, int], tuple[Array | None, Array, Array]]
"""By (batch, member): log f, score over the site, rate beside what its dimension explains."""


class Expression(eqx.Module):
    """A lowered node."""

    @abc.abstractmethod
    def __call__(self, outputs: Outputs) -> NodeValue:
        """Its value, given the leaves' outputs."""


class LeafExpression(Expression):
    """Reads one member of one batch."""

    slot: tuple[int, int] = eqx.field(static=True)
    unseen: float = eqx.field(static=True)
    marginal: bool = eqx.field(static=True)

    def __call__(self, outputs: Outputs) -> NodeValue:
        log_density, score, rate = outputs[self.slot]
        excess = jnp.zeros((), score.dtype) - self.unseen
        return NodeValue(log_density, score, rate if self.marginal else None, excess)


class Parts(eqx.Module):
    """What a product or a mixture combines: its parts, or the one part that stands in a plate.

    Attributes:
        parts: the parts.
        plate: of a part in a plate, the slots of the leaves in it, and whether each runs over the plate; else None.
    """

    parts: tuple[Expression, ...]
    plate: tuple[tuple[tuple[int, int], bool], ...] | None = eqx.field(static=True)

    def __call__(self, outputs: Outputs) -> NodeValue:
        """The values of all parts along a leading axis; None where one of them has none."""
        if self.plate is not None:
            rows = {slot: outputs[slot] for slot, runs in self.plate if runs}
            others = {slot: outputs[slot] for slot, runs in self.plate if not runs}
            return jax.vmap(lambda row: self.parts[0]({**others, **row}))(rows)
        values = [part(outputs) for part in self.parts]
        return NodeValue(
            _stack([v.log_density for v in values]),
            jnp.stack([v.score for v in values]),
            _stack([v.rate for v in values]),
            jnp.stack([v.excess for v in values]),
        )


def _stack(values: list[Array | None]) -> Array | None:
    known = [value for value in values if value is not None]
    return jnp.stack(known) if len(known) == len(values) else None


class ProductExpression(Expression):
    """Π_i part_i^{w_i}; the powers are arrays, so other powers reuse the compiled code."""

    parts: Parts
    powers: Array
    size: int = eqx.field(static=True)

    def __call__(self, outputs: Outputs) -> NodeValue:
        values, w = self.parts(outputs), self.powers
        score, rate = total(w, values.score), None
        if values.rate is not None:
            squares = jnp.sum(jnp.square(values.score), axis=range(1, values.score.ndim))
            rate = total(w, values.rate) + 0.5 * (jnp.sum(score**2) - total(w, squares))
        log_density = None if values.log_density is None else total(w, values.log_density)
        excess = total(w, values.excess) + self.size * (jnp.sum(w) - 1.0)
        return NodeValue(log_density, score, rate, excess)


class MixtureExpression(Expression):
    """Σ_i exp(l_i)·part_i: score and rate are averages under the responsibilities."""

    parts: Parts
    log_weights: Array

    def __call__(self, outputs: Outputs) -> NodeValue:
        values = self.parts(outputs)
        assert values.log_density is not None
        joint = self.log_weights + values.log_density
        share = jax.nn.softmax(joint)
        rate = None if values.rate is None else total(share, values.rate)
        return NodeValue(jax.nn.logsumexp(joint), total(share, values.score), rate, total(share, values.excess))


def total(weights: Array, values: Array) -> Array:
    """Σ_i weights_i·values_i over the leading axis. Some devices round what they multiply if they may."""
    return jnp.tensordot(weights, values, axes=1, precision="highest")


def lower_expression(node: Node, site_shape: tuple[int, ...]) -> Expression:
    """The executable form of a node of the IR."""
    size, float_ = math.prod(site_shape), jnp.result_type(float)

    def leaf(node: Leaf) -> Expression:
        assert node.slot is not None
        marginal = "exact_marginals" in node.factor.capabilities
        return LeafExpression(node.slot, size - node.factor.dimension, marginal)

    def parts(node: Product | Mixture, children: list[Expression]) -> Parts:
        if node.plate is None:
            return Parts(tuple(children), None)
        slots = {leaf.slot: node.plate in leaf.plates for leaf in leaves(node) if leaf.slot is not None}
        return Parts(tuple(children[:1]), tuple(slots.items()))

    return fold(
        node,
        leaf,
        lambda node, children: ProductExpression(parts(node, children), jnp.asarray(node.powers, float_), size),
        lambda node, children: MixtureExpression(parts(node, children), jnp.asarray(node.log_weights, float_)),
    )
