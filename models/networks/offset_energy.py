"""An energy with a learned constant at each log-SNR.

With it log f can be normalised at every level.
"""

from __future__ import annotations

import math
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax import Array

from .conditioning import OutputScale, log_snr_features
from .residual_mlp_eqx import ResidualMLP


class OffsetEnergy(eqx.Module):
    """The energy E = ½‖s‖² − σ·b(λ), that is, log f = −½‖s‖²/σ + b(λ).

    The schedule is variance preserving. A loss on scores alone does not change b; a
    cross-level loss teaches it.

        b(λ) = −½d·log(2π·c²) + g(λ) − g(λ_min),   g = w·(sines and cosines of λ),

    with w = 0 at first and c² the variance of the noised data (`OutputScale`). At λ_min
    the noised data
    are N(0, c²I) but for rounding, and log f is its normalised log-density there,
    whatever w: that anchors all other levels.

    Args:
        size: length d of one event.
        deviation, finest: see `OutputScale`.
        log_snr_min: λ_min, the noisiest level of training.
        key: for the initial weights.
        settings: further arguments of `ResidualMLP`.
    """

    network: ResidualMLP
    offset: Array
    scale: OutputScale = eqx.field(static=True)
    size: int = eqx.field(static=True)
    log_snr_min: float = eqx.field(static=True)

    def __init__(
        self,
        size: int,
        *,
        deviation: float,
        finest: float,
        log_snr_min: float,
        key: Array,
        **settings: Any,
    ):
        self.scale = OutputScale("energy_norm", deviation, finest)
        self.network = ResidualMLP(size, output_scale=self.scale, key=key, **settings)
        self.offset = jnp.zeros(self.network.embedding)
        self.size = size
        self.log_snr_min = log_snr_min

    def __call__(self, x: Array, t: Array) -> Array:
        """Return E for one event x of shape (d,) at log-SNR t: a scalar."""
        sigma, _, _ = self.scale.scales(t)
        return 0.5 * jnp.sum(self.network(x, t) ** 2) - sigma * self.constant(t)

    def constant(self, t: Array) -> Array:
        """Return b(λ): a scalar."""
        _, c, _ = self.scale.scales(t)
        features = log_snr_features(t, self.network.embedding)
        top = jnp.asarray(self.log_snr_min)
        top_features = log_snr_features(top, self.network.embedding)
        gaussian = -0.5 * self.size * jnp.log(2 * math.pi * c**2)
        return gaussian + jnp.dot(self.offset, features - top_features)
