"""What the transitions of all chains add up to: acceptance, quadrature error, moves that were not finite."""

from __future__ import annotations

import equinox as eqx
import jax.numpy as jnp
from jax import Array

from composeprob.kernels import Info, mean_acceptance
from composeprob.samplers.spread import Spread


class Tally(eqx.Module):
    """What the transitions of each chain add up to: sums over them, (n, B) for a kernel of B blocks.

    Attributes:
        acceptance: of the acceptance probabilities.
        error: of acceptance × quadrature error: over all transitions that is the mean over accepted moves, without
            the noise of which were accepted.
        non_finite: number of moves, (n,).
    """

    acceptance: Array
    error: Array
    non_finite: Array

    def adding(self, info: Info, counted: Array) -> Tally:
        """One chain's tally after one more transition; those not ``counted`` can only be non-finite."""
        error = jnp.where(info.acceptance > 0, info.acceptance * info.quadrature_error, 0.0)
        return Tally(
            self.acceptance + jnp.where(counted, info.acceptance, 0.0),
            self.error + jnp.where(counted, error, 0.0),
            self.non_finite + jnp.sum(info.non_finite, dtype=jnp.int32),
        )

    def over(self, spread: Spread, count: Array | int, num_chains: int, errors: bool) -> tuple[Array, Array, Array]:
        """Over all chains and ``count`` transitions: mean acceptance, mean error of accepted moves (0 unless there are
        ``errors``), number of non-finite moves."""
        acceptance = mean_acceptance(self.acceptance / count, spread.total, num_chains)
        error = jnp.mean(spread.gather(self.error), axis=0) / count if errors else jnp.zeros_like(acceptance)
        return acceptance, error / acceptance, spread.total(self.non_finite)
