"""Features of time, and scales of input and output, of the two residual MLPs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array


def log_snr_features(log_snr: Array, size: int) -> Array:
    """Return ``size`` sines and cosines of λ.

    Periods from 4 to 128 make them smooth between any levels, as λ spans about 30.
    """
    period = jnp.geomspace(4.0, 128.0, size // 2)
    angle = 2 * jnp.pi * log_snr / period
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)])


@dataclass(frozen=True)
class OutputScale:
    """Scales that make log f a smooth function of (x, λ) at every noise level.

    The schedule is variance preserving. Matching the noise ε fixes the score only up to
    errors of order 1/σ, and a network without scales makes them wherever σ is far below
    the data's scale. Here the network F instead corrects the Gaussian of the data's
    variance, at the scale on which the noised data vary, by a factor in closed form:

        c² = α²·deviation² + σ²,   d² = α²·finest² + σ²
        epsilon:      ε̂ = σ·(x/c² + F/d)           so that  ∇ log f = −x/c² − F/d
        energy_norm:  s = √σ·(x/c + F/d)            so that  log f = −½‖x/c + F/d‖²

    The network's input is x/c. The scales are not fitted: with F = 0 the model is N(0,
    c²I).

    Attributes:
        parameterization: ``"epsilon"`` or ``"energy_norm"``.
        deviation: standard deviation of the data.
        finest: the smallest scale on which the data's density varies; 0 for data with
            sharp edges.
    """

    parameterization: str
    deviation: float
    finest: float

    def scales(self, log_snr: Array) -> tuple[Array, Array, Array]:
        """Return σ, c and d at a log-SNR."""
        alpha2 = jax.nn.sigmoid(log_snr)
        sigma2 = jax.nn.sigmoid(-log_snr)
        c2 = alpha2 * self.deviation**2 + sigma2
        d2 = alpha2 * self.finest**2 + sigma2
        return jnp.sqrt(sigma2), jnp.sqrt(c2), jnp.sqrt(d2)

    def apply(
        self, network: Callable[[Array, Array], Array], x: Array, log_snr: Array
    ) -> Array:
        """Return the scaled output of ``network``, called as F = network(input, λ)."""
        sigma, c, d = self.scales(log_snr)
        correction = network(x / c, log_snr) / d
        if self.parameterization == "epsilon":
            return sigma * (x / c**2 + correction)
        return jnp.sqrt(sigma) * (x / c + correction)
