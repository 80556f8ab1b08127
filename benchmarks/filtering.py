"""Filtering: Lorenz-63 by a learned transition, beside particle filters and DAPPER's.

    python -m benchmarks filtering [--steps 300] [--chains 1000] [--keys 3]
        [--dapper PYTHON] [--train]
    python -m benchmarks filtering --lorenz-96 …    # rings of 10 and 40 numbers

Runs by `Result.extend` and DAPPER's are kept in out/, so that the same command goes on
where it was stopped.

The setting of Sakov, Oliver and Bertino 2012, as DAPPER has it: three numbers, all seen
every 0.25 units of time with variance 2, no noise in the dynamics, a first state of
variance 2. The filter's own transition is N(M(x), 0.03²) with M the flow of 0.25 units:
the noise keeps particles apart. A forecast and a diffusion factor given it learn this
law from pairs of states, without the equations, and `Result.extend` goes on with one
observation after another. Their weights lie beside this file; `--train` trains them
again.

Beside it run, on the same series: the same steps of `Result.extend` where the equations
give the transition's law; bootstrap particle filters under that law; and the filters of
DAPPER, by the Python of an environment that has it. The error is the root of the mean
square over the three numbers, averaged over the observations after the first 16.

Lorenz-96 has two settings of DAPPER's, 0.05 units of time between observations and no
noise in the dynamics: 10 numbers of which every second is seen with variance 1.5, and
40, all seen with variance 1. `filters/rings.py` says which transitions filters take
there; the learned one has its forecast from a network. The error is averaged over the
observations after the first 60 of 301.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from exact.case import Answer, Case
from filters import rings
from filters.learned import Pairs, Transition, transition
from filters.lorenz import START, VARIANCE, Series, flow, noised, series
from filters.particles import Filtered, particle_filter
from jax import Array
from report import kept, publish

import composeprob as cp

NOISE = 0.03
"""Standard deviation of the filter's transition about the flow."""

PAIRS = 100_000
SPIN_UP = 60
"""Pairs of states to train on, and transitions before they are taken."""

WIDTH = 64
ITERATIONS = 30_000
"""Width of the forecast's layers, and iterations of its training."""

REFERENCE = 100_000
"""Particles of the filter that others' log-evidence is compared with."""

LAG = 5
LEVELS = cp.Schedule.log_snr(24, -10.0, 10.2)
FOLDER = Path(__file__).parent / "filters"
WEIGHTS = FOLDER / "lorenz-63.safetensors"

PUBLISHED = {
    "3D-Var": "1.04",
    "EnKF, square root, 10": ".60",
    "EnKF, perturbed observations, 100": ".56",
    "EnKF-N, 10": ".54",
    "iEnKS, 10": ".31",
    "particle filter, 800": ".28",
    "particle filter, 4,000": ".27",
}
"""Errors that DAPPER states for the same settings, on its own longer series."""


def pairs() -> Pairs:
    """Return states, and states after them under the filter's transition.

    Half of the first ones are near the attractor, as particles are, the others further
    away from it.
    """
    keys = jax.random.split(jax.random.key(0), SPIN_UP + 3)
    x = noised(keys[0], jnp.broadcast_to(START, (PAIRS, 3)), VARIANCE**0.5)
    for step in range(SPIN_UP):
        x = noised(keys[3 + step], flow(x), NOISE)
    even = jnp.arange(PAIRS) % 2 == 0
    width = jnp.where(even, 1.5, 0.3)[:, None]
    before = noised(keys[1], x, width)
    return Pairs(before, noised(keys[2], flow(before), NOISE))


@cp.program
def first(y: Any) -> None:
    law = dist.Normal(START, VARIANCE**0.5).to_event(1)
    x = cp.sample("x", cp.Analytic(law, cp.Schedule.log_snr(40)))
    cp.observe("y", dist.Normal(x, VARIANCE**0.5).to_event(1), y)


def stepped_by(factor_after: Callable[[Array], Any]) -> Any:
    """Return the program of a step whose transition is the factor after a state."""

    @cp.program
    def step(y: Any) -> None:
        # Of the prior only the shape counts: an earlier result gives the values.
        past = cp.sample("past", dist.Normal(0.0, 10.0).expand([3]).to_event(1))
        x = cp.sample("x", factor_after(past))
        # Tempered data cost no derivative at the levels that a step comes down through.
        law = dist.Normal(x, VARIANCE**0.5).to_event(1)
        cp.observe("y", law, y, anneal="tempered")

    return step


def closed_form() -> Any:
    """The step whose transition is the law by the equations."""
    return stepped_by(
        lambda past: cp.Analytic(dist.Normal(flow(past), NOISE).to_event(1), LEVELS)
    )


def learned(known: Transition) -> Any:
    """The step whose transition was learned."""
    return stepped_by(lambda past: known.factor.given(forecast=known.forecast(past)))


class Extended(NamedTuple):
    """A filter by `Result.extend`, and what its last result says: the stated error of
    its log-evidence, its status, and evaluations of a chain."""

    filtered: Filtered
    stated: float
    status: str
    evaluations: int


def extensions(
    density: cp.AnnealedDensity,
    step: Any,
    observations: np.ndarray,
    key: Array,
    chains: int,
) -> Iterator[cp.Result]:
    """The results after each observation; ``density`` is that of the first one."""
    first_key, key = jax.random.split(key)
    result = cp.infer(density, first_key, num_chains=chains, progress=False)
    yield result
    for t, y in enumerate(observations[1:], start=1):
        density = cp.compile(step, y, schedule=LEVELS)
        step_key = jax.random.fold_in(key, t)
        result = result.extend(density, step_key, given={"past": "x"}, keep=LAG)
        yield result


def by_extension(
    step: Any, observations: np.ndarray, chains: int, seed: int
) -> dict[str, Any]:
    """Go on with one observation after another."""
    began = time.monotonic()
    key = jax.random.key(seed)
    density = cp.compile(first, observations[0])
    means = []
    evidence = []
    for result in extensions(density, step, observations, key, chains):
        weights = np.exp(result.log_weights - result.log_weights.max())
        means.append(weights @ result["x"] / weights.sum())
        evidence.append(result.log_evidence)
    return {
        "means": np.array(means, float).tolist(),
        "log_evidence": evidence,
        "seconds": time.monotonic() - began,
        "stated": float(result.log_evidence_error),
        "status": str(result.status.code),
        "evaluations": result.evaluations,
    }


GATE_STEPS = 20
"""Observations of the programs of the gate, after the first."""


def case(name: str, make: Callable[[], Any]) -> Case:
    """Return a program of the gate: the state given the data so far, and their
    log-evidence, beside the reference's."""
    observations = series(GATE_STEPS).observations

    def run(
        density: cp.AnnealedDensity, key: Array, *, num_chains: int, progress: bool
    ) -> cp.Result:
        del progress
        *_, last = extensions(density, make(), observations, key, num_chains)
        return last

    def exact() -> Answer:
        reference = particle_filter(observations, REFERENCE, NOISE, 0)
        mean = tuple(reference.means[-1].tolist())
        return Answer(mean, float(reference.log_evidence[-1]))

    return Case(
        "filtering",
        f"Lorenz-63, {name}",
        lambda: cp.compile(first, observations[0]),
        lambda result: result.mean(lambda s: s["x"]),
        exact,
        run=run,
    )


def cases() -> list[Case]:
    """The programs of the gate: Lorenz-63 by the equations and by the learned law, and
    Lorenz-96 of ten numbers. Of 40 numbers no particle filter has the answer."""

    def by_learned() -> Any:
        return learned(transition(pairs, LEVELS, WIDTH, ITERATIONS, WEIGHTS))

    return [
        case("equations", closed_form),
        case("learned law", by_learned),
        ring_case("10"),
    ]


def extended(name: str, step: Any, data: Series, chains: int, seed: int) -> Extended:
    """Measure a filter by `Result.extend`, or read what an earlier run found."""
    observations = data.observations
    run = partial(by_extension, step, observations, chains, seed)
    part = f"{name} {len(observations)} {chains} key {seed}"
    found = kept("filtering", part, run)
    filtered = Filtered(
        np.array(found["means"]), np.array(found["log_evidence"]), found["seconds"]
    )
    return Extended(filtered, found["stated"], found["status"], found["evaluations"])


def stated(run: Extended) -> float | None:
    """Return the error that a run states of its log-evidence, None without one."""
    if np.isfinite(run.stated):
        return run.stated
    return None


def by_dapper(
    python: str, data: Series | rings.Series, start: Any, variance: float
) -> dict[str, Any]:
    """Run DAPPER's filters on a series, by the Python that has it; return its version
    and, for each filter, its error and seconds."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "series.npz"
        target = Path(folder) / "found.json"
        np.savez(
            source,
            states=data.states,
            observations=data.observations,
            start=np.asarray(start),
            variance=variance,
        )
        command = [python, str(FOLDER / "dapper_filters.py"), source, target]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        return json.loads(target.read_text())


class Table:
    """Rows of the table, and the same as numbers.

    Attributes:
        data: the series.
        total: log-evidence of the reference.
    """

    def __init__(self, data: Series, total: float):
        self.data = data
        self.total = total
        self.rows: list[list[str]] = []
        self.found: dict[str, Any] = {}

    def add(self, name: str, each: Filtered) -> None:
        """Add a filter that ran here."""
        error = each.error(self.data.states)
        away = each.log_evidence[-1] - self.total
        self.found[name] = {"error": error, "seconds": each.seconds, "away": away}
        per_datum = away / len(each.means)
        seconds = f"{each.seconds:.0f}"
        evidence = [f"{away:+.2f}", f"{per_datum:+.4f}"]
        self._append([name, "", f"{error:.3f}", *evidence, seconds])

    def add_dapper(self, name: str, error: float, seconds: float) -> None:
        """Add a filter of DAPPER's."""
        label = f"DAPPER: {name}"
        self.found[label] = {"error": error, "seconds": seconds}
        published = PUBLISHED[name]
        self._append([label, published, f"{error:.3f}", "", "", f"{seconds:.0f}"])

    def _append(self, row: list[str]) -> None:
        self.rows.append(row)
        print("  ".join(row), flush=True)


class Runs(NamedTuple):
    """Filters of as many chains on one series.

    Attributes:
        particles: those that know the equations.
        exact: `Result.extend` with the law by the equations.
        learned: `Result.extend` with the learned law.
    """

    particles: list[Filtered]
    exact: Extended
    learned: list[Extended]


def measured(table: Table, options: argparse.Namespace) -> Runs:
    """Run all filters of so many chains, and put them into the table."""
    data = table.data
    chains = options.chains
    particles = []
    for seed in range(options.keys):
        particles.append(particle_filter(data.observations, chains, NOISE, seed))
        table.add(f"particle filter, {chains:,}, key {seed}", particles[-1])
    if options.dapper:
        for name, each in dapper_on(options.dapper, data)["filters"].items():
            table.add_dapper(name, each["error"], each["seconds"])
    exact = extended("equations", closed_form(), data, chains, 0)
    table.add(f"extend, law by the equations, {chains:,}", exact.filtered)
    known = transition(pairs, LEVELS, WIDTH, ITERATIONS, WEIGHTS)
    runs = []
    for seed in range(options.keys):
        runs.append(extended("learned", learned(known), data, chains, seed))
        table.add(f"extend, learned law, {chains:,}, key {seed}", runs[-1].filtered)
    return Runs(particles, exact, runs)


def dapper_on(python: str, data: Series) -> dict[str, Any]:
    """Measure DAPPER's filters, or read what an earlier run found."""
    run = partial(by_dapper, python, data, START, VARIANCE)
    return kept("filtering", f"dapper {len(data.observations)}", run)


def away(filters: list[Filtered], table: Table) -> np.ndarray:
    """Return the log-evidence of filters, less that of the reference."""
    return np.array([each.log_evidence[-1] for each in filters]) - table.total


def checks(table: Table, runs: Runs) -> dict[str, bool]:
    """Return what must hold, and whether it does."""
    of_learned = [run.filtered for run in runs.learned]
    states = table.data.states
    mean = float(np.mean([each.error(states) for each in of_learned]))
    best = float(np.mean([each.error(states) for each in runs.particles]))
    off = away(of_learned, table)
    near = np.abs(off).max() / len(table.data.observations)
    # The mean of the estimates themselves has no bias.
    together = float(np.log(np.mean(np.exp(off))))
    return {
        f"analysis error at most .30, mean of the keys ({mean:.3f})": mean <= 0.30,
        f"at most 1.05 times the particle filters' of as many ({best:.3f})": (
            mean <= 1.05 * best
        ),
        f"log-evidence within .1 for each observation ({near:.4f})": near <= 0.1,
        f"log-evidence within .1 in all, the keys' mean ({together:+.2f})": (
            abs(together) <= 0.1
        ),
    }


def notes(table: Table, runs: Runs, chains: int) -> str:
    """Return what a reader must know to read the table."""
    of_learned = [run.filtered for run in runs.learned]
    statuses = ", ".join(sorted({run.status for run in [*runs.learned, runs.exact]}))
    return (
        "Error: root mean square of the analysis mean. Published: DAPPER's own figures "
        "for the same settings, on its longer series. The log-evidence is that of "
        f"{len(table.data.observations)} observations, less that of {REFERENCE:,} "
        "particles under the same transition; then the same for each observation. It "
        f"varies by {away(runs.particles, table).std():.1f} among the particle filters "
        f"of {chains:,} that know the equations, and by "
        f"{away(of_learned, table).std():.1f} among the runs with the learned law. "
        f"Status of runs by `Result.extend`: {statuses}; errors of log-evidence that "
        f"they state: {table.found['stated']}, None where few ancestors are left. The "
        f"learned law takes {runs.learned[0].evaluations:,} evaluations a chain."
    )


class RingFilters(NamedTuple):
    """Filters that run on a ring.

    Attributes:
        noise: q of the filters without a kernel, which has the least error of 0.05,
            0.1, 0.2 and 0.4 with 1,000 particles.
        kernel: that of other runs by `Result.extend`.
        published: errors that DAPPER states for its filters.
    """

    noise: float
    kernel: rings.Kernel
    published: dict[str, str]


ON_RINGS = {
    "10": RingFilters(
        0.05,
        rings.Kernel(0.3, 0.02),
        {
            "EnKF-N, 8": ".31",
            "particle filter, 800": ".25",
            "optimal particle filter, 800": ".25",
        },
    ),
    "40": RingFilters(
        0.4,
        rings.Kernel(1.0, 0.02),
        {
            "3D-Var": ".41",
            "EnKF, perturbed observations, 40": ".22",
            "EnKF, square root, 24": ".18",
            "LETKF, 7": ".22",
        },
    ),
}

RING_BURN_IN = 60
RING_ITERATIONS = 5_000
"""First states of a ring whose errors do not count, and iterations of training."""


class RingRow(NamedTuple):
    """A filter's row on a ring; what does not apply is None."""

    ring: str
    name: str
    error: float
    seconds: float
    published: str = ""
    log_evidence: float | None = None
    ok: float | None = None
    evaluations: int | None = None

    def cells(self) -> list[str]:
        """Return the row as text."""
        cells = [self.ring, self.name, self.published, f"{self.error:.3f}"]
        formats = (
            (self.log_evidence, "{:.1f}"),
            (self.ok, "{:.0%}"),
            (self.evaluations, "{:,}"),
        )
        for number, form in formats:
            text = ""
            if number is not None:
                text = form.format(number)
            cells.append(text)
        return [*cells, f"{self.seconds:.0f}"]


def particles_on(name: str, data: rings.Series, particles: int) -> RingRow:
    """Run a particle filter by the equations."""
    noise = ON_RINGS[name].noise
    setting = rings.RINGS[name].setting(data.start)
    each = particle_filter(data.observations, particles, noise, 0, setting)
    label = f"particle filter, noise {noise}, {particles:,}"
    error = each.error(data.states, RING_BURN_IN)
    evidence = float(each.log_evidence[-1])
    return RingRow(name, label, error, each.seconds, log_evidence=evidence)


def dapper_on_ring(name: str, data: rings.Series, python: str) -> list[RingRow]:
    """Run DAPPER's filters."""
    run = partial(by_dapper, python, data, data.start, rings.FIRST**2)
    published = ON_RINGS[name].published
    found = kept("filtering", f"dapper ring {name}", run)
    rows = []
    for label, each in found["filters"].items():
        stated = published.get(label, "")
        label = f"DAPPER: {label}"
        rows.append(RingRow(name, label, each["error"], each["seconds"], stated))
    return rows


def dapper_version(python: str) -> str:
    """Return the version of DAPPER that an environment has."""
    command = "from importlib.metadata import version; print(version('dapper'))"
    found = subprocess.run([python, "-c", command], capture_output=True, check=True)
    return found.stdout.decode().strip()


def ring_case(name: str) -> Case:
    """Return the program of the gate of a ring, by a particle filter's transition."""
    ring = rings.RINGS[name]
    data = rings.series(name)
    data = data._replace(observations=data.observations[: GATE_STEPS + 1])
    noise = ON_RINGS[name].noise
    kernel = rings.Kernel(0.0, noise)
    first_state, _ = rings.programs(rings.flow, ring, data.start)

    def run(
        density: cp.AnnealedDensity, key: Array, *, num_chains: int, progress: bool
    ) -> cp.Result:
        del progress
        all_results = rings.extensions(
            density, rings.flow, ring, data, kernel, num_chains, key
        )
        *_, last = all_results
        return last

    def exact() -> Answer:
        setting = ring.setting(data.start)
        reference = particle_filter(data.observations, REFERENCE, noise, 0, setting)
        mean = tuple(reference.means[-1].tolist())
        return Answer(mean, float(reference.log_evidence[-1]))

    return Case(
        "filtering",
        f"Lorenz-96, {name} numbers, equations",
        lambda: cp.compile(first_state, data.observations[0]),
        lambda result: result.mean(lambda s: s["x"]),
        exact,
        run=run,
    )


def extended_on(
    name: str,
    data: rings.Series,
    kernel: rings.Kernel,
    forecast: rings.Forecast,
    chains: int,
    label: str,
) -> RingRow:
    """Measure a filter by `Result.extend`, or read what an earlier run found."""
    ring = rings.RINGS[name]
    run = partial(rings.by_extension, forecast, ring, data, kernel, chains, 0)
    found = kept("filtering", f"ring {name} {label} {chains}", run)
    evidence = np.array(found["log_evidence"])
    each = Filtered(np.array(found["means"]), evidence, found["seconds"])
    return RingRow(
        name,
        f"extend, {label}, {chains:,}",
        each.error(data.states, RING_BURN_IN),
        each.seconds,
        log_evidence=float(evidence[-1]),
        ok=found["ok"],
        evaluations=found["evaluations"],
    )


def on_ring(name: str, options: argparse.Namespace) -> list[RingRow]:
    """Run all filters of a ring; the last two rows have the kernel, by the equations
    and by the forecast that was learned."""
    data = rings.series(name)
    chains = options.chains
    rows = [particles_on(name, data, chains), particles_on(name, data, 10 * chains)]
    if options.dapper:
        rows += dapper_on_ring(name, data, options.dapper)
    noise, kernel, _ = ON_RINGS[name]
    network = rings.learned_forecast(RING_ITERATIONS)
    kernel_label = f"kernel {kernel.width}"
    runs = (
        (f"noise {noise}", rings.Kernel(0.0, noise), rings.flow),
        (kernel_label, kernel, rings.flow),
        (f"{kernel_label}, learned forecast", kernel, network),
    )
    for label, transition_kernel, forecast in runs:
        rows.append(extended_on(name, data, transition_kernel, forecast, chains, label))
    for row in rows:
        print("  ".join(row.cells()), flush=True)
    return rows


def ring_checks(rows: list[RingRow]) -> dict[str, bool]:
    """Return what must hold of a ring, and whether it does."""
    *_, equations, learned_row = rows
    of_dapper = [row for row in rows if row.name.startswith("DAPPER")]
    ring = equations.ring
    ratio = learned_row.error / equations.error
    checks = {
        f"{ring} numbers: the learned forecast's error at most 1.05 times that by the "
        f"equations ({ratio:.3f})": ratio <= 1.05
    }
    if of_dapper:
        best = min(of_dapper, key=lambda row: row.error)
        ratio = equations.error / best.error
        checks[
            f"{ring} numbers: error at most 1.1 times that of {best.name} ({ratio:.3f})"
        ] = ratio <= 1.1
    return checks


def on_rings(options: argparse.Namespace) -> int:
    """Run all filters of Lorenz-96, and publish their table."""
    if options.train:
        rings.WEIGHTS.unlink(missing_ok=True)
    rows = []
    checks = {}
    for name in ON_RINGS:
        of_ring = on_ring(name, options)
        checks |= ring_checks(of_ring)
        rows += of_ring
    text = (
        "Error: root mean square of the analysis mean over all numbers, averaged over "
        f"the observations after the first {RING_BURN_IN} of {rings.STEPS + 1}. "
        "Published: DAPPER's own figures for the same settings, on its longer series. "
        "Log-evidence: that of each filter's own transition. OK: the share of the "
        "observations after which the status is OK. A kernel is the transition "
        "N(m + √(1 − h²)·(M(x) − m), h²·P + q²) of `filters/rings.py`, with the h of "
        "its name and q = 0.02."
    )
    made_by = "python -m benchmarks filtering --lorenz-96"
    if options.dapper:
        text += (
            f" DAPPER is version {dapper_on(options.dapper, series(300))['version']}."
        )
        made_by += " --dapper PYTHON"
    return publish(
        "filtering_96",
        "Filtering: Lorenz-96 with 10 and 40 numbers",
        [
            "numbers",
            "filter",
            "published",
            "error",
            "log-evidence",
            "OK",
            "evaluations",
            "seconds",
        ],
        [row.cells() for row in rows],
        checks,
        {f"{row.ring}: {row.name}": row._asdict() for row in rows},
        text,
        made_by=made_by,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--chains", type=int, default=1000)
    parser.add_argument("--keys", type=int, default=3)
    parser.add_argument("--dapper", help="the Python of an environment with DAPPER")
    parser.add_argument("--train", action="store_true", help="write new weights")
    parser.add_argument(
        "--lorenz-96", action="store_true", help="rings of 10 and 40 numbers instead"
    )
    options = parser.parse_args()

    if options.lorenz_96:
        return on_rings(options)
    if options.train:
        WEIGHTS.unlink(missing_ok=True)
    data = series(options.steps)
    reference = particle_filter(data.observations, REFERENCE, NOISE, 0)
    table = Table(data, float(reference.log_evidence[-1]))
    table.add(f"particle filter, {REFERENCE:,}", reference)
    runs = measured(table, options)
    table.found["stated"] = [stated(run) for run in runs.learned]
    text = notes(table, runs, options.chains)
    made_by = "python -m benchmarks filtering"
    if options.dapper:
        text += f" DAPPER is version {dapper_on(options.dapper, data)['version']}."
        made_by += " --dapper PYTHON"
    return publish(
        "filtering",
        "Filtering: Lorenz-63 by a learned transition",
        ["filter", "published", "error", "log-evidence", "for each", "seconds"],
        table.rows,
        checks(table, runs),
        table.found,
        text,
        made_by=made_by,
    )


if __name__ == "__main__":
    raise SystemExit(main())
