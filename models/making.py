"""What makes the zoo: `train_model` trains a model by its recipe, measures it, and
writes what `cp.load` reads; `calibrate_model` finds its log-normaliser."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from composeprob import model_zoo as zoo
from composeprob.calibration import calibrate, save_calibration
from composeprob.errors import CapabilityError, InvalidValueError, LoadError
from composeprob.factors.calibrated import Calibrated
from composeprob.factors.classifier import Classifier
from composeprob.factors.diffusion import Diffusion
from composeprob.json_data import JSONObject
from composeprob.training.loop import TrainingRun, draw_batch, losses, train
from composeprob.training.quality import sample_quality, score_errors
from composeprob.training.recipe import Data, Recipe
from composeprob.training.weight_files import load_weights, save_weights, weights_file

if TYPE_CHECKING:
    from numpyro.distributions import Distribution


SEED = 0


def train_model(
    name: str,
    checkpoint_dir: str | Path | None = None,
    out: str | Path | None = None,
    iterations: int | None = None,
    progress: bool = True,
    retraining: int = 0,
    replace: bool = False,
) -> TrainingRun:
    """Trains a model of the zoo by its recipe, and writes it into a folder.

    Writes ``weights.safetensors`` and ``metrics.json``, and brings the card's measured
    part up to date. A run that Ctrl-C ended is written too, with the number of steps
    that it did. Models whose exact distribution is unknown get pictures:
    ``training.png``, the loss of every step, and for images ``samples.png``. A
    retraining R > 0 writes ``weights-R.safetensors`` in half precision, and adds its
    row to the same measurements and card. Energies without conditions are calibrated,
    see `calibrate_model`.

    Args:
        name: a folder of the zoo.
        checkpoint_dir: where to keep checkpoints, and to resume from.
        out: the folder to write into, made when missing; by default ``out/NAME``.
            `load` reads it there with ``folder=``, and without where it is the model's
            folder in the zoo.
        iterations: optimiser steps; by default the recipe's.
        progress: show a progress bar.
        retraining: number of the training, which makes its random key. Number 0 is the
            one that `load` gives.
        replace: whether to replace weights that are there. Those of a run that Ctrl-C
            ended are replaced by the run that goes on from its checkpoints, whatever
            this is.

    Returns:
        The run, with the files that were written.

    Raises:
        InvalidValueError: the folder has weights already, and ``replace`` is not given;
            nothing is trained then.
        LoadError: no such model; a retraining of a model that has not been trained; or
            the checkpoint belongs to another run.
    """
    recipe = zoo.recipe(name)
    source = zoo.models_folder() / name
    folder = Path("out", name) if out is None else Path(out)
    if not replace:
        _check_replace(folder, retraining, resumable=checkpoint_dir is not None)
    if retraining and not (source / "metrics.json").exists():
        fix = f"train it first: composeprob train {name} --out {source}"
        raise LoadError(f"Model '{name}' has not been trained.", fix=fix)
    if iterations is not None:
        recipe = dataclasses.replace(recipe, iterations=iterations)
    run = train(
        recipe, jax.random.key(SEED + retraining), checkpoint_dir=checkpoint_dir, progress=progress, label=name,
        start=zoo.defined(name, "start"),
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    written = write_model(
        folder,
        source,
        recipe,
        run,
        zoo.reference(name),
        retraining,
        zoo.defined(name, "held_out"),
    )
    if "energy" in run.factor.capabilities and not run.factor.traits.conditions:
        calibrate_model(name, retraining=retraining, out=folder, replace=True)
        written.append(zoo.calibration_file(folder / weights_file(retraining)))
    return dataclasses.replace(run, written=tuple(written))


def write_model(
    folder: Path,
    source: Path,
    recipe: Recipe,
    run: TrainingRun,
    reference: Distribution | None,
    retraining: int = 0,
    held_out: Data | None = None,
) -> list[Path]:
    """Writes weights, measurements and card of a trained model into ``folder``; returns
    the files.

    Args:
        folder: where to write; exists.
        source: the model's folder in the zoo, with its card, and what was measured of
            other retrainings if ``folder`` does not have it.
        recipe, run, reference: what was trained, the run, and the exact distribution
            where it is known.
        retraining: its number.
        held_out: data that were not trained on, on which the loss is measured too.
    """
    measured = _measured(folder) or _measured(source)
    rows = [
        row
        for row in measured.get("retrainings", [])
        if row["retraining"] != retraining
    ]
    file = folder / weights_file(retraining)
    written = [file, folder / "metrics.json"]
    if retraining:
        save_weights(run.factor.network, file, half=True)
        stored = recipe.factor(load_weights(run.factor.network, file), run.factor.label)
        rows.append(measure_retraining(run, stored, reference, retraining))
    else:
        save_weights(run.factor.network, file)
        measured = measure(recipe, run, reference, held_out)
        if reference is None:
            from .pictures import write_pictures  # Matplotlib

            written += write_pictures(folder, run, jax.random.key(SEED + 1))
    metrics = measured | (
        {"retrainings": sorted(rows, key=lambda row: row["retraining"])} if rows else {}
    )
    (folder / "metrics.json").write_text(
        json.dumps(metrics, indent=1) + "\n", encoding="utf-8"
    )
    card = source / "card.md"
    if card.exists():
        text = card.read_text(encoding="utf-8")
        start, end = (
            "<!-- measured -->",
            "<!-- /measured -->",
        )  # what is between them is written anew
        head, _, rest = text.partition(start)
        tail = rest.partition(end)[2] or "\n"
        text = f"{head.rstrip()}\n\n{start}\n{table(metrics)}\n{end}{tail}"
        (folder / "card.md").write_text(text, encoding="utf-8")
        written.append(folder / "card.md")
    return written


def _measured(folder: Path) -> JSONObject:
    path = folder / "metrics.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _check_replace(folder: Path, retraining: int, resumable: bool) -> None:
    """Refuses to replace the weights in a folder, unless they are of a run that stopped
    and now goes on."""
    file = folder / weights_file(retraining)
    if not file.exists():
        return
    measured = _measured(folder)
    rows = [measured.get("training", {}), *measured.get("retrainings", [])]
    row: JSONObject = next(
        (row for row in rows if row.get("retraining", 0) == retraining), {}
    )
    if not (resumable and row.get("finished") is False):
        raise InvalidValueError(
            f"{file} is there already, and training would replace it.",
            fix="replace it with --replace (replace=True in Python), or write elsewhere with --out FOLDER.",
        )


def measure(
    recipe: Recipe,
    run: TrainingRun,
    reference: Distribution | None,
    held_out: Data | None = None,
) -> JSONObject:
    """Measures a trained model; returns what is recorded of it, ready for JSON."""
    low, high = recipe.log_snr_range()
    quality: JSONObject = {}
    if reference is not None:
        key = jax.random.key(SEED + 1)
        rows = score_errors(run.factor, reference, key)
        quality["score_error"] = float(f"{np.mean([row['error'] for row in rows]):.4g}")
        quality["by_log_snr"] = rows
        quality["samples"] = sample_quality(run.factor, reference, key)
    if held_out is not None:
        quality["losses"] = losses_by_log_snr(
            recipe, run.factor, held_out, jax.random.key(SEED + 1)
        )
    return {
        "model": run.factor.label,
        "event_shape": list(recipe.event_shape),
        "parameterization": recipe.parameterization,
        "capabilities": sorted(run.factor.capabilities),
        "parameters": sum(
            leaf.size
            for leaf in jax.tree.leaves(run.factor.network)
            if hasattr(leaf, "size")
        ),
        "training": {
            "iterations": len(run.loss),
            "finished": run.finished,
            "batch_size": recipe.batch.size,
            "learning_rate": float(f"{recipe.rate(0):.6g}"),
            "decay": getattr(recipe.learning_rate, "__name__", "constant"),
            "ema": recipe.ema,
            "log_snr": [round(low, 3), round(high, 3)],
            "levels": recipe.schedule.num_levels,
            "time": recipe.time,
            "seed": SEED,
            "seconds": round(run.seconds, 1),
            "final_loss": _final_loss(run),
        },
        "quality": quality,
    }


def measure_retraining(
    run: TrainingRun,
    stored: Diffusion | Classifier,
    reference: Distribution | None,
    retraining: int,
) -> JSONObject:
    """Measures a retraining; ``stored`` is its factor as the zoo loads it, rounded to
    half precision."""
    row: JSONObject = {
        "retraining": retraining,
        "iterations": len(run.loss),
        "finished": run.finished,
        "seconds": round(run.seconds, 1),
        "final_loss": _final_loss(run),
    }
    if reference is not None:
        key = jax.random.key(SEED + 1)
        as_trained, as_stored = (
            np.mean([each["error"] for each in score_errors(factor, reference, key)])
            for factor in (run.factor, stored)
        )
        row["score_error"] = float(f"{as_stored:.4g}")
        row["added_by_rounding"] = float(f"{as_stored - as_trained:.2g}")
        row |= sample_quality(stored, reference, key)
    return row


def _final_loss(run: TrainingRun) -> float:
    return float(f"{run.loss[-min(1000, len(run.loss)) :].mean():.5g}")


def table(metrics: JSONObject) -> str:
    """Returns the measured part of a card, in Markdown."""
    training, quality = metrics["training"], metrics["quality"]
    lines = [
        f"{metrics['parameters']:,} parameters; trained for {training['iterations']:,} steps of "
        f"{training['batch_size']:,} events (Adam {training['learning_rate']:g}, {training['decay']}; EMA "
        f"{training['ema']:g}); loss of the last 1,000 steps {training['final_loss']:.4f}."
    ]
    if "by_log_snr" in quality:
        lines += _quality_table(quality)
    if "losses" in quality:
        lines += _losses_table(quality["losses"])
    if "retrainings" in metrics:
        lines += _retrainings_table(metrics["retrainings"])
    return "\n".join(lines)


def _quality_table(quality: JSONObject) -> list[str]:
    return [
        "",
        "| log-SNR | σ²·mean squared error of the score | relative to the score's size |",
        "|---:|---:|---:|",
        *(
            f"| {row['log_snr']:g} | {row['error']:.2g} | {row['relative']:.2g} |"
            for row in quality["by_log_snr"]
        ),
        "",
        f"Mean over these log-SNR: {quality['score_error']:.2g}. With `Ancestral`, over the model's own levels: "
        + ", ".join(
            f"{name.replace('_', ' ')} {value:.3g}"
            for name, value in quality["samples"].items()
        )
        + ".",
    ]


def _losses_table(rows: list[dict[str, float]]) -> list[str]:
    """The loss by log-SNR on data trained on and held out, and a classifier's
    accuracy."""
    heads = {
        "log_snr": "log-SNR",
        "loss": "loss, trained on",
        "held_out": "loss, held out",
    }
    columns = [*heads, *(["accuracy"] if "accuracy" in rows[0] else [])]
    return [
        "",
        "| "
        + " | ".join(heads.get(name, f"{name}, held out") for name in columns)
        + " |",
        "|---:" * len(columns) + "|",
        *(
            "| " + " | ".join(f"{row[name]:.3g}" for name in columns) + " |"
            for row in rows
        ),
    ]


def _retrainings_table(rows: list[JSONObject]) -> list[str]:
    """Retrainings, one a line; those measured against the exact distribution with their
    errors."""
    columns = [
        name
        for name in rows[0]
        if name not in ("retraining", "finished", "mode_weights_tv_exact")
    ]
    return [
        "",
        "Retrained with other random keys, `cp.load(…, retraining=…)`. These are stored in half precision; the score "
        "error holds what rounding added to it:",
        "",
        "| retraining | "
        + " | ".join(name.replace("_", " ") for name in columns)
        + " |",
        "|---:" * (1 + len(columns)) + "|",
        *(
            "| "
            + " | ".join(f"{row[name]:.4g}" for name in ("retraining", *columns))
            + " |"
            for row in rows
        ),
    ]


def calibrate_model(
    name: str,
    *,
    retraining: int = 0,
    out: str | Path | None = None,
    conditions: Mapping[str, object] | None = None,
    num_chains: int = 1000,
    replace: bool = False,
) -> Calibrated:
    """Calibrates a model of the zoo with an energy, and writes
    ``calibration.safetensors``, which `load` then applies.

    Args:
        name: a folder of the zoo.
        retraining: which of its trainings; R > 0 is written to
            ``calibration-R.safetensors``.
        out: the folder of its weights, and to write into; by default the model's own.
        conditions: of a model with conditions: a value of each. Each combination has
            its own file, which ``load(name, **conditions)`` applies.
        num_chains: as of `calibrate`.
        replace: whether to replace a calibration that is there.

    Raises:
        LoadError: no such model, or it has not been trained.
        CapabilityError: it has only a score.
        InvalidValueError: it has conditions, and not all of them are given; or it is
            calibrated already, and ``replace`` is not given.
        ConditionError: it has no such condition.
    """
    factor, weights = zoo.uncalibrated(name, retraining, out)
    if "energy" not in factor.capabilities:
        raise CapabilityError(
            f"Model '{name}' offers only its score, and a score has no constant to calibrate.",
            fix="calibrate models with an energy; `composeprob zoo` lists what they offer.",
        )
    conditions = conditions or {}
    if set(factor.traits.conditions) - set(conditions):
        needed = " ".join(f"--given {each}=…" for each in factor.traits.conditions)
        raise InvalidValueError(
            f"Model '{name}' has conditions, and one normaliser for each of their values.",
            fix=f"give one: python tools/calibrate.py {name} {needed}",
        )
    file = zoo.calibration_file(weights, conditions)
    if file.exists() and not replace:
        raise InvalidValueError(
            f"{file} is there already.",
            fix="calibrate again with --replace (replace=True in Python).",
        )
    found = calibrate(
        factor.given(**conditions), jax.random.key(0), num_chains=num_chains
    )
    assert isinstance(found, Calibrated)
    save_calibration(found, file, weights=weights)
    return found


def losses_by_log_snr(
    recipe: Recipe,
    factor: Diffusion | Classifier,
    held_out: Data,
    key: Array,
    *,
    num: int = 8000,
    num_intervals: int = 6,
) -> list[dict[str, float]]:
    """Measures the loss on data of training and data held out, ``num`` events of each,
    in intervals of log-SNR.

    Returns:
        Rows with ``log_snr`` (the interval's middle), ``loss`` and ``held_out``; of a
        classifier also ``accuracy``, the share of noised events held out whose label it
        gives the greatest probability.
    """
    edges = np.linspace(*recipe.log_snr_range(), num_intervals + 1)
    columns: dict[str, np.ndarray] = {}
    for name, data in (("loss", recipe.data), ("held_out", held_out)):
        log_snr, loss, right = map(np.asarray, _loss_on(recipe, factor, data, key, num))
        place = np.digitize(log_snr, edges[1:-1])
        columns[name] = np.bincount(place, loss) / np.bincount(place)
        if isinstance(factor, Classifier):
            columns["accuracy"] = np.bincount(place, right) / np.bincount(place)
    columns = {"log_snr": (edges[1:] + edges[:-1]) / 2, **columns}
    return [
        {name: float(f"{column[i]:.4g}") for name, column in columns.items()}
        for i in range(num_intervals)
    ]


def _loss_on(
    recipe: Recipe, factor: Diffusion | Classifier, data: Data, key: Array, num: int
) -> tuple[Array, ...]:
    """Log-SNR of ``num`` events, their loss, and whether a classifier is right;
    conditions are never dropped."""
    recipe = dataclasses.replace(
        recipe, data=data, conditions=dataclasses.replace(recipe.condition, dropout=0.0)
    )

    @eqx.filter_jit
    def run(factor: Diffusion | Classifier, key: Array) -> tuple[Array, ...]:
        batch = draw_batch(recipe, key, num)
        denoising = lambda event: jnp.squeeze(losses(factor, event).denoising)  # noqa: E731
        batches_of_one = jax.tree.map(lambda a: a[:, None], batch)
        loss = jax.lax.map(denoising, batches_of_one, batch_size=64)
        right = jnp.zeros(num)
        if isinstance(factor, Classifier):
            best = jax.vmap(
                lambda event: jnp.argmax(factor.logits(event.noised, event.noise))
            )(batch)
            right = (best == batch.conditions["label"]).astype(float)
        return batch.noise.log_snr, loss, right

    return run(factor, key)
