"""Posteriors of many observations from scores of single ones.

They are two toys of known law, and SLCP with a learned network.

    python -m benchmarks tall-data [--cells TEXT …] [--methods NAME …] [--seeds 5]
    [--chains 1000] [--sets 1]

Cells are run one by one and kept in benchmarks/results/tall_data.json: what a cell has
of a method and a seed is not run again, so that the same command goes on where it was
stopped. `--cells "gaussian m=10 n=8" "slcp"` runs the cells whose names begin so,
`--again` those that are there as well, and `--table` only writes the tables anew.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from exact.case import Answer, Case
from report import CODE, RESULTS, STAMP, publish
from tall import exact as laws
from tall import instances, ours, rivals, slcp

import composeprob as cp
from composeprob.runtime.compiled import make_room

FILE = "tall_data"
PUBLISHED = json.loads((Path(__file__).parent / "tall" / "published.json").read_text())
COUNTS, ERRORS = (2, 4, 8, 16, 32, 64, 90), (0.0, 1e-3, 1e-2, 1e-1)
TOYS = {"gaussian": (2, 4, 8, 10, 16, 32), "mixture": (10,)}
SLCP_COUNTS = (1, 8, 14, 22, 30)
OURS, MOVED, FLOOR = "composeprob", "10 global moves", "floor"
METHODS = (OURS, *rivals.RIVALS)
SAMPLERS = {OURS: None, MOVED: cp.SMC(then=cp.GlobalMoves(10))}
"""Samplers of our own runs: the default, and for exact scores one with moves at level 0
that compare modes."""
NARROW = "gaussian m=32 n=4 eps=0"
"""The cell whose variances the notes tell."""
REPEATS = 5
"""Sets of exact draws that every set of draws is compared with."""
SETS = 16
"""Sets of draws, each of a key of its own, of composeprob and of the floor where scores
are exact, in each seed."""
RATIOS = {"mixture": 1.05, "gaussian": 1.05, "gaussian m=32": 1.15}
"""The most that the distance of our draws may be of the floor, where scores are exact;
the longest name counts."""

NOTES = """\
Toys: the mean over seeds of the max-sliced Wasserstein distance (p = 2, {projections}
directions) of {chains} draws from as many exact ones, itself a mean over {repeats} sets
of these; the floor is that of exact draws. With exact scores both are means over
several sets of draws of every instance, and ± is one standard error of the ratio over
these. The number after × in the column of seeds is that of the sets; without one it was
4 to 8. Composeprob's is its default run of as many chains as draws, 80 levels and
{evaluations} evaluations a chain; with 10 global moves
(`cp.SMC(then=cp.GlobalMoves(10))`), which compare modes by the exact energies, {moved}.

Instances are drawn by NumPy from the recipe of Linhart et al. (TMLR, arXiv 2404.07593),
whose own instances are PyTorch's. GAUSS, JAC, Langevin and reverse are restated from
the papers, with the settings that they print, and run here on the same instances, in
double precision. ε is the error of the individual scores, the same for all methods; the
composed score is then wrong by n·ε. At ε = 0 composeprob is given the energies of the
individual posteriors, otherwise their scores. Of the other methods, and of all methods
with wrong scores, there is one set of draws for each instance, of the same random
numbers at every n; of JAC on the Gaussians there are 4 or 8 at ε = 0, and 4 of it and
of composeprob in most cells with ε ≤ .01.

Where JAC is below the floor its law is too narrow: {widths}; a law that is slightly too
narrow is nearer to a set of exact draws than another such set is. The published columns
are means of the numbers in the authors' repository (JuliaLinhart/diffusions-for-sbi,
commit 2cf52ee8): other instances, a single set of exact draws, and for the mixture a
reference by MALA that is imprecise at n ≥ 64. For the mixture, exact draws are of the
law written out up to n = {enumerated}, and above that by Gibbs sampling of each
observation's component. SLCP: C2ST (0.5 for sets that cannot be told apart) of {chains}
draws by the zoo's `slcp-posterior` from NUTS on the true likelihood, mean over
seeds."""


def cells() -> dict[str, dict[str, Any]]:
    """Every cell by its name."""
    toys = {
        f"{toy} m={m} n={n} eps={error:g}": {"toy": toy, "m": m, "n": n, "eps": error}
        for toy, sizes in TOYS.items()
        for m in sizes
        for error in ERRORS
        for n in COUNTS
    }
    return toys | {f"slcp n={n}": {"toy": "slcp", "n": n} for n in SLCP_COUNTS}


GATE = (("gaussian", 4, 8), ("gaussian", 10, 8), ("mixture", 10, 8))
"""Toys of the gate, their dimensions and observations."""


def case(toy: str, m: int, n: int) -> Case:
    """Return a program of the gate: the mean of θ where scores are exact."""
    instance = instances.TOYS[toy](m, n, 0.0, 0)
    return Case(
        "tall data",
        f"{toy} m={m} n={n}",
        lambda: ours.density(toy, instance),
        lambda result: result.mean(lambda s: s["theta"]),
        lambda: Answer(tuple(laws.exact_mean(instance).tolist())),
    )


def cases() -> list[Case]:
    """The programs of the gate. SLCP is left out, as its answer is from NUTS, and so
    are wrong scores, which have no exact one."""
    return [case(*each) for each in GATE]


def kept() -> dict[str, dict[str, Any]]:
    """Cells in the file now."""
    file = RESULTS / f"{FILE}.json"
    if not file.exists():
        return {}
    return json.loads(file.read_text(encoding="utf-8"))["cells"]


def run_cell(name: str, cell: dict[str, Any], options: argparse.Namespace) -> None:
    """Run the missing methods of a cell, and keep each result."""
    for seed in range(options.seeds):
        wanted = [FLOOR, OURS]
        if cell["toy"] != "slcp":
            wanted = [FLOOR, *(m for m in options.methods if m != FLOOR)]
        found = kept().get(name, {}).get("methods", {})
        named = options.methods if options.again else []
        missing = [m for m in wanted if m in named or str(seed) not in found.get(m, {})]
        if not missing:
            continue
        if cell["toy"] == "slcp":
            measure = _slcp(cell, seed, options)
        else:
            measure = _toy(cell, seed, options)
        for method in missing:
            started = time.monotonic()
            values, status, more = measure(method)
            value = float(np.mean(values))
            row = {
                "value": round(value, 5),
                "seconds": round(time.monotonic() - started, 1),
                "status": status,
                **more,
            }
            if len(values) > 1:
                row |= {
                    "error": round(
                        float(np.std(values, ddof=1)) / np.sqrt(len(values)), 5
                    ),
                    "sets": len(values),
                }
            _keep(name, cell, method, seed, row)
            print(
                f"{name} seed {seed}: {method} {value:.4f} {status} {row['seconds']} s",
                flush=True,
            )


def _keep(
    name: str, cell: dict[str, Any], method: str, seed: int, row: dict[str, Any]
) -> None:
    all_cells = kept()
    own = all_cells.setdefault(name, {**cell, "methods": {}})
    own["methods"].setdefault(method, {})[str(seed)] = row
    own[STAMP] = CODE.stamp()
    (RESULTS / f"{FILE}.json").write_text(
        json.dumps({"cells": all_cells}, indent=1) + "\n", encoding="utf-8"
    )


Measure = Callable[[str], tuple[list[float], str, dict[str, float]]]
"""Function of a method: a distance for each set of draws, the status of the run, and
other numbers."""


def _toy(cell: dict[str, Any], seed: int, options: argparse.Namespace) -> Measure:
    instance = instances.TOYS[cell["toy"]](cell["m"], cell["n"], cell["eps"], seed)
    rng = np.random.default_rng([seed, 7])
    count = options.chains
    references = [laws.exact_draws(instance, rng, count) for _ in range(REPEATS)]

    def far(draws: np.ndarray) -> float:
        return float(
            np.mean(
                [
                    laws.max_sliced(draws, r, options.projections, i)
                    for i, r in enumerate(references)
                ]
            )
        )

    sets = SETS if instance.error == 0 else options.sets

    def drawn(method: str) -> list[tuple[np.ndarray, str, int]]:
        if method == FLOOR:
            return [
                (laws.exact_draws(instance, rng, count), "", 0) for _ in range(sets)
            ]
        if method in SAMPLERS:
            return [
                ours.draw(
                    cell["toy"], instance, SETS * seed + i, count, SAMPLERS[method]
                )
                for i in range(sets)
            ]
        return [
            (rivals.draw(method, instance, seed + 1000 * i, count), "", 0)
            for i in range(options.sets)
        ]

    def measure(method: str) -> tuple[list[float], str, dict[str, float]]:
        each = drawn(method)
        draws, statuses, evaluations = zip(*each, strict=True)
        more: dict[str, float] = (
            {"evaluations": max(evaluations)} if max(evaluations) else {}
        )
        if cell["toy"] == "gaussian" and instance.error == 0:
            more["variance"] = round(
                float(np.mean([laws.whitened_variance(instance, d) for d in draws])), 4
            )
        return [far(d) for d in draws], ", ".join(sorted(set(statuses))), more

    return measure


def _slcp(cell: dict[str, Any], seed: int, options: argparse.Namespace) -> Measure:
    xs = slcp.data(seed, cell["n"])
    known = slcp.reference(xs, seed, options.chains)

    def measure(method: str) -> tuple[list[float], str, dict[str, float]]:
        if method == FLOOR:
            return (
                [slcp.c2st(known, slcp.reference(xs, seed + 1000, options.chains))],
                "",
                {},
            )
        draws, status = slcp.draw(xs, seed, options.chains)
        return [slcp.c2st(known, draws)], status, {}

    return measure


def mean_of(cell: dict[str, Any], method: str) -> float | None:
    """The mean over seeds; None where the method was not run."""
    rows = cell["methods"].get(method)
    return float(np.mean([row["value"] for row in rows.values()])) if rows else None


def widths(cell: dict[str, Any]) -> str:
    """Variances of draws in a cell, as text."""
    known = {
        name: [r["variance"] for r in rows.values() if "variance" in r]
        for name, rows in cell["methods"].items()
    }
    each = ", ".join(
        f"{np.mean(values):.3f} of {name}" for name, values in known.items() if values
    )
    return (
        "in coordinates in which the exact law has variance 1, that of the draws at "
        f"{NARROW} is {each}"
    )


def evaluations_of(found: dict[str, dict[str, Any]], method: str) -> str:
    """Evaluations of a chain of the toys, as the runs report them."""
    rows = (
        row
        for cell in found.values()
        for row in cell["methods"].get(method, {}).values()
    )
    return " or ".join(
        map(str, sorted({row["evaluations"] for row in rows if "evaluations" in row}))
    )


def shown(value: float | None) -> str:
    if value is None:
        return ""
    return "NaN" if np.isnan(value) else f"{value:.3f}"


def error_of_ratio(cell: dict[str, Any], method: str = OURS) -> float:
    """± of ours/floor, from the spread of sets of draws of one instance.

    It is NaN for one set of each.
    """
    rows = [cell["methods"][each].values() for each in (FLOOR, method)]
    if any("error" not in row for each in rows for row in each):
        return float("nan")
    floor, mine = (mean_of(cell, each) for each in (FLOOR, method))
    below, above = (
        np.linalg.norm([row["error"] for row in each]) / len(each) for each in rows
    )
    return float(mine / floor * np.hypot(below / floor, above / mine))


def ratio(cell: dict[str, Any], method: str = OURS) -> float:
    """Ours over the floor; NaN where one of them was not run."""
    floor, mine = (mean_of(cell, each) for each in (FLOOR, method))
    return float("nan") if not floor or mine is None else mine / floor


def shown_ratio(cell: dict[str, Any], method: str = OURS) -> str:
    """`ratio` with its ±."""
    if np.isnan(found := ratio(cell, method)):
        return ""
    error = error_of_ratio(cell, method)
    return f"{found:.2f}" + ("" if np.isnan(error) else f" ± {error:.2f}")


def limit_of(name: str) -> float:
    """The most that ours/floor may be in a cell of exact scores."""
    return RATIOS[
        max((start for start in RATIOS if name.startswith(f"{start} ")), key=len)
    ]


def row_of(name: str, cell: dict[str, Any]) -> list[str]:
    """A line of the table."""
    means = [mean_of(cell, method) for method in METHODS]
    published = PUBLISHED.get(name, {})
    printed = [
        shown(published.get(method)) for method in ("GAUSS", "JAC", "Langevin", "floor")
    ]
    seeds = str(max(len(rows) for rows in cell["methods"].values()))
    sets = {row.get("sets") for row in cell["methods"].get(OURS, {}).values()} - {None}
    seeds += f" × {min(sets)}" if sets else ""
    mine = [shown(means[0]), shown_ratio(cell), shown_ratio(cell, MOVED)]
    published_ones = " / ".join(printed).strip(" /")
    return [
        name,
        shown(mean_of(cell, FLOOR)),
        *mine,
        *map(shown, means[1:]),
        seeds,
        published_ones,
    ]


def checks_of(found: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """Checks of the cells that were run."""
    toys = {
        name: cell
        for name, cell in found.items()
        if cell["toy"] != "slcp" and mean_of(cell, OURS) is not None
    }
    exact_ones = {name: cell for name, cell in toys.items() if cell["eps"] == 0}
    ratios = {name: ratio(cell) for name, cell in exact_ones.items()}
    compared = {
        name: cell
        for name, cell in toys.items()
        if all(mean_of(cell, m) is not None for m in METHODS)
    }
    behind = {
        name: behind_by(cell, found.get(clean_name(name), cell))
        for name, cell in compared.items()
    }
    checks = {
        "no draw of composeprob is NaN": not any(
            np.isnan(mean_of(cell, OURS)) for cell in toys.values()
        )
    }  # type: ignore[arg-type]
    if ratios:
        over = [
            name for name, found_ratio in ratios.items() if found_ratio > limit_of(name)
        ]
        worst = max(ratios, key=lambda name: ratios[name] / limit_of(name))
        text = "at most 1.05 × the floor where scores are exact, 1.15 for 32 dimensions"
        checks[
            f"{text}: {len(ratios) - len(over)} of {len(ratios)} (worst: "
            f"{ratios[worst]:.2f}, {worst})"
        ] = not over
        errors = {name: error_of_ratio(exact_ones[name]) for name in over}
        beyond = [
            name
            for name in over
            if not ratios[name] - 2 * errors[name] <= limit_of(name)
        ]
        checks[
            "beyond it by no more than two standard errors: "
            f"{len(ratios) - len(beyond)} of {len(ratios)}"
        ] = not beyond
        left = [
            name
            for name in over
            if not ratio(exact_ones[name], MOVED) <= limit_of(name)
        ]
        if over:
            text = (
                f"with 10 global moves, {evaluations_of(found, MOVED)} evaluations, "
                "where the default is not enough"
            )
            checks[f"{text}: {len(over) - len(left)} of {len(over)}"] = not left
    clean = [error for name, (_, error) in behind.items() if compared[name]["eps"] == 0]
    wrong = [each for name, each in behind.items() if compared[name]["eps"] > 0]
    if clean:
        fine = sum(error <= 2 for error in clean)
        text = (
            "no other method is nearer by over two standard errors, in each cell of "
            "exact scores"
        )
        checks[f"{text} ({fine} of {len(clean)})"] = fine == len(clean)
    if wrong:
        nearest, fine = (
            sum(by <= 0 for by, _ in wrong),
            sum(error <= 2 for _, error in wrong),
        )
        checks[
            "the nearest of all in three quarters of the cells of wrong scores "
            f"({nearest} of {len(wrong)})"
        ] = nearest >= 0.75 * len(wrong)
        text = "no other is nearer there by over two standard errors, in three quarters"
        checks[f"{text} ({fine} of {len(wrong)})"] = fine >= 0.75 * len(wrong)
    return checks


def clean_name(name: str) -> str:
    """The cell of the same problems with exact scores."""
    return f"{name.rsplit('eps=', 1)[0]}eps=0"


def behind_by(cell: dict[str, Any], clean: dict[str, Any]) -> tuple[float, float]:
    """Excess of our distance over the nearest other method's, over the seeds that both
    have.

    It is given as a distance and, as the greatest over all others, in standard errors;
    it is infinite if ours is NaN.

    How much one set of draws differs from the next is known from the floor's sets where
    scores are exact (``clean``), whose problems are the same.
    """
    mine, floors = cell["methods"][OURS], clean["methods"][FLOOR]
    found = []
    for method in rivals.RIVALS:
        theirs = cell["methods"][method]
        seeds = sorted(mine.keys() & theirs.keys() & floors.keys())
        one = {
            seed: floors[seed].get("error", 0.0) * np.sqrt(floors[seed].get("sets", 4))
            for seed in seeds
        }

        def error_of(
            row: dict[str, Any], seed: str, one: dict[str, float] = one
        ) -> float:
            return float(row.get("error", one[seed] / np.sqrt(row.get("sets", 1))))

        by = float(
            np.mean([mine[seed]["value"] - theirs[seed]["value"] for seed in seeds])
        )
        errors = [
            np.hypot(error_of(mine[seed], seed), error_of(theirs[seed], seed))
            for seed in seeds
        ]
        if any(np.isnan(mine[seed]["value"]) for seed in seeds):
            by = np.inf
        elif np.isnan(by):
            by = -np.inf
        found.append((by, by / max(float(np.linalg.norm(errors)) / len(seeds), 1e-12)))
    return max(by for by, _ in found), max(error for _, error in found)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cells", nargs="+", default=[""], help="run the cells whose names begin so"
    )
    parser.add_argument(
        "--methods", nargs="+", default=list(METHODS), choices=(*METHODS, MOVED, FLOOR)
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--chains", type=int, default=1000)
    parser.add_argument("--projections", type=int, default=3000)
    parser.add_argument(
        "--sets",
        type=int,
        default=1,
        help="sets of draws of the others; where scores are wrong, of all",
    )
    parser.add_argument(
        "--again",
        action="store_true",
        help="run also what is there of the methods that are named",
    )
    parser.add_argument(
        "--table", action="store_true", help="run nothing, write the tables"
    )
    options = parser.parse_args()
    every = cells()
    if not options.table:
        for name, cell in every.items():
            if any(
                text in ("", name) or name.startswith(f"{text} ")
                for text in options.cells
            ):
                run_cell(name, cell, options)
                # The rivals compile outside of `cp.infer`, which frees memory itself.
                make_room()
    found = {name: cell for name in every if (cell := kept().get(name))}
    columns = [
        "cell",
        "floor",
        "ours",
        "ours/floor",
        "the same with 10 global moves",
        *rivals.RIVALS,
        "seeds",
        "published: GAUSS / JAC / Langevin / floor",
    ]
    narrow = widths(found[NARROW]) if NARROW in found else ""
    notes = NOTES.format(
        projections=options.projections,
        chains=options.chains,
        repeats=REPEATS,
        enumerated=laws.ENUMERATED,
        evaluations=evaluations_of(found, OURS),
        moved=evaluations_of(found, MOVED),
        widths=narrow,
    )
    rows = [row_of(name, cell) for name, cell in found.items()]
    title_text = "Posteriors of many observations"
    return publish(
        FILE, title_text, columns, rows, checks_of(found), {"cells": found}, notes
    )


if __name__ == "__main__":
    sys.exit(main())
