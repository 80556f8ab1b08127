r"""p(y | x_k) by the first two moments of x₀ given x_k, for linear observations under
any score.

For y = A·x₀ + b + N(0, Σ), with S the score of F in y_k = x_k/α, s = σ²/α² and s₀ that
of level 0,

    p(y | x_k) ≈ N(y; A·m + b, Σ + A·V·Aᵀ),    m = y_k + (s − s₀)·S,    V = (s − s₀)·∂m/∂y_k,

are the mean and the covariance of the x₀/α₀ of level 0 given x_k, by Tweedie's
formulas: level 0 carries noise of its own, and the posterior that is promised is that
of what it holds. With s₀ = 0 they are E[x₀ | x_k] and (σ²/α)·∂E[x₀ | x_k]/∂x_k. At
level 0 this is the likelihood itself, and under a Gaussian prior it is exact
everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy.linalg import solve_triangular

from composeprob import tuning
from composeprob.compiler.check import node_capabilities, site_parts
from composeprob.compiler.exact import measure
from composeprob.compiler.once import once
from composeprob.compiler.top import site_top
from composeprob.compiler.trace import Replay, Shapes, Sites, Traced, whitened
from composeprob.factors.factor import LeafFactor
from composeprob.factors.networks import has_primitive
from composeprob.factors.whitening import whitener
from composeprob.ir.leaves import Site, leaves
from composeprob.language.policies import bridge
from composeprob.schedule import Noise, Schedule

Slope = Callable[[Sites], Sites]
"""A linear map of directions in the noised sites."""


class ByMoments(eqx.Module):
    r"""The likelihood of the observations that are annealed by moments, all together.

    With e = L⁻¹·(y − A·m − b), B = L⁻¹·A and W = B·V·Bᵀ it is N(e; 0, I + W)/det L. W
    is found in an orthonormal basis of at most n directions, for one Jacobian–vector
    product of the score each: all M where M ≤ n, else ¾·n of the Krylov space e, W·e,
    …, in which as many iterations of conjugate gradient solve (I + W)·u = e. The
    determinant takes the other n/4, M·⟨q, log(I + W)·q⟩ of one q of random signs by
    Lanczos' method. What that leaves out costs effective chains, but makes nothing
    wrong, as weights and accept tests are ratios of one function, which at level 0 is
    exact.

    A network's Jacobian need not be a covariance. V₊ leaves out what is negative of W,
    and where noise is so large that an error of the Jacobian exceeds what V can be,
    that of data of unit variance, v = (s − s₀)·(1 + s₀)/(1 + s), takes its place: θ·V₊
    + (1 − θ)·v·I with θ = (1 − δ)/(1 + ε²(1 + s)²).

    Its gradient treats V as constant in x_k, as Rozet et al. do: above level 0 it is
    not quite that of its value, and samplers correct moves along it by values.

    Where A does not depend on static sites, the basis is one of P^{−½}·(I + W)·P^{−½},
    with P = I + v·B·Bᵀ what I + W would be of data of unit variance: it has eigenvalues
    near 1 whatever A and the noise are, and few directions do.

    Attributes:
        names: the observations.
        bridged: whether they depend on static sites, which then meet the data level by
            level.
        eigen: Q, (M, M), and λ, (M,), of B·Bᵀ = Q·diag(λ)·Qᵀ, or None: see
            `eigendecomposed`.

    References:
        Rozet, Andry, Lanusse and Louppe 2024, *Learning Diffusion Priors from
        Observations by Expectation Maximization* (arXiv 2405.13712), where this is
        MMPS.
    """

    names: tuple[str, ...] = eqx.field(static=True)
    bridged: bool = eqx.field(static=True)
    eigen: tuple[Array, Array] | None = None

    def __call__(
        self,
        replay: Replay,
        xs: Sites,
        zs: Sites,
        scores: Sites,
        slope: Slope,
        schedule: Schedule,
        noise: Noise,
    ) -> tuple[Array, Sites]:
        """log p(y | x_k), a scalar, and its gradient in both kinds of sites; ``scores``
        and ``slope`` are ∇log F and its linearisation at ``xs``."""
        last, first = noise.index == 0, schedule.at(0).variance
        left = jnp.where(
            last, 0.0, noise.variance - first
        )  # s − s₀, at level 0 nothing, not rounding
        backward = jax.linear_transpose(slope, xs)

        def denoised(x: Array, score: Array) -> Array:
            return x / noise.alpha + left * noise.alpha * score

        def spread(loading: Sites) -> Sites:
            """V·Bᵀ·q of Bᵀ·q."""
            inside = {**jax.tree.map(jnp.zeros_like, xs), **loading}
            inside = jax.tree.map(lambda a: left * noise.alpha * a, inside)
            return jax.tree.map(denoised, inside, slope(inside))

        # V for data of unit variance, and how far the score's Jacobian is trusted
        # beside it.
        unit = left * (1 + first) / (1 + noise.variance)
        error = tuning.MOMENTS.error * (1 + noise.variance)
        trust = (1 - tuning.MOMENTS.least) / (1 + error**2)

        scale = (
            None if self.eigen is None else 1 / jnp.sqrt(1 + unit * self.eigen[1])
        )  # of P^{−½}

        def conditioned(at: Sites, zs: Sites) -> tuple[Array, Array]:
            statements, _ = replay(at, zs, noise.index)
            pairs = [whitened(statements[name]) for name in self.names]
            e, log_det = (
                jnp.concatenate([e for e, _ in pairs]),
                sum((log_det for _, log_det in pairs), jnp.zeros(())),
            )
            if self.eigen is None or scale is None:
                return e, log_det
            return scale * (e @ self.eigen[0]), log_det - jnp.sum(jnp.log(scale))

        def log_likelihood(means: Sites, zs: Sites) -> Array:
            diagonal = jnp.ones(1) if scale is None else scale**2
            log_likelihood = self._log_normal(
                lambda at: conditioned(at, zs),
                means,
                spread,
                diagonal,
                trust,
                (1 - trust) * unit,
            )
            return (
                log_likelihood * jnp.where(last, 1.0, bridge(schedule, noise))
                if self.bridged
                else log_likelihood
            )

        means = jax.tree.map(denoised, xs, scores)
        value, (of_means, of_zs) = jax.value_and_grad(log_likelihood, argnums=(0, 1))(
            means, zs
        )
        of_xs: Sites = jax.tree.map(denoised, of_means, backward(of_means)[0])
        return value, {**of_xs, **of_zs}

    def _log_normal(
        self, whitened: Callable[[Sites], tuple[Array, Array]], means: Sites, spread: Slope, diagonal: Array,
        trust: Array, beside: Array,
    ) -> Array:  # fmt: skip
        """log N(e; 0, D + W) − log det L, a scalar, with D = diag(``diagonal``), (M,)
        or (1,), what I has become, and ``trust``·V₊ + ``beside``·I in the place of
        V."""
        e, pull, log_det = jax.vjp(whitened, means, has_aux=True)

        def loaded(q: Array) -> Sites:
            """Bᵀ·q."""
            return jax.tree.map(jnp.negative, pull(q)[0])

        def covariance(basis: Array, spreads: Sites) -> Array:
            """D + W in a basis, with the derivative in what A and L depend on: V is
            constant in it."""
            basis, spreads = jax.lax.stop_gradient((basis, spreads))
            loadings = jax.vmap(loaded)(basis)
            half = _products(loadings, spreads)
            # The value of W, and of B·(V·Bᵀ) twice the derivative in B.
            value = jax.lax.stop_gradient(0.5 * (half + half.T))
            w = half + half.T - value + jax.lax.stop_gradient(_positive(value) - value)
            return (
                jnp.eye(len(basis), dtype=e.dtype)
                + (basis * (diagonal - 1)) @ basis.T
                + trust * w
                + beside * _products(loadings, loadings)
            )

        if len(e) <= tuning.MOMENTS.directions:
            basis = jnp.eye(len(e), dtype=e.dtype)
            root = whitener(
                covariance(basis, jax.vmap(lambda q: spread(loaded(q)))(basis))
            )
            volume = -jnp.sum(jnp.log(jnp.diagonal(root)))
        else:
            forth = jax.linear_transpose(pull, e)

            def image(q: Array, found: Sites) -> Array:
                both = jax.tree.map(
                    lambda v, a: trust * v + beside * a, found, loaded(q)
                )
                return (diagonal - 1) * q - forth((both,))[0]

            def space(start: Array, count: int) -> tuple[Array, Array]:
                basis, spreads = _krylov(
                    start, count, lambda q: spread(loaded(q)), image
                )
                return jax.lax.stop_gradient(basis), covariance(basis, spreads)

            # From one start for all e: the space of e would see now these eigenvalues,
            # now those.
            signs = jnp.asarray(
                np.random.default_rng(0).choice([-1.0, 1.0], len(e)), e.dtype
            )
            whole = space(signs, tuning.MOMENTS.directions // 4)[1]
            volume = 0.5 * len(e) * _log_along_first(whole, jnp.min(diagonal))
            basis, whole = space(
                e, tuning.MOMENTS.directions - tuning.MOMENTS.directions // 4
            )
            root = whitener(whole)
        along = basis @ e
        squares = jnp.sum(e**2) - jnp.sum(along**2) + jnp.sum((root @ along) ** 2)
        log_det = log_det + volume
        return -0.5 * (squares + len(e) * math.log(2 * math.pi)) - log_det


def _positive(w: Array) -> Array:
    """½(W + |W|), (n, n): the part of a symmetric W of eigenvalues above 0. |W| =
    W·sign(W) by Newton and Schulz's iteration, in matrix products; of eigenvalues below
    1/400 of the greatest the sign comes out between 0 and ±1."""
    sign = w / jnp.maximum(jnp.linalg.norm(w), jnp.finfo(w.dtype).tiny)
    sign = jax.lax.fori_loop(0, 15, lambda _, x: 1.5 * x - 0.5 * x @ x @ x, sign)
    absolute = w @ sign
    return 0.5 * w + 0.25 * (absolute + absolute.T)


def _log_along_first(whole: Array, least: Array) -> Array:
    """⟨q, log(D + W)·q⟩ by Lanczos' quadrature, a scalar, of D + W in the Krylov space
    of q, (n, n), q the first of its basis, and D ≥ ``least``; its derivative is that of
    W, ⟨(D + W)⁻¹·q, dW·q⟩."""
    values, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(whole))
    values = jnp.maximum(values, least)
    slope = (vectors @ (vectors[0] / values)) @ whole[:, 0]
    return (
        jnp.sum(vectors[0] ** 2 * jnp.log(values))
        + slope
        - jax.lax.stop_gradient(slope)
    )


def _krylov(
    e: Array,
    count: int,
    spread: Callable[[Array], Sites],
    image: Callable[[Array, Sites], Array],
) -> tuple[Array, Sites]:
    """An orthonormal basis of e, K·e, …, K^{n−1}·e, (``count``, M), K = D + W − I, and
    V·Bᵀ·q = ``spread(q)`` of each q in it; zeros beyond the last one where the space
    has fewer dimensions. ``image`` makes K·q of q and that."""

    def extend(
        i: Array, carry: tuple[Array, Array, Sites]
    ) -> tuple[Array, Array, Sites]:
        v, basis, spreads = carry
        length = jnp.linalg.norm(v)
        q = v / jnp.where(length > 0, length, 1.0)
        there = spread(q)
        basis, whole = basis.at[i].set(q), image(q, there)
        rest = whole
        for _ in range(2):  # once leaves what rounding leaves
            rest = rest - basis.T @ (basis @ rest)
        rest = jnp.where(
            jnp.linalg.norm(rest) > 1e-5 * jnp.linalg.norm(whole), rest, 0.0
        )
        return (
            rest,
            basis,
            jax.tree.map(lambda all, one: all.at[i].set(one), spreads, there),
        )

    blank = jax.tree.map(
        lambda a: jnp.zeros((count, *a.shape), a.dtype), jax.eval_shape(spread, e)
    )
    _, basis, spreads = jax.lax.fori_loop(
        0, count, extend, (e, jnp.zeros((count, len(e)), e.dtype), blank)
    )
    return basis, spreads


def _products(a: Sites, b: Sites) -> Array:
    """⟨aᵢ, bⱼ⟩, (n, n), of sites with a leading axis each."""
    first, second = (
        jnp.concatenate([x.reshape(len(x), -1) for _, x in sorted(s.items())], axis=1)
        for s in (a, b)
    )
    return first @ second.T


def eigendecomposed(
    traced: Traced, names: tuple[str, ...], shapes: Shapes, xs: Sites
) -> tuple[Array, Array] | None:
    """Q, (M, M), and λ, (M,), of B·Bᵀ = Q·diag(λ)·Qᵀ for observations that depend on
    noised sites alone; None where a basis holds all directions, or there are too many
    of them, or their λ are all alike, as those of a mask."""
    if not tuning.MOMENTS.directions < sum(traced.sizes(names)) <= tuning.MOMENTS.most:
        return None
    a, covariance = (
        np.asarray(found, np.float64) for found in _slopes(traced, names, shapes, xs)
    )
    b = solve_triangular(np.linalg.cholesky(covariance), a, lower=True)
    squares, vectors = np.linalg.eigh(b @ b.T)
    if squares[-1] < 1.1 * squares[0]:
        return None
    dtype = jnp.result_type(float)
    return jnp.asarray(vectors, dtype), jnp.asarray(np.maximum(squares, 0), dtype)


@once
def _slopes(
    traced: Traced, names: tuple[str, ...], shapes: Shapes, xs: Sites
) -> tuple[Array, Array]:
    """A, (M, D), and Σ, (M, M)."""
    moments_at = traced.moments_at(names, xs, jax.random.key(0))
    _, a, covariance = measure(
        shapes, moments_at, jax.tree.map(jnp.zeros_like, xs), jax.jacrev
    )
    return a, covariance


def no_use(site: Site) -> str | None:
    """Why moments are not taken of a site unless they are asked for. A factor with an
    energy has kernels with an accept test, which do without. Where powers do not sum to
    1 the scores of noisy levels are not those of a noised density, and Tweedie's means
    are far from all data."""
    if "energy" in node_capabilities(site.root):
        return f"the factors of {site.name!r} have energies"
    power = site_top(site.root, site.shape).power
    return (
        None
        if np.allclose(power, 1.0)
        else f"the powers of the factors of {site.name!r} do not sum to 1"
    )


def no_slope(site: Site) -> str | None:
    """Why the score of the noised marginals of a site has no Jacobian–vector
    products."""
    marginal, _ = site_parts(site.root)
    if marginal is None:
        return f"{site.name!r} has no prior with noised marginals"
    for leaf in leaves(marginal):
        x = jnp.zeros(leaf.factor.event_shape)

        def product(f: LeafFactor, x: Array) -> Array:
            conditions = f.call_conditions()
            return jax.jvp(
                lambda x: f.evaluate(x, f.schedule.at(0), conditions)[1], (x,), (x,)
            )[1]

        traced, *_ = eqx.filter_make_jaxpr(product)(leaf.first, x)
        if has_primitive(
            traced.jaxpr, "custom_lin"
        ):  # of a function whose derivative is given backwards alone
            return f"the score of factor '{leaf.label}' has no Jacobian–vector product (a jax.custom_vjp)"
    return None


@once
def bent(traced: Traced, names: tuple[str, ...], shapes: Shapes, xs: Sites) -> Array:
    """Whether a derivative in each observation was stopped or replaced: how far A·x + b
    is from it at x, relative to what it is the sum of."""
    moments_at = traced.moments_at(names, xs, jax.random.key(0))

    def residuals(at: Sites) -> list[Array]:
        return [residual for residual, _ in moments_at(at)]

    at = {name: xs[name] for name, _ in shapes}
    origin, slope = jax.jvp(residuals, (jax.tree.map(jnp.zeros_like, at),), (at,))
    each = zip(origin, slope, residuals(at), strict=True)
    off = [
        jnp.max(jnp.abs(b + a - there) / (1 + jnp.abs(b) + jnp.abs(a)))
        for b, a, there in each
    ]
    return jnp.stack(off) > 1e-3
