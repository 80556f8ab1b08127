"""Checks of arguments that many public functions take: a random key, a whole number."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from composeprob.errors import InvalidValueError, WrongTypeError


def check_key(key: object) -> None:
    """Refuses what is not one typed random key.

    Raises:
        WrongTypeError: it is not.
    """
    if not isinstance(key, jax.Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.ndim:
        raise WrongTypeError(
            f"key must be one typed random key; got {type(key).__name__}.", fix="pass jax.random.key(0), not PRNGKey."
        )


def check_number(value: object, what: str, least: int = 1) -> int:
    """Returns the value as an int.

    Raises:
        InvalidValueError: it is no whole number, or less than ``least``.
    """
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
        raise InvalidValueError(
            f"{what} must be a whole number ≥ {least}; got {value!r}.", fix="pass an int, such as 64."
        )
    return int(value)


def check_count(value: object, name: str) -> int:
    """Returns a number of chains, draws or transitions as an int.

    Raises:
        WrongTypeError: it is no whole number.
        InvalidValueError: it is below 1.
    """
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise WrongTypeError(f"{name} must be a whole number; got {value!r}.", fix="pass an int, such as 1000.")
    if value < 1:
        raise InvalidValueError(f"{name} must be at least 1; got {value}.", fix="ask for one or more.")
    return int(value)
