"""The state of training and its step: one compiled loop over as many steps as asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import PyTree

from composeprob import tuning
from composeprob.training.loss import Batch, draw_batch, losses
from composeprob.training.recipe import CrossCondition, CrossLevel, Denoising, Recipe

if TYPE_CHECKING:
    from composeprob.factors.networks import Network


class State(NamedTuple):
    """The `State` of training is what the next step needs; every leaf is an array.

    Attributes:
        step: number of steps done.
        parameters: the network's weights.
        average: their exponential moving average.
        optimiser: Optax's state.
    """

    step: Array
    parameters: PyTree[Array]
    average: PyTree[Array]
    optimiser: PyTree[Array]


class Record(NamedTuple):
    """A `Record` is what one call reports: the mean loss of each step, and sums and counts per bin of log-SNR."""

    loss: Array
    bin_sum: Array
    bin_count: Array


Advance = Callable[[State, np.int32], tuple[State, Record]]
"""(state, n) → the state n steps later, and what these report."""


def bin_edges(recipe: Recipe) -> np.ndarray:
    """Returns the edges of the bins of log-SNR, shape (bins + 1,)."""
    low, high = recipe.log_snr_range()
    return np.linspace(low, high, tuning.TRAINING_BINS + 1)


def initial(recipe: Recipe, network: Network) -> State:
    """Makes the state before the first step; the average starts at the initial weights."""
    parameters = eqx.filter(network, eqx.is_inexact_array)
    copy = jax.tree.map(jnp.copy, parameters)
    return State(jnp.zeros((), jnp.int32), parameters, copy, recipe.optimiser().init(parameters))


def make_advance(recipe: Recipe, network: Network, key: Array) -> Advance:
    """Compiles ``advance(state, n)``, of n ≤ `TRAINING_STEPS` steps; n is traced, so one compilation serves all.

    The randomness of step i comes from ``fold_in(key, i)`` alone: how steps are divided among calls, or resumed,
    changes nothing.
    """
    factor = recipe.factor(network)
    static = eqx.filter(network, eqx.is_inexact_array, inverse=True)
    optimiser = recipe.optimiser()
    edges = jnp.asarray(bin_edges(recipe))
    denoising, level, condition = recipe.loss(Denoising), recipe.loss(CrossLevel), recipe.loss(CrossCondition)

    def mean_loss(parameters: PyTree[Array], batch: Batch) -> tuple[Array, Array]:
        trained = eqx.tree_at(lambda f: f.network, factor, eqx.combine(parameters, static))
        each = losses(trained, batch, denoising is not None)
        total = zero = jnp.zeros(())
        if denoising is not None:
            weight = 1.0 if denoising.weight is None else jax.vmap(denoising.weight)(batch.noise.log_snr)
            total = weight * each.denoising
        crossed = (level.weight * each.cross_level if level else zero) + (
            condition.weight * each.cross_condition if condition else zero
        )
        return jnp.mean(total + crossed), crossed if denoising is None else each.denoising

    def gradient(parameters: PyTree[Array], step_key: Array) -> tuple[PyTree[Array], Array, Array]:
        """The mean gradient over the batch's chunks, and every event's loss and log-SNR."""
        size = recipe.batch.part
        parts = recipe.batch.size // size

        def accumulate(total: PyTree[Array], part: Array) -> tuple[PyTree[Array], tuple[Array, Array]]:
            batch = draw_batch(recipe, jax.random.fold_in(step_key, part), size)
            grad, each = jax.grad(mean_loss, has_aux=True)(parameters, batch)
            return jax.tree.map(lambda t, g: t + g / parts, total, grad), (each, batch.noise.log_snr)

        zero = jax.tree.map(jnp.zeros_like, parameters)
        grad, (each, log_snr) = jax.lax.scan(accumulate, zero, jnp.arange(parts))
        return grad, each.ravel(), log_snr.ravel()

    def step(i: Array, carry: tuple[State, Record]) -> tuple[State, Record]:
        state, record = carry
        grad, each, log_snr = gradient(state.parameters, jax.random.fold_in(key, state.step))
        updates, optimiser_state = optimiser.update(grad, state.optimiser, state.parameters)
        parameters = eqx.apply_updates(state.parameters, updates)
        average = jax.tree.map(lambda a, p: recipe.ema * a + (1 - recipe.ema) * p, state.average, parameters)
        place = jnp.clip(jnp.searchsorted(edges, log_snr, side="right") - 1, 0, tuning.TRAINING_BINS - 1)
        record = Record(
            record.loss.at[i].set(jnp.mean(each)),
            record.bin_sum.at[place].add(each),
            record.bin_count.at[place].add(1),
        )
        return State(state.step + 1, parameters, average, optimiser_state), record

    @jax.jit
    def advance(state: State, steps: Array | np.int32) -> tuple[State, Record]:
        empty = Record(
            jnp.zeros(tuning.TRAINING_STEPS),
            jnp.zeros(tuning.TRAINING_BINS),
            jnp.zeros(tuning.TRAINING_BINS, jnp.int32),
        )
        return jax.lax.fori_loop(0, steps, step, (state, empty))

    return advance
