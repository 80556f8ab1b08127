"""Default runs without one of the ways that correct mode proportions, or without one of
the checks that flag them.

A way is left out where it stands: in the sampler of each attempt of a plan, or by
another function in the place of the one that decides. A name that is gone fails loudly.
Checks change no sample, so they are left out of the registry when the ended run is
asked once more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import composeprob as cp
from composeprob.findings import Code, Finding
from composeprob.kernels.gibbs import replaced
from composeprob.results.checks import CHECKS, ask_at_end, ask_later
from composeprob.results.ended import EndedRun
from composeprob.runtime.plan import Attempt, Tried
from composeprob.samplers.finishers import Finisher, GlobalMoves, Relaxation, WarmUp
from composeprob.samplers.sampler import Sampler

NEVER = 1e-6
"""A threshold of resampling that no population falls below: its relative effective
size is 1/N at least."""


@dataclasses.dataclass
class Plan:
    """Attempts of a call of `infer`, and how they ended."""

    attempts: list[Attempt] = dataclasses.field(default_factory=list)
    # The list of the call itself: it stops asking for attempts after the last one.
    tried: Sequence[Tried] = ()

    def results(self) -> list[cp.Result]:
        """The results of its attempts."""
        return [each.result for each in self.tried]


class Function(NamedTuple):
    """A function of the library, or a method, and what stands in its place."""

    module: str
    place: str  # the class in the module, or empty
    name: str
    instead: Any

    def patched(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which it is replaced."""
        # By import, as `composeprob.runtime` may have a function of a module's name.
        holder: Any = importlib.import_module(self.module)
        if self.place:
            holder = getattr(holder, self.place)
        return mock.patch.object(holder, self.name, self.instead)


@dataclasses.dataclass(frozen=True)
class Way:
    """A way in which default runs correct mode proportions.

    Attributes:
        name: on the command line.
        what: what is left out.
        used: whether a call used it.
        function: that is replaced; None where samplers are changed.
        sampler: the change of each attempt's sampler.
    """

    name: str
    what: str
    used: Callable[[Plan], bool]
    function: Function | None = None
    sampler: Callable[[Sampler], Sampler] | None = None


# ── samplers without a part ───────────────────────────────────────────────────────────
def without_resampling(sampler: Sampler) -> Sampler:
    """Return a sampler that resamples at level 0 only."""
    if not isinstance(sampler.exchange, cp.Resample):
        return sampler
    return replaced(sampler, exchange=cp.Resample(NEVER))


def without_finisher(kind: type[Finisher]) -> Callable[[Sampler], Sampler]:
    """Return the change that leaves out finishers of exactly this class, alone or in
    turn with another."""

    def change(sampler: Sampler) -> Sampler:
        left: list[Finisher] = []
        for each in sampler.finishers:
            if type(each) is WarmUp and each.across is not None:
                alone = {GlobalMoves: WarmUp(), WarmUp: each.across}
                left.append(alone.get(kind, each))
            elif type(each) is not kind:
                left.append(each)
        if left == list(sampler.finishers):
            return sampler
        return replaced(sampler, finishers=tuple(left))

    return change


def without_second_run(sampler: Sampler) -> Sampler:
    """Return a sampler that makes no run over every other level."""
    if sampler.check_order is None:
        return sampler
    return replaced(sampler, check_levels=False)


def of_samplers(name: str, what: str, change: Callable[[Sampler], Sampler]) -> Way:
    """Return the way of a change of samplers, which a call uses if one changes."""

    def used(plan: Plan) -> bool:
        return any(change(each.sampler) is not each.sampler for each in plan.attempts)

    return Way(name, what, used, sampler=change)


# ── functions that decide ─────────────────────────────────────────────────────────────
def tracks(plan: Plan) -> bool:
    return any(each.density.tracks for each in plan.attempts)


def went_closer(plan: Plan) -> bool:
    return any(each.name == "closer" for each in plan.attempts)


def corrected(plan: Plan) -> bool:
    trusts = [result.trust for result in plan.results()]
    return any(trust is not None and trust.corrections for trust in trusts)


def never(*_: Any) -> bool:
    return False


WAYS = (
    of_samplers(
        "resampling",
        "resampling above level 0",
        without_resampling,
    ),
    Way(
        "tracking",
        "log f of learned factors along paths: constant exponents, moves by scores",
        tracks,
        Function("composeprob.compiler.grow", "", "_site_can_track", never),
    ),
    Way(
        "closer",
        "the patient run on closer levels, weighted by log-densities",
        went_closer,
        Function("composeprob.runtime.plan", "", "can_wait", never),
    ),
    Way(
        "path-weights",
        "weights of paths in the place of independent chains' equal ones",
        corrected,
        Function("composeprob.results.support", "Arrived", "unmoved", property(never)),
    ),
    of_samplers("global-moves", "global moves", without_finisher(GlobalMoves)),
    of_samplers("warm-up", "the warm-up at level 0", without_finisher(WarmUp)),
    of_samplers(
        "relaxation",
        "moves at level 0 of learned energies until Stein's identity holds",
        without_finisher(Relaxation),
    ),
    of_samplers(
        "second-run",
        "the run over every other level, for the error of the evidence",
        without_second_run,
    ),
)
"""Ways that default runs have. Swaps of replicas are those of a sampler that the user
names."""


def way(name: str) -> Way:
    """Return the way of a name."""
    (found,) = (each for each in WAYS if each.name == name)
    return found


@contextlib.contextmanager
def left_out(some: Way | None) -> Iterator[Plan]:
    """A context in which `compile` and `infer` do without a way; None leaves out
    nothing. It yields the plan of the last call, which calls fill in."""
    infer = importlib.import_module("composeprob.runtime.infer")
    original = infer.plan
    seen = Plan()

    def plan(*args: Any, **kwargs: Any) -> Iterator[Attempt]:
        _, _, _, seen.tried = args
        del seen.attempts[:]
        for attempt in original(*args, **kwargs):
            if some is not None and some.sampler is not None:
                sampler = some.sampler(attempt.sampler)
                attempt = dataclasses.replace(attempt, sampler=sampler)
            seen.attempts.append(attempt)
            yield attempt

    with contextlib.ExitStack() as patches:
        if some is not None and some.function is not None:
            patches.enter_context(some.function.patched())
        patches.enter_context(mock.patch.object(infer, "plan", plan))
        yield seen


# ── checks ────────────────────────────────────────────────────────────────────────────
class Kept(cp.Check):
    """A check that finds nothing, and keeps the run that it is asked of."""

    code = "kept"
    withholds = False
    meaning = "nothing: it keeps the ended run"

    def __init__(self) -> None:
        self.run: EndedRun | None = None

    def ask(self, run: EndedRun) -> list[Any]:
        self.run = run
        return []


def name_of(check: cp.Check) -> str:
    """Return the name of a check: of its row in the table of limits, or its class."""
    return getattr(check, "name", type(check).__name__)


def findings_of(run: EndedRun, checks: Sequence[cp.Check]) -> list[Finding]:
    """Return what these checks find in a run."""
    status = ask_later(ask_at_end(run, checks), checks)()
    return [found for found in status.findings if found.code is not Code.OK]


def codes_without(run: EndedRun) -> dict[str, list[str]]:
    """Return, for each check that finds something in a run, the codes without it."""
    every = findings_of(run, CHECKS)
    codes = {}
    for check in CHECKS:
        # A check whose code was not found changes nothing.
        if check.code not in {found.code for found in every}:
            continue
        left = findings_of(run, [other for other in CHECKS if other is not check])
        if left != every:
            codes[name_of(check)] = [str(found.code) for found in left]
    return codes
