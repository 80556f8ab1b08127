"""Exact draws of experts at the cleanest level, where these are closed forms over a whole site."""

from __future__ import annotations

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from composeprob.compiler.batches import Batch
from composeprob.compiler.latents import stays_normalised
from composeprob.factors.nodes import Mixture
from composeprob.factors.passes import Pass
from composeprob.ir.nodes import Leaf
from composeprob.schedule import Noise


class Draw(eqx.Module):
    """What draws from a node."""

    @abc.abstractmethod
    def __call__(self, key: Array, batches: tuple[Batch, ...], noise: Noise) -> Array:
        """An event of the site, at this noise of the program."""


class LeafDraw(Draw):
    """Draws from the noised marginal of an `Analytic`.

    Attributes:
        batch: the number of the batch that has it.
    """

    batch: int = eqx.field(static=True)

    def __call__(self, key: Array, batches: tuple[Batch, ...], noise: Noise) -> Array:
        batch = batches[self.batch]
        marginal: Any = batch.factor.core
        noise_of_leaf = batch.noise_at(noise)
        return marginal.at(noise_of_leaf).sample(key) * noise.alpha / noise_of_leaf.alpha


class MixtureDraw(Draw):
    """Draws from a part that is chosen by its share."""

    parts: tuple[Draw, ...]
    log_weights: Array

    def __call__(self, key: Array, batches: tuple[Batch, ...], noise: Noise) -> Array:
        choice, rest = jax.random.split(key)
        return chosen(jax.random.categorical(choice, self.log_weights), self.parts, rest, batches, noise)


def chosen(which: Array, parts: tuple[Draw, ...], key: Array, batches: tuple[Batch, ...], noise: Noise) -> Array:
    """A draw from one of the parts."""
    return jnp.stack([part(key, batches, noise) for part in parts])[which]


draw_of = Pass[Draw | None]("draw", lambda *_: None)
"""What draws from a node exactly; None where nothing does."""


@draw_of.rule(Leaf)
def _leaf(leaf: Leaf, _: list[Draw | None]) -> Draw | None:
    if leaf.region is not None or leaf.plates or leaf.slot is None or not stays_normalised(leaf.factor.core):
        return None
    return LeafDraw(leaf.slot[0])


@draw_of.rule(Mixture)
def _mixture(node: Mixture, parts: list[Draw | None]) -> Draw | None:
    known = tuple(part for part in parts if part is not None)
    if node.plate is not None or not node.calibrated or len(known) < len(parts):
        return None
    return MixtureDraw(known, jnp.asarray(np.array(node.log_weights), jnp.result_type(float)))
