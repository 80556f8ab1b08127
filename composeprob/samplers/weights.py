"""What chains weigh: at the first level, and from one level to the next."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Evaluation
from composeprob.kernels import KernelState
from composeprob.schedule import Schedule


def normalised(density: AnnealedDensity) -> bool:
    """Whether every factor's log-density is normalised, so that its values tell ∫F and not only its shape."""
    return density.top.normalised


def first_weight(state: KernelState, density: AnnealedDensity, level: Array | int) -> Array:
    """What one chain's draw from the first level's law weighs, a scalar."""
    evaluation, sigma = state.evaluation, density.schedule.at(level).sigma
    log_weight = evaluation.log_potential
    assert log_weight is not None  # whatever is no noised marginal has an energy, or SMC is refused
    log_weight = log_weight if evaluation.log_exact is None else log_weight + evaluation.log_exact
    if weighs_top(evaluation, density):
        assert evaluation.log_marginal is not None
        xs = {name: state.position[name] for name in density.top.power}
        log_weight = log_weight + evaluation.log_marginal - density.top.log_density(xs, sigma)
    return log_weight


def first_evidence(states: KernelState, density: AnnealedDensity, level: int) -> Array:
    """The log-evidence that all weights start from, a scalar; 0 where the first weights themselves know ∫F."""
    constant = density.top.log_normaliser(density.schedule.at(level).sigma)
    knows = weighs_top(states.evaluation, density) and normalised(density)
    return jnp.zeros_like(constant) if knows else constant


def weighs_top(evaluation: Evaluation, density: AnnealedDensity) -> bool:
    """Whether the first draws are weighed by F over the law that they are drawn from, and not taken for draws of F."""
    known = bool(density.top.power) and evaluation.log_marginal is not None
    return known and (normalised(density) or not density.top.exact)


def gain_between(
    before: Evaluation,
    after: Evaluation,
    density: AnnealedDensity,
    level: Array,
    weights: str,
    above: Array | None = None,
) -> Array:
    """What a chain's log-weight gains from the level above (level + 1), where it was evaluated as ``before``, to level
    (``after``); the ratio of `leaning` is not in it."""
    if weights == "density":
        assert after.log_density is not None
        assert before.log_density is not None
        return after.log_density - before.log_density
    assert after.log_potential is not None
    assert before.log_potential is not None
    assert after.log_prior is not None
    assert before.log_prior is not None
    gain = feynman_kac_weight(before, after, density.schedule, level + 1 if above is None else above, level)
    gain = gain + after.log_potential - before.log_potential
    return gain + after.log_prior - before.log_prior  # 0 unless a prior looks at a noised site


def feynman_kac_weight(
    before: Evaluation, after: Evaluation, schedule: Schedule, level: Array, below: Array | None = None
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
    end = level - 1 if below is None else below
    here, there = schedule.at(level), schedule.at(end)

    def from_scores(evaluation: Evaluation, sigma: Array) -> Array:
        assert evaluation.rate is not None
        return sigma**2 * evaluation.rate

    mean = 0.5 * (from_scores(before, here.sigma) + from_scores(after, there.sigma))
    assert before.excess is not None
    assert after.excess is not None
    excess = 0.5 * (before.excess + after.excess)
    return (there.log_snr - here.log_snr) * mean + excess * jnp.log(here.alpha / there.alpha)
