"""The default policy of `infer`: which runs it makes, one after another, and why.

A plan yields attempts. `infer` carries each out, and stops at the first whose `Trust`
is enough. So which run follows which is in `plan`:

1. a sampler that the user names is carried out once;
2. else the sampler that `choose` finds for the density and the number of chains;
3. independent chains if its weights were too uneven, or left too few ancestors; in a
   program of factors alone closer levels cure that, so that 4. follows at once;
4. chains weighted by log-densities on closer levels, if what the last attempt lacks may
   be had so: log-densities must be comparable between modes, and levels the library's
   own.

`Trust.lacks` says what is not enough.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.errors import AlignmentError, CapabilityError
from composeprob.results.result import Result
from composeprob.results.trust import least_effective_ancestors, least_effective_share
from composeprob.samplers.choose import (
    can_wait,
    choose,
    independent,
    patient,
    tracks_alone,
    without_data,
)
from composeprob.samplers.run import Pace
from composeprob.samplers.sampler import Sampler
from composeprob.schedule import Schedule

STREAMS = {"": 0, "instead": 2, "closer": 4}
"""Streams of random numbers, by the names of attempts; the stream after each is that of
the run over every other level, which checks the evidence.

A retry uses a fresh stream, as the first stream's outcome is the reason for the retry.
"""

COLLAPSED = "the weights of SMC collapsed"
"""The end of SMC that independent chains replace, as a clause of findings."""


@dataclass(frozen=True)
class Attempt:
    """One run of a plan.

    Args:
        name: the folder of its checkpoints inside of the call's, and the key of its
            random numbers in `STREAMS`.
        density: on the levels that it may visit.
        sampler: that moves its chains.
        why: the reason for it, which becomes `Result.reason`.
        pace: how it chooses among the levels; None where it visits all.
        instead_of: what the attempt before it ended with, as a clause of findings.
    """

    name: str
    density: AnnealedDensity
    sampler: Sampler
    why: str
    pace: Pace | None = None
    instead_of: str = ""

    @property
    def stream(self) -> int:
        """The stream of its random numbers."""
        return STREAMS[self.name]


@dataclass(frozen=True)
class Tried:
    """An attempt that was carried out.

    Args:
        attempt: the attempt.
        result: its result.
        interrupted: the name of the stage that Ctrl-C ended.
    """

    attempt: Attempt
    result: Result
    interrupted: str | None

    @property
    def lacks(self) -> str:
        """The clause that says what its result lacks; empty where it lacks nothing, or
        the user interrupted it."""
        if self.result.trust is None or self.interrupted:
            return ""
        return self.result.trust.lacks

    @property
    def enough(self) -> bool:
        """True if no other attempt is to follow."""
        return not self.lacks

    @property
    def collapsed(self) -> bool:
        """True if resampling left too few ancestors, or weights count too few chains.

        Weights alone matter only where log-densities show whether chains without them
        have the right shares of modes.
        """
        trust = self.result.trust
        if trust is None or self.attempt.sampler.weights is None:
            return False
        n = trust.num_chains
        if trust.independent < least_effective_ancestors(n):
            return True
        few = trust.level_weights < least_effective_share(n, trust.exact_weights)
        return few and self.attempt.density.comparable_modes


def plan(
    density: AnnealedDensity,
    num_chains: int,
    draws: int | None,
    tried: Sequence[Tried],
    *,
    visited: AnnealedDensity,
    pace: Pace | None,
    own_levels: bool,
    sampler: Sampler | None,
) -> Iterator[Attempt]:
    """Yield the attempts of a call of `infer`.

    Args:
        density: that is sampled.
        num_chains: N.
        draws: of each chain at level 0, if there are to be any.
        tried: the attempts so far. The caller adds each that it carries out before it
            asks for another one, and asks only where the last is not enough.
        visited: the density on the levels of the call.
        pace: how the call chooses among them.
        own_levels: whether these are the library's choice.
        sampler: that of the user.
    """
    if sampler is not None:
        yield Attempt("", visited, sampler, "chosen by the user", pace)
        return
    sampler, why = choose(visited, num_chains, draws)
    yield Attempt("", visited, sampler, why, pace)
    may_wait = own_levels and can_wait(density)
    may_replace = sampler.may_be_replaced and not tracks_alone(visited)
    if may_replace and tried[-1].collapsed:
        why = f"{why}; replaced because {tried[-1].lacks}"
        # Uneven weights of factors alone are cured by closer levels; those of data or
        # latents are not, so chains must do without weights there.
        if may_wait and without_data(density):
            yield _on_closer_levels(density, num_chains, why)
            return
        sampler, why = independent(visited, why, num_chains, draws or 1)
        # A run that chose its levels has made its choice by weights that failed.
        on_all = visited if pace is None else density
        yield Attempt("instead", on_all, sampler, why, instead_of=COLLAPSED)
    last = tried[-1]
    if may_wait and _keeps_evidence(density, last):
        why = f"{last.attempt.why}; retried because {last.lacks}"
        yield _on_closer_levels(density, num_chains, why)


def _keeps_evidence(density: AnnealedDensity, last: Tried) -> bool:
    """Return whether weights by log-densities give an evidence if the last attempt
    does: they do from a normalised top level."""
    if last.result.log_evidence is None:
        return True
    return density.top.normalised


def _on_closer_levels(density: AnnealedDensity, num_chains: int, why: str) -> Attempt:
    """Patient chains on closer levels."""
    closer = density
    with contextlib.suppress(CapabilityError):  # of a copy with other arrays
        places = np.linspace(0, density.num_levels - 1, tuning.PATIENT.levels)
        closer = between_levels(density, places)
    sampler, reason = patient(closer, why, num_chains)
    return Attempt("closer", closer, sampler, reason)


def between_levels(
    density: AnnealedDensity, places: Float[np.ndarray, " levels"]
) -> AnnealedDensity:
    """The density on levels at real-valued places among its own, such as 2.5; the
    density itself if its factors can be evaluated at no other levels."""
    own = np.asarray(density.schedule.log_snr, np.float64)
    with contextlib.suppress(AlignmentError):
        log_snr = np.interp(places, np.arange(len(own)), own)
        return density.on(Schedule.from_arrays(*density.schedule.noise_at(log_snr)))
    return density
