"""Networks of every kind as one thing: an Equinox module called as ``network(x, t, **conditions)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
from flax import linen, nnx

from composeprob.errors import WrongTypeError


class NNXNetwork(eqx.Module):
    """A Flax NNX module, split into its static graph and its arrays."""

    graphdef: Any = eqx.field(static=True)
    state: Any

    def __call__(self, x: Any, t: Any, **conditions: Any) -> Any:
        return nnx.merge(self.graphdef, self.state)(x, t, **conditions)


class LinenNetwork(eqx.Module):
    """A Flax Linen module with its variables."""

    module: linen.Module = eqx.field(static=True)
    variables: Any

    def __call__(self, x: Any, t: Any, **conditions: Any) -> Any:
        return self.module.apply(self.variables, x, t, **conditions)


class FunctionNetwork(eqx.Module):
    """A plain function. Arrays that it closes over are constants of the program: pass a module to keep them out."""

    function: Callable[..., Any] = eqx.field(static=True)

    def __call__(self, x: Any, t: Any, **conditions: Any) -> Any:
        return self.function(x, t, **conditions)


def as_network(network: Any) -> eqx.Module:
    """Adapt an Equinox module, a Flax NNX module, a Flax Linen ``(module, variables)`` pair or a function.

    Raises:
        WrongTypeError: anything else.
    """
    if isinstance(network, eqx.Module) and callable(network):
        return network
    if isinstance(network, nnx.Module):
        graphdef, state = nnx.split(network)
        return NNXNetwork(graphdef, nnx.to_pure_dict(state))
    if isinstance(network, tuple) and len(network) == 2 and isinstance(network[0], linen.Module):
        return LinenNetwork(*network)
    if isinstance(network, linen.Module):
        raise WrongTypeError(
            f"{type(network).__name__} is a Flax Linen module without its variables.",
            fix="pass the pair (module, variables), with variables from module.init.",
        )
    if callable(network):
        return FunctionNetwork(network)
    raise WrongTypeError(
        f"A network is called as network(x, t, **conditions); got {type(network).__name__}, which cannot be called.",
        fix="pass an Equinox module, a Flax NNX module, a Flax Linen (module, variables) pair, or a function.",
    )
