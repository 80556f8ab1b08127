"""What a network returns for a few draws of noise, read as each parameterization would read it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import PyTree

from composeprob.compiler.once import once
from composeprob.factors.diffusion import Diffusion
from composeprob.factors.parameterizations import ENERGIES, SCORES, with_number
from composeprob.factors.precision import Rounded
from composeprob.schedule import Noise

TOLERANCE = 0.25
"""Relative error of the score of noise up to which a network fits: ten times the greatest of the zoo."""
CLEAN = ("x0", "v")
"""Parameterizations whose output is small beside the noise at the noisiest level."""
NOISE = {"flow": "epsilon"}
"""What shows the sign of an output whose score there is −x/σ² whatever it is."""
STEADY = 0.05
"""Standard deviation from draw to draw of an x₀ or a v of a right network at the noisiest level, with its errors."""
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
    def of(cls, factor: Diffusion, conditions: dict[str, Array], own: Noise, level: int) -> Outputs:
        """One evaluation of a factor's network, at a level of its own noise."""
        dtype = np.dtype(jnp.result_type(float))
        real = np.issubdtype(np.asarray(own.index).dtype, np.floating)
        index = np.dtype(jnp.result_type(float if real else int)).type(own.index[level])
        host: Any = (index, dtype.type(own.alpha[level]), dtype.type(own.sigma[level]))
        noise = Noise(*host)
        count = min(max(NUMBERS // max(math.prod(factor.event_shape), 1), FEWEST), MOST)
        draws = np.random.default_rng(0).standard_normal((count, *factor.event_shape))
        x = (noise.sigma * draws).astype(dtype)
        values, beside = with_number(_evaluate(factor, x, noise, conditions))
        return cls(np.asarray(values), np.asarray(beside), x, noise)

    @property
    def is_noise(self) -> bool:
        """Whether the network returns the noise, or its negative."""
        return self.fits("epsilon") or self.fits("epsilon", -1.0)

    @property
    def is_small(self) -> bool:
        """Whether the outputs are much smaller than the noise."""
        return bool(np.mean(self.values**2) < 0.1)

    @property
    def is_steady(self) -> bool:
        """Whether the outputs hardly change from draw to draw, as x₀ and v do there, and are not 0 either."""
        change = float(np.sqrt(np.mean(np.var(self.values, axis=0))))
        ratio = float(self.noise.alpha / self.noise.sigma)
        return bool(np.any(self.values)) and change <= max(STEADY, 3 * ratio)

    def alternatives(self, declared: str) -> list[str]:
        """What the network looks like if it is not what was declared."""
        # Whatever is small beside x/σ² fits these forms, also a network that was never trained: but that is not steady.
        unsaid: tuple[str, ...] = () if self.is_steady else (*CLEAN, "energy_residual") if self.is_small else CLEAN
        if not self.is_noise:
            unsaid += ("flow",)  # α·u is small beside x whatever u is: there any output fits
        forms = [n for n in SCORES if n != declared and n not in unsaid and self.fits(n)]
        # For a score energies are not tried: they fit many fields, such as x turned about the origin.
        if (declared in ENERGIES or self.is_steady) and not (self.is_noise and forms):
            forms += [n for n in ENERGIES if n != declared and n not in unsaid and self.fits(n)]
        looks = [f"parameterization={name!r}" for name in forms]
        if declared not in CLEAN and self.fits(NOISE.get(declared, declared), -1.0):
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


@once
def _evaluate(factor: Diffusion, x: Array, noise: Noise, conditions: dict[str, Array]) -> PyTree[Array]:
    # Rounded products are not what is looked at, and no processor but an accelerator may have them.
    network = factor.network.network if isinstance(factor.network, Rounded) else factor.network
    return jax.vmap(lambda event: network(event, factor.time_at(noise), **conditions))(x)
