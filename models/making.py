"""Making of the zoo: training, measurement and calibration of its models.

`train_model` trains a model by its recipe, measures it, and writes the files that
`cp.load` reads; `calibrate_model` finds its log-normaliser.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from composeprob import model_zoo as zoo
from composeprob.arguments import check_writable
from composeprob.calibration import calibrate, save_calibration
from composeprob.errors import CapabilityError, InvalidValueError, LoadError
from composeprob.factors.calibrated import Calibrated
from composeprob.factors.categorical import MaskedDiffusion
from composeprob.factors.classifier import Classifier
from composeprob.factors.diffusion import Diffusion
from composeprob.json_data import JSONObject
from composeprob.training.loop import (
    Batch,
    TrainingRun,
    draw_batch,
    losses,
    train,
)
from composeprob.training.masked import MaskedRecipe
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
    """Train a model of the zoo by its recipe, and write it into a folder.

    Writes ``weights.safetensors`` and ``metrics.json``, and updates the measured part
    of the card. A run that Ctrl-C ended is written too, with the number of its steps.
    Models whose exact distribution is unknown get pictures: ``training.png``, the loss
    of every step, and for images ``samples.png``. A retraining R > 0 writes
    ``weights-R.safetensors`` in half precision, and adds its row to the same
    measurements and card. Energies without conditions are calibrated, see
    `calibrate_model`.

    Args:
        name: a folder of the zoo.
        checkpoint_dir: folder of checkpoints, to write and to resume from.
        out: the folder to write into, made when missing; by default ``out/NAME``.
            `load` needs ``folder=`` to read it there, unless it is the model's folder
            in the zoo.
        iterations: optimiser steps; by default the recipe's.
        progress: show a progress bar.
        retraining: number of the training, which makes its random key. `load` returns
            number 0 by default.
        replace: replace existing weights. Without it, only those of a run that Ctrl-C
            ended are replaced, by the run that resumes from its checkpoints.

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
        raise LoadError(
            f"Model '{name}' has not been trained.",
            fix=f"train it first: composeprob train {name} --out {source}",
        )
    check_writable(folder, f"No model can be written to {folder}")
    if iterations is not None:
        recipe = dataclasses.replace(recipe, iterations=iterations)
    run = train(
        recipe,
        jax.random.key(SEED + retraining),
        checkpoint_dir=checkpoint_dir,
        progress=progress,
        label=name,
        start=zoo.defined(name, "start"),
    )
    written = write_model(
        folder,
        source,
        recipe,
        run,
        zoo.reference(name),
        retraining,
        zoo.defined(name, "held_out"),
        zoo.defined(name, "quality"),
    )
    if "energy" in run.factor.capabilities and not run.factor.traits.conditions:
        calibrate_model(name, retraining=retraining, out=folder, replace=True)
        written.append(zoo.calibration_file(folder / weights_file(retraining)))
    return dataclasses.replace(run, written=tuple(written))


def write_model(
    folder: Path,
    source: Path,
    recipe: Recipe | MaskedRecipe,
    run: TrainingRun,
    reference: Distribution | None,
    retraining: int = 0,
    held_out: Data | None = None,
    quality: Callable[[MaskedDiffusion], JSONObject] | None = None,
) -> list[Path]:
    """Write weights, measurements and card of a trained model; return the files.

    Args:
        folder: the folder to write into, which exists.
        source: the model's folder in the zoo, with its card. Measurements of other
            retrainings are taken from it where ``folder`` has none.
        recipe, run, reference: the recipe, its run, and the exact distribution, or None
            where it is unknown.
        retraining: number of the training.
        held_out: data that were not trained on, on which the loss is measured too.
        quality: measures a model of tokens.
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
        if isinstance(recipe, MaskedRecipe):
            measured = measure_masked(recipe, run, quality)
        else:
            measured = measure(recipe, run, reference, held_out)
        if reference is None:
            from .pictures import write_pictures  # Matplotlib

            written += write_pictures(folder, run, jax.random.key(SEED + 1))
    metrics = measured
    if rows:
        rows.sort(key=lambda row: row["retraining"])
        metrics = measured | {"retrainings": rows}
    text = json.dumps(metrics, indent=1)
    (folder / "metrics.json").write_text(text + "\n", encoding="utf-8")
    card = source / "card.md"
    if card.exists():
        text = _with_measurements(card.read_text(encoding="utf-8"), metrics)
        (folder / "card.md").write_text(text, encoding="utf-8")
        written.append(folder / "card.md")
    return written


def _with_measurements(card: str, metrics: JSONObject) -> str:
    """Return a card with its measured part replaced, or appended."""
    start = "<!-- measured -->"
    end = "<!-- /measured -->"
    head, _, rest = card.partition(start)
    _, _, tail = rest.partition(end)
    tail = tail or "\n"
    return f"{head.rstrip()}\n\n{start}\n{table(metrics)}\n{end}{tail}"


def _measured(folder: Path) -> JSONObject:
    """Return the measurements in a folder; empty without any."""
    path = folder / "metrics.json"
    if not path.exists():
        return {}
    return json.loads(path.read_text(encoding="utf-8"))


def _check_replace(folder: Path, retraining: int, resumable: bool) -> None:
    """Refuse to replace weights, unless a run that Ctrl-C ended is resumed."""
    file = folder / weights_file(retraining)
    if not file.exists():
        return
    measured = _measured(folder)
    rows = [measured.get("training", {}), *measured.get("retrainings", [])]
    stopped = any(
        row.get("retraining", 0) == retraining and row.get("finished") is False
        for row in rows
    )
    if not (resumable and stopped):
        raise InvalidValueError(
            f"{file} is there already, and training would replace it.",
            fix="replace it with --replace (replace=True in Python), or write "
            "elsewhere with --out FOLDER.",
        )


def measure(
    recipe: Recipe,
    run: TrainingRun,
    reference: Distribution | None,
    held_out: Data | None = None,
) -> JSONObject:
    """Measure a trained model, and return its record for ``metrics.json``."""
    low, high = recipe.log_snr_range()
    quality: JSONObject = {}
    if reference is not None:
        key = jax.random.key(SEED + 1)
        rows = score_errors(run.factor, reference, key)
        mean_error = np.mean([row["error"] for row in rows])
        quality["score_error"] = float(f"{mean_error:.4g}")
        quality["by_log_snr"] = rows
        quality["samples"] = sample_quality(run.factor, reference, key)
    if held_out is not None:
        quality["losses"] = losses_by_log_snr(
            recipe, run.factor, held_out, jax.random.key(SEED + 1)
        )
    record = _record(recipe, run, recipe.parameterization, quality)
    record["training"] |= {
        "log_snr": [round(low, 3), round(high, 3)],
        "levels": recipe.schedule.num_levels,
        "time": recipe.time,
    }
    return record


def measure_masked(
    recipe: MaskedRecipe,
    run: TrainingRun,
    quality: Callable[[MaskedDiffusion], JSONObject] | None,
) -> JSONObject:
    """Measure a trained model of tokens, and return its record for ``metrics.json``."""
    assert isinstance(run.factor, MaskedDiffusion)
    measured = {} if quality is None else quality(run.factor)
    return _record(recipe, run, "masked", measured)


def _record(
    recipe: Recipe | MaskedRecipe,
    run: TrainingRun,
    parameterization: str,
    quality: JSONObject,
) -> JSONObject:
    """Return the record that models of all kinds have."""
    leaves = jax.tree.leaves(run.factor.network)
    return {
        "model": run.factor.label,
        "event_shape": list(recipe.event_shape),
        "parameterization": parameterization,
        "capabilities": sorted(run.factor.capabilities),
        "parameters": sum(leaf.size for leaf in leaves if hasattr(leaf, "size")),
        "training": {
            "iterations": len(run.loss),
            "finished": run.finished,
            "batch_size": recipe.batch.size,
            "learning_rate": float(f"{recipe.rate(0):.6g}"),
            "decay": getattr(recipe.learning_rate, "__name__", "constant"),
            "ema": recipe.ema,
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
    """Measure a retraining, and return its row for ``metrics.json``.

    ``stored`` is its factor as the zoo loads it, rounded to half precision.
    """
    row: JSONObject = {
        "retraining": retraining,
        "iterations": len(run.loss),
        "finished": run.finished,
        "seconds": round(run.seconds, 1),
        "final_loss": _final_loss(run),
    }
    if reference is not None:
        key = jax.random.key(SEED + 1)
        as_trained = _mean_error(run.factor, reference, key)
        as_stored = _mean_error(stored, reference, key)
        row["score_error"] = float(f"{as_stored:.4g}")
        row["added_by_rounding"] = float(f"{as_stored - as_trained:.2g}")
        row |= sample_quality(stored, reference, key)
    return row


def _mean_error(
    factor: Diffusion | Classifier, reference: Distribution, key: Array
) -> float:
    """Return the mean error of the score over log-SNR."""
    rows = score_errors(factor, reference, key)
    return float(np.mean([row["error"] for row in rows]))


def _final_loss(run: TrainingRun) -> float:
    """Return the mean loss of the last 1,000 steps."""
    last = min(1000, len(run.loss))
    return float(f"{run.loss[-last:].mean():.5g}")


def table(metrics: JSONObject) -> str:
    """Return the measured part of a card, in Markdown."""
    training = metrics["training"]
    quality = metrics["quality"]
    lines = [
        f"{metrics['parameters']:,} parameters; trained for "
        f"{training['iterations']:,} steps of {training['batch_size']:,} events "
        f"(Adam {training['learning_rate']:g}, {training['decay']}; EMA "
        f"{training['ema']:g}); loss of the last 1,000 steps "
        f"{training['final_loss']:.4f}."
    ]
    if "by_log_snr" in quality:
        lines += _quality_table(quality)
    if "losses" in quality:
        lines += _losses_table(quality["losses"])
    if "bits" in quality:
        lines += _bits_table(quality["bits"])
    if "retrainings" in metrics:
        lines += _retrainings_table(metrics["retrainings"])
    return "\n".join(lines)


def _quality_table(quality: JSONObject) -> list[str]:
    """Return lines on the score's error by log-SNR, and on samples."""
    heads = (
        "log-SNR",
        "σ²·mean squared error of the score",
        "relative to the score's size",
    )
    lines = ["", _table_row(heads), "|---:" * len(heads) + "|"]
    for row in quality["by_log_snr"]:
        lines.append(
            f"| {row['log_snr']:g} | {row['error']:.2g} | {row['relative']:.2g} |"
        )
    samples = ", ".join(
        f"{name.replace('_', ' ')} {value:.3g}"
        for name, value in quality["samples"].items()
    )
    lines += [
        "",
        f"Mean over these log-SNR: {quality['score_error']:.2g}. With `Ancestral`, "
        f"over the model's own levels: {samples}.",
    ]
    return lines


def _bits_table(bits: dict[str, float]) -> list[str]:
    """Return a table of bits for each residue of sequences that are held out."""
    lines = ["", "| model | bits a residue, held-out data |", "|---|---:|"]
    for name, value in bits.items():
        lines.append(f"| {name} | {value:.3f} |")
    return lines


def _losses_table(rows: list[dict[str, float]]) -> list[str]:
    """Return a table of the loss by log-SNR, on data trained on and data held out.

    A classifier has its accuracy in it.
    """
    heads = {
        "log_snr": "log-SNR",
        "loss": "loss, training data",
        "held_out": "loss, held-out data",
    }
    if "accuracy" in rows[0]:
        heads["accuracy"] = "accuracy, held-out data"
    lines = ["", _table_row(heads.values()), "|---:" * len(heads) + "|"]
    for row in rows:
        lines.append(_table_row(f"{row[name]:.3g}" for name in heads))
    return lines


def _retrainings_table(rows: list[JSONObject]) -> list[str]:
    """Return a table of retrainings, with their errors where these were measured."""
    left_out = ("retraining", "finished", "mode_weights_tv_exact")
    columns = ["retraining", *(name for name in rows[0] if name not in left_out)]
    lines = [
        "",
        "Retrainings with other random keys, `cp.load(…, retraining=…)`. They are "
        "stored in half precision; the score error includes the error of rounding:",
        "",
        _table_row(name.replace("_", " ") for name in columns),
        "|---:" * len(columns) + "|",
    ]
    for row in rows:
        lines.append(_table_row(f"{row[name]:.4g}" for name in columns))
    return lines


def _table_row(cells: Iterable[str]) -> str:
    """Return a row of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def calibrate_model(
    name: str,
    *,
    retraining: int = 0,
    out: str | Path | None = None,
    conditions: Mapping[str, object] | None = None,
    num_chains: int = 1000,
    replace: bool = False,
) -> Calibrated:
    """Calibrate a model of the zoo with an energy.

    Writes ``calibration.safetensors``, which `load` then applies.

    Args:
        name: a folder of the zoo.
        retraining: number of the training; R > 0 is written to
            ``calibration-R.safetensors``.
        out: the folder of its weights, and to write into; by default the model's own.
        conditions: a value of each condition, for a model with conditions. Each
            combination has its own file, which ``load(name, **conditions)`` applies.
        num_chains: as in `calibrate`.
        replace: replace an existing calibration.

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
            f"Model '{name}' offers only its score, and a score has no constant to "
            "calibrate.",
            fix="calibrate models with an energy; `composeprob zoo` lists what they "
            "offer.",
        )
    conditions = conditions or {}
    if set(factor.traits.conditions) - set(conditions):
        needed = " ".join(f"--given {each}=…" for each in factor.traits.conditions)
        raise InvalidValueError(
            f"Model '{name}' has conditions, and one normaliser for each of their "
            "values.",
            fix=f"give one: python tools/calibrate.py {name} {needed}",
        )
    file = zoo.calibration_file(weights, conditions)
    if file.exists() and not replace:
        raise InvalidValueError(
            f"{file} is there already.",
            fix="calibrate again with --replace (replace=True in Python).",
        )
    conditioned = factor.given(**conditions)
    calibrated = calibrate(conditioned, jax.random.key(0), num_chains=num_chains)
    assert isinstance(calibrated, Calibrated)
    save_calibration(calibrated, file, weights=weights)
    return calibrated


def losses_by_log_snr(
    recipe: Recipe,
    factor: Diffusion | Classifier,
    held_out: Data,
    key: Array,
    *,
    num: int = 8000,
    num_intervals: int = 6,
) -> list[dict[str, float]]:
    """Measure the loss in intervals of log-SNR, on training data and held-out data.

    Returns:
        Rows with ``log_snr`` (the interval's middle), ``loss`` and ``held_out``, over
        ``num`` events each; for a classifier also ``accuracy``, the share of noised
        events held out whose label has the greatest probability.
    """
    edges = np.linspace(*recipe.log_snr_range(), num_intervals + 1)
    columns: dict[str, np.ndarray] = {}
    for name, data in (("loss", recipe.data), ("held_out", held_out)):
        # The last, on data held out, gives the accuracy.
        log_snr, loss, right = map(np.asarray, _loss_on(recipe, factor, data, key, num))
        interval = np.digitize(log_snr, edges[1:-1])
        count = np.bincount(interval)
        columns[name] = np.bincount(interval, loss) / count
        if isinstance(factor, Classifier):
            columns["accuracy"] = np.bincount(interval, right) / count
    columns = {"log_snr": (edges[1:] + edges[:-1]) / 2, **columns}
    return [
        {name: float(f"{column[i]:.4g}") for name, column in columns.items()}
        for i in range(num_intervals)
    ]


def _loss_on(
    recipe: Recipe, factor: Diffusion | Classifier, data: Data, key: Array, num: int
) -> tuple[Array, ...]:
    """Return log-SNR of ``num`` events, their loss, and 1 where a classifier is right.

    Conditions are never dropped.
    """
    conditions = dataclasses.replace(recipe.condition, dropout=0.0)
    recipe = dataclasses.replace(recipe, data=data, conditions=conditions)

    @eqx.filter_jit
    def run(factor: Diffusion | Classifier, key: Array) -> tuple[Array, ...]:
        batch = draw_batch(recipe, key, num)

        def denoising(event: Batch) -> Array:
            return jnp.squeeze(losses(factor, event).denoising)

        batches_of_one = jax.tree.map(lambda a: a[:, None], batch)
        loss = jax.lax.map(denoising, batches_of_one, batch_size=64)
        right = jnp.zeros(num)
        if isinstance(factor, Classifier):

            def most_likely(event: Batch) -> Array:
                return jnp.argmax(factor.logits(event.noised, event.noise))

            labels = jax.vmap(most_likely)(batch)
            right = (labels == batch.conditions["label"]).astype(float)
        return batch.noise.log_snr, loss, right

    return run(factor, key)
