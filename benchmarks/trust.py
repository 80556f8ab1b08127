"""Misses and false alarms of the findings of trust, over keys.

    python -m benchmarks trust

CompLift's nine compositions in the plane (two of them empty) of exact factors, asked by
`density.check`; data that a learned prior contradicts; a mode of 20 % that one of two
populations lacks, asked by `result.compare`; kernels whose Metropolis test is wrong,
asked by `cp.calibrated`; and the Fokker–Planck residuals of right, wrong and learned
scores. Finished parts are kept in out/, so that the same command goes on where it was
stopped. ``--keys N`` takes fewer keys than 100, and writes no results.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from jax.scipy.special import log_ndtr
from plane.nine import NINE, exact, single
from report import kept, publish

import composeprob as cp
from composeprob.density.overlap import noised
from composeprob.kernels import KernelState
from composeprob.kernels.metropolis import metropolis

KEYS, SETS = 100, 75
SCHEDULE = cp.Schedule.linear(50)
FINE, COARSE = cp.Schedule.log_snr(30), cp.Schedule.log_snr(12)
FAR = ("data at 10.0 sd", "data at 20.0 sd", "data at 30.0 sd")
EMPTY = [name for name, scenario in NINE.items() if scenario.empty]
CENTRES = np.array([[0.0, 0.0], [0.0, 4.0], [-4.0, 0.0], [4.0, 0.0]])
SHARES = np.array([0.4, 0.3, 0.1, 0.2])


STEP, LONG = 0.1, 0.3
"""Without a test the posterior's variance, 0.2, becomes 0.2/(1 − 0.1/0.4) = 0.267, with
the longer step 0.8. Without Hastings' ratio the proposal x' = x/2 + √0.2·ξ, which is
reversible for N(0, 0.267), leaves the product of that and the posterior: 0.114."""
ZOO = ("ring2d", "ring2d-score", "bar2d-score")
"""Learned models whose samples the other benchmarks found good."""


class NoHastings(cp.MALA):
    """A wrong kernel: it compares densities, and forgets that its proposal does not go
    back as it came."""

    def finish(self, trajectory: Any, evaluation: Any) -> Any:
        state = trajectory.start
        proposed = KernelState(trajectory.position, evaluation)
        log_ratio = proposed.evaluation.log_density - state.evaluation.log_density
        return metropolis(
            log_ndtr(trajectory.spare_noise[0]), log_ratio, proposed, state
        )


@cp.program
def measured(f, y):
    x = cp.sample("x", f)
    cp.observe("y", dist.Normal(x, 0.5), y)


@cp.program
def two(f, g):
    cp.sample("x", f * g)


def overlap(keys: int) -> dict[str, int]:
    """Number of keys under which each of the nine has a finding."""
    found = {}
    for name, scenario in NINE.items():
        density = cp.compile(single, scenario.factor(exact(SCHEDULE)))
        found[name] = sum(bool(density.check(jax.random.key(k))) for k in range(keys))
        print(name, found[name], flush=True)
    return found


def population(density: cp.AnnealedDensity, key: int, n: int) -> cp.Result:
    return cp.infer(density, jax.random.key(key), num_chains=n, progress=False)


def modes(keys: int, n: int = 300) -> tuple[int, int]:
    """Numbers of keys under which a population without the mode of 20 % is named, and a
    right one is."""

    def density(shares: np.ndarray) -> cp.AnnealedDensity:
        parts = dist.Normal(jnp.asarray(CENTRES), 1.0).to_event(1)
        mixture = dist.MixtureSameFamily(dist.Categorical(jnp.asarray(shares)), parts)
        return cp.compile(single, cp.Analytic(mixture, FINE))

    right = density(SHARES)
    wrong = density(np.array([0.5, 0.375, 0.125, 0.0]))
    named = alarms = 0
    for k in range(keys):
        one = population(right, 3 * k, n)
        two = population(right, 3 * k + 1, n)
        three = population(wrong, 3 * k + 2, n)
        named += one.compare(three).status.has("modes_missing")
        alarms += one.compare(two).status.has("modes_missing")
    return named, alarms


def away(x: Array, t: Array, c: Array) -> Array:
    """The noise that N(c, 1) sees, for t = σ/α of variance-preserving levels: a
    stand-in for a network."""
    return (x - c / jnp.sqrt(1 + t**2)) * t / jnp.sqrt(1 + t**2)


def learned(c: float, share: float = 1.0) -> cp.Factor:
    """A stand-in for a learned N(c, 1): its score is ``share`` of the exact one."""

    def network(x: Array, t: Array, c: Array) -> Array:
        return share * away(x, t, c)

    f = cp.Diffusion(
        network,
        FINE,
        event_shape=(2,),
        parameterization="epsilon",
        time="sigma",
        conditions=("c",),
    )
    return f.given(c=jnp.float32(c))


def untrained(keys: int) -> dict[str, int]:
    """Numbers of keys under which products of the zoo, and data far from a learned
    prior, are named."""

    def named(density: cp.AnnealedDensity) -> int:
        runs = (population(density, k, 64) for k in range(keys))
        return sum(run.status.has("out_of_training") for run in runs)

    found = {
        f"data at {far} sd": named(
            cp.compile(measured, learned(0.0), jnp.full(2, far / np.sqrt(2)))
        )
        for far in (3.0, 10.0, 20.0, 30.0)
    }
    found["zoo: ring × bar"] = named(
        cp.compile(two, cp.load("ring2d-score"), cp.load("bar2d-score"), schedule=FINE)
    )
    return found


KERNELS: dict[str, cp.Kernel] = {
    "a kernel without its test": cp.ULA(LONG),
    "without its test, variance a third too large": cp.ULA(STEP),
    "a kernel without Hastings' ratio": NoHastings(STEP),
    "the right kernel": cp.MALA(STEP),
}


def ranked(keys: int, kernel: cp.Kernel) -> int:
    """Number of keys under which ranks show that a kernel is wrong."""
    f = cp.Analytic(dist.Normal(jnp.zeros(8), 1.0), COARSE)
    sampler = cp.AnnealedMCMC(kernel, 3)
    data = jnp.full(8, 0.3)

    def told(key: int) -> bool:
        found = cp.calibrated(
            measured,
            f,
            data,
            key=jax.random.key(key),
            num=SETS,
            sampler=sampler,
            data={"y": "y"},
            progress=False,
        )
        return not found.calibrated

    return sum(map(told, range(keys)))


def residuals() -> dict[str, float]:
    """The largest Fokker–Planck residual over five levels: of a right score, a wrong
    one, and of learned ones."""
    levels = range(2, FINE.num_levels, 6)

    def largest(f: cp.Factor) -> float:
        density = cp.compile(single, f, schedule=FINE)
        x = {"x": jnp.asarray(population(density, 0, 300)["x"][:64])}
        found = [
            cp.metrics.fokker_planck(
                density, noised(density, x, k, jax.random.key(k)), k, jax.random.key(0)
            )
            for k in levels
        ]
        return max(value for each in found for value in each.values())

    found = {
        "a right score": largest(learned(0.0)),
        "half of it": largest(learned(0.0, 0.5)),
    }
    found |= {name: largest(cp.load(name)) for name in ZOO}
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--keys", type=int, help="keys of each row; the numbers are not written"
    )
    asked = parser.parse_args(arguments)
    keys = asked.keys or KEYS
    part = partial(kept, f"trust-{keys}")
    of_nine = part("nine", partial(overlap, keys))
    far = part("untrained", partial(untrained, keys))
    named, alarms = part("modes", partial(modes, keys))
    scores = part("scores", residuals)
    told = {
        name: part(name, partial(ranked, keys, kernel))
        for name, kernel in KERNELS.items()
    }
    wrong = {name: n for name, n in told.items() if name.startswith("a ")}
    right = {name: n for name, n in told.items() if name.startswith("the ")}

    def row(what: str, finding: str, fired: int, should: bool) -> list[str]:
        return [what, finding, f"{fired} of {keys}", "yes" if should else "no"]

    rows = [row(name, "no_overlap", n, name in EMPTY) for name, n in of_nine.items()]
    rows += [row(name, "out_of_training", n, name in FAR) for name, n in far.items()]
    rows += [row("a mode of 20 % missing", "modes_missing", named, True)]
    rows += [row("two right runs", "modes_missing", alarms, False)]
    rows += [row(name, "ranks", n, name not in right) for name, n in told.items()]
    rows += [
        [name, "fokker_planck", f"{value:.2g}", "a number"]
        for name, value in scores.items()
    ]
    few, many = 0.05 * keys, 0.95 * keys
    checks = {
        "both empty compositions are named under every key": all(
            of_nine[name] == keys for name in EMPTY
        ),
        "of the seven others at most 5 % are": all(
            n <= few for m, n in of_nine.items() if m not in EMPTY
        ),
        "data at 20 and 30 sd of a learned prior are named in 95 % of the keys": (
            min(far["data at 20.0 sd"], far["data at 30.0 sd"]) >= many
        ),
        "data at 3 sd, and products of the zoo, in at most 5 %": max(
            far["data at 3.0 sd"], far["zoo: ring × bar"]
        )
        <= few,
        "a missing mode is named in 95 % of the keys, and at most 5 % are false "
        "alarms": (named >= many and alarms <= few),
        "kernels wrong by a factor of 0.57 or 4 are told in 95 % of the keys, the "
        "right one in at most 5 %": (
            min(wrong.values()) >= many and max(right.values()) <= few
        ),
        "a right score has a Fokker–Planck residual below 0.01": scores["a right score"]
        < 0.01,
    }
    columns = ["what", "finding", "fired", "should"]
    details = {
        "nine": of_nine,
        "far": far,
        "modes": [named, alarms],
        "kernels": told,
        "scores": scores,
        "keys": keys,
    }
    notes = (
        "Populations of 300 chains, and of 64 for data far from a prior; ranks over "
        f"{SETS} data sets. Residuals are the largest over levels."
    )
    title = "Misses and false alarms"
    return publish(
        "trust", title, columns, rows, checks, details, notes, write=asked.keys is None
    )


if __name__ == "__main__":
    sys.exit(main())
