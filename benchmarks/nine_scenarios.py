"""CompLift's nine compositions in the plane: the two empty ones are named, the seven
others sampled as they are.

    python -m benchmarks nine-scenarios [--learned] [--keys 3]

Every composition has exact noised factors (`plane/nine.py`), so that what is missed is
the sampler's error; with ``--learned`` it has energies that were learned
(`plane/learned.py`), a minute or two of training each. Beside a default run stand exact
draws of the composed law at its level 0, which are what a perfect sampler would give,
draws of the target, and the baselines of Yu and Gao 2025 at their settings
(`plane/restated.py`) with the same factors. Judged as there: the share of samples
inside of the target, and the Chamfer distance of the samples from as many draws of it.
Finished parts are kept in out/, so that the same command goes on where it was stopped.
``--keys N`` writes no results.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from plane import restated
from plane.learned import learned
from plane.nine import NINE, Named, Scenario, chamfer, exact, single
from plane.truth import truth_of
from report import kept, publish

import composeprob as cp
from composeprob.density.overlap import check_evaluations

KEYS = 3
LEVELS = cp.Schedule.log_snr(60)
"""As the library has them: down to σ = 0.004. The baselines' level 0 has 0.01, which
the last reverse step removes."""
OURS, EXACT, FLOOR = (
    "cp.infer",
    "exact draws of the composed law",
    "draws of the target",
)
AGREE = {"no_overlap", "out_of_training"}
HALF_WIDTH = 1.6
"""Of the square that holds every composed law."""

Judged = dict[str, list[tuple[float, float]]]


@dataclasses.dataclass(frozen=True)
class Table:
    """What factors a table is of.

    Attributes:
        name: of its files.
        title: of its head.
        factors: the factors of each law on a schedule.
        n: samples of each row.
        points: of the grid, along each axis, on which the composed law is known: as
            fine as level 0's noise.
        within: by how much accuracies may differ by chance.
        baselines: the rows of `restated.BASELINES`.
        notes: what a reader must know.
    """

    name: str
    title: str
    factors: Callable[[cp.Schedule], Named]
    n: int
    points: int
    within: float
    baselines: tuple[str, ...]
    notes: str


def judged(scenario: Scenario, samples: np.ndarray, key: int) -> tuple[float, float]:
    """Accuracy, for which what is not finite is wrong, and the Chamfer distance of what
    is finite."""
    assert scenario.right is not None
    assert scenario.draw is not None
    finite = np.isfinite(samples).all(1)
    right = scenario.right(samples[finite]).sum() / len(samples)
    draws = scenario.draw(np.random.default_rng((key, 0)), len(samples))
    return float(right), chamfer(samples[finite], draws) if finite.any() else float(
        "nan"
    )


def asked(
    density: cp.AnnealedDensity, keys: int, n: int
) -> tuple[dict[str, Any], list[cp.Result]]:
    """What `density.check` and default runs say of a composition, and the runs."""
    checked = [
        sorted({f.code for f in density.check(jax.random.key(k))}) for k in range(keys)
    ]
    results = [
        cp.infer(density, jax.random.key(k), num_chains=n, progress=False)
        for k in range(keys)
    ]
    codes = [
        sorted(str(code) for code, _ in result.status.findings) for result in results
    ]
    share = check_evaluations(density) / (n * results[0].evaluations)
    return {
        "checked": checked,
        "status": codes,
        "share": share,
        "evaluations": results[0].evaluations,
    }, results


def ours(table: Table, name: str, keys: int) -> dict[str, Any]:
    """What is said of a composition and how good its samples are, beside exact draws of
    its law."""
    scenario = NINE[name]
    density = cp.compile(single, scenario.factor(table.factors(LEVELS)))
    found, results = asked(density, keys, table.n)
    if not scenario.empty:
        law = truth_of(density, HALF_WIDTH, np.zeros((1, 2)), table.points)
        found["rows"] = {
            EXACT: [
                judged(scenario, law.draw(jax.random.key(k), table.n), k)
                for k in range(keys)
            ],
            OURS: [
                judged(scenario, np.asarray(result["x"], np.float64), k)
                for k, result in enumerate(results)
            ],
        }
    jax.clear_caches()
    return found


def theirs(table: Table, name: str, keys: int) -> Judged:
    """Draws of a composition's target, and the baselines."""
    scenario = NINE[name]
    n = table.n
    assert scenario.draw is not None
    density = cp.compile(single, scenario.factor(table.factors(restated.LEVELS)))
    rows: Judged = {
        FLOOR: [
            judged(scenario, scenario.draw(np.random.default_rng((k, 1)), n), k)
            for k in range(keys)
        ]
    }
    for row in table.baselines:
        samples = (
            restated.run(row, density, jax.random.key(k), n) for k in range(keys)
        )
        rows[row] = [judged(scenario, x, k) for k, x in enumerate(samples)]
    jax.clear_caches()
    return rows


def as_text(values: list[float]) -> str:
    """Mean ± standard deviation over keys; of what left the square by far, its size."""
    mean = np.mean(values)
    spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
    return f"{mean:.4f} ± {spread:.4f}" if mean < 100 else f"{mean:.0e}"


def told(codes: list[list[str]]) -> str:
    """The findings, and under how many keys there were any."""
    named = sorted({code for each in codes for code in each})
    return f"{', '.join(named) or 'none'} ({sum(map(bool, codes))} of {len(codes)})"


def lines(name: str, of: dict[str, Any]) -> list[list[str]]:
    """The rows of one composition."""
    made = [[f"**{name}**", "", "", "", ""]]
    made.append(
        [
            "density.check",
            "–",
            "–",
            f"{of['share']:.2%} of a run's",
            told(of["checked"]),
        ]
    )
    for row, values in of.get("rows", {OURS: []}).items():
        accuracy, distance = zip(*values, strict=True) if values else ([], [])
        evaluations = (
            of["evaluations"]
            if row == OURS
            else restated.BASELINES.get(row, (None, None))[1]
        )
        cells = [
            as_text(list(column)) if column else "–" for column in (accuracy, distance)
        ]
        cost = "–" if evaluations is None else f"{evaluations:,}"
        made.append([row, *cells, cost, told(of["status"]) if row == OURS else "–"])
    return made


def mean(of: dict[str, Any], row: str, column: int) -> float:
    return float(
        np.nan_to_num(
            np.mean([values[column] for values in of["rows"][row]]), nan=np.inf
        )
    )


def checks(table: Table, found: dict[str, dict[str, Any]]) -> dict[str, bool]:
    empty = {name: of for name, of in found.items() if NINE[name].empty}
    full = {name: of for name, of in found.items() if not NINE[name].empty}
    best = {
        name: [max(mean(of, row, 0) for row in table.baselines)]
        for name, of in full.items()
    }
    for name, of in full.items():
        best[name].append(min(mean(of, row, 1) for row in table.baselines))
    both = ("checked", "status")
    others = [codes for of in full.values() for how in both for codes in of[how]]
    return {
        "both empty compositions are named by density.check and in the status of the "
        "run, under every key": all(
            AGREE.intersection(codes)
            for of in empty.values()
            for how in both
            for codes in of[how]
        ),
        "of the seven others none is, by either": not any(others),
        "density.check takes at most 5 % of a run's evaluations": all(
            of["share"] <= 0.05 for of in found.values()
        ),
        f"cp.infer's accuracy is within {table.within} of exact draws' in all seven": all(
            abs(mean(of, OURS, 0) - mean(of, EXACT, 0)) <= table.within
            for of in full.values()
        ),
        "its Chamfer distance is within 10 % of theirs in all seven": all(
            abs(mean(of, OURS, 1) - mean(of, EXACT, 1)) <= 0.1 * mean(of, EXACT, 1)
            for of in full.values()
        ),
        f"no baseline is more than {table.within} more accurate in any of the seven": all(
            mean(of, OURS, 0) >= best[name][0] - table.within
            for name, of in full.items()
        ),
        "no baseline is nearer by more than 10 % in any of the seven": all(
            mean(of, OURS, 1) <= 1.1 * best[name][1] for name, of in full.items()
        ),
    }


NOTES = """8,000 samples a row, mean ± standard deviation over keys; evaluations are those of one chain.

- Accuracy: within 3 standard deviations of a Gaussian's centre along each axis, 0.1 of an intersection or a circle, or
  inside of the boxes. Their code takes no absolute value at the circles, and counts all that lies within: here it does.
- Chamfer distance: the mean distance to the nearest of 8,000 draws of the target, and from each of these to the nearest
  sample, added. What is not finite counts as wrong, and is left out of the distance.
- What divides has the power 0.5, their temperature, and is a box with a tenth of N(0, I) beside it: the composed law
  then keeps a little of what is taken away, and its exact draws are not all inside of the target.
- Of mixtures the scores are exact at every level, so that reverse diffusion is right, and the last of their steps takes
  all noise away; cp.infer's samples have that of its level 0, σ = 0.004, which shows at edges and on curves.
- The baselines run on their 50 levels from N(0, I) on. ULA and U-HMC leave the plane where σ is far below their steps:
  exact scores of sharp laws are steeper than those that a network has learned. No published number is repeated here."""
LEARNED_NOTES = """2,000 samples a row, mean ± standard deviation over keys; evaluations are those of one chain.

- Judges, baselines and what divides are those of the table of exact factors; each law but the N(0, I) that stands
  beside a divisor is a network of 128 by four layers, trained here. Against draws of the target, exact draws of the
  composed law show the error of the networks, and what a sampler's row differs from these is the sampler's.
- Networks that learn scores know how mass is spread along a circle, or over parts that lie apart, by their noisier
  levels; their energy at level 0, of which exact draws are, is off by nats there: that of the right circle has most of
  its mass on a fourth of it. A default run weighs chains along the levels, from scores, and is nearer to the target:
  where the two differ by more than chance, a check fails.
- Findings are all that a run says of itself: where nothing is left to weigh, the empty product's chains go on one by
  one, and `shares_frozen` is said of them too.
- The other baselines are left out for time: ULA is MALA without its test, and the Hamiltonian ones take four times as
  many evaluations. No published number is repeated here."""

EXACT_TABLE = Table(
    name="nine_scenarios",
    title="CompLift's nine compositions in the plane, exact factors",
    factors=exact,
    n=8000,
    points=1500,
    within=0.01,
    baselines=tuple(restated.BASELINES),
    notes=NOTES,
)
LEARNED_TABLE = Table(
    name="nine_scenarios_learned",
    title="CompLift's nine compositions in the plane, learned factors",
    factors=learned,
    n=2000,
    points=800,
    within=0.02,
    baselines=("Summed scores, reverse diffusion", "MALA 0.001, 10 a level"),
    notes=LEARNED_NOTES,
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--learned",
        action="store_true",
        help="factors that are learned, a minute each, in out/",
    )
    parser.add_argument(
        "--keys", type=int, help="keys of each row; the numbers are not written"
    )
    options = parser.parse_args(arguments)
    keys = options.keys or KEYS
    table = LEARNED_TABLE if options.learned else EXACT_TABLE
    part = partial(kept, f"{table.name}-{keys}")
    found = {name: part(name, partial(ours, table, name, keys)) for name in NINE}
    for name, of in found.items():
        if not NINE[name].empty:
            of["rows"] |= part(f"{name} baselines", partial(theirs, table, name, keys))
    rows = [
        row
        for name, of in found.items()
        for row in lines(f"{name}: {NINE[name].says}", of)
    ]
    columns = ["sampler", "accuracy", "Chamfer distance", "evaluations", "findings"]
    holds = checks(table, found)
    write = options.keys is None
    return publish(
        table.name,
        table.title,
        columns,
        rows,
        holds,
        {"nine": found},
        table.notes,
        write,
    )


if __name__ == "__main__":
    sys.exit(main())
