"""Checks of runs: what a status can find, one file each or a row of `limits`, and the
registry of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from composeprob.findings import Finding
from composeprob.results.checks.acceptance_collapsed import AcceptanceCollapsed
from composeprob.results.checks.ancestors_collapsed import AncestorsCollapsed
from composeprob.results.checks.check import LATER, Check, Need
from composeprob.results.checks.check_failed import CheckFailed
from composeprob.results.checks.erratic_weights import ErraticWeights
from composeprob.results.checks.few_chains import FewChains
from composeprob.results.checks.few_effective import FewEffective
from composeprob.results.checks.few_in_mode import FewInMode
from composeprob.results.checks.few_untracked import FewUntracked
from composeprob.results.checks.fine_data import FineData
from composeprob.results.checks.impossible_data import ImpossibleData
from composeprob.results.checks.interrupted import Interrupted
from composeprob.results.checks.limits import (
    DRIFT,
    LEVELS_TOO_FEW,
    MASS_MISSING,
    MEMORY,
    OUTSIDE_WALLS,
)
from composeprob.results.checks.modes_missing import ModesMissing
from composeprob.results.checks.modes_unreached import ModesUnreached
from composeprob.results.checks.narrow_steps import NarrowSteps
from composeprob.results.checks.network_doubted import NetworkDoubted
from composeprob.results.checks.no_overlap import NoOverlap
from composeprob.results.checks.noise_left import NoiseLeft
from composeprob.results.checks.non_finite import NonFinite
from composeprob.results.checks.not_conservative import NotConservative
from composeprob.results.checks.not_saved import NotSaved
from composeprob.results.checks.off_target import OffTarget
from composeprob.results.checks.one_chain import OneChain
from composeprob.results.checks.out_of_training import OutOfTraining
from composeprob.results.checks.own_scores import OwnScores
from composeprob.results.checks.rounded_networks import RoundedNetworks
from composeprob.results.checks.samples_diverged import SamplesDiverged
from composeprob.results.checks.separated_modes import SeparatedModes
from composeprob.results.checks.shares_by_importance import SharesByImportance
from composeprob.results.checks.shares_frozen import SharesFrozen
from composeprob.results.checks.untrained_divisors import UntrainedDivisors
from composeprob.results.ended import EndedRun
from composeprob.results.status import Status
from composeprob.user_code import is_own

CHECKS: tuple[Check, ...] = (
    Interrupted(),
    SamplesDiverged(),
    NonFinite(),
    OUTSIDE_WALLS,
    ImpossibleData(),
    NotConservative(),
    NetworkDoubted(),
    UntrainedDivisors(),
    OwnScores(),
    RoundedNetworks(),
    NoOverlap(),
    OutOfTraining(),
    AcceptanceCollapsed(),
    FewEffective(),
    ErraticWeights(),
    AncestorsCollapsed(),
    ModesMissing(),
    OneChain(),
    FewUntracked(),
    ModesUnreached(),
    SharesFrozen(),
    SeparatedModes(),
    SharesByImportance(),
    FewInMode(),
    OffTarget(),
    DRIFT,
    MEMORY,
    MASS_MISSING,
    NoiseLeft(),
    NarrowSteps(),
    LEVELS_TOO_FEW,
    FineData(),
    CheckFailed(),
    NotSaved(),
    FewChains(),
)
"""All checks of the library, the gravest code first; the remark on a run without a
problem comes last. A run is asked in two rounds, each in this order: first the checks
that can be asked as it ends, and the others when its status is first looked at."""


def withholds(code: str) -> bool:
    """Return whether a check of this code withholds errors."""
    return any(check.withholds for check in CHECKS if check.code == code)


def ask_at_end(run: EndedRun, checks: Sequence[Check] = CHECKS) -> EndedRun:
    """Ask the checks that need nothing of `LATER`; return the run with their
    findings."""
    status = Status()
    for check in checks:
        if not check.needs & LATER:
            status = _asked(check, run, status)
    return run.with_findings(status.findings, status.withholds)


def ask_later(run: EndedRun, checks: Sequence[Check] = CHECKS) -> Callable[[], Status]:
    """Return a function that asks the other checks, for the status.

    It keeps the positions that these need, and not those of the whole run.
    """
    asked = []
    for check in checks:
        if check.needs & LATER and could_meet(check, run):
            asked.append((check, run.chosen(check.chains(run))))

    found = run.found

    def status() -> Status:
        status = Status(found)
        for check, some in asked:
            status = _asked(check, some, status)
        return status

    return status


def could_meet(check: Check, run: EndedRun) -> bool:
    """Return whether a run meets the needs of a check, but for findings to come."""
    needs = check.needs - {Need.NO_FINDING}
    return all(need.met_by(run) for need in needs)


def _asked(check: Check, run: EndedRun, status: Status) -> Status:
    """The status with the findings of one check of a run."""
    if check.unless_said and status.has(check.code):
        return status
    run = run.with_findings(status.findings, run.withheld)
    if not all(need.met_by(run) for need in check.needs):
        return status
    try:
        findings: list[Finding] = check.ask(run)
        return status.with_findings(*findings)
    except Exception as error:
        if not is_own(check):
            raise
        return status.with_findings(CheckFailed().of(check, error))
