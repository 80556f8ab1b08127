"""CompLift's baselines restated: their levels, their start, their steps, on whatever
density is composed.

Samples start from N(0, I) at the noisiest of 50 levels, where β of 10⁻⁴ to 0.02 still
leaves α = 0.78 of the signal. What is not theirs: each chain has a uniform number of
its own in its Metropolis test; their code has one for all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import composeprob as cp

K = 50
BETA = np.linspace(1e-4, 0.02, K)
KEPT = np.cumprod(1 - BETA)
LEVELS = cp.Schedule.from_arrays(
    np.sqrt([*KEPT, 1e-4]), np.sqrt(1 - np.array([*KEPT, 1e-4]))
)
"""Theirs and one of noise alone, which none of these visits: without it the library
refuses to start there."""
STEPS, LANGEVIN, LEAPFROG, LEAPFROGS, DAMPING = 10, 0.001, 0.03, 3, 0.5


def reverse(density: cp.AnnealedDensity, key: Array, x: Array, k: Array) -> Array:
    """One DDPM step from level k on, of the composed score; the last has no noise."""
    before = jnp.where(k > 0, jnp.asarray(KEPT)[k - 1], 1.0)
    kept, beta = jnp.asarray(KEPT)[k], jnp.asarray(BETA)[k]
    clean = (x + (1 - kept) * density.score({"x": x}, k)["x"]) / jnp.sqrt(kept)
    mean = (
        beta * jnp.sqrt(before) / (1 - kept) * clean
        + (1 - before) * jnp.sqrt(1 - beta) / (1 - kept) * x
    )
    return mean + jnp.sqrt(beta * (1 - before) / (1 - kept)) * jax.random.normal(
        key, x.shape
    )


def langevin(adjusted: bool) -> Callable[..., Array]:
    def level(density: cp.AnnealedDensity, key: Array, x: Array, k: Array) -> Array:
        def step(
            state: tuple[Array, Array, Array], key: Array
        ) -> tuple[tuple[Array, Array, Array], None]:
            x, value, score = state
            noise, uniform = jax.random.split(key)
            new = (
                x
                + LANGEVIN * score
                + jnp.sqrt(2 * LANGEVIN) * jax.random.normal(noise, x.shape)
            )
            new_value, new_score = at(density, new, k)
            there = jnp.sum((new - x - LANGEVIN * score) ** 2)
            back = jnp.sum((x - new - LANGEVIN * new_score) ** 2)
            log_ratio = new_value - value + (there - back) / (4 * LANGEVIN)
            keep = (
                jnp.log(jax.random.uniform(uniform)) < log_ratio if adjusted else True
            )
            return jax.tree.map(
                lambda a, b: jnp.where(keep, a, b), (new, new_value, new_score), state
            ), None

        return jax.lax.scan(
            step, (x, *at(density, x, k)), jax.random.split(key, STEPS)
        )[0][0]

    return level


def hamiltonian(adjusted: bool) -> Callable[..., Array]:
    def level(density: cp.AnnealedDensity, key: Array, x: Array, k: Array) -> Array:
        def step(
            state: tuple[Array, Array], key: Array
        ) -> tuple[tuple[Array, Array], None]:
            x, v = state
            noise, uniform = jax.random.split(key)
            v = DAMPING * v + jnp.sqrt(1 - DAMPING**2) * jax.random.normal(
                noise, x.shape
            )
            value, score = at(density, x, k)
            new_x = x
            new_v = v
            new_value = value
            for _ in range(LEAPFROGS):
                half = new_v + 0.5 * LEAPFROG * score
                new_x = new_x + LEAPFROG * half
                new_value, score = at(density, new_x, k)
                new_v = half + 0.5 * LEAPFROG * score
            log_ratio = new_value - value + 0.5 * (jnp.sum(v**2) - jnp.sum(new_v**2))
            keep = (
                jnp.log(jax.random.uniform(uniform)) < log_ratio if adjusted else True
            )
            # As theirs: a rejected move keeps the momentum that was refreshed before,
            # not one of the other sign.
            return (jnp.where(keep, new_x, x), jnp.where(keep, new_v, state[1])), None

        first, rest = jax.random.split(key)
        start = (x, jax.random.normal(first, x.shape))
        return jax.lax.scan(step, start, jax.random.split(rest, STEPS))[0][0]

    return level


def at(density: cp.AnnealedDensity, x: Array, k: Array) -> tuple[Array, Array]:
    value, score = density.value_and_score({"x": x}, k)
    return value, score["x"]


BASELINES: dict[str, tuple[Callable[..., Array], int]] = {
    "Summed scores, reverse diffusion": (reverse, K),
    "ULA 0.001, 10 a level": (langevin(adjusted=False), K * (STEPS + 1)),
    "MALA 0.001, 10 a level": (langevin(adjusted=True), K * (STEPS + 1)),
    "U-HMC 0.03 × 3, 10 a level": (
        hamiltonian(adjusted=False),
        K * STEPS * (LEAPFROGS + 1),
    ),
    "HMC 0.03 × 3, 10 a level": (
        hamiltonian(adjusted=True),
        K * STEPS * (LEAPFROGS + 1),
    ),
}
"""Steps of each baseline at a level, and its evaluations of the factors."""


def run(name: str, density: cp.AnnealedDensity, key: Array, n: int) -> np.ndarray:
    """n samples (n, 2) of a baseline on a density that was compiled on `LEVELS`."""
    level = BASELINES[name][0]

    def chain(key: Array) -> Array:
        first, *rest = jax.random.split(key, K + 1)

        def visit(x: Array, at: Any) -> tuple[Array, None]:
            key, k = at
            return level(density, key, x, k), None

        return jax.lax.scan(
            visit,
            jax.random.normal(first, (2,)),
            (jnp.stack(rest), jnp.arange(K - 1, -1, -1)),
        )[0]

    return np.asarray(jax.jit(jax.vmap(chain))(jax.random.split(key, n)), np.float64)
