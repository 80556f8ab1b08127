"""How often the findings of trust fire where they should, and where they should not: misses and false alarms over keys.

    composeprob bench trust

CompLift's nine compositions in the plane (two of them empty) with exact stand-ins for their factors, asked by
`density.check`; a mode of 20 % that one of two populations lacks, asked by `result.compare`; and a kernel without its
Metropolis test, asked by `cp.calibrated`. ``--keys N`` takes fewer keys than 100, and writes nothing.
"""

from __future__ import annotations

import argparse
import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from plane.nine import NINE, single
from report import publish

import composeprob as cp

KEYS, FEWER, SETS = 100, 40, 100
SCHEDULE = cp.Schedule.linear(50)
FINE = cp.Schedule.log_snr(30)
EMPTY = [name for name, scenario in NINE.items() if scenario.empty]
CENTRES, SHARES = np.array([[0.0, 0.0], [0.0, 4.0], [-4.0, 0.0], [4.0, 0.0]]), np.array([0.4, 0.3, 0.1, 0.2])


STEP = 0.3
"""Of both kernels: without a test the posterior, of variance 0.2, becomes 0.2/(1 − 0.3/0.4), four times as wide."""


@cp.program
def measured(f, y):
    x = cp.sample("x", f)
    cp.observe("y", dist.Normal(x, 0.5), y)


def overlap(keys: int) -> dict[str, int]:
    """How often each of the nine has a finding."""
    found = {}
    for name, scenario in NINE.items():
        density = cp.compile(single, scenario.factor(SCHEDULE))
        found[name] = sum(bool(density.check(jax.random.key(k))) for k in range(keys))
        print(name, found[name], flush=True)
    return found


def population(density: cp.AnnealedDensity, key: int, n: int) -> cp.Result:
    return cp.infer(density, jax.random.key(key), num_chains=n, progress=False)


def modes(keys: int, n: int = 300) -> tuple[int, int]:
    """How often a population without the mode of 20 % is named beside a right one; how often two right ones are."""

    def density(shares: np.ndarray) -> cp.AnnealedDensity:
        parts = dist.Normal(jnp.asarray(CENTRES), 1.0).to_event(1)
        mixture = dist.MixtureSameFamily(dist.Categorical(jnp.asarray(shares)), parts)
        return cp.compile(single, cp.Analytic(mixture, FINE))

    right, wrong = density(SHARES), density(np.array([0.5, 0.375, 0.125, 0.0]))
    named = alarms = 0
    for k in range(keys):
        one, two, three = population(right, 3 * k, n), population(right, 3 * k + 1, n), population(wrong, 3 * k + 2, n)
        named += one.compare(three).status.has("modes_missing")
        alarms += one.compare(two).status.has("modes_missing")
    return named, alarms


def kernels(keys: int) -> tuple[int, int]:
    """How often ranks tell a kernel whose Metropolis test is missing; how often they tell the right one."""
    f = cp.Analytic(dist.Normal(0.0, 1.0), FINE)
    right, wrong = (cp.AnnealedMCMC(kernel, 3) for kernel in (cp.MALA(STEP), cp.ULA(STEP)))

    def told(sampler: cp.Sampler, key: int) -> bool:
        found = cp.calibrated(
            measured, f, 0.3, key=jax.random.key(key), num=SETS, sampler=sampler, data={"y": "y"}, progress=False
        )
        return not found.calibrated

    return sum(told(wrong, k) for k in range(keys)), sum(told(right, k) for k in range(keys))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--keys", type=int, help="keys of each row; the numbers are not written")
    asked = parser.parse_args(arguments)
    keys = asked.keys or KEYS
    of_nine = overlap(keys)
    named, alarms = modes(keys)
    print("modes", named, alarms, flush=True)
    fewer = min(keys, FEWER)  # each is a hundred runs
    told, right = kernels(fewer)
    rows = [[name, "no_overlap", f"{n} of {keys}", "yes" if name in EMPTY else "no"] for name, n in of_nine.items()]
    rows += [["a mode of 20 % missing", "modes_missing", f"{named} of {keys}", "yes"]]
    rows += [["two right runs", "modes_missing", f"{alarms} of {keys}", "no"]]
    rows += [["a kernel without its test", "ranks", f"{told} of {fewer}", "yes"]]
    rows += [["the same kernel with it", "ranks", f"{right} of {fewer}", "no"]]
    checks = {
        "both empty compositions are named under every key": all(of_nine[name] == keys for name in EMPTY),
        "of the seven others at most 5 % are": all(n <= 0.05 * keys for m, n in of_nine.items() if m not in EMPTY),
        "a missing mode is named in 95 % of the keys, and at most 5 % are false alarms": (
            named >= 0.95 * keys and alarms <= 0.05 * keys
        ),
        "a wrong kernel is told in 95 % of the keys, the right one in at most 5 %": (
            told >= 0.95 * fewer and right <= 0.05 * fewer
        ),
    }
    columns = ["what", "finding", "fired", "should"]
    details = {"nine": of_nine, "modes": [named, alarms], "kernels": [told, right], "keys": keys}
    notes = f"Populations of 300 chains; ranks over {SETS} data sets."
    title = "Misses and false alarms"
    return publish("trust", title, columns, rows, checks, details, notes, write=asked.keys is None)


if __name__ == "__main__":
    sys.exit(main())
