r"""A check of trained scores against the samples of their factors, which the factors'
own reverse diffusion draws.

A distribution with the score s has $E[s] = 0$ and $E[s\,(x - \bar x)^\top] = -I$
(Stein's identity). The error of a network that predicts noise grows like 1/σ in its
score. Reverse diffusion, whose steps are of length σ², hardly sees that, but a
Metropolis test leads chains where such a score leads. For each number of the site, over
samples of the factor alone at each level,

$$\text{shift}_i = \mathrm{sd}_i\,|E[s_i]|, \qquad
\text{steepness}_i = -E[s_i\,(x_i - \bar x_i)]$$

are 0 and 1 where score and samples agree: about by how many standard deviations chains
are led away, and how many times too narrow, in variance, they become.

Samples that such a score draws by itself follow it to a degree. So they are noised
again, to several levels, by known noise ε. An exact score predicts $\hat\varepsilon =
E[\varepsilon \mid x]$, whatever the samples' distribution at level 0: ε regressed on
$\hat\varepsilon$ has the slope 1, and $E[\varepsilon - \hat\varepsilon] = 0$ (Vincent
2011, denoising score matching). A score at the wrong scale, or told the wrong level,
fails where noise hides the samples' own errors. A score that is exact for another
distribution does not.

Errors that the J members of a plate have in common add up in the group. With $v_j$ the
variances of a member's samples, $m_j$ their mean, m and P mean and covariance of all
members' samples together, data of J members tell the group's mean to $\sqrt{P/J}$,
which errors move by about the mean over members of $v_j\,E[s_j]$, and its covariance to
$\sqrt{(P_{pp}P_{qq} + P_{pq}^2)/J}$, which they move by that of the symmetric part of

$$2\,v_j\,E[s_j]\,(m_j - m)^\top - v_j\,\big(E[s_j\,(x_j - m_j)^\top] + I\big).$$

Both are measured in these units.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Position
from composeprob.density.learned_scores import Misfit, OwnScore
from composeprob.samplers.step import Step


def own_scores(
    density: AnnealedDensity, positions: Position, key: Array
) -> dict[str, OwnScore]:
    """Compare the score of every trained factor of a whole noised site with its own
    samples, one under the conditions of each position, ``{site: (n, …)}``.

    Of a plate of observations the first member is checked. Plates in which a mask
    leaves members out, and plates in plates, are left out.
    """
    scores = {}
    for i, expert in enumerate(density.described.experts):
        size = math.prod(density.sites[expert.site].shape)
        if not expert.trained or expert.averaged != 1:
            continue
        if expert.dimension * expert.members != size:
            continue
        if expert.members not in (1, expert.rows):
            continue
        # A denominator is compared where its samples are, not where the group's are.
        together = expert.members if expert.power > 0 else 1
        of_expert = jax.random.fold_in(key, i)
        moments, slopes = _own_moments(density, i, positions, of_expert, together)
        n = len(positions[expert.site])
        score = _compared(moments, n, expert.members)
        log_snr = np.asarray(density.schedule.log_snr)[slope_levels(density.num_levels)]
        scores[expert.name] = score._replace(misfit=_misfit(slopes, n, log_snr))
    return scores


def _misfit(
    slopes: Slope, n: int, log_snr: Float[np.ndarray, " levels"]
) -> Misfit | None:
    """The level at which the noise that is predicted differs most from the noise in n
    samples, if it differs by more than is tolerated there, beyond four errors."""
    limits = tuning.FINDINGS
    # Where there is more signal than noise, errors of the samples themselves count.
    tolerance = np.where(log_snr < 0, limits.noise_error, limits.noise_error_of_signal)
    off = np.asarray(slopes.slope, float) - 1
    beyond = abs(off) - 4 * np.asarray(slopes.slope_sd, float) / math.sqrt(n)
    shift = abs(np.asarray(slopes.shift, float))
    shifted = (shift - 4 * np.asarray(slopes.shift_sd, float) / math.sqrt(n)).max(1)
    excess = np.maximum(beyond, shifted) - tolerance
    most = int(np.argmax(np.nan_to_num(excess, nan=-np.inf)))
    if not excess[most] > 0:
        return None
    return Misfit(1 + float(off[most]), float(shift[most].max()), float(log_snr[most]))


class Moments(NamedTuple):
    """Moments over n samples of a level, one for each number and entry of the group;
    arrays have a leading axis of levels once all are visited."""

    shift: Array  # mean, whose absolute value counts
    shift_sd: Array
    off: Array  # mean of steepness − 1
    off_sd: Array


class Slope(NamedTuple):
    """Noise in samples against the noise ε̂ that a score predicts, which is E[ε | x] of
    an exact one; arrays have an axis of levels."""

    slope: Array  # of the regression of ε on ε̂
    slope_sd: Array
    shift: Array  # E[ε − ε̂], of each number
    shift_sd: Array


def _compared(moments: Moments, n: int, members: int) -> OwnScore:
    """The disagreement at level 0, judged by moments over n samples at all levels."""
    # Of many numbers the farthest one is more errors off by chance.
    errors = 2.0 if members == 1 else 4.0
    shift, off = _beyond_errors(moments, n, errors)
    right = np.maximum(2 * shift, abs(off)) <= tuning.FINDINGS.own_score_right
    right_from: int | None = int(np.flatnonzero(~right).max(initial=-1)) + 1
    if right_from == len(off):
        right_from = None
    shift, off = _beyond_errors(moments, n, 4.0)
    return OwnScore(float(shift[0]), 1.0 + float(off[0]), right_from, members)


def _beyond_errors(
    moments: Moments, n: int, errors: float
) -> tuple[Float[np.ndarray, " levels"], Float[np.ndarray, " levels"]]:
    """Shift and steepness − 1 at each level, each for the number in which it exceeds
    ``errors`` standard errors by most."""
    shifts, shifts_sd, offs, offs_sd = (np.asarray(leaf, float) for leaf in moments)
    shift = np.maximum(abs(shifts) - errors * shifts_sd / math.sqrt(n), 0.0).max(1)
    excess = np.maximum(abs(offs) - errors * offs_sd / math.sqrt(n), 0.0)
    off = np.sign(offs) * excess
    most = abs(off).argmax(1)[:, None]
    return shift, np.take_along_axis(off, most, 1)[:, 0]


@eqx.filter_jit
def _own_moments(
    density: AnnealedDensity, which: int, positions: Position, key: Array, together: int
) -> tuple[Moments, Slope]:
    """Moments over samples of one expert alone by its reverse diffusion, at every
    level, from level 0 on; and slopes over these samples, noised again.

    Steps are those of a Gaussian with the samples' slope, of which steps of any length
    keep the variance.
    """
    expert = density.described.experts[which]
    site = density.sites[expert.site]
    n = len(positions[expert.site])
    size = math.prod(site.shape)
    last = density.num_levels - 1

    def scores(x: Array, level: Array) -> Array:
        def score(x: Array, position: Position) -> Array:
            at = {**position, expert.site: x.reshape(site.shape)}
            value = density.evaluator.expert_values(at, level)[which]
            return value.total if expert.members > 1 else value.score[0]

        return jax.vmap(score)(x, positions)

    def descend(x: Array, at: tuple[Array, Array]) -> tuple[Array, Moments]:
        key, level = at
        start = density.schedule.at(level)
        end = density.schedule.at(jnp.maximum(level - 1, 0))
        s = scores(x, level)
        variance = x.var(0, ddof=1)
        off = -s * (x - x.mean(0)) * n / (n - 1) - 1
        of_group = _of_group(x, s * variance, variance, together)
        shift = jnp.concatenate([s * jnp.sqrt(variance), *of_group], axis=1)
        moments = Moments(shift.mean(0), shift.std(0), off.mean(0), off.std(0))
        # E[∂S/∂y] of a Gaussian is E[S·(y − ȳ)]/Var(y).
        slope = -(off.mean(0) + 1) * start.alpha**2 / variance
        step = Step.fitted(
            slope, slope, start.variance, end.variance, jnp.ones(()), both=False
        )
        noise = jax.random.normal(key, x.shape)
        y = jax.vmap(step.draw)(x / start.alpha, start.alpha * s, noise)
        onwards = jnp.where(level > 0, end.alpha * y, x)
        return onwards.astype(x.dtype), moments

    def slope(x: Array, at: tuple[Array, Array]) -> Slope:
        key, level = at
        clean = density.schedule.at(0)
        noisy = density.schedule.at(level)
        shrinks = noisy.alpha / clean.alpha
        added = jnp.sqrt(noisy.sigma**2 - (shrinks * clean.sigma) ** 2)
        return _slope_at(partial(scores, level=level), shrinks * x, added, key)

    first, rest = jax.random.split(key)
    dtype = jnp.result_type(positions[expert.site])
    noise = jax.random.normal(first, (n, size), dtype)
    x = density.schedule.at(last).sigma * noise
    levels = jnp.arange(last, -1, -1)
    keys = jax.random.split(rest, len(levels))
    x, moments = jax.lax.scan(descend, x, (keys, levels))
    moments = jax.tree.map(lambda leaf: leaf[::-1], moments)
    noised = slope_levels(density.num_levels)
    keys = jax.random.split(jax.random.fold_in(rest, 1), len(noised))
    slopes = jax.lax.map(partial(slope, x), (keys, jnp.asarray(noised)))
    return moments, slopes


def slope_levels(num_levels: int) -> Int[np.ndarray, " few"]:
    """Levels above level 0 to which samples of a factor are noised."""
    most = tuning.FINDINGS.slope_levels
    return np.unique(np.linspace(1, num_levels - 1, most).astype(int))


def _slope_at(
    scores: Callable[[Array], Array],
    x: Float[Array, "n numbers"],
    added: Float[Array, ""],
    key: Array,
) -> Slope:
    """Regress noise of standard deviation ``added`` to x on the noise that a score
    predicts there."""
    noise = jax.random.normal(key, x.shape, x.dtype)
    predicted = -added * scores(x + added * noise)
    with_noise = jnp.sum(noise * predicted, 1)
    with_itself = jnp.sum(predicted**2, 1)
    ratio = with_noise.mean() / with_itself.mean()
    residual = (with_noise - ratio * with_itself) / with_itself.mean()
    missed = noise - predicted
    return Slope(ratio, residual.std(), missed.mean(0), missed.std(0))


def _of_group(
    x: Float[Array, "n numbers"],
    moved: Float[Array, "n numbers"],
    variance: Float[Array, " numbers"],
    members: int,
) -> list[Float[Array, "n entries"]]:
    """Shifts of the group's mean and covariance, in their standard deviations, of
    samples x of all members, of v·s, and of v; nothing outside of a plate."""
    if members == 1:
        return []
    n = len(x)
    x = x.reshape(n, members, -1)
    moved = moved.reshape(n, members, -1)
    of_group = x.mean((0, 1))
    of_member = x.mean(0)
    away = x - of_group
    pooled = jnp.einsum("njp,njq->pq", away, away) / (n * members)
    variances = jnp.diag(pooled)
    shifts = [jnp.sum(moved, 1) / jnp.sqrt(members * variances)]
    if x.shape[2] <= tuning.METRIC.most_numbers:
        # The second formula of the module, of each sample; m_j is a mean of the same n
        # samples, which 1 − 3/n makes up for.
        outer = 2 * (of_member - of_group) - (x - of_member)
        led = jnp.einsum("njp,njq->npq", moved, outer)
        led -= (1 - 3 / n) * jnp.diag(variance.reshape(members, -1).sum(0))
        units = jnp.sqrt(members * (jnp.outer(variances, variances) + pooled**2))
        shifts.append(((led + led.mT) / (2 * units)).reshape(n, -1))
    return shifts
