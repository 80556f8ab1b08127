"""Runs of many chains of a kernel at one level, for the tests of kernels."""

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from composeprob.density.evaluation import Target
from composeprob.kernels import Gibbs, Info, Kernel, KernelState
from composeprob.kernels.gibbs import parts_of
from targets import Law, evaluate
from zscores import z_scores


@dataclasses.dataclass(frozen=True)
class Run:
    """Outcome of chains that started from exact draws: z-scores, acceptance, and how
    far they went."""

    values: dict[str, np.ndarray]
    """Statistics of the law, (chains, draws) each."""
    scores: dict[str, float]
    acceptance: float
    moved: float
    """E‖x_T − x_0‖² / (2·E‖x − E x‖²): 1 for chains that have forgotten their start."""


def steps_of(kernel: Kernel, factor: float = 1.0) -> Array:
    """Return the argument ``step_size`` of `step`: the kernel's times a factor, one for
    each block where it has any."""
    sizes = [factor * part.step_size for part in parts_of(kernel)]
    return jnp.stack(sizes) if isinstance(kernel, Gibbs) else sizes[0]


def driven(
    kernel: Kernel,
    noise: Array,
    state: KernelState,
    target: Target,
    step_size: Array | float,
    evaluations: Array | int | None = None,
) -> tuple[KernelState, Info]:
    """Make one transition of given noise, evaluation by evaluation: as many as the
    kernel has, or ``evaluations``."""
    if evaluations is None:
        evaluations = kernel.evaluations_per_step

    def onward(i: Array, progress: tuple[Any, Any]) -> tuple[Any, Any]:
        trajectory, position = progress
        return kernel.advance(i, trajectory, target(position))

    begun = kernel.begin(noise, state, step_size)
    trajectory, position = jax.lax.fori_loop(0, evaluations - 1, onward, begun)
    return kernel.finish(trajectory, target(position))


@partial(jax.jit, static_argnums=(1, 5))
def transitions(
    kernel: Kernel,
    target: Target,
    key: Array,
    states: KernelState,
    step_size: Array,
    count: int,
) -> tuple[KernelState, Info]:
    """Make `count` transitions of chains stacked on the leading axis; Info gets the
    axes (count, chains)."""
    num_chains = jax.tree.leaves(states.position)[0].shape[0]

    def one(states: KernelState, key: Array) -> tuple[KernelState, Info]:
        keys = jax.random.split(key, num_chains)
        return jax.vmap(lambda k, s: kernel.step(k, s, target, step_size))(keys, states)

    return jax.lax.scan(one, states, jax.random.split(key, count))


@partial(jax.jit, static_argnums=1)
def start(kernel: Kernel, target: Target, key: Array, positions: Any) -> KernelState:
    """Return the states of chains at `positions`."""
    num_chains = jax.tree.leaves(positions)[0].shape[0]
    keys = jax.random.split(key, num_chains)
    return jax.vmap(lambda k, x: kernel.init(k, x, target))(keys, positions)


@functools.cache
def _drawing(draw: Callable[[Array, int], Any]) -> Callable[[Array, int], Any]:
    """Return a law's draws, compiled once for all kernels that are tried on it."""
    return jax.jit(draw, static_argnums=1)


@functools.cache
def _measuring(
    statistics: Callable[[Any], dict[str, Array]],
) -> Callable[[Any], dict[str, Array]]:
    """Return a law's statistics of every chain, likewise."""
    return jax.jit(jax.vmap(statistics))


def from_exact_draws(
    kernel: Kernel,
    law: Law,
    *,
    started_from: Law | None = None,
    seed: int = 0,
    num_chains: int = 10_000,
    num_transitions: int = 300,
    num_draws: int = 20,
) -> Run:
    """Return the outcome of chains from exact draws of a law, measured `num_draws`
    times: does the law stay, do the chains move?

    Args:
        kernel: with a single number as its step size.
        law: the target, whose statistics are checked.
        started_from: the stationary law, drawn from and expected, where it is not the
            target (a known bias).
        seed: of every random number.
        num_chains, num_transitions, num_draws: num_chains·num_draws values enter each
            average.
    """
    stationary = started_from or law
    target = evaluate(law.log_density)
    key_draw, key_init, key_run = jax.random.split(jax.random.key(seed), 3)
    origin = _drawing(stationary.draw)(key_draw, num_chains)
    states = start(kernel, target, key_init, origin)
    measure = _measuring(law.statistics)
    values = []
    acceptance = []
    for key in jax.random.split(key_run, num_draws):
        states, info = transitions(
            kernel, target, key, states, steps_of(kernel), num_transitions // num_draws
        )
        values.append(measure(states.position))
        acceptance.append(info.acceptance.mean())
    stacked = {name: np.stack([v[name] for v in values], axis=1) for name in values[0]}

    def squared_jump(a: Array, b: Array) -> Array:
        return jnp.sum((a - b) ** 2) / num_chains

    jumps = jax.tree.map(squared_jump, states.position, origin)
    return Run(
        values=stacked,
        scores=z_scores(stacked, stationary.expected),
        acceptance=float(np.mean(acceptance)),
        moved=float(sum(jax.tree.leaves(jumps))) / (2 * stationary.spread),
    )
