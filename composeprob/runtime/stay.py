"""A stay at level 0: all sites are moved together, in a metric that suits them, until the population stops drifting.

On the way down a chain makes a few transitions a level, which is enough to follow a density that changes little from
one level to the next. Latents in a hierarchy need more: how wide they are has nothing to do with the noise, and a scale
and what it scales hold each other back.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import unknown
from composeprob.kernels import HMC, Adaptive
from composeprob.kernels.gibbs import GibbsState
from composeprob.kernels.hamiltonian import HamiltonianState
from composeprob.runtime.compiled import draw
from composeprob.runtime.progress import Progress
from composeprob.samplers.annealed_mcmc import AnnealedMCMC
from composeprob.samplers.base import Run, level_keys
from composeprob.samplers.spread import everywhere, host
from composeprob.samplers.transitions import SETTLING

LEAPFROGS = 8
TRANSITIONS = 10
"""Of one block, after those that adapt the step size."""
BLOCKS = 12
"""At most; two at least."""
DRIFT = 0.05
"""Change of a mean, in standard deviations, or of the logarithm of a standard deviation, that says nothing."""
STAY = 2**30
"""Folded into chains' keys, with the number of the block added."""


def stay(run: Run, density: AnnealedDensity, progress: bool) -> Run:
    """HMC on all sites at level 0, until a block of transitions changes neither means nor standard deviations.

    Before each block every coordinate's inverse mass becomes its variance in the population.

    Args:
        run: placed, at level 0, with the states of an exact kernel.
        density: with a log-density, and no site that is held.
        progress: whether to show a bar.

    Returns:
        The run, whose chains have moved; it counts the transitions of each, and has the greatest drift that the last
        block still showed, in standard deviations, or 0 where that is no more than chance makes of it.
    """
    moved = run
    with Progress(BLOCKS, progress, "at level 0") as bar:
        bar.doing("compiling HMC at level 0")
        for block in range(BLOCKS):
            before = moments(moved)
            moved = _block(moved, density, block)
            drift = _drift(before, moments(moved), len(run.ancestors))
            bar.update(block + 1, drift=drift)
            if block and drift == 0.0:
                break
    stayed = run.spread.number((block + 1) * (SETTLING + TRANSITIONS))
    return dataclasses.replace(moved, stayed=stayed, drift=run.spread.place(jnp.float32(drift), everywhere))


def moments(run: Run) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Mean and standard deviation of every number of a position over all chains."""
    positions = host(run.whole.chains.position)
    return {name: (x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)) for name, x in positions.items()}


def _block(run: Run, density: AnnealedDensity, block: int) -> Run:
    """One block of transitions of every chain."""
    sigma = float(density.schedule.sigma[0])

    def inverse_mass(name: str, deviation: np.ndarray) -> np.ndarray:
        # Steps follow the level's noise at noised sites; chains that are all in one place say nothing of a scale.
        own = sigma if density.sites[name].kind == "noised" else 1.0
        known = (deviation > 0) & (deviation < 1e18)  # its square is a number: of chains that diverged it says nothing
        return (np.where(known, deviation, own).astype(np.float32) / own) ** 2

    metric = {name: inverse_mass(name, deviation) for name, (_, deviation) in moments(run).items()}
    kernel = HMC(Adaptive(initial=0.3), num_leapfrog=LEAPFROGS, damping=0.0, jitter=0.3, metric=metric)
    mover = AnnealedMCMC(kernel, 1).prepare(density)  # full refreshment and jitter, so that no direction is missed
    assert mover.moves is not None
    position = run.chains.position
    momentum = jax.tree.map(jnp.zeros_like, position)  # drawn anew by every transition
    inner = HamiltonianState(position=None, evaluation=None, momentum=momentum)  # type: ignore[arg-type]
    states = GibbsState(position, run.chains.evaluation.alone, (inner,))
    own = dataclasses.replace(run, chains=states, keys=level_keys(run.keys, STAY + block))
    begin, end, thin = map(run.spread.number, (0, 1, TRANSITIONS))
    own, _ = draw(mover, mover.moves.begin(own, position), density, begin, end, thin, 1)
    # The kernel that came down goes on from there; its momenta, independent of where the chains are, are as good.
    seen, parts = own.chains.evaluation, run.chains.evaluation.parts
    parts = None if parts is None else unknown(parts)  # of where the chains were; nobody weighs them any more
    evaluation = dataclasses.replace(seen, parts=parts)
    chains = dataclasses.replace(run.chains, position=own.chains.position, evaluation=evaluation)
    return dataclasses.replace(run, chains=chains)


def _drift(
    before: dict[str, tuple[np.ndarray, np.ndarray]], after: dict[str, tuple[np.ndarray, np.ndarray]], n: int
) -> float:
    """The greatest change of a mean, in standard deviations, or of the log of one; 0 where chance may have made it."""
    changes = [0.0]
    for name, (mean, deviation) in before.items():
        now, spread = after[name]
        wide = np.maximum(np.maximum(deviation, spread), 1e-30)
        changes.append(float(np.max(np.abs(now - mean) / wide, initial=0.0)))
        ratio = np.maximum(spread, 1e-30) / np.maximum(deviation, 1e-30)
        changes.append(float(np.max(np.abs(np.log(ratio)), initial=0.0)))
    greatest = max(changes)
    return greatest if greatest > DRIFT + 4.0 * np.sqrt(2.0 / n) else 0.0
