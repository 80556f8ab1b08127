"""CompLift's nine compositions in the plane: the two empty ones are named, the seven others sampled as they are.

    composeprob bench nine-scenarios [--keys 3]

Every composition has exact noised factors (`plane/nine.py`), so that what is missed is the sampler's error. Beside a
default run stand exact draws of the composed law at its level 0, which are what a perfect sampler would give, draws of
the target, and the baselines of Yu and Gao 2025 at their settings (`plane/restated.py`). Judged as there: the share of
samples inside of the target, and the Chamfer distance of 8,000 samples from 8,000 draws of it. Finished parts are kept
in out/, so that the same command goes on where it was stopped. ``--keys N`` writes no results.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

import jax
import numpy as np
from plane import restated
from plane.nine import NINE, Scenario, chamfer, single
from plane.truth import truth_of
from report import kept, publish

import composeprob as cp
from composeprob.density.overlap import check_evaluations

KEYS, N = 3, 8000
LEVELS = cp.Schedule.log_snr(60)
"""As the library has them: down to σ = 0.004. The baselines' level 0 has 0.01, which the last reverse step removes."""
OURS, EXACT, FLOOR = "cp.infer", "exact draws of the composed law", "draws of the target"
HALF_WIDTH = 1.6
"""Of the square that holds every composed law."""

Judged = dict[str, list[tuple[float, float]]]


def judged(scenario: Scenario, samples: np.ndarray, key: int) -> tuple[float, float]:
    """Accuracy, for which what is not finite is wrong, and the Chamfer distance of what is finite."""
    assert scenario.right is not None
    assert scenario.draw is not None
    finite = np.isfinite(samples).all(1)
    right = scenario.right(samples[finite]).sum() / len(samples)
    draws = scenario.draw(np.random.default_rng((key, 0)), N)
    return float(right), chamfer(samples[finite], draws) if finite.any() else float("nan")


def ours(name: str, keys: int) -> dict[str, Any]:
    """What `density.check` and default runs say of a composition, beside exact draws of its law."""
    scenario = NINE[name]
    density = cp.compile(single, scenario.factor(LEVELS))
    checked = [sorted({f.code for f in density.check(jax.random.key(k))}) for k in range(keys)]
    results = [cp.infer(density, jax.random.key(k), num_chains=N, progress=False) for k in range(keys)]
    codes = [sorted(str(code) for code, _ in result.status.findings) for result in results]
    share = check_evaluations(density) / (N * results[0].evaluations)
    found = {"checked": checked, "status": codes, "share": share, "evaluations": results[0].evaluations}
    if not scenario.empty:
        law = truth_of(density, HALF_WIDTH, np.zeros((1, 2)))
        found["rows"] = {
            EXACT: [judged(scenario, law.draw(jax.random.key(k), N), k) for k in range(keys)],
            OURS: [judged(scenario, np.asarray(result["x"], np.float64), k) for k, result in enumerate(results)],
        }
    jax.clear_caches()
    return found


def theirs(name: str, keys: int) -> Judged:
    """Draws of a composition's target, and the baselines."""
    scenario = NINE[name]
    if scenario.draw is None:
        return {}
    density = cp.compile(single, scenario.factor(restated.LEVELS))
    rows: Judged = {FLOOR: [judged(scenario, scenario.draw(np.random.default_rng((k, 1)), N), k) for k in range(keys)]}
    for row in restated.BASELINES:
        samples = (restated.run(row, density, jax.random.key(k), N) for k in range(keys))
        rows[row] = [judged(scenario, x, k) for k, x in enumerate(samples)]
    jax.clear_caches()
    return rows


def composition(name: str, keys: int) -> dict[str, Any]:
    """All of it."""
    found = kept(f"nine-{keys}", name, partial(ours, name, keys))
    rows = kept(f"nine-{keys}", f"{name} baselines", partial(theirs, name, keys))
    return found | ({"rows": found["rows"] | rows} if rows else {})


def as_text(values: list[float]) -> str:
    """Mean ± standard deviation over keys; of what left the square by far, its size."""
    mean, spread = np.mean(values), np.std(values, ddof=1) if len(values) > 1 else 0.0
    return f"{mean:.4f} ± {spread:.4f}" if mean < 100 else f"{mean:.0e}"


def told(codes: list[list[str]]) -> str:
    """The findings, and under how many keys there were any."""
    named = sorted({code for each in codes for code in each})
    return f"{', '.join(named) or 'none'} ({sum(map(bool, codes))} of {len(codes)})"


def table(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    lines = []
    for name, of in found.items():
        lines.append([f"**{name}: {NINE[name].says}**", "", "", "", ""])
        lines.append(["density.check", "–", "–", f"{check_cost(of)} of a run's", told(of["checked"])])
        rows = of.get("rows", {OURS: []})
        for row, values in rows.items():
            accuracy, distance = zip(*values, strict=True) if values else ([], [])
            evaluations = of["evaluations"] if row == OURS else restated.BASELINES.get(row, (None, None))[1]
            cells = [as_text(list(column)) if column else "–" for column in (accuracy, distance)]
            cost = "–" if evaluations is None else f"{evaluations:,}"
            lines.append([row, *cells, cost, told(of["status"]) if row == OURS else "–"])
    return lines


def check_cost(of: dict[str, Any]) -> str:
    return f"{of['share']:.2%}"


def checks(found: dict[str, dict[str, Any]]) -> dict[str, bool]:
    empty = {name: of for name, of in found.items() if NINE[name].empty}
    full = {name: of for name, of in found.items() if not NINE[name].empty}

    def mean(of: dict[str, Any], row: str, column: int) -> float:
        return float(np.nan_to_num(np.mean([values[column] for values in of["rows"][row]]), nan=np.inf))

    best = {name: [max(mean(of, row, 0) for row in restated.BASELINES)] for name, of in full.items()}
    for name, of in full.items():
        best[name].append(min(mean(of, row, 1) for row in restated.BASELINES))
    named = all("no_overlap" in codes for of in empty.values() for how in ("checked", "status") for codes in of[how])
    return {
        "both empty compositions are named by density.check and in the status of the run, under every key": named,
        "of the seven others none is, by either": not any(
            codes for of in full.values() for how in ("checked", "status") for codes in of[how]
        ),
        "density.check takes at most 5 % of a run's evaluations": all(of["share"] <= 0.05 for of in found.values()),
        "cp.infer's accuracy is within 0.01 of exact draws' in all seven": all(
            abs(mean(of, OURS, 0) - mean(of, EXACT, 0)) <= 0.01 for of in full.values()
        ),
        "its Chamfer distance is within 10 % of theirs in all seven": all(
            abs(mean(of, OURS, 1) - mean(of, EXACT, 1)) <= 0.1 * mean(of, EXACT, 1) for of in full.values()
        ),
        "no baseline is more than 0.01 more accurate in any of the seven": all(
            mean(of, OURS, 0) >= best[name][0] - 0.01 for name, of in full.items()
        ),
        "no baseline is nearer by more than 10 % in any of the seven": all(
            mean(of, OURS, 1) <= 1.1 * best[name][1] for name, of in full.items()
        ),
    }


NOTES = f"""{N} samples a row, mean ± standard deviation over keys; evaluations are those of one chain.

- Accuracy: within 3 standard deviations of a Gaussian's centre along each axis, 0.1 of an intersection or a circle, or
  inside of the boxes. Their code takes no absolute value at the circles, and counts all that lies within: here it does.
- Chamfer distance: the mean distance to the nearest of {N} draws of the target, and from each of these to the nearest
  sample, added. What is not finite counts as wrong, and is left out of the distance.
- What divides has the power 0.5, their temperature, and is a box with a tenth of N(0, I) beside it: the composed law
  then keeps a little of what is taken away, and its exact draws are not all inside of the target.
- Of mixtures the scores are exact at every level, so that reverse diffusion is right, and the last of their steps takes
  all noise away; cp.infer's samples have that of its level 0, σ = 0.004, which shows at edges and on curves.
- The baselines run on their 50 levels from N(0, I) on. ULA and U-HMC leave the plane where σ is far below their steps:
  exact scores of sharp laws are steeper than those that a network has learned. No published number is repeated here."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--keys", type=int, help="keys of each row; the numbers are not written")
    asked = parser.parse_args(arguments)
    keys = asked.keys or KEYS
    found = {name: composition(name, keys) for name in NINE}
    columns = ["sampler", "accuracy", "Chamfer distance", "evaluations", "findings"]
    title = "CompLift's nine compositions in the plane, exact factors"
    return publish(
        "nine_scenarios", title, columns, table(found), checks(found), {"nine": found}, NOTES, asked.keys is None
    )


if __name__ == "__main__":
    sys.exit(main())
