"""The options of a network or scheduler, from its JSON file: every one is known, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn, TypeVar

import numpy as np

from composeprob.errors import LoadError
from composeprob.json_data import JSON, JSONObject

Made = TypeVar("Made")
Value = TypeVar("Value")
Build = Callable[[JSONObject, str], Made]
"""Makes a network's skeleton, or levels, of a file's options; the second argument is the file, for errors."""


def read_json(path: Path) -> JSONObject:
    """Reads one JSON object.

    Raises:
        LoadError: no such file, or it holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LoadError(
            f"There is no {path}.", fix="give a folder as diffusers' save_pretrained writes it, with all of its files."
        ) from error
    except (OSError, ValueError) as error:
        raise LoadError(
            f"{path} cannot be read as JSON: {error}", fix="fetch the file again: it is damaged or cut short."
        ) from error
    if not isinstance(found, dict):
        raise LoadError(
            f"{path} holds {type(found).__name__} and not an object.", fix="fetch the file again: it is another one."
        )
    return found


def options(
    config: JSONObject,
    where: str,
    *,
    defaults: Mapping[str, JSON],
    supported: Mapping[str, tuple[JSON, ...]],
    others: bool = False,
) -> SimpleNamespace:
    """Returns every option of a network, the original's default where the file gives none.

    Args:
        config: the file's object; names that begin with an underscore are notes.
        where: the file, for errors.
        defaults: all options that the network has, with the original's defaults.
        supported: the values that are supported, of options of which not all are.
        others: whether the file may hold options of something else beside the network's.

    Raises:
        LoadError: an option that the network does not have, or a value that is not supported.
    """
    old_names = {"num_train_steps": "num_train_timesteps"}
    history = {"architectures", "dtype", "model_type", "name_or_path", "torch_dtype", "transformers_version"}
    given = {old_names.get(name, name): value for name, value in config.items() if not name.startswith("_")}
    unknown = sorted(set(given) - set(defaults) - history)
    if unknown and not others:
        raise LoadError(
            f"{where} has the option{'s' * (len(unknown) > 1)} {', '.join(unknown)}, which this network is not known "
            "to have: it would compute something else than was trained.",
            fix="load a model without it; if the option does not concern the network, delete it from the file.",
        )
    found = SimpleNamespace(**{**defaults, **{name: value for name, value in given.items() if name in defaults}})
    check(found, supported, where)
    return found


def check(found: SimpleNamespace, supported: Mapping[str, tuple[JSON, ...]], where: str) -> None:
    """Refuses the first option whose value is not among those that are supported.

    Raises:
        LoadError: it names the option, its value and those supported.
    """
    for name, values in supported.items():
        value = getattr(found, name)
        if not any(value is v or (type(value) is type(v) and value == v) for v in values):
            unsupported(where, name, value, values)


def unsupported(where: str, name: str, value: object, supported: tuple[JSON, ...]) -> NoReturn:
    """Refuses an option's value."""
    raise LoadError(
        f"{where} has {name}={value!r}, which is not supported.",
        fix=f"{name} may be {', '.join(map(repr, supported))}; wrap another network yourself: cp.Diffusion(…).",
    )


def check_block(where: str, name: str, kind: str, supported: tuple[str, ...]) -> None:
    """Refuses a block of a kind that is not supported."""
    if kind not in supported:
        unsupported(where, name, kind, supported)


def built(build: Build[Made], config: JSONObject, where: str) -> Made:
    """Returns ``build(config, where)``; a value of a kind that cannot be meant is refused by the option's name.

    Raises:
        LoadError: of ``build`` itself, or whatever it stumbled over.
    """
    try:
        with np.errstate(divide="raise", invalid="raise", over="raise"):
            return build(config, where)
    except LoadError:
        raise
    except (TypeError, ValueError, AttributeError, ArithmeticError, LookupError, RuntimeError) as error:
        name = _culprit(build, config, where, of_kind=isinstance(error, TypeError | AttributeError))
        problem = "holds options" if name is None else f"has {name}={config[name]!r}"
        raise LoadError(
            f"{where} {problem} of which nothing can be made: {type(error).__name__}: {str(error).splitlines()[0]}",
            fix="fetch the file again, from where the weights are; or correct the value.",
        ) from error


def _culprit(build: Build[object], config: JSONObject, where: str, of_kind: bool) -> str | None:
    """The option without which the rest can be built; for values ``of_kind``, or is refused in words of its own."""
    refused = None
    for name in config:
        try:
            build({other: value for other, value in config.items() if other != name}, where)
            return name
        except LoadError:
            refused = refused or name
        except Exception:
            continue  # another option is at fault
    return refused if of_kind else None


def per_block(value: Value | list[Value] | tuple[Value, ...], count: int, name: str, where: str) -> list[Value]:
    """An option that is given once, or once for each block, as a list of one value a block.

    Raises:
        LoadError: a list of another length.
    """
    if not isinstance(value, list | tuple):
        return [value] * count
    if len(value) != count:
        raise LoadError(
            f"{where} has {len(value)} values of {name} for {count} blocks.",
            fix="give one value for all blocks, or one for each.",
        )
    return list(value)
