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
from jaxtyping import Bool, Float, Int
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

KINDS = ("auto", "diagonal", "full")
"""Kinds of metrics that are measured."""


class Metric(eqx.Module):
    r"""An inverse mass matrix $C = L L^\top$ over the numbers of a position, by its
    root $L = D\,M$.

    A kernel in this metric is the same kernel on the density of $u = L^{-1}x$, whose
    score is $L^\top\nabla\log\pi$: noise is N(0, I) and momentum too, whatever C is. So
    a metric may change from level to level under a chain that keeps its momentum.
    """

    # D, for each site a number or an array of the site's shape; 1 at other sites.
    unit: dict[str, Array]
    # M over the flattened position, (d, d), sites in alphabetical order; None for I.
    dense: Array | None = None

    def __repr__(self) -> str:
        if self.dense is not None:
            return f"array{self.dense.shape}"
        if not self.unit:
            return "'none'"
        masses = [f"{name!r}: {describe(unit**2)}" for name, unit in self.unit.items()]
        return f"{{{', '.join(masses)}}}"

    def forth(self, u: Tree) -> Tree:
        """Return L·u, from the coordinates of unit mass to those of positions."""
        return self._unit_product(self._matrix_product(u, transposed=False))

    def back(self, score: Tree) -> Tree:
        """Return Lᵀ·s, from scores of positions to those of the coordinates of unit
        mass."""
        return self._matrix_product(self._unit_product(score), transposed=True)

    def scaled(self, units: Mapping[str, Array]) -> Metric:
        """Return the metric with L multiplied by a number at some sites."""
        scaled = {name: self.unit.get(name, 1.0) * u for name, u in units.items()}
        return Metric({**self.unit, **scaled}, self.dense)

    def inverse_mass_matrix(
        self, position: Position
    ) -> Float[Array, " d"] | Float[Array, "d d"]:
        """Return C over the flattened position; only its diagonal where C has nothing
        else."""
        ones = jax.tree.map(jnp.ones_like, position)
        if self.dense is None:
            return ravel_pytree(self._unit_product(ones))[0] ** 2
        flat, unflatten = ravel_pytree(ones)

        def root_row(unit: Array) -> Array:
            return ravel_pytree(self.back(unflatten(unit)))[0]

        root = jax.vmap(root_row)(jnp.eye(flat.size, dtype=flat.dtype))
        return root @ root.T

    def check(self, position: Position, owner: str) -> None:
        """Raise unless the metric fits the sites of a position."""
        for name, unit in self.unit.items():
            if name not in position:
                raise InvalidValueError(
                    f"the metric of {owner} names the site {name!r}, which it does "
                    "not move",
                    fix=f"its sites are {', '.join(map(repr, position))}",
                )
            for leaf in jax.tree.leaves(position[name]):
                if not _broadcasts(unit.shape, jnp.shape(leaf)):
                    raise ShapeError(
                        f"the metric of {owner} has shape {unit.shape} at {name!r}, "
                        f"whose shape is {jnp.shape(leaf)}",
                        fix="give one number, or an array that broadcasts to the "
                        "site's shape",
                    )
        size = pytree.size(position)
        if self.dense is not None and len(self.dense) != size:
            raise ShapeError(
                f"the metric of {owner} has shape {self.dense.shape}, but it moves "
                f"{size} numbers",
                fix=f"give a matrix of shape ({size}, {size}), sites in alphabetical "
                "order",
            )

    def _unit_product(self, tree: Tree) -> Tree:
        """Return D·u, which is Dᵀ·u."""
        if not self.unit:
            return tree
        assert isinstance(tree, dict)

        def scaled(unit: Array, leaf: Array) -> Array:
            return match_precision(unit, leaf) * leaf

        product = dict(tree)
        for name, unit in self.unit.items():
            if name in tree:
                product[name] = jax.tree.map(partial(scaled, unit), tree[name])
        return product  # type: ignore[return-value]

    def _matrix_product(self, tree: Tree, transposed: bool) -> Tree:
        """Return M·u or Mᵀ·u."""
        if self.dense is None:
            return tree
        flat, unflatten = ravel_pytree(tree)
        matrix = match_precision(self.dense, flat)
        product = flat @ matrix if transposed else matrix @ flat
        return unflatten(product)


EUCLIDEAN = Metric({})
"""C = I."""


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Return whether an array of a shape broadcasts to another shape."""
    if len(shape) > len(to):
        return False
    ends = to[len(to) - len(shape) :]
    return all(n in (1, m) for n, m in zip(shape, ends, strict=True))


class Estimated(eqx.Module):
    """A metric that samplers measure from the moves of all chains, level by level, and
    put in its place."""

    kind: str = eqx.field(static=True)

    def __repr__(self) -> str:
        return repr(self.kind)

    def unmeasured(self, like: Position, num_chains: int) -> Metric | None:
        """Return the identity, in the form that `measured` has; None where ``"auto"``
        is to measure nothing."""
        size = pytree.size(like)
        kind = self.kind
        if kind == "auto":
            kind = self._automatic(size, num_chains)
        if kind == "none":
            return None
        unit = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), like)
        dense = jnp.eye(size) if kind == "full" else None
        return Metric(unit, dense=dense)

    @staticmethod
    def _automatic(size: int, num_chains: int) -> str:
        """Return the kind of metric that this number of chains can determine."""
        limits = tuning.METRIC
        few_numbers = size <= limits.most_numbers
        if few_numbers and num_chains >= limits.chains_per_number * size:
            return "full"
        if num_chains < limits.chains or num_chains * size > limits.most_of_all:
            return "none"
        return "diagonal"


MetricLike = Metric | Estimated | str | Mapping[str, ArrayLike] | Array
"""Values that may be given as a metric; after construction a kernel's is a `Metric` or
`Estimated`."""


def as_metric(value: object) -> Metric | Estimated:
    """Return a user's metric in one of two forms.

    Args:
        value: ``"none"``, ``"auto"``, ``"diagonal"``, ``"full"``, ``{site: inverse
            mass}`` with numbers or arrays > 0, or a symmetric positive definite matrix
            (d, d) over the flattened position, sites in alphabetical order.
    """
    if isinstance(value, Metric | Estimated):
        return value
    if isinstance(value, str):
        if value == "none":
            return EUCLIDEAN
        if value not in KINDS:
            raise InvalidValueError(
                f"Unknown metric {value!r}.",
                fix=f"use one of: none, {', '.join(KINDS)}.",
            )
        return Estimated(value)
    if isinstance(value, Mapping):
        return _by_site(value)
    return _by_matrix(value)


def _by_site(inverse_masses: Mapping[str, object]) -> Metric:
    """Return the diagonal metric of these inverse masses."""
    masses = {
        name: as_numbers(mass, f"the metric of {name!r}", "a number > 0")
        for name, mass in inverse_masses.items()
    }
    for name, mass in masses.items():
        check_range(mass, f"the metric of {name!r}", fix="positive, finite numbers")
    return Metric({name: _root_of(mass) for name, mass in masses.items()})


def _root_of(mass: Array) -> Array:
    """Return the root of inverse masses, by NumPy where they are known: a first call
    would compile a program for it."""
    if isinstance(mass, jax.core.Tracer):
        return jnp.sqrt(mass)
    return jnp.asarray(np.sqrt(np.asarray(mass)))


def _by_matrix(value: object) -> Metric:
    """Return the metric of an inverse mass matrix."""
    what = "an inverse mass matrix"
    matrix = as_numbers(
        value, what, 'one of the words, {"mu": 0.01}, or a matrix of shape (d, d)'
    )
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ShapeError(
            f"{what} has shape {matrix.shape}",
            fix="give a matrix of shape (d, d), or numbers by site: {'mu': 0.01}",
        )
    root = jnp.linalg.cholesky(matrix)
    if isinstance(matrix, jax.core.Tracer):
        return Metric({}, root)
    if not (np.isfinite(root).all() and np.allclose(matrix, matrix.T)):
        raise InvalidValueError(
            f"{what} of shape {matrix.shape} is not symmetric and positive definite",
            fix="give a covariance matrix",
        )
    return Metric({}, root)


def in_force(metric: MetricLike) -> Metric:
    """Return the metric that a transition uses; raise, while tracing, if it is still to
    be measured."""
    if not isinstance(metric, Metric):
        raise CapabilityError(
            f"the metric {metric!r} is measured from all chains of a run, and there is "
            "no run here",
            fix="run the kernel through cp.infer, or give it a fixed metric",
        )
    return metric


def measured(
    before: Metric,
    scale: Position,
    moved: Float[Array, "chains d"],
    changed: Float[Array, "chains d"],
) -> Metric:
    r"""Return the metric measured at a level, in the form of the metric ``before``,
    which is kept where the moves determine nothing.

    The precision P solves P·Σ·P = F with Σ = E[Δx·Δxᵀ] and F = E[Δs·Δsᵀ]: the geometric
    mean of F and Σ⁻¹. Where scores are linear, Δs = −P·Δx, and P is exact from d moves,
    wherever the chains are. A covariance of chains' positions, or of their scores, is
    P⁻¹ or P only once they have the law of the level, and is mostly the distance of
    modes where these are far apart; moves stay in modes.

    The metric is C = P⁻¹/s², with s the ``scale``, so that h·C = c·P⁻¹ under an
    adaptive step, and c has no reason to change from level to level.

    Args:
        before: the metric so far.
        scale: s for every number of a position: the level's noise, 1 where steps do not
            follow that.
        moved: Δx, how far each chain went at the level. Chains that stayed, or are not
            finite, do not count.
        changed: Δs, how much its score changed.

    References:
        Titsias (2023), *Optimal preconditioning and Fisher adaptive Langevin sampling*.
    """
    rows = jnp.stack([moved, changed])
    sound = jnp.all(jnp.isfinite(rows), axis=(0, 2)) & jnp.any(moved != 0, axis=1)
    count = jnp.sum(sound)
    rows = jnp.where(sound[:, None], rows, 0.0) / jnp.sqrt(jnp.maximum(count, 1))

    # The diagonal: widths √(|Δx|/|Δs|), which change at most so much from a level to
    # the next.
    lengths = jnp.sqrt(jnp.sum(rows**2, axis=1))
    measurable = jnp.all(lengths > 0, axis=0)
    units, shaped = ravel_pytree(scale)
    known = ravel_pytree(before.unit)[0] * units
    width = jnp.sqrt(lengths[0] / jnp.where(measurable, lengths[1], 1.0))
    width = jnp.clip(width, known * tuning.METRIC.shrinks, known * tuning.METRIC.grows)
    width = jnp.where(measurable, width, known)
    unit = shaped(width / units)
    if before.dense is None:
        return Metric(unit)

    # The correlations, of moves and changes in units of these widths.
    scales = jnp.stack([1 / width, width])
    # The same factor on both changes nothing, and keeps float32 in its range.
    products = jnp.where(measurable, jnp.prod(lengths, axis=0), 1.0)
    rows = rows * scales[:, None] / jnp.max(products) ** 0.5
    metric = Metric(unit, dense=_root(rows.mT @ rows, measurable, count))
    return jax.tree.map(partial(jnp.where, count > 0), metric, before)


def _root(
    matrices: Float[Array, "2 d d"],
    measurable: Bool[Array, " d"],
    count: Int[Array, ""],
) -> Float[Array, "d d"]:
    """Return M with M·Mᵀ = C, where C solves C·F·C = Σ.

    With Σ = R·Rᵀ, C = R·(Rᵀ·F·R)^−½·Rᵀ.

    C = I where an entry is not ``measurable``. Correlations are shrunk: few different
    moves tell only the diagonal.
    """
    both = measurable[:, None] & measurable
    identity = jnp.where(both, 0.0, jnp.eye(len(both)))
    matrices = regularised(jnp.where(both, matrices, 0.0), count) + identity
    root = jnp.linalg.cholesky(matrices[0])
    values, vectors = jnp.linalg.eigh(root.T @ matrices[1] @ root)
    least = tuning.METRIC.least_eigenvalue * values[-1]
    return root @ vectors * jnp.maximum(values, least) ** -0.25


def regularised(
    covariance: Float[Array, "*matrices d d"], count: Array | float
) -> Float[Array, "*matrices d d"]:
    """Return covariances of d numbers from n independent points, shrunk towards their
    diagonals by 1/(1 + (n/d)⁴) + 10⁻⁶.

    Where the true one is I, an estimate has eigenvalues between (1 ∓ √(d/n))²: for n
    well above d it needs no shrinkage, however ill-conditioned it is, and for n ≤ d it
    is singular.
    """
    size = covariance.shape[-1]
    share = 1.0 / (1.0 + (jnp.asarray(count) / size) ** 4)
    share = share + tuning.METRIC.least_eigenvalue
    return covariance * (1 - jnp.minimum(share, 1.0) * (1 - jnp.eye(size)))
