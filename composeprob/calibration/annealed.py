"""log Z of every level by sequential Monte Carlo from the noisiest one, weighted by the density's own ratios."""

from __future__ import annotations

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.errors import InvalidValueError
from composeprob.kernels import HMC, Adaptive
from composeprob.kernels.base import log_density_of
from composeprob.samplers.layout import Layout
from composeprob.samplers.meet import log_mean_weight
from composeprob.samplers.run import Run, Visits, begin
from composeprob.samplers.sampler import Sampler
from composeprob.samplers.smc import SMC
from composeprob.samplers.weights import first_weight


def annealed(density: AnnealedDensity, key: Array, num_chains: int, repeats: int) -> tuple[np.ndarray, np.ndarray]:
    """Estimates log ∫F_k at every level; returns it with its standard errors, both (K,).

    Chains start with exact draws of N(0, σ²/power), weighted by F over it; from level to level weights gain
    log F_k − log F_{k+1}, and chains are resampled and moved by HMC, which leaves F_k invariant. The mean weight is an
    unbiased estimate of ∫F_k over that of the start, which is 1; repeats are averaged before the logarithm is taken.

    Raises:
        InvalidValueError: no chain has a finite energy.
    """
    sampler = SMC(HMC(Adaptive(), num_leapfrog=3), tuning.ANNEALED_MOVES, weights="density").prepare(density)
    found = np.stack([np.asarray(_repeat(sampler, density, k, num_chains)) for k in jax.random.split(key, repeats)])
    if not np.all(np.isfinite(found)):
        level = int(np.flatnonzero(~np.isfinite(found).all(0))[-1])
        raise InvalidValueError(
            f"The log-density is not finite at level {level}: no chain got there with a finite weight.",
            fix="look for overflow in the energy, or space the levels more closely.",
        )
    found = found.astype(np.float64)
    mean = np.logaddexp.reduce(found, axis=0) - np.log(repeats)
    return mean, found.std(axis=0, ddof=1) / np.sqrt(repeats)


@eqx.filter_jit
def _repeat(sampler: Sampler, density: AnnealedDensity, key: Array, num_chains: int) -> Array:
    """One population's estimates of log ∫F_k, (K,)."""
    first, layout = density.num_levels - 1, Layout.of_density(density)
    run = sampler.start(begin(key, num_chains, Visits.every(first, density.num_levels)), density, first)
    noise = density.schedule.at(first)

    def correction(v: Array) -> Array:
        """What one draw weighs by the values of F, less what the sampler counts at its first visit."""
        found, position = layout.evaluate(density, v, first), layout.position(v, noise.alpha)
        value, drawn = log_density_of(found), density.top.log_density(position, noise.sigma)
        counted = first_weight(layout, density, v, found, first)
        return jnp.where(jnp.isfinite(value), value - drawn - counted, -jnp.inf)

    # The sampler counts diffusion factors as normalised; here their own values give the constant.
    run = dataclasses.replace(run, log_weights=jax.vmap(correction)(run.chains.points), log_evidence=jnp.zeros(()))

    def visit(run: Run, made: Array) -> tuple[Run, Array]:
        run = sampler.advance(run, density, made + 1)
        return run, run.log_evidence + log_mean_weight(run.log_weights)

    _, log_z = jax.lax.scan(visit, run, jnp.arange(density.num_levels))
    return log_z[::-1]
