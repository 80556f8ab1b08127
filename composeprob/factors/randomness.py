"""Networks that draw random numbers while they are evaluated: a dropout or batch norm left in training mode."""

from __future__ import annotations

import equinox as eqx
import jax
from jax.extend.core import Jaxpr

from composeprob.errors import NetworkError
from composeprob.factors.equations import equations


def check_inference(network: eqx.Module) -> None:
    """Refuse an Equinox network with a layer in training mode.

    Raises:
        NetworkError: it has one.
    """
    layers = jax.tree.leaves(network, is_leaf=lambda node: isinstance(node, (eqx.nn.Dropout, eqx.nn.BatchNorm)))
    for layer in layers:
        dropout = isinstance(layer, eqx.nn.Dropout) and layer.p > 0 and not layer.inference
        if dropout or (isinstance(layer, eqx.nn.BatchNorm) and not layer.inference):
            raise NetworkError(
                in_training(layer),
                fix="take the network in inference mode: cp.Diffusion(eqx.nn.inference_mode(network), …).",
            )


def in_training(layer: object) -> str:
    """The message about a layer in training mode."""
    return f"The network's {type(layer).__name__} layer is in training mode: it would make other values."


def check_deterministic(traced: Jaxpr, label: str) -> None:
    """Refuse the network of factor ``label``, traced, where it makes random numbers.

    Raises:
        NetworkError: it does. Its key is the same at every call, so one mask of a dropout would stand for all.
    """
    if has_primitive(traced, "random_bits", "threefry2x32", "rng_bit_generator", "rng_uniform"):
        raise NetworkError(
            f"The network of factor '{label}' draws random numbers while it is evaluated, the same ones at every call: "
            "a dropout that was left on keeps one mask for ever.",
            fix="switch dropout off: eqx.nn.inference_mode(network), a Flax NNX module's .eval(), deterministic=True "
            "in a Flax Linen module. Random features that are meant to stay: draw them once, outside of the network's "
            "call.",
        )


def has_primitive(traced: Jaxpr, *names: str) -> bool:
    """Whether traced code has one of these primitives, in itself or in what it calls."""
    return any(eqn.primitive.name in names for eqn in equations(traced))
