"""The way down the levels: stretches of one compiled loop, with a progress bar, and nothing lost on interruption."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import SupportsFloat

import jax
import numpy as np

from composeprob.density.annealed import AnnealedDensity
from composeprob.kernels.gibbs import parts_of
from composeprob.runtime.compiled import advance, start
from composeprob.runtime.progress import Progress
from composeprob.runtime.trail import Trail
from composeprob.samplers.base import Records, Run, Sampler
from composeprob.samplers.spread import agreed, host


def nothing(run: Run) -> None:
    """What is done with a run after each stretch, unless something is asked for."""


def descend(
    ready: tuple[Sampler, AnnealedDensity],
    run: Run,
    first: int,
    progress: bool,
    save: Callable[[Run], None] = nothing,
    judge: Callable[[Run], None] = nothing,
    name: str | None = None,
    trail: Trail | None = None,
) -> Run:
    """Visit what is left of the run's levels; Ctrl-C ends it early, once there are chains.

    Args:
        ready: the sampler and the density, placed.
        run: placed.
        first: the level where chains start.
        progress: whether to show a bar.
        save: called with the run after each stretch.
        judge: called likewise; may raise.
        name: what the bar is called, of a second run; the sampler's name if left out. A second run that is interrupted
            before it has chains comes back without them.
        trail: keeps where the chains are.
    """
    sampler, density = ready
    with Progress(first + 1, progress, name or type(sampler).__name__) as bar:
        try:
            if run.chains is None:
                bar.doing("compiling the first draws")
                run = start(sampler, run, density, first)
            if trail is not None:
                trail.add(run, sampler, density, first)
            bar.doing(f"compiling {_loop(sampler)}")
            size, tick, visits = 1, time.monotonic(), host(run.visits)
            while not visits.arrived:
                before = int(visits.made)
                size = size if trail is None else trail.at_most(size, before)
                run = jax.block_until_ready(advance(sampler, run, density, run.spread.number(before + size)))
                visits = host(run.visits)
                seconds, tick = max(time.monotonic() - tick, 1e-6), time.monotonic()
                # As many levels in a row as fit between two updates of the bar.
                (size,) = agreed(max(1, min(4 * size, int((int(visits.made) - before) * bar.pause / seconds))))
                level = int(visits.visited()[-1])
                bar.update(first + 1 - level, **_facts(run.records, level))
                save(run)
                judge(run)
                if trail is not None:
                    trail.add(run, sampler, density, first)
        except KeyboardInterrupt:
            if run.chains is None and name is None:
                raise
    return run


def _loop(sampler: Sampler) -> str:
    """What one visit of a level is made of."""
    if sampler.kernel is None:
        return f"a level of {type(sampler).__name__}"
    parts = parts_of(sampler.kernel)
    kernel = parts[0] if len(parts) == 1 else sampler.kernel
    return f"a level of {type(sampler).__name__} with {type(kernel).__name__}"


def _facts(records: Records, level: int) -> dict[str, SupportsFloat | str]:
    facts = {
        "acceptance": np.mean(np.asarray(records.acceptance)[level]),
        "ESS": np.asarray(records.ess)[level],
        "ancestors": np.asarray(records.ancestors)[level],
    }
    return {name: value for name, value in facts.items() if not np.isnan(value)}
