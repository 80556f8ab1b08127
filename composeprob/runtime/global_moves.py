r"""Global moves at level 0: proposals from anywhere, under which modes get their shares whatever chains did before.

Chains are split in two halves. A Gaussian mixture q is fitted to each, and is what the other half's proposals are drawn
from, whatever a chain's own position is:

$$x' \sim q, \qquad a = \min\Big(1, \frac{\pi(x')\,q(x)}{\pi(x)\,q(x')}\Big).$$

A chain that has accepted one is where its past does not matter: what it descends from tells nothing of it any more.

References:
    Tierney (1994), *Markov chains for exploring posterior distributions*, for independence chains; South, Pettitt and
    Drovandi (2019), *Sequential Monte Carlo samplers with independent Markov chain Monte Carlo proposals*.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Evaluation, Position, unknown
from composeprob.kernels import KernelState
from composeprob.kernels.base import log_density_of
from composeprob.kernels.metropolis import metropolis
from composeprob.kernels.walls import comparable
from composeprob.runtime.compiled import executable, on_devices
from composeprob.runtime.parts import places
from composeprob.runtime.progress import Progress
from composeprob.samplers.base import Run, level_keys
from composeprob.samplers.cloud import flattened, unflattened
from composeprob.samplers.gaussian_mixture import GaussianMixture, finite
from composeprob.samplers.spread import everywhere, host

GLOBAL = 2**30 - 1
"""Folded into chains' keys."""
MOST_STUCK = 0.1
"""Share of chains that accepted no proposal, up to which those that did count as independent of one another. Where more
did not, they are in a mode that the fit does not know, and its share is still what it was."""
FEWEST = 2
"""Chains of a half that are where numbers are, below which there is nothing to fit."""

Moving = tuple[KernelState, Array, Array, Array]
"""A chain, log q where it is, the sum of its probabilities of acceptance, and whether it has accepted."""


def global_moves(run: Run, density: AnnealedDensity, count: int, progress: bool) -> Run:
    """So many proposals to each chain at level 0.

    Args:
        run: placed, at level 0, with the states of a kernel.
        density: with a log-density that can be compared between modes.
        count: proposals to each chain, one evaluation each.
        progress: whether to show what is being done.

    Returns:
        The run, whose chains have moved, with the mean probability at which they accepted.
    """
    with Progress(count, progress, "global moves") as bar:
        bar.doing("fitting Gaussian mixtures to the chains")
        points = np.asarray(flattened(host(run.whole.chains.position)))
        halves = finite(points[: len(points) // 2]), finite(points[len(points) // 2 :])
        if min(map(len, halves)) < FEWEST:
            return run  # the status says why
        others = GaussianMixture.fitted(*halves[::-1]), GaussianMixture.fitted(*halves)  # each half has the other's
        fits = run.spread.place(GaussianMixture.beside(*others), everywhere)
        bar.doing("compiling global moves")
        moved = _moved(run, density, fits, run.spread.number(count))
        bar.update(count, acceptance=float(moved.global_acceptance))
    return moved


@executable
def _moved(run: Run, density: AnnealedDensity, fits: GaussianMixture, count: Array) -> Run:
    """The run after ``count`` proposals to each chain; those of the first half are from the first of the fits."""

    def own(run: Run, density: AnnealedDensity, fits: GaussianMixture, count: Array) -> Run:
        keys, spread = level_keys(run.keys, GLOBAL), run.spread
        halves = (spread.numbers(keys) >= spread.number_of(keys) // 2).astype(jnp.int32)

        def one(key: Array, position: Position, evaluation: Evaluation, half: Array) -> Moving:
            def propose(i: Array, carry: Moving) -> Moving:
                state, here, total, went = carry
                draw_key, accept_key = jax.vmap(partial(jax.random.fold_in, key))(2 * i + jnp.arange(2))
                noise = jax.random.normal(draw_key, (fits.means.shape[-1] + 1,), fits.means.dtype)
                row = jax.vmap(lambda fit: fit.draw(noise))(fits)[half]
                there = jax.tree.map(lambda new, old: new.astype(old.dtype), unflattened(row, position), position)
                proposed = KernelState(there, density.evaluator(there, 0).alone)
                log_q = told(row)
                ratio = log_ratio(proposed, state) + here - log_q
                state, info = metropolis(accept_key, ratio, proposed, state)
                here = jnp.where(info.accepted, log_q, here)
                return state, here, total + info.acceptance, went | info.accepted

            def told(row: Array) -> Array:
                return jax.vmap(lambda fit: fit.log_prob(row))(fits)[half]

            state, here = KernelState(position, evaluation.alone), told(ravel_pytree(position)[0])
            return jax.lax.fori_loop(0, count, propose, (state, here, jnp.zeros(()), jnp.asarray(False)))

        states, _, total, went = spread.map(one, keys, run.chains.position, run.chains.evaluation, halves)
        parts = run.chains.evaluation.parts
        parts = None if parts is None else unknown(parts)  # of where the chains were; nobody weighs them any more
        evaluation = dataclasses.replace(states.evaluation, parts=parts)
        chains = dataclasses.replace(run.chains, position=states.position, evaluation=evaluation)
        went_all, probability = spread.gather(jnp.stack([went, total / count], axis=1)).T
        ancestors, acceptance, enough = spread.alone(together, went_all, probability, run.ancestors)
        paths = jnp.where(enough, 0.0, run.path_weights)
        return dataclasses.replace(
            run, chains=chains, ancestors=ancestors, path_weights=paths, global_acceptance=acceptance
        )

    specs = (Run.places(), places(density), everywhere, everywhere)
    return on_devices(run.spread, own, specs, Run.places())(run, density, fits, count)


def together(went: Array, probability: Array, ancestors: Array) -> tuple[Array, Array, Array]:
    """Whom all chains descend from now, the mean acceptance, and whether what chains did before counts no more."""
    enough = jnp.mean(went) >= 1 - MOST_STUCK
    return jnp.where(enough, renewed(ancestors, went > 0), ancestors), jnp.mean(probability), enough


def log_ratio(proposed: KernelState, state: KernelState) -> Array:
    """log π(x') − log π(x), a scalar."""
    there, here = comparable(proposed, state)
    return log_density_of(there.evaluation) - log_density_of(here.evaluation)


def renewed(ancestors: Array, went: Array) -> Array:
    """Whom chains descend from, (N,) of 0 … N − 1, after those that ``went`` have become their own ancestors.

    Families of others are called after the first of them that is left, a number that none of those has.
    """
    numbers = jnp.arange(len(ancestors), dtype=ancestors.dtype)
    names = jnp.full_like(ancestors, len(ancestors)).at[ancestors].min(jnp.where(went, len(ancestors), numbers))
    return jnp.where(went, numbers, names[ancestors])
