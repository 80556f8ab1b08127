r"""The log-densities of factors that chains carry along their paths.

The exponent of a factor f can grow as noise falls only where log f is known, with its
constant and the heights of its modes; a network offers its score g. In y = x/α noising
takes y' at s' to y at s = s' + h by the kernel K = N(y; y', h·I), so that, by Bayes'
identity, for any two points, whatever led from one to the other,

    log f_{s'}(y') = log f_s(y) + log B(y' | y) − log K(y | y').

B is the factor's own reverse kernel. Its first two moments are known: the mean
y + h·g, and the covariance h·(I + h·H), with H = ∂g/∂y at (y, s). The Gaussian of these
moments stands for it (`rise`). H is fitted over the population, from scores that the
step has evaluated already (`fitted_slopes`).

Within a level log f changes by the line integral of g that the accept test made
(`LineIntegral.finish`), by the values of an energy, or else by the trapezoid rule
(`moves.carried`).
"""

from __future__ import annotations

import dataclasses
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from composeprob import tuning
from composeprob.density.evaluation import Evaluation, TrackedFactors
from composeprob.samplers.moves import Particles
from composeprob.samplers.resampling import normalised_weights
from composeprob.samplers.step import centred, thinned
from composeprob.schedule import Noise


class Slopes(eqx.Module):
    """Slopes of the scores of n factors, as symmetric matrices, for the chains of each
    cell: a half of the population, and in it a group of neighbours."""

    values: Float[Array, "n cells dims"]  # eigenvalues
    axes: Float[Array, "n cells dims dims"]  # eigenvectors
    # Groups lie between these cuts along a direction
    direction: Float[Array, " dims"]
    cuts: Float[Array, " groups_less_one"]

    def cell(self, y: Float[Array, " dims"], half: Int[Array, ""]) -> Int[Array, ""]:
        """Return the cell of a chain of this half."""
        group = jnp.sum(self.direction @ y > self.cuts)
        return half * (len(self.cuts) + 1) + group

    def along(
        self, vectors: Float[Array, "n dims"], cell: Int[Array, ""]
    ) -> tuple[Float[Array, "n dims"], Float[Array, "n dims"]]:
        """Return the eigenvalues of one cell's slopes, and the coordinates of a vector
        for each factor along their eigenvectors."""
        # Of all cells, and not a copy of a matrix for every chain.
        every = jnp.einsum("ncij,ni->ncj", self.axes, vectors)
        return self.values[:, cell], every[:, cell]


def scores_of(tracked: TrackedFactors, dims: int) -> Float[Array, "n dims"]:
    """Return the scores of one chain's tracked factors, over noised entries."""
    return jnp.stack([score[:dims] for score in tracked.scores])


def innovations(
    start: Particles,
    moved: Float[Array, " size"],
    evaluation: Evaluation,
    noise: Noise,
    end: Noise,
    falls: Array,
) -> Float[Array, "rows dims"]:
    """Return what a step of one chain tells of the slope of each factor's score: y',
    then for each factor the step without its own drift, r = y' − y − h·g, then the
    changes of the scores, 1 + 2n rows in all.

    At the first level, where there was no step, they are y and the scores there.
    """
    now = evaluation.tracked
    before = start.evaluation.tracked
    assert now is not None
    assert before is not None
    dims = now.scores[0].size
    y = moved[None, :dims]
    scores = scores_of(now, dims)
    former = scores_of(before, dims)
    away = y - start.position[:dims] - (noise.variance - end.variance) * former
    away = jnp.where(falls, away, y)
    changes = jnp.where(falls, scores - former, scores)
    return jnp.concatenate([y, away, changes])


def fitted_slopes(table: Float[Array, "chains rows dims"], end: Noise) -> Slopes:
    """Fit the slope of each factor's score at the end of a step, by least squares over
    the innovations of all chains.

    The change of a score from (y, s) to (y', s') depends on r by the slope at s',
    whatever the drift was. A chain's own r would take from the log-density what belongs
    there, so each half of the chains uses the other's fit. Modes of other widths have
    other slopes: groups along the longest axis of the population are fitted one by one.
    As many pseudo-chains as there are dimensions draw each fit to that of the whole
    half, and this to a multiple of I.
    """
    dims = table.shape[-1]
    table = thinned(table, dims)
    usable = jnp.all(jnp.isfinite(table), axis=(1, 2))
    table = jnp.where(usable[:, None, None], table, 0.0)
    points = table[:, 0]
    moved, changed = jnp.split(table[:, 1:], 2, axis=1)

    weights = normalised_weights(jnp.where(usable, 0.0, -jnp.inf))
    spread = centred(points, weights)
    _, axes = jnp.linalg.eigh(spread.T @ spread)
    direction = axes[:, -1]
    along = points @ direction
    groups = tuning.TRACKING.groups
    cuts = jnp.quantile(along, jnp.arange(1, groups) / groups)
    group = jnp.sum(along[:, None] > cuts, axis=1)

    # The chains that are fitted for each half, and for each cell
    half = jnp.arange(len(table)) >= len(table) // 2
    others = usable & jnp.stack([half, ~half])
    cells = others[:, None] & (group == jnp.arange(groups)[:, None])

    def fit(chosen: Array, prior: Array | None) -> Float[Array, "n dims dims"]:
        """Slopes over the chosen chains, drawn to those of the prior."""
        count = jnp.maximum(jnp.sum(chosen), 1)
        own = moved * chosen[:, None, None]
        products = jnp.einsum("cni,cnj->nij", own, moved)
        crossed = jnp.einsum("cni,cnj->nij", own, changed)
        total = jnp.trace(products, axis1=1, axis2=2)[:, None, None]
        each = total / count + 1e-12  # the mean ‖r‖²
        identity = jnp.eye(dims)
        if prior is None:
            # One pseudo-chain has the slope of data of variance 1.
            trace = jnp.trace(crossed, axis1=1, axis2=2)[:, None, None]
            slope = (trace - each / (1 + end.variance)) / (total + each)
            prior = slope * identity
        slopes = jnp.linalg.solve(products + each * identity, crossed + each * prior)
        return 0.5 * (slopes + slopes.mT)

    of_halves = jax.vmap(partial(fit, prior=None))(others)
    of_cells = jax.vmap(jax.vmap(fit, (0, None)))(cells, of_halves)
    by_factor = jnp.moveaxis(of_cells.reshape(-1, *of_cells.shape[2:]), 0, 1)
    values, axes = jnp.linalg.eigh(by_factor)
    return Slopes(values, axes, direction, cuts)


def first_values(
    evaluation: Evaluation, slopes: Slopes, cell: Int[Array, ""], noise: Noise
) -> Float[Array, " n"]:
    """Return log f of one chain at the first level, where f is a Gaussian: that with
    the fitted slope A of the score g,

        log f = −½·⟨g, −A⁻¹·g⟩ + ½·log |−A/2π|.
    """
    tracked = evaluation.tracked
    assert tracked is not None
    dims = slopes.values.shape[-1]
    values, along = slopes.along(scores_of(tracked, dims), cell)
    s = noise.variance
    # Noise alone has −1/s; data make f wider, but not much where they are hidden.
    precision = jnp.clip(-values, tuning.TRACKING.least_precision / s, 1 / s)
    exponent = -0.5 * jnp.sum(along**2 / precision, axis=-1)
    log_scale = 0.5 * jnp.sum(jnp.log(precision / (2 * jnp.pi)), axis=-1)
    return exponent + log_scale - dims * jnp.log(noise.alpha)


def rise(
    away: Float[Array, "n dims"],
    scores: Float[Array, "n dims"],
    slopes: Slopes,
    cell: Int[Array, ""],
    noise: Noise,
    end: Noise,
) -> Float[Array, " n"]:
    """Return log B(y' | y) − log K(y | y') of each factor, for one chain's step.

    With r = y' − y − h·g, the slope H at y, and A that at y', of a Gaussian
    (I + h·H)⁻¹ = I − h·A, it is

        ⟨g, r⟩ + ½·h·‖g‖² + ½·⟨r, A·r⟩ + ½·log |I − h·A|,

    in which no large terms cancel. The last term is −½·h·tr A and more: an error of A
    changes log f by a martingale, of mean 0.
    """
    h = noise.variance - end.variance
    values, along = slopes.along(away, cell)
    # A noised marginal has H ≥ −1/s; where it turns upwards B stays within bounds.
    values = jnp.clip(values, -1 / end.variance, tuning.TRACKING.most_upwards / h)
    by_drift = jnp.sum(scores * away, axis=-1) + 0.5 * h * jnp.sum(scores**2, axis=-1)
    by_slope = 0.5 * jnp.sum(values * along**2 + jnp.log1p(-h * values), axis=-1)
    dims = scores.shape[-1]
    # log f of x = α·y, whose volume grows.
    return by_drift + by_slope + dims * jnp.log(noise.alpha / end.alpha)


def stepped(
    start: Particles,
    evaluation: Evaluation,
    rows: Float[Array, "rows dims"],
    slopes: Slopes,
    half: Int[Array, ""],
    noise: Noise,
    end: Noise,
    falls: Array,
) -> Evaluation:
    """Return the evaluation where a step of one chain ended, with log f of its tracked
    factors; at the first level with their first values."""
    before = start.evaluation.tracked
    assert before is not None
    assert evaluation.tracked is not None
    y, *of_factors = rows
    cell = slopes.cell(y, half)

    def carried_on() -> Float[Array, " n"]:
        away = jnp.stack(of_factors[: len(before.values)])
        scores = scores_of(before, len(y))
        return before.values + rise(away, scores, slopes, cell, noise, end)

    def at_first() -> Float[Array, " n"]:
        return first_values(evaluation, slopes, cell, end)

    values = jax.lax.cond(falls, carried_on, at_first)
    tracked = evaluation.tracked.with_values(values)
    return dataclasses.replace(evaluation, tracked=tracked)
