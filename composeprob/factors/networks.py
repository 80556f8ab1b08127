"""Networks of every kind as one thing: an Equinox module called as ``network(x, t, **conditions)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import PyTree

from composeprob.errors import WrongTypeError
from composeprob.factors.base import is_factor
from composeprob.factors.functions import PlainFunction
from composeprob.factors.randomness import check_inference

Module = TypeVar("Module", bound=eqx.Module)
Network = Callable[..., PyTree[Array]]
"""Called on one event as ``network(x, t, **conditions)``."""


class BatchedLinear(eqx.nn.Linear):
    """Equinox's layer, which multiplies x·Wᵀ in place of W·x."""

    def __init__(self, layer: eqx.nn.Linear):
        for name, value in vars(layer).items():
            setattr(self, name, value)

    def __call__(self, x: Array, *, key: Array | None = None) -> Array:
        if "scalar" in (self.in_features, self.out_features):
            return super().__call__(x, key=key)
        y = jnp.tensordot(x, self.weight, axes=(0, 1))  # x @ W.T would make Wᵀ anew for a single chain
        return y if self.bias is None else y + self.bias


def batched_linear(network: Module) -> Module:
    """Returns the Equinox module with every `equinox.nn.Linear` in it multiplying x·Wᵀ in place of W·x.

    Both are the same up to rounding, and the weights are the same arrays. Mapped over conditions and chains, W·x is an
    array (outputs, chains, conditions), which XLA moves into another order in every layer: with eight conditions of a
    small MLP and 256 chains that was 43 % of an evaluation's time on two cores. Layers of classes derived from
    `equinox.nn.Linear` stay as they are.

    Args:
        network: an Equinox module, or one layer.

    Example:
        >>> import composeprob as cp, equinox as eqx, jax
        >>> mlp = cp.batched_linear(eqx.nn.MLP(2, 2, 64, 3, key=jax.random.key(0)))
        >>> mlp(jax.numpy.ones(2)).shape
        (2,)
    """
    plain = lambda node: type(node) is eqx.nn.Linear  # noqa: E731
    return jax.tree.map(lambda node: BatchedLinear(node) if plain(node) else node, network, is_leaf=plain)


def as_network(network: object) -> Network:
    """Adapt an Equinox module, a Flax NNX module, a Flax Linen ``(module, variables)`` pair or a function.

    Raises:
        WrongTypeError: anything else.
        NetworkError: one of its layers is in training mode.
    """
    if _is_flax(network):
        from composeprob.factors.flax_networks import adapt

        if (adapted := adapt(network)) is not None:
            return adapted
    if any(base.__module__.partition(".")[0] == "torch" for base in type(network).__mro__):
        raise WrongTypeError(
            f"A network runs in JAX; got {type(network).__name__}, which is PyTorch's.",
            fix="load its weights into an Equinox or Flax module of the same layers; cp.from_diffusers reads folders "
            "of models that Diffusers has.",
        )
    if isinstance(network, eqx.Module) and callable(network) and not is_factor(network):
        check_inference(network)
        return network
    if callable(network) and not is_factor(network):
        return PlainFunction(network)
    raise WrongTypeError(
        f"A network is called as network(x, t, **conditions); got {type(network).__name__}, which cannot be called.",
        fix="pass an Equinox module, a Flax NNX module, a Flax Linen (module, variables) pair, or a function.",
    )


def _is_flax(network: object) -> bool:
    """Whether a network, or the first of a pair, is of a class of Flax; found by names, without importing Flax."""
    module = network[0] if isinstance(network, tuple) and network else network
    return any(base.__module__.startswith("flax.") for base in type(module).__mro__)
