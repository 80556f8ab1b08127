"""What one evaluation of a density at one position and level gives: the currency of the
waist."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import PyTree

Position: TypeAlias = PyTree[Array]
"""A pytree of floating arrays for ONE chain: ``{site: array}``, no chain axis."""


Tree = TypeVar("Tree")
Output = TypeVar("Output")


class Wall(eqx.Module):
    """Where π is 0.

    Attributes:
        outside: whether it is 0 here because the potential G is, a scalar bool.
        log_open: log π without G, a scalar; None where the density offers only its
            score.
    """

    outside: Array
    log_open: Array | None


class ClosedFormTerm(eqx.Module):
    """What is known of log π where a factor offers only its score.

    Attributes:
        value: the logarithm of what multiplies such factors in π, a scalar.
        score: the gradient of log π without it, structured like the position.
    """

    value: Array
    score: Position


class DensityTerms(eqx.Module):
    """What π_k is made of at one position, for samplers that weigh chains; NaN stands
    for what is not known.

    π_k(x, z) ∝ p(z)·F_k(x)·E_k(x, z)·G_k(x, z): the priors of static sites, the algebra
    of diffusion factors at the noised sites, the observations that are annealed
    exactly, and everything else (likelihoods, user energies, classifiers).

    Attributes:
        drift: ∇ log (F_k·E_k), structured like the position (zero at static sites):
            what the reverse process follows.
        rate: the part of the Feynman–Kac rate r of F_k·E_k that comes from scores, a
            scalar. Along dx = f·x dt + g dW, r = rate + (f/g²)·excess.
        excess: the part of r that comes from the drift, in units of f/g²: Σ w_i·d_i − d
            for a product.
        log_potential: log G_k, a scalar.
        log_prior: log p(z), or log p(z | x) where a prior depends on a noised site, a
            scalar.
        log_marginal: log F_k up to a constant of the level, a scalar.
        log_exact: log E_k, a scalar.
    """

    drift: Position
    rate: Array
    excess: Array
    log_potential: Array
    log_prior: Array
    log_marginal: Array
    log_exact: Array


class Evaluation(eqx.Module):
    """What kernels see of π_k at one position x, and what travels with it.

    Attributes:
        log_density: log π_k up to a constant of the level, a scalar; None where the
            density offers only its score.
        score: ∇ log π_k, structured like the position.
        wall: where π is 0; None of a density that is positive everywhere.
        closed_form: of a density without a log-density, the part that has one; None where
            there is none, or all is known.
        terms: the `DensityTerms` of a density, which kernels pass on unread, or None.
    """

    log_density: Array | None
    score: Position
    wall: Wall | None = None
    closed_form: ClosedFormTerm | None = None
    terms: Any = None

    @property
    def zero(self) -> Array:
        """Whether π is 0 here, as far as is known, a scalar bool."""
        outside = jnp.asarray(False) if self.wall is None else self.wall.outside
        return (
            outside
            if self.log_density is None
            else outside | jnp.isneginf(self.log_density)
        )

    @property
    def log_open(self) -> Array | None:
        """log π without what makes it 0 in places."""
        return self.log_density if self.wall is None else self.wall.log_open

    @property
    def without_terms(self) -> Evaluation:
        """The same without its parts, for chains that are not weighed."""
        return dataclasses.replace(self, terms=None)

    @property
    def gradients(self) -> tuple[Position, ...]:
        """The score, and where a part of log π is known that of the rest."""
        return (
            (self.score,)
            if self.closed_form is None
            else (self.score, self.closed_form.score)
        )

    def with_gradients(self, gradients: Iterable[Position]) -> Evaluation:
        """The same with others in the place of `gradients`."""
        score, *unknown = gradients
        known = (
            None
            if self.closed_form is None
            else ClosedFormTerm(self.closed_form.value, *unknown)
        )
        return dataclasses.replace(self, score=score, closed_form=known)


class ExpertValue(eqx.Module):
    """Score and log-density of an expert at one position and level, a row for each of
    its conditions in plates.

    Attributes:
        score: ∇ log f over the entries of its site, (rows, entries).
        total: the sum of these over the rows, (entries,).
        log_density: log f, (rows,); NaN of a factor that offers only its score.
    """

    score: Array
    total: Array
    log_density: Array


class Frame(eqx.Module):
    """x = m + L·ξ with the mean m and the covariance L·Lᵀ of x/α under a noised site's
    prior given latents, or of a static site's coordinate under one that has a location
    and a scale.

    Attributes:
        centre, width: m, and standard deviations, of the site's shape.
        roots: L and L⁻¹, (…, n, n), of sites whose last n numbers are correlated.
    """

    centre: Array
    width: Array
    roots: tuple[Array, Array] | None = None

    def standard(self, x: Array) -> Array:
        """ξ of x."""
        away = x - self.centre
        return (
            away / self.width
            if self.roots is None
            else jnp.einsum("...ij,...j->...i", self.roots[1], away)
        )

    def place(self, xi: Array) -> Array:
        """x of ξ."""
        if self.roots is None:
            return self.centre + self.width * xi
        return self.centre + jnp.einsum("...ij,...j->...i", self.roots[0], xi)

    @property
    def log_volume(self) -> Array:
        """log |dx/dξ|, a scalar."""
        diagonal = (
            self.width
            if self.roots is None
            else jnp.diagonal(self.roots[0], axis1=-2, axis2=-1)
        )
        return jnp.sum(jnp.broadcast_to(jnp.log(diagonal), self.width.shape))


def unknown(tree: Tree) -> Tree:
    """NaN in the place of every number, False of every truth value; of arrays, or of
    their shapes."""
    return jax.tree.map(
        lambda leaf: jnp.full(
            leaf.shape, False if leaf.dtype == bool else jnp.nan, leaf.dtype
        ),
        tree,
    )


Target = Callable[[Position], Evaluation]
"""The density at one fixed level, as kernels see it."""


def at_once(
    evaluate: Callable[[Position, Array | int], Evaluation],
    position: Position,
    level: Array | int,
) -> Evaluation:
    """``evaluate(position, level)``; compiled as one where nothing is traced, since
    else every operation would be compiled and called separately. ``evaluate`` is a
    pytree."""
    if any(
        isinstance(leaf, jax.core.Tracer)
        for leaf in jax.tree.leaves((evaluate, position, level))
    ):
        return evaluate(position, level)
    return _compiled(evaluate, position, jnp.asarray(level))


@eqx.filter_jit
def _compiled(
    evaluate: Callable[[Position, Array], Evaluation], position: Position, level: Array
) -> Evaluation:
    return evaluate(position, level)


@eqx.filter_jit
def over_chains(function: Callable[..., Output], *batch: PyTree[Array]) -> Output:
    """``function`` of every chain, compiled: their axis leads in each argument and in
    what it returns. It is a pytree, such as a method of an evaluator, so that other
    weights and data compile nothing."""
    return jax.vmap(function)(*batch)
