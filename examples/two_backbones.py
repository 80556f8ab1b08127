"""One sequence for two backbones: a product of ProteinMPNN with itself.

A protein that folds in two ways needs residues that suit both backbones. The model of
sequences given a helix, times the model given a strand, is the density of such
sequences; divided by the root of the model given a third backbone, it avoids that one.
Adding logits is not that product. Weights make it exact, and their mean, the evidence,
says how well both backbones can be served by one sequence.

The weights are a download of 68 MB, which `tools/convert_proteinmpnn.py` describes.
Without them the example shows the figures that are recorded in
benchmarks/results/two_backbones.json.

    python examples/two_backbones.py
    composeprob run examples/two_backbones.py
"""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import composeprob as cp
from composeprob.pretrained.backbone import HELIX, POLYPROLINE, STRAND, ideal

LENGTH = 12
FOLDER = Path(os.environ.get("COMPOSEPROB_PROTEINMPNN", "out/proteinmpnn"))
RECORDED = Path(__file__).parent.parent / "benchmarks/results/two_backbones.json"


@cp.program
def both(first, second):
    cp.sample("s", first * second)


@cp.program
def both_not_third(first, second, third):
    cp.sample("s", first * second / third**0.5)


def log_probabilities(model, factors, sequences):
    """log p of sequences under each backbone, each in an order of its own."""
    places = jnp.arange(LENGTH)

    def of_one(tokens, key):
        rank = jax.random.permutation(key, LENGTH)
        logs = []
        for factor in factors:
            logits = model.network(tokens, rank, **factor.fixed)
            logs.append(jnp.sum(jax.nn.log_softmax(logits)[places, tokens]))
        return jnp.stack(logs)

    keys = jax.random.split(jax.random.key(1), len(sequences))
    return np.asarray(jax.jit(jax.vmap(of_one))(jnp.asarray(sequences), keys))


def show(points, title, out):
    """Save log p under the helix and under the strand, with axes for each task and a
    mark for each sequence."""
    figure, axes = plt.subplots(
        1, len(points), figsize=(8, 4), layout="constrained", sharex=True, sharey=True
    )
    for axis, (task, methods) in zip(axes, points.items(), strict=True):
        for method, values in methods.items():
            axis.plot(values[:, 0], values[:, 1], "o", ms=6, alpha=0.7, label=method)
        axis.set(xlabel="log p, helix", title=task)
        axis.locator_params(axis="x", nbins=5)
    axes[0].set_ylabel("log p, strand")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4)
    figure.suptitle(title)
    Path(out).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(out, "two_backbones.png"), dpi=150)


def recorded(out):
    """Show the means that the benchmark recorded."""
    print(f"{FOLDER} has no weights. These figures are recorded ones:")
    points = {}
    for row in json.loads(RECORDED.read_text(encoding="utf-8"))["rows"]:
        methods = points.setdefault(row["task"], {})
        methods[row["method"]] = np.array([row["log_probs"][:2]])
        means = ", ".join(f"{value:.1f}" for value in row["log_probs"])
        print(f"  {row['method']}, for {row['task']}: mean log p {means}")
    show(points, "recorded means", out)


def main(num_chains=64, out="out"):
    if not FOLDER.is_dir():
        return recorded(out)
    model = cp.load(str(FOLDER))
    backbones = [jnp.float32(ideal(t, LENGTH)) for t in (HELIX, STRAND, POLYPROLINE)]
    factors = [model.given(backbone=backbone) for backbone in backbones]
    points = {}
    for program, number in ((both, 2), (both_not_third, 3)):
        density = cp.compile(program, *factors[:number])
        print(density)
        result = cp.infer(density, jax.random.key(0), num_chains=num_chains)
        print(result.summary())
        print([model.letters(tokens) for tokens in result["s"][:4]])
        values = log_probabilities(model, factors, result["s"])
        points[program.name] = {"cp.infer": values}
        print("mean log p of each backbone:", values.mean(0))
    show(points, "sequences of 12 residues", out)
    return result


if __name__ == "__main__":
    main()
