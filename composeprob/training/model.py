"""`train_model`: train a model of the zoo by its recipe, measure it, and write what the zoo loads."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from composeprob.training.quality import sample_quality, score_errors
from composeprob.training.recipe import Recipe
from composeprob.training.run import TrainingRun, train
from composeprob.training.weights import save_weights

SEED = 0
START, END = "<!-- measured -->", "<!-- /measured -->"
"""Between these lines of a card, `train_model` writes what it measured."""


def train_model(
    name: str,
    checkpoint_dir: str | Path | None = None,
    out: str | Path | None = None,
    iterations: int | None = None,
    progress: bool = True,
) -> TrainingRun:
    """Train a model of the zoo.

    Writes ``weights.safetensors`` and ``metrics.json``, and brings the card's measured part up to date. A run that
    Ctrl-C ended is written too, with the number of steps that it did.

    Args:
        name: a folder of the zoo.
        checkpoint_dir: where to keep checkpoints, and to resume from.
        out: the folder to write into, made when missing; by default the model's own.
        iterations: optimiser steps; by default the recipe's.
        progress: show a progress bar.

    Raises:
        LoadError: no such model; or the checkpoint belongs to another run.
    """
    from composeprob import model_zoo as zoo  # the zoo loads what training writes, and imports the recipe from here

    recipe = zoo.recipe(name)
    if iterations is not None:
        recipe = dataclasses.replace(recipe, iterations=iterations)
    run = train(recipe, jax.random.key(SEED), checkpoint_dir=checkpoint_dir, progress=progress, label=name)
    own = zoo.models_folder() / name
    folder = own if out is None else Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder, own / "card.md", recipe, run, zoo.reference(name))
    return run


def write_model(folder: Path, card: Path, recipe: Recipe, run: TrainingRun, reference: Any | None) -> None:
    """Write weights, measurements and card of a trained model into ``folder``."""
    save_weights(run.factor.network, folder / "weights.safetensors")
    metrics = measure(recipe, run, reference)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    if card.exists():
        text = card.read_text(encoding="utf-8")
        head, _, rest = text.partition(START)
        tail = rest.partition(END)[2] or "\n"
        text = f"{head.rstrip()}\n\n{START}\n{table(metrics)}\n{END}{tail}"
        (folder / "card.md").write_text(text, encoding="utf-8")


def measure(recipe: Recipe, run: TrainingRun, reference: Any | None) -> dict[str, Any]:
    """What is recorded of a trained model, ready for JSON."""
    low, high = recipe.log_snr_range()
    quality: dict[str, Any] = {}
    if reference is not None:
        key = jax.random.key(SEED + 1)
        rows = score_errors(run.factor, reference, key)
        quality["score_error"] = float(f"{np.mean([row['error'] for row in rows]):.4g}")
        quality["by_log_snr"] = rows
        quality["samples"] = sample_quality(run.factor, reference, key)
    return {
        "model": run.factor.label,
        "event_shape": list(recipe.event_shape),
        "parameterization": recipe.parameterization,
        "capabilities": sorted(run.factor.capabilities),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(run.factor.network) if hasattr(leaf, "size")),
        "training": {
            "iterations": len(run.loss),
            "finished": run.finished,
            "batch_size": recipe.batch_size,
            "learning_rate": recipe.learning_rate,
            "decay": recipe.decay,
            "ema": recipe.ema,
            "log_snr": [round(low, 3), round(high, 3)],
            "levels": recipe.schedule.num_levels,
            "time": recipe.time,
            "seed": SEED,
            "seconds": round(run.seconds, 1),
            "final_loss": float(f"{run.loss[-min(1000, len(run.loss)) :].mean():.5g}"),
        },
        "quality": quality,
    }


def table(metrics: dict[str, Any]) -> str:
    """The measured part of a card, Markdown."""
    training, quality = metrics["training"], metrics["quality"]
    lines = [
        f"{metrics['parameters']:,} parameters; trained for {training['iterations']:,} steps of "
        f"{training['batch_size']:,} events (Adam {training['learning_rate']:g}, {training['decay']}; EMA "
        f"{training['ema']:g}); loss of the last 1,000 steps {training['final_loss']:.4f}."
    ]
    if not quality:
        return "\n".join(lines)
    lines += [
        "",
        "| log-SNR | σ²·mean squared error of the score | relative to the score's size |",
        "|---:|---:|---:|",
        *(f"| {row['log_snr']:g} | {row['error']:.2g} | {row['relative']:.2g} |" for row in quality["by_log_snr"]),
        "",
        f"Mean over these log-SNR: {quality['score_error']:.2g}. With `Ancestral`, over the model's own levels: "
        + ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in quality["samples"].items())
        + ".",
    ]
    return "\n".join(lines)
