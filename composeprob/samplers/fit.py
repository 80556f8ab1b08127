"""What all chains of a level say together: an affine fit of their score, and a drift that evens out their weights.

Everything here is in y = x/α. There the reverse process of every schedule is dy = S dτ + dW, with S the score in y and
τ the variance that is taken away, from s = σ²/α² of one level to that of the next.
"""

from __future__ import annotations

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Evaluation, Position
from composeprob.samplers.cloud import shares

FULL = 256
"""Dimensions up to which a slope is a matrix; beyond, one number for each entry."""
PER_DIMENSION = 8
"""Chains for each dimension that a matrix takes."""
PER_FEATURE = 2
"""Chains for each coefficient that a control takes, in either half."""
FEWEST = 64
"""Chains below which nothing is fitted."""
MOST = 2**26
"""Numbers N·d above which nothing is fitted, as every device would have to hold all of them."""
ENOUGH = 1024
"""Chains above which fits take evenly spaced ones, if these are twice as many as a matrix of controls asks for."""
WORTH = 0.9
"""The share of the potential's variance that a control may leave at most."""
RIDGE = 1e-6
"""What least squares are damped by, of features of unit size."""


class Fit(eqx.Module):
    """A level's affine fits over the cloud of chains, in y = x/α.

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

    def along(self, gain: Array) -> Array:
        """The slope of the score with the controls, the fixed one of this gain, (d,), and the mean of those fitted."""
        whole = self.slope + jnp.mean(self.gain, axis=0)
        return whole + (jnp.diag(gain) if whole.ndim == 2 else gain)

    def control(self, y: Array, half: Array) -> tuple[Array, Array]:
        """u at y for a chain of this half, (d,), and ∇·u, a scalar."""
        # Of both halves, as one product of all chains with each matrix, and not a copy of a matrix for every chain.
        both = jax.vmap(times, (0, None))(self.gain, y - self.centre) + self.push
        return both[half], jax.vmap(trace)(self.gain)[half]


def noised(density: AnnealedDensity) -> list[str]:
    """The sites that the reverse process moves, in the order in which they are flattened."""
    return sorted(name for name, site in density.sites.items() if site.kind == "noised")


def flat(position: Position, density: AnnealedDensity) -> Array:
    """The noised sites of one chain as one vector, (d,)."""
    return jnp.concatenate([position[name].reshape(-1) for name in noised(density)])


def unflat(vector: Array, like: Position, density: AnnealedDensity) -> Position:
    """The position with its noised sites taken from a vector."""
    position, begin = dict(like), 0
    for name in noised(density):
        leaf = like[name]
        position[name] = vector[begin : begin + leaf.size].reshape(leaf.shape)
        begin += leaf.size
    return position


def dimensions(density: AnnealedDensity) -> int:
    """d, the number of noised entries."""
    return sum(math.prod(density.sites[name].shape) for name in noised(density))


def power(density: AnnealedDensity) -> Array:
    """P, the total power of the factors at each entry, (d,)."""
    shapes = {name: density.sites[name].shape for name in noised(density)}
    return jnp.concatenate([jnp.broadcast_to(density.top.power[n], shape).reshape(-1) for n, shape in shapes.items()])


def row(evaluation: Evaluation, rate: Array, position: Position, density: AnnealedDensity, level: Array) -> Array:
    """One chain's y, S and potential per unit of τ, (2d + 1,); ``rate`` stands in the place of its own."""
    noise, parts = density.schedule.at(level), evaluation.parts
    drift_ratio = jnp.asarray(density.schedule.drift_ratio)[level]
    potential = noise.alpha**2 * (rate + drift_ratio * parts.excess)
    y, score = flat(position, density) / noise.alpha, noise.alpha * flat(parts.drift, density)
    return jnp.concatenate([y, score, potential[None]])


def fit(rows: Array, log_weights: Array, base: Array, control: bool) -> Fit:
    r"""The affine fits over a weighted cloud of N chains, or over some of them where that tells as much.

    The slope is that of least squares, B = Cov(S, y)·Cov(y)⁻¹, which for a Gaussian is the Hessian of log F wherever
    chains are. Along each eigenvector of B it counts as much as it explains of the variance of S there, R², and −P/s,
    the slope of P factors whose data are points, counts for the rest: narrow modes far apart have a flat B, and a step
    that took S for flat would throw chains out of them.

    The control (A, a), A symmetric, makes the potential r + ∇·u + ⟨u, S⟩ as nearly constant as least squares can; for
    Gaussians that is constant. Each half of the chains takes what was fitted over the other half, which knows nothing
    of it: a fit to a chain's own potential would take from its weight what belongs there. One that hardly evens out the
    potentials of the half that takes it is left out.

    Args:
        rows: (N, 2d + 1), each a `row`.
        log_weights: of the chains, (N,).
        base: P/s, (d,).
        control: whether to fit one; it is 0 if not.
    """
    dims = base.size
    rows, log_weights = (_some(of, dims) for of in (rows, log_weights))
    count = rows.shape[0]
    usable = jnp.all(jnp.isfinite(rows), axis=1) & jnp.isfinite(log_weights)
    rows = jnp.where(usable[:, None], rows, 0.0)
    weights = shares(jnp.where(usable, log_weights, -jnp.inf))
    y, score, potential = rows[:, :dims], rows[:, dims : 2 * dims], rows[:, -1]
    centre = weights @ y
    away, full = y - centre, dims <= FULL and count >= PER_DIMENSION * dims
    slope, basis = _slope(away, score, weights, base, full)
    shape = (2, dims, dims) if full else (2, dims)
    gain, push = jnp.zeros(shape), jnp.zeros((2, dims))
    if control:
        kind = _kind(count // 2, dims, full)
        turned = (away, score) if basis is None else (away @ basis, score @ basis)
        gain, push = _controls(*(_halves(part) for part in (*turned, potential, weights)), kind=kind)
        if basis is not None:
            gain = gain if kind == "dense" else jax.vmap(jnp.diag)(gain)
            gain, push = basis @ gain @ basis.T, push @ basis.T
    return Fit(centre, slope, gain, push)


def _some(of: Array, dims: int) -> Array:
    """Evenly spaced ones of either half of the chains, of the first with one fewer or as many, to make fits over."""
    count = of.shape[0]
    step = -(-count // max(ENOUGH, 2 * PER_FEATURE * dims * (dims + 3)))
    return jnp.concatenate([of[: count // 2 : step], of[count // 2 :: step]])


def unfitted(base: Array) -> Fit:
    """What takes the place of a fit where chains are too few: the slope −P/s, and no control."""
    zero = jnp.zeros((2, base.size))
    return Fit(jnp.zeros_like(base), -base, zero, zero)


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
    if full and count >= PER_FEATURE * dims * (dims + 3) / 2:
        return "dense"
    return "diagonal" if count >= PER_FEATURE * 2 * dims else "scalar"


def _halves(table: Array) -> Array:
    """The first ⌊N/2⌋ chains and the others, (2, ⌈N/2⌉, …); zeros fill up what is missing of the first."""
    first, second = jnp.split(table, [table.shape[0] // 2])
    return jnp.stack([jnp.pad(first, [(0, table.shape[0] % 2), *[(0, 0)] * (table.ndim - 1)]), second])


def _controls(away: Array, score: Array, potential: Array, weights: Array, *, kind: str) -> tuple[Array, Array]:
    """A and a for each half of the chains, by least squares over the other; A is (d, d) if ``dense``, else a diagonal.

    Both are 0 where they leave more than `WORTH` of the potential's variance over the half that takes them.

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

    def solved(seen: Array, wanted: Array) -> Array:
        unit = jnp.sqrt(jnp.maximum(jnp.sum(seen**2, axis=0), 1e-30))
        seen = seen / unit
        factor = jax.scipy.linalg.cho_factor(seen.T @ seen + RIDGE * jnp.eye(len(unit)))
        found = jnp.zeros_like(unit)
        for _ in range(3):  # normal equations square the condition number; each round wins back digits
            found = found - jax.scipy.linalg.cho_solve(factor, seen.T @ (wanted + seen @ found))
        return found / unit

    def kept(found: Array, others: Array, theirs: Array) -> tuple[Array, Array]:
        better = jnp.sum((theirs + others @ found) ** 2) < WORTH * jnp.sum(theirs**2)  # false where anything is NaN
        found = jnp.where(better, found, 0.0)
        if kind == "scalar":
            return jnp.full((dims,), found[0]), jnp.zeros((dims,))
        gain, push = found[:-dims], found[-dims:]
        if kind == "dense":
            upper = jnp.zeros((dims, dims)).at[i, j].set(gain)
            gain = upper + upper.T - jnp.diag(jnp.diag(upper))
        return gain, push

    seen, wanted = jax.vmap(centred)(features, potential, weights)
    return jax.vmap(kept)(jax.vmap(solved)(seen, wanted)[::-1], seen, wanted)


def times(matrix: Array, vector: Array) -> Array:
    """A matrix, or a diagonal, times a vector."""
    return matrix @ vector if matrix.ndim == 2 else matrix * vector


def trace(matrix: Array) -> Array:
    """The trace of a matrix, or of a diagonal."""
    return jnp.trace(matrix) if matrix.ndim == 2 else jnp.sum(matrix)
