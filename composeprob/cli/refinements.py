"""Finer runs of a program: what changes in them is the sampler's error."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

from composeprob.errors import AlignmentError, ShapeError

if TYPE_CHECKING:
    from composeprob.density.annealed import AnnealedDensity
    from composeprob.results.result import Result
    from composeprob.samplers.sampler import Sampler


class Refinement(StrEnum):
    """What is finer, or coarser, in a run that is compared with the first."""

    LEVELS, COARSER = "2 × levels", "½ × levels"
    TRANSITIONS, STEP = "2 × transitions", "½ step, 2 × transitions"


def resolved(density: AnnealedDensity, sampler: Sampler | None, num_chains: int) -> Sampler:
    """The sampler of the runs: the one that `infer` chooses, where none is given."""
    from composeprob.samplers.choose import choose

    return choose(density, num_chains)[0] if sampler is None else sampler


def longer(density: AnnealedDensity, sampler: Sampler) -> Sampler | None:
    """The same sampler with twice the transitions at each level; None where it makes none."""
    moves = sampler.prepare(density).moves
    return None if moves is None else sampler.with_moves(sampler.kernel or moves.kernel, 2 * moves.count)


def shorter_steps(density: AnnealedDensity, sampler: Sampler, first: Result) -> Sampler | None:
    """The same sampler with half the steps that the first run adapted, and twice as many of them.

    Only of kernels whose distribution depends on the step, those without a Metropolis test and those whose test is a
    quadrature; others keep theirs. None where there is no such kernel.
    """
    import jax.numpy as jnp

    from composeprob.kernels.gibbs import integrates_score, parts_of, with_field, with_parts
    from composeprob.metrics.paths import filled

    moves = sampler.prepare(density).moves
    kernel = None if moves is None else sampler.kernel or moves.kernel
    if moves is None or kernel is None:
        return None
    parts = parts_of(kernel)
    biased = [part.optimal_acceptance is None or integrates_score(part) for part in parts]
    if not any(biased):
        return None
    shape = (density.num_levels, len(parts)) if sampler.prepare(density).blocks else (density.num_levels,)
    steps = np.asarray(filled(first.step_size, shape), float).reshape(density.num_levels, -1)
    halved = [
        with_field(part, "step_size", jnp.asarray(0.5 * steps_of_part, jnp.result_type(float))) if wrong else part
        for part, steps_of_part, wrong in zip(parts, steps.T, biased, strict=True)
    ]
    return sampler.with_moves(with_parts(kernel, halved), 2 * moves.count)


def twice_the_levels(density: AnnealedDensity) -> tuple[str, AnnealedDensity]:
    """The program with a level between any two; with every other level where a factor knows only its own."""
    from composeprob.runtime.infer import on_levels

    log_snr = np.asarray(density.schedule.log_snr, np.float64)
    finer = np.interp(np.arange(2 * len(log_snr) - 1) / 2, np.arange(len(log_snr)), log_snr)
    try:
        return Refinement.LEVELS, on_levels(density, finer, 1)[0]
    except AlignmentError:
        return Refinement.COARSER, density.on(density.schedule.every(2))


def fits(density: AnnealedDensity, sampler: Sampler) -> bool:
    """Whether the sampler can be used on this number of levels; one step for each level fits no other number."""
    try:
        sampler.prepare(density)
    except ShapeError:
        return False
    return True
