"""One run of a case beside the exact answer: its deviation in stated errors, and its
status."""

from __future__ import annotations

import copy
import enum
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import composeprob as cp
from composeprob.findings import Code
from composeprob.results.status import Status
from exact.case import Answer, Case

FAR = 4.0
"""Stated errors beyond which an estimate is wrong."""
LEVEL = 0.9
"""Probability of the stated intervals."""


class Outcome(enum.StrEnum):
    """Kind of a run, by its estimates and its status."""

    RIGHT = "right and OK"
    DEFECT = "wrong and OK"
    NAMED = "wrong and named"
    FALSE_ALARM = "right and named"
    NO_ERROR = "named, with too few ancestors for an error"


def measured(
    case: Case,
    density: Callable[[], cp.AnnealedDensity],
    answer: Answer,
    key: int,
    num_chains: int,
    **options: Any,
) -> dict[str, Any]:
    """Run a case, and return a row that JSON can hold, with None for NaN.

    A program that is refused, by the compiler (``density`` compiles it, once) or by
    `infer`, counts as wrong and named. Further ``options`` go to `infer`.
    """
    began = time.process_time()
    if case.sampler is not None:
        options["sampler"] = case.sampler()
    row = {
        "family": case.family,
        "program": case.name,
        "key": key,
        "chains": num_chains,
        "exact": [*answer.values, answer.log_evidence],
        "improper": answer.improper,
    }
    try:
        result = case.run(
            density(),
            jax.random.key(key),
            num_chains=num_chains,
            progress=False,
            **options,
        )
        row |= read(case, answer, result)
    except cp.errors.ComposeProbError as refused:
        row |= {
            "codes": ["refused"],
            "estimates": [],
            "errors": [],
            "withheld": [],
            "reason": str(refused),
        }
    row |= {"z": deviations(row), "seconds": time.process_time() - began}
    return row | {"outcome": str(outcome(row))}


def read(case: Case, answer: Answer, result: cp.Result) -> dict[str, Any]:
    """Return the statements of a result.

    Log-evidence is among them if its exact value is known. Errors that the status
    withholds are read from a copy of the result without findings.
    """
    # The copy comes first: it must not inherit properties that `result` has cached.
    unnamed = copy.copy(result)
    vars(unnamed)["status"] = Status()
    withheld = [*_entries(case.ask(unnamed).error), unnamed.log_evidence_error]
    estimate = case.ask(result)
    known = answer.log_evidence is not None and result.log_evidence is not None
    log_evidence = (None, None)
    if known:
        log_evidence = (result.log_evidence, result.log_evidence_error)
    if not result.status.withholds:
        withheld = [None] * len(withheld)
    intervals = (
        *zip(*map(_entries, estimate.interval(LEVEL)), strict=True),
        result.log_evidence_interval(LEVEL),
    )
    finite_ess = [ess for ess in result.levels["ess"].values if math.isfinite(ess)]
    return {
        "estimates": _as_list(estimate.value, log_evidence[0]),
        "errors": _as_list(estimate.error, log_evidence[1]),
        "withheld": [_as_python(error) for error in withheld],
        "intervals": [[_as_python(end) for end in ends] for ends in intervals],
        "codes": [
            str(code) for code, _ in result.status.findings if code is not Code.OK
        ],
        "evaluations": result.evaluations,
        "effective_chains": _as_python(result.effective_chains),
        "least_ess": _as_python(min(finite_ess, default=math.nan)),
        "ancestors": len(set(result._genealogy.index.tolist())),
        "sampler": result.about.sampler,
        "reason": result.reason,
    }


def _entries(value: Any) -> list[Any]:
    """Return the entries of a number or an array."""
    return np.ravel(value).tolist()


def _as_list(value: Any, of_evidence: Any) -> list[float | None]:
    return [_as_python(number) for number in (*_entries(value), of_evidence)]


def _as_python(value: Any) -> float | None:
    """Return a finite number as a Python float, and None for any other value."""
    return None if value is None or not math.isfinite(value) else float(value)


def deviations(row: dict[str, Any]) -> list[float | None]:
    """Deviations of the value and the log-evidence, in errors.

    A deviation is None where there is no exact answer. The errors are the stated ones,
    or the withheld ones. A run without either counts as a quarter as many independent
    draws, whose weights have a relative variance of 1.
    """
    n = max(row["chains"] / 4, 1.0)
    *shares, _ = row["exact"]
    defaults = [_error_of_share(share or 0.0, n) for share in shares]
    defaults.append(math.sqrt(1 / n))
    columns = zip(row["exact"], row["estimates"], errors(row), defaults, strict=False)
    found: list[float | None] = []
    for exact, value, error, default in columns:
        if exact is None or value is None:
            found.append(None)
            continue
        unit = default if error is None else max(error, 1e-12)
        found.append(abs(value - exact) / unit)
    return found


def _error_of_share(share: float, n: float) -> float:
    """Return the error of a share of n draws."""
    return math.sqrt(max(share * (1 - share), 1 / n) / n)


def errors(row: dict[str, Any]) -> list[float | None]:
    """Errors that are stated, or withheld; None without either."""
    found = []
    for stated, withheld in zip(row["errors"], row["withheld"], strict=True):
        error = withheld if stated is None else stated
        found.append(error)
    return found


def outcome(row: dict[str, Any]) -> Outcome:
    """Kind of a run: wrong if an estimate is more than `FAR` errors off, named if its
    status is not OK.

    A named run that could not have stated the value's error in any case is not a false
    alarm.
    """
    wrong = (
        row["improper"]
        or "refused" in row["codes"]
        or any(z is not None and z > FAR for z in deviations(row))
    )
    if not row["codes"]:
        return Outcome.DEFECT if wrong else Outcome.RIGHT
    if wrong:
        return Outcome.NAMED
    return Outcome.NO_ERROR if errors(row)[0] is None else Outcome.FALSE_ALARM
