"""Gate of every change: default runs that are wrong, those that say so, and their cost,
beside the committed line.

    python -m benchmarks gate [--short] [--keys 3] [--minutes M] [--record]

The programs of the ablation (`modes --without`), of `plain-hierarchies`, `filtering`,
`tall-data`, `categorical` and `rewards`, and those of `exact/silent.py`, which were
wrong and OK when others tried them. Each benchmark says beside its ``cases()`` what it
leaves out. Left out altogether are the Ising model, whose networks are trained for
minutes, and nearest neighbours of images, which have no exact answer.

``--short`` takes one key of the programs that tell most, at most 15 processor minutes
from an empty compilation cache. Otherwise every program runs with 64 and 300 chains.
The table has the committed figures beside the new ones. The command exits with 1 if
more runs of a family, or in all, are wrong and OK than in the line, if a family has
other runs than there, or if a run is missing. ``--record`` writes the line,
results/gate_short.json or results/gate.json, with a table beside it.

Runs are kept in out/, in a file for each state of the library and the programs, so that
the same command goes on where it was stopped. With ``--minutes`` no run begins later.
Seconds are processor time of the run, with compilation.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# As in `trials`: most of the time is compilation.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_cpu_parallel_codegen_split_count=1"
)

import ages
import categorical
import filtering
import jax
import modes
import numpy as np
import plain_hierarchies
import rewards
import tall_data
from exact import silent
from exact.case import Case
from exact.measure import Outcome
from report import CODE, RESULTS, publish

CHAINS = (64, 300)
FAMILIES: dict[str, Callable[[], list[Case]]] = {
    "rewards in a small place": silent.rewards,
    "AND of learned factors": silent.conjunctions,
    "needle of latents": silent.needles,
    "powers of learned factors": silent.powers,
    "funnels and an unknown error": silent.funnels,
    "modes": modes.ablated,
    "rewards": rewards.cases,
    "plain hierarchies": plain_hierarchies.cases,
    "tall data": tall_data.cases,
    "categorical": categorical.cases,
    "filtering": filtering.cases,
}
"""Programs of each family, those first that were wrong and OK."""
SHORT = {
    64: (
        "cube, score",
        "cube, energy",
        "three mixtures, score",
        "score × 1.15",
        "score + 0.3",
        "a ring of 7 in three colours",
        "reward of 8 in a box",
        "reward of 4 in a tail",
        "reward of 8 in a bump",
        "a light mode under a reward, d = 2",
        "AND of four, d = 3, score",
        "AND of five, d = 3, score",
        "AND of five, d = 3, energy",
        "AND of five unlike, d = 3, score",
        "AND of six, d = 4, score",
        "three learned modes to the power 2.5, score",
        "three learned modes to the power 2.5, energy",
        "a needle of latents, d = 2",
        "a rare event under a reward",
    ),
    300: (
        "cube, score",
        "guidance 7",
        "narrow mode of an energy, d = 2",
        "one layer, vague, 30 members, moments",
        "crossed, sharp, 30 members, moments",
        "Lorenz-63, learned law",
        "gaussian m=4 n=8",
        "a·b, tables",
        "a/b^0.5, networks on 60 levels",
        "two modes under a reward",
        "reward of 8 in a box",
        "AND of five, d = 3, score",
        "a needle of latents, d = 10",
        "a funnel, d = 10",
        "a funnel, d = 3",
        "x + x³/10 with an unknown error",
    ),
}
"""Programs of the short form by their number of chains."""

OUTCOMES = {
    "wrong and OK": Outcome.DEFECT,
    "wrong and named": Outcome.NAMED,
    "right and named": Outcome.FALSE_ALARM,
    "no error": Outcome.NO_ERROR,
    "right and OK": Outcome.RIGHT,
}
KEPT = ("program", "chains", "key", "exact", "estimates", "errors", "outcome", "codes")
Counts = dict[str, float]
"""Figures of a family: its runs, those of each outcome, evaluations, seconds."""


class Run(NamedTuple):
    """Keys of a program with a number of chains."""

    family: str
    case: Case
    chains: int


def selection(short: bool) -> list[Run]:
    """Runs of a form, by family.

    Raises:
        KeyError: a name of the short form that no program has.
    """
    every = [
        Run(f, case, n) for f in FAMILIES for case in FAMILIES[f]() for n in CHAINS
    ]
    if not short:
        return every
    by_name = {(run.case.name, run.chains): run for run in every}
    chosen = [by_name[name, n] for n, names in SHORT.items() for name in names]
    return sorted(chosen, key=lambda run: list(FAMILIES).index(run.family))


def kept_file() -> Path:
    """Return the file of runs of this state of the library and the programs."""
    sources = ("composeprob", "benchmarks", ":(exclude)benchmarks/results")
    try:
        state = ages.git(CODE.root, "ls-files", "-s", "--", *sources)
        state += ages.git(CODE.root, "diff", "--", *sources)
    except ages.LoadError:
        state = "no history"
    return Path("out") / f"gate-{hashlib.sha256(state.encode()).hexdigest()[:12]}.jsonl"


def counts_of(rows: list[modes.Row]) -> Counts:
    """Figures of some runs; evaluations are a chain's, the mean of the runs."""
    count = Counter(row["outcome"] for row in rows)
    found: Counts = {"runs": len(rows)}
    for name, outcome in OUTCOMES.items():
        found[name] = count[outcome]
    evaluations = [row["evaluations"] for row in rows if "evaluations" in row]
    found["evaluations"] = round(float(np.mean(evaluations or [0])))
    found["seconds"] = round(sum(row["seconds"] for row in rows), 1)
    return found


def compared(
    new: dict[str, Counts], line: dict[str, Counts], missing: int = 0
) -> dict[str, bool]:
    """Return what must hold of families beside the committed line, and whether it does.

    Args:
        new: figures by family, with those in all under "in all".
        line: the same, as committed.
        missing: number of runs that were not made.
    """
    checks = {f"every run was made ({missing} are missing)": not missing}
    for family, counts in new.items():
        known = line.get(family)
        if known is None or known["runs"] != counts["runs"]:
            checks[f"{family}: the runs are those of the line (--record)"] = False
            continue
        before, now = known["wrong and OK"], counts["wrong and OK"]
        if now or before:
            text = f"{family}: no more wrong and OK than in the line"
            checks[f"{text} ({before} → {now})"] = now <= before
    return checks


def as_text(family: str, new: Counts, line: Counts | None) -> list[str]:
    """A line of the table: the committed figures → the new ones."""
    cells = [family]
    for name, value in new.items():
        before = "" if line is None or name == "runs" else f"{line[name]:,.0f} → "
        cells.append(f"{before}{value:,.0f}")
    return cells


def judge(
    name: str,
    groups: dict[str, list[modes.Row]],
    missing: int = 0,
    record: bool = False,
) -> int:
    """Print the table beside the committed line, and return the exit status.

    Args:
        name: of the line under results/.
        groups: rows of each family.
        missing: number of runs that were not made.
        record: whether they become the line.
    """
    every = [row for rows in groups.values() for row in rows]
    new = {family: counts_of(rows) for family, rows in groups.items()}
    new["in all"] = counts_of(every)
    file = RESULTS / f"{name}.json"
    line: dict[str, Counts] = {}
    if file.is_file() and not record:
        line = json.loads(file.read_text())["families"]
    checks = compared(new, line, missing)
    if record:
        # The line that is replaced is not one to beat.
        checks = compared({}, {}, missing)
    silent_runs = []
    for row in every:
        if row["outcome"] == Outcome.DEFECT:
            silent_runs.append(modes.as_text(row))
    notes = (
        "Runs are `cp.infer(density, key, num_chains)`, or `Result.extend` in "
        "`filtering`. Wrong: a share, a mean or log Z is more than four of its stated "
        "errors off, or of those that its status withholds. No error: named, with too "
        "few ancestors for an error. Evaluations are those of a chain, the mean of the "
        "runs. Seconds are processor time with compilation, without optimisations of "
        "XLA and without the exact answers. Wrong and OK: "
    )
    notes += f"{'; '.join(silent_runs) or 'none'}."
    if missing:
        notes += f" The table is partial: {missing} runs were not made."
    return publish(
        name,
        "Gate: wrong runs, named runs, and their cost",
        ["family", "runs", *OUTCOMES, "evaluations", "processor seconds"],
        [as_text(family, each, line.get(family)) for family, each in new.items()],
        checks,
        {"families": new, "rows": [{key: row[key] for key in KEPT} for row in every]},
        notes,
        write=record,
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="what tells most")
    parser.add_argument("--keys", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--record", action="store_true", help="write a new line")
    asked = parser.parse_args(arguments)
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_traceback_in_locations_limit", 0)
    name = "gate_short" if asked.short else "gate"
    if asked.keys > 1:
        name += f"_{asked.keys}_keys"

    end = time.monotonic() + 60 * asked.minutes
    runs = selection(asked.short)
    groups: dict[str, list[modes.Row]] = {}
    kept = kept_file()
    for family, case, chains in runs:
        left = (end - time.monotonic()) / 60
        rows = list(modes.measure([case], {chains: asked.keys}, kept, minutes=left))
        if rows:
            groups.setdefault(family, []).extend(rows)
    missing = len(runs) * asked.keys - sum(map(len, groups.values()))
    return judge(name, groups, missing, asked.record)


if __name__ == "__main__":
    sys.exit(main())
