"""What a diffusion network's output means: each form turns it into a score, and four of them into a log-density.

With x = α·x_0 + σ·ε, and ε̂ the network's estimate of the noise, the score is −ε̂/σ. The energy forms (Du et al.
2023, section 4) are trained so that ∇ₓE matches ε, hence log f(x) = −E(x)/σ up to a constant of the level.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from composeprob.schedule import Noise

Call = Callable[[Array], Array]
"""The network at a fixed time and fixed conditions."""


def v(output: Array, x: Array, noise: Noise) -> Array:
    """The output is v = (α·ε − σ·x_0)/√(α²+σ²) (Salimans & Ho 2022): ε̂ = (σ·x + α·√(α²+σ²)·v)/(α²+σ²)."""
    squared = noise.alpha**2 + noise.sigma**2
    return -(noise.sigma * x + noise.alpha * jnp.sqrt(squared) * output) / (squared * noise.sigma)


ENERGIES: dict[str, Callable[[Array, Array], Array]] = {
    "energy": lambda output, x: output.reshape(()),  # the network's own scalar
    "energy_residual": lambda output, x: 0.5 * (x - output) ** 2,  # ½‖x − s‖², the form of a denoising autoencoder
    "energy_norm": lambda output, x: 0.5 * output**2,  # ½‖s‖²
    "energy_inner": lambda output, x: x * output,  # ⟨x, s⟩
}
"""By name, the energy of (output, x): a scalar, or what each entry adds to it."""

SCORES: dict[str, Callable[[Array, Array, Noise], Array]] = {
    "epsilon": lambda output, x, noise: -output / noise.sigma,  # the output is ε̂
    "x0": lambda output, x, noise: (noise.alpha * output - x) / noise.sigma**2,  # it is the clean event x̂_0
    "v": v,
    # The velocity u = ε − x_0 of flow matching (Lipman et al. 2023): ε̂ = (x + α·u)/(α + σ).
    "flow": lambda output, x, noise: -(x + noise.alpha * output) / ((noise.alpha + noise.sigma) * noise.sigma),
    "score": lambda output, x, noise: output,
}
"""By name, the score of (output, x, noise)."""


def with_number(output: Array | tuple[Array, Array]) -> tuple[Array, Array | float]:
    """What an energy is made of, and the number beside it: 0 unless the network returns a pair."""
    return output if isinstance(output, tuple) and len(output) == 2 else (output, 0.0)


def evaluate(
    parameterization: str, call: Call, x: Array, noise: Noise, weights: Array | float = 1.0
) -> tuple[Array | None, Array]:
    """(log f, ∇ log f) from one call of the network; log f is None for the score-only forms. ``weights`` multiply what
    each entry adds to the energy, or each entry of a score."""
    if parameterization in SCORES:
        return None, weights * SCORES[parameterization](call(x), x, noise)
    energy = ENERGIES[parameterization]

    def log_density(point: Array) -> Array:
        output, beside = with_number(call(point))
        return -jnp.sum(weights * energy(output, point)) / noise.sigma + beside

    return jax.value_and_grad(log_density)(x)
