"""Categorical sites: random joints by enumeration, and eight queens.

It compares compositions of dependent distributions of six tokens with exact sums over
all 4,096 states, and counts the solutions of eight queens, one token a row.

    python -m benchmarks categorical

Published code of discrete diffusion adds the logits of factors; a row shows what that
samples. Exits with 1 if a threshold is missed.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from report import publish

import composeprob as cp

NUM_VALUES = 4
LENGTH = 6
NUM_CHAINS = 1000
PAIRS = 4
"""Pairs of joints for each expression, each sampled with a key of its own."""
STATES = np.array(list(itertools.product(range(NUM_VALUES), repeat=LENGTH)))
QUEENS = 8
SOLUTIONS = 92
BOARDS = 16_384
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
class Case:
    """A composition of two joints, and its unnormalised probabilities.

    Attributes:
        compose: the expression of two factors.
        exact: its probabilities from those of the two.
        program: what samples it.
    """

    compose: Callable[[cp.Factor, cp.Factor], cp.Factor]
    exact: Callable[[np.ndarray, np.ndarray], np.ndarray]
    program: cp.Program = tokens


def mixed(a: cp.Factor, b: cp.Factor) -> cp.Factor:
    """(0.3·a + 0.7·b)·b."""
    return cp.mixture([a, b], weights=[0.3, 0.7]) * b


CASES = {
    "a·b": Case(lambda a, b: a * b, lambda a, b: a * b),
    "a^2": Case(lambda a, b: a**2.0, lambda a, b: a**2),
    "a/b^0.5": Case(lambda a, b: a / b**0.5, lambda a, b: a / b**0.5),
    "(0.3·a + 0.7·b)·b": Case(mixed, lambda a, b: (0.3 * a + 0.7 * b) * b),
    "a^1.5·b^-0.5": Case(lambda a, b: a**1.5 / b**0.5, lambda a, b: a**1.5 / b**0.5),
    "a·b, one token observed": Case(
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

    def as_text(self) -> list[str]:
        """The row's cells."""
        cells = [self.program, self.method, str(self.runs), f"{self.chains:,}"]
        cells += [f"{self.distance:.4f}", f"{self.floor:.4f}"]
        cells.append(f"{self.distance / self.floor:.2f}")
        if not self.scores:
            return [*cells, "", "", "", "", ""]
        largest = max(abs(score) for score in self.scores)
        return [
            *cells,
            f"{self.within} of {self.runs}",
            f"{largest:.1f}",
            f"{self.ok} of {self.runs}",
            str(self.evaluations),
            f"{self.seconds:.0f}",
        ]


def measured(name: str, case: Case) -> Row:
    """Runs of the default call for one expression."""
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
        density = cp.compile(case.program, case.compose(factor(a), factor(b)))
        result = cp.infer(
            density, jax.random.key(pair), num_chains=NUM_CHAINS, progress=False
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
    row = Row(
        name,
        "cp.infer",
        PAIRS,
        NUM_CHAINS,
        float(np.mean(distances)),
        float(np.mean(floors)),
        tuple(scores),
        ok,
        evaluations,
        time.monotonic() - began,
    )
    print("  ".join(row.as_text()), flush=True)
    return row


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


def board(tokens: jax.Array, visible: jax.Array) -> jax.Array:
    """0 where no two of the visible queens attack one another, else −∞."""
    i, j = np.triu_indices(QUEENS, 1)
    apart = jnp.abs(tokens[i] - tokens[j])
    attack = (apart == 0) | (apart == j - i)
    return jnp.where(jnp.any(attack & visible[i] & visible[j]), -jnp.inf, 0.0)


def queens() -> tuple[Row, dict[str, float]]:
    """Eight queens by the default call."""
    began = time.monotonic()
    rule = cp.Energy(board, length=QUEENS, num_values=QUEENS)
    density = cp.compile(tokens, rule)
    result = cp.infer(density, jax.random.key(0), num_chains=BOARDS, progress=False)
    seconds = time.monotonic() - began
    boards = np.asarray(result["s"])
    lines = np.arange(QUEENS)
    different = [
        np.array([len(set(row)) == QUEENS for row in rows])
        for rows in (boards, boards + lines, boards - lines)
    ]
    valid = np.logical_and.reduce(different)
    _, counts = np.unique(boards[valid], axis=0, return_counts=True)
    shares = np.zeros(SOLUTIONS)
    shares[: len(counts)] = counts / len(boards)
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


def main() -> int:
    """Run all, and publish the table."""
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
