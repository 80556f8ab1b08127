"""Trajectories of noisy Lorenz-63 given one number of each state: SDA's protocol.

    python -m benchmarks trajectories [--chains 4096] [--trajectories 4] [--train]
    python -m benchmarks trajectories --sda …    # beside SDA's own sampler

The protocol of Rozet and Louppe 2023, *Score-based data assimilation*: 65 states, 0.025
units of time apart, with noise of variance 0.025 in each step; the first number alone
is seen, at every eighth state with a standard deviation of 0.05 ("lo"), or at every
state with 0.25 ("hi"), in units of 8. A forecast and a diffusion factor given it learn
the transition from pairs of states, without the equations; `Result.extend` goes on with
one state after another, and each chain's path is that of its ancestors.

The distance is W₁ between 1,024 paths, 195 numbers each, and 1,024 paths of a particle
filter of 16,384 that knows the equations; its floor is that distance for a second
particle filter. Runs by `Result.extend` are kept in out/, so that the same command goes
on where it was stopped.
"""

from __future__ import annotations

import argparse
import time
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from filters import windows
from filters.learned import Pairs, Transition, transition
from filters.lorenz import noised, short_flow
from filters.particles import path_filter
from jax import Array
from report import kept, publish
from scipy.optimize import linear_sum_assignment
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

import composeprob as cp

NOISE = 0.025**0.5
"""Standard deviation of each step's noise."""

STATES = 65
AGE = 72
"""States of a trajectory, and steps before its first one."""

UNIT = 8.0
"""Standard deviations of observations are in these units."""

CENTRE = jnp.array([0.0, 0.0, 25.0])
SPREAD = jnp.array([8.0, 9.0, 8.6])
"""The law where trajectories begin, before they age."""

PAIRS = 100_000
WIDTH = 64
ITERATIONS = 8_000
LEVELS = cp.Schedule.log_snr(20, -10.0, 7.0)
WEIGHTS = Path(__file__).parent / "filters" / "lorenz-63-short.safetensors"

UNITS = windows.Units(CENTRE, UNIT, NOISE)
WINDOWS = WEIGHTS.with_name("lorenz-63-windows.safetensors")
WINDOW_WIDTH = 128
WINDOW_ITERATIONS = 15_000
"""Units, weights, width and training of the network of windows."""

SDA_PATHS = 64
SDA_STEPS = 256
CORRECTIONS = (0, 1, 16)
"""Paths, steps and Langevin corrections of SDA's sampler."""

PARTICLES = 16_384
COMPARED = 1_024
"""Particles of the filters by the equations, and paths that are compared."""


class Protocol(NamedTuple):
    """Observations of the first number at every ``every``-th state."""

    name: str
    every: int
    width: float

    def sees(self, state: int) -> bool:
        return state % self.every == 0


PROTOCOLS = (Protocol("lo", 8, 0.05 * UNIT), Protocol("hi", 1, 0.25 * UNIT))


def after(key: Array, x: Array) -> Array:
    """Draw the states after x."""
    return noised(key, short_flow(x), NOISE)


def aged(key: Array, number: int) -> Array:
    """Draw first states of trajectories."""
    first_key, key = jax.random.split(key)
    x = noised(first_key, jnp.broadcast_to(CENTRE, (number, 3)), SPREAD)
    return jax.lax.fori_loop(
        0, AGE, lambda i, x: after(jax.random.fold_in(key, i), x), x
    )


def pairs() -> Pairs:
    """Return states, and states after them: half of old trajectories, half of younger
    ones, down to none."""
    keys = jax.random.split(jax.random.key(0), AGE + 4)
    x = noised(keys[0], jnp.broadcast_to(CENTRE, (PAIRS, 3)), SPREAD)
    oldest = jax.random.randint(keys[1], (PAIRS,), 0, AGE)
    oldest = jnp.where(jnp.arange(PAIRS) % 2 == 0, AGE, oldest)
    for step in range(AGE):
        ages = (step < oldest)[:, None]
        x = jnp.where(ages, after(keys[4 + step], x), x)
    before = noised(keys[2], x, 0.3)
    return Pairs(before, after(keys[3], before))


@cp.program
def first() -> None:
    law = dist.Normal(CENTRE, SPREAD).to_event(1)
    cp.sample("x", cp.Analytic(law, cp.Schedule.log_snr(40)))


def steps_of(known: Transition) -> tuple[Any, Any]:
    """Return the programs of a step without a datum, and of one with."""

    def moved() -> Any:
        past = cp.sample("past", dist.Normal(0.0, 10.0).expand([3]).to_event(1))
        return cp.sample("x", known.factor.given(forecast=known.forecast(past)))

    @cp.program
    def forecast() -> None:
        moved()

    @cp.program
    def seen(y: Any, width: Any) -> None:
        x = moved()
        cp.observe("y", dist.Normal(x[0], width), y, anneal="tempered")

    return forecast, seen


def extended(result: Any, density: Any, seed: int) -> Any:
    """Go on by one state."""
    given = {"past": "x"}
    return result.extend(density, jax.random.key(seed), given=given, keep=5)


def started(forecast: Any, chains: int) -> Any:
    """Return the result of the last state before the first that is seen."""
    density = cp.compile(first)
    key = jax.random.key(0)
    result = cp.infer(density, key, num_chains=chains, progress=False)
    density = cp.compile(forecast, schedule=LEVELS)
    for step in range(AGE - 1):
        result = extended(result, density, step)
    return result


class Run(NamedTuple):
    """Paths by `Result.extend`, (1024, 65, 3), and what it says."""

    paths: np.ndarray
    log_evidence: float
    stated: float
    seconds: float


def by_extension(
    result: Any, forecast: Any, seen: Any, protocol: Protocol, y: np.ndarray, seed: int
) -> Run:
    """Go on from the state before the first, and trace each chain's ancestors."""
    began = time.monotonic()
    begun = result.log_evidence
    unseen = cp.compile(forecast, schedule=LEVELS)
    states: list[np.ndarray] = []
    parents: list[np.ndarray] = []
    for state in range(STATES):
        density = unseen
        if protocol.sees(state):
            density = cp.compile(seen, y[state], protocol.width, schedule=LEVELS)
        result = extended(result, density, 1000 * seed + state)
        if states:
            _, parent = cKDTree(states[-1]).query(result["past"])
            parents.append(parent)
        # As statements see it, in which `past` is given.
        states.append(result["x"] / float(density.schedule.at(0).alpha))
    weights = np.exp(result.log_weights - result.log_weights.max())
    rng = np.random.default_rng(seed)
    chains = rng.choice(len(weights), COMPARED, p=weights / weights.sum())
    path = [states[-1][chains]]
    for before, parent in zip(states[-2::-1], parents[::-1], strict=True):
        chains = parent[chains]
        path.append(before[chains])
    return Run(
        np.stack(path[::-1], axis=1),
        float(result.log_evidence - begun),
        float(result.log_evidence_error),
        time.monotonic() - began,
    )


def window_states() -> Array:
    """Draw windows of states of old trajectories."""
    path = [aged(jax.random.key(31), PAIRS)]
    for state in range(windows.LENGTH - 1):
        key = jax.random.fold_in(jax.random.key(32), state)
        path.append(after(key, path[-1]))
    return jnp.stack(path, axis=1)


def by_sda(
    network: windows.Windows,
    protocol: Protocol,
    y: np.ndarray,
    corrections: int,
    seed: int,
) -> np.ndarray:
    """Draw paths by SDA's sampler."""
    places = np.arange(0, STATES, protocol.every)
    data = (jnp.asarray(y)[places] - CENTRE[0]) / UNIT
    seen = windows.Seen(jnp.asarray(places), data, protocol.width / UNIT)
    key = jax.random.key(seed)
    paths = windows.sda(network, seen, STATES, SDA_PATHS, SDA_STEPS, corrections, key)
    return np.asarray(UNITS.states(paths))


class Reference(NamedTuple):
    """Paths of a particle filter that knows the equations."""

    paths: np.ndarray
    log_evidence: float


def by_equations(
    protocol: Protocol, y: np.ndarray, particles: int, seed: int
) -> Reference:
    """Draw paths by a particle filter."""
    key, first_key = jax.random.split(jax.random.key(seed))
    number = np.arange(STATES)
    data = jnp.stack([jnp.asarray(y), number % protocol.every == 0], axis=1)

    def log_likelihoods(x: Array, datum: Array) -> Array:
        law = dist.Normal(x[:, 0], protocol.width)
        return datum[1] * law.log_prob(datum[0])

    paths = path_filter(log_likelihoods, data, aged(first_key, particles), after, key)
    chosen = np.random.default_rng(seed).choice(particles, COMPARED, replace=False)
    return Reference(paths.states[chosen], paths.log_evidence)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Return W₁ between two sets of as many paths."""
    cost = cdist(one.reshape(len(one), -1), other.reshape(len(other), -1))
    chosen = linear_sum_assignment(cost)
    return float(cost[chosen].mean())


def observed(protocol: Protocol, seed: int) -> np.ndarray:
    """Draw a trajectory, and what is seen of it; other states' entries do not count."""
    key = jax.random.fold_in(jax.random.key(2023), seed)
    first_key, noise_key, key = jax.random.split(key, 3)
    x = aged(first_key, 1)[0]
    path = [x]
    for state in range(1, STATES):
        path.append(after(jax.random.fold_in(key, state), path[-1]))
    return np.asarray(noised(noise_key, jnp.stack(path)[:, 0], protocol.width))


class Begun(NamedTuple):
    """Programs of a step, and the result of the last state before a trajectory."""

    forecast: Any
    seen: Any
    result: Any


@cache
def begun(chains: int) -> Begun:
    """Learn the transition, and go on to the first state."""
    known = transition(pairs, LEVELS, WIDTH, ITERATIONS, WEIGHTS)
    forecast, seen = steps_of(known)
    return Begun(forecast, seen, started(forecast, chains))


def few(paths: np.ndarray, protocol: Protocol, y: np.ndarray, seed: int) -> float:
    """Return W₁ of `SDA_PATHS` paths to as many of a particle filter's."""
    reference = by_equations(protocol, y, PARTICLES, 2 * seed)
    return distance(paths[:SDA_PATHS], reference.paths[:SDA_PATHS])


def of_few_extended(protocol: Protocol, seed: int, chains: int) -> dict[str, Any]:
    """Measure the floor and `Result.extend` by `SDA_PATHS` paths."""
    y = observed(protocol, seed)
    forecast, seen, result = begun(chains)
    run = by_extension(result, forecast, seen, protocol, y, seed)
    second = by_equations(protocol, y, PARTICLES, 2 * seed + 1)
    return {
        "floor": few(second.paths, protocol, y, seed),
        "extend": few(run.paths, protocol, y, seed),
        "seconds": run.seconds,
    }


def of_few_by_sda(protocol: Protocol, seed: int, corrections: int) -> dict[str, Any]:
    """Measure SDA's sampler."""
    known = transition(pairs, LEVELS, WIDTH, ITERATIONS, WEIGHTS)
    network = windows.windows(
        window_states, known.forecast, UNITS, WINDOW_WIDTH, WINDOW_ITERATIONS, WINDOWS
    )
    y = observed(protocol, seed)
    began = time.monotonic()
    paths = by_sda(network, protocol, y, corrections, seed)
    seconds = time.monotonic() - began
    foretold = np.asarray(short_flow(jnp.asarray(paths[:, :-1])))
    return {
        "W1": few(paths, protocol, y, seed),
        "noise": float(np.sqrt(np.mean((paths[:, 1:] - foretold) ** 2))),
        "seconds": seconds,
    }


def beside_sda(options: argparse.Namespace) -> int:
    """Measure SDA's sampler and `Result.extend` by few paths, and publish a table."""
    rows = []
    found: dict[str, Any] = {}
    ratios = []
    for protocol in PROTOCOLS:
        for seed in range(options.trajectories):
            name = f"{protocol.name}, trajectory {seed}"
            run = partial(of_few_extended, protocol, seed, options.chains)
            part = f"{protocol.name} {seed} {options.chains} paths {SDA_PATHS}"
            ours = kept("trajectories", part, run)
            row = [name, f"{ours['floor']:.2f}", f"{ours['extend']:.2f}"]
            ratios.append(ours["extend"] / ours["floor"])
            found[name] = {"extend": ours}
            for corrections in CORRECTIONS:
                run = partial(of_few_by_sda, protocol, seed, corrections)
                part = f"sda {protocol.name} {seed} {SDA_STEPS} {corrections}"
                theirs = kept("trajectories", part, run)
                row += [f"{theirs['W1']:.2f}", f"{theirs['noise']:.2f}"]
                found[name][f"SDA, {corrections} corrections"] = theirs
            rows.append(row)
            print("  ".join(row), flush=True)
    mean = float(np.mean(ratios))
    checks = {
        f"W₁ of extend at most 1.25 times the floor on average ({mean:.2f})": (
            mean <= 1.25
        )
    }
    notes = (
        f"W₁ of {SDA_PATHS} paths to as many of a particle filter of {PARTICLES:,} by "
        "the equations: of a second such filter (the floor), of `Result.extend` with "
        f"{options.chains:,} chains, and of SDA's sampler, restated, in {SDA_STEPS} "
        "steps with so many Langevin corrections after each, of size "
        f"{windows.SIZE}, under a network of windows of {windows.LENGTH} states. "
        "Beside it, the root mean square of each state less the flow of the state "
        f"before, which is {NOISE:.3f} in the data. "
        "SDA's paper has as many steps and corrections, another network, 64 "
        "trajectories, and its W₁ in figures alone."
    )
    columns = ["data", "floor", "extend"]
    for corrections in CORRECTIONS:
        columns += [f"SDA, {corrections} corrections", "its noise"]
    title = "Trajectories of noisy Lorenz-63 by SDA's sampler"
    return publish("trajectories_sda", title, columns, rows, checks, found, notes)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chains", type=int, default=4096)
    parser.add_argument("--trajectories", type=int, default=4)
    parser.add_argument("--train", action="store_true", help="write new weights")
    parser.add_argument("--sda", action="store_true", help="beside SDA's sampler")
    options = parser.parse_args()
    if options.train:
        WEIGHTS.unlink(missing_ok=True)
        if options.sda:
            WINDOWS.unlink(missing_ok=True)
    if options.sda:
        return beside_sda(options)
    forecast, seen, result = begun(options.chains)

    rows = []
    found: dict[str, Any] = {}
    ratios = []
    for protocol in PROTOCOLS:
        for seed in range(options.trajectories):
            y = observed(protocol, seed)
            run = by_extension(result, forecast, seen, protocol, y, seed)
            reference = by_equations(protocol, y, PARTICLES, 2 * seed)
            second = by_equations(protocol, y, PARTICLES, 2 * seed + 1)
            fewer = by_equations(protocol, y, options.chains, 1000 + seed)
            floor = distance(second.paths, reference.paths)
            ours = distance(run.paths, reference.paths)
            theirs = distance(fewer.paths, reference.paths)
            away = run.log_evidence - reference.log_evidence
            apart = second.log_evidence - reference.log_evidence
            ratios.append(ours / floor)
            name = f"{protocol.name}, trajectory {seed}"
            found[name] = {
                "floor": floor,
                "as many particles": theirs,
                "extend": ours,
                "log-evidence": away,
                "stated": run.stated,
                "seconds": run.seconds,
            }
            row = [name, f"{floor:.2f}", f"{theirs:.2f}", f"{ours:.2f}"]
            row += [f"{ours / floor:.2f}", f"{apart:+.2f}", f"{away:+.2f}"]
            rows.append(row)
            print("  ".join(row), flush=True)

    mean = float(np.mean(ratios))
    furthest = max(abs(each["log-evidence"]) for each in found.values())
    checks = {
        f"W₁ at most 1.25 times the floor on average ({mean:.2f})": mean <= 1.25,
        f"log-evidence within 1 of 16,384 particles' ({furthest:.2f})": furthest <= 1,
    }
    notes = (
        f"W₁ of {COMPARED:,} paths to those of a particle filter of {PARTICLES:,} by "
        f"the equations: of a second such filter (the floor), of one of "
        f"{options.chains:,}, and of `Result.extend` with {options.chains:,} chains "
        "and a learned transition. The log-evidence is less that of the first filter, "
        "of the second filter and of ours. SDA's paper shows W₁ of its own samplers "
        "in figures alone; `--sda` restates one."
    )
    columns = [
        "data",
        "floor",
        f"particles, {options.chains:,}",
        "extend",
        "over floor",
        "log-evidence, floor",
        "log-evidence, extend",
    ]
    title = "Trajectories of noisy Lorenz-63 given one number of each state"
    return publish("trajectories", title, columns, rows, checks, found, notes)


if __name__ == "__main__":
    raise SystemExit(main())
