"""MCMC inside the cells of modes: what the reverse diffusion brought there follows the energy's own law afterwards."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Evaluation
from composeprob.factors.calibrated import nearest
from composeprob.kernels import HMC, Adaptive, adapt, mean_acceptance, scaled_step

STEPS = 10
"""Transitions of one chain at one level, the first half of which tunes the step size faster."""


@eqx.filter_jit
def settle(
    density: AnnealedDensity, level: Array, x: Array, cells: Array, centres: Array, key: Array, log_scale: Array
) -> tuple[Array, Array]:
    """Chains moved by HMC that leaves F_k invariant within the cell of each, and the tuned log-scale of its step.

    Args:
        density: of one noised site ``"x"``.
        level: k, an array.
        x: (N, \\*event), each in its own cell.
        cells: the index of each chain's cell, (N,).
        centres: (M, \\*event), in units of x/α.
        key: a typed random key.
        log_scale: where tuning starts.
    """
    # Full refreshment of the momentum: with a partial one, what the cell refuses would have to flip it.
    kernel = HMC(Adaptive(), num_leapfrog=3, damping=0.0)
    noise = density.schedule.at(level)
    rule: Any = kernel.step_size

    def target(position: Any, cell: Array) -> Evaluation:
        evaluation = density.evaluator(position, level)
        inside = nearest(position["x"] / noise.alpha, centres) == cell
        value = evaluation.log_density
        assert value is not None  # only factors with an energy are calibrated
        return dataclasses.replace(evaluation, log_density=jnp.where(inside, value, -jnp.inf))

    def start(x: Array, cell: Array) -> Any:
        return kernel.init(key, {"x": x}, partial(target, cell=cell))

    def step(key: Array, state: Any, cell: Array, size: Array) -> Any:
        return kernel.step(key, state, partial(target, cell=cell), size)

    def transition(i: Array, carry: Any) -> Any:
        states, log_scale = carry
        keys = jax.random.split(jax.random.fold_in(key, i), len(x))
        size = scaled_step(log_scale, noise.sigma, kernel)
        states, info = jax.vmap(step, (0, 0, 0, None))(keys, states, cells, size)
        gain = jnp.where(2 * i < STEPS, 1.0, 0.25)
        return states, adapt(log_scale, mean_acceptance(info.acceptance), rule.target(kernel), gain)

    states, log_scale = jax.lax.fori_loop(0, STEPS, transition, (jax.vmap(start)(x, cells), log_scale))
    return states.position["x"], log_scale
