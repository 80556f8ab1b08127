"""What chains weigh: at the first level, and from one level to the next."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Parts
from composeprob.kernels import KernelState
from composeprob.schedule import Schedule


def first_weight(state: KernelState, density: AnnealedDensity, level: Array | int) -> Array:
    """What one chain's draw from the first level's law weighs, a scalar."""
    parts, sigma = state.evaluation.parts, density.schedule.at(level).sigma
    log_weight = parts.log_potential + parts.log_exact
    if weighs_top(density):
        xs = {name: state.position[name] for name in density.top.power}
        log_weight = log_weight + parts.log_marginal - density.top.log_density(xs, sigma)
    return log_weight


def first_evidence(density: AnnealedDensity, level: int) -> Array:
    """The log-evidence that all weights start from, a scalar; 0 where the first weights themselves know ∫F."""
    constant = density.top.log_normaliser(density.schedule.at(level).sigma)
    return jnp.zeros_like(constant) if weighs_top(density) and density.top.normalised else constant


def weighs_top(density: AnnealedDensity) -> bool:
    """Whether the first draws are weighed by F over the law that they are drawn from, and not taken for draws of F."""
    known = bool(density.top.power) and "energy" in density.capabilities
    return known and (density.top.normalised or not density.top.exact)


def gain_between(
    before: Parts, after: Parts, density: AnnealedDensity, level: Array, above: Array | None = None
) -> Array:
    """What a chain's log-weight gains under Feynman–Kac weights from the level above (level + 1), where it was
    evaluated as ``before``, to level (``after``); the ratio of `leaning` is not in it."""
    gain = feynman_kac_weight(before, after, density.schedule, level + 1 if above is None else above, level)
    gain = gain + after.log_potential - before.log_potential
    return gain + after.log_prior - before.log_prior  # 0 unless a prior looks at a noised site


def feynman_kac_weight(
    before: Parts, after: Parts, schedule: Schedule, level: Array, below: Array | None = None
) -> Array:
    """∫ g²·r dτ over the reverse step from ``level`` k to k − 1, or to the level ``below``, a scalar.

    Per unit of log-SNR, g² is σ². The part of r that comes from scores is integrated over λ by the trapezoid rule,
    whose second point costs nothing because the chain is evaluated there anyway; the part that comes from the drift
    is exact, excess·log(α_k/α_{k−1}).

    Args:
        before: at x_k, under level k.
        after: at x_{k−1}, under level k − 1.
        schedule, level: k ≥ 1.
    """
    here, there = schedule.at(level), schedule.at(level - 1 if below is None else below)
    mean = 0.5 * (here.sigma**2 * before.rate + there.sigma**2 * after.rate)
    excess = 0.5 * (before.excess + after.excess)
    return (there.log_snr - here.log_snr) * mean + excess * jnp.log(here.alpha / there.alpha)
