"""Which inputs of a traced function each of its outputs depends on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.extend.core import Jaxpr, Literal

Names = frozenset[str]
CALLS = frozenset(
    {"jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "checkpoint", "remat2"}
)
"""Primitives whose one inner function has their inputs and outputs."""


def influences(jaxpr: Jaxpr, inputs: Sequence[Names]) -> list[Names]:
    """What each output depends on, where ``inputs`` has it of each input.

    Calls and scans are looked into; of any other primitive every output depends on every input.
    """
    known = dict(zip(jaxpr.invars, inputs, strict=True))

    def names_of(variable: object) -> Names:
        return Names() if isinstance(variable, Literal) else known.get(variable, Names())  # type: ignore[call-overload]

    for eqn in jaxpr.eqns:
        given = [names_of(v) for v in eqn.invars]
        inner: Any = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        inner = getattr(inner, "jaxpr", inner)
        if eqn.primitive.name in CALLS and inner is not None:
            outputs = influences(inner, given)
        elif eqn.primitive.name == "scan":
            outputs = _scan_influences(inner, given, eqn.params["num_consts"], eqn.params["num_carry"])
        else:
            outputs = [Names().union(*given)] * len(eqn.outvars)
        known.update(zip(eqn.outvars, outputs, strict=True))
    return [names_of(v) for v in jaxpr.outvars]


def _scan_influences(body: Jaxpr, given: list[Names], num_consts: int, num_carry: int) -> list[Names]:
    """Of a loop, whose carry depends on what it depended on in the step before."""
    end = num_consts + num_carry
    consts, carry, rows = given[:num_consts], given[num_consts:end], given[end:]
    while True:
        outputs = influences(body, [*consts, *carry, *rows])
        longer = [a | b for a, b in zip(carry, outputs[:num_carry], strict=True)]
        if longer == carry:
            return outputs
        carry = longer
