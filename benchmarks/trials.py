"""Random programs with exact answers: is a default run right, or does it say that it is
not?

    python -m benchmarks trials [--seed 51] [--shapes 12] [--programs 3] [--keys 2]
        [--chains 64 300 1000] [--only TEXT …] [--minutes M] [--table NAME]

A seeded generator (`exact/trials.py`) draws shapes of programs: hierarchies of latents
alone, powers, guidance, conjunctions and negations of learned factors and of closed
forms, energies whose levels disagree, observations, and latents beside a noised site.
Each shape becomes several programs by random numbers. A run is wrong if a share or the
log-evidence is off by more than four stated errors, and named if its status is not OK.
Runs are kept in out/trials-SEED.jsonl as they are made, so that the same command goes
on where it was stopped. Exits with 1 if more than 1 % of the runs are wrong and OK, if
a program is so under two keys, or if more than one right run of eight is named. With
``--only`` nothing is written, unless ``--table`` names a table of its own; with
``--minutes`` no run begins later.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections import Counter
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

# Nearly all of the time is that of compiling small programs: in one piece, and without
# optimisations, as quick tests are.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_cpu_parallel_codegen_split_count=1"
)

import jax
from exact.measure import Outcome
from exact.trials import Shape, shapes
from modes import CODE, COLUMNS, Row, in_table, measure
from report import publish

MOST_SILENT = 0.01
MOST_NAMED = 1 / 8
LOOKED_AT = (51, 52, 97, 131)
"""Seeds whose runs decided something in the library. Whoever changes a default after
seeing a table of another seed adds that seed here."""

KEPT = ("program", "chains", "key", "exact", "estimates", "errors", "outcome", "codes")


def in_turn(all_shapes: list[Shape]) -> list[Shape]:
    """Return the shapes of all families in turn, so that a run that time ends has made
    some of each."""
    families: dict[str, list[Shape]] = {}
    for shape in all_shapes:
        families.setdefault(shape.family, []).append(shape)
    rounds = chain.from_iterable(zip_longest(*families.values()))
    return [shape for shape in rounds if shape is not None]


def asked_for(shape: Shape, only: list[str] | None) -> bool:
    """Return whether a part of the name of a shape or its family was asked for."""
    return only is None or any(
        text in name for text in only for name in (shape.family, shape.name)
    )


def run_all(some: list[Shape], asked: argparse.Namespace) -> list[Row]:
    """Make the runs of shapes, or read them from earlier calls."""
    file = Path(f"out/trials-{asked.seed}.jsonl")
    end = time.monotonic() + 60 * asked.minutes
    runs = dict.fromkeys(asked.chains, asked.keys)
    rows: list[Row] = []
    for shape in some:
        left = (end - time.monotonic()) / 60
        cases = [shape.case(asked.seed, number) for number in range(asked.programs)]
        rows += measure(cases, runs, file, minutes=left)
        # Shapes share no compiled code.
        jax.clear_caches()
    return rows


def repeated(rows: list[Row]) -> list[str]:
    """Return the programs that are wrong and OK under two keys of a number of chains,
    as text."""
    count = Counter(
        f"{row['program']} at {row['chains']:,}"
        for row in rows
        if row["outcome"] == Outcome.DEFECT
    )
    return [name for name, number in count.items() if number > 1]


def checks(rows: list[Row]) -> dict[str, bool]:
    """Thresholds, and whether they are met."""
    count = Counter(row["outcome"] for row in rows)
    silent = count[Outcome.DEFECT]
    named = count[Outcome.FALSE_ALARM]
    right = count[Outcome.RIGHT] + named
    twice = repeated(rows)
    return {
        f"at most {MOST_SILENT:.0%} of {len(rows)} runs are wrong and OK ({silent} "
        "are)": silent <= MOST_SILENT * len(rows),
        f"no program is so under two keys ({', '.join(twice) or 'none'})": not twice,
        f"at most one of eight right runs is named ({named} of {right})": (
            named <= MOST_NAMED * right
        ),
    }


def notes(rows: list[Row], made: int, all_shapes: int, seed: int) -> str:
    """Return what a reader must know to read the table."""
    silent = [
        f"{row['program']}, {row['chains']} chains, key {row['key']}"
        for row in rows
        if row["outcome"] == Outcome.DEFECT
    ]
    text = (
        f"Runs of {made} of {all_shapes} shapes. All are `cp.infer(density, key, "
        "num_chains)`. Hierarchies are asked for the lowest and the highest quarter of "
        "their mean and scales, other programs for a share, and for log Z where it is "
        "known. Wrong: one of them is off by more than four of its stated errors, or "
        "of those that its status withholds. The column 'no error' has runs that are "
        "named because their chains have too few distinct ancestors for an error."
    )
    if seed in LOOKED_AT:
        text += " Defaults were changed after runs of these programs had been seen."
    else:
        text += " The seed was held back: no default was chosen by runs of it."
    if silent:
        text += f" Wrong and OK: {'; '.join(silent)}."
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=51)
    parser.add_argument("--shapes", type=int, default=12, help="of each group")
    parser.add_argument("--programs", type=int, default=3, help="of each shape")
    parser.add_argument("--keys", type=int, default=2, help="of each program")
    parser.add_argument("--chains", type=int, nargs="+", default=[64, 300, 1000])
    parser.add_argument("--only", nargs="+", help="parts of names; writes nothing")
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--table", default="trials", help="name of the results")
    asked = parser.parse_args(arguments)
    # Nearly all of the time of small programs is compilation. Not where this module is
    # imported: the tests of its generator share their process with others.
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_traceback_in_locations_limit", 0)
    every = in_turn(shapes(asked.seed, asked.shapes))
    every = [each for each in every if asked_for(each, asked.only)]
    rows = run_all(every, asked)
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["family"], row["chains"]), []).append(row)
    table = [
        in_table(family, n, group) for (family, n), group in sorted(groups.items())
    ]
    commits = sorted({row["commit"] for row in rows})
    if commits != [CODE.commit]:
        print(f"Rows are of {len(commits)} commits: {', '.join(commits)}.")
    made = len({row["program"].rsplit(", ", 1)[0] for row in rows})
    details: dict[str, Any] = {
        "commits": commits,
        "rows": [{name: row[name] for name in KEPT} for row in rows],
    }
    return publish(
        asked.table,
        "Random programs: is a default run right, or does it say that it is not?",
        list(COLUMNS),
        table,
        checks(rows),
        details,
        notes(rows, made, len(every), asked.seed),
        write=asked.only is None or asked.table != "trials",
    )


if __name__ == "__main__":
    sys.exit(main())
