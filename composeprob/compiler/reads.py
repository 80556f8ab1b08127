"""What a program reads beside its arguments: globals, variables around it, settings of its objects.

The run evaluates a program by running its Python function again inside of compiled code. What that reads has no place
among the density's arrays: it is part of what is compiled, and must be what it was when the program was compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from composeprob.errors import ProgramError
from composeprob.settings import once_a_call, usual


class Trace(Protocol):
    """A program's trace."""

    def fingerprint(self, objects: bool = True) -> str:
        """Its digest; see `composeprob.factors.fingerprint`."""


class Reads:
    """A digest of the program's trace with all that is read in it; equal to another of the same program and values.

    Args:
        traced: the trace when the program was compiled.
        again: traces it anew.
        program: the program's name.
        where: its place.
    """

    def __init__(self, traced: Trace, again: Callable[[], Trace], program: str, where: str):
        self.traced, self.again, self.program, self.where = traced, again, program, where
        self.fingerprint, self.settings = traced.fingerprint(), _settings()

    def check(self) -> None:
        """Refuse to run a program that reads something else by now.

        Raises:
            ProgramError: it does.
        """
        if self.settings != _settings() or not once_a_call(self):  # another precision traces everything otherwise
            return
        with usual():
            changed = self.again().fingerprint(objects=False) != self.traced.fingerprint(objects=False)
        if changed:
            raise changed_since(self.program, self.where)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Reads) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)


def changed_since(program: str, where: str) -> ProgramError:
    """The error for a program that is not what it was."""
    return ProgramError(
        f"Program '{program}' reads something beside its arguments that has changed since cp.compile: a global, a "
        "variable around it, or random numbers of Python's or NumPy's own.",
        where=where,
        fix="compile it again; or pass what changes as an argument of the program, which needs no new compilation.",
    )


def _settings() -> tuple[object, ...]:
    return jnp.result_type(float), jax.config.jax_disable_jit  # type: ignore[attr-defined]  # one of its settings
