"""Population statistics of a level: an affine fit of the score, and the control that makes weights more equal.

Everything here is in y = x/α, where the reverse process is dy = S dτ + dW, and SMC weighs it by the potential r, the
Feynman–Kac rate. With S + u followed in place of S, and r + ∇·u + ⟨u, S⟩ weighed in place of r, every F_k stays what it
is: insert the drift into the equation ∂F = 𝓛F − g²·r·F that defines r.
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from composeprob import tuning
from composeprob.samplers.meet import shares
from composeprob.samplers.step import times


class Fit(eqx.Module):
    """A level's affine fits over the population, in y.

    Attributes:
        centre: the weighted mean of y, (d,).
        slope: L, the linear part of what a step integrates exactly: (d, d), symmetric, or (d,) for a diagonal.
        gain, push: A and a of the control u = A·(y − centre) + a of each half of the chains, (2, d, d) or (2, d),
            and (2, d).
    """

    centre: Array
    slope: Array
    gain: Array
    push: Array

    @classmethod
    def none(cls, base: Array) -> Fit:
        """What takes the place of a fit where chains are too few: the slope −P/s, and no control."""
        zero = jnp.zeros((2, base.size))
        return cls(jnp.zeros_like(base), -base, zero, zero)

    def slope_with(self, fixed: Array) -> Array:
        """The slope of the score with the controls: the fixed one, (d,), and the mean of those fitted."""
        slope = self.slope + jnp.mean(self.gain, axis=0)
        return slope + (jnp.diag(fixed) if slope.ndim == 2 else fixed)

    def control(self, y: Array, half: Array) -> tuple[Array, Array]:
        """u at y for a chain of this half, (d,), and ∇·u, a scalar."""
        # Of both halves, as one product of all chains with each matrix, and not a copy of a matrix for every chain.
        both = jax.vmap(times, (0, None))(self.gain, y - self.centre) + self.push
        return both[half], jax.vmap(_trace)(self.gain)[half]


def controlled(
    y: Array, drift: Array, rate: Array, half: Array, fit: Fit | None, fixed: Array
) -> tuple[Array, Array, Array]:
    """u at y, (d,), S + u, (d,), and r + ∇·u + ⟨u, S⟩, a scalar, for a chain of this half.

    Args:
        y, drift, rate: y, S and r of one chain.
        fit: of the population; None for the fixed control alone.
        fixed: `fixed_control`, (d,).
    """
    u, divergence = fixed * y, jnp.sum(fixed)
    if fit is not None:
        found, its_divergence = fit.control(y, half)
        u, divergence = u + found, divergence + its_divergence
    return u, drift + u, rate + divergence + u @ drift


def fit(rows: Array, log_weights: Array, base: Array, control: bool) -> Fit:
    r"""The affine fits over a weighted population of N chains, or over some of them where those are as good.

    The slope is that of least squares, B = Cov(S, y)·Cov(y)⁻¹, which for a Gaussian is the Hessian of log F wherever
    chains are. Along each eigenvector of B it counts as much as it explains of the variance of S there, R², and −P/s,
    the slope of P factors whose data are points, counts for the rest: narrow modes far apart have a flat B, and a step
    that took S for flat would throw chains out of them.

    The control (A, a), A symmetric, makes the potential r + ∇·u + ⟨u, S⟩ as nearly constant as least squares can; for
    Gaussians that is constant. Each half of the chains takes what was fitted over the other half, which knows nothing
    of it: a fit to a chain's own potential would take from its weight what belongs there. One that leaves most of the
    variance of the potentials of the half that takes it is left out.

    Args:
        rows: (N, 2d + 1), each y, S without any control, and the potential per unit of τ with the fixed one.
        log_weights: of the chains, (N,).
        base: P/s, (d,).
        control: whether to fit one; it is 0 if not.
    """
    dims = base.size
    rows, log_weights = (_thinned(table, dims) for table in (rows, log_weights))
    count = rows.shape[0]
    usable = jnp.all(jnp.isfinite(rows), axis=1) & jnp.isfinite(log_weights)
    rows = jnp.where(usable[:, None], rows, 0.0)
    weights = shares(jnp.where(usable, log_weights, -jnp.inf))
    y, score, potential = rows[:, :dims], rows[:, dims : 2 * dims], rows[:, -1]
    centre = weights @ y
    away, full = y - centre, dims <= tuning.FIT.full and count >= tuning.FIT.per_dimension * dims
    slope, basis = _slope(away, score, weights, base, full)
    shape = (2, dims, dims) if full else (2, dims)
    gain, push = jnp.zeros(shape), jnp.zeros((2, dims))
    if control:
        kind = _kind(count // 2, dims, full)
        rotated = (away, score) if basis is None else (away @ basis, score @ basis)
        gain, push = _controls(*(_halves(part) for part in (*rotated, potential, weights)), kind=kind)
        if basis is not None:
            gain = gain if kind == "dense" else jax.vmap(jnp.diag)(gain)
            gain, push = basis @ gain @ basis.T, push @ basis.T
    return Fit(centre, slope, gain, push)


def _thinned(table: Array, dims: int) -> Array:
    """Evenly spaced ones of either half of the chains, of the first with one fewer or as many, to make fits over."""
    count = table.shape[0]
    step = -(-count // max(tuning.FIT.enough, 2 * tuning.FIT.per_feature * dims * (dims + 3)))
    return jnp.concatenate([table[: count // 2 : step], table[count // 2 :: step]])


def _slope(away: Array, score: Array, weights: Array, base: Array, full: bool) -> tuple[Array, Array | None]:
    """The slope, (d, d) or (d,), and its eigenvectors; −P/s where chains determine none."""
    pull, dims = score - weights @ score, base.size
    freedom = 1 / jnp.sum(weights**2) - 1
    freedom = freedom / jnp.maximum(freedom - (dims if full else 1), 1e-3)

    def blended(pull: Array, linear: Array, slopes: Array, base: Array) -> Array:
        rest = weights @ (pull - linear) ** 2 / jnp.maximum(weights @ pull**2, 1e-30)
        explained = jnp.clip(1 - freedom * rest, 0.0, 1.0)
        found = explained * slopes - (1 - explained) * base
        return jnp.where(jnp.isfinite(found), found, -base)

    if not full:
        slopes = (weights @ (away * pull)) / jnp.maximum(weights @ away**2, 1e-30)
        return blended(pull, away * slopes, slopes, base), None
    variances, axes = jnp.linalg.eigh((away.T * weights) @ away)
    scale = jnp.sqrt(jnp.maximum(variances, jnp.maximum(1e-7 * variances[-1], 1e-30)))
    white, drawn = away @ axes / scale, pull @ axes * scale
    slopes = (drawn.T * weights) @ white
    slopes = slopes + ((drawn - white @ slopes.T).T * weights) @ white  # what rounding left of it
    slopes = 0.5 * (slopes + slopes.T) / (scale[:, None] * scale)
    known = jnp.all(jnp.isfinite(slopes))  # eigenvectors of NaN would be NaN too
    values, vectors = jnp.linalg.eigh(jnp.where(known, slopes, jnp.eye(dims)))
    basis = jnp.where(known, axes @ vectors, jnp.eye(dims))
    found = blended(pull @ basis, away @ basis * values, values, (basis**2).T @ base)
    found = jnp.where(known, found, -((basis**2).T @ base))
    return (basis * found) @ basis.T, basis


def _kind(count: int, dims: int, full: bool) -> str:
    """How many coefficients a control can take that is fitted over so many chains."""
    if full and count >= tuning.FIT.per_feature * dims * (dims + 3) / 2:
        return "dense"
    return "diagonal" if count >= tuning.FIT.per_feature * 2 * dims else "scalar"


def _halves(table: Array) -> Array:
    """The first ⌊N/2⌋ chains and the others, (2, ⌈N/2⌉, …); zeros fill up what is missing of the first."""
    first, second = jnp.split(table, [table.shape[0] // 2])
    return jnp.stack([jnp.pad(first, [(0, table.shape[0] % 2), *[(0, 0)] * (table.ndim - 1)]), second])


def _controls(away: Array, score: Array, potential: Array, weights: Array, *, kind: str) -> tuple[Array, Array]:
    """A and a for each half of the chains, by least squares over the other; A is (d, d) if ``dense``, else a diagonal.

    Both are 0 where they leave more than `tuning.FIT.worth` of the potential's variance over the half that takes them.

    Args:
        away, score, potential, weights: of either half, (2, M, …).
    """
    dims = away.shape[-1]
    i, j = jnp.triu_indices(dims) if kind == "dense" else (jnp.arange(dims),) * 2
    features = away[..., i] * score[..., j]
    if kind == "dense":  # A_ij = A_ji multiplies both
        features = features + jnp.where(i == j, 0.0, away[..., j] * score[..., i])
    if kind == "scalar":
        features = jnp.sum(features, axis=-1, keepdims=True)
    else:
        features = jnp.concatenate([features, score], axis=-1)

    def centred(features: Array, potential: Array, weights: Array) -> tuple[Array, Array]:
        weights = weights / jnp.maximum(jnp.sum(weights), 1e-30)
        root = jnp.sqrt(weights)
        return root[:, None] * (features - weights @ features), root * (potential - weights @ potential)

    def solved(features: Array, wanted: Array) -> Array:
        unit = jnp.sqrt(jnp.maximum(jnp.sum(features**2, axis=0), 1e-30))
        features = features / unit
        factor = jax.scipy.linalg.cho_factor(features.T @ features + tuning.FIT.ridge * jnp.eye(len(unit)))

        def refine(_: int, found: Array) -> Array:
            return found - jax.scipy.linalg.cho_solve(factor, features.T @ (wanted + features @ found))

        # Normal equations square the condition number; each round wins back digits.
        return jax.lax.fori_loop(0, 3, refine, jnp.zeros_like(unit)) / unit

    def kept(found: Array, others: Array, theirs: Array) -> tuple[Array, Array]:
        left = jnp.sum((theirs + others @ found) ** 2)
        better = left < tuning.FIT.worth * jnp.sum(theirs**2)  # false where anything is NaN
        found = jnp.where(better, found, 0.0)
        if kind == "scalar":
            return jnp.full((dims,), found[0]), jnp.zeros((dims,))
        gain, push = found[:-dims], found[-dims:]
        if kind == "dense":
            upper = jnp.zeros((dims, dims)).at[i, j].set(gain)
            gain = upper + upper.T - jnp.diag(jnp.diag(upper))
        return gain, push

    features, wanted = jax.vmap(centred)(features, potential, weights)
    return jax.vmap(kept)(jax.vmap(solved)(features, wanted)[::-1], features, wanted)


def _trace(matrix: Array) -> Array:
    """The trace of a matrix, or of a diagonal."""
    return jnp.trace(matrix) if matrix.ndim == 2 else jnp.sum(matrix)
