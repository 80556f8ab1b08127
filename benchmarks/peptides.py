"""Peptides that are AND are not like others: two trained models beside brute force.

Three residues of magainin 2, an antimicrobial peptide, are hidden, and the others are
given to the zoo's two masked networks of peptides. All 9,261 ways to fill the gap in
all six orders are summed.

    python -m benchmarks peptides

Exits with 1 if a threshold is missed.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from report import publish
from scipy.special import logsumexp

import composeprob as cp
from composeprob.models.worlds import peptides

MAGAININ = "GIGKFLHSAKKFGKAFVGEIMNS"
GAP = (4, 8, 14)
"""Positions of the hidden residues."""
NUM_CHAINS = 400
KEYS = 3
NUM_VALUES = peptides.NUM_VALUES
STATES = np.array(list(itertools.product(range(NUM_VALUES), repeat=len(GAP))))
PAIRS = list(itertools.combinations(range(len(GAP)), 2))
POWERS = {"AND: a·u": (1.0, 1.0), "NOT: a·u^-0.5": (1.0, -0.5)}
COLUMNS = (
    "gap of magainin 2",
    "method",
    "runs",
    "chains",
    "TV of pairs",
    "floor",
    "TV / floor",
    "log Z, exact",
    "log Z off, in errors",
    "status OK",
    "evaluations",
    "seconds a run",
)


class Gap:
    """Logits of the hidden residues of the peptide, by a network of all of it."""

    def __init__(self, network):
        self.network = network

    def __call__(self, tokens, visible):
        gap = jnp.array(GAP)
        whole = jnp.asarray(peptides.encode(MAGAININ)).at[gap].set(tokens)
        known = jnp.ones(peptides.LENGTH, bool).at[gap].set(visible)
        return self.network(jnp.where(known, whole, 0), known)[gap]


def factor(name: str) -> cp.MaskedDiffusion:
    """A model of the zoo, of the residues in the gap."""
    model = cp.load(name)
    return cp.MaskedDiffusion(
        Gap(model.network),
        length=len(GAP),
        num_values=NUM_VALUES,
        mask="boolean",
        label=name.removeprefix("peptides-"),
    )


def conditionals(network: Gap) -> dict[tuple[int, ...], np.ndarray]:
    """Log-probabilities of all residues of the gap for every state, by the positions
    that are visible."""
    every = jax.jit(jax.vmap(network, (0, None)))
    found = {}
    for number in range(len(GAP)):
        for known in itertools.combinations(range(len(GAP)), number):
            values = itertools.product(range(NUM_VALUES), repeat=number)
            events = np.zeros((NUM_VALUES**number, len(GAP)), int)
            events[:, list(known)] = list(values)
            visible = np.isin(np.arange(len(GAP)), known)
            logits = every(jnp.asarray(events), jnp.asarray(visible))
            logs = np.asarray(jax.nn.log_softmax(logits), float)
            place = np.zeros(len(STATES), int)
            for position in known:
                place = place * NUM_VALUES + STATES[:, position]
            found[known] = logs[place]
    return found


def of_order(powers: tuple[float, ...], tables: list, order: tuple[int, ...]):
    """Yield, for each position in turn, the weighted sums of log-probabilities of its
    residues, (states, values), and those of the state's own."""
    every = np.arange(len(STATES))
    for place, position in enumerate(order):
        visible = tuple(sorted(order[:place]))
        logs = np.zeros((len(STATES), NUM_VALUES))
        for power, table in zip(powers, tables, strict=True):
            logs += power * table[visible][every, position]
        yield logs, logs[every, STATES[:, position]]


def laws(powers: tuple[float, ...], factors: list) -> tuple[np.ndarray, np.ndarray]:
    """Exact laws, for every state, as averages over orders: the unnormalised product,
    and what weighted sums of logits draw, which normalise each step by itself."""
    tables = [conditionals(factor.network) for factor in factors]
    product = np.zeros(len(STATES))
    added = np.zeros(len(STATES))
    orders = list(itertools.permutations(range(len(GAP))))
    for order in orders:
        log_product = np.zeros(len(STATES))
        log_added = np.zeros(len(STATES))
        for logs, own in of_order(powers, tables, order):
            log_product += own
            log_added += own - logsumexp(logs, axis=1)
        product += np.exp(log_product) / len(orders)
        added += np.exp(log_added) / len(orders)
    return product, added


def pairs_of(states: np.ndarray, weights: np.ndarray) -> list[np.ndarray]:
    """Marginals of two residues, for each pair."""
    marginals = []
    for i, j in PAIRS:
        marginal = np.zeros((NUM_VALUES, NUM_VALUES))
        np.add.at(marginal, (states[:, i], states[:, j]), weights)
        marginals.append(marginal)
    return marginals


def distance(found: list[np.ndarray], exact: list[np.ndarray]) -> float:
    """Total variation of the marginals of two residues, mean over pairs."""
    differences = [np.abs(f - e).sum() for f, e in zip(found, exact, strict=True)]
    return 0.5 * float(np.mean(differences))


def of_samples(samples: np.ndarray) -> list[np.ndarray]:
    """Marginals of two residues in equally weighted samples."""
    return pairs_of(samples, np.full(len(samples), 1 / len(samples)))


@dataclasses.dataclass(frozen=True)
class Row:
    """Samples of one expression by one method."""

    program: str
    method: str
    distance: float
    floor: float
    log_z: float
    runs: int = 1
    scores: tuple[float, ...] = ()
    ok: int = 0
    evaluations: int = 0
    seconds: float = 0.0

    def as_text(self) -> list[str]:
        """The row's cells."""
        if not self.scores:
            blank = [""] * 4
            cells = [self.program, self.method, "", "", f"{self.distance:.3f}", "0", ""]
            return [*cells, f"{self.log_z:.3f}", *blank]
        return [
            self.program,
            self.method,
            str(self.runs),
            f"{NUM_CHAINS:,}",
            f"{self.distance:.3f}",
            f"{self.floor:.3f}",
            f"{self.distance / self.floor:.2f}",
            f"{self.log_z:.3f}",
            ", ".join(f"{score:+.1f}" for score in self.scores),
            f"{self.ok} of {self.runs}",
            str(self.evaluations),
            f"{self.seconds:.0f}",
        ]


@cp.program
def gap(product):
    """The hidden residues."""
    cp.sample("s", product)


def measured(name: str, factors: list) -> list[Row]:
    """The rows of one expression."""
    powers = POWERS[name]
    product, added = laws(powers, factors)
    log_z = float(np.log(product.sum()))
    target = product / product.sum()
    exact = pairs_of(STATES, target)
    floors = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        drawn = rng.choice(len(STATES), NUM_CHAINS, p=target)
        floors.append(distance(of_samples(STATES[drawn]), exact))
    floor = float(np.mean(floors))
    parts = [f**power for f, power in zip(factors, powers, strict=True)]
    density = cp.compile(gap, cp.product(*parts))
    distances = []
    scores = []
    ok = 0
    began = time.monotonic()
    for seed in range(KEYS):
        result = cp.infer(
            density, jax.random.key(seed), num_chains=NUM_CHAINS, progress=False
        )
        distances.append(distance(of_samples(np.asarray(result["s"])), exact))
        error = result.log_evidence_error
        scores.append(float((result.log_evidence - log_z) / error))
        ok += result.status.ok
    seconds = (time.monotonic() - began) / KEYS
    ours = Row(
        name,
        "cp.infer",
        float(np.mean(distances)),
        floor,
        log_z,
        KEYS,
        tuple(scores),
        ok,
        result.evaluations,
        seconds,
    )
    without = Row(
        name,
        "logits added, restated: the exact law",
        distance(pairs_of(STATES, added), exact),
        0.0,
        log_z,
    )
    for row in (ours, without):
        print("  ".join(row.as_text()), flush=True)
    return [ours, without]


def main() -> int:
    """Run all, and publish the table."""
    factors = [factor("peptides-antimicrobial"), factor("peptides-uniprot")]
    rows = []
    checks = {}
    for name in POWERS:
        exact, without = measured(name, factors)
        rows += [exact, without]
        checks[f"{name}: TV at most 1.7 floors"] = exact.distance <= 1.7 * exact.floor
        near = max(map(abs, exact.scores)) <= 4
        checks[f"{name}: every log Z within four errors"] = near
        checks[f"{name}: every status OK"] = exact.ok == exact.runs
    notes = (
        "a is the zoo's model of antimicrobial peptides, u that of others. The law of "
        "three hidden residues is an average over the six orders in which they may "
        "become visible, and exact values are sums over these and all 9,261 states. TV "
        "is that of the marginals of two residues, mean over pairs; the floor is that "
        "of as many exact draws. What added logits draw is enumerated, so that its "
        "distance has no noise. Evaluations are those of each network, a chain. "
        "Seconds include compilation."
    )
    return publish(
        "peptides",
        "Peptides: AND and NOT of two models, by brute force",
        list(COLUMNS),
        [row.as_text() for row in rows],
        checks,
        {"rows": [dataclasses.asdict(row) for row in rows]},
        notes,
    )


if __name__ == "__main__":
    sys.exit(main())
