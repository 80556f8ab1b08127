"""Population statistics of a level: an affine fit of the score, and the control that makes weights more equal.

In y = x/α the reverse process is dy = S dτ + dW, and SMC weighs it by the Feynman–Kac rate r. With S + u followed in
place of S, and r + ∇·u + ⟨u, S⟩ weighed in place of r, every F_k stays what it is: insert the drift into the equation
∂F = 𝓛F − g²·r·F that defines r.
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from composeprob import tuning
from composeprob.samplers.meet import shares
from composeprob.samplers.step import times


class Fit(eqx.Module):
    """A level's affine fits over the population, in y, and the control u = A·(y − centre) + a of each half of it."""

    centre: Array  # the weighted mean of y, (d,)
    slope: Array  # L, the linear part of what a step integrates exactly: (d, d), symmetric, or (d,) for a diagonal
    gain: Array  # A, (2, d, d) or (2, d)
    push: Array  # a, (2, d)
    bend: Array | None = None  # eigenvalues of the slope of ∇log G, at most 0, (d,); None where there is no G
    axes: Array | None = None  # its eigenvectors, (d, d); None for the coordinate axes

    @classmethod
    def none(cls, base: Array, bent: bool) -> Fit:
        """What takes the place of a fit where chains are too few: the slope −P/s, no control, and a flat log G."""
        zero = jnp.zeros((2, base.size))
        return cls(jnp.zeros_like(base), -base, zero, zero, jnp.zeros_like(base) if bent else None)

    def slope_with(self, fixed: Array) -> Array:
        """The slope of the score with the controls: the fixed one, (d,), and the mean of those fitted."""
        slope = self.slope + jnp.mean(self.gain, axis=0)
        return slope + (jnp.diag(fixed) if slope.ndim == 2 else fixed)

    def control(self, y: Array, half: Array) -> tuple[Array, Array]:
        """u at y for a chain of this half, (d,), and ∇·u, a scalar."""
        # Of both halves, as one product of all chains with each matrix, and not a copy of a matrix for every chain.
        both = jax.vmap(times, (0, None))(self.gain, y - self.centre) + self.push
        diagonals = jax.vmap(jnp.diag)(self.gain) if self.gain.ndim == 3 else self.gain
        return both[half], jnp.sum(diagonals, axis=1)[half]


def controlled(
    y: Array, drift: Array, rate: Array, half: Array, fit: Fit | None, fixed: Array
) -> tuple[Array, Array, Array]:
    """u at y, (d,), S + u, (d,), and r + ∇·u + ⟨u, S⟩, a scalar, for a chain of this half with S and r, under the fixed
    control, (d,), and that of the population's fit if there is one."""
    u, divergence = fixed * y, jnp.sum(fixed)
    if fit is not None:
        found, its_divergence = fit.control(y, half)
        u, divergence = u + found, divergence + its_divergence
    return u, drift + u, rate + divergence + u @ drift


def fit(rows: Array, log_weights: Array, base: Array, control: bool) -> Fit:
    r"""The affine fits over a weighted population of N chains, or over some of them where those are as good.

    The slope is that of least squares, B = Cov(S, y)·Cov(y)⁻¹, for a Gaussian the Hessian of log F. Along each
    eigenvector of B it counts as much as it explains of the variance of S there, R², and −P/s, the slope of P factors
    whose data are points, counts for the rest: narrow modes far apart have a flat B, and a step that took S for flat
    would throw chains out of them.

    The control (A, a), A symmetric, makes the potential r + ∇·u + ⟨u, S⟩ as nearly constant as least squares can. Each
    half of the chains takes what was fitted over the other: a fit to a chain's own potential would take from its weight
    what belongs there.

    The slope of ∇log G is one of least squares, too, and counts as much as it explains where it is negative: steps that
    are twisted towards data take it for the curvature of log G.

    ``rows`` are (N, 2d + 1), each y, S without any control, and the potential per unit of τ with the fixed one, or
    (N, 3d + 1) with ∇log G between the last two; ``base`` is P/s, (d,).
    """
    dims = base.size
    rows, log_weights = (_thinned(table, dims) for table in (rows, log_weights))
    usable = jnp.all(jnp.isfinite(rows), axis=1) & jnp.isfinite(log_weights)
    rows = jnp.where(usable[:, None], rows, 0.0)
    weights = shares(jnp.where(usable, log_weights, -jnp.inf))
    mean, count = weights @ rows, len(rows)
    y, score, potential = rows[:, :dims] - mean[:dims], rows[:, dims : 2 * dims], rows[:, -1]
    full = dims <= tuning.FIT.full and count >= tuning.FIT.per_dimension * dims
    degrees = 1 / (weights @ weights) - 1
    freedom = lambda full: degrees / jnp.maximum(degrees - (dims if full else 1), 1e-3)  # noqa: E731
    roots = jnp.sqrt(weights)[:, None]
    pair = roots * jnp.stack([y, score - mean[dims : 2 * dims]])
    values, basis = _slope(pair, freedom(full), base, full)
    slope = values if basis is None else (basis * values) @ basis.T
    bend = axes = None
    if rows.shape[1] > 2 * dims + 1:
        pulls = roots * (rows[:, 2 * dims : -1] - mean[2 * dims : -1])
        whole = dims <= tuning.FIT.full and count >= tuning.FIT.per_bend * dims
        bend, axes = _slope(jnp.stack([pair[0], pulls]), freedom(whole), jnp.zeros_like(base), whole)
        bend = jnp.minimum(bend, 0.0)
    gain, push = jnp.zeros((2, *slope.shape)), jnp.zeros((2, dims))
    if control:
        # As many coefficients as so many chains can tell.
        kind = "diagonal" if count // 2 >= tuning.FIT.per_feature * 2 * dims else "scalar"
        if full and count // 2 >= tuning.FIT.per_feature * dims * (dims + 3) / 2:
            kind = "dense"
        first, second = jnp.split(jnp.column_stack([y, score, potential, weights]), [count // 2])
        halves = jnp.stack([jnp.pad(first, [(0, count % 2), (0, 0)]), second])  # zeros fill up the shorter one
        gain, push = _controls(halves, kind, basis)
    return Fit(mean[:dims], slope, gain, push, bend, axes)


def centred(values: Array, weights: Array) -> Array:
    """√w·(f − Σ w·f) of values (M,) or (M, n), for weights that add up to 1: products of these are covariances."""
    away = values - weights @ values
    return jnp.sqrt(weights).reshape(-1, *[1] * (values.ndim - 1)) * away


def _thinned(table: Array, dims: int) -> Array:
    """Evenly spaced ones of either half of the chains, of the first with one fewer or as many, to make fits over."""
    count = table.shape[0]
    step = -(-count // max(tuning.FIT.enough, 2 * tuning.FIT.per_feature * dims * (dims + 3)))
    return jnp.concatenate([table[: count // 2 : step], table[count // 2 :: step]])


def _slope(pair: Array, freedom: Array, base: Array, full: bool) -> tuple[Array, Array | None]:
    """The slope of `centred` y and S, the ``pair``, −``base`` where chains determine none: its eigenvalues, (d,), and
    eigenvectors, (d, d), those of least squares, if ``full``; else the coordinate axes stand for these. Residuals are
    too small by ``freedom``."""
    basis = None
    if full:
        slopes, basis = _regression(pair)
        pair, base = pair @ basis, (basis**2).T @ base
    else:
        slopes = jnp.sum(pair[0] * pair[1], axis=0) / jnp.maximum(jnp.sum(pair[0] ** 2, axis=0), 1e-30)
    rest, whole = jnp.sum(jnp.stack([pair[1] - pair[0] * slopes, pair[1]]) ** 2, axis=1)
    explained = jnp.clip(1 - freedom * rest / jnp.maximum(whole, 1e-30), 0.0, 1.0)
    found = explained * slopes - (1 - explained) * base
    return jnp.where(jnp.isfinite(found), found, -base), basis


def _regression(pair: Array) -> tuple[Array, Array]:
    """Eigenvalues and eigenvectors of the symmetric slope of least squares of `centred` S on y, the ``pair``."""
    variances, axes = jnp.linalg.eigh(pair[0].T @ pair[0])
    scale = jnp.sqrt(jnp.maximum(variances, jnp.maximum(1e-7 * variances[-1], 1e-30)))
    white, drawn = pair @ axes * jnp.stack([1 / scale, scale])[:, None]
    slopes = drawn.T @ white
    slopes = slopes + (drawn - white @ slopes.T).T @ white  # what rounding left of it
    slopes = 0.5 * (slopes + slopes.T) / (scale[:, None] * scale)
    # Eigenvectors of NaN would be NaN too.
    values, vectors = jnp.linalg.eigh(jnp.where(jnp.all(jnp.isfinite(slopes)), slopes, 0.0))
    return values, axes @ vectors


def _controls(table: Array, kind: str, basis: Array | None) -> tuple[Array, Array]:
    """A and a for each half of the chains, by least squares over the other; A is (d, d) where there is a basis.

    The coordinates are that basis. A `diagonal` A takes the eigenvectors of the slope of the half that is fitted: those
    of all chains know of the chains that take it, and made the log-evidence of a squared mixture in 32 dimensions .3
    too low. Both are 0 where they leave more than `tuning.FIT.worth` of the potential's variance over the half that
    takes them. The ``table`` is each half's y, S, potential and weights, (2, ⌈N/2⌉, 2d + 2).
    """
    dims, weights = table.shape[-1] // 2 - 1, table[..., -1]
    pairs = table[..., :-2].reshape(*weights.shape, 2, dims)
    weights = weights / jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), 1e-30)
    # Known while traced: no bounds to check.
    i, j = np.triu_indices(dims) if kind == "dense" else (np.arange(dims),) * 2

    def features(pairs: Array, weights: Array) -> Array:
        """What the coefficients of A and a multiply in the potential, `centred`."""
        away, score = pairs[:, 0], pairs[:, 1]
        found = away[:, i] * score[:, j]
        if kind == "dense":  # A_ij = A_ji multiplies both
            found = found + (i != j) * away[:, j] * score[:, i]
        return centred(
            jnp.sum(found, axis=1, keepdims=True) if kind == "scalar" else jnp.hstack([found, score]), weights
        )

    def solved(features: Array, wanted: Array) -> Array:
        unit = jnp.sqrt(jnp.maximum(jnp.sum(features**2, axis=0), 1e-30))
        features = features / unit
        factor = jax.scipy.linalg.cho_factor(features.T @ features + tuning.FIT.ridge * jnp.eye(len(unit)))

        def refine(_: int, found: Array) -> Array:
            return found - jax.scipy.linalg.cho_solve(factor, features.T @ (wanted + features @ found))

        # Normal equations square the condition number; each round wins back digits.
        return jax.lax.fori_loop(0, 3, refine, jnp.zeros_like(unit)) / unit

    def kept(found: Array, others: Array, theirs: Array) -> tuple[Array, Array]:
        left = theirs + others @ found
        better = left @ left < tuning.FIT.worth * (theirs @ theirs)  # false where anything is NaN
        found = jnp.where(better, found, 0.0)
        if kind == "scalar":
            return jnp.full((dims,), found[0]), jnp.zeros((dims,))
        gain, push = found[:-dims], found[-dims:]
        if kind == "dense":
            index = np.zeros((dims, dims), int)
            index[i, j] = index[j, i] = np.arange(len(i))
            gain = gain[index]
        return gain, push

    if basis is not None and kind == "diagonal":
        of_halves = [jax.vmap(centred)(pairs[:, :, i], weights) for i in (0, 1)]
        axes = jax.vmap(_regression)(jnp.stack(of_halves, axis=1))[1]
        fitted, taking = (jax.vmap(features)(pairs @ each[:, None], weights) for each in (axes, axes[::-1]))
        basis = axes[::-1]
    else:
        fitted = taking = jax.vmap(features)(pairs if basis is None else pairs @ basis, weights)
    wanted = jax.vmap(centred)(table[..., -2], weights)
    gain, push = jax.vmap(kept)(jax.vmap(solved)(fitted, wanted)[::-1], taking, wanted)
    if basis is None:
        return gain, push
    gain = gain if kind == "dense" else jax.vmap(jnp.diag)(gain)
    return basis @ gain @ basis.mT, (basis @ push[..., None])[..., 0]
