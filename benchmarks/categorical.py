"""Categorical sites: random joints by enumeration, and eight queens.

It compares compositions of dependent distributions of six tokens with exact sums over
all 4,096 states, and counts the solutions of eight queens, one token a row.

    python -m benchmarks categorical
    python -m benchmarks categorical --uniform    # the joints under uniform noise

Published code of discrete diffusion adds the logits of factors; a row shows what that
samples. Exits with 1 if a threshold is missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from exact.boards import are_peaceful, peaceful
from exact.case import Answer, Case, share
from report import publish

import composeprob as cp

NUM_VALUES = 4
LENGTH = 6
NUM_CHAINS = 1000
NOISE = cp.Schedule.log_snr(80, min=-7.0, max=14.0)
"""Levels of uniform noise: from .0009 of the tokens kept to all but a millionth. Of
divisors that have states less probable than the noise of level 0 that noise counts."""
PAIRS = 4
"""Pairs of joints for each expression, each sampled with a key of its own."""
STATES = np.array(list(itertools.product(range(NUM_VALUES), repeat=LENGTH)))
QUEENS = 8
SOLUTIONS = 92
BOARDS = 16_384
Network = Callable[[jax.Array, jax.Array], jax.Array]
Density = Callable[[np.ndarray, np.ndarray], cp.AnnealedDensity]
Compose = Callable[[cp.Factor, cp.Factor], cp.Factor]
COLUMNS = (
    "program",
    "method",
    "runs",
    "chains",
    "TV of pairs",
    "floor",
    "TV / floor",
    "log Z within 4 errors",
    "largest |z|",
    "status OK",
    "evaluations",
    "seconds",
)


def joint(seed: int) -> np.ndarray:
    """A joint of six tokens with a random potential for every pair."""
    rng = np.random.default_rng(seed)
    logs = np.zeros(len(STATES))
    for i, j in itertools.combinations(range(LENGTH), 2):
        pair = 1.2 * rng.normal(size=(NUM_VALUES, NUM_VALUES))
        logs += pair[STATES[:, i], STATES[:, j]]
    probs = np.exp(logs - logs.max())
    return probs / probs.sum()


def factor(probs: np.ndarray) -> cp.Factor:
    """The factor of a joint's table."""
    return cp.Analytic.table(probs.reshape((NUM_VALUES,) * LENGTH))


@cp.program
def tokens(f):
    """One site."""
    return cp.sample("s", f)


@cp.program
def clued(f):
    """One site, a token of which is known."""
    s = cp.sample("s", f)
    cp.observe("clue", dist.Delta(s[2]), 1)


@dataclasses.dataclass(frozen=True)
class Composition:
    """A composition of two joints, and its unnormalised probabilities.

    Attributes:
        compose: the expression of two factors.
        exact: its probabilities from those of the two.
        program: what samples it.
    """

    compose: Compose
    exact: Callable[[np.ndarray, np.ndarray], np.ndarray]
    program: cp.Program = tokens


def mixed(a: cp.Factor, b: cp.Factor) -> cp.Factor:
    """(0.3·a + 0.7·b)·b."""
    return cp.mixture([a, b], weights=[0.3, 0.7]) * b


CASES = {
    "a·b": Composition(lambda a, b: a * b, lambda a, b: a * b),
    "a^2": Composition(lambda a, b: a**2.0, lambda a, b: a**2),
    "a/b^0.5": Composition(lambda a, b: a / b**0.5, lambda a, b: a / b**0.5),
    "(0.3·a + 0.7·b)·b": Composition(mixed, lambda a, b: (0.3 * a + 0.7 * b) * b),
    "a^1.5·b^-0.5": Composition(
        lambda a, b: a**1.5 / b**0.5, lambda a, b: a**1.5 / b**0.5
    ),
    "a·b, one token observed": Composition(
        lambda a, b: a * b, lambda a, b: a * b * (STATES[:, 2] == 1), clued
    ),
}


def distance(samples: np.ndarray, target: np.ndarray) -> float:
    """Total variation of the marginals of two tokens, mean over all pairs."""
    distances = []
    for i, j in itertools.combinations(range(LENGTH), 2):
        counts = np.zeros((NUM_VALUES, NUM_VALUES))
        np.add.at(counts, (samples[:, i], samples[:, j]), 1 / len(samples))
        exact = np.zeros((NUM_VALUES, NUM_VALUES))
        np.add.at(exact, (STATES[:, i], STATES[:, j]), target)
        distances.append(0.5 * np.abs(counts - exact).sum())
    return float(np.mean(distances))


def conditional(
    probs: np.ndarray, x: np.ndarray, seen: np.ndarray, i: int
) -> np.ndarray:
    """Probabilities of the values of one token given those that are seen."""
    match = (STATES[:, seen] == x[seen]).all(1)
    row = np.bincount(STATES[match, i], probs[match], NUM_VALUES)
    return row / row.sum()


def logits_added(a: np.ndarray, b: np.ndarray, number: int) -> np.ndarray:
    """Samples of a·b by added logits, in random orders, without weights."""
    rng = np.random.default_rng(0)
    samples = np.zeros((number, LENGTH), int)
    for x in samples:
        seen = np.zeros(LENGTH, bool)
        for i in rng.permutation(LENGTH):
            row = conditional(a, x, seen, i) * conditional(b, x, seen, i)
            x[i] = rng.choice(NUM_VALUES, p=row / row.sum())
            seen[i] = True
    return samples


@dataclasses.dataclass(frozen=True)
class Row:
    """Runs of one program."""

    program: str
    method: str
    runs: int
    chains: int
    distance: float
    floor: float
    scores: tuple[float, ...] = ()
    ok: int = 0
    evaluations: int = 0
    seconds: float = 0.0

    @property
    def within(self) -> int:
        """Number of runs whose log Z lies within four of its errors."""
        return sum(abs(score) <= 4 for score in self.scores)

    @property
    def withheld(self) -> int:
        """Number of runs whose status withholds the error of log Z."""
        return sum(math.isnan(score) for score in self.scores)

    def as_text(self) -> list[str]:
        """The row's cells."""
        cells = [self.program, self.method, str(self.runs), f"{self.chains:,}"]
        cells += [f"{self.distance:.4f}", f"{self.floor:.4f}"]
        cells.append(f"{self.distance / self.floor:.2f}")
        if not self.scores:
            return [*cells, "", "", "", "", ""]
        largest = max(abs(score) for score in self.scores if not math.isnan(score))
        return [
            *cells,
            f"{self.within} of {self.runs}",
            f"{largest:.1f}",
            f"{self.ok} of {self.runs}",
            str(self.evaluations),
            f"{self.seconds:.0f}",
        ]


def tables(
    composition: Composition, a: np.ndarray, b: np.ndarray
) -> cp.AnnealedDensity:
    """The program of the tables of two joints."""
    factors = composition.compose(factor(a), factor(b))
    return cp.compile(composition.program, factors)


def measured(name: str, case: Composition) -> Row:
    """Runs of the default call for one expression."""

    density = functools.partial(tables, case)
    row = over_pairs(name, "cp.infer", case, density)
    print("  ".join(row.as_text()), flush=True)
    return row


def over_pairs(
    name: str,
    method: str,
    case: Composition,
    density_of: Density,
    sampler: cp.Sampler | None = None,
) -> Row:
    """Runs of one expression, for every pair of joints."""
    began = time.monotonic()
    distances = []
    floors = []
    scores = []
    ok = 0
    evaluations = 0
    for pair in range(PAIRS):
        a = joint(1000 + 2 * pair)
        b = joint(1001 + 2 * pair)
        target = case.exact(a, b)
        log_z = np.log(target.sum())
        target = target / target.sum()
        result = cp.infer(
            density_of(a, b),
            jax.random.key(pair),
            num_chains=NUM_CHAINS,
            sampler=sampler,
            progress=False,
        )
        distances.append(distance(np.asarray(result["s"]), target))
        for seed in range(20):
            rng = np.random.default_rng(seed)
            exact = rng.choice(len(STATES), NUM_CHAINS, p=target)
            floors.append(distance(STATES[exact], target))
        error = result.log_evidence_error
        scores.append(float((result.log_evidence - log_z) / error))
        ok += result.status.ok
        evaluations = result.evaluations
    return Row(
        name,
        method,
        PAIRS,
        NUM_CHAINS,
        float(np.mean(distances)),
        float(np.mean(floors)),
        tuple(scores),
        ok,
        evaluations,
        time.monotonic() - began,
    )


def by_added_logits(floor: float) -> Row:
    """Samples of added logits, for the first expression."""
    distances = []
    for pair in range(PAIRS):
        a = joint(1000 + 2 * pair)
        b = joint(1001 + 2 * pair)
        target = a * b / (a * b).sum()
        distances.append(distance(logits_added(a, b, NUM_CHAINS), target))
    mean = float(np.mean(distances))
    return Row("a·b", "logits added, restated", PAIRS, NUM_CHAINS, mean, floor)


def clean_tokens(probs: np.ndarray, output: str = "x0") -> Network:
    """The exact network of a joint under uniform noise: logits of the clean tokens, or
    log-ratios of the neighbours."""
    table = jnp.asarray(probs.reshape((NUM_VALUES,) * LENGTH))

    def log_p(counted: jax.Array) -> jax.Array:
        summed = table
        for position in reversed(range(LENGTH)):
            summed = summed @ counted[position]
        return jnp.log(summed)

    def network(tokens: jax.Array, kept: jax.Array) -> jax.Array:
        own = jnp.arange(NUM_VALUES) == tokens[:, None]
        counted = jnp.where(own, kept, 0.0) + (1 - kept) / NUM_VALUES
        slopes = jax.grad(log_p)(counted)
        if output == "x0":
            return jnp.log(counted * slopes)
        clean = slopes / jnp.sum(slopes, axis=1, keepdims=True)
        here = jnp.log(kept * clean + (1 - kept) / NUM_VALUES)
        return here - jnp.take_along_axis(here, tokens[:, None], axis=1)

    return network


def learned(
    network: Network, output: str = "x0", noise: cp.Schedule = NOISE
) -> cp.Factor:
    """A factor that knows a network alone."""
    return cp.UniformDiffusion(
        network, noise, length=LENGTH, num_values=NUM_VALUES, output=output
    )


def as_networks(
    compose: Compose, a: np.ndarray, b: np.ndarray, noise: cp.Schedule = NOISE
) -> cp.AnnealedDensity:
    """The program of two networks."""
    first = learned(clean_tokens(a), noise=noise)
    second = learned(clean_tokens(b), noise=noise)
    f = compose(first, second)
    return cp.compile(tokens, f)


def noised_joints(compose: Compose, a: np.ndarray, b: np.ndarray) -> cp.AnnealedDensity:
    """The program of two tables under uniform noise."""
    return cp.compile(tokens, compose(factor(a), factor(b)), schedule=NOISE)


def ratios_added(compose: Compose, a: np.ndarray, b: np.ndarray) -> cp.AnnealedDensity:
    """The program of one network whose log-ratios are the sum of those of two, so that
    all weights are 1."""
    first = clean_tokens(a, "ratios")
    second = clean_tokens(b, "ratios")

    def network(tokens: jax.Array, kept: jax.Array) -> jax.Array:
        return first(tokens, kept) + second(tokens, kept)

    return cp.compile(tokens, learned(network, "ratios"))


UNIFORM = {
    "cp.infer, tables under uniform noise": noised_joints,
    "cp.infer, networks of clean tokens": as_networks,
    "log-ratios added, restated": ratios_added,
}


def under_uniform_noise(name: str, method: str) -> Row:
    """Runs of one expression of `CASES` on levels of uniform noise."""
    case = CASES[name]
    sampler = None
    if method.startswith("log-ratios"):
        sampler = cp.TauLeaping(0, 0)

    def density(a: np.ndarray, b: np.ndarray) -> cp.AnnealedDensity:
        return UNIFORM[method](case.compose, a, b)

    row = over_pairs(name, method, case, density, sampler)
    if sampler is not None:
        row = dataclasses.replace(row, scores=())
    print("  ".join(row.as_text()), flush=True)
    return row


def case(name: str, method: str, density: Density) -> Case:
    """The program of the gate of the first pair of joints: the probability that one
    token has one of two values."""

    def exact() -> Answer:
        target = CASES[name].exact(joint(1000), joint(1001))
        total = target.sum()
        low = target[STATES[:, 0] < 2].sum()
        return Answer(float(low / total), math.log(total))

    def compiled() -> cp.AnnealedDensity:
        return density(joint(1000), joint(1001))

    low = share(lambda s: s["s"][0] < 2)
    return Case("categorical", f"{name}, {method}", compiled, low, exact)


def cases() -> list[Case]:
    """The programs of the gate: every expression of tables, networks of uniform noise
    on as many levels as the benchmark has and on fewer, and eight queens."""
    found = []
    for name, composition in CASES.items():
        found.append(case(name, "tables", functools.partial(tables, composition)))
    networks = functools.partial(as_networks, CASES["a·b"].compose)
    found.append(case("a·b", "networks", networks))
    few = cp.Schedule.log_snr(60, min=-7.0, max=14.0)
    quotient = functools.partial(as_networks, CASES["a/b^0.5"].compose, noise=few)
    found.append(case("a/b^0.5", "networks on 60 levels", quotient))
    valid = share(lambda s: peaceful(s["s"]) > -jnp.inf)
    every = Answer(1.0, math.log(SOLUTIONS))
    name = f"{QUEENS} queens among tokens"
    found.append(Case("categorical", name, board, valid, lambda: every))
    return found


def board() -> cp.AnnealedDensity:
    """The density of eight queens."""
    rule = cp.Energy(peaceful, length=QUEENS, num_values=QUEENS)
    return cp.compile(tokens, rule)


def queens() -> tuple[Row, dict[str, float]]:
    """Eight queens by the default call."""
    began = time.monotonic()
    density = board()
    result = cp.infer(density, jax.random.key(0), num_chains=BOARDS, progress=False)
    seconds = time.monotonic() - began
    found = np.asarray(result["s"])
    valid = are_peaceful(found)
    _, counts = np.unique(found[valid], axis=0, return_counts=True)
    shares = np.zeros(SOLUTIONS)
    shares[: len(counts)] = counts / len(found)
    tv = 0.5 * float(np.abs(shares - 1 / SOLUTIONS).sum() + (~valid).mean())
    exact = np.random.default_rng(0).multinomial(
        BOARDS, np.full(SOLUTIONS, 1 / SOLUTIONS), 200
    )
    floor = 0.5 * float(np.abs(exact / BOARDS - 1 / SOLUTIONS).sum(1).mean())
    off = float(result.log_evidence - np.log(SOLUTIONS))
    facts = {
        "solutions": len(counts),
        "valid": float(valid.mean()),
        "log Z off": off,
        "error": float(result.log_evidence_error),
    }
    score = off / facts["error"]
    row = Row(
        f"{QUEENS} queens: {len(counts)} of {SOLUTIONS}, {valid.mean():.0%} valid, "
        f"log Z off by {off:+.3f} ± {facts['error']:.3f}",
        "cp.infer (TV of shares)",
        1,
        BOARDS,
        tv,
        floor,
        (score,),
        int(result.status.ok),
        result.evaluations,
        seconds,
    )
    print("  ".join(row.as_text()), flush=True)
    return row, facts


def uniform_noise() -> int:
    """Run the joints under uniform noise, and publish their table."""
    rows = [under_uniform_noise("a·b", method) for method in UNIFORM]
    networks = list(UNIFORM)[1]
    for name in ("a/b^0.5", "(0.3·a + 0.7·b)·b"):
        rows.append(under_uniform_noise(name, networks))
    ours = [row for row in rows if row.scores]
    ratio = sum(row.distance for row in ours) / sum(row.floor for row in ours)
    checks = {
        "TV at most 1.7 floors": ratio <= 1.7,
        "every log Z within four errors, or without one": all(
            row.within + row.withheld == row.runs for row in ours
        ),
        "every status OK": all(row.ok == row.runs for row in ours),
    }
    notes = (
        f"The joints of `python -m benchmarks categorical`, on {NOISE.num_levels} "
        "levels of uniform noise. Networks are exact and know no log-density: they "
        "return the clean token of each position, from the joint's table. Published "
        "code of discrete diffusion adds the log-ratios of models, as the restated row "
        f"does, without weights. Over all other rows TV / floor is {ratio:.2f}."
    )
    return publish(
        "categorical_uniform",
        "Categorical sites under uniform noise: compositions of joints",
        COLUMNS,
        [row.as_text() for row in rows],
        checks,
        {"rows": [dataclasses.asdict(row) for row in rows], "ratio": ratio},
        notes,
    )


def main() -> int:
    """Run all, and publish the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--uniform", action="store_true", help="under uniform noise")
    if parser.parse_args().uniform:
        return uniform_noise()
    rows = [measured(name, case) for name, case in CASES.items()]
    ratio = sum(row.distance for row in rows) / sum(row.floor for row in rows)
    within = sum(row.within for row in rows)
    ok = sum(row.ok for row in rows)
    runs = sum(row.runs for row in rows)
    added = by_added_logits(rows[0].floor)
    last, facts = queens()
    checks = {
        "joints: TV at most 1.7 floors": ratio <= 1.7,
        "joints: every log Z within four errors": within == runs,
        "joints: every status OK": ok == runs,
        "8 queens: all 92 solutions": facts["solutions"] == SOLUTIONS,
        "8 queens: every board is a solution": facts["valid"] == 1.0,
        "8 queens: log Z within 0.2": abs(facts["log Z off"]) <= 0.2,
    }
    notes = (
        f"Joints of {LENGTH} tokens of {NUM_VALUES} values with random potentials of "
        "all pairs, as tables; exact values are sums over all states. TV is that of "
        "the marginals of two tokens, mean over pairs of positions; the floor is that "
        "of as many exact draws. Of queens it is that of the shares of the solutions: "
        "their samples descend from few ancestors, as one token cannot move in a "
        "solution. Evaluations are those of each factor, a chain. Seconds include "
        f"compilation. Over all joints TV / floor is {ratio:.2f}."
    )
    details = {
        "rows": [dataclasses.asdict(row) for row in (*rows, added, last)],
        "queens": facts,
        "ratio": ratio,
    }
    return publish(
        "categorical",
        "Categorical sites: compositions of joints, and eight queens",
        COLUMNS,
        [row.as_text() for row in (*rows, added, last)],
        checks,
        details,
        notes,
    )


if __name__ == "__main__":
    sys.exit(main())
