"""Renoising as a global move of learned factors above 20 numbers: mode proportions and
cost, beside default runs.

    python -m benchmarks renoising [--keys 4]

A network's score of two modes, in closed form here, in 24 and 64 numbers: alone, with
one measurement, multiplied by a second score, and squared. Default runs make no global
moves in so many numbers. Their error of a mode's share is compared with that of the
same sampler followed by `cp.Renoise`, and with that of four times as many chains. Moves
would become the default if they made the error smaller than chains do for the same
evaluations, in more than half of the programs. Runs are kept in out/, so that the same
command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from report import kept, publish
from scipy import stats

import composeprob as cp
from composeprob.kernels.gibbs import replaced
from composeprob.samplers.choose import choose

LEVELS = cp.Schedule.log_snr(60)
WEIGHTS = np.array([0.3, 0.7])
CENTRES = np.array([-3.0, 3.0])
"""Weights of the modes, and their places along the diagonal."""
WIDTH = 0.5
OTHER = 1.5
PLACE = -1.0
"""Width and place of the Gaussian that a product multiplies them by."""
DATUM = -0.5
NOISE = 2.0
CHAINS = 256


@cp.program
def single(f: Any) -> None:
    cp.sample("x", f)


@cp.program
def measured(f: Any, y: Any) -> None:
    x = cp.sample("x", f)
    cp.observe("y", dist.Normal(jnp.sum(x) / np.sqrt(x.size), NOISE), y)


@cp.program
def both(f: Any, g: Any) -> None:
    cp.sample("x", f * g)


@cp.program
def squared(f: Any) -> None:
    cp.sample("x", f**2)


def scores(numbers: int, weights: Any, centres: Any, width: float) -> cp.Diffusion:
    """The noise that a trained network would predict for modes along the diagonal."""
    logs = jnp.log(jnp.asarray(weights))
    means = jnp.asarray(centres)[:, None] / np.sqrt(numbers) * jnp.ones(numbers)

    def network(x: Any, log_snr: Any) -> Any:
        alpha = jnp.sqrt(jax.nn.sigmoid(log_snr))
        variance = jax.nn.sigmoid(-log_snr)
        total = alpha**2 * width**2 + variance
        away = x - alpha * means
        shares = jax.nn.softmax(logs - 0.5 * jnp.sum(away**2, axis=1) / total)
        return jnp.sqrt(variance) * shares @ away / total

    return cp.Diffusion(
        network,
        LEVELS,
        event_shape=(numbers,),
        parameterization="epsilon",
        time="log_snr",
        label="modes",
    )


class Program(NamedTuple):
    """A program with the exact share of its right mode."""

    density: Any
    share: float


def programs(numbers: int) -> dict[str, Callable[[], Program]]:
    """All programs of so many numbers."""
    f = scores(numbers, WEIGHTS, CENTRES, WIDTH)
    g = scores(numbers, np.ones(1), np.array([PLACE]), OTHER)
    datum = stats.norm(CENTRES, np.hypot(WIDTH, NOISE)).pdf(DATUM)
    # Along the other diagonals both factors have the mean 0.
    product = stats.norm(CENTRES, np.hypot(WIDTH, OTHER)).pdf(PLACE)
    weights = {
        "alone": WEIGHTS,
        "measured": WEIGHTS * datum,
        "product": WEIGHTS * product,
        "square": WEIGHTS**2,
    }
    densities = {
        "alone": lambda: cp.compile(single, f),
        "measured": lambda: cp.compile(measured, f, DATUM),
        "product": lambda: cp.compile(both, f, g),
        "square": lambda: cp.compile(squared, f),
    }

    def program(name: str) -> Callable[[], Program]:
        shares = weights[name] / weights[name].sum()
        return lambda: Program(densities[name](), float(shares[1]))

    return {name: program(name) for name in weights}


def by_default(density: Any, key: Any, chains: int) -> cp.Result:
    return cp.infer(density, key, num_chains=chains, progress=False)


def renoised(number: int) -> Callable[[Any, Any, int], cp.Result]:
    """Runs of the default sampler that end with so many proposals to each chain."""

    def run(density: Any, key: Any, chains: int) -> cp.Result:
        sampler, _ = choose(density, chains)
        finishers = (*sampler.finishers, cp.Renoise(number))
        sampler = replaced(sampler, finishers=finishers)
        return cp.infer(
            density, key, num_chains=chains, sampler=sampler, progress=False
        )

    return run


MEASURED = {
    24: ("alone", "measured", "product", "square"),
    64: ("alone", "product"),
}
"""Programs by their number of numbers."""
MOVED = ("Renoise(5)", "Renoise(20)")
DEFAULT = False
"""True if default runs make these moves."""
WAYS: dict[str, tuple[Callable[[Any, Any, int], cp.Result], int]] = {
    "default": (by_default, CHAINS),
    "4 × chains": (by_default, 4 * CHAINS),
    "Renoise(5)": (renoised(5), CHAINS),
    "Renoise(20)": (renoised(20), CHAINS),
}


def runs(density: Any, way: str, keys: int) -> list[dict[str, Any]]:
    """Runs of one program in one way: the share of the right mode, and the cost."""
    run, chains = WAYS[way]
    made = []
    for key in range(keys):
        result = run(density, jax.random.key(key), chains)
        share = result.mean(lambda s: jnp.sum(s["x"]) > 0)
        made.append(
            {
                "share": float(share.value),
                "error": float(share.error),
                "evaluations": int(result.evaluations),
                "chains": chains,
                "effective": float(result.effective_chains),
                "ok": bool(result.status.ok),
                "code": str(result.status.code),
            }
        )
    return made


class Measured(NamedTuple):
    """Numbers of one way of running a program.

    Attributes:
        share: mean over keys.
        error: root mean square of the share's error.
        stated: mean of the errors that runs state.
        evaluations: of each chain.
        effective: chains.
        cost: the error, times the root of all evaluations over `CHAINS`: what is left
            of it if more chains make the error smaller.
        good: number of runs whose status is OK.
    """

    share: float
    error: float
    stated: float
    evaluations: float
    effective: float
    cost: float
    good: int


def measured_by(exact: float, made: list[dict[str, Any]]) -> Measured:
    """Return the numbers of some runs."""

    def mean(name: str) -> float:
        return float(np.mean([run[name] for run in made]))

    shares = np.array([run["share"] for run in made])
    error = float(np.sqrt(np.mean((shares - exact) ** 2)))
    evaluations = mean("evaluations")
    total = evaluations * made[0]["chains"] / CHAINS
    return Measured(
        share=mean("share"),
        error=error,
        stated=mean("error"),
        evaluations=evaluations,
        effective=mean("effective"),
        cost=error * np.sqrt(total),
        good=sum(run["ok"] for run in made),
    )


COLUMNS = (
    "program, numbers",
    "way",
    "exact share",
    "share",
    "its error (stated)",
    "evaluations",
    "effective chains",
    "error × √evaluations",
    "OK",
)


class Table:
    """Rows of the table, and the runs that they are made of.

    Attributes:
        better: for each program, whether moves were worth more than further chains.
    """

    def __init__(self) -> None:
        self.rows: list[list[str]] = []
        self.details: dict[str, Any] = {}
        self.better: list[bool] = []

    def add(self, name: str, numbers: int, keys: int) -> None:
        """Run a program in all ways, or read what an earlier run found."""
        program = programs(numbers)[name]()
        costs = {}
        for way in WAYS:
            part = f"{name} {numbers} {way} {keys}"
            made = kept("renoising", part, partial(runs, program.density, way, keys))
            self.details[part] = made
            found = measured_by(program.share, made)
            costs[way] = found.cost
            row = [f"{name}, {numbers}", way, f"{program.share:.3f}"]
            row += [f"{found.share:.3f}", f"{found.error:.3f} ({found.stated:.3f})"]
            row += [f"{found.evaluations:.0f}", f"{found.effective:.0f}"]
            row += [f"{found.cost:.2f}", f"{found.good} of {len(made)}"]
            self.rows.append(row)
        moved = min(costs[way] for way in MOVED)
        self.better.append(moved < min(costs["default"], costs["4 × chains"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, default=4)
    keys = parser.parse_args().keys
    table = Table()
    for numbers, names in MEASURED.items():
        for name in names:
            table.add(name, numbers, keys)
    share = np.mean(table.better)
    return publish(
        "renoising",
        "Renoising after default runs of learned factors above 20 numbers",
        list(COLUMNS),
        table.rows,
        {"the default is the better of the two": bool(share > 0.5) == DEFAULT},
        {"runs": table.details, "better": float(share)},
        notes=f"Moves were worth more than as many evaluations of further chains in "
        f"{share:.0%} of the programs.",
    )


if __name__ == "__main__":
    sys.exit(main())
