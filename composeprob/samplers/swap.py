"""Swaps between neighbouring levels: each replica proposes what noise, or the reverse process, makes of the other."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Evaluation
from composeprob.errors import CapabilityError
from composeprob.kernels.base import log_density_of
from composeprob.pytree import all_finite
from composeprob.samplers.layout import Layout
from composeprob.samplers.step import Step
from composeprob.samplers.weights import incremental_log_weight
from composeprob.schedule import Noise

NEEDS = {"energy": frozenset({"score", "energy", "mode_depth"}), "feynman_kac": frozenset({"score", "feynman_kac"})}
"""What each kind of swap asks of a density."""


def default_swap(density: AnnealedDensity) -> str:
    """The kind of swap where the user names none: by energies, if they can be trusted.

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


class Swap(eqx.Module):
    """How a swap is proposed and weighed.

    With y at level a and y' at b, candidates c at a, from y', and c' at b, from y, take their places with probability
    min(1, R). By energies, R = π_a(c)·π_b(c')·k(y'|c)·k(y|c') / (π_a(y)·π_b(y')·k(c|y')·k(c'|y)), k the law of
    `Step.bridge`: every level keeps its π. By Feynman–Kac path weights, log R is what the way down gains, less what the
    way up does: it needs scores and rates only, and is right as the levels' distance goes to 0.

    Attributes:
        power: P of the bridge, (d,): for energies the total power of the factors, so that a product's narrow replicas
            meet; 1 for path weights, which are those of DDPM's step.
        energies: whether by energies.

    References:
        *CREPE: controlling diffusion with replica exchange* (ICLR 2026), for path weights. Ballard and Jarzynski 2009,
        *Replica exchange with nonequilibrium switches*, for swaps whose proposals are made by a process.
    """

    power: Array
    energies: bool = eqx.field(static=True)

    @classmethod
    def of_density(cls, density: AnnealedDensity, energies: bool) -> Swap:
        power = Layout.of_density(density).power(density)
        return cls(power if energies else jnp.ones_like(power), energies)

    def propose(self, start: Noise, end: Noise, v: Array, found: Evaluation, noise: Array) -> Array:
        """Where a replica at v, (D,), goes from a level to another; static entries, and one that is there, stay."""
        y, (law, drift) = v[: self.power.size], self._bridge(start, end, found)
        moved = law.draw(y, drift, noise)
        stays = (start.index == end.index) | ~all_finite(moved)
        return jnp.concatenate([jnp.where(stays, y, moved), v[self.power.size :]])

    def log_ratios(
        self, noise: Noise, partner: Array, points: Array, here: Evaluation, candidates: Array, there: Evaluation
    ) -> Array:
        """log R of each rung's swap with its partner, (L,); NaN where it is of no use.

        Args:
            noise: of the rungs' levels.
            partner: the rung that each swaps with, (L,).
            points, here: of the replicas, (L, D), and their evaluations.
            candidates, there: what is to take their places, made of their partners.
        """
        others = jax.tree.map(lambda leaf: leaf[partner], (noise, points, here))
        half = jax.vmap(self.half)(noise, candidates, there, *others)
        if self.energies:
            half = half + log_density_of(there) - log_density_of(here)
        half = jnp.where(jax.vmap(all_finite)((candidates, there.score)), half, jnp.nan)
        return jnp.where(partner == jnp.arange(len(partner)), jnp.nan, half + half[partner])

    def half(self, end: Noise, c: Array, there: Evaluation, start: Noise, v: Array, here: Evaluation) -> Array:
        """What the candidate c, made of v, adds to log R, beside energies: on the way up a gain is minus that down."""
        if not self.energies:
            return incremental_log_weight(here.parts, there.parts, start, end)
        (forth, drift), (back, drift_back) = self._bridge(start, end, here), self._bridge(end, start, there)
        y, c = v[: self.power.size], c[: self.power.size]
        return back.log_density(y, c, drift_back) - forth.log_density(c, y, drift)

    def _bridge(self, start: Noise, end: Noise, found: Evaluation) -> tuple[Step, Array]:
        """The law that leads from a level to another, and the drift that it follows, none up."""
        drift = found.score[: self.power.size] if self.energies else found.parts.drift
        return Step.bridge(start.variance, end.variance, self.power), jnp.where(end.index < start.index, drift, 0.0)


def equal_rejection(levels: Array, swaps: Array, density: AnnealedDensity, energies: bool) -> Array:
    """Levels between which neighbours would be refused equally often, (L,), by the mean probabilities of swaps at the
    present ones, (L − 1,).

    Path weights have an error of their own, which follows from the levels' distance: with them that counts for two
    thirds.
    """
    between = jnp.maximum(1 - swaps, tuning.RUNGS.least_rejection)
    if not energies:
        distance = -jnp.diff(jnp.asarray(density.schedule.log_snr)[levels])
        between = between / jnp.sum(between) + 2 * distance / jnp.sum(distance)
    barrier = jnp.concatenate([jnp.zeros(1), jnp.cumsum(between)])
    wanted = jnp.interp(jnp.linspace(0, barrier[-1], len(levels)), barrier, levels.astype(barrier.dtype))
    return distinct_levels(jnp.round(wanted).astype(jnp.int32), density.num_levels)


def distinct_levels(levels: Array, num_levels: int) -> Array:
    """Rising levels moved as little as it takes to be L different ones from 0 to K − 1, these two among them."""
    index = jnp.arange(len(levels))
    levels = index + jax.lax.cummax(levels - index)  # each above the one below it
    top = num_levels - len(levels) + index  # and none so high that those above it have no room
    return jnp.minimum(levels, top).at[0].set(0).at[-1].set(num_levels - 1).astype(jnp.int32)
