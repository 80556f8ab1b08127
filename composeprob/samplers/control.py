r"""A drift beside the score, under which the weights of reverse steps differ less: the same law, exactly.

Per unit of log-SNR the reverse process is dx = σ²(½x + S) dλ + σ dW (variance-preserving levels), and SMC weighs it by
the potential r, the Feynman–Kac rate. With S + u followed in place of S, and r + ∇·u + ⟨u, S⟩ weighed in place of r,
every F_k stays what it is: insert the drift into the equation ∂F = 𝓛F − g²·r·F that defines r.

Where no signal is left, F_k is N(0, σ²/P) with P the total power of the factors, S = −P·x/σ², and r is
½(P² − P)·‖x‖²/σ⁴ and a constant: it differs from chain to chain and from step to step, which costs a product half of
its chains before anything is decided. There u = (P − 1)·x/2σ² makes the potential a constant. So it does for powers of
one Gaussian at every level, with the noised variance in the place of σ².
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import Array

from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Evaluation, Position
from composeprob.schedule import Noise

CONTROLS = ("affine", "none")


def fixed_gain(power: Array, noise: Noise) -> Array:
    """a of u = a·x, (P − 1)/2(α² + σ²), in the shape of P."""
    return 0.5 * (power - 1.0) / (noise.alpha**2 + noise.sigma**2)


def steered(evaluation: Evaluation, position: Position, density: AnnealedDensity, level: Array) -> Evaluation:
    """The evaluation with u added to what a reverse step follows, and ∇·u + ⟨u, S⟩ to the rate.

    u = a·x at every entry of a noised site, a = (P − 1)/2(α² + σ²): (P − 1)/2σ² where there is no signal, and right at
    all levels for Gaussian data of variance 1. For other data it is only near that, and the weights are exact all the
    same.

    Args:
        evaluation: at ``position``, under ``level``.
        position, density, level: where that is.

    References:
        *DriftLite* (ICLR 2026, arXiv 2509.21655), for controls that reduce the variance of Feynman–Kac weights.
    """
    noise = density.schedule.at(level)
    parts, score = evaluation.parts, dict(evaluation.score)
    drift, rate = dict(parts.drift), parts.rate
    for name, power in density.top.power.items():
        gain = fixed_gain(power, noise)
        x, s = position[name], parts.drift[name]
        drift[name], score[name] = s + gain * x, evaluation.score[name] + gain * x
        rate = rate + jnp.sum(gain * (1.0 + x * s))
    return dataclasses.replace(evaluation, score=score, parts=dataclasses.replace(parts, drift=drift, rate=rate))
