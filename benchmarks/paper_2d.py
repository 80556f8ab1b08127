"""The 2D experiments of Du et al. 2023 and Sjöberg et al. 2023, with learned models.

They are products, a mixture and a negation.

    python -m benchmarks paper-2d

Every sampler visits every level. Each run is made with the models and again with exact
noised factors: what the second misses is the sampler's error, the rest is the models'.
Finished rows are kept in out/, so that the same command goes on where it was stopped.
Exits with 1 if a claim of the docs does not hold.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from plane import figure
from plane.measure import BUDGET, HELD_OUT, MOST, Judged, judge
from plane.samplers import Row, rows
from plane.tasks import TASKS, WEIGHTS, Task, truth
from report import RESULTS, publish

CHAINS = 500
AGAIN = (
    "Reverse",
    "HMC tuned × 3",
    "HMC tuned × 3, 5 points Simpson",
    "SMC",
    "SMC, MALA 5 points",
)
"""Rows that are run for every retraining, on the levels even in log-SNR."""
COLUMNS = [
    *(
        "models",
        "sampler",
        "levels",
        "mean log p",
        "RAISE log-likelihood",
        "TV",
        "MMD²",
        "W2",
        "cov. error",
        "accept.",
    ),
    *("evaluations", "seconds", "sampler error", "model error"),
]


class Kept:
    """Finished rows and their samples, in a folder; the settings are part of a file's
    name."""

    def __init__(self, folder: Path, settings: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.settings = settings

    def _path(self, name: tuple[Any, ...]) -> Path:
        parts = "_".join(str(part) for part in (*name, self.settings))
        return self.folder / (re.sub(r"[^\w.-]", "_", parts) + ".npz")

    def get(self, name: tuple[Any, ...]) -> tuple[Judged, np.ndarray] | None:
        path = self._path(name)
        if not path.exists():
            return None
        with np.load(path) as stored:
            facts = json.loads(str(stored["facts"]))
            return Judged(**facts), stored["samples"]

    def put(self, name: tuple[Any, ...], judged: Judged, samples: np.ndarray) -> None:
        np.savez(
            self._path(name),
            facts=json.dumps(dataclasses.asdict(judged)),
            samples=samples,
        )


def plan(tasks: list[Task]) -> Iterator[tuple[Task, str, Row, int]]:
    """Every run that is judged: (task, kind, row, retraining)."""
    for task in tasks:
        for kind in task.kinds:
            for row in rows(kind, task):
                yield task, kind, row, 0
    for task in tasks:
        for kind in task.kinds:
            for row in rows(kind, task):
                if row.name in AGAIN and row.levels == "even":
                    for retraining in range(1, task.retrainings):
                        yield task, kind, row, retraining


def run(
    tasks: list[Task], num_chains: int, kept: Kept
) -> list[tuple[Judged, np.ndarray]]:
    """Run what is planned and not kept yet."""
    out = []
    runs = list(plan(tasks))
    for i, (task, kind, row, retraining) in enumerate(runs):
        name = (task.name, kind, row.name, row.levels, retraining)
        found = kept.get(name)
        if found is None:
            exact_name = (task.name, "exact", row.name, row.levels, 0)
            exact = kept.get(exact_name)
            if exact is None:
                exact = judge(task, "exact", row, num_chains, None, raised=False)
                kept.put(exact_name, *exact)
            if retraining <= 1:
                # hundreds of executables in one process would exhaust its memory maps
                jax.clear_caches()
            measures = {"log_likelihood": exact[0].log_likelihood, "tv": exact[0].tv}
            found = judge(
                task,
                kind,
                row,
                num_chains,
                measures,
                retraining,
                raised=retraining == 0,
            )
            kept.put(name, *found)
        out.append(found)
        print(
            f"[{i + 1}/{len(runs)}] {task.name}: " + "  ".join(as_text(found[0])),
            flush=True,
        )
    return out


def run_beside(tasks: list[Task], jobs: int, options: argparse.Namespace) -> None:
    """Run the tasks in processes of their own, `jobs` at a time; each leaves its rows
    in the folder."""

    def one(task: Task) -> None:
        command = [sys.executable, __file__, "--tasks", task.name, "--run-only"]
        command += ["--chains", str(options.chains), "--keep", str(options.keep)]
        subprocess.run(command, check=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, tasks))


def as_text(row: Judged) -> list[str]:
    """A line of the table."""

    def pair(values: tuple[float, float] | None) -> str:
        return "–" if values is None else f"{values[0]:+.2f} nats, TV {values[1]:+.3f}"

    adjusted = np.isfinite(row.acceptance) and not row.sampler.startswith(
        ("U", "Reverse")
    )
    raised = row.raise_log_likelihood
    return [
        row.kind,
        row.sampler + (" (paper)" if row.paper and row.sampler != "Reverse" else ""),
        row.levels,
        f"{row.log_likelihood:.2f}",
        "–" if raised is None else f"{raised:.2f} ± {row.raise_standard_error:.2f}",
        f"{row.tv:.3f}",
        f"{row.mmd:.3f}",
        f"{row.w2:.3f}",
        f"{row.covariance:.2f}",
        f"{row.acceptance:.3f}" if adjusted else "–",
        f"{row.evaluations:,}",
        f"{row.seconds:.1f}",
        pair(row.sampler_error),
        pair(row.score_error),
    ]


def minutes(kept: Kept, tasks: list[Task]) -> float:
    """Minutes that all rows took, those with exact factors included."""
    names = [
        (task.name, kind, row.name, row.levels, retraining)
        for task, kind, row, retraining in plan(tasks)
    ]
    names += sorted(
        {(task, "exact", row, levels, 0) for task, _, row, levels, _ in names}
    )
    return (
        sum(found[0].wall for name in names if (found := kept.get(name)) is not None)
        / 60
    )


def exact_line(task: Task, num_chains: int) -> list[str]:
    """The same measures of exact draws: what no sampler can better."""
    law = truth(task.name)
    found = law.judge(
        law.draw(jax.random.key(3), num_chains), law.draw(jax.random.key(1), num_chains)
    )
    numbers = [
        f"{found['tv']:.3f}",
        f"{found['mmd']:.3f}",
        f"{found['w2']:.3f}",
        f"{found['covariance']:.2f}",
    ]
    return [
        "exact",
        "exact draws",
        "–",
        f"{found['log_likelihood']:.2f}",
        "–",
        *numbers,
        *["–"] * 5,
    ]


def pick(
    judged: list[Judged],
    task: str,
    kind: str,
    sampler: str,
    levels: str,
    retraining: int = 0,
) -> Judged:
    """One row."""
    wanted = (task, kind, retraining, sampler, levels)
    return next(row for row in judged if row.name == wanted)


def checks(judged: list[Judged], tasks: list[Task]) -> dict[str, bool]:
    """Claims of the docs about these numbers."""
    out: dict[str, bool] = {}
    names = {task.name for task in tasks}
    for task in sorted(names & {"product", "sharp-product"}):
        reverse = pick(judged, task, "energy", "Reverse", "cosine")
        hmc = pick(judged, task, "energy", "HMC tuned × 3, 10 a level", "even")
        if task == "product":
            out[f"{task}: HMC's TV ≤ 0.05"] = hmc.tv <= 0.05
        out[f"{task}: reverse diffusion is at least 3 times worse"] = (
            reverse.tv >= 3 * hmc.tv
        )
    if "sharp-product" in names:
        hmc = pick(judged, "sharp-product", "energy", "HMC 0.03 × 3", "cosine")
        smc = pick(judged, "sharp-product", "energy", "SMC", "even")
        scores = pick(judged, "sharp-product", "score", "SMC, MALA 5 points", "even")
        assert hmc.raise_log_likelihood is not None
        assert smc.raise_log_likelihood is not None
        out |= {
            "SMC needs at most a fifteenth of the evaluations of HMC at the paper's "
            "settings": 15 * smc.evaluations <= hmc.evaluations,
            "… and a tenth of the time": 10 * smc.seconds <= hmc.seconds,
            "… at a mean log p at least 1 nat better": (
                smc.log_likelihood >= hmc.log_likelihood + 1
            ),
            "… at a RAISE log-likelihood that is no worse, within 0.1": (
                smc.raise_log_likelihood >= hmc.raise_log_likelihood - 0.1
            ),
            "… and a TV that is no worse, within 0.02": smc.tv <= hmc.tv + 0.02,
            "the score models with Feynman–Kac weights come within 0.5 nat": (
                scores.log_likelihood >= smc.log_likelihood - 0.5
            ),
        }
    if "mixture" in names:
        smc = pick(judged, "mixture", "energy", "SMC", "even")
        out["mixture: SMC's shares of the bars are within TV 0.04 of those asked"] = (
            smc.tv <= 0.04
        )
    return out


def retrained(judged: list[Judged], tasks: list[Task]) -> str:
    """Mean and standard deviation over retrainings, as Markdown."""
    lines = [
        "| task | models | sampler | mean log p | TV | W2 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for task in (t for t in tasks if t.retrainings > 1):
        for kind in task.kinds:
            for name in AGAIN:
                found = [
                    r
                    for r in judged
                    if (r.task, r.kind, r.sampler, r.levels)
                    == (task.name, kind, name, "even")
                ]
                if len(found) > 1:
                    cells = [
                        [getattr(r, f) for r in found]
                        for f in ("log_likelihood", "tv", "w2")
                    ]
                    shown = [
                        f"{statistics.mean(c):.3f} ± {statistics.stdev(c):.3f}"
                        for c in cells
                    ]
                    lines.append(
                        f"| {task.name} | {kind} | {name} | " + " | ".join(shown) + " |"
                    )
    return "\n".join(lines) if len(lines) > 2 else ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chains", type=int, default=CHAINS, help="chains a run")
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=list(TASKS),
        default=list(TASKS),
        help="which experiments",
    )
    parser.add_argument(
        "--keep",
        type=Path,
        default=Path("out/paper_2d"),
        help="folder of finished rows",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=min(os.cpu_count() or 1, 2),
        help="tasks that run side by side",
    )
    parser.add_argument(
        "--run-only", action="store_true", help="keep finished rows, publish nothing"
    )
    options = parser.parse_args(arguments)
    tasks = [TASKS[name] for name in options.tasks]
    kept = Kept(options.keep, f"n{options.chains}")
    if options.jobs > 1 and len(tasks) > 1 and not options.run_only:
        run_beside(tasks, options.jobs, options)
    found = run(tasks, options.chains, kept)
    judged = [row for row, _ in found]
    if options.run_only:
        return 0
    table: list[list[str]] = []
    for task in tasks:
        table += [
            [f"**{task.title}**", *[""] * (len(COLUMNS) - 1)],
            exact_line(task, options.chains),
        ]
        table += [
            as_text(row)
            for row in judged
            if row.task == task.name and row.retraining == 0
        ]
    shown = {
        (r.task, r.sampler, r.levels): x
        for r, x in found
        if r.kind == "energy" and r.retraining == 0
    }
    rows_of = {
        (r.task, r.sampler, r.levels): r
        for r in judged
        if r.kind == "energy" and r.retraining == 0
    }
    RESULTS.mkdir(exist_ok=True)
    figure.draw(shown, rows_of, RESULTS / "paper_2d.png")
    notes = NOTES.format(
        chains=options.chains,
        points=HELD_OUT,
        budget=BUDGET,
        most=MOST,
        minutes=minutes(kept, tasks),
        jobs=options.jobs,
    )
    again = retrained(judged, tasks)
    if again:
        notes += f"\n\n## Over five retrainings (mean ± standard deviation)\n\n{again}"
    details = {
        "num_chains": options.chains,
        "rows": [dataclasses.asdict(row) for row in judged],
    }
    title = "The 2D experiments: learned energies and scores, composed"
    return publish(
        "paper_2d", title, COLUMNS, table, checks(judged, tasks), details, notes
    )


NOTES = f"""\
{{chains}} chains a row. All rows together, runs with exact factors included, took
{{minutes:.0f}} minutes of process time, in up to {{jobs}} processes side by side.

- Levels: every sampler visits all of them. `cosine` is the paper's 100 (σ = 0.025 at
  level 0), `even` is 60 levels even in log-SNR whose cleanest is far below the data's
  finest scale.
- (paper) marks the paper's step sizes and 10 transitions a level. The others make 3,
  with acceptance tuned to 0.574 (MALA) and 0.75 (HMC). SMC makes 1, after its reverse
  step and Feynman–Kac weights; that step is DDPM's, first order.
- Mean log p is that of the samples under the exact noise-free law, each sample's
  floored at −20 (hard edges).
- RAISE is the log-likelihood of {{points}} held-out exact draws under the chain that
  the sampler runs, by reverse annealed importance sampling with as many chains a point
  as {{budget:,}} evaluations pay (1 to {{most}}). It is a lower bound on average,
  looser the fewer chains; ± is its standard error over points.
- TV is of the modes' shares. MMD² is unbiased, so it can be negative; RBF kernel of
  bandwidth 0.2. W2 is against as many exact draws. The covariance error is relative,
  averaged over the modes with more than 2 % of the mass.
- Line integrals of the score: "n points" on the straight line between the ends, by the
  trapezoid rule unless Simpson's is named (as in SMC); "leapfrog": the trajectory's own
  points.
- Seconds leave out compilation.
- Sampler error: the nats of mean log p that the same run with exact noised factors
  lacks against exact draws, and its TV. Model error: the rest.
- The mixture asks for shares {WEIGHTS[0]} and {WEIGHTS[1]} of calibrated energies;
  score-only models have no mixtures.

![What each sampler makes of each task](paper_2d.png)"""


if __name__ == "__main__":
    sys.exit(main())
