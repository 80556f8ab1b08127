"""Small operations on positions: arithmetic, noise and selection over every leaf of a
pytree."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import PyTree

Tree = TypeVar("Tree")


def normal_like(key: Array, tree: Tree) -> Tree:
    """Independent standard normals for every element of every leaf.

    They are cut from one draw: every use of a random key costs the compiler more than
    most densities do.
    """
    leaves = jax.tree.leaves(tree)
    return unravel(
        jax.random.normal(
            key, (size(tree),), jnp.result_type(float, *leaves) if leaves else None
        ),
        tree,
    )


def size(tree: PyTree[Array]) -> int:
    """d, the number of elements of all leaves."""
    return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(tree))


def unravel(flat: Array, like: Tree) -> Tree:
    """Numbers, (d,), in the structure, the shapes and the precision of ``like``."""
    leaves, treedef = jax.tree.flatten(like)
    ends = accumulate(jnp.size(leaf) for leaf in leaves)
    pieces = [
        flat[end - jnp.size(leaf) : end]
        .reshape(jnp.shape(leaf))
        .astype(jnp.result_type(leaf))
        for leaf, end in zip(leaves, ends, strict=True)
    ]
    return jax.tree.unflatten(treedef, pieces)


def is_array(leaf: object) -> bool:
    """Whether a leaf is an array, or the shape of one that is not there."""
    return eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def axpy(a: Array | float, x: Tree, y: Tree) -> Tree:
    """a·x + y, leaf by leaf."""
    return jax.tree.map(lambda xi, yi: a * xi + yi, x, y)


def scale(a: Array | float, x: Tree) -> Tree:
    """a·x, leaf by leaf."""
    return jax.tree.map(lambda xi: a * xi, x)


def vdot(x: PyTree[Array], y: PyTree[Array]) -> Array:
    """The inner product ⟨x, y⟩ over all leaves, a scalar."""
    products = jax.tree.map(lambda xi, yi: jnp.sum(xi * yi), x, y)
    return jax.tree.reduce(jnp.add, products, jnp.zeros(()))


def squared_norm(x: PyTree[Array]) -> Array:
    """‖x‖² over all leaves, a scalar."""
    return vdot(x, x)


def where(condition: Array, x: Tree, y: Tree) -> Tree:
    """x where the scalar condition holds, else y: a selection, so a NaN in the branch
    not taken is harmless."""
    return jax.tree.map(lambda xi, yi: jnp.where(condition, xi, yi), x, y)


def all_finite(tree: PyTree[Array]) -> Array:
    """Whether every element of every leaf is finite, a scalar bool."""
    flags = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(flags)) if flags else jnp.array(True)
