"""CompLift's nine compositions in the plane: two empty ones, and seven to sample.

A run must name the empty ones, and sample the others as they are.

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
from composeprob.compiler.pipeline import lowered
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
"""Half the width of a square that holds every composed law."""

Judged = dict[str, list[tuple[float, float]]]


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of the nine compositions with one kind of factors.

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
    """Accuracy, and the Chamfer distance of the finite samples.

    A sample that is not finite counts as wrong.
    """
    assert scenario.right is not None
    assert scenario.draw is not None
    finite = np.isfinite(samples).all(1)
    right = scenario.right(samples[finite]).sum() / len(samples)
    draws = scenario.draw(np.random.default_rng((key, 0)), len(samples))
    distance = chamfer(samples[finite], draws) if finite.any() else float("nan")
    return float(right), distance


def asked(
    density: cp.AnnealedDensity, keys: int, n: int
) -> tuple[dict[str, Any], list[cp.Result]]:
    """Findings of `density.check` and default runs of a composition, and the runs."""
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
    """Findings of a composition, and its samples judged beside exact draws."""
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
    factor = scenario.factor(table.factors(restated.LEVELS))
    # A sum of scores has the same powers at every level; ours may let them grow.
    density = lowered(single, (factor,), {}, growing=False)
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
    """Mean ± standard deviation over keys; a mean of 100 or more in powers of ten."""
    mean = np.mean(values)
    spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
    return f"{mean:.4f} ± {spread:.4f}" if mean < 100 else f"{mean:.0e}"


def as_findings(codes: list[list[str]]) -> str:
    """The findings, and the number of keys with one."""
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
            as_findings(of["checked"]),
        ]
    )
    for row, values in of.get("rows", {OURS: []}).items():
        cells = ["–", "–"]
        if values:
            cells = [as_text(list(column)) for column in zip(*values, strict=True)]
        evaluations = restated.BASELINES.get(row, (None, None))[1]
        findings = "–"
        if row == OURS:
            evaluations = of["evaluations"]
            findings = as_findings(of["status"])
        cost = "–" if evaluations is None else f"{evaluations:,}"
        made.append([row, *cells, cost, findings])
    return made


def mean(of: dict[str, Any], row: str, column: int) -> float:
    """Mean of a column over keys; NaN becomes ∞."""
    average = np.mean([values[column] for values in of["rows"][row]])
    return float(np.nan_to_num(average, nan=np.inf))


def checks(table: Table, found: dict[str, dict[str, Any]]) -> dict[str, bool]:
    empty = {name: of for name, of in found.items() if NINE[name].empty}
    full = {name: of for name, of in found.items() if not NINE[name].empty}
    most_accurate = {}
    nearest = {}
    for name, of in full.items():
        most_accurate[name] = max(mean(of, row, 0) for row in table.baselines)
        nearest[name] = min(mean(of, row, 1) for row in table.baselines)
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
        f"cp.infer's accuracy is within {table.within} of exact draws' in all "
        "seven": all(
            abs(mean(of, OURS, 0) - mean(of, EXACT, 0)) <= table.within
            for of in full.values()
        ),
        "its Chamfer distance is within 10 % of theirs in all seven": all(
            abs(mean(of, OURS, 1) - mean(of, EXACT, 1)) <= 0.1 * mean(of, EXACT, 1)
            for of in full.values()
        ),
        f"no baseline is more than {table.within} more accurate in any of the "
        "seven": all(
            mean(of, OURS, 0) >= most_accurate[name] - table.within
            for name, of in full.items()
        ),
        "no baseline is nearer by more than 10 % in any of the seven": all(
            mean(of, OURS, 1) <= 1.1 * nearest[name] for name, of in full.items()
        ),
    }


NOTES = """\
8,000 samples a row, mean ± standard deviation over keys; evaluations are those of one
chain.

- Accuracy: within 3 standard deviations of a Gaussian's centre along each axis, 0.1 of
  an intersection or a circle, or inside of the boxes. The authors' code takes no
  absolute value at the circles, and counts everything inside of them; here the absolute
  value is taken.
- Chamfer distance: the mean distance to the nearest of 8,000 draws of the target, plus
  the mean distance from each of these to the nearest sample. A value that is not finite
  counts as wrong, and is left out of the distance.
- A divisor has the power 0.5, the authors' temperature, and is a box with a tenth of
  N(0, I) beside it. The composed law then keeps a little of what is taken away, so that
  its exact draws are not all inside of the target.
- The scores of mixtures are exact at every level, so that reverse diffusion is right,
  and the last of the authors' steps takes all noise away. cp.infer's samples have the
  noise of its level 0, σ = 0.004, which shows at edges and on curves.
- The baselines run on the authors' 50 levels from N(0, I) on. ULA and U-HMC leave the
  plane where σ is far below their steps: exact scores of sharp laws are steeper than
  learned ones. No published numbers are repeated here."""
LEARNED_NOTES = """\
2,000 samples a row, mean ± standard deviation over keys; evaluations are those of one
chain.

- Judges, baselines and divisors are those of the table of exact factors. Each law but
  the N(0, I) beside a divisor is a network of 128 by four layers, trained here. The
  distance of exact draws of the composed law from draws of the target is the networks'
  error; the distance of a sampler's row from these exact draws is the sampler's error.
- Networks that learn scores know from their noisier levels how mass is spread along a
  circle, or over separated parts. Their energy at level 0, from which exact draws are
  made, is off by nats there: that of the right circle has most of its mass on a quarter
  of it. A default run computes importance weights along the levels, from scores, and is
  nearer to the target. Where the two differ by more than chance, a check fails.
- Findings are all that a run reports. Where the empty product has no weights left, its
  chains continue independently, and `shares_frozen` is reported of them too.
- The other baselines are left out for time: ULA is MALA without its test, and the
  Hamiltonian ones take four times as many evaluations. No published numbers are
  repeated here."""

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
