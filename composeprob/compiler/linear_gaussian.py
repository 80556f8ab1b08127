r"""p(y | x_k) in closed form: y = A·x₀ + b + N(0, Σ) under a prior Σ_j w_j·N(μ_j, C_j) of x₀.

With x = x_k = α·x₀ + σ·ε, S_j = α²·C_j + σ²·I and K_j = C_j·S_j⁻¹, component j states of x and of y given x

    N(x; α·μ_j, S_j)    and    N(y; A·m_j + b, Σ + σ²·A·K_j·Aᵀ),    m_j = μ_j + α·K_j·(x − α·μ_j),

so p(y | x) is the average of the second under the shares that the first gives the components. C_j is stored by its
eigenvectors U_j and eigenvalues, so nothing of the size of x is ever inverted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from jax.scipy.linalg import block_diag

from composeprob.factors.gaussians import Gaussians
from composeprob.factors.whitening import log_normal_of_sum, whitener
from composeprob.language.interpret import Statement, unwrap
from composeprob.schedule import Noise

Measurement = tuple[Array, Array, Array]
"""(y − b of shape (M,), A of shape (M, D), Σ of shape (M, M)) with every measurement and every noised entry."""

Moments = Callable[[dict[str, Array]], list[tuple[Array, Array]]]
"""(residual, covariance) of every observation, given the noised sites."""


class Stack(eqx.Module):
    """Measurements that share no entry of a site, with mixtures of one shape: B groups evaluated together.

    Attributes:
        rows: the measurements of each group, (B, m).
        columns: the entries that they depend on, (B, n).
        log_weights: (B, J).
        means: μ, (B, J, n).
        basis: U, (B, J, n, n), or (B, 1, n, n) where components are alike; None where every C is diagonal.
        widths: eigenvalues of C, (B, J, n) or (B, 1, n).
    """

    rows: Array
    columns: Array
    log_weights: Array
    means: Array
    basis: Array | None
    widths: Array

    @property
    def signature(self) -> tuple[tuple[int, ...] | None, ...]:
        """Shapes of one group; groups of one signature can stand in one stack."""
        return tuple(None if a is None else a.shape[1:] for a in (self.rows, self.means, self.basis, self.widths))

    def __call__(self, x: Array, measured: Measurement, noise: Noise) -> Array:
        """(log p(y | x), log p(y | x₀ = x/α), log p(x)) of all groups together, shape (3,)."""
        y, a, covariance = measured
        x, y = x[self.columns], y[self.rows]
        a = a[self.rows[:, :, None], self.columns[:, None, :]]
        covariance = covariance[self.rows[:, :, None], self.rows[:, None, :]]
        alpha, squared = noise.alpha, noise.sigma**2

        def log_densities(stack: Stack, x: Array, y: Array, a: Array, covariance: Array) -> Array:
            away = x - alpha * stack.means
            rotated = away if stack.basis is None else jnp.einsum("...ik,...i->...k", stack.basis, away)
            spread = alpha**2 * stack.widths + squared
            size = x.shape[-1] * math.log(2 * math.pi)
            of_x = stack.log_weights - 0.5 * jnp.sum(rotated**2 / spread + jnp.log(spread), -1) - 0.5 * size
            gain = stack.widths / spread
            back = gain * rotated
            back = back if stack.basis is None else jnp.einsum("...ik,...k->...i", stack.basis, back)
            loadings = a if stack.basis is None else a @ stack.basis
            instrument = whitener(covariance)
            blur = noise.sigma * loadings * jnp.sqrt(gain)[..., None, :]
            of_y = log_normal_of_sum(y - (stack.means + alpha * back) @ a.T, instrument, blur)
            clean = log_normal_of_sum(y - a @ (x / alpha), instrument, jnp.zeros_like(y)[:, None])
            return jnp.stack([jax.nn.logsumexp(jax.nn.log_softmax(of_x) + of_y), clean, jax.nn.logsumexp(of_x)])

        return jnp.sum(jax.vmap(log_densities)(self, x, y, a, covariance), 0)


class Exact(eqx.Module):
    """The likelihood of every observation that is annealed exactly.

    Attributes:
        stacks: the groups.
        inside: which entries of A the groups read, (M, D); were another one more than rounding, the density is NaN.
        names: the observations.
        shapes: the noised sites that they depend on, ``(site, shape)``.
        marginal: whether the sites' densities are the noised marginals of the prior that the groups hold.
        bridged: whether they depend on static sites, which then meet the data level by level.
    """

    stacks: tuple[Stack, ...]
    inside: Array | np.ndarray
    names: tuple[str, ...] = eqx.field(static=True)
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = eqx.field(static=True)
    marginal: bool = eqx.field(static=True)
    bridged: bool = eqx.field(static=True)

    def __call__(self, xs: dict[str, Array], moments_at: Moments, noise: Noise) -> Array:
        """(log p(y | x), log p(y | x₀ = x/α), log p(x)), shape (3,).

        Args:
            xs: the noised sites at this level.
            moments_at: the observations' residuals and covariances, given the noised sites as they take them.
            noise: this level's noise.
        """
        y, a, covariance = measure(self.shapes, moments_at, {n: jnp.zeros_like(x) for n, x in xs.items()})
        x = jnp.concatenate([jnp.ravel(xs[name]) for name, _ in self.shapes])
        total = sum((stack(x, (y, a, covariance), noise) for stack in self.stacks), jnp.zeros(3))
        away = jnp.where(self.inside, 0.0, jnp.abs(a)) > 1e-4 * jnp.max(jnp.abs(a), -1, keepdims=True)
        return jnp.where(jnp.any(away), jnp.nan, total)


def measure(shapes: tuple[tuple[str, tuple[int, ...]], ...], moments_at: Moments, at: dict[str, Array]) -> Measurement:
    """Observations of noised sites to first order about ``at``: the residual there, its slope, its noise."""

    def residuals(flat: Array) -> tuple[Array, Array]:
        pairs = moments_at({**at, **unravel(flat, shapes)})
        return jnp.concatenate([r for r, _ in pairs]), block_diag(*[c for _, c in pairs])

    def twice(flat: Array) -> tuple[Array, tuple[Array, Array]]:
        residual, covariance = residuals(flat)
        return residual, (residual, covariance)

    start = jnp.concatenate([jnp.ravel(at[name]) for name, _ in shapes])
    slope, (residual, covariance) = jax.jacfwd(twice, has_aux=True)(start)
    return residual, -slope, covariance


def unravel(flat: Array, shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> dict[str, Array]:
    """The sites in a vector of all their entries."""
    ends = np.cumsum([math.prod(shape) for _, shape in shapes])
    parts = jnp.split(flat, ends[:-1])
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes, parts, strict=True)}


def moments(statement: Statement) -> tuple[Array, Array]:
    """value − mean, (m,), and covariance, (m, m), of a Gaussian observation."""
    distribution, inner = statement.distribution, unwrap(statement.distribution)
    residual = jnp.asarray(statement.value, jnp.result_type(float)) - distribution.mean
    if type(inner) is dist.Normal:
        return residual.ravel(), jnp.diag(jnp.broadcast_to(distribution.variance, residual.shape).ravel())
    n = residual.shape[-1]
    covariance = jnp.broadcast_to(inner.covariance_matrix, (*residual.shape, n)).reshape(-1, n, n)
    return residual.ravel(), block_diag(*covariance)


def stack_of(part: Gaussians, rows: np.ndarray, columns: np.ndarray) -> Stack:
    """One group: a mixture over entries, and the measurements that depend on them. ``columns`` place the entries."""
    covariances = part.covariances
    if len(covariances) and np.all(covariances == covariances[:1]):
        covariances = covariances[:1]
    widths, basis = covariances, None
    if covariances.ndim == 3:
        widths, basis = np.linalg.eigh(covariances)
        widths = np.maximum(widths, 0.0)
    to = lambda a: None if a is None else np.asarray(a, np.dtype(jnp.result_type(float)))[None]  # noqa: E731
    host: Any = (rows[None], columns[None], *map(to, (part.log_weights, part.means, basis, widths)))
    return Stack(*host)


def stacked(groups: list[Stack]) -> tuple[Stack, ...]:
    """Groups of one signature joined."""
    kinds: dict[tuple[tuple[int, ...] | None, ...], list[Stack]] = {}
    for group in groups:
        kinds.setdefault(group.signature, []).append(group)
    return tuple(jax.tree.map(lambda *arrays: np.concatenate(arrays), *kind) for kind in kinds.values())
