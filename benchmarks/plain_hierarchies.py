"""Plain hierarchies: default runs of programs of NumPyro latents alone, beside
quadrature and NUTS.

    python -m benchmarks plain-hierarchies [--structures "one layer" crossed]
        [--members 5 100] [--priors HalfNormal Uniform] [--data vague sharp mixed]
        [--chains 300] [--keys 1] [--no-nuts] [--all]

mu ~ N(0, 2), scales under one of seven priors, and members about mu, members of groups
about mu, or rows plus columns. Data are vague (members differ by 0.05, noise 0.5),
sharp (by 0.5, noise 0.01), or mixed. The means and mean squares of mu and of the
logarithms of scales are compared with exact ones (`exact/hierarchies.py`), in stated
errors, or in those of as many exact draws where these are greater. NUTS is NumPyro's,
on `density.to_numpyro()`: one chain with 500 steps of warm-up and 1,000 draws, whose
errors are those of its effective sample size.

Without options it takes two minutes; with ``--all`` it runs every structure, prior and
kind of data with 5, 30, 100 and 1,000 members, which takes hours.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from exact.case import Answer, Case
from exact.hierarchies import PRIORS, STRUCTURES, Law, log_scale
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC, NUTS
from report import publish

import composeprob as cp
from composeprob.results.estimates import Estimate

WRONG = 4.0
"""Stated errors from which an estimate is wrong."""

KINDS = ("vague", "sharp", "mixed")
STRUCTURE_NAMES, MEMBERS, PRIOR = ("one layer", "crossed"), 30, "HalfNormal"
"""Programs of a run without options, and of the gate."""

WARM_UP, DRAWS = 500, 1000
"""Steps of NUTS before its draws, and these."""


class Run(NamedTuple):
    """Estimates of one run: for each law the mean and the mean square about the exact
    mean over the exact one, off by so many errors.

    An error is the stated one, NaN if withheld, or that of as many exact draws if that
    is greater. A log-scale has a heavy tail: the squares of 64 exact draws are off by
    more than four of the errors that these draws state in 6 % of all sets.
    """

    errors: list[float]
    off: list[float]  # in errors of as many exact draws
    status: str
    evaluations: int  # of the density's gradient, all chains together
    seconds: float

    @property
    def worst(self) -> float:
        """The largest error, in stated ones; NaN where these are withheld."""
        return float(np.max(np.abs(self.errors)))


def moments(values: Any, laws: dict[str, Law], prior: str) -> Any:
    """Return the deviations of mu and log-scales of a sample, and their squares."""
    found = []
    for name, law in laws.items():
        value = values[name]
        if name != "mu":
            value = log_scale(value, prior)
        away = (value - law.mean) / np.sqrt(law.variance)
        found += [away, away**2 - 1.0]
    return jnp.stack(found)


def exact_errors(laws: dict[str, Law], draws: float) -> np.ndarray:
    """Return the standard errors of `moments` over so many exact draws."""
    each = []
    for law in laws.values():
        each += [1.0, law.deviation_of_square]
    return np.array(each) / np.sqrt(draws)


def default(
    density: Any, laws: dict[str, Law], prior: str, key: int, chains: int
) -> Run:
    """Return a default run."""
    began = time.monotonic()
    result = cp.infer(density, jax.random.key(key), num_chains=chains, progress=False)
    status = str(result.status.code)
    seconds = time.monotonic() - began
    found = result.mean(lambda values: moments(values, laws, prior))
    expected = exact_errors(laws, chains)
    # The greater one; NaN stays.
    errors = np.maximum(found.error, expected)
    return Run(
        (found.value / errors).tolist(),
        (found.value / expected).tolist(),
        status,
        result.evaluations * chains,
        seconds,
    )


def case(name: str, kind: str) -> Case:
    """Return a program of the gate, asked for `moments`, whose errors are not smaller
    than those of as many exact draws."""
    structure = STRUCTURES[name]
    data = structure.data(MEMBERS, kind)
    laws = structure.laws(PRIOR, data)

    def compiled() -> cp.AnnealedDensity:
        arrays = [jnp.asarray(array, jnp.float32) for array in data]
        return cp.compile(structure.program(PRIOR), *arrays)

    def ask(result: cp.Result) -> Estimate:
        found = result.mean(lambda values: moments(values, laws, PRIOR))
        expected = exact_errors(laws, len(result.log_weights))
        return dataclasses.replace(found, error=np.maximum(found.error, expected))

    exact = Answer((0.0,) * 2 * len(laws))
    label = f"{name}, {kind}, {MEMBERS} members, moments"
    return Case("plain hierarchies", label, compiled, ask, lambda: exact)


def cases() -> list[Case]:
    """The programs of the gate: those of a run without options."""
    return [case(*each) for each in itertools.product(STRUCTURE_NAMES, KINDS)]


def nuts(density: Any, laws: dict[str, Law], prior: str, key: int) -> Run:
    """Return one chain of NUTS."""
    began = time.monotonic()
    target = density.to_numpyro()
    sampler = MCMC(
        NUTS(potential_fn=target.potential_fn),
        num_warmup=WARM_UP,
        num_samples=DRAWS,
        postprocess_fn=target.postprocess_fn,
        progress_bar=False,
    )
    start = target.init_params(jax.random.key(100 + key))
    fields = ("num_steps", "diverging")
    sampler.warmup(
        jax.random.key(key),
        init_params=start,
        extra_fields=fields,
        collect_warmup=True,
    )
    evaluations = int(sampler.get_extra_fields()["num_steps"].sum())
    sampler.run(jax.random.key(1000 + key), extra_fields=fields)
    drawn = sampler.get_samples()
    seconds = time.monotonic() - began
    facts = sampler.get_extra_fields()
    evaluations += int(facts["num_steps"].sum())
    drawn = {name: drawn[name] for name in laws}
    each = np.asarray(jax.vmap(lambda one: moments(one, laws, prior))(drawn), float)
    worth = effective_sample_size(each[None])
    stated = each.std(0) / np.sqrt(worth)
    expected = exact_errors(laws, len(each))
    errors = each.mean(0) / np.maximum(stated, expected)
    off = each.mean(0) / expected
    status = f"{int(facts['diverging'].sum())} divergences"
    return Run(errors.tolist(), off.tolist(), status, evaluations, seconds)


def shown(run: Run) -> str:
    return "–" if np.isnan(run.worst) else f"{run.worst:.1f}"


class Table:
    """The rows of the table, and the runs behind them."""

    def __init__(self, keys: int, beside_nuts: bool):
        self.keys = keys
        self.beside_nuts = beside_nuts
        self.rows: list[list[str]] = []
        self.found: dict[str, Any] = {}
        self.silent: list[str] = []
        self.named: list[str] = []
        self.total = 0

    def measure(
        self, name: str, members: int, prior: str, kind: str, chains: list[int]
    ) -> None:
        """Run one program with data of one kind, under every number of chains."""
        structure = STRUCTURES[name]
        data = structure.data(members, kind)
        laws = structure.laws(prior, data)
        arrays = [jnp.asarray(array, jnp.float32) for array in data]
        density = cp.compile(structure.program(prior), *arrays)
        beside = None
        if self.beside_nuts:
            beside = nuts(density, laws, prior, 0)
        for number in chains:
            program = [name, str(members), prior, kind, str(number)]
            runs = []
            for key in range(self.keys):
                run = default(density, laws, prior, key, number)
                runs.append(run)
                self.judge(run, f"{', '.join(program)}, key {key}")
            self.add(program, runs, beside)

    def judge(self, run: Run, label: str) -> None:
        self.total += 1
        if run.worst > WRONG:
            self.silent.append(label)
        if run.status != "ok" and np.max(np.abs(run.off)) <= WRONG:
            self.named.append(label)

    def add(self, program: list[str], runs: list[Run], beside: Run | None) -> None:
        found = [run._asdict() for run in runs]
        row = [
            *program,
            " ".join(shown(run) for run in runs),
            " ".join(run.status for run in runs),
            f"{np.mean([run.evaluations for run in runs]):,.0f}",
            " ".join(f"{run.seconds:.0f}" for run in runs),
        ]
        if beside is not None:
            found.append(beside._asdict())
            row += [shown(beside), beside.status]
            row += [f"{beside.evaluations:,}", f"{beside.seconds:.0f}"]
        self.found[", ".join(program)] = found
        self.rows.append(row)
        print("  ".join(row), flush=True)

    def publish(self) -> int:
        few = len(self.named) <= self.total / 8
        named = f"({len(self.named)} of {self.total})"
        checks = {
            f"no run is wrong and OK ({len(self.silent)} of {self.total})": (
                not self.silent
            ),
            f"at most one right run of eight is named {named}": few,
        }
        columns = ["structure", "members", "prior", "data", "chains"]
        columns += ["largest error / stated", "status", "gradients", "seconds"]
        if self.beside_nuts:
            columns += ["NUTS: error / stated", "divergences", "gradients", "seconds"]
        details = {
            "runs": self.found,
            "wrong and OK": self.silent,
            "right and named": self.named,
        }
        title = "Plain hierarchies: default runs beside quadrature and NUTS"
        return publish(
            "plain_hierarchies", title, columns, self.rows, checks, details, NOTES
        )


NOTES = (
    "The largest error of the means of mu and of log-scales, and of their mean squares "
    "about the exact means, in stated errors, or in those of as many exact draws where "
    "these are greater; one number for each key, a dash where errors are withheld. "
    "Gradients are those of all chains together. A run is wrong "
    "above 4, and right where all are within 4 errors of as many exact draws."
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--structures", nargs="+", default=STRUCTURE_NAMES)
    parser.add_argument("--members", type=int, nargs="+", default=[MEMBERS])
    parser.add_argument("--priors", nargs="+", default=[PRIOR])
    parser.add_argument("--data", nargs="+", default=KINDS)
    parser.add_argument("--chains", type=int, nargs="+", default=[300])
    parser.add_argument("--keys", type=int, default=1)
    parser.add_argument("--no-nuts", action="store_true")
    parser.add_argument("--all", action="store_true")
    options = parser.parse_args()
    if options.all:
        options.structures = list(STRUCTURES)
        options.members = [5, 30, 100, 1000]
        options.priors = list(PRIORS)
        options.chains = [64, 300]
        options.keys = 3
    table = Table(options.keys, not options.no_nuts)
    for name, members, prior, kind in itertools.product(
        options.structures, options.members, options.priors, options.data
    ):
        table.measure(name, members, prior, kind, options.chains)
    return table.publish()


if __name__ == "__main__":
    raise SystemExit(main())
