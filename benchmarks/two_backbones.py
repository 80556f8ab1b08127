"""One sequence for two backbones and not a third, by ProteinMPNN.

    python -m benchmarks two-backbones FOLDER
    python -m benchmarks two-backbones FOLDER --picture docs/_static/two-backbones.png

FOLDER has the weights v_48_020, as `tools/convert_proteinmpnn.py` writes them. The
backbones are an ideal α helix, β strand and polyproline II helix of 12 residues. Rows:
logits averaged, which is what is done today; the best of as many averaged samples as
take the same number of network evaluations; logits added; and `cp.infer`. Each sequence
is scored by its log-probability under each backbone alone, in an order of its own that
had no part in making it. Exits with 1 if a threshold is missed. With ``--picture``
nothing is recorded: sequences for two backbones are drawn, for the site's first page.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from report import publish

import composeprob as cp
from composeprob.pretrained.backbone import HELIX, POLYPROLINE, STRAND, ideal

LENGTH = 12
NUM_CHAINS = 64
NEGATIVE = 0.5
"""Power of the third backbone, whose sequences are avoided."""
BACKBONES = {"helix": HELIX, "strand": STRAND, "polyproline": POLYPROLINE}
COLUMNS = (
    "sequences for",
    "method",
    "evaluations",
    *(f"log p, {name}" for name in BACKBONES),
    "objective",
    "spread",
    "ancestors",
    "log Z",
    "status",
    "seconds",
)

Logits = Callable[[jax.Array, jax.Array], jax.Array]
"""Log-probabilities of every position under each backbone, (backbones, length, 21)."""


@dataclasses.dataclass(frozen=True)
class Task:
    """Aim of the sequences: the power of each backbone."""

    name: str
    powers: tuple[float, float, float]

    def objective(self, log_probs: np.ndarray) -> np.ndarray:
        """Σ powers·log p of sequences."""
        return log_probs @ np.array(self.powers)


TWO = Task("helix and strand", (1.0, 1.0, 0.0))
NOT_THIRD = Task("helix and strand, not polyproline", (1.0, 1.0, -NEGATIVE))


@dataclasses.dataclass(frozen=True)
class Row:
    """Sequences by one method.

    Attributes:
        log_probs: the mean of log p under each backbone.
        objective, spread: mean and standard deviation of the objective.
        evaluations: of each network, for a sequence.
    """

    task: str
    method: str
    evaluations: int
    log_probs: list[float]
    objective: float
    spread: float
    seconds: float
    ancestors: float | None = None
    log_evidence: float | None = None
    error: float | None = None
    status: str = ""
    sequences: tuple[str, ...] = ()

    def as_text(self) -> list[str]:
        """The row's cells."""
        ancestors = ""
        evidence = ""
        if self.ancestors is not None:
            ancestors = f"{self.ancestors:.0f}"
            evidence = f"{self.log_evidence:.2f} ± {self.error:.2f}"
        return [
            self.task,
            self.method,
            str(self.evaluations),
            *(f"{value:.1f}" for value in self.log_probs),
            f"{self.objective:.1f}",
            f"{self.spread:.1f}",
            ancestors,
            evidence,
            self.status,
            f"{self.seconds:.0f}",
        ]


@dataclasses.dataclass(frozen=True)
class Design:
    """A model, and the logits of the three backbones."""

    model: cp.MaskedDiffusion

    @property
    def factors(self) -> list[cp.Factor]:
        """The model given each backbone."""
        return [
            self.model.given(backbone=jnp.float32(ideal(torsions, LENGTH)))
            for torsions in BACKBONES.values()
        ]

    def logits(self, tokens: jax.Array, rank: jax.Array) -> jax.Array:
        """Log-probabilities of every position under each backbone."""
        backbones = [ideal(torsions, LENGTH) for torsions in BACKBONES.values()]

        def of_one(backbone: jax.Array) -> jax.Array:
            logits = self.model.network(tokens, rank, backbone=backbone)
            return jax.nn.log_softmax(logits)

        return jax.vmap(of_one)(jnp.float32(np.stack(backbones)))

    def scored(self, tokens: np.ndarray, seed: int = 99) -> np.ndarray:
        """log p of sequences under each backbone, each in a new order."""

        def of_one(tokens: jax.Array, key: jax.Array) -> jax.Array:
            rank = jax.random.permutation(key, LENGTH)
            chosen = self.logits(tokens, rank)[:, jnp.arange(LENGTH), tokens]
            return jnp.sum(chosen, axis=1)

        keys = jax.random.split(jax.random.key(seed), len(tokens))
        return np.asarray(jax.jit(jax.vmap(of_one))(jnp.asarray(tokens), keys))

    def pooled(
        self, weights: np.ndarray, batches: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw batches of sequences by weighted sums of logits, in random orders, and
        return their log p under each backbone in these orders too."""
        tokens = []
        totals = []
        for i in range(batches):
            keys = jax.random.split(jax.random.key(1000 + i), NUM_CHAINS)
            drawn, log_probs = self.batch(jnp.asarray(weights), keys)
            tokens.append(np.asarray(drawn))
            totals.append(np.asarray(log_probs))
        return np.concatenate(tokens), np.concatenate(totals)

    @cached_property
    def batch(self) -> Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
        """A compiled function of the weights of the logits and of keys."""

        def of_one(weights: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            for_order, *keys = jax.random.split(key, 1 + LENGTH)
            order = jax.random.permutation(for_order, LENGTH)
            rank = jnp.argsort(order)

            def step(carry, given):
                tokens, total = carry
                position, key = given
                logits = self.logits(tokens, rank)[:, position]
                value = jax.random.categorical(key, weights @ logits)
                return (tokens.at[position].set(value), total + logits[:, value]), None

            first = (jnp.zeros(LENGTH, jnp.int32), jnp.zeros(len(BACKBONES)))
            (tokens, total), _ = jax.lax.scan(step, first, (order, jnp.stack(keys)))
            return tokens, total

        return jax.jit(jax.vmap(of_one, (None, 0)))


def row(design: Design, task: Task, method: str, tokens: np.ndarray, **facts) -> Row:
    """The row of some sequences."""
    log_probs = design.scored(tokens)
    objective = task.objective(log_probs)
    values = [float(value) for value in log_probs.mean(0)]
    sequences = tuple(design.model.letters(sequence) for sequence in tokens[:8])
    made = Row(
        task.name,
        method,
        log_probs=values,
        objective=float(objective.mean()),
        spread=float(objective.std()),
        sequences=sequences,
        **facts,
    )
    print("  ".join(made.as_text()), flush=True)
    return made


def by_pooling(design: Design, task: Task, evaluations: int) -> list[Row]:
    """Rows of averaged logits, of the best of many of them, and of added ones."""
    powers = np.array(task.powers)
    number = max(1, evaluations // LENGTH)
    began = time.monotonic()
    tokens, totals = design.pooled(powers / powers.sum(), number)
    seconds = time.monotonic() - began
    objectives = task.objective(totals).reshape(number, NUM_CHAINS)
    best = tokens.reshape(number, NUM_CHAINS, LENGTH)
    best = best[objectives.argmax(0), np.arange(NUM_CHAINS)]
    averaged = row(
        design,
        task,
        "logits averaged",
        tokens[:NUM_CHAINS],
        evaluations=LENGTH,
        seconds=seconds / number,
    )
    chosen = row(
        design,
        task,
        f"best of {number} averaged",
        best,
        evaluations=number * LENGTH,
        seconds=seconds,
    )
    began = time.monotonic()
    tokens, _ = design.pooled(powers, 1)
    seconds = time.monotonic() - began
    added = row(
        design, task, "logits added", tokens, evaluations=LENGTH, seconds=seconds
    )
    return [averaged, chosen, added]


def sampled(design: Design, task: Task) -> cp.Result:
    """The result of the default call."""
    factors = [
        factor**power
        for factor, power in zip(design.factors, task.powers, strict=True)
        if power
    ]

    @cp.program
    def sequence(product):
        cp.sample("s", product)

    density = cp.compile(sequence, cp.product(*factors))
    return cp.infer(density, jax.random.key(0), num_chains=NUM_CHAINS, progress=False)


def by_infer(design: Design, task: Task) -> Row:
    """The row of the default call."""
    began = time.monotonic()
    result = sampled(design, task)
    codes = [str(code) for code, _ in result.status.findings] or ["ok"]
    return row(
        design,
        task,
        "cp.infer",
        np.asarray(result["s"]),
        evaluations=result.evaluations,
        seconds=time.monotonic() - began,
        ancestors=float(result.trust.independent),
        log_evidence=float(result.log_evidence),
        error=float(result.log_evidence_error),
        status=", ".join(codes),
    )


def picture(design: Design, path: Path) -> None:
    """Draw the two backbones, and log p of sequences under either: by averaged logits,
    and by the product."""
    averaged, _ = design.pooled(np.array(TWO.powers) / 2, 1)
    result = sampled(design, TWO)
    print(result.summary(), flush=True)
    points = {
        "logits averaged": design.scored(averaged),
        "the product": design.scored(result.unweighted()["s"]),
    }
    for name, values in points.items():
        print(name, values.mean(0), flush=True)
    figure, axes = plt.subplot_mosaic(
        [["helix", "scores"], ["strand", "scores"]],
        figsize=(5.4, 3.6),
        width_ratios=(1, 3),
        layout="constrained",
    )
    for name in ("helix", "strand"):
        _draw_backbone(axes[name], name)
    looks = {"logits averaged": ("o", "#8a97a3"), "the product": ("D", "#c8553d")}
    for name, (marker, color) in looks.items():
        helix, strand, _ = points[name].T
        axes["scores"].plot(
            helix, strand, marker, ms=5, alpha=0.75, mew=0, color=color, label=name
        )
    axes["scores"].set(
        xlabel="log p of the sequence, given the helix",
        ylabel="given the strand",
    )
    axes["scores"].spines[["top", "right"]].set_visible(False)
    axes["scores"].legend(loc="upper left", frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_backbone(axis: Axes, name: str) -> None:
    """Draw the atoms N, CA and C of a backbone as one line, from the side."""
    atoms = np.asarray(ideal(BACKBONES[name], LENGTH))[:, :3].reshape(-1, 3)
    centred = atoms - atoms.mean(0)
    # Its longest direction lies along the page.
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    along, across = (centred @ directions[:2].T).T
    axis.plot(along, across, "-o", ms=2.5, lw=1.4, color="#2a6f97")
    axis.set(title=f"a {name}", aspect="equal")
    axis.set_axis_off()
    axis.margins(0.1, 0.3)


def main() -> int:
    """Run all, and publish the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of the converted weights")
    parser.add_argument("--picture", type=Path, help="draw sequences instead")
    options = parser.parse_args()
    design = Design(cp.load(str(options.folder)))
    if options.picture is not None:
        picture(design, options.picture)
        return 0
    rows = []
    checks = {}
    for task in (TWO, NOT_THIRD):
        exact = by_infer(design, task)
        others = by_pooling(design, task, exact.evaluations)
        rows += [*others, exact]
        checks[f"{task.name}: status OK"] = exact.status == "ok"
        for other in others:
            beaten = exact.objective > other.objective
            checks[f"{task.name}: more than {other.method}"] = beaten
    notes = (
        f"Objective: log p of helix and strand, less {NEGATIVE:g} of that of the third "
        "backbone where it is avoided; mean and standard deviation over "
        f"{NUM_CHAINS} sequences. log p of a sequence is that of one random order, "
        "which had no part in making it. Evaluations are those of each network for a "
        "sequence. Ancestors: as many independent chains the run is worth. log Z of a "
        "product is the log-probability that two sequences, one drawn for each "
        "backbone in one order, are the same: a measure of how well both can be "
        "served. Seconds include compilation."
    )
    details = {"rows": [dataclasses.asdict(made) for made in rows]}
    title = "One sequence for two backbones and not a third, by ProteinMPNN"
    return publish(
        "two_backbones",
        title,
        list(COLUMNS),
        [made.as_text() for made in rows],
        checks,
        details,
        notes,
        made_by="python -m benchmarks two-backbones FOLDER",
    )


if __name__ == "__main__":
    sys.exit(main())
