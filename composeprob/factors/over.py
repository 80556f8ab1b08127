"""Products and mixtures over data: one factor under n values of its conditions, kept as one."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import PyTree

from composeprob.arguments import check_count
from composeprob.errors import ConditionError, InvalidValueError, ShapeError, WrongTypeError
from composeprob.factors.algebra import common_shape, mixture, shares_of
from composeprob.factors.base import Factor, LeafFactor, is_factor
from composeprob.factors.nodes import Mixture, Plate, Product, leaves, rewrite_leaves, walk

Columns = dict[str, PyTree[Array]]
"""Values of conditions along a leading axis: arrays, or pytrees of them."""


def product_over(factor: Factor, values: object, block: int | None) -> Factor:
    """See `product`."""
    columns, count = _columns("cp.product", factor, values, block)
    if count == 1:
        return _first(factor, columns)
    whole = _given_all(factor, columns, count)
    plate = Plate(tuple(columns), count, block)
    return Product(factors=(whole,), numbers=(1.0,) * count, event_shape=whole.event_shape, plate=plate)


def mixture_over(factor: object, values: object, block: int | None, weights: object, log_weights: object) -> Factor:
    """See `mixture`; values without a share are left out."""
    if not is_factor(factor):
        raise WrongTypeError(
            f"cp.mixture over data takes one factor; got {type(factor).__name__}.",
            fix='write cp.mixture(f, over={"label": labels}, weights=[…]).',
        )
    columns, count = _columns("cp.mixture", factor, values, block)
    name = next(iter(columns))
    each = f"cp.mixture([cp.calibrate(f.given({name}=v), key) for v in values], weights=[…])"
    shares = shares_of((factor,), count, weights, log_weights, each)
    kept = np.flatnonzero(np.isfinite(shares.log_weights))
    common_shape("A mixture over data", (factor,))
    if len(kept) < count:
        columns = jax.tree.map(lambda column: column[kept], columns)
    log_weights = tuple(shares.log_weights[i] for i in kept)
    if len(kept) == 1:
        only = _first(factor, columns)
        return only if shares.calibrated else mixture([only], log_weights=log_weights)
    whole = _given_all(factor, columns, len(kept))
    return Mixture(
        factors=(whole,),
        numbers=log_weights,
        event_shape=whole.event_shape,
        plate=Plate(tuple(columns), len(kept), block),
        calibrated=shares.calibrated,
        total=shares.total,
    )


def _given_all(factor: Factor, columns: Columns, count: int) -> Factor:
    """The factor with all values of the conditions that run."""
    for part in walk(factor):
        columns_of_leaf = {
            name: columns[name] for leaf in leaves(part) for name in leaf.traits.conditions if name in columns
        }
        if part.sealed and columns_of_leaf:
            part.given(**_row(columns_of_leaf, 0))  # refuses what would change its normaliser
    return rewrite_leaves(factor, lambda leaf: _given_each(leaf, columns, count))


def _first(factor: Factor, columns: Columns) -> Factor:
    return factor.given(**_row(columns, 0))


def _given_each(leaf: LeafFactor, columns: Columns, count: int) -> LeafFactor:
    """The leaf with all values of those conditions that it has, each as `given` takes it."""
    columns_of_leaf = {name: column for name, column in columns.items() if name in leaf.traits.conditions}
    if not columns_of_leaf:
        return leaf
    if any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(columns_of_leaf)):
        first, values = (
            leaf.given(**_row(columns_of_leaf, 0)),
            {name: jnp.asarray(column) for name, column in columns_of_leaf.items()},
        )
    else:
        with jax.ensure_compile_time_eval():
            rows = [leaf.given(**_row(columns_of_leaf, i)) for i in range(count)]
            first, values = rows[0], {name: _stack(name, [row.fixed[name] for row in rows]) for name in columns_of_leaf}
    return first.holding({**first.fixed, **values})


def _stack(name: str, rows: list[Array]) -> Array:
    shapes = {jnp.shape(row) for row in rows}
    if len(shapes) > 1:
        raise ShapeError(
            f"The values of condition {name!r} have the shapes {', '.join(map(str, sorted(shapes)))}.",
            fix="pass values of one shape: one network evaluates all of them as a batch.",
        )
    return jnp.asarray(np.stack([np.asarray(row) for row in rows]))


def _row(columns: Columns, i: int) -> Columns:
    return jax.tree.map(lambda column: column[i], columns)


def _columns(what: str, factor: Factor, values: object, block: int | None) -> tuple[Columns, int]:
    """The values as arrays of one leading axis, and its length n; refuses what is no data for this factor."""
    if values is None:
        raise InvalidValueError(f"{what} got a block but no data.", fix='pass over={"x": xs}, or leave block= out.')
    if not isinstance(values, Mapping) or not values:
        shown = f"an empty {type(values).__name__}" if isinstance(values, Mapping) else type(values).__name__
        raise WrongTypeError(
            f"over must be a dict of conditions and their values; got {shown}.",
            fix=f'write {what}(f, over={{"x": xs}}), where x is a condition of f.',
        )
    known = dict.fromkeys(name for leaf in leaves(factor) for name in leaf.traits.conditions)
    has = ", ".join(map(repr, known)) or "none"
    for name in values:
        if name not in known:
            raise ConditionError(
                f"{what} over {name!r}: no factor of {factor!r} has that condition; their conditions are: {has}.",
                fix=f"use one of: {has}." if known else "build the factor with conditions=(…,).",
            )
    if block is not None:
        check_count(block, "block")
    columns = {name: _column(value) for name, value in values.items()}
    shapes = {name: [jnp.shape(a) for a in jax.tree.leaves(column)] for name, column in columns.items()}
    for name, found in shapes.items():
        if not found or () in found:
            raise ShapeError(
                f"{what} over {name!r} needs values with a leading axis of observations; got a single number.",
                fix=f"give one value by f.given({name}=…), or pass an array of shape (n, …).",
            )
    lengths = {name: sorted({shape[0] for shape in found}) for name, found in shapes.items()}
    if len({n for found in lengths.values() for n in found}) > 1:
        shown = ", ".join(f"{name!r} has {' and '.join(map(str, found))}" for name, found in lengths.items())
        raise ShapeError(
            f"{what} runs over values with leading axes of one length; {shown}.",
            fix="pass one value of each condition for each observation.",
        )
    count = next(iter(lengths.values()))[0]
    if count == 0:
        raise InvalidValueError(
            f"{what} over {', '.join(map(repr, columns))} has no values: n = 0.",
            fix="pass at least one observation; without any, leave the factor out.",
        )
    return columns, count


def _column(value: object) -> PyTree[Array]:
    """Values that can be indexed along one leading axis: lists as arrays, of objects (such as texts) if need be."""
    if isinstance(value, list | tuple):
        try:
            return jnp.asarray(value)
        except (TypeError, ValueError):
            column = np.empty(len(value), object)
            column[:] = value
            return column
    return jax.tree.map(lambda a: a if isinstance(a, jax.core.Tracer) else np.asarray(a), value)
