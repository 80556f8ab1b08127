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

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from composeprob.ir.nodes import Leaf, Node, fold


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


Outputs = list[list[tuple[Array | None, Array, Array]]]
"""For each batch and member: (log f, score over the site, rate beside what its dimension explains)."""


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
        log_density, score, rate = outputs[self.slot[0]][self.slot[1]]
        excess = jnp.zeros((), score.dtype) - self.unseen
        return NodeValue(log_density, score, rate if self.marginal else None, excess)


class ProductExpression(Expression):
    """Π_i child_i^{w_i}; the powers are arrays, so other powers reuse the compiled code."""

    children: tuple[Expression, ...]
    powers: Array
    size: int = eqx.field(static=True)

    def __call__(self, outputs: Outputs) -> NodeValue:
        values = [child(outputs) for child in self.children]
        weighted = list(zip(self.powers, values, strict=True))
        score = sum((w * v.score for w, v in weighted), jnp.zeros_like(values[0].score))
        log_density = rate = None
        if all(v.log_density is not None for v in values):
            log_density = sum((w * v.log_density for w, v in weighted if v.log_density is not None), jnp.zeros(()))
        if all(v.rate is not None for v in values):
            own = sum((w * v.rate for w, v in weighted if v.rate is not None), jnp.zeros(()))
            cross = jnp.sum(score**2) - sum((w * jnp.sum(v.score**2) for w, v in weighted), jnp.zeros(()))
            rate = own + 0.5 * cross
        excess = sum((w * v.excess for w, v in weighted), self.size * (jnp.sum(self.powers) - 1.0))
        return NodeValue(log_density, score, rate, excess)


class MixtureExpression(Expression):
    """Σ_i exp(l_i)·child_i: score and rate are averages under the responsibilities."""

    children: tuple[Expression, ...]
    log_weights: Array

    def __call__(self, outputs: Outputs) -> NodeValue:
        values = [child(outputs) for child in self.children]
        joint = self.log_weights + jnp.stack([v.log_density for v in values])  # type: ignore[misc]
        responsibilities = jax.nn.softmax(joint)
        score = jnp.tensordot(responsibilities, jnp.stack([v.score for v in values]), axes=1)
        rate = None
        if all(v.rate is not None for v in values):
            rate = jnp.sum(responsibilities * jnp.stack([v.rate for v in values]))  # type: ignore[misc]
        excess = jnp.sum(responsibilities * jnp.stack([v.excess for v in values]))
        return NodeValue(jax.nn.logsumexp(joint), score, rate, excess)


def lower_expression(node: Node, site_shape: tuple[int, ...]) -> Expression:
    """The executable form of a node of the IR."""
    size, float_ = math.prod(site_shape), jnp.result_type(float)

    def leaf(node: Leaf) -> Expression:
        assert node.slot is not None
        marginal = "exact_marginals" in node.factor.capabilities
        return LeafExpression(node.slot, size - node.factor.dimension, marginal)

    return fold(
        node,
        leaf,
        lambda node, children: ProductExpression(tuple(children), jnp.asarray(node.powers, float_), size),
        lambda node, children: MixtureExpression(tuple(children), jnp.asarray(node.log_weights, float_)),
    )
