"""DDPM's step, and Heun's correction of it: nothing is fitted."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Evaluation, Position
from composeprob.samplers.base import REVERSE
from composeprob.samplers.control import steered
from composeprob.samplers.integrators import Departure, Integrator, Seen
from composeprob.samplers.reverse import leaning, log_ratio_of_leaning, reverse_step, second_order
from composeprob.samplers.spread import Spread
from composeprob.samplers.turned import Turned


class Explicit(Integrator):
    """`reverse_step`, corrected by `second_order`; ``control`` follows the fixed one of `control.steered`.

    Where levels are Δλ apart in log-SNR it is unstable for products of n factors from n·Δλ ≈ 2 on.
    """

    name = "explicit"

    def look(
        self,
        spread: Spread,
        density: AnnealedDensity,
        level: Array,
        chains: tuple[Position, Evaluation],
        log_weights: Array,
    ) -> None:
        return None

    def steered(
        self,
        evaluation: Evaluation,
        position: Position,
        half: Array,
        seen: Seen,
        density: AnnealedDensity,
        level: Array,
    ) -> Evaluation:
        return steered(evaluation, position, density, level) if self.control else evaluation

    def depart(
        self, key: Array, position: Position, began: Evaluation, seen: Seen, density: AnnealedDensity, *levels: Array
    ) -> Departure:
        above, level = levels
        drift = began.parts.drift
        followed = leaning(position, drift, began.score, density, above, level)
        moved = reverse_step(jax.random.fold_in(key, REVERSE), position, followed, density, above, below=level)
        return Departure(moved, None, log_ratio_of_leaning(position, drift, followed, moved, density, above, level))

    def settle(
        self,
        departure: Departure,
        ended: Evaluation,
        position: Position,
        began: Evaluation,
        seen: tuple[Seen, Seen],
        density: AnnealedDensity,
        *levels: Array,
    ) -> tuple[Position, Array]:
        moved = departure.moved
        settled = second_order(moved, ended.parts.drift, position, began.parts.drift, density, *levels)
        sigma = density.schedule.at(levels[1]).sigma
        squares = [power * ((settled[name] - moved[name]) / sigma) ** 2 for name, power in density.top.power.items()]
        return settled, jnp.mean(jnp.concatenate([each.reshape(-1) for each in squares]))

    def turned(self, seen: tuple[Seen, Seen], density: AnnealedDensity, *levels: Array) -> Turned:
        level, below = levels
        return Turned.between(density, level, below, None, self.control)
