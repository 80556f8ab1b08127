"""Default runs without one of the ways that correct mode proportions, or without one of
the checks that flag them.

A way is left out where it stands: in the sampler of each attempt of a plan, or by
another function in the place of the one that decides or computes. A name that is gone
fails loudly. Checks change no sample, so they are left out of the registry when the
ended run is asked once more.

Renoising by one factor, and latents that `Result.extend` proposes near their data, have
no row: no default run of `infer` uses them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax

import composeprob as cp
from composeprob.compiler.tempering import Near
from composeprob.density.categorical import CategoricalDensity
from composeprob.findings import Code, Finding
from composeprob.kernels import HMC, Adaptive
from composeprob.kernels.gibbs import replaced
from composeprob.results.checks import CHECKS, ask_at_end, ask_later
from composeprob.results.ended import EndedRun
from composeprob.results.importance import can_draw
from composeprob.runtime.plan import Attempt, Tried
from composeprob.samplers.finishers import Finisher, GlobalMoves, Relaxation, WarmUp
from composeprob.samplers.hierarchy import has_dependents
from composeprob.samplers.sampler import Sampler
from composeprob.samplers.step import Step

UNTUNED = 1e-9
"""A gain of step sizes by which they stay where they begin."""
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
    # JAX compiles it, and would go on with what it has compiled.
    compiled: bool = False

    @contextlib.contextmanager
    def patched(self) -> Iterator[Any]:
        """A context in which it is replaced; yields what stands in its place."""
        # By import, as `composeprob.runtime` may have a function of a module's name.
        holder: Any = importlib.import_module(self.module)
        if self.place:
            holder = getattr(holder, self.place)
        try:
            with mock.patch.object(holder, self.name, self.instead) as instead:
                self._forget()
                yield instead
        finally:
            self._forget()

    def _forget(self) -> None:
        """Drop what was compiled with another function in its place."""
        if self.compiled:
            jax.clear_caches()


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


def without_control(sampler: Sampler) -> Sampler:
    """Return a sampler whose steps have no control."""
    step = sampler.step
    if step is None or step.control == "none":
        return sampler
    return replaced(sampler, step=replaced(step, control="none"))


def without_look_ahead(sampler: Sampler) -> Sampler:
    """Return reveals that are weighted by what is visible alone."""
    if not isinstance(sampler, cp.Reveal) or sampler.look_ahead == 0:
        return sampler
    return replaced(sampler, look_ahead=0.0)


def without_tuning(sampler: Sampler) -> Sampler:
    """Return a sampler whose step sizes stay where they begin, in units of the
    noise."""

    def adapts(part: object) -> bool:
        return isinstance(part, Adaptive)

    def change(part: object) -> object:
        if isinstance(part, Adaptive):
            return replaced(part, gain=UNTUNED)
        return part

    if not any(map(adapts, jax.tree.leaves(sampler, is_leaf=adapts))):
        return sampler
    changed: Sampler = jax.tree.map(change, sampler, is_leaf=adapts)
    return changed


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


def bends(plan: Plan) -> bool:
    """Return whether steps follow the curvature of data or user energies."""
    for attempt in plan.attempts:
        step = attempt.sampler.step
        if step is None or step.order != 2 or step.twist == 0:
            continue
        if attempt.density.evaluator.guided:
            return True
    return False


def looks_ahead(plan: Plan) -> bool:
    for attempt in plan.attempts:
        density = attempt.density
        if not isinstance(density, CategoricalDensity):
            continue
        changes = without_look_ahead(attempt.sampler) is not attempt.sampler
        if changes and density.tokens.looks_ahead:
            return True
    return False


def sees_near(plan: Plan) -> bool:
    def near(part: object) -> bool:
        return isinstance(part, Near)

    densities = [attempt.density for attempt in plan.attempts]
    return any(map(near, jax.tree.leaves(densities, is_leaf=near)))


def draws_importance(plan: Plan) -> bool:
    return any(can_draw(attempt.density) for attempt in plan.attempts)


def moves_dependents(plan: Plan) -> bool:
    densities = [attempt.density for attempt in plan.attempts]
    return any(each.num_levels == 1 and has_dependents(each) for each in densities)


def unbent(step: Step, *_: Any) -> Step:
    return step


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
    of_samplers(
        "step-controls",
        "controls of reverse steps, under which weights differ less",
        without_control,
    ),
    Way(
        "bent-step",
        "the curvature of data in the noise of reverse steps",
        bends,
        Function("composeprob.samplers.step", "Step", "bent", unbent, compiled=True),
    ),
    Way(
        "look-ahead",
        "normalisers of hidden tokens in the weights of reveals",
        looks_ahead,
        sampler=without_look_ahead,
    ),
    Way(
        "near",
        "points near the prior in the place of x/α, for data that fall faster than any "
        "power, such as Poisson counts",
        sees_near,
        Function("composeprob.compiler.tempering", "", "_far", never),
    ),
    Way(
        "importance-samples",
        "importance samples of the program's factors, which checks compare",
        draws_importance,
        Function("composeprob.results.checks.check", "", "can_draw", never),
    ),
    Way(
        "short-steps",
        "far shorter steps of some transitions of HMC, for scales near 0",
        moves_dependents,
        Function(
            "composeprob.samplers.hierarchy",
            "ShortAndLong",
            "begin",
            HMC.begin,
            compiled=True,
        ),
    ),
    of_samplers(
        "tuned-steps",
        "step sizes that follow the acceptance, on the way down",
        without_tuning,
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
