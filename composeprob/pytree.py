"""Small operations on positions: arithmetic, noise and selection over every leaf of a
pytree."""

from __future__ import annotations

import math
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, PyTree, Shaped

Tree = TypeVar("Tree")


def normal_like(key: Array, tree: Tree) -> Tree:
    """Independent standard normals for every element of every leaf.

    They are cut from one draw: every use of a random key costs the compiler more than
    most densities do.
    """
    leaves = jax.tree.leaves(tree)
    dtype = jnp.result_type(float, *leaves) if leaves else None
    return unravel(jax.random.normal(key, (size(tree),), dtype), tree)


def size(tree: PyTree[Array]) -> int:
    """d, the number of elements of all leaves."""
    return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(tree))


def unravel(flat: Shaped[Array, " d"], like: Tree) -> Tree:
    """Numbers in the structure, the shapes and the precision of ``like``."""
    leaves, treedef = jax.tree.flatten(like)
    pieces = []
    start = 0
    for leaf in leaves:
        end = start + jnp.size(leaf)
        piece = flat[start:end].reshape(jnp.shape(leaf))
        pieces.append(piece.astype(jnp.result_type(leaf)))
        start = end
    return jax.tree.unflatten(treedef, pieces)


def is_array(leaf: object) -> bool:
    """Return whether a leaf is an array, or stands for one by its shape and dtype."""
    return eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def axpy(a: Array | float, x: Tree, y: Tree) -> Tree:
    """a·x + y, leaf by leaf."""
    return jax.tree.map(lambda xi, yi: a * xi + yi, x, y)


def scale(a: Array | float, x: Tree) -> Tree:
    """a·x, leaf by leaf."""
    return jax.tree.map(lambda xi: a * xi, x)


def vdot(x: PyTree[Array], y: PyTree[Array]) -> Shaped[Array, ""]:
    """Inner product ⟨x, y⟩ over all leaves."""
    products = jax.tree.map(lambda xi, yi: jnp.sum(xi * yi), x, y)
    return jax.tree.reduce(jnp.add, products, jnp.zeros(()))


def squared_norm(x: PyTree[Array]) -> Shaped[Array, ""]:
    """‖x‖² over all leaves."""
    return vdot(x, x)


def where(condition: Bool[Array, ""], x: Tree, y: Tree) -> Tree:
    """x where the condition holds, else y: a selection, so that a NaN in the branch not
    taken is harmless."""
    return jax.tree.map(lambda xi, yi: jnp.where(condition, xi, yi), x, y)


def all_finite(tree: PyTree[Array]) -> Bool[Array, ""]:
    """True if every element of every leaf is finite."""
    flags = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    if not flags:
        return jnp.array(True)
    return jnp.all(jnp.stack(flags))
