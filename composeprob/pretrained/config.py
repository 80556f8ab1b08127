"""Options of a network or scheduler, from its JSON file: each is supported, or refused
by name."""

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
    """Values that an option may have, in words and as a test."""

    text: str
    accepts: Callable[..., bool]

    def __repr__(self) -> str:
        return self.text

    @property
    def each(self) -> Kind:
        """One value for all blocks, or a list of one for each."""
        listed = self.listed
        return Kind(
            f"{self.text}, or {listed.text}",
            lambda v: self.accepts(v) or listed.accepts(v),
        )

    @property
    def listed(self) -> Kind:
        """A list of values of this kind, not empty."""
        return Kind(
            f"a list, each {self.text}",
            lambda v: isinstance(v, list) and v != [] and all(map(self.accepts, v)),
        )


# `type(v) is int`, as True and False are instances of int too.
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
    """Return the object that a JSON file holds."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LoadError(
            f"There is no {path}.",
            fix="give a folder as diffusers' save_pretrained writes it, "
            "with all of its files.",
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        fix = "fetch the file again: it is damaged or cut short."
        raise LoadError(f"{path} cannot be read as JSON: {error}", fix=fix) from error
    if not isinstance(content, dict):
        fix = "fetch the file again: another file is in its place."
        raise LoadError(
            f"{path} holds {type(content).__name__} and not an object.", fix=fix
        )
    return content


def check_beside(names: Iterable[str], file: Path, noun: str) -> None:
    """Refuse files or folders that a file names but that do not lie right beside it.

    ``noun`` is ``"file"`` or the like, for the message.
    """
    for name in names:
        if Path(name).name != name or "\\" in name or name in ("", ".."):
            raise LoadError(
                f"{file} names the {noun} {name!r}, which does not lie beside it; "
                "nothing outside of a model's folder is read.",
                fix=f"move the {noun} beside {file.name} and name it without a path; "
                "if you do not know why it lies elsewhere, delete the folder.",
            )


_OLD_NAMES = {"num_train_steps": "num_train_timesteps"}
_HISTORY = {
    "architectures",
    "dtype",
    "model_type",
    "name_or_path",
    "torch_dtype",
    "transformers_version",
}
"""Options that say how a file came about, and nothing about its network."""


class Options(SimpleNamespace):
    """Options of a file that a network's shapes do not contain, as attributes.

    Each rule gives an option's default, as in the original, and the other values or
    kinds of values that it may have. Names in the file that begin with an underscore
    are notes.
    """

    def __init__(
        self, config: JSONObject, where: str, **rules: tuple[JSON | Kind, ...]
    ):
        self.where = where
        self._supported = set(rules)
        self._given: JSONObject = {}
        for name, value in config.items():
            if not name.startswith("_"):
                self._given[_OLD_NAMES.get(name, name)] = value
        for name, accepted in rules.items():
            # The first rule is the default itself.
            value = self._given.get(name, accepted[0])
            if not any(_accepts(rule, value) for rule in accepted):
                unsupported(where, name, value, accepted)
            setattr(self, name, value)

    def agree(self, others: bool = False, **sizes: object) -> None:
        """Refuse a file whose sizes are not those of the weights, or that has options
        which are not supported.

        ``sizes`` are those of the arrays' shapes: a list has a value for each block,
        for all of which the file may give one, and None stands for anything. With
        ``others`` the file may have further options, which do not concern the network.
        """
        for name, size in sizes.items():
            value = self._given.get(name)
            if value is not None and not _same(value, size):
                raise LoadError(
                    f"{self.where} has {name}={value!r}, but the weights beside it are "
                    f"those of {name}={size!r}.",
                    fix="take config.json and the weights from one source.",
                )
        # An option that is ignored would change the network without a word.
        unknown = sorted(set(self._given) - self._supported - set(sizes) - _HISTORY)
        if unknown and not others:
            noun = "option" if len(unknown) == 1 else "options"
            raise LoadError(
                f"{self.where} has the {noun} {', '.join(unknown)}, which this network "
                "is not known to have: without them it would not compute what was "
                "trained.",
                fix="load a model without it; if the option does not concern the "
                "network, delete it from the file.",
            )

    def per_block(self, name: str, count: int) -> list[Any]:
        """Values for each block of an option that is given once, or once for each."""
        value = getattr(self, name)
        if not isinstance(value, list | tuple):
            return [value] * count
        if len(value) != count:
            raise LoadError(
                f"{self.where} has {len(value)} values of {name} for {count} blocks.",
                fix="give one value for all blocks, or one for each; take config.json "
                "and the weights from one source.",
            )
        return list(value)


def _same(value: JSON, size: object) -> bool:
    """Return whether a file's value is that of the weights."""
    if isinstance(size, tuple):
        return isinstance(value, list | tuple) and list(value) == list(size)
    if isinstance(size, list):
        values = value if isinstance(value, list) else [value] * len(size)
        return len(values) == len(size) and all(map(_same, values, size))
    return size is None or _equal(value, size)


def _accepts(rule: JSON | Kind, value: JSON) -> bool:
    if isinstance(rule, Kind):
        return rule.accepts(value)
    return _equal(value, rule)


def _equal(value: object, other: object) -> bool:
    """Return whether two values are equal and of one type: True is not 1."""
    return type(value) is type(other) and value == other


def unsupported(
    where: str, name: str, value: object, supported: tuple[JSON | Kind, ...]
) -> NoReturn:
    """Refuse an option's value."""
    raise LoadError(
        f"{where} has {name}={reprlib.repr(value)}, which is not supported.",
        fix=f"{name} may be {', '.join(map(repr, supported))}; "
        "wrap another network yourself: cp.Diffusion(…).",
    )
