"""The policy ``"noised"``."""

from __future__ import annotations

from jax import Array

from composeprob.language.policies import Policy
from composeprob.schedule import Noise


class Noised(Policy):
    """The program sees x_k itself, at level 0 too, and the user's function of the level
    returns its likelihood."""

    takes_levels = True

    def seen(self, x: Array, mean: Array, noise: Noise) -> Array:
        return x
