"""Rows and table of the ablation: default runs beside runs without one way, or one
check."""

from __future__ import annotations

import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from composeprob.results.checks import CHECKS
from exact.case import Case
from exact.measure import Outcome, measured, outcome
from exact.without import WAYS, Kept, Way, codes_without, left_out, name_of

SELECTION = (
    "guidance 7",
    "power 20",
    "power 3, three modes",
    "guidance 3, d = 2",
    "f² / g, d = 3",
    "four mixtures, d = 4",
    "squared mixture, d = 10",
    "two means of a mixture",
    "y = x₀·x₁",
    "three modes and a measurement, energy",
    "three modes and a measurement, score",
    "narrow mode of an energy, d = 2",
    "a skewed mixture times a Gaussian",
    "two modes squared",
    "an unknown error",
    "six groups",
    "ring × bar",
    "six subjects of two modes each, score",
    "cubed, d = 20",
    "5 × 5 weighted permutations",
    "a ring of 7 in three colours",
    "16 checks of 24 bits",
)
"""Programs of the benchmark, chosen before any result was seen: of each family with an
exact answer one of few numbers. Missing: reverse diffusion alone and the energy that is
refused, which are no default runs; permutations, queens, Latin squares, bits and y = x²
of 30 to 100 numbers, which are slow, and beside which smaller constraints stand."""

COLUMNS = (
    "without",
    "runs that use it",
    "another outcome or finding",
    "wrong and OK",
    "wrong and named",
    "right and named",
    "evaluations",
    "that is",
)
KEPT = (
    "program",
    "chains",
    "key",
    "way",
    "exact",
    "estimates",
    "errors",
    "outcome",
    "codes",
    "evaluations",
    "uses",
    "checks",
    "commit",
)
"""Fields of a row that results keep, with all that the table is made of."""
Row = dict[str, Any]


class Place(NamedTuple):
    """Place of a row: a program, chains, a key, and the way that is left out."""

    program: str
    chains: int
    key: int
    way: str


def place_of(row: Row) -> Place:
    return Place(row["program"], row["chains"], row["key"], row["way"])


def selected(cases: Sequence[Case]) -> list[Case]:
    """Return the selection, in its order.

    Raises:
        KeyError: a name that no program has.
    """
    by_name = {case.name: case for case in cases}
    return [by_name[name] for name in SELECTION]


def default_row(case: Case, density: Any, answer: Any, key: int, chains: int) -> Row:
    """Return the row of a default run: what it uses, and its outcomes without each
    check."""
    kept = Kept()
    with left_out(None) as plan:
        row = measured(case, density, answer, key, chains, checks=[kept])
    row["uses"] = [way.name for way in WAYS if way.used(plan)]
    row["checks"] = {}
    if kept.run is not None:
        for name, codes in codes_without(kept.run).items():
            other = str(outcome(row | {"codes": codes}))
            row["checks"][name] = {"codes": codes, "outcome": other}
    return row


def row_without(
    way: Way, case: Case, density: Any, answer: Any, key: int, chains: int
) -> Row:
    """Return the row of a run without a way."""
    with left_out(way):
        return measured(case, density, answer, key, chains)


def measure(
    cases: Sequence[Case],
    chains: Sequence[int],
    keys: int,
    ways: Sequence[Way],
    rows: list[Row],
    write: Callable[[Row], None],
    minutes: float = math.inf,
) -> Iterator[Row]:
    """Every run; those that ``rows`` lack are made, and written one by one.

    A run without a way is made only where the default run used it: it would be the
    same run, number for number.

    Args:
        cases: the programs.
        chains: numbers of chains.
        keys: keys of each program and number of chains.
        ways: to leave out.
        rows: of earlier calls.
        write: called with each new row.
        minutes: time after which no run begins.
    """
    end = time.monotonic() + 60 * minutes
    known = {place_of(row): row for row in rows}

    def made(place: Place, run: Callable[[], Row]) -> Row | None:
        if place not in known and time.monotonic() < end:
            row = run() | {"way": place.way}
            write(row)
            known[place] = row
        return known.get(place)

    for n in chains:
        for case in cases:
            answer = functools.cache(case.exact)
            whole = functools.cache(case.compile)
            uses: dict[int, list[str]] = {}
            for key in range(keys):
                run = functools.partial(_default, case, whole, answer, key, n)
                row = made(Place(case.name, n, key, ""), run)
                if row is not None:
                    uses[key] = row["uses"]
                    yield row
            for way in ways:
                # Compiled anew: a way may be one of the compiler.
                other = functools.cache(case.compile)
                for key in [key for key in uses if way.name in uses[key]]:
                    run = functools.partial(_without, way, case, other, answer, key, n)
                    row = made(Place(case.name, n, key, way.name), run)
                    if row is not None:
                        yield row


def _default(case: Case, density: Any, answer: Any, key: int, chains: int) -> Row:
    return default_row(case, density, answer(), key, chains)


def _without(
    way: Way, case: Case, density: Any, answer: Any, key: int, chains: int
) -> Row:
    return row_without(way, case, density, answer(), key, chains)


# ── table ─────────────────────────────────────────────────────────────────────────────
def table(rows: Sequence[Row], ways: Sequence[Way]) -> list[list[str]]:
    """Return a line for each way, and then for each check that found something."""
    by_place = {place_of(row): row for row in rows}
    lines = [_all_runs(rows)]
    for way in ways:
        pairs = []
        for row in rows:
            if row["way"] == way.name:
                default = by_place[place_of(row)._replace(way="")]
                pairs.append((default, row))
        lines.append([way.name, *_compared(pairs), way.what])
    defaults = [row for row in rows if not row["way"]]
    for check in CHECKS:
        name = name_of(check)
        pairs = []
        for row in defaults:
            if name in row["checks"]:
                pairs.append((row, row | row["checks"][name]))
        if pairs:
            lines.append([name, *_compared(pairs), f"a check: {check.code}"])
    return lines


def _all_runs(rows: Sequence[Row]) -> list[str]:
    """Return the line of all default runs."""
    defaults = [row for row in rows if not row["way"]]
    count = Counter(row["outcome"] for row in defaults)
    outcomes = (Outcome.DEFECT, Outcome.NAMED, Outcome.FALSE_ALARM)
    return [
        "nothing",
        str(len(defaults)),
        "–",
        *(str(count[each]) for each in outcomes),
        f"{mean_evaluations(defaults):,.0f}",
        "all default runs",
    ]


def _compared(pairs: Sequence[tuple[Row, Row]]) -> list[str]:
    """Return the cells of runs with and without."""
    if not pairs:
        return ["0", "–", "–", "–", "–", "–"]
    cells = [str(len(pairs)), str(sum(is_changed(*pair) for pair in pairs))]
    for kind in (Outcome.DEFECT, Outcome.NAMED, Outcome.FALSE_ALARM):
        numbers = []
        for side in (0, 1):
            numbers.append(sum(pair[side]["outcome"] == kind for pair in pairs))
        cells.append(" → ".join(map(str, numbers)))
    means = []
    for side in (0, 1):
        means.append(f"{mean_evaluations([pair[side] for pair in pairs]):,.0f}")
    return [*cells, " → ".join(means)]


def is_changed(default: Row, other: Row) -> bool:
    """Return whether a run has another outcome, or other findings."""
    if default["outcome"] != other["outcome"]:
        return True
    return sorted(default["codes"]) != sorted(other["codes"])


def mean_evaluations(rows: Sequence[Row]) -> float:
    """Return the mean evaluations of runs that were not refused."""
    values = [row["evaluations"] for row in rows if "evaluations" in row]
    return float(np.mean(values)) if values else math.nan


def idle(lines: Sequence[Sequence[str]]) -> list[str]:
    """Return the names of what was used and changed no run."""
    return [line[0] for line in lines if line[2] == "0"]


def notes(
    rows: Sequence[Row], cases: Sequence[Case], chains: Sequence[int], keys: int
) -> str:
    """Return what a reader must know, with what was not measured."""
    made = {(row["program"], row["chains"]) for row in rows}
    left = []
    for n in chains:
        for case in cases:
            if (case.name, n) not in made:
                left.append(f"{case.name} at {n}")
    text = (
        f"Default runs of {len({program for program, _ in made})} programs under up to "
        f"{keys} keys. A run without a way "
        "is made where the default run used it: elsewhere it would be the same run. A "
        "check is left out when the same run is asked once more. Outcomes and "
        "evaluations are those of the runs that use the way: with it → without it. "
        "Wrong and named are meant as in `modes`. XLA compiled without optimisations "
        "(JAX_DISABLE_MOST_OPTIMIZATIONS), which changes rounding only."
    )
    commits = Counter(row["commit"][:9] for row in rows if row.get("commit"))
    text += f" Runs by commit: {', '.join(f'{n} at {c}' for c, n in commits.items())}."
    if left:
        text += f" Time was up before {'; '.join(left)}."
    return text
