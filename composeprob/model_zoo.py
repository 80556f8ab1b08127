"""The zoo: pretrained models by name, from ``models/`` of a checkout or from an
installed wheel.

A model is a folder with ``train.py`` (its ``RECIPE``, and ``reference()`` where the
exact distribution is known), ``weights.safetensors``, ``card.md`` and ``metrics.json``;
retrainings with other random keys lie beside it as ``weights-1.safetensors`` and so on.
Nothing is unpickled: a network is built by its recipe, and filled with arrays. The
package composeprob holds the weights of a few models, composeprob-zoo those of all
others, which it installs into the same folders.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import equinox as eqx
import jax
import numpy as np

from composeprob import models
from composeprob.calibration.driver import load_calibration
from composeprob.core import Classifier, Diffusion, LeafFactor, MaskedDiffusion
from composeprob.errors import LoadError, WrongTypeError
from composeprob.extras import needed
from composeprob.json_data import JSONObject
from composeprob.pretrained import proteinmpnn
from composeprob.settings import usual
from composeprob.text import clipped, printable, spoken_shape
from composeprob.training.masked import MaskedRecipe
from composeprob.training.recipe import Recipe
from composeprob.training.weight_files import load_weights, weights_file

if TYPE_CHECKING:
    from numpyro.distributions import Distribution


@dataclass(frozen=True, repr=False)
class Card:
    """A `Card` describes one model, its training and its quality.

    Attributes:
        name: the name for `load`.
        title: one line.
        text: the whole card, Markdown.
        event_shape: as of the factor.
        parameterization: as of the factor.
        capabilities: as of the factor.
        training: settings and seconds, as recorded when it was trained.
        quality: measured against the exact distribution; empty where that is unknown.
        folder: the folder of the model.
        retrainings: values of `load`'s ``retraining``: 0, and those with other random
            keys; empty where the weights are not installed.
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
        """Number of trainings in words, or that the weights are not installed."""
        count = len(self.retrainings)
        if count == 0:
            return "not installed"
        if count == 1:
            return "trained once"
        return f"trained {count} times"

    @property
    def _row(self) -> tuple[str, ...]:
        """Cells of the zoo's table."""
        error = self.quality.get("score_error")
        return (
            self.name,
            str(self.event_shape),
            self.parameterization,
            str(self.training.get("iterations", "")),
            self.trained,
            "" if error is None else f"{error:.2g}",
            self.title,
        )

    def __repr__(self) -> str:
        offers = self.parameterization
        if offers != "masked":
            offers = "energy" if "energy" in self.capabilities else "score"
        facts = f"{offers}, {spoken_shape(self.event_shape)}"
        if len(self.retrainings) != 1:
            facts += f", {self.trained}"
        return printable(clipped(f"{self.name} ({facts}): {self.title}"))


_COLUMNS = (
    "model",
    "event",
    "parameterization",
    "iterations",
    "weights",
    "score error",
    "what it is",
)


class Zoo(dict[str, Card]):
    """A `Zoo` maps the name of every model to its card; it prints as a table."""

    @property
    def legend(self) -> str:
        """Meaning of the table's columns."""
        return (
            "weights: number of trainings, see load(retraining=); those that are not "
            "installed come with composeprob[zoo]. "
            "score error: mean of σ²·|score − exact score|² over events and log-SNR"
        )

    def __repr__(self) -> str:
        rows = [_COLUMNS, *(card._row for card in self.values())]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for row in rows:
            cells = zip(row, widths, strict=True)
            padded = [cell.ljust(width) for cell, width in cells]
            lines.append("  ".join(padded).rstrip())
        return printable("\n".join([*lines, self.legend]))


def load(
    name: str,
    *,
    retraining: int = 0,
    folder: str | Path | None = None,
    **conditions: object,
) -> LeafFactor:
    """Load a pretrained model as a factor: a `Diffusion`, a `Classifier` or a
    `MaskedDiffusion`, normalised where its normaliser is stored.

    Args:
        name: one of `zoo`; or the folder of a ProteinMPNN, as
            ``tools/convert_proteinmpnn.py`` writes it, whose factor is
            ``model.given(backbone=X)`` with X the atoms N, CA, C and O of each residue
            in ångström, (length, 4, 3).
        retraining: the number of the training: 0, or for some models another, by the
            same recipe with another random key, to see how much of a result is the luck
            of one training. Those are stored in half precision.
        folder: the folder of its weights, such as ``"out/ring2d"``, where ``composeprob
            train`` writes them; left out, that of the zoo.
        conditions: conditions to give at once, as ``load(name).given(**conditions)``
            does. The normaliser depends on them: where it is stored for these values,
            ``load("digits", label=3)``, the factor has it.

    Raises:
        WrongTypeError: not a name.
        LoadError: no such model or retraining, or its weights are not installed or do
            not fit its network, or its calibration is of other weights.
        ConditionError: the model has no such condition.

    Example:
        >>> import composeprob as cp
        >>> ring = cp.load("ring2d")
        >>> ring.event_shape, sorted(ring.capabilities)
        ((2,), ['conservative', 'energy', 'exact_marginals', 'normalised', 'score'])
    """
    if not isinstance(name, (str, os.PathLike)):
        raise WrongTypeError(
            f"load takes the name of a model; got {name!r}.",
            fix="cp.zoo() lists the names: cp.load('ring2d').",
        )
    if proteinmpnn.is_folder(Path(name)):
        return proteinmpnn.from_folder(Path(name)).given(**conditions)
    with usual():
        weights = _weights(name, retraining, folder)
        unconditional = calibration_file(weights)
        if not conditions:
            calibrated = _modified(unconditional)
            return _load(name, weights, _modified(weights), unconditional, calibrated)
        # One uncalibrated factor for all conditions, so that their networks are shared.
        shared = _load(name, weights, _modified(weights), unconditional, 0)
        factor = shared.given(**conditions)
        calibration = calibration_file(weights, conditions)
        if not calibration.exists():
            return factor
        return load_calibration(factor, calibration, weights=weights)


def uncalibrated(
    name: str, retraining: int = 0, folder: str | Path | None = None
) -> tuple[Diffusion | Classifier | MaskedDiffusion, Path]:
    """Load a model as it was trained, as `load` does; return it with the file of its
    weights."""
    weights = _weights(name, retraining, folder)
    model = recipe(name)
    # Shapes only: initial weights would be computed just to be replaced.
    shapes = eqx.filter_eval_shape(model.untrained, jax.random.key(0))
    return model.factor(load_weights(shapes, weights), label=name), weights


def calibration_file(
    weights: Path, conditions: Mapping[str, object] | None = None
) -> Path:
    """Return the file of a calibration: beside the weights, with their number, named by
    the conditions' values."""
    name = weights.name.replace("weights", "calibration", 1)
    name = name.removesuffix(".safetensors")
    for condition, value in sorted((conditions or {}).items()):
        name += f".{condition}-{np.asarray(value).tolist()}"
    return weights.with_name(f"{name}.safetensors")


def _weights(name: str, retraining: int, folder: str | Path | None) -> Path:
    """Return the file of a training's weights; refuse unknown models and trainings, and
    weights that are not installed."""
    recipe(name)  # raises for an unknown model
    if folder is None:
        folder = models_folder() / name
        trained = (folder / "metrics.json").exists()
        if trained and not retrainings(folder):
            raise LoadError(
                f"The weights of model '{name}' are not installed: composeprob itself "
                "brings those of a few models.",
                fix="in a clone, pip install ./models brings them all; from an index, "
                "composeprob[zoo] does.",
            )
    folder = Path(folder)
    weights = folder / weights_file(retraining)
    if retraining != 0 and not weights.exists():
        available = ", ".join(map(str, retrainings(folder))) or "none"
        command = f"composeprob train {name} --out {folder}"
        if isinstance(retraining, int) and retraining > 0:
            command += f" --retraining {retraining}"
        raise LoadError(
            f"Model '{name}' has no retraining {retraining!r}; it has: {available}.",
            fix=f"use one of these, or train it: {command}",
        )
    return weights


def _modified(file: Path) -> int:
    """Time of a file's last change in nanoseconds; 0 where it does not exist."""
    return file.stat().st_mtime_ns if file.exists() else 0


@functools.lru_cache(maxsize=32)
def _load(
    name: str, weights: Path, modified: int, calibration: Path, calibrated: int
) -> LeafFactor:
    """Load each model once: the same factor every time, so that the compiler shares its
    evaluations.

    Times of the files' last changes, ``modified`` and ``calibrated``, are part of the
    cache's key; a ``calibrated`` of 0 leaves the calibration out.
    """
    factor, _ = uncalibrated(name, int(_number(weights)), weights.parent)
    if not calibrated:
        return factor
    return load_calibration(factor, calibration, weights=weights)


def retrainings(folder: Path) -> tuple[int, ...]:
    """List the retrainings whose weights lie in a model's folder, in order."""
    numbers = map(_number, folder.glob("weights*.safetensors"))
    # The folder may hold other files, such as weights-best.safetensors.
    return tuple(sorted(int(number) for number in numbers if number.isdecimal()))


def _number(weights: Path) -> str:
    """The retraining in the name of a file of weights; ``"0"`` in a name without
    one."""
    return weights.stem.partition("-")[2] or "0"


@overload
def zoo(name: str) -> Card: ...


@overload
def zoo(name: None = None) -> Zoo: ...


def zoo(name: str | None = None) -> Card | Zoo:
    """Return the cards of all models by name, or the card of one.

    Raises:
        LoadError: no such model.

    Example:
        >>> import composeprob as cp
        >>> cp.zoo("bar2d").name, "bar2d" in cp.zoo()
        ('bar2d', True)
    """
    if name is not None:
        return _card(_folder(name))
    cards = Zoo()
    for folder in _folders():
        if (folder / "metrics.json").exists():
            # A model without metrics has not been trained yet.
            cards[folder.name] = _card(folder)
    return cards


def recipe(name: str) -> Recipe | MaskedRecipe:
    """Return the recipe that a model is trained by.

    Raises:
        LoadError: no such model, or its train.py defines no recipe.
    """
    model = defined(name, "RECIPE")
    if not isinstance(model, Recipe | MaskedRecipe):
        raise LoadError(
            f"{_folder(name) / 'train.py'} defines no RECIPE.",
            fix="assign a cp.training.Recipe to RECIPE there.",
        )
    return model


def reference(name: str) -> Distribution | None:
    """Return the exact NumPyro distribution that a model learned; None where it is
    unknown."""
    function = defined(name, "reference")
    return None if function is None else function()


def defined(name: str, attribute: str) -> Any:
    """Return an attribute of a model's train.py, such as ``held_out`` data; None where
    it has none of that name."""
    module = f"{models.__name__}.{_folder(name).name}.train"
    with needed("flax", f"The network of model '{name}'"):
        train = importlib.import_module(module)
    return getattr(train, attribute, None)


def models_folder() -> Path:
    """Return the folder of models: inside an installed package, or beside the package
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
    """Folder of a model; refuses a name that the zoo does not have."""
    names = [folder.name for folder in _folders()]
    if name in names:
        return models_folder() / name
    if Path(str(name)).exists() or Path(f"{name}.safetensors").exists():
        raise LoadError(
            f"{str(name)!r} is a file or a folder; load takes the name of a model.",
            fix="read a saved result by cp.Result.load(path), a diffusers folder by "
            "cp.from_diffusers(path), and trained weights of one of the zoo's models "
            "by cp.load(name, folder=path).",
        )
    if "/" in str(name):
        raise LoadError(
            f"There is no folder {str(name)!r}, and names of models have no '/'.",
            fix="load takes the name of a model of the zoo; check the path, and read a "
            "folder of diffusers by cp.from_diffusers(path).",
        )
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.4)
    fix = f"did you mean {close[0]!r}?" if close else "use one of these names."
    raise LoadError(
        f"The zoo has no model {name!r}; it has: {', '.join(names)}.", fix=fix
    )


def _card(folder: Path) -> Card:
    # A card of a training that was interrupted may lack some of this.
    try:
        text = (folder / "card.md").read_text(encoding="utf-8")
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        capabilities = set(metrics["capabilities"])
        if calibration_file(folder / weights_file(0)).exists():
            capabilities.add("normalised")
        return Card(
            name=folder.name,
            title=_title(text),
            text=text,
            event_shape=tuple(metrics["event_shape"]),
            parameterization=metrics["parameterization"],
            capabilities=frozenset(capabilities),
            training=metrics["training"],
            quality=metrics["quality"],
            folder=folder,
            retrainings=retrainings(folder),
        )
    except (OSError, ValueError, KeyError) as error:
        raise LoadError(
            f"The card of model '{folder.name}' cannot be read: "
            f"{type(error).__name__}: {error}",
            fix=f"train it: composeprob train {folder.name} --out {folder} --replace",
        ) from error


def _title(card: str) -> str:
    """First line of a card's text below its heading; empty where it has none."""
    for line in map(str.strip, card.splitlines()):
        if line and not line.startswith("#"):
            return line
    return ""
