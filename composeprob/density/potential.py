"""One level of a density as NumPyro's samplers take it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import Array

from composeprob.arguments import check_count
from composeprob.density.evaluation import Position
from composeprob.pytree import vdot

if TYPE_CHECKING:
    from composeprob.density.annealed import AnnealedDensity


@dataclass(frozen=True, eq=False)
class NumPyroPotential:
    """What NumPyro's `HMC`, `NUTS` and `MCMC` need for one level of a density, under the names of their arguments.

    `AnnealedDensity.to_numpyro` makes it. Chains then live at that level alone and nothing is annealed, so they do not
    find modes that lie apart; `infer` does.

    Args:
        density: the compiled program.
        level: the level k.
    """

    density: AnnealedDensity
    level: int

    def potential_fn(self, position: Position) -> Array:
        """−log π_k(position) up to a constant, a scalar; its derivative is −∇log π_k from the same evaluation.

        Args:
            position: ``{site: array}``, static sites in unconstrained coordinates.
        """

        @jax.custom_jvp
        def potential(position: Position) -> Array:
            return -self.density.log_density(position, self.level)

        @potential.defjvp
        def derivative(primals: tuple[Position], tangents: tuple[Position]) -> tuple[Array, Array]:
            value, score = self.density.value_and_score(primals[0], self.level)
            return -value, -vdot(score, tangents[0])

        return potential(position)

    def init_params(self, key: Array, num_chains: int = 1) -> Position:
        """Where chains may start: noised sites from N(0, I/power), static ones from their priors.

        Args:
            key: a typed random key.
            num_chains: as given to `MCMC`.

        Returns:
            A position; for more than one chain with a leading axis of ``num_chains``, as `MCMC.run` wants it.
        """
        check_count(num_chains, "num_chains")

        @jax.jit
        def start(key: Array) -> Position:
            return self.density.from_noise(key, self.level, jnp.ones(()))

        return start(key) if num_chains == 1 else jax.vmap(start)(jax.random.split(key, num_chains))

    def postprocess_fn(self, position: Position) -> dict[str, Array]:
        """What one position means to the program's author: static sites constrained, deterministics computed."""
        return self.density.to_samples(position)
