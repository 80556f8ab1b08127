"""Networks of every kind as one thing: an Equinox module called as ``network(x, t,
**conditions)``.

One that draws random numbers while it is evaluated (a dropout or batch norm left in
training mode) is refused.

A plain Python function may read anything: arrays of the module around it, variables of
the function that it was made in. JAX cannot see that these have changed. So compiled
code never holds the function itself: `closed` traces it once, and what it reads become
leaves like a network's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun
from jax.tree_util import PyTreeDef
from jaxtyping import PyTree

from composeprob.errors import NetworkError, WrongTypeError
from composeprob.factors.equations import equations, fingerprint
from composeprob.factors.factor import LeafFactor, abstract_arguments, is_factor

Leaf = TypeVar("Leaf", bound=LeafFactor)
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
        y = jnp.tensordot(
            x, self.weight, axes=(0, 1)
        )  # x @ W.T would make Wᵀ anew for a single chain
        return y if self.bias is None else y + self.bias


def batched_linear(network: Module) -> Module:
    """Returns the Equinox module with every `equinox.nn.Linear` in it multiplying x·Wᵀ
    in place of W·x.

    Both are the same up to rounding, and the weights are the same arrays. Mapped over
    conditions and chains, W·x is an array (outputs, chains, conditions), which XLA
    moves into another order in every layer: with eight conditions of a small MLP and
    256 chains that was 43 % of an evaluation's time on two cores. Layers of classes
    derived from `equinox.nn.Linear` stay as they are.

    Args:
        network: an Equinox module, or one layer.

    Example:
        >>> import composeprob as cp, equinox as eqx, jax
        >>> mlp = cp.batched_linear(eqx.nn.MLP(2, 2, 64, 3, key=jax.random.key(0)))
        >>> mlp(jax.numpy.ones(2)).shape
        (2,)
    """
    plain = lambda node: type(node) is eqx.nn.Linear  # noqa: E731
    return jax.tree.map(
        lambda node: BatchedLinear(node) if plain(node) else node,
        network,
        is_leaf=plain,
    )


def as_network(network: object) -> Network:
    """Adapt an Equinox module, a Flax NNX module, a Flax Linen ``(module, variables)``
    pair or a function; refuses anything else, and one with a layer in training mode."""
    module = network[0] if isinstance(network, tuple) and network else network
    packages = {base.__module__.partition(".")[0] for base in type(module).__mro__}
    if "flax" in packages:  # by names, as Flax takes a while to import
        from composeprob.factors.flax_networks import adapt

        if (adapted := adapt(network)) is not None:
            return adapted
    if "torch" in packages:
        raise WrongTypeError(
            f"A network runs in JAX; got {type(network).__name__}, which is PyTorch's.",
            fix="load its weights into an Equinox or Flax module of the same layers; cp.from_diffusers reads folders "
            "of models that Diffusers has.",
        )
    if not callable(network) or is_factor(network):
        raise WrongTypeError(
            f"A network is called as network(x, t, **conditions); got {type(network).__name__}, which cannot be "
            "called.",
            fix="pass an Equinox module, a Flax NNX module, a Flax Linen (module, variables) pair, or a function.",
        )
    if not isinstance(network, eqx.Module):
        return PlainFunction(network)
    layers = jax.tree.leaves(
        network,
        is_leaf=lambda node: isinstance(node, (eqx.nn.Dropout, eqx.nn.BatchNorm)),
    )
    for layer in layers:
        dropout = (
            isinstance(layer, eqx.nn.Dropout) and layer.p > 0 and not layer.inference
        )
        if dropout or (isinstance(layer, eqx.nn.BatchNorm) and not layer.inference):
            raise NetworkError(
                in_training(layer),
                fix="take the network in inference mode: cp.Diffusion(eqx.nn.inference_mode(network), …).",
            )
    return network


def in_training(layer: object) -> str:
    """The message about a layer in training mode."""
    return f"The network's {type(layer).__name__} layer is in training mode: it would make other values."


def check_deterministic(traced: Jaxpr, label: str) -> None:
    """Refuse the network of factor ``label``, traced, where it makes random numbers, of
    one key at every call."""
    if has_primitive(
        traced, "random_bits", "threefry2x32", "rng_bit_generator", "rng_uniform"
    ):
        raise NetworkError(
            f"The network of factor '{label}' draws random numbers while it is evaluated, the same ones at every call: "
            "a dropout that was left on keeps one mask for ever.",
            fix="switch dropout off: eqx.nn.inference_mode(network), a Flax NNX module's .eval(), deterministic=True "
            "in a Flax Linen module. Random features that are meant to stay: draw them once, outside of the network's "
            "call.",
        )


def has_primitive(traced: Jaxpr, *names: str) -> bool:
    """Whether traced code has one of these primitives, in itself or in what it
    calls."""
    return any(eqn.primitive.name in names for eqn in equations(traced))


class PlainFunction(eqx.Module):
    """A function of the user's, which reads what it reads whenever it is called."""

    function: Callable[..., PyTree] = eqx.field(static=True)

    def __call__(self, *args: Array, **kwargs: Array) -> PyTree:
        return self.function(*args, **kwargs)


@dataclass(frozen=True)
class Code:
    """A traced function without its constants, for arguments of certain shapes; equal
    to another of the same equations, by their `fingerprint`."""

    jaxpr: Jaxpr = field(compare=False)
    digest: str
    takes: tuple[jax.ShapeDtypeStruct, ...]
    arguments: PyTreeDef
    returns: PyTreeDef


class Closed(eqx.Module):
    """A function as it was when it was traced.

    Attributes:
        constants: the arrays that it reads beside its arguments.
        code: its equations.
    """

    constants: list[Array]
    code: Code = eqx.field(static=True)

    def __call__(self, *args: Array, **kwargs: Array) -> PyTree:
        code, (given, found) = self.code, jax.tree.flatten((args, kwargs))
        if (found, *map(jnp.shape, given)) != (
            code.arguments,
            *(shape.shape for shape in code.takes),
        ):
            raise TypeError(
                f"A function that was compiled for {code.takes} was called with {(args, kwargs)}."
            )
        cast = [
            jnp.asarray(value, shape.dtype)
            for value, shape in zip(given, code.takes, strict=True)
        ]
        return jax.tree.unflatten(
            code.returns, jaxpr_as_fun(ClosedJaxpr(code.jaxpr, self.constants))(*cast)
        )


class _Record:
    """Traces a function where it is called first."""

    def __init__(self, function: Callable[..., PyTree]):
        self.function = function
        self.closed: Closed | None = None

    def __call__(self, *args: Array, **kwargs: Array) -> PyTree:
        if self.closed is None:
            takes = jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)),
                (args, kwargs),
            )
            call = lambda args, kwargs: self.function(*args, **kwargs)  # noqa: E731  # new, or JAX knows its trace
            traced, returns = jax.make_jaxpr(call, return_shape=True)(*takes)
            constants: list[PyTree] = [
                c if isinstance(c, jax.Array) else np.asarray(c) for c in traced.consts
            ]
            shapes, tree = jax.tree.flatten(takes)
            code = Code(
                traced.jaxpr,
                fingerprint(traced.jaxpr),
                tuple(shapes),
                tree,
                jax.tree.structure(returns),
            )
            self.closed = Closed(constants, code)
        return self.closed(*args, **kwargs)


def has_functions(leaf: LeafFactor) -> bool:
    """Whether a plain function is in it."""
    return any(map(_is_plain, jax.tree.leaves(leaf, is_leaf=_is_plain)))


def closed(leaf: Leaf, conditions: Mapping[str, Array]) -> Leaf:
    """The leaf with every plain function in it `Closed`; what these read have the
    values of now. Of the conditions of one evaluation only the shapes count."""
    if not has_functions(leaf):
        return leaf
    recorded = jax.tree.map(
        lambda node: _Record(node.function) if _is_plain(node) else node,
        leaf,
        is_leaf=_is_plain,
    )
    x, noise = abstract_arguments(leaf)
    eqx.filter_eval_shape(
        lambda f, x, n, c: f.evaluate(x, n, c), recorded, x, noise, dict(conditions)
    )

    def traced(node: PyTree) -> PyTree:
        if not isinstance(node, _Record):
            return node
        assert node.closed is not None  # a leaf evaluates all that it has
        return node.closed

    done: Leaf = jax.tree.map(traced, recorded)
    return done


def closures(tree: PyTree) -> list[Closed]:
    """Every function that was closed in a tree."""
    found = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, Closed))
    return [node for node in found if isinstance(node, Closed)]


def _is_plain(node: object) -> bool:
    return isinstance(node, PlainFunction)
