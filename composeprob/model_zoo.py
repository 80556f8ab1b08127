"""The zoo: pretrained models by name, from ``models/`` of a checkout or from an
installed wheel.

A model is a folder with ``train.py`` (its ``RECIPE``, and ``reference()`` where the
exact distribution is known), ``weights.safetensors``, ``card.md`` and ``metrics.json``;
retrainings with other random keys lie beside as ``weights-1.safetensors`` and so on.
Nothing is unpickled: a network is built by its recipe, and filled with plain arrays.
The distribution composeprob holds the weights of a few models, composeprob-zoo all
others, which it installs into the same folders.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import equinox as eqx
import jax
import numpy as np

from composeprob import models
from composeprob.calibration.driver import load_calibration
from composeprob.errors import LoadError
from composeprob.factors.classifier import Classifier
from composeprob.factors.diffusion import Diffusion
from composeprob.factors.factor import LeafFactor
from composeprob.factors.show import clipped, shape
from composeprob.json_data import JSONObject
from composeprob.settings import usual
from composeprob.text import printable
from composeprob.training.recipe import Recipe
from composeprob.training.weight_files import load_weights, weights_file

if TYPE_CHECKING:
    from numpyro.distributions import Distribution


@dataclass(frozen=True, repr=False)
class Card:
    """A `Card` states what one model is, how it was trained and how good it is.

    Attributes:
        name: what `load` takes.
        title: one line.
        text: the whole card, Markdown.
        event_shape, parameterization, capabilities: as of the factor.
        training: settings and seconds, as recorded when it was trained.
        quality: measured against the exact distribution; empty where that is unknown.
        folder: where the model lies.
        retrainings: what `load` takes for ``retraining``: 0, and those with other
            random keys; empty where the weights are not installed.
    """

    name: str
    title: str
    text: str
    event_shape: tuple[int, ...]
    parameterization: str
    capabilities: frozenset[str]
    training: JSONObject
    quality: JSONObject
    folder: Path
    retrainings: tuple[int, ...] = (0,)

    @property
    def trained(self) -> str:
        """How many times it was trained, or that its weights are not installed."""
        count = len(self.retrainings)
        return (
            "not installed"
            if not count
            else f"trained {count} times"
            if count > 1
            else "trained once"
        )

    def __repr__(self) -> str:
        offers = "energy" if "energy" in self.capabilities else "score"
        trained = "" if len(self.retrainings) == 1 else f", {self.trained}"
        return printable(
            clipped(
                f"{self.name} ({offers}, {shape(self.event_shape)}{trained}): {self.title}"
            )
        )


class Zoo(dict[str, Card]):
    """A `Zoo` maps the name of every model to its card; it prints as a table."""

    @property
    def legend(self) -> str:
        """What the columns mean."""
        return (
            "weights: trained how many times, see load(retraining=); not installed ones are those of composeprob[zoo]. "
            "score error: mean of σ²·|score − exact score|² over events and log-SNR"
        )

    def __repr__(self) -> str:
        rows = [
            (
                "model",
                "event",
                "parameterization",
                "iterations",
                "weights",
                "score error",
                "what it is",
            )
        ]
        rows += [
            (
                card.name,
                str(card.event_shape),
                card.parameterization,
                str(card.training.get("iterations", "")),
                card.trained,
                f"{card.quality['score_error']:.2g}"
                if "score_error" in card.quality
                else "",
                card.title,
            )
            for card in self.values()
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(
                cell.ljust(width) for cell, width in zip(row, widths, strict=True)
            ).rstrip()
            for row in rows
        ]
        return printable("\n".join([*lines, self.legend]))


def load(
    name: str,
    *,
    retraining: int = 0,
    folder: str | Path | None = None,
    **conditions: object,
) -> LeafFactor:
    """Loads a pretrained model as a factor: a `Diffusion` or a `Classifier`, normalised
    where that is stored.

    Args:
        name: one of `zoo`.
        retraining: which training of it: 0, or for some models another, by the same
            recipe with another random key, to see how much of a result is the luck of
            one training. Those are stored in half precision.
        folder: where its weights lie, such as ``"out/ring2d"``, where ``composeprob
            train`` writes them; left out, in the zoo.
        conditions: conditions to give at once, as ``load(name).given(**conditions)``
            does. The normaliser depends on them: where it is stored for these values,
            ``load("digits", label=3)``, the factor has it.

    Raises:
        LoadError: no such model or retraining, its weights are not installed or do not
            fit its network; or its calibration is of other weights.
        ConditionError: the model has no such condition.

    Example:
        >>> import composeprob as cp
        >>> ring = cp.load("ring2d")
        >>> ring.event_shape, sorted(ring.capabilities)
        ((2,), ['conservative', 'energy', 'exact_marginals', 'normalised', 'score'])
    """
    with usual():
        weights = _weights(name, retraining, folder)
        plain, calibration = (
            calibration_file(weights),
            calibration_file(weights, conditions),
        )
        if not conditions:
            return _load(name, weights, _written(weights), plain, _written(plain))
        factor = _load(name, weights, _written(weights), plain, 0).given(
            **conditions
        )  # the same for all conditions
        return (
            load_calibration(factor, calibration, weights=weights)
            if calibration.exists()
            else factor
        )


def uncalibrated(
    name: str, retraining: int = 0, folder: str | Path | None = None
) -> tuple[Diffusion | Classifier, Path]:
    """Loads a model as it was trained, as `load` does; returns it with the file of its
    weights."""
    weights, model = _weights(name, retraining, folder), recipe(name)
    shapes = eqx.filter_eval_shape(
        model.untrained, jax.random.key(0)
    )  # no weight is computed only to be replaced
    return model.factor(load_weights(shapes, weights), label=name), weights


def calibration_file(
    weights: Path, conditions: Mapping[str, object] | None = None
) -> Path:
    """Returns the file of a calibration: beside the weights, with their number, named
    by the conditions' values."""
    values = "".join(
        f".{name}-{np.asarray(value).tolist()}"
        for name, value in sorted((conditions or {}).items())
    )
    name = weights.name.replace("weights", "calibration", 1)
    return weights.with_name(
        name.removesuffix(".safetensors") + values + ".safetensors"
    )


def _weights(name: str, retraining: int, folder: str | Path | None) -> Path:
    recipe(name)  # refuses what is no model
    installed = models_folder() / name
    if (
        folder is None
        and (installed / "metrics.json").exists()
        and not retrainings(installed)
    ):
        raise LoadError(
            f"The weights of model '{name}' are not installed: composeprob itself brings those of a few models.",
            fix="pip install 'composeprob[zoo]' brings them all.",
        )
    folder = installed if folder is None else Path(folder)
    weights = folder / weights_file(retraining)
    if retraining != 0 and not weights.exists():
        has = ", ".join(map(str, retrainings(folder))) or "none"
        raise LoadError(
            f"Model '{name}' has no retraining {retraining!r}; it has: {has}.",
            fix=f"use one of these, or train it: composeprob train {name} --out {folder}"
            + (
                f" --retraining {retraining}"
                if isinstance(retraining, int) and retraining > 0
                else ""
            ),
        )
    return weights


def _written(file: Path) -> int:
    return file.stat().st_mtime_ns if file.exists() else 0


@functools.lru_cache(maxsize=32)
def _load(
    name: str, weights: Path, written: int, calibration: Path, calibrated: int
) -> LeafFactor:
    """Loads each model once: the same factor every time, so that the compiler shares
    its evaluations."""
    factor, _ = uncalibrated(
        name, int(weights.stem.partition("-")[2] or 0), weights.parent
    )
    return (
        load_calibration(factor, calibration, weights=weights) if calibrated else factor
    )


def retrainings(folder: Path) -> tuple[int, ...]:
    """Lists the retrainings whose weights lie in a model's folder, in order."""
    numbers = [
        file.stem.partition("-")[2] or "0"
        for file in folder.glob("weights*.safetensors")
    ]
    return tuple(sorted(int(number) for number in numbers if number.isdecimal()))


@overload
def zoo(name: str) -> Card: ...


@overload
def zoo(name: None = None) -> Zoo: ...


def zoo(name: str | None = None) -> Card | Zoo:
    """Returns the cards of all models by name, or the card of one.

    Raises:
        LoadError: no such model.

    Example:
        >>> import composeprob as cp
        >>> cp.zoo("bar2d").name, "bar2d" in cp.zoo()
        ('bar2d', True)
    """
    if name is not None:
        return _card(_folder(name))
    return Zoo(
        {
            folder.name: _card(folder)
            for folder in _folders()
            if (folder / "metrics.json").exists()
        }
    )


def recipe(name: str) -> Recipe:
    """Returns the recipe that a model is trained by; a `LoadError` where its train.py
    defines none."""
    found = defined(name, "RECIPE")
    if not isinstance(found, Recipe):
        raise LoadError(
            f"{_folder(name) / 'train.py'} defines no RECIPE.",
            fix="assign a cp.training.Recipe to RECIPE there.",
        )
    return found


def reference(name: str) -> Distribution | None:
    """Returns the exact NumPyro distribution that a model learned; None where it is
    unknown."""
    function = defined(name, "reference")
    return None if function is None else function()


def defined(name: str, what: str) -> Any:
    """Returns what a model's train.py defines beside its recipe, such as ``held_out``
    data; None where it does not."""
    train = importlib.import_module(f"{models.__name__}.{_folder(name).name}.train")
    return getattr(train, what, None)


def models_folder() -> Path:
    """Returns the folder of models: inside an installed package, or beside the package
    in a checkout."""
    folder = Path(next(iter(models.__path__)))
    if not folder.is_dir():
        raise LoadError(
            f"The zoo is not installed: there is no {folder}.",
            fix="install composeprob from a wheel, or run it from a checkout.",
        )
    return folder


def _folders() -> list[Path]:
    return sorted(file.parent for file in models_folder().glob("*/train.py"))


def _folder(name: str) -> Path:
    names = [folder.name for folder in _folders()]
    if name not in names:
        near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.4)
        raise LoadError(
            f"The zoo has no model {name!r}; it has: {', '.join(names)}.",
            fix=f"did you mean {near[0]!r}?" if near else "use one of these names.",
        )
    return models_folder() / name


def _card(folder: Path) -> Card:
    try:
        text = (folder / "card.md").read_text(encoding="utf-8")
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        calibrated = calibration_file(folder / weights_file(0)).exists()
        below = (
            line.strip()
            for line in text.splitlines()
            if not line.strip().startswith("#")
        )  # the heading
        return Card(
            name=folder.name,
            title=next(filter(None, below), ""),
            text=text,
            event_shape=tuple(metrics["event_shape"]),
            parameterization=metrics["parameterization"],
            capabilities=frozenset(
                (*metrics["capabilities"], *(["normalised"] if calibrated else []))
            ),
            training=metrics["training"],
            quality=metrics["quality"],
            folder=folder,
            retrainings=retrainings(folder),
        )
    except (OSError, ValueError, KeyError) as error:
        raise LoadError(
            f"The card of model '{folder.name}' cannot be read: {type(error).__name__}: {error}",
            fix=f"train it: composeprob train {folder.name} --out {folder} --replace",
        ) from error
