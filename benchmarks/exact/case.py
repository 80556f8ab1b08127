"""`Case`: a program with one question to its result, and the exact answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import composeprob as cp
from composeprob.results.estimates import Estimate

LEVELS = 60


def schedule() -> cp.Schedule:
    """The levels of every program."""
    return cp.Schedule.log_snr(LEVELS)


class Answer(NamedTuple):
    """Exact values; None where one is not known or not asked for.

    Attributes:
        value: of what the case asks its result for; several where that is an array.
        log_evidence: log ∫π_0, with diffusion factors counted as normalised.
        improper: whether there is no answer, so that any run that is not named is
            wrong.
    """

    value: float | tuple[float, ...] | None
    log_evidence: float | None = None
    improper: bool = False

    @property
    def values(self) -> tuple[float | None, ...]:
        """The exact values, of which there may be one."""
        return self.value if isinstance(self.value, tuple) else (self.value,)


@dataclass(frozen=True)
class Case:
    """A program, what its result is asked for, and the exact answer.

    Attributes:
        family: the row of the table that its runs count in.
        name: its own.
        compile: makes the density; costly, so only where a run is missing.
        ask: what a result is asked for, a share or a mean.
        exact: the answer; costly too.
        sampler: None for the default.
        run: makes the result as `cp.infer` does, where it takes more than one call.
    """

    family: str
    name: str
    compile: Callable[[], cp.AnnealedDensity]
    ask: Callable[[cp.Result], Estimate]
    exact: Callable[[], Answer]
    sampler: Callable[[], cp.Sampler] | None = None
    run: Callable[..., cp.Result] = cp.infer


def share(event: Callable[[dict[str, Any]], Any]) -> Callable[[cp.Result], Estimate]:
    """Asks for the probability of an event of one sample."""
    return lambda result: result.probability(event)


@cp.program
def single(f):
    """The program of one site."""
    cp.sample("x", f)
