"""The experts of a program: its factors that are true noised marginals, each with the power that it has; and exact
draws of those at the cleanest level that are closed forms over a whole site."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from composeprob.compiler.check import node_capabilities
from composeprob.compiler.expressions import Expression, lower_expression, noise_at
from composeprob.compiler.latents import stays_normalised
from composeprob.density.described import Expert
from composeprob.factors.base import Factor
from composeprob.factors.nodes import Mixture, Product
from composeprob.factors.passes import Pass
from composeprob.factors.window import Cells, Region
from composeprob.ir.nodes import Graph, Group, Leaf, dimension_of, leaves
from composeprob.ir.render import formula
from composeprob.schedule import Noise

Raised = list[tuple[Factor, float]]
"""Nodes that are experts, each with the product of the powers above it."""
experts_of = Pass[Raised]("experts", lambda *_: [])
"""The experts of an expression. What a product is made of counts one by one, a mixture of experts as one."""
Draw = Callable[[Array, tuple[Group, ...], Noise], Array]
"""What draws an event of the site from a node, at this noise of the program."""
draw_of = Pass[Draw | None]("draw", lambda *_: None)
"""What draws from a node exactly; None where nothing does."""


def expert(node: Factor) -> Raised:
    """The node itself, where its density at every level is that of its noised draws."""
    return [(node, 1.0)] if "exact_marginals" in node_capabilities(node) else []


@experts_of.rule(Leaf)
def _leaf(leaf: Leaf, _: list[Raised]) -> Raised:
    return [] if leaf.factor.traits.constant else expert(leaf)


@experts_of.rule(Product)
def _product(node: Product, parts: list[Raised]) -> Raised:
    """In a plate there is one factor, and the powers of its n uses are equal; mixtures in it are not examined."""
    found = [(child, w * power) for part, w in zip(parts, node.powers, strict=False) for child, power in part]
    return [(child, power) for child, power in found if node.plate is None or not child.children]


@experts_of.rule(Mixture)
def _mixture(node: Mixture, parts: list[Raised]) -> Raised:
    """A part that is improbable at a sample is what mixtures are for: they are evaluated as a whole."""
    return expert(node) if all(parts) else []


class ExpertExpression(eqx.Module):
    """How an expert of a site is evaluated, and what draws from it, where the program does not divide by it."""

    site: str = eqx.field(static=True)
    expression: Expression
    draw: Draw | None


def experts(graph: Graph) -> tuple[tuple[Expert, ...], tuple[ExpertExpression, ...]]:
    """Every expert, described and lowered."""
    known, lowered = [], []
    for site in graph.sites:
        for node, power in experts_of(site.root):
            below = leaves(node)
            first = below[0]
            trained = not all(leaf.factor.traits.levels == "any" for leaf in below)
            rows, averaged = math.prod(plate.count for plate in first.plates), float(first.averaged)
            name, members = formula(node, site.name), _members(first.region, math.prod(site.shape))
            dimension = dimension_of(first.factor)
            known.append(Expert(name, site.name, power, dimension, trained, rows, averaged, members))
            draw = draw_of(node) if power > 0 else None
            lowered.append(ExpertExpression(site.name, lower_expression(node, site.shape), draw))
    return tuple(known), tuple(lowered)


def _members(region: Region | Cells | None, size: int) -> int:
    """The number of sets of cells of which each of the site's entries is in one, as the members of a plate; else 1."""
    if not isinstance(region, Cells):
        return 1
    cells = region.array
    return cells.size // cells.shape[-1] if np.array_equal(np.sort(cells, axis=None), np.arange(size)) else 1


class LeafDraw(eqx.Module):
    """Draws from the noised marginal of the `Analytic` in the batch of this number."""

    batch: int = eqx.field(static=True)

    def __call__(self, key: Array, batches: tuple[Group, ...], noise: Noise) -> Array:
        batch = batches[self.batch]
        marginal: Any = batch.factor.uncalibrated
        noise_of_leaf = noise_at(batch, noise)
        return marginal.at(noise_of_leaf).sample(key) * noise.alpha / noise_of_leaf.alpha


class MixtureDraw(eqx.Module):
    """Draws from a part that is chosen by its share."""

    parts: tuple[Draw, ...]
    log_weights: Array

    def __call__(self, key: Array, batches: tuple[Group, ...], noise: Noise) -> Array:
        choice, rest = jax.random.split(key)
        return chosen(jax.random.categorical(choice, self.log_weights), self.parts, rest, batches, noise)


def chosen(which: Array, parts: tuple[Draw, ...], key: Array, batches: tuple[Group, ...], noise: Noise) -> Array:
    """A draw from one of the parts."""
    return jnp.stack([part(key, batches, noise) for part in parts])[which]


@draw_of.rule(Leaf)
def _leaf_draw(leaf: Leaf, _: list[Draw | None]) -> Draw | None:
    if leaf.region is not None or leaf.plates or leaf.slot is None or not stays_normalised(leaf.factor.uncalibrated):
        return None
    return LeafDraw(leaf.slot[0])


@draw_of.rule(Mixture)
def _mixture_draw(node: Mixture, parts: list[Draw | None]) -> Draw | None:
    known = tuple(part for part in parts if part is not None)
    if node.plate is not None or not node.calibrated or len(known) < len(parts):
        return None
    return MixtureDraw(known, jnp.asarray(np.array(node.log_weights), jnp.result_type(float)))
