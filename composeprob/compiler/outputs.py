"""What a network returns for a few draws of noise, read as each parameterization would read it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from composeprob.factors.diffusion import Diffusion
from composeprob.factors.parameterizations import ENERGIES, SCORES, with_number
from composeprob.schedule import Noise

TOLERANCE = 0.25
"""Relative error of the score of noise up to which a network fits: ten times the greatest of the zoo."""
CLEAN = ("x0", "v")
"""Parameterizations whose output is small beside the noise at the noisiest level."""
NUMBERS = 256
"""Entries of events that are looked at together, in at least `FEWEST` events and at most `MOST`."""
FEWEST, MOST = 4, 64


@dataclass(frozen=True)
class Outputs:
    """A network's outputs at draws x of N(0, σ²) at one level, and the number ``beside`` them."""

    values: Any
    beside: Any
    x: Any
    noise: Noise

    @classmethod
    def of(cls, factor: Diffusion, conditions: dict[str, Any], own: Noise, level: int) -> Outputs:
        """One evaluation of a factor's network, at a level of its own noise."""
        dtype = np.dtype(jnp.result_type(float))
        index = np.dtype(jnp.result_type(int)).type(own.index[level])
        host: Any = (index, dtype.type(own.alpha[level]), dtype.type(own.sigma[level]))
        noise = Noise(*host)
        count = min(max(NUMBERS // max(math.prod(factor.event_shape), 1), FEWEST), MOST)
        draws = np.random.default_rng(0).standard_normal((count, *factor.event_shape))
        x = (noise.sigma * draws).astype(dtype)
        values, beside = with_number(_evaluate(factor.network, x, factor.time_at(noise), conditions))
        return cls(np.asarray(values), np.asarray(beside), x, noise)

    @property
    def is_noise(self) -> bool:
        """Whether the network returns the noise, or its negative."""
        return self.fits("epsilon") or self.fits("epsilon", -1.0)

    def alternatives(self, declared: str) -> list[str]:
        """What the network looks like if it is not what was declared."""
        # Whatever is small beside x/σ² fits x0 and v; it says so only where it has nothing of the noise in it.
        unsaid = CLEAN if self.is_noise or self.likeness(declared) > 0.3 else ()
        forms = [n for n in SCORES if n != declared and n not in unsaid and self.fits(n)]
        if not (self.is_noise and forms):
            forms += [n for n in ENERGIES if n != declared and self.fits(n)]
        looks = [f"parameterization={name!r}" for name in forms]
        if declared not in CLEAN and self.fits(declared, -1.0):
            looks.append("this parameterization with the opposite sign")
        return looks

    def fits(self, parameterization: str, sign: float = 1.0) -> bool:
        """Whether the outputs, times a sign, are what a right network would give up to `TOLERANCE`."""
        return self.error(parameterization, sign) <= TOLERANCE

    def error(self, parameterization: str, sign: float = 1.0) -> float:
        """How far the outputs, times a sign, are from those of a right network, relative to its size.

        Infinite where they have another shape, or are not finite.
        """
        if (pair := self._read(parameterization, sign)) is None:
            return math.inf
        found, wanted = pair
        error = float(np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2)))
        return error if math.isfinite(error) else math.inf

    def likeness(self, parameterization: str) -> float:
        """The cosine between what the outputs mean and what those of a right network would, without its sign."""
        if (pair := self._read(parameterization, 1.0)) is None:
            return 0.0
        found, wanted = pair
        size = float(np.sqrt(np.sum(found**2) * np.sum(wanted**2)))
        return abs(float(np.sum(found * wanted))) / size if size > 0 else 0.0

    def _read(self, parameterization: str, sign: float) -> tuple[np.ndarray, np.ndarray] | None:
        """What the outputs mean, and what it should be: scores, of energies the differences of log f between events.

        The gradient of an energy would tell more and cost more.
        """
        values, x, sigma = sign * self.values, self.x, self.noise.sigma
        if values.size != len(x) if parameterization == "energy" else values.shape != x.shape:
            return None
        if parameterization in SCORES:
            return np.asarray(SCORES[parameterization](values, x, self.noise)), np.asarray(-x / sigma**2)
        if parameterization == "energy":
            energy = values.reshape(len(x))
        else:
            energy = np.sum(ENERGIES[parameterization](values, x).reshape(len(x), -1), 1)
        found = self.beside - energy / sigma
        wanted = -0.5 * np.sum((x / sigma).reshape(len(x), -1) ** 2, 1)
        return found - found.mean(), wanted - wanted.mean()


@eqx.filter_jit
def _evaluate(network: Any, x: Any, t: Any, conditions: dict[str, Any]) -> Any:
    return jax.vmap(lambda event: network(event, t, **conditions))(x)
