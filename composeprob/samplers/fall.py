"""One level of `SMC` before any transition: every chain's way down from the level above, and what it weighs then."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import Array

from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Evaluation, Position
from composeprob.kernels import KernelState
from composeprob.kernels.base import log_density_of
from composeprob.pytree import all_finite, where
from composeprob.samplers.base import Run
from composeprob.samplers.integrators import Departure, Seen
from composeprob.samplers.potentials import averaged_potential
from composeprob.samplers.weights import first_weight, gain_between

if TYPE_CHECKING:
    from composeprob.samplers.smc import SMC


def fall(
    sampler: SMC, run: Run, keys: Array, density: AnnealedDensity, level: Array, above: Array
) -> tuple[KernelState, Array, Array]:
    """The chains at this level, and what each one's log-weight gains: −∞ where the density is 0, NaN where that or the
    score is not finite. Then by how much the second order moved each one, as
    `Integrator.settle` says. One evaluation, two of second order.

    At the first level, which is ``above`` itself, they stay where they were drawn, and are evaluated for the first
    time. Under density weights they stay at every level.

    Args:
        sampler: prepared.
        run: at the level above.
        keys: this level's key of every chain here, (n,).
        density, level, above: where the chains go, and where they come from.
    """
    spread, states, falls = run.spread, run.chains, level < above
    step, levels, moves = sampler.integrator, (above, level), sampler.weights == "feynman_kac"
    twice = moves and sampler.second_order
    half = (spread.numbers(keys) >= spread.number_of(keys) // 2).astype(jnp.int32)

    def look(at: Array, position: Position, evaluation: Evaluation) -> Seen:
        return step.look(spread, density, at, (position, evaluation), run.log_weights) if moves else None

    def steered(evaluation: Evaluation, x: Position, half: Array, seen: Seen, at: Array) -> Evaluation:
        return step.steered(evaluation, x, half, seen, density, at) if moves else evaluation

    seen = look(above, states.position, states.evaluation)

    def depart(key: Array, half: Array, state: KernelState) -> tuple[Departure, Position]:
        x = state.position
        if not moves:
            return Departure(x, None, jnp.zeros(())), x
        began = steered(state.evaluation, x, half, seen, above)
        departure = step.depart(key, x, began, seen, density, *levels)
        return departure, where(falls, departure.moved, x)

    departures, position = spread.map(depart, keys, half, states)

    def arrive(i: Array, carry: tuple[Position, Evaluation, Seen, Array]) -> tuple[Position, Evaluation, Seen, Array]:
        position, _, met, error = carry
        evaluation = spread.map(sampler.target(density, level), position)

        def meet() -> tuple[Position, Seen, Array]:
            met = look(level, position, evaluation)

            def settle(
                half: Array, departure: Departure, state: KernelState, x: Position, e: Evaluation
            ) -> tuple[Position, Array]:
                began = steered(state.evaluation, state.position, half, seen, above)
                ended = steered(e, x, half, met, level)
                return step.settle(departure, ended, state.position, began, (seen, met), density, *levels)

            if not twice:
                return position, met, error
            settled, by = spread.map(settle, half, departures, states, position, evaluation)
            return settled, met, by

        first = falls & (i == 0) if twice else falls
        position, met, error = jax.lax.cond(first, meet, lambda: (position, met, error))
        return position, evaluation, met, error

    # A loop, so that the networks are there once for both evaluations.
    begin = jnp.where(falls, 0, 1) if twice else 1
    still = (position, states.evaluation, seen, jnp.zeros(keys.shape))
    position, evaluation, met, error = jax.lax.fori_loop(begin, 2, arrive, still)

    turned = step.turned((seen, met), density, *levels) if moves and density.evaluator.plain else None

    def weigh(
        key: Array, half: Array, departure: Departure, state: KernelState, x: Position, evaluation: Evaluation
    ) -> tuple[KernelState, Array]:
        before, came = steered(state.evaluation, state.position, half, seen, above), state.position
        state = dataclasses.replace(state, position=x, evaluation=evaluation)
        if sampler.moves is not None:
            state = sampler.moves.kernel.relevel(state, lambda _: evaluation)  # type: ignore[arg-type]

        def gained() -> Array:
            if moves:
                potential = averaged_potential(key, half, x, came, before.parts.log_potential, density, levels, turned)
                left = dataclasses.replace(before.parts, log_potential=potential)
                after = steered(evaluation, x, half, met, level).parts
                total = departure.log_ratio + gain_between(left, after, density, level, above)
            else:
                total = log_density_of(evaluation) - log_density_of(before)
            usable = all_finite((before.parts.drift, evaluation.score)) & (total < jnp.inf)
            # A chain that was at a zero weighs nothing already: it has −∞/−∞ to gain.
            return jnp.where(before.zero, -jnp.inf, jnp.where(usable, total, jnp.nan))

        return state, jax.lax.cond(falls, gained, lambda: first_weight(state, density, level))

    states, gain = spread.map(weigh, keys, half, departures, states, position, evaluation)
    return states, gain, error
