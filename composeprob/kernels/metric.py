"""Metrics: the inverse mass matrix that a kernel moves in, given or measured from all
chains."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree
from numpy.typing import ArrayLike

from composeprob import pytree, tuning
from composeprob.density.evaluation import Position
from composeprob.errors import CapabilityError, InvalidValueError, ShapeError
from composeprob.kernels.step_size import (
    as_numbers,
    check_range,
    describe,
    match_precision,
)

Tree = TypeVar("Tree")


class Metric(eqx.Module):
    r"""An inverse mass matrix $C = L L^\top$ over the numbers of a position, by its
    root $L = D\,M$.

    A kernel in this metric is the same kernel on the density of $u = L^{-1}x$, whose
    score is $L^\top\nabla\log\pi$: noise is N(0, I) and momentum too, whatever C is. So
    a metric may change from level to level under a chain that keeps its momentum.
    """

    unit: dict[
        str, Array
    ]  # D, for each site a number or an array of the site's shape; 1 at sites that are not named
    dense: Array | None = (
        # M over the flattened position, (d, d), sites in alphabetical order; None for I
        None
    )

    def __repr__(self) -> str:
        if self.dense is not None:
            return f"array{self.dense.shape}"
        if not self.unit:
            return "'none'"
        return f"{{{', '.join(f'{name!r}: {describe(unit**2)}' for name, unit in self.unit.items())}}}"

    def forth(self, u: Tree) -> Tree:
        """L·u, from the coordinates of unit mass to those of positions."""
        return self._unit_product(self._matrix_product(u, transposed=False))

    def back(self, score: Tree) -> Tree:
        """Lᵀ·s, from scores of positions to those of the coordinates of unit mass."""
        return self._matrix_product(self._unit_product(score), transposed=True)

    def scaled(self, units: Mapping[str, Array]) -> Metric:
        """The metric with L multiplied by a number at some sites."""
        return Metric(
            {**self.unit, **{n: self.unit.get(n, 1.0) * u for n, u in units.items()}},
            self.dense,
        )

    def inverse_mass_matrix(self, position: Position) -> Array:
        """C over the flattened position: its diagonal, (d,), where that is all, else
        the matrix, (d, d)."""
        ones = jax.tree.map(jnp.ones_like, position)
        if self.dense is None:
            return ravel_pytree(self._unit_product(ones))[0] ** 2
        flat, unflatten = ravel_pytree(ones)
        root = jax.vmap(lambda row: ravel_pytree(self.back(unflatten(row)))[0])(
            jnp.eye(flat.size, dtype=flat.dtype)
        )
        return root @ root.T

    def check(self, position: Position, owner: str) -> None:
        """Raises unless the metric fits the sites of a position."""
        for name, unit in self.unit.items():
            if name not in position:
                raise InvalidValueError(
                    f"the metric of {owner} names the site {name!r}, which it does not move",
                    fix=f"its sites are {', '.join(map(repr, position))}",
                )
            for shape in map(jnp.shape, jax.tree.leaves(position[name])):
                ends = shape[len(shape) - unit.ndim :]
                if unit.ndim > len(shape) or any(
                    n not in (1, m) for n, m in zip(unit.shape, ends, strict=True)
                ):
                    raise ShapeError(
                        f"the metric of {owner} has shape {unit.shape} at {name!r}, whose shape is {shape}",
                        fix="give one number, or an array that broadcasts to the site's shape",
                    )
        size = pytree.size(position)
        if self.dense is not None and len(self.dense) != size:
            raise ShapeError(
                f"the metric of {owner} has shape {self.dense.shape}, but it moves {size} numbers",
                fix=f"give a matrix of shape ({size}, {size}), sites in alphabetical order",
            )

    def _unit_product(self, tree: Tree) -> Tree:
        """D·u, which is Dᵀ·u."""
        if not self.unit:
            return tree
        scaled = lambda unit, leaf: match_precision(unit, leaf) * leaf  # noqa: E731
        return tree | {
            n: jax.tree.map(partial(scaled, unit), tree[n])
            for n, unit in self.unit.items()
            if n in tree
        }  # type: ignore[index, operator]

    def _matrix_product(self, tree: Tree, transposed: bool) -> Tree:
        """M·u or Mᵀ·u."""
        if self.dense is None:
            return tree
        flat, unflatten = ravel_pytree(tree)
        matrix = match_precision(self.dense, flat)
        return unflatten(flat @ matrix if transposed else matrix @ flat)


EUCLIDEAN = Metric({})
"""C = I."""


class Estimated(eqx.Module):
    """A metric that samplers measure from the moves of all chains, level by level, and
    put in its place."""

    kind: str = eqx.field(static=True)

    def __repr__(self) -> str:
        return repr(self.kind)

    def unmeasured(self, like: Position, num_chains: int) -> Metric | None:
        """The identity, in the form that `measured` has; None where ``"auto"`` is to
        measure nothing."""
        kind, size, limits = self.kind, pytree.size(like), tuning.METRIC
        if (
            kind == "auto"
            and size <= limits.most_numbers
            and num_chains >= limits.chains_per_number * size
        ):
            kind = "full"
        elif kind == "auto":
            kind = "diagonal"
            if num_chains < limits.chains or num_chains * size > limits.most_of_all:
                return None
        unit = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), like)
        return Metric(unit, dense=jnp.eye(size) if kind == "full" else None)


MetricLike = Metric | Estimated | str | Mapping[str, ArrayLike] | Array
"""What may be given as a metric; after construction a kernel's is a `Metric` or
`Estimated`."""


def as_metric(value: object) -> Metric | Estimated:
    """What a user may give as a metric in one of two forms: ``"none"``, ``"auto"``,
    ``"diagonal"``, ``"full"``, ``{site: inverse mass}`` with numbers or arrays > 0, or
    a symmetric positive definite matrix (d, d) over the flattened position, sites in
    alphabetical order."""
    if isinstance(value, Metric | Estimated):
        return value
    if isinstance(value, str):
        if value == "none":
            return EUCLIDEAN
        kinds = ("auto", "diagonal", "full")
        if value not in kinds:
            raise InvalidValueError(
                f"Unknown metric {value!r}.",
                fix=f"use one of: none, {', '.join(kinds)}.",
            )
        return Estimated(value)
    what = "an inverse mass matrix"
    if isinstance(value, Mapping):
        masses = {
            name: as_numbers(mass, f"the metric of {name!r}", "a number > 0")
            for name, mass in value.items()
        }
        for name, mass in masses.items():
            check_range(mass, f"the metric of {name!r}", fix="positive, finite numbers")
        return Metric({name: jnp.sqrt(mass) for name, mass in masses.items()})
    matrix = as_numbers(
        value, what, 'one of the words, {"mu": 0.01}, or a matrix of shape (d, d)'
    )
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ShapeError(
            f"{what} has shape {matrix.shape}",
            fix="give a matrix of shape (d, d), or numbers by site: {'mu': 0.01}",
        )
    root = jnp.linalg.cholesky(matrix)
    if not isinstance(matrix, jax.core.Tracer) and not (
        np.isfinite(root).all() and np.allclose(matrix, matrix.T)
    ):
        raise InvalidValueError(
            f"{what} of shape {matrix.shape} is not symmetric and positive definite",
            fix="give a covariance matrix",
        )
    return Metric({}, root)


def in_force(metric: MetricLike) -> Metric:
    """The metric that a transition uses; raises while tracing where it is still to be
    measured."""
    if not isinstance(metric, Metric):
        raise CapabilityError(
            f"the metric {metric!r} is measured from all chains of a run, and there is no run here",
            fix="run the kernel through cp.infer, or give it a fixed metric",
        )
    return metric


def measured(before: Metric, scale: Position, moved: Array, changed: Array) -> Metric:
    r"""The metric by how far all chains went at a level, Δx, and how much their scores
    changed, Δs, (N, d), in the form of the one ``before``, which stays where they leave
    it open. Chains that stayed, or are not finite, do not count.

    The precision P solves P·Σ·P = F with Σ = E[Δx·Δxᵀ] and F = E[Δs·Δsᵀ]: the geometric
    mean of F and Σ⁻¹. Where scores are linear, Δs = −P·Δx, and P is exact from d moves,
    wherever the chains are. A covariance of where chains are, or of their scores, is
    P⁻¹ or P only once they have the law of the level, and is mostly the distance of
    modes where these are far apart; moves stay in modes.

    ``scale`` is s for every number of a position: the level's noise, 1 where steps do
    not follow that. The metric is C = P⁻¹/s², so that h·C = c·P⁻¹ under an adaptive
    step, and c has no reason to change from level to level.

    References:
        Titsias (2023), *Optimal preconditioning and Fisher adaptive Langevin sampling*.
    """
    rows = jnp.stack([moved, changed])
    sound = jnp.all(jnp.isfinite(rows), axis=(0, 2)) & jnp.any(moved != 0, axis=1)
    count = jnp.sum(sound)
    rows = jnp.where(sound[:, None], rows, 0.0) / jnp.sqrt(jnp.maximum(count, 1))
    lengths = jnp.sqrt(jnp.sum(rows**2, axis=1))
    (units, shaped), (known, _) = ravel_pytree(scale), ravel_pytree(before.unit)
    measurable, known = jnp.all(lengths > 0, axis=0), known * units
    width = jnp.sqrt(lengths[0] / jnp.where(measurable, lengths[1], 1.0))
    width = jnp.clip(width, known * tuning.METRIC.shrinks, known * tuning.METRIC.grows)
    width = jnp.where(measurable, width, known)
    unit = shaped(width / units)
    if before.dense is None:
        return Metric(unit)
    scales = jnp.stack([1 / width, width])
    # The same factor on both changes nothing, and keeps float32 in its range.
    largest = jnp.max(jnp.where(measurable, jnp.prod(lengths, axis=0), 1.0)) ** 0.5
    rows = rows * scales[:, None] / largest
    found = Metric(unit, dense=_root(rows.mT @ rows, measurable, count))
    return jax.tree.map(partial(jnp.where, count > 0), found, before)


def _root(matrices: Array, measurable: Array, count: Array) -> Array:
    """M with M·Mᵀ = C, the solution of C·F·C = Σ, of Σ and F, (2, d, d): with Σ = R·Rᵀ,
    C = R·(Rᵀ·F·R)^−½·Rᵀ. Of C = I where an entry is not ``measurable``, (d,).
    Correlations are shrunk: few different moves tell only the diagonal."""
    both = measurable[:, None] & measurable
    matrices = regularised(jnp.where(both, matrices, 0.0), count) + jnp.where(
        both, 0.0, jnp.eye(len(both))
    )
    root, slopes = jnp.linalg.cholesky(matrices[0]), matrices[1]
    values, vectors = jnp.linalg.eigh(root.T @ slopes @ root)
    return (
        root
        @ vectors
        * jnp.maximum(values, tuning.METRIC.least_eigenvalue * values[-1]) ** -0.25
    )


def regularised(covariance: Array, count: Array | float) -> Array:
    """Covariances of d numbers, (…, d, d), from n independent points, taken towards
    their diagonals by 1/(1 + (n/d)⁴) + 10⁻⁶. Where the true one is I, an estimate has
    eigenvalues between (1 ∓ √(d/n))²: for n well above d it needs no shrinkage, however
    ill-conditioned it is, and for n ≤ d it is singular."""
    size = covariance.shape[-1]
    share = (
        1.0 / (1.0 + (jnp.asarray(count) / size) ** 4) + tuning.METRIC.least_eigenvalue
    )
    return covariance * (1 - jnp.minimum(share, 1.0) * (1 - jnp.eye(size)))
