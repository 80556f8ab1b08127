"""Evaluation of a density at one position and level: the currency of the waist."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, PyTree

Position: TypeAlias = PyTree[Array]
"""A pytree of floating arrays for ONE chain: ``{site: array}``, no chain axis."""


Tree = TypeVar("Tree")
Output = TypeVar("Output")


class Wall(eqx.Module):
    """Boundary of the support: the places where π is 0.

    Attributes:
        outside: True where π is 0 because the potential G is, a scalar.
        log_open: log π without G, a scalar; None where the density offers only its
            score.
    """

    outside: Bool[Array, ""]
    log_open: Float[Array, ""] | None


class ClosedFormTerm(eqx.Module):
    """Term of log π that has a closed form, where the density offers only its score.

    Attributes:
        value: log of the factors of π that have a log-density, a scalar.
        score: the gradient of the remaining part of log π, structured like the
            position.
    """

    value: Float[Array, ""]
    score: Position


class DensityTerms(eqx.Module):
    """Terms of log π_k at one position, for samplers that weight chains.

    π_k(x, z) ∝ p(z)·F_k(x)·E_k(x, z)·G_k(x, z): the priors of static sites, the algebra
    of diffusion factors at the noised sites, the observations that are annealed
    exactly, and everything else (likelihoods, user energies, classifiers). A term that
    the density cannot compute is NaN.

    Attributes:
        drift: ∇ log (F_k·E_k), structured like the position (zero at static sites): the
            reverse process follows it.
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
    rate: Float[Array, ""]
    excess: Float[Array, ""]
    log_potential: Float[Array, ""]
    log_prior: Float[Array, ""]
    log_marginal: Float[Array, ""]
    log_exact: Float[Array, ""]


class TrackedFactors(eqx.Module):
    """Factors of F_k whose exponents grow although they offer no log-density that can
    be compared along a path: chains carry it (`samplers.tracking`).

    Attributes:
        scores: ∇ log f of each of the n factors, structured like the position.
        log_densities: log f of each up to a constant of the level, a scalar; None for a
            factor that offers only its score.
        slopes: the derivative −dw/ds/α² of the rate r by each log f, (n,).
        values: log f_k of each at the position, (n,), with its constant; NaN unless it
            is carried there.
    """

    scores: tuple[Position, ...]
    log_densities: tuple[Float[Array, ""] | None, ...]
    slopes: Float[Array, " n"]
    values: Float[Array, " n"]

    @property
    def rate(self) -> Float[Array, ""]:
        """The part of the Feynman–Kac rate that the growth of the exponents adds, a
        scalar."""
        return jnp.sum(self.slopes * self.values)

    def with_values(self, values: Float[Array, " n"]) -> TrackedFactors:
        """Return the factors with these log-densities."""
        return dataclasses.replace(self, values=values)


class Evaluation(eqx.Module):
    """Evaluation of π_k at one position x, as kernels see it.

    Attributes:
        log_density: log π_k up to a constant of the level, a scalar; None where the
            density offers only its score.
        score: ∇ log π_k, structured like the position.
        wall: the boundary of π's support; None of a density that is nowhere 0.
        closed_form: of a density without a log-density, the term that has one; None
            where no term has, or where log π is known completely.
        terms: the `DensityTerms` of a density, which kernels pass on unread, or None.
        tracked: the factors whose log-densities chains carry, or None.
    """

    log_density: Float[Array, ""] | None
    score: Position
    wall: Wall | None = None
    closed_form: ClosedFormTerm | None = None
    terms: Any = None
    tracked: TrackedFactors | None = None

    @property
    def zero(self) -> Bool[Array, ""]:
        """True where π is 0, as far as the density can tell, a scalar."""
        if self.wall is None:
            outside = jnp.asarray(False)
        else:
            outside = self.wall.outside
        if self.log_density is None:
            return outside
        # A factor of bounded support is 0 outside of it without a wall.
        return outside | jnp.isneginf(self.log_density)

    @property
    def log_open(self) -> Float[Array, ""] | None:
        """log π without the potential that makes it 0 in places."""
        if self.wall is None:
            return self.log_density
        return self.wall.log_open

    @property
    def without_terms(self) -> Evaluation:
        """The evaluation without terms and tracked factors, for chains that carry no
        weights."""
        return dataclasses.replace(self, terms=None, tracked=None)

    @property
    def gradients(self) -> tuple[Position, ...]:
        """The score, the score of the part of log π without a closed form, and those
        of tracked factors."""
        gradients = [self.score]
        if self.closed_form is not None:
            gradients.append(self.closed_form.score)
        if self.tracked is not None:
            gradients += self.tracked.scores
        return tuple(gradients)

    def with_gradients(self, gradients: Iterable[Position]) -> Evaluation:
        """Replace `gradients` by others."""
        # In the order of `gradients`; the second is there where a closed form is.
        score, *others = gradients
        closed_form = self.closed_form
        if closed_form is not None:
            closed_form = ClosedFormTerm(closed_form.value, others.pop(0))
        tracked = self.tracked
        if tracked is not None:
            tracked = dataclasses.replace(tracked, scores=tuple(others))
        return dataclasses.replace(
            self, score=score, closed_form=closed_form, tracked=tracked
        )


class ExpertValue(eqx.Module):
    """Score and log-density of an expert at one position and level, a row for each of
    its conditions in plates.

    Attributes:
        score: ∇ log f over the entries of its site.
        total: the sum of these over the rows.
        log_density: log f of each row; NaN for a factor that offers only its score.
    """

    score: Float[Array, "rows entries"]
    total: Float[Array, " entries"]
    log_density: Float[Array, " rows"]


class Frame(eqx.Module):
    """Affine coordinates x = m + L·ξ, of the mean m and covariance L·Lᵀ of a prior.

    The prior is that of x/α at a noised site given latents, or that of a static site's
    coordinate where it has a location and a scale.

    Attributes:
        centre, width: m, and standard deviations, of the site's shape.
        roots: L and L⁻¹, (…, n, n), of sites whose last n numbers are correlated.
    """

    centre: Float[Array, "*site"]
    width: Float[Array, "*site"]
    roots: tuple[Float[Array, "... n n"], Float[Array, "... n n"]] | None = None

    def standard(self, x: Float[Array, "*site"]) -> Float[Array, "*site"]:
        """Return ξ of x."""
        away = x - self.centre
        if self.roots is None:
            return away / self.width
        return jnp.einsum("...ij,...j->...i", self.roots[1], away)

    def place(self, xi: Float[Array, "*site"]) -> Float[Array, "*site"]:
        """Return x of ξ."""
        if self.roots is None:
            return self.centre + self.width * xi
        return self.centre + jnp.einsum("...ij,...j->...i", self.roots[0], xi)

    @property
    def log_volume(self) -> Float[Array, ""]:
        """log |dx/dξ|, a scalar."""
        if self.roots is None:
            diagonal = self.width
        else:
            # L is triangular, so the diagonal alone determines its determinant.
            diagonal = jnp.diagonal(self.roots[0], axis1=-2, axis2=-1)
        return jnp.sum(jnp.broadcast_to(jnp.log(diagonal), self.width.shape))


def unknown(tree: Tree) -> Tree:
    """Replace every number by NaN and every truth value by False; leaves may be arrays
    or their shapes."""

    def placeholder(leaf: Any) -> Array:
        if leaf.dtype == bool:
            return jnp.full(leaf.shape, False, leaf.dtype)
        return jnp.full(leaf.shape, jnp.nan, leaf.dtype)

    return jax.tree.map(placeholder, tree)


Target = Callable[[Position], Evaluation]
"""The density at one fixed level, as kernels see it."""


def at_once(
    evaluate: Callable[[Position, Array | int], Evaluation],
    position: Position,
    level: Array | int,
) -> Evaluation:
    """Return ``evaluate(position, level)``, compiled as one function where nothing is
    traced; ``evaluate`` is a pytree."""
    leaves = jax.tree.leaves((evaluate, position, level))
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return evaluate(position, level)
    # Outside of a trace every operation would be compiled and called separately.
    return _compiled(evaluate, position, jnp.asarray(level))


@eqx.filter_jit
def _compiled(
    evaluate: Callable[[Position, Array], Evaluation], position: Position, level: Array
) -> Evaluation:
    return evaluate(position, level)


@eqx.filter_jit
def over_chains(function: Callable[..., Output], *batch: PyTree[Array]) -> Output:
    """Map ``function`` over chains, compiled: their axis leads in each argument and in
    each result.

    ``function`` is a pytree, such as a method of an evaluator, so that other weights
    and data compile nothing.
    """
    return jax.vmap(function)(*batch)
