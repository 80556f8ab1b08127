"""Networks of every kind, adapted to one interface: an Equinox module called as
``network(x, t, **conditions)``.

A network that draws random numbers while it is evaluated (a dropout or batch norm left
in training mode) is refused.

A user-defined function may read anything: arrays of the module around it, variables of
the function that it was made in. JAX cannot see that these have changed. So compiled
code never holds the function itself: `closed` traces it once, and the arrays that it
reads become leaves like a network's weights.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun
from jax.tree_util import PyTreeDef
from jaxtyping import PyTree

from composeprob.errors import ComposeProbError, NetworkError, WrongTypeError
from composeprob.factors.equations import (
    equations,
    fingerprint,
    without_constants,
)
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
        # `x @ W.T` would make Wᵀ anew for a single chain.
        y = jnp.tensordot(x, self.weight, axes=(0, 1))
        return y if self.bias is None else y + self.bias


def batched_linear(network: Module) -> Module:
    """Return the Equinox module with every `equinox.nn.Linear` in it multiplying x·Wᵀ
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

    def is_linear(node: object) -> bool:
        return type(node) is eqx.nn.Linear

    def batched(node: PyTree) -> PyTree:
        return BatchedLinear(node) if is_linear(node) else node

    return jax.tree.map(batched, network, is_leaf=is_linear)


def as_network(network: object) -> Network:
    """Adapt an Equinox module, a Flax NNX module, a Flax Linen ``(module, variables)``
    pair or a function; refuse anything else, and a layer in training mode."""
    module = network[0] if isinstance(network, tuple) and network else network
    packages = {base.__module__.partition(".")[0] for base in type(module).__mro__}
    if "flax" in packages:  # by names, as Flax takes a while to import
        from composeprob.factors.flax_networks import adapt

        adapted = adapt(network)
        if adapted is not None:
            return adapted
    if "torch" in packages:
        raise WrongTypeError(
            f"A network runs in JAX; got {type(network).__name__}, which is PyTorch's.",
            fix="load its weights into an Equinox or Flax module of the same layers; "
            "cp.from_diffusers reads folders of models that Diffusers has.",
        )
    if not callable(network) or is_factor(network):
        raise WrongTypeError(
            "A network is called as network(x, t, **conditions); got "
            f"{type(network).__name__}, which cannot be called.",
            fix="pass an Equinox module, a Flax NNX module, a Flax Linen "
            "(module, variables) pair, or a function.",
        )
    if not isinstance(network, eqx.Module):
        return UserFunction(network)
    # Only Equinox modules are left.
    _check_inference_mode(network)
    return network


def _check_inference_mode(network: eqx.Module) -> None:
    """Refuse an Equinox module with a dropout or batch norm in training mode."""

    def has_modes(node: object) -> bool:
        return isinstance(node, (eqx.nn.Dropout, eqx.nn.BatchNorm))

    for layer in filter(has_modes, jax.tree.leaves(network, is_leaf=has_modes)):
        # A dropout of nothing is the same in both modes.
        drops_nothing = isinstance(layer, eqx.nn.Dropout) and layer.p <= 0
        if not (layer.inference or drops_nothing):
            raise NetworkError(
                in_training(layer),
                fix="take the network in inference mode: "
                "cp.Diffusion(eqx.nn.inference_mode(network), …).",
            )


def in_training(layer: object) -> str:
    """Message about a layer in training mode."""
    return (
        f"The network's {type(layer).__name__} layer is in training mode: its values "
        "depend on random numbers or on the batch."
    )


def check_deterministic(traced: Jaxpr, label: str) -> None:
    """Refuse the traced network of factor ``label`` if it draws random numbers, which
    come from one key at every call."""
    if has_primitive(
        traced, "random_bits", "threefry2x32", "rng_bit_generator", "rng_uniform"
    ):
        raise NetworkError(
            f"The network of factor '{label}' draws random numbers while it is "
            "evaluated, the same ones at every call: a dropout that was left on keeps "
            "one mask for ever.",
            fix="switch dropout off: eqx.nn.inference_mode(network), a Flax NNX "
            "module's .eval(), deterministic=True in a Flax Linen module. Random "
            "features that are meant to stay: draw them once, outside of the network's "
            "call.",
        )


def has_primitive(traced: Jaxpr, *names: str) -> bool:
    """Return whether traced code has one of these primitives, in itself or in a
    function that it calls."""
    return any(eqn.primitive.name in names for eqn in equations(traced))


class UserFunction(eqx.Module):
    """A user-defined function, which reads variables around it whenever it is
    called."""

    function: Callable[..., PyTree] = eqx.field(static=True)

    def __call__(self, *args: Array, **kwargs: Array) -> PyTree:
        return self.function(*args, **kwargs)


@dataclass(frozen=True)
class Code:
    """A traced function without its constants, for arguments of certain shapes; codes
    are equal if their `fingerprint` is.

    Attributes:
        jaxpr: the equations.
        digest: their fingerprint.
        takes: shapes and types of the flattened arguments.
        arguments, returns: the structures of (args, kwargs), and of the result.
    """

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
        code = self.code
        values, structure = jax.tree.flatten((args, kwargs))
        shapes = [jnp.shape(value) for value in values]
        if structure != code.arguments or shapes != [a.shape for a in code.takes]:
            raise TypeError(
                f"A function that was compiled for {code.takes} was called with "
                f"{(args, kwargs)}."
            )
        # Python numbers enter with the types that they were traced with.
        cast = [
            jnp.asarray(value, argument.dtype)
            for value, argument in zip(values, code.takes, strict=True)
        ]
        function = jaxpr_as_fun(ClosedJaxpr(code.jaxpr, self.constants))
        return jax.tree.unflatten(code.returns, function(*cast))


class _Record:
    """A function that is traced at its first call."""

    def __init__(self, function: Callable[..., PyTree]):
        self.function = function
        self.closed: Closed | None = None

    def __call__(self, *args: Array, **kwargs: Array) -> PyTree:
        if self.closed is None:
            self.closed = _trace(self.function, args, kwargs)
        return self.closed(*args, **kwargs)


def _trace(
    function: Callable[..., PyTree], args: tuple[Array, ...], kwargs: dict[str, Array]
) -> Closed:
    """Trace a function for arguments of these shapes and types."""
    takes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)),
        (args, kwargs),
    )

    # A new function object each time: JAX would return its cached trace of an old one,
    # which holds the values that were read then.
    def call(args: tuple[Array, ...], kwargs: dict[str, Array]) -> PyTree:
        return function(*args, **kwargs)

    name = getattr(function, "__name__", type(function).__name__).strip("<>")
    with no_random_numbers(
        f"The function '{name}'",
        NetworkError,
        "draw them outside of the function, if they are meant to stay the same; a "
        "density has none of its own.",
    ):
        traced, returns = jax.make_jaxpr(call, return_shape=True)(*takes)
    constants: list[PyTree] = []
    for constant in traced.consts:
        if not isinstance(constant, jax.Array):
            constant = np.asarray(constant)
        constants.append(constant)
    shapes, arguments = jax.tree.flatten(takes)
    equations_alone = without_constants(traced)
    code = Code(
        jaxpr=equations_alone,
        digest=fingerprint(equations_alone),
        takes=tuple(shapes),
        arguments=arguments,
        returns=jax.tree.structure(returns),
    )
    return Closed(constants, code)


@contextmanager
def no_random_numbers(
    who: str, kind: type[ComposeProbError], fix: str, where: str | None = None
) -> Iterator[None]:
    """Raise an error of this kind if what runs inside draws from the global generators
    of NumPy or Python: it is traced, and its numbers would stay the same."""
    before = generator_states()
    yield
    if before != generator_states():
        raise kind(
            f"{who} draws random numbers of NumPy or Python, which would be drawn "
            "once.",
            where=where,
            fix=fix,
        )


def generator_states() -> tuple[object, ...]:
    """The states of the global random number generators of Python and of NumPy."""
    # Calls of a user's own would show in these.
    state: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - what programs call
    return (
        random.getstate(),
        state["state"]["key"].tobytes(),
        state["state"]["pos"],
        state["has_gauss"],
    )


def has_functions(leaf: LeafFactor) -> bool:
    """Return whether the leaf has a user-defined function in it."""
    nodes = jax.tree.leaves(leaf, is_leaf=_is_user_function)
    return any(map(_is_user_function, nodes))


def closed(leaf: Leaf, conditions: Mapping[str, Array]) -> Leaf:
    """Replace every user-defined function in the leaf by a `Closed` one, with the
    present values of the variables that it reads.

    Of the conditions of one evaluation only the shapes count.
    """
    if not has_functions(leaf):
        return leaf

    def record(node: PyTree) -> PyTree:
        return _Record(node.function) if _is_user_function(node) else node

    # One evaluation of the leaf, without numbers, calls every function in it once.
    recorded = jax.tree.map(record, leaf, is_leaf=_is_user_function)
    x, noise = abstract_arguments(leaf)
    eqx.filter_eval_shape(
        lambda f, x, n, c: f.evaluate(x, n, c), recorded, x, noise, dict(conditions)
    )

    def traced(node: PyTree) -> PyTree:
        if not isinstance(node, _Record):
            return node
        assert node.closed is not None  # an evaluation calls every function of a leaf
        return node.closed

    traced_leaf: Leaf = jax.tree.map(traced, recorded)
    return traced_leaf


def closures(tree: PyTree) -> list[Closed]:
    """Every function that was closed in a tree."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, Closed))
    return [node for node in nodes if isinstance(node, Closed)]


def _is_user_function(node: object) -> bool:
    return isinstance(node, UserFunction)
