r"""p(y | x_k) by the first two moments of x₀ given x_k, for linear observations under
any score.

For y = A·x₀ + b + N(0, Σ), with S the score of F in y_k = x_k/α, s = σ²/α² and s₀ that
of level 0,

    p(y | x_k) ≈ N(y; A·m + b, Σ + A·V·Aᵀ),
    m = y_k + (s − s₀)·S,    V = (s − s₀)·∂m/∂y_k.

By Tweedie's formulas m and V are the mean and the covariance of the x₀/α₀ of level 0
given x_k: level 0 carries noise of its own, and the promised posterior is that of its
value. With s₀ = 0 they are E[x₀ | x_k] and (σ²/α)·∂E[x₀ | x_k]/∂x_k. At
level 0 this is the likelihood itself, and under a Gaussian prior it is exact
everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float
from scipy.linalg import solve_triangular

from composeprob import tuning
from composeprob.compiler.check import node_capabilities, site_parts
from composeprob.compiler.exact import measure
from composeprob.compiler.facts import Bound, Facts
from composeprob.compiler.top import site_top
from composeprob.compiler.trace import (
    Replay,
    Shapes,
    Sites,
    Traced,
    not_linear,
    whitened,
)
from composeprob.density.once import once
from composeprob.factors.factor import LeafFactor
from composeprob.factors.networks import has_primitive
from composeprob.factors.whitening import whitener
from composeprob.ir.leaves import Observation, Site, leaves
from composeprob.language.policies import Policy, bridge
from composeprob.schedule import Noise, Schedule

Slope = Callable[[Sites], Sites]
"""A linear map of directions in the noised sites."""


class Moments(Policy):
    """The density of the value given x_k, from the first two moments of x₀ given x_k:
    of a linear observation with Gaussian noise, under any score."""

    def bind(self, observation: Observation, facts: Facts) -> Bound | str:
        o = observation
        reason = facts.not_linear(o)
        if not reason and o.name in facts.shared(_bent):
            reason = not_linear()
        reason = reason or facts.first_reason(
            o, lambda name: no_slope(facts.sites[name])
        )
        return reason or Bound(self, _joined)


def pays(o: Observation, facts: Facts) -> bool:
    """Return whether moments pay for an observation that left its policy open.

    They do where scores alone are known. An observation of latents is better tempered:
    kernels move latents best by log-densities, which moments lack.
    """
    # Under a mixture of Gaussians there is an exact closed form.
    if not facts.not_mixture(o) or facts.depend_on_statics({o.name}):
        return False
    return not facts.first_reason(o, lambda name: no_use(facts.sites[name]))


def _bent(facts: Facts) -> set[str]:
    """Return the observations with a stopped or replaced derivative, of those that are
    linear by their trace."""
    names = [o.name for o in facts.candidates if not facts.not_linear(o)]
    # The trace shows the function, and not whether its derivative was stopped or
    # replaced. For exact annealing `grouped` compares both.
    off = np.asarray(bent(facts.traced, tuple(names), facts.shapes, facts.xs))
    return {name for name, wrong in zip(names, off, strict=True) if wrong}


def _joined(policy: Policy, names: tuple[str, ...], facts: Facts) -> ByMoments:
    """Return the term of the observations that are bound."""
    if facts.depend_on_statics(names):
        return ByMoments(names, True, None)
    # Without latents A and Σ are constants, and are decomposed once.
    spectrum = eigendecomposed(facts.traced, names, facts.shapes, facts.xs)
    return ByMoments(names, False, spectrum)


class Eigen(NamedTuple):
    """B·Bᵀ = Q·diag(λ)·Qᵀ of M measurements."""

    vectors: Float[Array, "m m"]  # Q
    values: Float[Array, " m"]  # λ


class Residuals(NamedTuple):
    """Whitened observations: e = L⁻¹·(y − A·m − b), and log det L."""

    e: Float[Array, " m"]
    log_det: Float[Array, ""]


class Spread(NamedTuple):
    """The covariance that takes the place of V, trust·V₊ + unit·I, as a map.

    Attributes:
        of_loading: the map Bᵀ·q → V·Bᵀ·q.
        trust: θ, the trust in the score's Jacobian.
        unit: (1 − θ)·v, for data of unit variance.
    """

    of_loading: Slope
    trust: Float[Array, ""]
    unit: Float[Array, ""]


class ByMoments(eqx.Module):
    r"""The likelihood of the observations that are annealed by moments, all together.

    With e = L⁻¹·(y − A·m − b), B = L⁻¹·A and W = B·V·Bᵀ it is N(e; 0, I + W)/det L. W
    is evaluated in an orthonormal basis of at most n directions, for one
    Jacobian–vector product of the score each: all M where M ≤ n, else ¾·n of the Krylov
    space e, W·e, …, in which as many iterations of conjugate gradient solve (I + W)·u =
    e. The determinant takes the other n/4: M·⟨q, log(I + W)·q⟩ of one q of random signs
    by Lanczos' method. The rest costs effective chains, but makes nothing wrong, as
    weights and accept tests are ratios of one function, which at level 0 is exact.

    A network's Jacobian need not be a covariance. V₊ leaves out the negative part of W.
    Where noise is so large that an error of the Jacobian exceeds V itself, the
    covariance of data of unit variance, v = (s − s₀)·(1 + s₀)/(1 + s), takes its place:
    θ·V₊ + (1 − θ)·v·I with θ = (1 − δ)/(1 + ε²(1 + s)²).

    Its gradient treats V as constant in x_k, as Rozet et al. do: above level 0 it is
    not quite that of its value, and samplers correct moves along it by values.

    Where A does not depend on static sites, the basis is one of P^{−½}·(I + W)·P^{−½},
    with P = I + v·B·Bᵀ the I + W of data of unit variance: it has eigenvalues near 1
    for any A and noise, so few directions suffice.

    Attributes:
        names: the observations.
        bridged: True if they depend on static sites: their power then rises level by
            level.
        eigen: the eigenvectors and eigenvalues of B·Bᵀ, or None: see `eigendecomposed`.

    References:
        Rozet, Andry, Lanusse and Louppe 2024, *Learning Diffusion Priors from
        Observations by Expectation Maximization* (arXiv 2405.13712), where this is
        MMPS.
    """

    names: tuple[str, ...] = eqx.field(static=True)
    bridged: bool = eqx.field(static=True)
    eigen: Eigen | None = None

    def cost(self, traced: Traced) -> str:
        """Evaluations that the term costs, in words."""
        size = sum(traced.sizes(self.names))
        directions = min(size, tuning.MOMENTS.directions)
        return f"{directions} Jacobian–vector products an evaluation"

    def __call__(
        self,
        replay: Replay,
        xs: Sites,
        zs: Sites,
        scores: Sites,
        slope: Slope,
        schedule: Schedule,
        noise: Noise,
    ) -> tuple[Float[Array, ""], Sites]:
        """log p(y | x_k) and its gradient in both kinds of sites; ``scores`` and
        ``slope`` are ∇log F and its linearisation at ``xs``."""
        is_last = noise.index == 0
        first = schedule.at(0).variance
        # s − s₀: at level 0 exactly nothing, in place of rounding.
        left = jnp.where(is_last, 0.0, noise.variance - first)
        backward = jax.linear_transpose(slope, xs)

        def denoised(x: Array, score: Array) -> Array:
            """m of y_k = x/α and S = α·score."""
            return x / noise.alpha + left * noise.alpha * score

        def spread(loading: Sites) -> Sites:
            """V·Bᵀ·q, given Bᵀ·q."""
            direction = {**jax.tree.map(jnp.zeros_like, xs), **loading}
            direction = jax.tree.map(lambda a: left * noise.alpha * a, direction)
            return jax.tree.map(denoised, direction, slope(direction))

        # v, ε·(1 + s) and θ of the class's text.
        unit = left * (1 + first) / (1 + noise.variance)
        error = tuning.MOMENTS.error * (1 + noise.variance)
        trust = (1 - tuning.MOMENTS.least) / (1 + error**2)
        scale = None
        if self.eigen is not None:
            scale = 1 / jnp.sqrt(1 + unit * self.eigen.values)

        def log_likelihood(means: Sites, zs: Sites) -> Array:
            def residuals(means: Sites) -> Residuals:
                return self._residuals(replay, noise, means, zs, scale)

            diagonal = jnp.ones(1) if scale is None else scale**2
            covariance = Spread(spread, trust, (1 - trust) * unit)
            value = _log_normal(residuals, means, covariance, diagonal)
            if not self.bridged:
                return value
            return value * jnp.where(is_last, 1.0, bridge(schedule, noise))

        means = jax.tree.map(denoised, xs, scores)
        value_and_grad = jax.value_and_grad(log_likelihood, argnums=(0, 1))
        value, (of_means, of_zs) = value_and_grad(means, zs)
        # The chain rule through m with the score's Jacobian held constant, which would
        # take third derivatives of log F.
        of_xs: Sites = jax.tree.map(denoised, of_means, backward(of_means)[0])
        return value, {**of_xs, **of_zs}

    def _residuals(
        self, replay: Replay, noise: Noise, means: Sites, zs: Sites, scale: Array | None
    ) -> Residuals:
        """Whitened observations at x₀ = m, in the coordinates P^{−½}·Qᵀ where there is
        a ``scale``, the diagonal of P^{−½}."""
        statements, _ = replay(means, zs, noise.index)
        pairs = [whitened(statements[name]) for name in self.names]
        e = jnp.concatenate([e for e, _ in pairs])
        log_det = sum((log_det for _, log_det in pairs), jnp.zeros(()))
        if self.eigen is None or scale is None:
            return Residuals(e, log_det)
        rotated = scale * (e @ self.eigen.vectors)
        return Residuals(rotated, log_det - jnp.sum(jnp.log(scale)))


def _log_normal(
    residuals: Callable[[Sites], Residuals],
    means: Sites,
    covariance: Spread,
    diagonal: Float[Array, " m_or_1"],
) -> Float[Array, ""]:
    """log N(e; 0, D + W) − log det L, with D = diag(``diagonal``), the I of I + W in
    the basis' coordinates, and ``covariance`` in the place of V."""
    e, pull, log_det = jax.vjp(residuals, means, has_aux=True)

    def loaded(q: Array) -> Sites:
        """Bᵀ·q, as e has the derivative −B."""
        return jax.tree.map(jnp.negative, pull(q)[0])

    def spread(q: Array) -> Sites:
        """V·Bᵀ·q."""
        return covariance.of_loading(loaded(q))

    def matrix(basis: Array, spreads: Sites) -> Array:
        """D + W in a basis, with the derivative in A and L alone: V is constant in
        it."""
        basis, spreads = jax.lax.stop_gradient((basis, spreads))
        loadings = jax.vmap(loaded)(basis)
        half = _products(loadings, spreads)
        # ``half`` is W = B·(V·Bᵀ), but with the derivative in its first B alone; added
        # to its transpose it has the whole derivative. The rest sets the value to W₊.
        value = jax.lax.stop_gradient(0.5 * (half + half.T))
        w = half + half.T - value + jax.lax.stop_gradient(_positive(value) - value)
        return (
            jnp.eye(len(basis), dtype=e.dtype)
            + (basis * (diagonal - 1)) @ basis.T
            + covariance.trust * w
            + covariance.unit * _products(loadings, loadings)
        )

    if len(e) <= tuning.MOMENTS.directions:
        basis = jnp.eye(len(e), dtype=e.dtype)
        root = whitener(matrix(basis, jax.vmap(spread)(basis)))
        volume = -jnp.sum(jnp.log(jnp.diagonal(root)))
    else:
        forth = jax.linear_transpose(pull, e)

        def image(q: Array, spread_of_q: Sites) -> Array:
            """(D + W − I)·q."""
            in_place_of_v = jax.tree.map(
                lambda v, a: covariance.trust * v + covariance.unit * a,
                spread_of_q,
                loaded(q),
            )
            return (diagonal - 1) * q - forth((in_place_of_v,))[0]

        def krylov_space(start: Array, count: int) -> tuple[Array, Array]:
            """A basis, (count, M), and D + W in it, (count, count)."""
            basis, spreads = _krylov(start, count, spread, image)
            return jax.lax.stop_gradient(basis), matrix(basis, spreads)

        of_volume = tuning.MOMENTS.directions // 4
        # From one start for all e: the space of e would see now these eigenvalues, now
        # those, and the determinant would jump from chain to chain.
        signs = np.random.default_rng(0).choice([-1.0, 1.0], len(e))
        _, whole = krylov_space(jnp.asarray(signs, e.dtype), of_volume)
        volume = 0.5 * len(e) * _log_along_first(whole, jnp.min(diagonal))
        basis, whole = krylov_space(e, tuning.MOMENTS.directions - of_volume)
        root = whitener(whole)
    # Outside of the basis D + W counts as I.
    along = basis @ e
    squares = jnp.sum(e**2) - jnp.sum(along**2) + jnp.sum((root @ along) ** 2)
    log_det = log_det + volume
    return -0.5 * (squares + len(e) * math.log(2 * math.pi)) - log_det


def _positive(w: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """½(W + |W|): the part of a symmetric W with positive eigenvalues.

    |W| = W·sign(W) by Newton and Schulz's iteration, in matrix products; of eigenvalues
    below 1/400 of the greatest the sign comes out between 0 and ±1."""
    # Batches of matrix products are fast on accelerators, where `eigh` is not.
    sign = w / jnp.maximum(jnp.linalg.norm(w), jnp.finfo(w.dtype).tiny)
    sign = jax.lax.fori_loop(0, 15, lambda _, x: 1.5 * x - 0.5 * x @ x @ x, sign)
    absolute = w @ sign
    return 0.5 * w + 0.25 * (absolute + absolute.T)


def _log_along_first(
    whole: Float[Array, "n n"], least: Float[Array, ""]
) -> Float[Array, ""]:
    """⟨q, log(D + W)·q⟩ by Lanczos' quadrature.

    ``whole`` is D + W in a basis of the Krylov space of q that begins with q, and D ≥
    ``least``. The derivative is that of W alone, ⟨(D + W)⁻¹·q, dW·q⟩.
    """
    values, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(whole))
    values = jnp.maximum(values, least)
    # Not the derivative of eigh, which divides by differences of eigenvalues.
    slope = (vectors @ (vectors[0] / values)) @ whole[:, 0]
    value = jnp.sum(vectors[0] ** 2 * jnp.log(values))
    return value + slope - jax.lax.stop_gradient(slope)


def _krylov(
    e: Float[Array, " m"],
    count: int,
    spread: Callable[[Array], Sites],
    image: Callable[[Array, Sites], Array],
) -> tuple[Float[Array, "{count} m"], Sites]:
    """An orthonormal basis of a Krylov space, and V·Bᵀ·q of each q in it.

    The space is spanned by e, K·e, …, K^{n−1}·e with n = ``count`` and K = D + W − I;
    where it has fewer dimensions the last rows are zeros. ``spread(q)`` is V·Bᵀ·q, and
    ``image(q, spread(q))`` is K·q.
    """

    def extend(
        i: Array, carry: tuple[Array, Array, Sites]
    ) -> tuple[Array, Array, Sites]:
        v, basis, spreads = carry
        length = jnp.linalg.norm(v)
        q = v / jnp.where(length > 0, length, 1.0)
        spread_of_q = spread(q)
        basis = basis.at[i].set(q)
        following = image(q, spread_of_q)
        rest = following
        for _ in range(2):  # once leaves what rounding leaves
            rest = rest - basis.T @ (basis @ rest)
        # A rest of rounding alone would become a direction of noise.
        independent = jnp.linalg.norm(rest) > 1e-5 * jnp.linalg.norm(following)
        rest = jnp.where(independent, rest, 0.0)
        spreads = jax.tree.map(lambda all, q: all.at[i].set(q), spreads, spread_of_q)
        return rest, basis, spreads

    def blank(a: jax.ShapeDtypeStruct) -> Array:
        return jnp.zeros((count, *a.shape), a.dtype)

    spreads = jax.tree.map(blank, jax.eval_shape(spread, e))
    start = (e, jnp.zeros((count, len(e)), e.dtype), spreads)
    _, basis, spreads = jax.lax.fori_loop(0, count, extend, start)
    return basis, spreads


def _products(a: Sites, b: Sites) -> Float[Array, "n n"]:
    """⟨aᵢ, bⱼ⟩ of sites with a leading axis each."""
    return _flat(a) @ _flat(b).T


def _flat(sites: Sites) -> Float[Array, "n d"]:
    """The sites side by side, in the order of their names."""
    columns = [values.reshape(len(values), -1) for _, values in sorted(sites.items())]
    return jnp.concatenate(columns, axis=1)


def eigendecomposed(
    traced: Traced, names: tuple[str, ...], shapes: Shapes, xs: Sites
) -> Eigen | None:
    """The eigenvectors and eigenvalues of B·Bᵀ, for observations that depend on noised
    sites alone.

    None where they are of no use: a basis holds all directions, or the λ are alike, as
    those of a mask; and where there are too many directions.
    """
    size = sum(traced.sizes(names))
    if not tuning.MOMENTS.directions < size <= tuning.MOMENTS.most:
        return None
    slopes, noise = _slopes(traced, names, shapes, xs)
    # In double precision on the host, once for all levels.
    a = np.asarray(slopes, np.float64)
    covariance = np.asarray(noise, np.float64)
    b = solve_triangular(np.linalg.cholesky(covariance), a, lower=True)
    values, vectors = np.linalg.eigh(b @ b.T)
    if values[-1] < 1.1 * values[0]:
        return None
    dtype = jnp.result_type(float)
    values = np.maximum(values, 0)  # of a positive semidefinite matrix, to rounding
    return Eigen(jnp.asarray(vectors, dtype), jnp.asarray(values, dtype))


@once
def _slopes(
    traced: Traced, names: tuple[str, ...], shapes: Shapes, xs: Sites
) -> tuple[Float[Array, "m d"], Float[Array, "m m"]]:
    """A and Σ."""
    moments_at = traced.moments_at(names, xs, jax.random.key(0))
    origin = jax.tree.map(jnp.zeros_like, xs)
    _, a, covariance = measure(shapes, moments_at, origin, jax.jacrev)
    return a, covariance


def no_use(site: Site) -> str | None:
    """The reason against moments of a site by default; None where there is none.

    A factor with an energy has kernels with an accept test, which do without. Where
    powers do not sum to 1 the scores of noisy levels are not those of a noised density,
    and Tweedie's means are far from all data."""
    if "energy" in node_capabilities(site.root):
        return f"the factors of {site.name!r} have energies"
    power = site_top(site.root, site.shape).power
    if np.allclose(power, 1.0):
        return None
    return f"the powers of the factors of {site.name!r} do not sum to 1"


def no_slope(site: Site) -> str | None:
    """The reason why the score of the noised marginals of a site has no Jacobian–vector
    products; None where it has them."""
    marginal, _ = site_parts(site.root)
    if marginal is None:
        return f"{site.name!r} has no prior with noised marginals"
    for leaf in leaves(marginal):
        x = jnp.zeros(leaf.factor.event_shape)
        traced, *_ = eqx.filter_make_jaxpr(_score_product)(leaf.first, x)
        # The primitive of a function whose derivative is given backwards alone.
        if has_primitive(traced.jaxpr, "custom_lin"):
            return (
                f"the score of factor '{leaf.label}' has no Jacobian–vector product "
                "(a jax.custom_vjp)"
            )
    return None


def _score_product(factor: LeafFactor, x: Array) -> Array:
    """A Jacobian–vector product of a factor's score, along x."""
    conditions = factor.call_conditions()

    def score(x: Array) -> Array:
        return factor.evaluate(x, factor.schedule.at(0), conditions)[1]

    return jax.jvp(score, (x,), (x,))[1]


@once
def bent(
    traced: Traced, names: tuple[str, ...], shapes: Shapes, xs: Sites
) -> Bool[Array, " names"]:
    """True for each observation with a stopped or replaced derivative: A·x + b differs
    from its value at x, relative to the terms of the sum."""
    moments_at = traced.moments_at(names, xs, jax.random.key(0))

    def residuals(at: Sites) -> list[Array]:
        return [residual for residual, _ in moments_at(at)]

    at = {name: xs[name] for name, _ in shapes}
    origin = jax.tree.map(jnp.zeros_like, at)
    at_origin, slopes = jax.jvp(residuals, (origin,), (at,))
    errors = []
    for b, a, residual in zip(at_origin, slopes, residuals(at), strict=True):
        error = jnp.abs(b + a - residual) / (1 + jnp.abs(b) + jnp.abs(a))
        errors.append(jnp.max(error))
    return jnp.stack(errors) > 1e-3
