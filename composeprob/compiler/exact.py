r"""p(y | x_k) in closed form: y = A·x₀ + b + N(0, Σ) under a prior Σ_j w_j·N(μ_j, C_j)
of x₀.

With x = x_k = α·x₀ + σ·ε, S_j = α²·C_j + σ²·I and K_j = C_j·S_j⁻¹, component j states
of x and of y given x

    N(x; α·μ_j, S_j)    and    N(y; A·m_j + b, Σ + σ²·A·K_j·Aᵀ),    m_j = μ_j + α·K_j·(x − α·μ_j),

so p(y | x) is the average of the second under the shares that the first gives the
components. C_j is stored by its eigenvectors U_j and eigenvalues, so nothing of the
size of x is ever inverted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree
from jax.scipy.linalg import block_diag

from composeprob.compiler.conjugate import (
    NotGaussian,
    Prior,
    alike,
    check_size,
    connected,
)
from composeprob.compiler.linearity import Kind
from composeprob.compiler.once import once
from composeprob.compiler.trace import (
    Moments,
    Replay,
    Shapes,
    Sites,
    Traced,
    moments,
    not_linear,
)
from composeprob.factors.gaussians import Gaussians, joint
from composeprob.factors.whitening import log_normal_of_sum, whitener
from composeprob.language.policies import bridge
from composeprob.schedule import Noise, Schedule

Measurement = tuple[Array, Array, Array]
"""(y − b of shape (M,), A of shape (M, D), Σ of shape (M, M)) with every measurement
and every noised entry."""


class Stack(eqx.Module):
    """Measurements that share no entry of a site, with mixtures of one shape: B groups
    evaluated together.

    Attributes:
        rows: the measurements of each group, (B, m).
        columns: the entries that they depend on, (B, n).
        log_weights: (B, J).
        means: μ, (B, J, n).
        basis: U, (B, J, n, n), or (B, 1, n, n) where components are alike; None where
            every C is diagonal.
        widths: eigenvalues of C, (B, J, n) or (B, 1, n).
    """

    rows: Array
    columns: Array
    log_weights: Array
    means: Array
    basis: Array | None
    widths: Array

    def __call__(self, x: Array, measured: Measurement, noise: Noise) -> Array:
        """(log p(y | x), log p(y | x₀ = x/α), log p(x)) of all groups together, shape
        (3,)."""
        y, a, covariance = measured
        x, y = x[self.columns], y[self.rows]
        a = a[self.rows[:, :, None], self.columns[:, None, :]]
        covariance = covariance[self.rows[:, :, None], self.rows[:, None, :]]
        alpha, squared = noise.alpha, noise.sigma**2

        def log_densities(
            stack: Stack, x: Array, y: Array, a: Array, covariance: Array
        ) -> Array:
            away = x - alpha * stack.means
            rotated = (
                away
                if stack.basis is None
                else jnp.einsum("...ik,...i->...k", stack.basis, away)
            )
            spread = alpha**2 * stack.widths + squared
            size = x.shape[-1] * math.log(2 * math.pi)
            of_x = (
                stack.log_weights
                - 0.5 * jnp.sum(rotated**2 / spread + jnp.log(spread), -1)
                - 0.5 * size
            )
            gain = stack.widths / spread
            back = gain * rotated
            back = (
                back
                if stack.basis is None
                else jnp.einsum("...ik,...k->...i", stack.basis, back)
            )
            loadings = a if stack.basis is None else a @ stack.basis
            instrument = whitener(covariance)
            blur = noise.sigma * loadings * jnp.sqrt(gain)[..., None, :]
            of_y = log_normal_of_sum(
                y - (stack.means + alpha * back) @ a.T, instrument, blur
            )
            clean = log_normal_of_sum(
                y - a @ (x / alpha), instrument, jnp.zeros_like(y)[:, None]
            )
            return jnp.stack(
                [
                    jax.nn.logsumexp(jax.nn.log_softmax(of_x) + of_y),
                    clean,
                    jax.nn.logsumexp(of_x),
                ]
            )

        return jnp.sum(jax.vmap(log_densities)(self, x, y, a, covariance), 0)


class ClosedForm(NamedTuple):
    """log E and ∇log E; what the density has of it and the gradient of that, a power of
    E or, at level 0, the likelihood; and what the rate gains. Where E is tiny that
    power is no sum of log E and a correction: to rounding they would cancel."""

    log_exact: Array
    of_exact: Sites
    annealed: Array
    of_annealed: Sites
    crossed: Array

    @property
    def correction(self) -> Array:
        """The log-potential that makes of E what the density has of it."""
        return self.annealed - self.log_exact


def no_closed_form(xs: Sites, zs: Sites) -> ClosedForm:
    """Where no observation is annealed so."""
    zero, zeros = (
        jnp.zeros((), jnp.result_type(float)),
        jax.tree.map(jnp.zeros_like, {**xs, **zs}),
    )
    return ClosedForm(zero, zeros, zero, zeros, zero)


class Exact(eqx.Module):
    """The likelihood of every observation that is annealed exactly.

    Attributes:
        stacks: the groups.
        inside: which entries of A the groups read, (M, D); were another one more than
            rounding, the density is NaN.
        names: the observations.
        shapes: the noised sites that they depend on, ``(site, shape)``.
        marginal: whether the sites' densities are the noised marginals of the prior
            that the groups hold.
        bridged: whether they depend on static sites, which then meet the data level by
            level.
    """

    stacks: tuple[Stack, ...]
    inside: Array | np.ndarray
    names: tuple[str, ...] = eqx.field(static=True)
    shapes: Shapes = eqx.field(static=True)
    marginal: bool = eqx.field(static=True)
    bridged: bool = eqx.field(static=True)

    def __call__(
        self,
        replay: Replay,
        xs: Sites,
        zs: Sites,
        schedule: Schedule,
        noise: Noise,
        drift: Sites,
    ) -> ClosedForm:
        """What is added at a position, where ``drift`` is ∇log F, with zeros at static
        sites.

        At level 0 every policy is the posterior that the program promises, seen at x/α;
        E has level 0's noise in it like a marginal, and the correction takes it out. At
        the noisiest levels it takes out a power of E that static sites shall not see
        yet. The rate of F·E is that of F where F is the noised prior q that E is
        derived from, as E·q is a noised marginal too; elsewhere ⟨∇log F − ∇log q, ∇log
        E⟩ more, by the rule for the product F·(E·q)·q⁻¹.
        """

        terms, pull = jax.vjp(partial(self._log_densities, replay, noise), xs, zs)

        def gradient(*cotangent: float) -> Sites:
            of_x, of_z = pull(jnp.asarray(cotangent, terms.dtype))
            return {**of_x, **of_z}

        of_exact, of_clean = gradient(1.0, 0.0, 0.0), gradient(0.0, 1.0, 0.0)
        last = noise.index == 0
        power = bridge(schedule, noise) if self.bridged else jnp.ones_like(terms[0])
        annealed = jnp.where(last, terms[1], power * terms[0])
        of_annealed = {
            n: jnp.where(last, of_clean[n], power * s) for n, s in of_exact.items()
        }
        crossed = jnp.zeros((), jnp.result_type(float))
        if not self.marginal:
            of_prior = gradient(0.0, 0.0, 1.0)
            crossed = sum(
                (
                    jnp.sum((drift[n] - of_prior[n]) * of_exact[n])
                    for n, _ in self.shapes
                ),
                crossed,
            )
        return ClosedForm(terms[0], of_exact, annealed, of_annealed, crossed)

    def _log_densities(
        self, replay: Replay, noise: Noise, xs: Sites, zs: Sites
    ) -> Array:
        """(log p(y | x), log p(y | x₀ = x/α), log p(x)), shape (3,)."""

        def moments_at(at: Sites) -> list[tuple[Array, Array]]:
            statements, _ = replay(at, zs, noise.index)
            return [moments(statements[name]) for name in self.names]

        measured = measure(
            self.shapes, moments_at, {n: jnp.zeros_like(x) for n, x in xs.items()}
        )
        x, (_, a, _) = (
            jnp.concatenate([jnp.ravel(xs[name]) for name, _ in self.shapes]),
            measured,
        )
        total = sum((stack(x, measured, noise) for stack in self.stacks), jnp.zeros(3))
        away = jnp.where(self.inside, 0.0, jnp.abs(a)) > 1e-4 * jnp.max(
            jnp.abs(a), -1, keepdims=True
        )
        return jnp.where(jnp.any(away), jnp.nan, total)


def measure(
    shapes: Shapes,
    moments_at: Moments,
    at: Sites,
    jacobian: Callable[..., Any] = jax.jacfwd,
) -> Measurement:
    """Observations of noised sites to first order about ``at``: the residual there, its
    slope, its noise."""
    names = [name for name, _ in shapes]
    start, unravel = ravel_pytree([at[name] for name in names])

    def residuals(flat: Array) -> tuple[Array, tuple[Array, Array]]:
        pairs = moments_at({**at, **dict(zip(names, unravel(flat), strict=True))})
        residual = jnp.concatenate([r for r, _ in pairs])
        return residual, (residual, block_diag(*[c for _, c in pairs]))

    slope, (residual, covariance) = jacobian(residuals, has_aux=True)(start)
    return residual, -slope, covariance


def stack_of(part: Gaussians, rows: np.ndarray) -> Stack:
    """One group: a mixture over entries, and the measurements that depend on them."""
    covariances = part.covariances[:1] if alike(part) else part.covariances
    widths, basis = covariances, None
    if covariances.ndim == 3:
        widths, basis = np.linalg.eigh(covariances)
        widths = np.maximum(widths, 0.0)
    float_ = jnp.result_type(float)
    numbers = (
        None if a is None else a.astype(float_)
        for a in (part.log_weights, part.means, basis, widths)
    )
    return Stack(*jax.tree.map(lambda a: a[None], [rows, part.entries, *numbers]))


def stacked(groups: list[Stack]) -> tuple[Stack, ...]:
    """Groups whose arrays have the same shapes joined."""
    kinds: dict[tuple[tuple[int, ...], ...], list[Stack]] = {}
    for group in groups:
        kinds.setdefault(tuple(map(np.shape, jax.tree.leaves(group))), []).append(group)
    return tuple(
        jax.tree.map(lambda *arrays: np.concatenate(arrays), *kind)
        for kind in kinds.values()
    )


def grouped(
    traced: Traced,
    names: tuple[str, ...],
    shapes: Shapes,
    priors: Mapping[str, Prior | str],
    xs: Sites,
    bridged: bool,
    reasons: dict[str, str],
) -> Exact | None:
    """The measurements sorted into groups that share nothing; None after a reason
    against some was added."""
    depends, correlated, errors = (
        np.asarray(a) for a in _measurements(traced, names, shapes, xs)
    )
    owner = np.repeat(
        np.arange(len(names)), traced.sizes(names)
    )  # the observation that each row of the measurement belongs to
    off = {names[i] for i in owner[np.abs(errors).max(0) > 1e-3]}
    if off:  # a derivative that was stopped or replaced
        reasons |= dict.fromkeys(off, not_linear())
        return None
    offsets = dict(
        zip(
            (n for n, _ in shapes),
            np.cumsum([0] + [int(np.prod(s)) for _, s in shapes[:-1]]),
            strict=True,
        )
    )
    parts = [
        replace(part, entries=part.entries + offsets[name])
        for name, _ in shapes
        if isinstance(prior := priors[name], Prior)
        for part in prior.parts
    ]
    count = len(owner)
    reads = (
        np.array([depends[:, part.entries].any(1) for part in parts])
        .reshape(-1, count)
        .T
    )
    # What a row holds together: itself, the rows that its noise is correlated with, the
    # parts that it depends on.
    holds = np.hstack([correlated | np.eye(count, dtype=bool), reads])
    inside, groups = np.zeros(depends.shape, bool), list[Stack]()
    for rows in connected([np.flatnonzero(row) for row in holds]):
        chosen = [parts[p] for p in np.flatnonzero(reads[rows].any(0))]
        try:
            check_size(chosen, len(rows))
        except (
            NotGaussian
        ) as reason:  # without the observation that joins most, the others may do
            widest = rows[holds[rows].sum(1).argmax()]
            reasons[names[owner[widest]]] = str(reason)
            return None
        nothing = Gaussians(
            np.zeros(0, int), np.zeros(1), np.zeros((1, 0)), np.zeros((1, 0))
        )
        whole = joint(chosen) if chosen else nothing
        inside[np.ix_(rows, whole.entries)] = True
        groups.append(stack_of(whole, rows))
    marginal = all(
        prior.marginal for prior in priors.values() if isinstance(prior, Prior)
    )
    return Exact(stacked(groups), inside, names, shapes, marginal, bridged)


@once
def _measurements(
    traced: Traced, names: tuple[str, ...], shapes: Shapes, xs: Sites
) -> tuple[Array, Array, Array]:
    """Which entries of A, (M, D), and of Σ, (M, M), can be other than zero; for some
    draws of the static sites the error of A·x + b at x, (4, M)."""

    def at_draw(key: Array) -> tuple[Array, Array, Array]:
        moments_at = traced.moments_at(names, xs, key)
        y, a, covariance = measure(shapes, moments_at, jax.tree.map(jnp.zeros_like, xs))
        there, _, _ = measure(shapes, moments_at, xs)
        flat = jnp.concatenate([jnp.ravel(xs[name]) for name, _ in shapes])
        return (
            a,
            covariance,
            (y - a @ flat - there) / (1.0 + jnp.abs(y) + jnp.abs(a) @ jnp.abs(flat)),
        )

    slopes, covariances, errors = jax.vmap(at_draw)(
        jax.random.split(jax.random.key(0), 4)
    )
    found, size = traced.linearity(shapes), slopes.shape[-1]
    pairs = [found[name] for name in names]
    slopes_of_means = [
        m.array.T if m.kind == Kind.LINEAR else jnp.zeros((len(noise.array), size))
        for m, noise in pairs
    ]
    depends = (jnp.concatenate(slopes_of_means) != 0) | jnp.any(slopes != 0, 0)
    correlated = (block_diag(*[noise.array for _, noise in pairs]) != 0) | jnp.any(
        covariances != 0, 0
    )
    return depends, correlated, errors
