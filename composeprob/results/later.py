"""Attributes of a result that take a compilation: computed when they are first read."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from composeprob.settings import usual

Value = TypeVar("Value")


class Later:
    """A field of `Result` whose value may be given as a function of the result, which is called once.

    Args:
        default: of the field; left out, it has none.
    """

    def __init__(self, *default: object):
        self.default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, result: object, owner: type) -> object:
        if result is None:  # as `dataclasses.dataclass` looks for a default
            if not self.default:
                raise AttributeError(self.name)
            return self.default[0]
        value = result.__dict__[self.name]
        if callable(value):
            with usual():
                value = result.__dict__[self.name] = value(result)
        return value

    def __set__(self, result: object, value: object) -> None:
        result.__dict__[self.name] = value


def later(function: Callable[..., Value]) -> Value:
    """A function of the result, in the place of the value of such a field."""
    return cast(Value, function)
