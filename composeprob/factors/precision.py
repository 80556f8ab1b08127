"""Networks with matrix products in bfloat16, the numbers that matrix units multiply
fastest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import ClosedJaxpr, JaxprEqn, Primitive
from jax.typing import DTypeLike
from jaxtyping import PyTree

from composeprob.density.rounding import Approximate
from composeprob.errors import InvalidValueError
from composeprob.factors.classifier import Classifier
from composeprob.factors.diffusion import Diffusion
from composeprob.factors.equations import DERIVED, Evaluation, aval, equations, rebind
from composeprob.factors.networks import Network

Expression = TypeVar("Expression")


def check_precision(precision: str | None) -> None:
    """Refuse an unknown precision."""
    if precision not in (None, "bfloat16"):
        raise InvalidValueError(
            f"Unknown precision {precision!r}.",
            fix="use one of: bfloat16; leave it out to evaluate networks as they are.",
        )


def in_precision(factor: Expression, precision: str | None) -> Expression:
    """Return the factor with every network in it `Rounded`; the factor itself where
    ``precision`` is None."""
    if precision is None:
        return factor

    def has_network(node: object) -> bool:
        return isinstance(node, Diffusion | Classifier)

    def rounded(node: Any) -> Any:
        if not has_network(node):
            return node
        return eqx.tree_at(
            lambda f: f.network,
            node,
            Rounded(node.network, precision),
            is_leaf=lambda n: n is node.network,
        )

    return jax.tree.map(rounded, factor, is_leaf=has_network)


class Rounded(Approximate):
    """A network whose matrix products round their operands.

    Products are summed in the network's own type. All else (embeddings of time, norms,
    activations, residual sums) stays as the network has it, and so do its weights and
    its output. A gradient's products are rounded likewise.
    """

    network: Network
    precision: str = eqx.field(static=True)

    @property
    def exact(self) -> Network:
        """The network without rounding."""
        return self.network

    def __call__(self, x: Array, t: Array, /, **conditions: Array) -> PyTree[Array]:
        arguments = (x, t, conditions)
        traced, shapes = jax.make_jaxpr(
            lambda x, t, c: self.network(x, t, **c), return_shape=True
        )(*arguments)
        evaluation = _Products(jnp.dtype(self.precision))
        outputs = evaluation.outputs(traced, jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)


class _Products(Evaluation):
    """Evaluation of a trace with its products in ``dtype``."""

    def __init__(self, dtype: DTypeLike):
        self.dtype = dtype

    def otherwise(self, eqn: JaxprEqn, given: list[Array]) -> list[Array]:
        params = dict(eqn.params)
        if _is_product(eqn):
            out = aval(eqn.outvars[0]).dtype
            return [_product(eqn.primitive, params, given, self.dtype, out)]
        # Derivatives of their own would not be those of a function with other products.
        if eqn.primitive.name not in DERIVED:
            params = {name: self.inside(param) for name, param in params.items()}
        return rebind(eqn, given, params)

    def inside(self, param: Any) -> Any:
        """Return a parameter of a loop, a branch or a call, with the products of the
        function in it computed in ``dtype``."""
        if not any(map(_is_product, equations(param, DERIVED))):
            return param
        if isinstance(param, tuple):
            return tuple(map(self.inside, param))
        # JAX before 0.12 has the functions of some calls without their constants, which
        # are none there.
        closed = isinstance(param, ClosedJaxpr)
        function = param if closed else ClosedJaxpr(param, ())
        inside = jax.make_jaxpr(lambda *args: self.outputs(function, args))
        traced = inside(*function.in_avals)
        return traced if closed else traced.jaxpr


def _product(
    primitive: Primitive,
    params: dict[str, object],
    operands: list[Array],
    dtype: DTypeLike,
    out: DTypeLike,
) -> Array:
    """Multiply operands in ``dtype`` and sum in ``out``, except products of
    derivatives.

    A matrix unit sums in float32 whatever it multiplies. Values keep that, as
    log-densities are made of them. Derivatives only propose, so that each of their
    products is in ``dtype`` and the next one need not round it again.
    """

    def rounded(*operands: Array, **changed: Any) -> Array:
        factors = (_round(o, dtype).astype(dtype) for o in operands)
        return primitive.bind(*factors, **params | changed).astype(out)

    # A user's own primitive defines the type that it sums in.
    if "preferred_element_type" not in params:
        return _round(rounded(*operands), dtype)

    @jax.custom_jvp
    def product(*operands: Array) -> Array:
        return rounded(*operands, preferred_element_type=out)

    def tangent(
        primals: Sequence[Array], tangents: Sequence[Array]
    ) -> tuple[Array, Any]:
        a, b = primals
        da, db = tangents
        value = product(a, b)
        terms = []
        if not _is_zero(da):
            terms.append(rounded(da, b, preferred_element_type=dtype))
        if not _is_zero(db):
            terms.append(rounded(a, db, preferred_element_type=dtype))
        return value, sum(terms)

    # Symbolic zeros: weights have no derivative here, so no product with it is made.
    product.defjvp(tangent, symbolic_zeros=True)
    return product(*operands)


def _is_zero(tangent: object) -> bool:
    return isinstance(tangent, jax.custom_derivatives.SymbolicZero)


def _round(x: Array, dtype: DTypeLike) -> Array:
    """Round to numbers that ``dtype`` holds."""
    # A compiler may drop a cast there and back, which leaves open which function is
    # evaluated; it may not drop this.
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, info.nexp, info.nmant)


def _is_product(eqn: JaxprEqn) -> bool:
    """Return whether an equation is a product of floating-point matrices that a matrix
    unit would make faster."""
    # A primitive of a user's own states it by an attribute ``multiplies``.
    of_jax = eqn.primitive.name in ("dot_general", "conv_general_dilated")
    if not of_jax and not getattr(eqn.primitive, "multiplies", False):
        return False
    operands: list[Any] = [v.aval for v in eqn.invars]
    if not all(jnp.issubdtype(operand.dtype, jnp.floating) for operand in operands):
        return False
    if eqn.primitive.name != "dot_general":
        return True
    (summed, _), _ = eqn.params["dimension_numbers"]
    # A matrix unit of a GPU adds up 16 terms at once (a TPU 128): sums of fewer gain
    # nothing, and stay as they are. Positions of few entries enter networks through
    # such.
    return math.prod(operands[0].shape[axis] for axis in summed) >= 16
