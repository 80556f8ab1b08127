"""Modes: default runs of programs with exact answers, right or named by their status.

    python -m benchmarks modes

Strong guidance, powers, constraints, negations, narrow modes and labels that switch,
and thirty programs that are easy. Each run states a share (or the probability that a
sample is valid) and log Z, with their errors: it is wrong where one is more than four
of these off, and named where its status is not OK. Exits with 1 if more than 2 % of the
runs are wrong and OK, if more than 3 % of the right ones are named, or if another
threshold is missed. Runs are kept in out/modes.jsonl as they are made, so that the same
command goes on where it was stopped. ``--quick`` takes 3 keys, and 64 and 1,000 chains,
and has results of its own; with ``--minutes`` no run begins later, and these are of
what was made. ``--keys``, ``--chains`` and ``--only`` write no results.

    python -m benchmarks modes --without [WAY …]

The ablation: over a selection of these programs and programs of learned factors and
latents alone, default runs beside runs without one of the ways that correct mode
proportions, or without one of the checks that flag them. Runs are kept in
out/modes_without.jsonl. It writes its own results, and exits with 1 if a way that was
used changed no run.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from exact import ablation, axis, constraints, grids, learned, networks, plain, right
from exact.case import Case
from exact.measure import Outcome, measured
from exact.without import WAYS
from report import CODE, publish
from scipy import stats

KEYS, CHAINS = 10, (64, 1000, 10_000)
QUICK_KEYS, QUICK_CHAINS = 3, (64, 1000)
ABLATED_CHAINS = (64, 300)
JUDGED, JUDGED_KEYS, JUDGED_CHAINS = ("guidance 7", "power 20"), 20, 1000
"""Families whose spread is judged, over so many keys."""
MOST_DEFECTS, MOST_ALARMS = 0.02, 0.03
SPREAD = 1.3
"""Most that an estimate may spread, in its stated errors, beyond chance."""
DEEP = 3
"""Stated errors within which the log-evidence in 32 dimensions is to be."""
COLUMNS = (
    "family",
    "chains",
    "runs",
    "wrong and OK",
    "wrong and named",
    "false alarms",
    "no error",
    "median error, in ±",
    "largest of those that are OK",
    "evaluations a run",
    "findings",
)
Row = dict[str, Any]


def cases() -> list[Case]:
    """Every program."""
    modules = (axis, constraints, grids)
    hard = [case for module in modules for case in module.common_cases()]
    more = [case for module in modules for case in module.more_cases()]
    return [*hard, *more, *learned.cases(), *right.cases()]


def ablated() -> list[Case]:
    """Programs of the ablation: learned factors and latents alone, and a selection of
    all others; the first of each family come first."""
    every = [*networks.cases(), *plain.cases(), *ablation.selected(cases())]
    earlier: Counter[str] = Counter()
    places = {}
    for case in every:
        places[case.name] = earlier[case.family]
        earlier[case.family] += 1
    return sorted(every, key=lambda case: places[case.name])


def asked_for(case: Case, only: list[str] | None) -> bool:
    """Return whether a part of the name of a program or its family was asked for."""
    return only is None or any(
        text in name for text in only for name in (case.family, case.name)
    )


def rows_of(file: Path) -> list[Row]:
    """Rows of a file, without lines that an interrupted write left unfinished."""
    rows = []
    for text in file.read_text().splitlines() if file.is_file() else []:
        try:
            rows.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return rows


def measure(
    programs: list[Case],
    runs: dict[int, int],
    file: Path,
    judged: bool = False,
    minutes: float = math.inf,
) -> Iterator[Row]:
    """Every run of some programs; runs that the file lacks are made and appended.

    Args:
        programs: the programs.
        runs: number of keys for every number of chains.
        file: one row a line.
        judged: whether families whose spread is judged have `JUDGED_KEYS` keys; they
            come first.
        minutes: time after which no run begins.
    """
    end = time.monotonic() + 60 * minutes
    kept = {(row["program"], row["chains"], row["key"]): row for row in rows_of(file)}
    file.parent.mkdir(parents=True, exist_ok=True)
    compiled = functools.cache(lambda case: case.compile())
    answers = functools.cache(lambda case: case.exact())
    spread = {
        (case, n): judged and case.family in JUDGED and n == JUDGED_CHAINS
        for n in runs
        for case in programs
    }
    for case, n in sorted(spread, key=lambda each: not spread[each]):
        keys = JUDGED_KEYS if spread[case, n] else runs[n]
        for key in range(keys):
            if (case.name, n, key) not in kept:
                if time.monotonic() > end:
                    continue
                compiles = functools.partial(compiled, case)
                row = measured(case, compiles, answers(case), key, n)
                row["commit"] = CODE.commit
                with file.open("a") as out:
                    # The line break in front ends a line that an interrupted write left
                    # unfinished.
                    out.write("\n" + json.dumps(row))
                kept[case.name, n, key] = row
                print(as_text(row), flush=True)
            yield kept[case.name, n, key]


def as_text(row: Row) -> str:
    """A run in one line."""
    texts = [
        f"{row['program']}, {row['chains']} chains, key {row['key']}: {row['outcome']}"
    ]
    columns = zip(row["exact"], row["estimates"], row["errors"], strict=False)
    for exact, value, error in columns:
        if exact is None or value is None:
            continue
        stated = "withheld" if error is None else f"{error:.2g}"
        texts.append(f"{value:.4g} ± {stated} for {exact:.4g}")
    texts += [", ".join(row["codes"]), f"{row['seconds']:.1f} s"]
    return "; ".join(texts)


def in_table(family: str, chains: int, rows: list[Row]) -> list[str]:
    """A line of the table."""
    count = Counter(row["outcome"] for row in rows)
    largest = [
        max((z for z in row["z"] if z is not None), default=np.nan) for row in rows
    ]
    fine = [
        z
        for z, row in zip(largest, rows, strict=True)
        if not row["codes"] and np.isfinite(z)
    ]
    known = [z for z in largest if np.isfinite(z)]
    findings = Counter(code for row in rows for code in row["codes"])
    evaluations = [row["evaluations"] for row in rows if "evaluations" in row]
    return [
        family,
        f"{chains:,}",
        str(len(rows)),
        *(
            str(count[outcome])
            for outcome in (
                Outcome.DEFECT,
                Outcome.NAMED,
                Outcome.FALSE_ALARM,
                Outcome.NO_ERROR,
            )
        ),
        f"{np.median(known):.1f}" if known else "–",
        f"{max(fine):.1f}" if fine else "–",
        f"{np.mean(evaluations):,.0f}" if evaluations else "–",
        ", ".join(f"{code} {number}" for code, number in findings.most_common()),
    ]


def checks(rows: list[Row]) -> dict[str, bool]:
    """Thresholds, and whether they are met."""
    count = Counter(row["outcome"] for row in rows)
    easy = [r for r in rows if r["family"].startswith("right")]
    fine = count[Outcome.RIGHT] + count[Outcome.FALSE_ALARM]
    defects, alarms = count[Outcome.DEFECT], count[Outcome.FALSE_ALARM]
    loud = sum(bool(row["codes"]) for row in easy)
    found = {
        f"at most {MOST_DEFECTS:.0%} of {len(rows)} runs are wrong and OK ({defects} "
        "are)": (defects <= MOST_DEFECTS * len(rows)),
        f"at most {MOST_ALARMS:.0%} of {fine} right runs are named ({alarms} are)": (
            alarms <= MOST_ALARMS * fine
        ),
        f"at most {MOST_ALARMS:.0%} of {len(easy)} runs of easy programs are named "
        f"({loud} are)": (loud <= MOST_ALARMS * len(easy)),
    }
    for family in JUDGED:
        judged = [
            row
            for row in rows
            if row["family"] == family and row["chains"] == JUDGED_CHAINS
        ]
        if judged:
            quiet = [row for row in judged if row["outcome"] == Outcome.RIGHT]
            worst = max(map(float, spreads(quiet)), default=np.inf)
            text = (
                f"{family}, {JUDGED_CHAINS} chains: right and OK under every key "
                f"({len(quiet)} of {len(judged)}), "
            )
            text += (
                f"spread ≤ {SPREAD} × stated, with what chance does to it ({worst:.2f})"
            )
            found[text] = len(quiet) == len(judged) and worst <= SPREAD
    deep = [
        r
        for r in rows
        if r["program"] == "squared mixture, d = 32" and r["chains"] == JUDGED_CHAINS
    ]
    if deep:
        near = sum(r["errors"][1] is not None and r["z"][1] <= DEEP for r in deep)
        text = (
            f"log Z of the squared mixture, d = 32, {JUDGED_CHAINS} chains: within "
            f"{DEEP} of its ± under every key"
        )
        found[f"{text} ({near} of {len(deep)})"] = near == len(deep)
    return found


def spreads(rows: list[Row]) -> list[float]:
    """Root mean squares of the deviations of values and of log-evidences.

    They are in stated errors, over the root mean square that chance exceeds once in
    1,000 sets of as many deviations. Fewer than two deviations have none.
    """
    columns = [[row["z"][i] for row in rows if row["z"][i] is not None] for i in (0, 1)]
    return [
        float(np.sqrt(np.mean(np.square(z)) / (stats.chi2.ppf(0.999, len(z)) / len(z))))
        for z in columns
        if len(z) > 1
    ]


def without(asked: argparse.Namespace) -> int:
    """Print and write the table of the ablation."""
    keys = asked.keys or QUICK_KEYS
    chains = asked.chains or ABLATED_CHAINS
    ways = [way for way in WAYS if not asked.without or way.name in asked.without]
    file = Path("out/modes_without.jsonl")
    some = [case for case in ablated() if asked_for(case, asked.only)]

    def write(row: Row) -> None:
        row["commit"] = CODE.commit
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as out:
            # The line break in front ends a line that was left unfinished.
            out.write("\n" + json.dumps(row))
        print(f"without {row['way'] or 'nothing'}: {as_text(row)}", flush=True)

    kept = rows_of(file)
    made = list(ablation.measure(some, chains, keys, ways, kept, write, asked.minutes))
    lines = ablation.table(made, ways)
    idle = ablation.idle(lines)
    notes = ablation.notes(made, some, chains, keys)
    return publish(
        "modes_without",
        "Default runs without one way, or one check",
        list(ablation.COLUMNS),
        lines,
        {f"each way or check that was used changes a run (idle: {idle})": not idle},
        {"rows": [{name: row.get(name) for name in ablation.KEPT} for row in made]},
        notes,
        write=not (asked.only or asked.without),
        made_by="python -m benchmarks modes --without",
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_KEYS} keys, chains {QUICK_CHAINS}"
    )
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="after which no run begins"
    )
    parser.add_argument("--keys", type=int, help="keys of every program")
    parser.add_argument("--chains", type=int, nargs="+", help="numbers of chains")
    parser.add_argument(
        "--only",
        nargs="+",
        help="programs and families with one of these texts in their names",
    )
    parser.add_argument(
        "--rows",
        type=Path,
        default=Path("out/modes.jsonl"),
        help="where finished runs are kept",
    )
    parser.add_argument(
        "--without",
        nargs="*",
        metavar="WAY",
        choices=[way.name for way in WAYS],
        help="the ablation: leave out these ways, or each in turn",
    )
    asked = parser.parse_args(arguments)
    if asked.without is not None:
        return without(asked)
    keys = asked.keys or (QUICK_KEYS if asked.quick else KEYS)
    chains = asked.chains or (QUICK_CHAINS if asked.quick else CHAINS)
    some = [case for case in cases() if asked_for(case, asked.only)]
    runs = dict.fromkeys(chains, keys)
    rows = list(measure(some, runs, asked.rows, not asked.keys, asked.minutes))
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["family"], row["chains"]), []).append(row)
    table = [in_table(family, n, group) for (family, n), group in groups.items()]
    commits = {row["commit"] for row in rows}
    whole = not (asked.keys or asked.chains or asked.only) and commits == {CODE.commit}
    if commits != {CODE.commit}:
        print(
            f"Rows are of {len(commits)} commits: remove {asked.rows} to measure this "
            "one alone."
        )
    kept = (
        "program",
        "chains",
        "key",
        "exact",
        "estimates",
        "errors",
        "outcome",
        "codes",
    )
    details = {
        "keys": keys,
        "rows": [{name: row[name] for name in kept} for row in rows],
    }
    notes = (
        "All runs are `cp.infer(density, key, num_chains)`, but for those of "
        f"`Ancestral`; keys from 0 on, {JUDGED_KEYS} of guidance 7 and of power 20 at "
        f"{JUDGED_CHAINS:,} chains. Wrong: a share, the probability of a valid sample "
        "or log Z is off by more than four of its stated errors, or of those that its "
        "status withholds. False alarms are right runs with a finding. Runs in the "
        "column 'no error' are named because their chains have too few distinct "
        "ancestors for an error of a share: they are neither right nor wrong, though "
        "most have only valid samples. Compositions of the zoo have no exact answer, "
        "and count as right."
    )
    made = {(row["program"], row["chains"]) for row in rows}
    if left := [
        f"{case.name} at {n:,}"
        for n in chains
        for case in some
        if (case.name, n) not in made
    ]:
        notes += (
            f" Time was up before {len(left)} of {len(left) + len(made)} programs and "
            "numbers of chains: "
        )
        notes += "; ".join(left) + "."
    title = "Modes: is a default run right, or does it say that it is not?"
    name = "modes_quick" if asked.quick else "modes"
    return publish(
        name, title, list(COLUMNS), table, checks(rows), details, notes, write=whole
    )


if __name__ == "__main__":
    sys.exit(main())
