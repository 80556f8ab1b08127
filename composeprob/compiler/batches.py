"""The leaves of a program, evaluated in batches: one call for all uses of one network."""

from __future__ import annotations

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from composeprob.factors.base import LeafFactor
from composeprob.ir.nodes import Group, Member, Region
from composeprob.schedule import Noise


class Batch(eqx.Module):
    """One network with every use of it, evaluated together.

    Attributes:
        factor: the leaf, without the conditions given to it.
        own_noise: its own noise at each level of the program, fields (K,); None for the program's own.
        conditions: ``{name: (members, …)}``.
        places: the site and region of each member.
        latent: the site and leaf of the program that ``factor`` was when it was compiled, where latents move it.
    """

    factor: LeafFactor
    own_noise: Noise | None
    conditions: dict[str, Array]
    places: tuple[tuple[str, Region | None], ...] = eqx.field(static=True)
    latent: tuple[str, int] | None = eqx.field(static=True)

    def __call__(self, xs: dict[str, Array], noise: Noise) -> list[tuple[Array | None, Array, Array]]:
        """(log f, ∇ log f in the site's coordinates, the rate of a constant) of every member."""
        own = noise if self.own_noise is None else jax.tree.map(lambda a: jnp.asarray(a)[noise.index], self.own_noise)
        ratio = own.alpha / noise.alpha
        shape = self.factor.event_shape
        events = [ratio * project(xs[site], region, shape) for site, region in self.places]
        if len(events) == 1:
            conditions = {name: values[0] for name, values in self.conditions.items()}
            outputs = [self.factor.evaluate(events[0], own, conditions)]
        else:
            alike = all(place == self.places[0] for place in self.places)
            x = events[0] if alike else jnp.stack(events)  # one x for all: what depends on x alone is computed once
            rows = jax.vmap(self.factor.evaluate, in_axes=(None if alike else 0, None, 0), axis_size=len(events))
            log_f, score = rows(x, own, self.conditions)
            outputs = [(None if log_f is None else log_f[m], score[m]) for m in range(len(events))]
        # A density of x is rescaled with x; a bounded potential (top power 0) is a function of x and is not.
        jacobian = self.factor.top_power * math.prod(shape) * jnp.log(ratio)
        rate = self.factor.growth(own) / noise.sigma**2
        return [
            (None if log_f is None else log_f + jacobian, embed(ratio * score, region, xs[site].shape), rate)
            for (log_f, score), (site, region) in zip(outputs, self.places, strict=True)
        ]


def project(x: Array, region: Region | None, event_shape: tuple[int, ...]) -> Array:
    """P x: the leaf's event."""
    if region is None:
        return x
    cut = x[region.slices]
    if region.averaged > 1:
        pairs = zip(region.extent, region.block, strict=True)
        cut = cut.reshape([n for e, b in pairs for n in (e // b, b)]).mean(axis=range(1, 2 * cut.ndim, 2))
    return cut.reshape(event_shape)


def embed(score: Array, region: Region | None, site_shape: tuple[int, ...]) -> Array:
    """Pᵀ s: the leaf's score as a function of the whole site."""
    if region is None:
        return score
    score = score.reshape([e // b for e, b in zip(region.extent, region.block, strict=True)]) / region.averaged
    for axis, b in enumerate(region.block):
        score = jnp.repeat(score, b, axis=axis) if b > 1 else score
    return jnp.zeros(site_shape, score.dtype).at[region.slices].set(score)


class OnDemand(list[Any]):
    """The outputs of the batches, each evaluated when it is first read."""

    def __init__(self, batches: tuple[Batch, ...], xs: dict[str, Array], noise: Noise):
        super().__init__([None] * len(batches))
        self.evaluate = lambda i: batches[i](xs, noise)

    def __getitem__(self, i: Any) -> Any:
        if super().__getitem__(i) is None:
            self[i] = self.evaluate(i)
        return super().__getitem__(i)


def batch_of(group: Group) -> Batch:
    """One batch of the graph, its conditions stacked."""
    members: tuple[Member, ...] = group.members
    names = members[0].conditions
    conditions = {name: jnp.stack([jnp.asarray(m.conditions[name]) for m in members]) for name in names}
    return Batch(
        group.factor.holding({}), group.own_noise, conditions, tuple((m.site, m.region) for m in members), group.latent
    )
