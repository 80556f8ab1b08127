"""Speed of matrix products on this machine, and arithmetic of an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from price.cases import LEVEL, Case

SIDE, PRODUCTS = 1024, 12
"""Rows of the square matrices, and number of products of one program."""


def matrix_products() -> Callable[[], Any]:
    """Products of large matrices in single precision, each of 2·SIDE³ operations."""
    a = jax.random.normal(jax.random.key(0), (SIDE, SIDE)) / SIDE**0.5

    @jax.jit
    def multiply(a: Any) -> Any:
        return jax.lax.fori_loop(0, PRODUCTS, lambda _, b: a @ b, a)

    return partial(multiply, a)


def flops(case: Case) -> float:
    """Floating-point operations of one value-and-score of all chains, as the compiler
    counts them."""
    density = case.compile()
    evaluate = eqx.filter_jit(
        lambda density, x: jax.vmap(density.value_and_score, (0, None))(
            x, jnp.int32(LEVEL)
        )
    )
    compiled = (
        evaluate.lower(density, case.positions(density, jax.random.key(0)))
        .compile()
        .compiled
    )
    return float(compiled.cost_analysis()["flops"])
