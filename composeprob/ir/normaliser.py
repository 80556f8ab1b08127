"""The constant 1/Z_k of a calibrated expression, as a leaf of the IR that depends on the level alone."""

from __future__ import annotations

from collections.abc import Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from composeprob.factors.base import LeafFactor, Traits
from composeprob.factors.calibrated import KNOTS, LOG_NORMALISER, CalibratedExpression, interpolate
from composeprob.schedule import Noise


class Normaliser(LeafFactor):
    """log c = −log Z(λ) + (G − d)·log α, with log Z in the coordinates x/α. Along dx = f·x dt + g dW a function c of
    the time alone has the rate r = −(f·d + ∂_t log c)/g², and dλ = −g²/σ² dt: of the above, r = −∂_λ log Z/σ² −
    (f/g²)·G. So it counts as a density of ``dimension`` = d − G entries that grows by `growth` = −∂_λ log Z."""

    knots: Array
    log_normaliser: Array
    excess: float = eqx.field(static=True)

    def __init__(self, expression: CalibratedExpression):
        self.schedule, self.event_shape, self.excess = expression.schedule, expression.event_shape, expression.excess
        self.knots, self.log_normaliser = expression.fixed[KNOTS], expression.fixed[LOG_NORMALISER]
        self.fixed, self.label = {}, "Z⁻¹"

    @property
    def traits(self) -> Traits:
        return Traits(Traits.EXACT, "any", top_power=0.0, dimension=-self.excess, constant=True)

    @property
    def top_constant(self) -> float:
        """The constant in log c = top_constant − ½·dimension·log(2πσ²) at the noisiest levels."""
        width = np.log(2 * np.pi) - float(self.knots[0])  # log 2πσ² where α = 1
        return float(-self.log_normaliser[0] - 0.5 * self.excess * width)

    def growth(self, noise: Noise) -> Array:
        """∂ log c/∂λ, where α is 1."""
        return jax.grad(self._log_constant)(noise.log_snr)

    def evaluate(self, x: Array, noise: Noise, conditions: Mapping[str, Array]) -> tuple[Array | None, Array]:
        return self._log_constant(noise.log_snr) + self.excess * jnp.log(noise.alpha), jnp.zeros_like(x)

    def _log_constant(self, log_snr: Array) -> Array:
        dtype = log_snr.dtype
        return -interpolate(jnp.asarray(self.knots, dtype), jnp.asarray(self.log_normaliser, dtype), log_snr)
