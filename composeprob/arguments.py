"""Checks of arguments of public functions: names and number, a random key, a whole
number, a condition, a choice, numbers that are finite, a path, a folder that can be
written to."""

from __future__ import annotations

import difflib
import functools
import inspect
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from composeprob.errors import MEANT, InvalidValueError, WrongTypeError, a_kind

Function = TypeVar("Function", bound=Callable[..., object])
Value = TypeVar("Value")


class NotPickled:
    """Base of classes that hold compiled functions: the error for a pickle says how to
    save the object instead. Copies share what it holds, which nothing changes."""

    _kept_by: ClassVar[str]

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        name = type(self).__name__
        raise WrongTypeError(
            f"{name} objects cannot be pickled: they hold compiled functions.",
            fix=self._kept_by,
        )

    def __copy__(self) -> Self:
        # Without __init__, which would compile again, and without __reduce_ex__.
        duplicate = object.__new__(type(self))
        duplicate.__dict__.update(self.__dict__)
        return duplicate

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self.__copy__()


def add_errors_of_calls(namespace: dict[str, Any], names: Iterable[str]) -> None:
    """Let calls of public functions and classes of a module, with arguments that they
    do not take, raise a `WrongTypeError` that shows their arguments.

    Args:
        namespace: of the module.
        names: the public ones.
    """
    for name in names:
        public = namespace[name]
        if isinstance(public, type):
            add_call_errors(public)
        elif callable(public):
            namespace[name] = with_call_errors(public)


def add_call_errors(public: type) -> None:
    """Wrap the constructor and the public methods of a class by `with_call_errors`."""
    for base in public.__mro__:
        if base.__module__.partition(".")[0] != "composeprob":
            continue
        for name, member in list(vars(base).items()):
            _add_call_error(base, name, member)


def _add_call_error(owner: type, name: str, member: object) -> None:
    """Wrap one attribute of a class, if it is a public function that is not wrapped
    yet."""
    of_class = isinstance(member, classmethod)
    function = member.__func__ if of_class else member  # type: ignore[attr-defined]
    private = name.startswith("_") and name != "__init__"
    if private or not inspect.isfunction(function):
        return
    # A base of several public classes comes here once for each.
    if hasattr(function, "has_call_errors"):
        return
    shown = owner.__name__ if name == "__init__" else f"{owner.__name__}.{name}"
    wrapped: object = with_call_errors(function, shown)
    if of_class:
        wrapped = classmethod(wrapped)  # type: ignore[arg-type]
    setattr(owner, name, wrapped)


def with_call_errors(function: Function, name: str = "") -> Function:
    """Return a public function whose calls with arguments that it does not take raise a
    `WrongTypeError`, which shows those that it takes."""

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
            except TypeError as mismatch:
                shown = name or function.__name__
                raise _call_error(shown, signature, kwargs, mismatch) from None
            # The arguments fit: the error is that of a line inside the function.
            raise

    call.has_call_errors = True  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


def _call_error(
    name: str,
    signature: inspect.Signature,
    kwargs: dict[str, object],
    mismatch: TypeError,
) -> WrongTypeError:
    """Error of a call: Python's own text, and what to write instead."""
    parameters = dict(signature.parameters)
    for bound in ("self", "cls"):
        parameters.pop(bound, None)
    fix = f"it takes {name}({', '.join(map(_shown, parameters.values()))})."
    if name == "Schedule":
        fix = (
            "make one of K levels: cp.Schedule.cosine(100), .linear(1000), "
            ".log_snr(60), or .from_arrays(alpha, sigma)."
        )
    unknown = next((given for given in kwargs if given not in parameters), "")
    close = difflib.get_close_matches(unknown, list(parameters), 1)
    if unknown in MEANT["arguments"]:
        fix = MEANT["arguments"][unknown]
    elif close:
        fix = f"did you mean {close[0]}=? {fix[0].upper()}{fix[1:]}"
    return WrongTypeError(
        f"{name} cannot be called with these arguments: {mismatch}.", fix=fix
    )


def _shown(parameter: inspect.Parameter) -> str:
    """A parameter as messages show it, such as ``steps_per_level=5`` or
    ``num_chains=…``."""
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        return str(parameter.replace(annotation=parameter.empty))
    if parameter.default is not parameter.empty:
        return f"{parameter.name}={parameter.default!r}"
    if parameter.kind is parameter.KEYWORD_ONLY:
        return f"{parameter.name}=…"
    return parameter.name


def check_path(path: object, what: str, example: str) -> Path:
    """Return a path; refuse other values."""
    if not isinstance(path, (str, os.PathLike)):
        raise WrongTypeError(
            f"{what} must be a path; got {a_kind(path)}.",
            fix=f"pass a str or a pathlib.Path, such as {example!r}.",
        )
    return Path(path)


def check_writable(folder: Path, found: str) -> None:
    """Raise unless a folder can be made and written to, which a long run would find out
    at its end.

    Args:
        folder: the folder for results.
        found: the head of the error, such as "No result can be written to 'out'".
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable-") as file:
            file.write(b"\0")
    except OSError as error:
        raise InvalidValueError(
            f"{found}: {error.strerror or error}.",
            fix="choose a folder that you may write to, on a disk with room.",
        ) from error


def check_key(key: object) -> None:
    """Refuse a value that is not one typed random key."""
    if isinstance(key, jax.Array):
        typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        if typed and key.ndim == 0:
            return
    seed = key if isinstance(key, int) else 0
    raise WrongTypeError(
        f"key must be one typed random key; got {type(key).__name__}.",
        fix=f"pass jax.random.key({seed}), not PRNGKey, nor several.",
    )


def as_code(key: Array) -> str:
    """Return the call that makes a key: from a seed where it has the form of one."""
    data = np.asarray(jax.random.key_data(key)).ravel().tolist()
    kind = str(jax.random.key_impl(key))
    is_default = kind == "threefry2x32"
    if is_default and data[0] == 0:
        return f"jax.random.key({data[1]})"
    impl = "" if is_default else f", impl={kind!r}"
    return f"jax.random.wrap_key_data(jax.numpy.array({data}, jax.numpy.uint32){impl})"


def check_count(value: object, what: str, least: int = 1) -> int:
    """Return a number of chains, draws, steps or the like as an int; refuse other
    values, and numbers below ``least``."""
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


def as_condition(name: str, value: object) -> Array:
    """Return a condition as an array, or raise a `WrongTypeError`; NaN is refused."""
    try:
        array = jax.numpy.asarray(value)
    except (TypeError, ValueError) as error:
        raise WrongTypeError(
            f"Condition {name!r} must be a number or an array; got "
            f"{type(value).__name__}.",
            fix="encode it first (an index, a one-hot vector, an embedding).",
        ) from error
    return check_finite(array, f"Condition {name!r}")


def check_choice(what: str, value: str, known: Iterable[str]) -> None:
    """Refuse a value that is not among the known names."""
    names = tuple(known)
    if value not in names:
        raise InvalidValueError(
            f"Unknown {what} {value!r}.", fix=f"use one of: {', '.join(names)}."
        )


def check_finite(value: Value, what: str) -> Value:
    """Return ``value`` itself; raise an `InvalidValueError` that names ``what`` where a
    concrete float is NaN or infinite."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(value):
        if isinstance(leaf, jax.core.Tracer) or not eqx.is_inexact_array_like(leaf):
            continue
        # NumPy, as this may run inside a trace.
        if not np.all(np.isfinite(np.asarray(leaf))):
            place = jax.tree_util.keystr(path)
            where = f" at {place}" if place else ""
            raise InvalidValueError(
                f"{what} holds NaN or infinite numbers{where}.",
                fix="check where it was computed or loaded; numpy.isfinite finds the "
                "entries.",
            )
    return value
