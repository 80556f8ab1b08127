"""Networks written in Flax, NNX or Linen; imported for such a network only, as Flax
takes a while to import."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import equinox as eqx
from flax import linen, nnx
from jax import Array
from jaxtyping import PyTree

from composeprob.errors import NetworkError, WrongTypeError
from composeprob.factors.networks import in_training


class NNXNetwork(eqx.Module):
    """A Flax NNX module, split into its static graph and its arrays."""

    graphdef: nnx.GraphDef[nnx.Module] = eqx.field(static=True)
    state: PyTree[Array]

    def __call__(self, x: Array, t: Array, /, **conditions: Array) -> PyTree[Array]:
        return nnx.merge(self.graphdef, self.state)(x, t, **conditions)


class LinenNetwork(eqx.Module):
    """A Flax Linen module with its variables."""

    module: linen.Module = eqx.field(static=True)
    variables: Mapping[str, Any]

    def __call__(self, x: Array, t: Array, /, **conditions: Any) -> PyTree[Array]:
        return self.module.apply(self.variables, x, t, **conditions)


def adapt(network: object) -> NNXNetwork | LinenNetwork | None:
    """Adapt an NNX module, or a Linen ``(module, variables)`` pair, to an Equinox
    module.

    Return None for anything else. Refuse a Linen module without its variables, and an
    NNX module with a layer in training mode.
    """
    if isinstance(network, nnx.Module):
        for _, layer in nnx.iter_graph(network):
            if _in_training_mode(layer):
                raise NetworkError(
                    in_training(layer),
                    fix="call network.eval() before it becomes a factor.",
                )
        graphdef, state = nnx.split(network)
        return NNXNetwork(graphdef, nnx.to_pure_dict(state))
    if isinstance(network, linen.Module):
        raise WrongTypeError(
            f"{type(network).__name__} is a Flax Linen module without its variables.",
            fix="pass the pair (module, variables), with variables from module.init.",
        )
    if isinstance(network, tuple) and len(network) == 2:
        module, variables = network
        if isinstance(module, linen.Module):
            return LinenNetwork(module, variables)
    return None


def _in_training_mode(layer: object) -> bool:
    """Return whether a layer's values depend on random numbers or on the batch."""
    if isinstance(layer, nnx.Dropout):
        return layer.rate > 0 and not layer.deterministic
    if isinstance(layer, nnx.BatchNorm):
        return not layer.use_running_average
    return False
