"""The options of a network or scheduler, from its JSON file: every one is known, or
refused by name."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from composeprob.errors import LoadError
from composeprob.json_data import JSON, JSONObject


@dataclass(frozen=True)
class Kind:
    """The values that an option may have, in words and as a test."""

    text: str
    accepts: Callable[..., bool]

    def __repr__(self) -> str:
        return self.text

    @property
    def each(self) -> Kind:
        """Such a value for all blocks, or a list of one for each."""
        return Kind(
            f"{self.text}, or {self.listed.text}",
            lambda v: self.accepts(v) or self.listed.accepts(v),
        )

    @property
    def listed(self) -> Kind:
        """A list of such values."""
        return Kind(
            f"a list, each {self.text}",
            lambda v: isinstance(v, list) and v != [] and all(map(self.accepts, v)),
        )


whole = Kind(
    "a whole number from 1 to 10,000,000",
    lambda v: type(v) is int and 1 <= v <= 10_000_000,
)
whole_from_0 = Kind("a whole number from 0", lambda v: type(v) is int and v >= 0)
number = Kind("a number", lambda v: type(v) in (int, float) and math.isfinite(v))
positive = Kind("a number above 0", lambda v: number.accepts(v) and v > 0)
text_list = Kind(
    "a list of names",
    lambda v: isinstance(v, list) and all(isinstance(name, str) for name in v),
)
anything = Kind("anything", lambda v: True)
flag = Kind("true or false", lambda v: isinstance(v, bool))


def read_json(path: Path) -> JSONObject:
    """The object that a JSON file holds."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        fix = "give a folder as diffusers' save_pretrained writes it, with all of its files."
        raise LoadError(f"There is no {path}.", fix=fix) from error
    except (OSError, ValueError, RecursionError) as error:
        fix = "fetch the file again: it is damaged or cut short."
        raise LoadError(f"{path} cannot be read as JSON: {error}", fix=fix) from error
    if not isinstance(found, dict):
        fix = "fetch the file again: it is another one."
        raise LoadError(
            f"{path} holds {type(found).__name__} and not an object.", fix=fix
        )
    return found


def check_beside(names: Iterable[str], file: Path, what: str) -> None:
    """Refuses files or folders that a file names but that do not lie right beside
    it."""
    for name in names:
        if Path(name).name != name or "\\" in name or name in ("", ".."):
            raise LoadError(
                f"{file} names the {what} {name!r}, which does not lie beside it; nothing outside of a model's folder "
                "is read.",
                fix=f"move the {what} beside {file.name} and write its name alone; if you do not know why it is so, "
                "delete the folder.",
            )


class Options(SimpleNamespace):
    """The options of a file that a network's shapes do not contain, as attributes.

    ``rules`` give of every option its default, as in the original, and the values or
    kinds of values that it may have beside; names in the file that begin with an
    underscore are notes.
    """

    def __init__(
        self, config: JSONObject, where: str, **rules: tuple[JSON | Kind, ...]
    ):
        old_names = {"num_train_steps": "num_train_timesteps"}
        self.where, self._known = where, set(rules)
        self._given = {
            old_names.get(name, name): value
            for name, value in config.items()
            if name[:1] != "_"
        }
        for name, (default, *others) in rules.items():
            value = self._given.get(name, default)
            if not any(_accepts(rule, value) for rule in (default, *others)):
                unsupported(where, name, value, (default, *others))
            setattr(self, name, value)

    def agree(self, others: bool = False, **sizes: object) -> None:
        """Refuses a file whose sizes are not those of the weights, or that has options
        nobody knows.

        ``sizes`` are what the arrays' shapes give: a list has a value for each block,
        for all of which the file may give one, and None stands for anything. With
        ``others`` the file may have options of something else beside.
        """
        for name, size in sizes.items():
            value = self._given.get(name)
            if value is not None and not _same(value, size):
                raise LoadError(
                    f"{self.where} has {name}={value!r}, but the weights beside it are those of {name}={size!r}.",
                    fix="take config.json and the weights from one source.",
                )
        history = {
            "architectures",
            "dtype",
            "model_type",
            "name_or_path",
            "torch_dtype",
            "transformers_version",
        }
        unknown = sorted(set(self._given) - self._known - set(sizes) - history)
        if unknown and not others:
            raise LoadError(
                f"{self.where} has the option{'s' * (len(unknown) > 1)} {', '.join(unknown)}, which this network is "
                "not known to have: it would compute something else than was trained.",
                fix="load a model without it; if the option does not concern the network, delete it from the file.",
            )

    def per_block(self, name: str, count: int) -> list[Any]:
        """An option that is given once, or once for each block, as a list of one value
        a block."""
        value = getattr(self, name)
        if not isinstance(value, list | tuple):
            return [value] * count
        if len(value) != count:
            fix = "give one value for all blocks, or one for each; take config.json and the weights from one source."
            raise LoadError(
                f"{self.where} has {len(value)} values of {name} for {count} blocks.",
                fix=fix,
            )
        return list(value)


def _same(value: JSON, size: object) -> bool:
    """Whether a file's value is what the weights have."""
    if isinstance(size, tuple):
        return isinstance(value, list | tuple) and list(value) == list(size)
    if isinstance(size, list):
        values = value if isinstance(value, list) else [value] * len(size)
        return len(values) == len(size) and all(map(_same, values, size))
    return size is None or (type(value) is type(size) and value == size)


def _accepts(rule: JSON | Kind, value: JSON) -> bool:
    return (
        rule.accepts(value)
        if isinstance(rule, Kind)
        else type(value) is type(rule) and value == rule
    )


def unsupported(
    where: str, name: str, value: object, supported: tuple[JSON | Kind, ...]
) -> NoReturn:
    """Refuses an option's value."""
    fix = f"{name} may be {', '.join(map(repr, supported))}; wrap another network yourself: cp.Diffusion(…)."
    raise LoadError(
        f"{where} has {name}={reprlib.repr(value)}, which is not supported.", fix=fix
    )
