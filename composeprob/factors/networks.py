"""Networks of every kind as one thing: an Equinox module called as ``network(x, t, **conditions)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import linen, nnx
from jax import Array

from composeprob.errors import NetworkError, WrongTypeError
from composeprob.factors.randomness import in_training


class NNXNetwork(eqx.Module):
    """A Flax NNX module, split into its static graph and its arrays."""

    graphdef: Any = eqx.field(static=True)
    state: Any

    def __call__(self, x: Array, t: Array, **conditions: Array) -> Any:
        return nnx.merge(self.graphdef, self.state)(x, t, **conditions)


class LinenNetwork(eqx.Module):
    """A Flax Linen module with its variables."""

    module: linen.Module = eqx.field(static=True)
    variables: Any

    def __call__(self, x: Array, t: Array, **conditions: Any) -> Any:
        return self.module.apply(self.variables, x, t, **conditions)


class FunctionNetwork(eqx.Module):
    """A plain function. Arrays that it closes over are constants of the program: pass a module to keep them out."""

    function: Callable[..., Any] = eqx.field(static=True)

    def __call__(self, x: Array, t: Array, **conditions: Array) -> Any:
        return self.function(x, t, **conditions)


class Linear(eqx.nn.Linear):
    """Equinox's layer, with x before W in the product.

    JAX maps W·x over conditions and chains into an array (outputs, chains, conditions), and XLA then moves the numbers
    of every layer to where the next one wants them: with eight conditions of a small MLP for 256 chains that was 43 %
    of an evaluation's time on two cores.
    """

    def __init__(self, layer: eqx.nn.Linear):
        for name, value in vars(layer).items():
            setattr(self, name, value)

    def __call__(self, x: Array, *, key: Array | None = None) -> Array:
        if "scalar" in (self.in_features, self.out_features):
            return super().__call__(x, key=key)
        y = jnp.tensordot(x, self.weight, axes=(0, 1))  # x @ W.T would make Wᵀ anew for a single chain
        return y if self.bias is None else y + self.bias


def as_network(network: Any) -> eqx.Module:
    """Adapt an Equinox module, a Flax NNX module, a Flax Linen ``(module, variables)`` pair or a function.

    Raises:
        WrongTypeError: anything else.
        NetworkError: one of its layers is in training mode.
    """
    if (found := in_training(network)) is not None:
        layer, fix = found
        raise NetworkError(f"The network's {layer} layer is in training mode: it would make other values.", fix=fix)
    if isinstance(network, eqx.Module) and callable(network):
        plain = lambda node: type(node) is eqx.nn.Linear  # noqa: E731
        return jax.tree.map(lambda node: Linear(node) if plain(node) else node, network, is_leaf=plain)
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
