"""One step of the reverse process, from a level to the next cleaner one."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Position
from composeprob.pytree import all_finite, normal_like, where


def reverse_step(
    key: Array, position: Position, score: Position, density: AnnealedDensity, level: Array, eta: Array | float = 1.0
) -> Position:
    """x_{k−1} given x_k, for one chain: static sites stay, and so does a chain that a non-finite score would move.

    With x̂_0 = (x + σ_k²·s)/α_k and ε̂ = −σ_k·s,

        x_{k−1} = α_{k−1}·x̂_0 + √(σ_{k−1}² − v)·ε̂ + √v·ξ,    v = η²·β_k·σ_{k−1}²/σ_k².

    η = 1 is DDPM's ancestral step, η = 0 the deterministic DDIM step.

    Args:
        key: typed random key.
        position: x_k.
        score: s, the score to follow, same structure.
        density: gives the schedule and says which sites are noised.
        level: k ≥ 1.
        eta: η in [0, 1].

    References:
        Ho et al. 2020; Song, Meng and Ermon 2021, equation 12.
    """
    mean, variance = reverse_law(position, score, density, level, eta)
    noise = normal_like(key, position)

    def move(name: str) -> Array:
        if density.sites[name].kind != "noised":
            return position[name]
        return mean[name] + jnp.sqrt(variance) * noise[name]

    moved = {name: move(name) for name in position}
    return where(all_finite(moved), moved, position)


def reverse_law(
    position: Position, score: Position, density: AnnealedDensity, level: Array, eta: Array | float = 1.0
) -> tuple[Position, Array]:
    """The law N(mean, v·I) from which `reverse_step` draws the noised sites.

    Returns:
        The mean, structured like the position, and v, a scalar.
    """
    here, there = density.schedule.at(level), density.schedule.at(level - 1)
    variance = eta**2 * density.schedule.beta[level] * (there.sigma / here.sigma) ** 2
    direction = jnp.sqrt(jnp.maximum(there.sigma**2 - variance, 0.0))

    def mean(name: str) -> Array:
        x, s = position[name], score[name]
        return there.alpha / here.alpha * (x + here.sigma**2 * s) - direction * here.sigma * s

    return {name: mean(name) for name in position}, variance
