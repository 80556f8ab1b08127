"""What one evaluation of a density at one position and level gives: the currency of the waist."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
from jax import Array

Position = Any
"""A pytree of floating arrays for ONE chain: ``{site: array}``, no chain axis."""


class Evaluation(eqx.Module):
    """Everything known of π_k at one position x.

    π_k(x, z) ∝ p(z)·F_k(x)·E_k(x, z)·G_k(x, z): the priors of static sites, the algebra of diffusion factors at the
    noised sites, the observations that are annealed exactly, and everything else (likelihoods, user energies,
    classifiers).

    Attributes:
        log_density: log π_k up to a constant of the level, a scalar; None where the density offers only its score.
        score: ∇ log π_k, same structure as the position.
        drift: ∇ log (F_k·E_k), same structure (zero at static sites): what the reverse process follows.
        rate: the part of the Feynman–Kac rate r of F_k·E_k that comes from scores, a scalar; None where a node has
            none. Along dx = f·x dt + g dW, r = rate + (f/g²)·excess.
        log_potential: log G_k, a scalar; None where a part of G offers only its score.
        log_prior: log p(z), or log p(z | x) where a prior looks at a noised site, a scalar.
        log_marginal: log F_k up to a constant of the level, a scalar; None where F offers only its score.
        log_exact: log E_k, a scalar.
        excess: the part of r that comes from the drift, in units of f/g²: Σ w_i·d_i − d for a product.
    """

    log_density: Array | None
    score: Position
    drift: Position
    rate: Array | None
    log_potential: Array | None
    log_prior: Array | None = None
    log_marginal: Array | None = None
    log_exact: Array | None = None
    excess: Array | None = None


Target = Callable[[Position], Evaluation]
"""The density at one fixed level, as kernels see it."""
