"""Effect of matrix products in bfloat16 on acceptance, shares of modes and evidence.

    python -m benchmarks precision
    python -m benchmarks precision --tables energies
    python -m benchmarks precision --tables defaults

The same program, step sizes and keys with networks as they are (float32) and with
`precision="bfloat16"`. Exits with 1 if the mean acceptance over the levels falls by
more than 0.05, or if the shares of the modes or the evidence get worse by more than
0.02 and the noise of the keys. The table of default runs shows statuses too, and what
rounding does to a UNet of a diffusers folder, whose weights are random.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from plane.tasks import TASKS, truth
from report import publish

import composeprob as cp
from composeprob.metrics.distances import mode_weights, total_variation

WAYS = {"float32": None, "bfloat16": "bfloat16"}
ACCEPTANCE, LIMIT = 0.05, 0.02
"""Limits of rounding: the loss of mean acceptance, and the change of total variation
and of log Z."""
TASK = "product"
EVIDENCE = "SMC, MALA"
SAMPLERS: dict[str, Callable[[float], Any]] = {
    "MALA": lambda scale: cp.AnnealedMCMC(
        cp.MALA(lambda s: 0.3 * scale**2 * s.sigma**2), 4
    ),
    "HMC(3)": lambda scale: cp.AnnealedMCMC(
        cp.HMC(lambda s: 0.6 * scale * s.sigma, num_leapfrog=3), 1
    ),
    EVIDENCE: lambda scale: cp.SMC(cp.MALA(lambda s: 0.3 * scale**2 * s.sigma**2), 1),
}


@cp.program
def alone(factor: Any) -> Any:
    return cp.sample("x", factor)


@dataclasses.dataclass(frozen=True)
class Case:
    """A density, and how many chains visit it.

    Attributes:
        compile: in a precision.
        chains: N.
        scale: of the steps.
        centres: of its modes, where the exact law is known.
    """

    compile: Callable[[str | None], Any]
    chains: int
    scale: float
    centres: np.ndarray | None = None


def plane(precision: str | None) -> Any:
    """Ring × bar, MLP energies −½‖s‖²/σ."""
    task = TASKS[TASK]
    return cp.compile(task.program, *task.factors("energy"), precision=precision)


def digits(precision: str | None) -> Any:
    """Threes of 8×8 pixels by classifier-free guidance, an MLP energy −½‖x − s‖²/σ."""
    return cp.compile(
        alone, cp.guide(cp.load("digits"), 2.0, label=3), precision=precision
    )


CASES = {
    "ring × bar": Case(plane, 500, 1.0, TASKS[TASK].centres),
    "guided digits": Case(digits, 100, 0.5),
}


@dataclasses.dataclass
class Measured:
    """One row of the table: medians over the keys.

    Attributes:
        acceptance: mean over levels.
        last: acceptance at level 0.
        tv: of the shares of the modes; None where no truth is known.
        log_evidence: as estimated; None without `cp.SMC`.
        spread: standard deviations over the keys of ``tv`` and ``log_evidence``.
    """

    acceptance: float
    last: float
    tv: float | None
    log_evidence: float | None
    spread: tuple[float, float]


def measure(density: Any, name: str, sampler: Any, keys: int) -> Measured:
    """A row."""
    rows = []
    case = CASES[name]
    for key in range(keys):
        result = cp.infer(
            density,
            jax.random.key(key),
            num_chains=case.chains,
            sampler=sampler,
            progress=False,
        )
        tv = evidence = np.nan
        if case.centres is not None:
            shares = mode_weights(result["x"], case.centres, result.log_weights)
            tv = total_variation(shares, truth(TASK).shares)
        if isinstance(sampler, cp.SMC):
            evidence = float(result.log_evidence)
        acceptance = np.asarray(result.acceptance)
        rows.append([float(acceptance.mean()), float(acceptance[0]), tv, evidence])
    mean, last, tv, evidence = np.median(rows, axis=0)
    spread = np.std(rows, axis=0, ddof=1)
    return Measured(
        float(mean),
        float(last),
        _finite(tv),
        _finite(evidence),
        (float(spread[2]), float(spread[3])),
    )


def _finite(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def runs(keys: int) -> int:
    """Every sampler on every density in both precisions."""
    rows: dict[tuple[str, str, str], Measured] = {}
    for name, case in CASES.items():
        densities = {way: case.compile(precision) for way, precision in WAYS.items()}
        for label, make in SAMPLERS.items():
            sampler = make(case.scale)
            for way, density in densities.items():
                rows[name, label, way] = measure(density, name, sampler, keys)
                print(name, label, way, rows[name, label, way], flush=True)
        jax.clear_caches()
    chains = ", ".join(f"{case.chains} of {name}" for name, case in CASES.items())
    notes = (
        f"Medians of {keys} keys; chains: {chains}. TV is of the modes' shares "
        f"against the exact law. {EXPLICIT}"
    )
    details = {
        "rows": [
            dict(zip(COLUMNS[:3], name, strict=True)) | dataclasses.asdict(m)
            for name, m in rows.items()
        ]
    }
    title = "Networks that multiply in bfloat16: acceptance, shares of modes, evidence"
    table = [[*name, *as_text(row)] for name, row in rows.items()]
    return publish("precision", title, COLUMNS, table, judge(rows), details, notes)


def energies() -> int:
    """Effect of rounding on log π₀ at its samples, without noise of a second run."""
    rows = []
    checks = {}
    for name, case in CASES.items():
        densities = [case.compile(precision) for precision in WAYS.values()]
        key = jax.random.key(0)
        sampler = SAMPLERS[EVIDENCE](case.scale)
        result = cp.infer(
            densities[0], key, num_chains=case.chains, sampler=sampler, progress=False
        )
        evaluate = eqx.filter_jit(
            lambda density, x: jax.vmap(density.value_and_score, (0, None))({"x": x}, 0)
        )
        (value, score), (rounded, other) = (
            evaluate(density, result["x"]) for density in densities
        )
        change = np.asarray(rounded - value, np.float64)
        off = float(
            np.linalg.norm(other["x"] - score["x"]) / np.linalg.norm(score["x"])
        )
        before = np.asarray(result.log_weights, np.float64)
        log_z = float(
            np.logaddexp.reduce(before + change) - np.logaddexp.reduce(before)
        )
        tv = ""
        if case.centres is not None:
            moved = total_variation(
                *(
                    mode_weights(result["x"], case.centres, w)
                    for w in (before, before + change)
                )
            )
            checks[f"{name}: the modes' shares move by TV {moved:.4f} ≤ {LIMIT}"] = (
                moved <= LIMIT
            )
            tv = f"{moved:.4f}"
        rows.append([name, f"{change.std():.4f}", f"{off:.2%}", tv, f"{log_z:+.4f}"])
        jax.clear_caches()
    columns = [
        "density",
        "s.d. of what is added to log π₀",
        "change of the score",
        "TV of shares moved",
        "log Z moved",
    ]
    notes = (
        "At the samples of one run of SMC in float32, reweighted by the change of log "
        "π₀ through rounding. "
    )
    title = "Networks that multiply in bfloat16: the density at level 0"
    return publish(
        "precision_energies", title, columns, rows, checks, {}, notes + EXPLICIT
    )


def scores(precision: str | None) -> Any:
    """Ring × bar by their scores."""
    task = TASKS[TASK]
    return cp.compile(task.program, *task.factors("score"), precision=precision)


FOLDER = Path(__file__).parents[1] / "tests" / "pretrained" / "data" / "ddpm"
"""A small UNet2DModel of random weights, in the files of diffusers."""
DEFAULTS = {
    "ring × bar, energies": Case(plane, 200, 1.0, TASKS[TASK].centres),
    "ring × bar, scores": Case(scores, 200, 1.0, TASKS[TASK].centres),
    "guided digits": Case(digits, 200, 1.0),
}


def defaults() -> int:
    """Default runs in both precisions under one key, and the noise that a UNet
    predicts."""
    rows = []
    checks = {}
    for name, case in DEFAULTS.items():
        first = None
        for way, precision in WAYS.items():
            density = case.compile(precision)
            result = cp.infer(
                density, jax.random.key(0), num_chains=case.chains, progress=False
            )
            tv = ""
            if case.centres is not None:
                shares = mode_weights(result["x"], case.centres, result.log_weights)
                tv = f"{total_variation(shares, truth(TASK).shares):.3f}"
            evidence = ""
            if result.log_evidence is not None:
                evidence = f"{float(result.log_evidence):.2f}"
            codes = [str(code) for code, _ in result.status.findings]
            status = ", ".join(codes) or "ok"
            first = first or result
            rows.append([name, way, status, tv, evidence, _apart(first, result)])
            print(rows[-1], flush=True)
        jax.clear_caches()
    for log_snr, error in unet():
        changed = f"{error:.2%} of ε̂"
        rows.append([f"UNet, log-SNR {log_snr:.1f}", "bfloat16", "", "", "", changed])
        checks[f"UNet, log-SNR {log_snr:.1f}: ε̂ changes by {error:.2%} ≤ 5%"] = (
            error <= 0.05
        )
    columns = ["density", "products in", "status", "TV", "log Z", "apart"]
    notes = (
        "Default runs of 200 chains under one key. TV is of the modes' shares against "
        "the exact law; apart: the root mean square over the numbers of the "
        "difference of means from float32, in standard deviations of the samples. Two "
        f"right runs have 0.1. UNet: {FOLDER.name} of the tests. {EXPLICIT}"
    )
    title = "Networks that multiply in bfloat16: default runs"
    return publish("precision_defaults", title, columns, rows, checks, {}, notes)


def _apart(first: Any, second: Any) -> str:
    """Difference of the means of two runs, in standard deviations."""
    if first is second:
        return ""
    a, b = (np.asarray(r["x"], float).reshape(len(r["x"]), -1) for r in (first, second))
    difference = (a.mean(0) - b.mean(0)) / np.where(a.std(0) > 0, a.std(0), 1.0)
    return f"{np.sqrt(np.mean(difference**2)):.2f}"


def unet() -> list[tuple[float, float]]:
    """Relative change of the noise that a UNet predicts, at three levels."""
    model = cp.from_diffusers(FOLDER)
    densities = [
        cp.compile(alone, model, precision=precision) for precision in WAYS.values()
    ]
    schedule = densities[0].schedule
    key = jax.random.key(0)
    found = []
    for level in np.linspace(0, schedule.num_levels - 1, 3).round().astype(int):
        x = float(schedule.sigma[level]) * jax.random.normal(key, model.event_shape)
        exact, rounded = (density.score({"x": x}, level)["x"] for density in densities)
        error = float(np.linalg.norm(rounded - exact) / np.linalg.norm(exact))
        found.append((float(schedule.log_snr[level]), error))
    return found


TABLES: dict[str, Callable[[], int]] = {"energies": energies, "defaults": defaults}
"""Tables beside that of the runs, each with files of its own."""

EXPLICIT = (
    "Every rounding is explicit, so that this processor computes the same as a unit "
    "for bfloat16, but for the order of sums."
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--keys",
        type=int,
        default=5,
        help="random keys of the runs, of which the median counts",
    )
    parser.add_argument(
        "--tables",
        nargs="+",
        choices=["runs", *TABLES],
        default=["runs", "energies"],
    )
    options = parser.parse_args()
    status = 0
    for table in options.tables:  # each has files of its own
        if table == "runs":
            status |= runs(options.keys)
        else:
            status |= TABLES[table]()
    return status


COLUMNS = [
    "density",
    "sampler",
    "products in",
    "acceptance",
    "at level 0",
    "TV",
    "± (s.d.)",
    "log Z",
    "± (s.d.)",
]


def as_text(row: Measured) -> list[str]:
    """The table's columns from the fourth on."""
    text = [f"{row.acceptance:.3f}", f"{row.last:.3f}"]
    for value, spread in zip((row.tv, row.log_evidence), row.spread, strict=True):
        text += ["", ""] if value is None else [f"{value:.3f}", f"{spread:.3f}"]
    return text


def judge(rows: dict[tuple[str, str, str], Measured]) -> dict[str, bool]:
    """Checks of the effect of rounding."""
    checks = {}
    for name, label in dict.fromkeys(key[:2] for key in rows):
        plain, rounded = (rows[name, label, way] for way in WAYS)
        fallen = plain.acceptance - rounded.acceptance
        checks[f"{name}, {label}: acceptance falls by {fallen:.3f} ≤ {ACCEPTANCE}"] = (
            fallen <= ACCEPTANCE
        )
        for what, place in (("tv", 0), ("log_evidence", 1)):
            before, after = getattr(plain, what), getattr(rounded, what)
            if before is not None and after is not None:
                more = after - before if what == "tv" else abs(after - before)
                noise = float(np.hypot(plain.spread[place], rounded.spread[place]))
                word = {"tv": "TV rises", "log_evidence": "log Z moves"}[what]
                checks[
                    f"{name}, {label}: {word} by {more:.3f} ≤ {LIMIT} + noise "
                    f"{noise:.3f}"
                ] = more <= LIMIT + noise
    return checks


if __name__ == "__main__":
    sys.exit(main())
