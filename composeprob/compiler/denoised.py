"""The policy ``"denoised"``."""

from __future__ import annotations

from jax import Array

from composeprob.language.policies import Policy
from composeprob.schedule import Noise


class Denoised(Policy):
    """The program sees the Tweedie mean of x₀, and the power is that of
    ``"tempered"``."""

    measured = True

    def seen(self, x: Array, mean: Array, noise: Noise) -> Array:
        return mean
