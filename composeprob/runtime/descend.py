"""The way down the levels: stretches of one compiled loop, with a progress bar, and nothing lost on interruption."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from composeprob.runtime.compiled import advance, start
from composeprob.runtime.progress import REFRESH_SECONDS, Progress
from composeprob.samplers.base import Records, Run
from composeprob.samplers.spread import agreed


def visits(first: int, stride: int) -> int:
    """How many levels a way down has: the first one, and the multiples of the stride below it."""
    return -(-first // stride) + 1


def descend(
    ready: tuple[Any, Any],
    run: Run,
    first: int,
    completed: int,
    progress: bool,
    save: Callable[[Run, int], None] = lambda run, completed: None,
    judge: Callable[[Run, int], None] = lambda run, completed: None,
    stride: int = 1,
) -> tuple[Run, int]:
    """Visit what is left of the levels; Ctrl-C ends it early, once there are chains.

    Args:
        ready: the sampler and the density, placed.
        run: placed.
        first: the level where chains start.
        completed: visits that were made before.
        progress: whether to show a bar.
        save: called with the run and its number of visits after each stretch.
        judge: called likewise; may raise.
        stride: 1 visits every level, 2 every other one.

    Returns:
        The run, and the number of visits that it has made.
    """
    sampler, density = ready
    total = visits(first, stride)
    name = type(sampler).__name__ if stride == 1 else "error of the evidence"
    with Progress(total, progress, name) as bar:
        try:
            if run.chains is None:
                run = start(sampler, run, density, first)
            size, tick = 1, time.monotonic()
            while completed < total:
                before, stop = completed, min(completed + size, total)
                begin, end, by = (run.spread.number(n) for n in (completed, stop, stride))
                # One statement: an interruption finds chains and count of levels in agreement.
                run, completed = jax.block_until_ready(advance(sampler, run, density, begin, end, by, first)), stop
                seconds, tick = max(time.monotonic() - tick, 1e-6), time.monotonic()
                # As many levels in a row as fit between two refreshes of the bar.
                (size,) = agreed(max(1, min(4 * size, int((stop - before) * REFRESH_SECONDS / seconds))))
                bar.update(completed, **_facts(run.records, min(first, stride * (total - completed))))
                save(run, completed)
                judge(run, completed)
        except KeyboardInterrupt:
            if run.chains is None and stride == 1:
                raise
    return run, completed


def _facts(records: Records, level: int) -> dict[str, Any]:
    facts = {
        "acceptance": np.mean(np.asarray(records.acceptance)[level]),
        "ESS": np.asarray(records.ess)[level],
        "ancestors": np.asarray(records.ancestors)[level],
    }
    return {name: value for name, value in facts.items() if not np.isnan(value)}
