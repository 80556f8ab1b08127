"""One run of a case, held against the exact answer: how many stated errors off it is,
and what its status says."""

from __future__ import annotations

import copy
import enum
import math
import time
from collections.abc import Callable
from typing import Any

import jax

import composeprob as cp
from composeprob.results.status import Code, Status
from exact.case import Answer, Case

FAR = 4.0
"""Stated errors beyond which an estimate is wrong."""
LEVEL = 0.9
"""Of the stated intervals."""


class Outcome(enum.StrEnum):
    """What a run is, by its estimates and its status."""

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
) -> dict[str, Any]:
    """One run as a row of what JSON can hold; None for NaN, and for what was not asked
    for.

    A program that is refused, by the compiler (``density`` compiles it, once) or by
    `infer`, counts as wrong and named.
    """
    began = time.process_time()
    sampler = None if case.sampler is None else case.sampler()
    row = {
        "family": case.family,
        "program": case.name,
        "key": key,
        "chains": num_chains,
        "exact": [answer.value, answer.log_evidence],
        "improper": answer.improper,
    }
    try:
        result = cp.infer(
            density(),
            jax.random.key(key),
            num_chains=num_chains,
            sampler=sampler,
            progress=False,
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
    """What a result states of itself, the log-evidence where it has an exact value."""
    unnamed = copy.copy(
        result
    )  # before any of what is computed when it is first asked for has been
    vars(unnamed)["status"] = Status()
    held_back = case.ask(unnamed).error, unnamed.log_evidence_error
    estimate = case.ask(result)
    known = answer.log_evidence is not None and result.log_evidence is not None
    return {
        "estimates": [
            _plain(estimate.value),
            _plain(result.log_evidence) if known else None,
        ],
        "errors": [
            _plain(estimate.error),
            _plain(result.log_evidence_error) if known else None,
        ],
        "withheld": [_plain(error) for error in held_back]
        if result.status.withholds
        else [None, None],
        "intervals": [
            list(map(_plain, ends))
            for ends in (estimate.interval(LEVEL), result.log_evidence_interval(LEVEL))
        ],
        "codes": [
            str(code) for code, _ in result.status.findings if code is not Code.OK
        ],
        "evaluations": result.evaluations,
        "effective_chains": _plain(result.effective_chains),
        "least_ess": _plain(
            min(
                (ess for ess in result.levels["ess"].values if math.isfinite(ess)),
                default=math.nan,
            )
        ),
        "ancestors": len(set(result._genealogy.index.tolist())),
        "sampler": result.about.sampler,
        "reason": result.reason,
    }


def _plain(value: Any) -> float | None:
    """A finite number of Python's, or None."""
    return None if value is None or not math.isfinite(value) else float(value)


def deviations(row: dict[str, Any]) -> list[float | None]:
    """How many errors the value and the log-evidence are off, each None where it has no
    exact answer.

    The errors are the stated ones, and those that the run would have stated where its
    status withholds them. Where it could have stated none they are those of a quarter
    as many independent draws, whose weights have a relative variance of 1.
    """
    n = max(row["chains"] / 4, 1.0)
    share = row["exact"][0] or 0.0
    instead = math.sqrt(max(share * (1 - share), 1 / n) / n), math.sqrt(1 / n)
    columns = zip(row["exact"], row["estimates"], errors(row), instead, strict=False)
    return [
        None
        if exact is None or value is None
        else abs(value - exact) / (other if error is None else max(error, 1e-12))
        for exact, value, error, other in columns
    ]


def errors(row: dict[str, Any]) -> list[float | None]:
    """The errors that are stated, or withheld; None where there is none at all."""
    pairs = zip(row["errors"], row["withheld"], strict=True)
    return [held_back if stated is None else stated for stated, held_back in pairs]


def outcome(row: dict[str, Any]) -> Outcome:
    """What a run is: wrong where an estimate is more than `FAR` errors off, named where
    its status is not OK.

    A run that is named, and could not have stated the value's error in any case, is no
    false alarm.
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
