"""Swaps between neighbouring levels: each replica proposes what noise, or the reverse process, makes of the other."""

from __future__ import annotations

import dataclasses
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Evaluation, Position, Target
from composeprob.errors import CapabilityError
from composeprob.kernels.base import log_density_of
from composeprob.kernels.gibbs import GibbsState
from composeprob.pytree import all_finite, where
from composeprob.samplers.fit import flat, power, unflat
from composeprob.samplers.weights import gain_between

NEEDS = {"energy": frozenset({"score", "energy", "mode_depth"}), "feynman_kac": frozenset({"score", "feynman_kac"})}
"""What each kind of swap asks of a density."""


def best(density: AnnealedDensity) -> str:
    """Returns the kind of swap to make where none is asked for: by energies, if they can be trusted.

    Raises:
        CapabilityError: the density offers what neither needs.
    """
    for kind, needed in NEEDS.items():
        if needed <= density.capabilities:
            return kind
    raise CapabilityError(
        "Swaps need log-densities that can be trusted between modes, or a Feynman–Kac rate, and this program has "
        "neither.",
        where=density.described.where,
        fix="use cp.AnnealedMCMC, or calibrate the factors with cp.calibrate.",
    )


class Hop(eqx.Module):
    """How a replica leads from one level to another: y' ~ N(mean, var) in y = x/α.

    Down, with s = σ²/α² from s₁ to s₀ and P factors whose data are points, mean = s₀/s₁·y + (1 − s₀/s₁)·(y + s₁·S/P)
    and var = s₀(s₁ − s₀)/(s₁·P): DDPM's step for P = 1. Up, mean = y and var = (s₁ − s₀)/P: what noise makes of it,
    whose reversal that is. P is the total power of the factors, so that a product's narrow replicas meet.

    Attributes:
        mean, var: (d,).
    """

    mean: Array
    var: Array

    @classmethod
    def between(cls, x: Position, drift: Position, density: AnnealedDensity, start: Array, end: Array, p: Array) -> Hop:
        """The hop of a replica at x, where S is ``drift`` in x, from the level ``start`` to ``end`` with power P."""
        here, there = density.schedule.at(start), density.schedule.at(end)
        s1, s0 = (here.sigma / here.alpha) ** 2, (there.sigma / there.alpha) ** 2
        y = flat(x, density) / here.alpha
        clean = y + s1 * here.alpha * flat(drift, density) / p
        down = s0 / s1 * y + (1 - s0 / s1) * clean
        step = jnp.where(start == end, s1, jnp.abs(s1 - s0))  # a hop to itself is never made
        return cls(jnp.where(s0 < s1, down, y), step * jnp.where(s0 < s1, s0 / s1, 1.0) / p)

    def draw(self, key: Array, like: Position, density: AnnealedDensity, end: Array) -> Position:
        """x' at the level ``end``; static sites as in ``like``."""
        y = self.mean + jnp.sqrt(self.var) * jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return unflat(density.schedule.at(end).alpha * y, like, density)

    def log_density(self, x: Position, density: AnnealedDensity, end: Array) -> Array:
        """Of y' = x/α at the level ``end``, up to a constant."""
        away = flat(x, density) / density.schedule.at(end).alpha - self.mean
        return -0.5 * jnp.sum(away**2 / self.var + jnp.log(self.var))


class Swap(eqx.Module):
    """How a swap is proposed and weighed.

    With x at level a and x' at b, candidates c at a, from x', and c' at b, from x, take their places with probability
    min(1, R). By energies, R = π_a(c)·π_b(c')·k(x'|c)·k(x|c') / (π_a(x)·π_b(x')·k(c|x')·k(c'|x)), k the law of the hop.
    By Feynman–Kac path weights, log R is what the way down gains, less what the way up does: it needs scores and rates
    only, and is right as the levels' distance goes to 0.

    Attributes:
        energies: whether by energies.

    References:
        *CREPE: controlling diffusion with replica exchange* (ICLR 2026), for path weights. Ballard and Jarzynski 2009,
        *Replica exchange with nonequilibrium switches*, for swaps whose proposals are made by a process.
    """

    energies: bool = eqx.field(static=True)

    def target(self, density: AnnealedDensity, level: Array) -> Target:
        """What replicas are evaluated by."""
        if self.energies:
            return lambda position: density.evaluator(position, level).alone
        return partial(density.evaluator, level=level)

    def hop(self, x: Position, evaluation: Evaluation, density: AnnealedDensity, start: Array, end: Array) -> Hop:
        """From x, evaluated under ``start``."""
        p = power(density)
        if self.energies:
            return Hop.between(x, evaluation.score, density, start, end, p)
        return Hop.between(x, evaluation.parts.drift, density, start, end, jnp.ones_like(p))

    def half(
        self,
        candidate: tuple[Position, Evaluation],
        other: tuple[Position, Evaluation],
        density: AnnealedDensity,
        level: Array,
        beyond: Array,
    ) -> Array:
        """What the candidate at ``level``, made of the other replica, which is at ``beyond``, adds to log R."""
        (c, there), (x, here) = candidate, other
        if self.energies:
            back = self.hop(c, there, density, level, beyond).log_density(x, density, beyond)
            forth = self.hop(x, here, density, beyond, level).log_density(c, density, level)
            return log_density_of(there) - log_density_of(here) + back - forth
        down = gain_between(here.parts, there.parts, density, level, beyond)
        up = gain_between(there.parts, here.parts, density, beyond, level)
        return jnp.where(level < beyond, down, -up)


def swapped(
    key: Array, states: GibbsState, levels: Array, odd: Array, swap: Swap, density: AnnealedDensity
) -> tuple[GibbsState, Array, Array]:
    """One ensemble after its rungs 2j + odd have tried to swap with those above them, 2j + odd + 1.

    Args:
        key: the ensemble's.
        states: of its replicas, each leaf of shape (L, …), rung 0 the cleanest.
        levels: of the rungs, (L,), rising.
        odd: 0 or 1.
        swap, density: as they are.

    Returns:
        The states; the rung that each rung's replica came from, (L,); and the probability of each rung's swap with the
        one above it, (L,), NaN where none was tried.
    """
    count = len(levels)
    rungs = jnp.arange(count)
    partner = rungs + jnp.where((rungs + odd) % 2 == 0, 1, -1)
    partner = jnp.where((partner < 0) | (partner >= count), rungs, partner)
    lower, hops = jnp.minimum(rungs, partner), levels[partner]
    position, evaluation = states.position, states.evaluation
    there, seen = jax.tree.map(lambda leaf: leaf[partner], (position, evaluation))

    def propose(key: Array, x: Position, e: Evaluation, start: Array, end: Array) -> tuple[Position, Evaluation]:
        candidate = swap.hop(x, e, density, start, end).draw(key, x, density, end)
        return candidate, swap.target(density, end)(candidate)

    keys = jax.random.split(key, count + 1)
    candidates = jax.vmap(propose)(keys[1:], there, seen, hops, levels)
    halves = jax.vmap(lambda c, o, level, beyond: swap.half(c, o, density, level, beyond))(
        candidates, (there, seen), levels, hops
    )
    usable = jax.vmap(lambda c: all_finite((c[0], c[1].score)))(candidates)
    log_ratio = halves + halves[partner]
    usable = usable & usable[partner] & (partner != rungs) & ~jnp.isnan(log_ratio)
    log_uniform = -jax.random.exponential(keys[0], (count,))[lower]
    taken = usable & (log_uniform <= log_ratio)
    position, evaluation = jax.vmap(where)(taken, candidates, (position, evaluation))
    tried = jnp.where(usable, jnp.exp(jnp.minimum(log_ratio, 0.0)), 0.0)
    chance = jnp.where((partner == rungs + 1), tried, jnp.nan)
    moved = dataclasses.replace(states, position=position, evaluation=evaluation)
    return moved, jnp.where(taken, partner, rungs), chance
