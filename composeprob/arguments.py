"""Checks of arguments that many public functions take: their names and number, a random
key, a whole number."""

from __future__ import annotations

import copy
import difflib
import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, NoReturn, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from composeprob.errors import MEANT, InvalidValueError, WrongTypeError, a_kind

Function = TypeVar("Function", bound=Callable[..., object])


class NotPickled:
    """What holds compiled functions, which no pickle can: its error says how to keep
    it. Copies are as of others."""

    _kept_by: ClassVar[str]

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        name = type(self).__name__
        raise WrongTypeError(
            f"A {name} cannot be pickled: it holds compiled functions.",
            fix=self._kept_by,
        )

    def __copy__(self) -> Self:
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        return made

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        made = object.__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made


def answer(public: type) -> None:
    """Lets the constructor and the public methods of a class answer calls whose
    arguments they do not take."""
    for base in public.__mro__:
        if base.__module__.partition(".")[0] != "composeprob":
            continue
        for name, member in list(vars(base).items()):
            function = member.__func__ if isinstance(member, classmethod) else member
            if not inspect.isfunction(function) or (
                name.startswith("_") and name != "__init__"
            ):
                continue
            if not hasattr(function, "answers"):
                called = answered(
                    function,
                    base.__name__ if name == "__init__" else f"{base.__name__}.{name}",
                )
                setattr(
                    base,
                    name,
                    classmethod(called) if isinstance(member, classmethod) else called,
                )


def answered(function: Function, name: str = "") -> Function:
    """A public function that answers calls whose arguments it does not take: by a
    `WrongTypeError`, with those."""

    @functools.wraps(function)
    def call(*args: object, **kwargs: object) -> object:
        try:
            return function(*args, **kwargs)
        except WrongTypeError:
            raise
        except TypeError:
            signature = inspect.signature(function)
            try:
                signature.bind(*args, **kwargs)
            except TypeError as misfit:
                raise _misfit(
                    name or function.__name__, signature, kwargs, misfit
                ) from None
            raise  # of a line inside

    call.answers = True  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


def _misfit(
    name: str,
    signature: inspect.Signature,
    kwargs: dict[str, object],
    misfit: TypeError,
) -> WrongTypeError:
    known = [
        parameter
        for parameter in signature.parameters.values()
        if parameter.name not in ("self", "cls")
    ]
    names = [parameter.name for parameter in known]
    fix = f"it takes {name}({', '.join(map(_shown, known))})."
    if name == "Schedule":
        fix = "make one of K levels: cp.Schedule.cosine(100), .linear(1000), .log_snr(60), or .from_arrays(alpha, sigma)."
    unknown = next((given for given in kwargs if given not in names), "")
    if unknown in MEANT["arguments"]:
        fix = MEANT["arguments"][unknown]
    elif close := difflib.get_close_matches(unknown, names, 1):
        fix = f"did you mean {close[0]}=? {fix[0].upper()}{fix[1:]}"
    return WrongTypeError(
        f"{name} cannot be called with these arguments: {misfit}.", fix=fix
    )


def _shown(parameter: inspect.Parameter) -> str:
    """A parameter in a message, such as ``steps_per_level=5``; those that must be named
    are."""
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        return str(parameter.replace(annotation=parameter.empty))
    if parameter.default is not parameter.empty:
        return f"{parameter.name}={parameter.default!r}"
    return (
        f"{parameter.name}=…"
        if parameter.kind is parameter.KEYWORD_ONLY
        else parameter.name
    )


def check_path(path: object, what: str, example: str) -> Path:
    """Returns a path; refuses what is none."""
    if not isinstance(path, (str, os.PathLike)):
        raise WrongTypeError(
            f"{what} must be a path; got {a_kind(path)}.",
            fix=f"pass a str or a pathlib.Path, such as {example!r}.",
        )
    return Path(path)


def check_key(key: object) -> None:
    """Refuses what is not one typed random key."""
    if (
        not isinstance(key, jax.Array)
        or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        or key.ndim
    ):
        fix = f"pass jax.random.key({key if isinstance(key, int) else 0}), not PRNGKey, nor several."
        raise WrongTypeError(
            f"key must be one typed random key; got {type(key).__name__}.", fix=fix
        )


def check_count(value: object, what: str, least: int = 1) -> int:
    """Returns a number of chains, draws, steps or the like as an int; refuses others,
    and those below ``least``."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise WrongTypeError(
            f"{what} must be a whole number; got {value!r}.",
            fix="pass an int, such as 64.",
        )
    if value < least:
        raise InvalidValueError(
            f"{what} must be at least {least}; got {value}.",
            fix=f"ask for {least} or more.",
        )
    return int(value)
