"""Run a program with given values for its latents, and record every statement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro.primitives import Messenger

from composeprob.errors import ComposeProbError, ProgramError
from composeprob.factors.base import Factor
from composeprob.factors.distribution import FactorDistribution
from composeprob.language.source import caller
from composeprob.language.statements import LEVEL


@dataclass(frozen=True, eq=False)
class Statement:
    """One statement as it was executed.

    Attributes:
        kind: ``"noised"``, ``"static"``, ``"observed"`` or ``"deterministic"``.
        name: its name, with the prefixes of enclosing scopes.
        distribution: the NumPyro distribution, plates and masks applied; None for a deterministic.
        value: the value it had in this run.
        anneal: the annealing policy of an observation.
        where: ``"file.py:line"``.
        scale: what its log-probability is multiplied by (``handlers.scale``, subsampled plates).
    """

    kind: str
    name: str
    distribution: Any
    value: Any
    anneal: str
    where: str
    scale: Any

    @property
    def factor(self) -> Factor:
        """The factor of a noised site."""
        return unwrap(self.distribution).factor

    def log_prob(self) -> Any:
        """Σ log p(value), a scalar."""
        total = jnp.sum(self.distribution.log_prob(self.value))
        return total if self.scale is None else self.scale * total


Provide = Callable[[str, str, Any], Any]
"""(kind, name, distribution) → the value of a latent site."""


class _Interpreter(Messenger):
    def __init__(self, provide: Provide, level: Any):
        self.provide, self.level = provide, level
        self.statements: dict[str, Statement] = {}
        super().__init__()

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == LEVEL:
            msg["value"] = self.level
        if msg["type"] == "param":
            raise ProgramError(
                f"numpyro.param({msg['name']!r}) is an optimised parameter; a program has only random choices.",
                where=caller(),
                fix="pass the value as an argument, or give it a prior with cp.sample.",
            )
        if msg["type"] not in ("sample", "deterministic"):
            return
        name, where = msg["name"], caller()
        if name in self.statements:
            raise ProgramError(
                f"Two sites are called {name!r}: here and at {self.statements[name].where}.",
                where=where,
                fix="rename one, or wrap a repeated call in numpyro.handlers.scope(prefix=…).",
            )
        if msg["type"] == "sample" and not msg["is_observed"]:
            msg["value"] = self.provide(kind_of(msg["fn"]), name, msg["fn"])
        msg["composeprob.where"] = where

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] not in ("sample", "deterministic"):
            return
        if msg["type"] == "deterministic":
            kind = "deterministic"
        else:
            kind = "observed" if msg["is_observed"] else kind_of(msg["fn"])
        self.statements[msg["name"]] = Statement(
            kind=kind,
            name=msg["name"],
            distribution=msg["fn"] if msg["type"] == "sample" else None,
            value=msg["value"],
            anneal=(msg.get("infer") or {}).get("anneal") or "tempered",
            where=msg["composeprob.where"],
            scale=msg.get("scale"),
        )


def run(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], provide: Provide, level: Any = 0
) -> dict[str, Statement]:
    """Execute the program and return its statements by name, in order.

    Args:
        function: the program's function.
        args, kwargs: its arguments.
        provide: gives each latent site its value.
        level: the index that functions of the level receive.
    """
    interpreter = _Interpreter(provide, level)
    with interpreter:  # a Messenger leaves NumPyro's stack when the block ends, also by an exception
        try:
            function(*args, **kwargs)
        except ComposeProbError as error:
            if error.where is None:
                raise type(error)(error.found, where=_line_of(error, function), fix=error.fix) from error
            raise
    return interpreter.statements


def _line_of(error: BaseException, function: Callable[..., Any]) -> str | None:
    """The user's line in an error's traceback: the last one inside the program's own file."""
    filename = getattr(getattr(function, "__code__", None), "co_filename", None)
    line, traceback = None, error.__traceback__
    while traceback is not None:
        if filename and traceback.tb_frame.f_code.co_filename == filename:
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return f"{filename.rsplit('/', 1)[-1]}:{line}" if filename and line else None


def kind_of(distribution: Any) -> str:
    """``"noised"`` for a factor, ``"static"`` for any other distribution."""
    return "noised" if isinstance(unwrap(distribution), FactorDistribution) else "static"


def unwrap(distribution: Any) -> Any:
    """The distribution inside plates' expansions and masks."""
    while isinstance(distribution, (dist.ExpandedDistribution, dist.MaskedDistribution, dist.Independent)):
        distribution = distribution.base_dist
    return distribution
