"""Cost and worth of the fitted reverse step and of the control of the weights.

    python -m benchmarks descent-cost [--chains 2000] [--repeats 5] [--cases NAME …]

The same SMC, MALA moves at 20 levels, by DDPM's step without a control, by the fitted
step of second order alone, and by that step with its control, which is the default;
they take turns in one process. The unit is what a run with the first takes of the
processor for one evaluation of all chains. Exits with 1 where the default takes over
1.10 of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from price.clock import Times, alternate, ratio
from report import publish

import composeprob as cp

LIMIT, LEVELS = 1.10, 20
PLAIN, DEFAULT = "explicit, no control", "fitted, affine control"
STEPS = {
    PLAIN: cp.ReverseStep(order=1, control="none"),
    "fitted, no control": cp.ReverseStep(control="none"),
    DEFAULT: cp.ReverseStep(),
}


@cp.program
def product(factors: Any) -> Any:
    return cp.sample("x", cp.product(*factors))


def mixtures(size: int, components: int) -> cp.AnnealedDensity:
    """Two exact mixtures of Gaussians: no network, so that next to nothing is
    evaluated."""
    rng = np.random.default_rng(size)
    means = [
        jnp.asarray(rng.normal(size=(components, size)), jnp.float32) for _ in range(2)
    ]
    weights = dist.Categorical(probs=jnp.ones(components) / components)
    laws = [
        dist.MixtureSameFamily(weights, dist.Normal(mean, 0.7).to_event(1))
        for mean in means
    ]
    return cp.compile(
        product, [cp.Analytic(law, cp.Schedule.log_snr(LEVELS)) for law in laws]
    )


def learned(*factors: cp.Factor) -> cp.AnnealedDensity:
    """Networks of the zoo, at 20 of the noise levels that they know."""
    known = factors[0].schedule.log_snr
    return cp.compile(
        product,
        list(factors),
        schedule=cp.Schedule.log_snr(LEVELS, known[-1], known[0]),
    )


CASES: dict[str, Callable[[], cp.AnnealedDensity]] = {
    "learned ring × bar, d = 2": lambda: learned(cp.load("ring2d"), cp.load("bar2d")),
    "learned digits, 3 × 8, d = 64": lambda: learned(
        *(cp.load("digits").given(label=n) for n in (3, 8))
    ),
    "mixtures of 25, d = 2": lambda: mixtures(2, 25),
    "mixtures of 5, d = 64": lambda: mixtures(64, 5),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chains", type=int, default=2000)
    parser.add_argument(
        "--repeats", type=int, default=5, help="how often every run is timed"
    )
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    options = parser.parse_args()
    rows, checks, details = [], {}, {}
    for name in options.cases:
        density = CASES[name]()
        runs = {}
        results = {}
        for setting in STEPS:
            units = sampler_of(setting).prepare(density).evaluations(LEVELS)
            runs[setting] = (
                (
                    lambda setting=setting: _run(
                        density, setting, options.chains, results
                    )
                ),
                units,
            )
        times = alternate(runs, options.repeats, "processor")
        for setting, result in results.items():
            rows.append(row_of(name, setting, times, result))
        cost = ratio(times[DEFAULT], times[PLAIN])[0]
        checks[f"{name}: {cost:.2f} ≤ {LIMIT:.2f} of the plain step"] = cost <= LIMIT
        details[name] = {setting: t.seconds.tolist() for setting, t in times.items()}
        jax.clear_caches()
    title = (
        f"What the fitted step and the control cost, {options.chains} chains, "
        f"{LEVELS} levels"
    )
    return publish("descent_cost", title, COLUMNS, rows, checks, details, NOTES)


COLUMNS = [
    "density",
    "step",
    "ms an evaluation",
    "over the plain step",
    "±",
    "effective chains",
    "status",
]
NOTES = (
    "Processor time of whole runs, medians over turns in one process, divided by the "
    "evaluations of the run; the kernel's step size is the same in all. Fits are "
    "products of all chains with matrices of d × d, twice a level, whatever an "
    "evaluation costs: they add little to networks and much to a formula of "
    "microseconds. Effective chains are those that the run reports, under one key."
)


def sampler_of(setting: str) -> cp.SMC:
    kernel = cp.MALA(lambda schedule: 0.05 * schedule.sigma**2)
    return cp.SMC(kernel, step=STEPS[setting], check_levels=False)


def _run(
    density: cp.AnnealedDensity,
    setting: str,
    chains: int,
    results: dict[str, cp.Result],
) -> dict[str, Any]:
    """One run, whose samples are waited for; its result is kept."""
    sampler = sampler_of(setting)
    results[setting] = cp.infer(
        density, jax.random.key(0), num_chains=chains, sampler=sampler, progress=False
    )
    return results[setting].samples


def row_of(
    name: str, setting: str, times: dict[str, Times], result: cp.Result
) -> list[str]:
    """A line of the table."""
    cost, error = ratio(times[setting], times[PLAIN])
    codes = ", ".join(str(code) for code, _ in result.status.findings) or "ok"
    worth = f"{result.effective_chains:,.0f}"
    return [
        name,
        setting,
        f"{1e3 * times[setting].median:.2f}",
        f"{cost:.2f}",
        f"{error:.2f}",
        worth,
        codes,
    ]


if __name__ == "__main__":
    sys.exit(main())
