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
again, to several levels, by known noise: $y = y_0 + \tau\varepsilon$, in y = x/α. Two
things that are known of each sample have the same mean given y, the noise that an exact
score predicts there:

$$E[\varepsilon \mid y] = E[\hat\varepsilon_0 \mid y] = \hat\varepsilon(y), \qquad
\hat\varepsilon_0 = -\tau S_0(y_0), \quad \hat\varepsilon = -\tau S(y).$$

The first is Vincent's (2011, denoising score matching). The second says that the score
of a noised marginal is the mean of the cleaner scores that lead to it. Where noise is
wide ε is nearly $\hat\varepsilon$, and where it is narrow $\hat\varepsilon_0$ is. Their
difference is a control variate: of a Gaussian, whatever its samples are, nothing is
left beside it. So a few samples show a score at the wrong scale, one told the wrong
level, and levels whose scores are not of one distribution: $\hat\varepsilon_0$
regressed on $\hat\varepsilon$ beside $\varepsilon - \hat\varepsilon_0$ has the slope 1
and misses nothing in the mean. A score that is exact for another distribution passes.

A network that is told a wrong level has errors of both signs where modes separate,
which the slope hardly sees. They lie along the change of $\hat\varepsilon$ from a level
to the next at the same x. So the residual of the slope is regressed on the part of that
change that is orthogonal to $\hat\varepsilon$. Each sample, which many evaluations have
drawn, is noised twice, by ε and −ε: terms that are odd in ε cancel.

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
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Position
from composeprob.density.learned_scores import Misfit, OwnScore
from composeprob.samplers.step import Step

NOISES = 2
"""Noises of each sample and level: ε and −ε."""


class OwnLevels(NamedTuple):
    """Levels of the comparison of a score with its own samples.

    Attributes:
        path: levels that reverse diffusion visits, from level 0 on.
        noised: levels to which samples of level 0 are noised.
        compared: flags of those at which the prediction is compared with that of the
            next level.
    """

    path: tuple[int, ...]
    noised: tuple[int, ...]
    compared: tuple[bool, ...]

    @property
    def evaluations(self) -> int:
        """Number of evaluations of each sample, which is noised twice."""
        return len(self.path) + NOISES * (len(self.noised) + sum(self.compared))


def own_levels(density: AnnealedDensity, most: float = math.inf) -> OwnLevels:
    """All levels as the path, or as many as leave at most ``most`` evaluations of each
    sample; and levels to noise to, at log-SNR that are evenly spaced where signal and
    noise both count, with the noisiest.

    Moments at level 0 are asked on all levels only.
    """
    limits = tuning.FINDINGS
    log_snr = np.asarray(density.schedule.log_snr, float)
    least, greatest = limits.slope_log_snr
    wanted = np.linspace(
        max(log_snr[-1], least), min(log_snr[1], greatest), limits.slope_levels - 1
    )
    nearest = 1 + abs(log_snr[1:, None] - wanted).argmin(0)
    noised = np.unique([*nearest, len(log_snr) - 1])
    least, greatest = limits.told_log_snr
    compared = (log_snr[noised] > least) & (log_snr[noised] < greatest)
    compared &= noised < len(log_snr) - 1  # the noisiest level has none to follow
    of_noise = NOISES * (len(noised) + int(compared.sum()))
    number = min(len(log_snr), max(most - of_noise, limits.own_path))
    path = np.linspace(0, len(log_snr) - 1, int(number)).astype(int)
    return OwnLevels(
        tuple(path.tolist()), tuple(noised.tolist()), tuple(compared.tolist())
    )


def compared_experts(density: AnnealedDensity) -> list[int]:
    """Indices of the trained experts that are compared: those of a whole noised
    site."""
    compared = []
    for i, expert in enumerate(density.described.experts):
        size = math.prod(density.sites[expert.site].shape)
        if not expert.trained or expert.averaged != 1:
            continue
        whole = expert.dimension * expert.members == size
        if whole and expert.members in (1, expert.rows):
            compared.append(i)
    return compared


def own_scores(
    density: AnnealedDensity,
    positions: Position,
    key: Array,
    evaluations: float = math.inf,
) -> dict[str, OwnScore]:
    """Compare the score of every trained factor of a whole noised site with its own
    samples, one under the conditions of each position, ``{site: (n, …)}``.

    Of a plate of observations the first member is checked. Plates in which a mask
    leaves members out, and plates in plates, are left out. With fewer ``evaluations``
    than all levels take, over all samples, reverse diffusion leaves levels out.
    """
    scores = {}
    for i in compared_experts(density):
        expert = density.described.experts[i]
        # A denominator is compared where its samples are, not where the group's are.
        together = expert.members if expert.power > 0 else 1
        of_expert = jax.random.fold_in(key, i)
        n = len(positions[expert.site])
        levels = own_levels(density, evaluations // n)
        moments, slopes = own_moments(
            density, i, positions, of_expert, together, levels
        )
        score = OwnScore(0.0, 1.0, 0, expert.members)
        # Samples of fewer levels are not at level 0 what the score would make of them.
        if len(levels.path) == density.num_levels:
            score = _compared(moments, n, expert.members)
        log_snr = np.asarray(density.schedule.log_snr)[list(levels.noised)]
        scores[expert.name] = score._replace(misfit=misfit(slopes, n, log_snr))
    return scores


def misfit(
    slopes: Slope, n: int, log_snr: Float[np.ndarray, " levels"]
) -> Misfit | None:
    """The level at which the noise that is predicted differs most from the noise in n
    samples, if it differs by more than is tolerated there, beyond its errors."""
    limits = tuning.FINDINGS
    # Errors of networks grow as noise falls.
    tolerance = np.full(len(log_snr), limits.noise_error_of_both)
    tolerance[log_snr < limits.noise_alone] = limits.noise_error
    tolerance[log_snr > limits.signal_alone] = limits.noise_error_of_signal
    off = np.asarray(slopes.slope, float) - 1
    beyond = abs(off) - _allowed(slopes.slope_sd, slopes.slope_degrees, n)
    shift = abs(np.asarray(slopes.shift, float))
    shifted = shift - _allowed(slopes.shift_sd, slopes.shift_degrees, n)
    # Means are off by little where samples are rough.
    most_shift = limits.noise_error_of_both
    excess = np.maximum(beyond - tolerance, shifted.max(1) - most_shift)
    excess = np.nan_to_num(excess, nan=-np.inf)
    most = int(np.argmax(excess))
    log_snr_offset = 0.0
    if slopes.along is not None:
        along = abs(np.asarray(slopes.along.error, float)) - limits.told_error
        along -= _allowed(slopes.along.sd, slopes.along.degrees, n)
        along = np.nan_to_num(along, nan=-np.inf)
        if along.max() > excess[most]:
            excess = along
            most = int(np.argmax(along))
            log_snr_offset = float(slopes.along.log_snr_offset[most])
    if not excess[most] > 0:
        return None
    return Misfit(
        1 + float(off[most]),
        float(shift[most].max()),
        float(log_snr[most]),
        log_snr_offset,
    )


def _allowed(sd: Array, degrees: Array, n: int) -> np.ndarray:
    """Largest error of means over n samples by chance, by the quantile of Student's t
    that is four standard deviations of a Gaussian."""
    from scipy.special import ndtr, stdtrit

    freedom = np.maximum(np.asarray(degrees, float), 1)
    allowed: np.ndarray = stdtrit(freedom, ndtr(4.0))
    return allowed * np.asarray(sd, float) / math.sqrt(n)


class Moments(NamedTuple):
    """Moments over n samples of a level, one for each number and entry of the group;
    arrays have a leading axis of levels once all are visited."""

    shift: Array  # mean, whose absolute value counts
    shift_sd: Array
    off: Array  # mean of steepness − 1
    off_sd: Array


class Along(NamedTuple):
    """Component of the residual of the slope along the change of ε̂ between adjacent
    levels, beside ε̂; 0 at levels that are not compared."""

    error: Array  # in units of ε̂
    sd: Array
    degrees: Array  # of freedom of this deviation
    log_snr_offset: Array  # the same error as a log-SNR that is told too great


class Slope(NamedTuple):
    """Noise in samples against the noise ε̂ that a score predicts, which is E[ε | x] of
    an exact one; arrays have an axis of levels."""

    slope: Array  # of the regression of ε on ε̂
    slope_sd: Array
    slope_degrees: Array  # of freedom of this deviation
    shift: Array  # E[ε − ε̂], of each number
    shift_sd: Array
    shift_degrees: Array
    along: Along | None = None


class Clean(NamedTuple):
    """Samples of a factor at level 0, and its score there, in y = x/α."""

    y: Float[Array, "n numbers"]
    score: Float[Array, "n numbers"]


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
def own_moments(
    density: AnnealedDensity,
    which: int,
    positions: Position,
    key: Array,
    together: int,
    levels: OwnLevels,
) -> tuple[Moments, Slope]:
    """Moments over samples of one expert alone by its reverse diffusion, at the levels
    of its path, from level 0 on; and slopes over these samples, noised again."""
    draw_key, noise_key = jax.random.split(key)
    clean, moments = _draws(density, which, positions, draw_key, together, levels.path)

    def slope(at: tuple[Array, Array, Array]) -> Slope:
        key, level, compared = at
        half = jax.random.normal(key, clean.y.shape, clean.y.dtype)

        # One noise after the other: a run's own evaluations may have filled the memory.
        def noised_by(noise: Float[Array, "n numbers"]) -> Noised:
            return _noised(density, which, positions, clean, noise, level)

        both = jax.lax.map(noised_by, jnp.stack([half, -half]))

        def change() -> Float[Array, "noises n numbers"]:
            return jax.lax.map(
                lambda noised: _change(density, which, positions, noised, level), both
            )

        def nothing() -> Float[Array, "noises n numbers"]:
            return jnp.zeros_like(both.predicted)

        changes = jax.lax.cond(compared, change, nothing)
        noised, changes = jax.tree.map(
            lambda leaf: leaf.reshape(-1, leaf.shape[-1]), (both, changes)
        )
        return regressed(noised, changes)

    noises = _noises(levels, noise_key)
    return moments, jax.lax.map(slope, (*noises, jnp.asarray(levels.compared)))


@eqx.filter_jit
def noised_draws(
    density: AnnealedDensity,
    drawn: int,
    predicting: int,
    positions: Position,
    key: Array,
    levels: OwnLevels,
) -> Noised:
    """Samples of one expert alone, noised to levels, which lead, with the noise that
    another predicts there."""
    draw_key, noise_key = jax.random.split(key)
    clean, _ = _draws(density, drawn, positions, draw_key, 1, levels.path)

    def noised(at: tuple[Array, Array]) -> Noised:
        key, level = at
        noise = jax.random.normal(key, clean.y.shape, clean.y.dtype)
        return _noised(density, predicting, positions, clean, noise, level)

    return jax.lax.map(noised, _noises(levels, noise_key))


def _noises(levels: OwnLevels, key: Array) -> tuple[Array, Array]:
    """A key, and the level, of each noise that is added to samples."""
    noised = jnp.asarray(levels.noised)
    return jax.random.split(key, len(noised)), noised


def _scores(
    density: AnnealedDensity,
    which: int,
    positions: Position,
    x: Float[Array, "n numbers"],
    level: Array,
) -> Float[Array, "n numbers"]:
    """Scores of one expert at x, each under the conditions of a position."""
    expert = density.described.experts[which]
    site = density.sites[expert.site]

    def score(x: Array, position: Position) -> Array:
        at = {**position, expert.site: x.reshape(site.shape)}
        value = density.evaluator.expert_values(at, level)[which]
        return value.total if expert.members > 1 else value.score[0]

    return jax.vmap(score)(x, positions)


def _draws(
    density: AnnealedDensity,
    which: int,
    positions: Position,
    key: Array,
    together: int,
    path: tuple[int, ...],
) -> tuple[Clean, Moments]:
    """Samples of one expert by its reverse diffusion along levels from level 0 on, and
    their moments there.

    Steps are those of a Gaussian with the samples' slope, of which steps of any length
    keep the variance.
    """
    expert = density.described.experts[which]
    n = len(positions[expert.site])
    size = math.prod(density.sites[expert.site].shape)

    def descend(
        carry: tuple[Array, Array], at: tuple[Array, Array, Array]
    ) -> tuple[tuple[Array, Array], Moments]:
        x, _ = carry
        key, level, below = at
        start = density.schedule.at(level)
        end = density.schedule.at(below)
        s = _scores(density, which, positions, x, level)
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
        return (onwards.astype(x.dtype), s.astype(x.dtype)), moments

    first, rest = jax.random.split(key)
    dtype = jnp.result_type(positions[expert.site])
    noise = jax.random.normal(first, (n, size), dtype)
    x = density.schedule.at(density.num_levels - 1).sigma * noise
    downwards = jnp.asarray(path)[::-1]
    below = jnp.append(downwards[1:], 0)
    keys = jax.random.split(rest, len(path))
    # The last evaluation, at level 0, leaves its score.
    (x, s), moments = jax.lax.scan(
        descend, (x, jnp.zeros_like(x)), (keys, downwards, below)
    )
    end = density.schedule.at(0)
    clean = Clean(x / end.alpha, end.alpha * s)
    return clean, jax.tree.map(lambda leaf: leaf[::-1], moments)


class Noised(NamedTuple):
    """Samples of a factor that were noised to one level, in units of this noise."""

    y: Float[Array, "n numbers"]
    noise: Float[Array, "n numbers"]  # ε
    by_clean: Float[Array, "n numbers"]  # ε̂₀, by the score of level 0
    predicted: Float[Array, "n numbers"]  # ε̂


def _noised(
    density: AnnealedDensity,
    which: int,
    positions: Position,
    clean: Clean,
    noise: Float[Array, "n numbers"],
    level: Array,
) -> Noised:
    """Samples with the noise of a level, and the noise that an expert predicts."""
    noisy = density.schedule.at(level)
    spread = jnp.sqrt(noisy.variance - density.schedule.at(0).variance)
    y = clean.y + spread * noise
    scores = _scores(density, which, positions, noisy.alpha * y, level)
    predicted = -spread * noisy.alpha * scores
    return Noised(y / spread, noise, -spread * clean.score, predicted)


def _change(
    density: AnnealedDensity,
    which: int,
    positions: Position,
    noised: Noised,
    level: Array,
) -> Float[Array, "n numbers"]:
    """Change of ε̂ at the same x to the level that is noisier by one, for a log-SNR
    that is less by 1."""
    noisy = density.schedule.at(level)
    above = density.schedule.at(level + 1)
    spread = jnp.sqrt(noisy.variance - density.schedule.at(0).variance)
    x = noisy.alpha * spread * noised.y
    scores = _scores(density, which, positions, x, level + 1)
    # A network predicts −σ·score, whichever level it is told.
    predicted = -spread * noisy.alpha * scores * above.sigma / noisy.sigma
    return (predicted - noised.predicted) / (noisy.log_snr - above.log_snr)


def regressed(noised: Noised, change: Float[Array, "n numbers"] | None = None) -> Slope:
    """Regress ε̂₀ on ε̂, number by number beside ε − ε̂₀, whose mean given y is 0.

    Where modes have other widths their regressions differ: the same times y, whose
    mean is 0 too, tells places from one another. With the `_change` of ε̂, what is left
    is regressed on that, and each sample has been noised twice.
    """
    noises = 1 if change is None else NOISES

    def of_samples(values: Array) -> Array:
        return values.reshape(noises, -1, *values.shape[1:]).mean(0)

    # A score at walls is that of few samples, or of none: there ε stands alone.
    squares = of_samples(noised.by_clean**2)
    carried_by = jnp.sum(squares, 0) ** 2 / jnp.sum(squares**2, 0)
    supported = carried_by >= tuning.FINDINGS.own_carried
    by_clean = jnp.where(supported, noised.by_clean, noised.noise)
    control = noised.noise - by_clean
    first = _Control.about_its_mean(control)
    second = _Control.about_its_mean(
        first.left(control * (noised.y - noised.y.mean(0)))
    )

    missed = by_clean - noised.predicted
    missed = second.left(first.left(missed))
    predicted = second.left(first.left(noised.predicted))
    regressor = predicted - predicted.mean(0)
    size = jnp.sum(regressor**2, 1).mean()
    left = missed - missed.mean(0)
    off = jnp.sum(left * regressor, 1).mean() / size
    rest = left - off * regressor
    of_slope = of_samples(jnp.sum(rest * regressor, 1) / size)
    left = of_samples(left)
    slope = Slope(
        slope=1 + off,
        slope_sd=of_slope.std(),
        slope_degrees=_degrees(of_slope),
        shift=missed.mean(0),
        shift_sd=left.std(0),
        shift_degrees=_degrees(left),
    )
    if change is None:
        return slope

    change = second.left(first.left(change))
    change -= change.mean(0)
    change -= jnp.sum(change * regressor) / jnp.sum(regressor**2) * regressor
    # Where the change is along ε̂, rounding alone is left.
    squares_of_change = jnp.maximum(jnp.sum(change**2, 1).mean(), 1e-6 * size)
    later = jnp.sum(rest * change, 1).mean() / squares_of_change
    of_change = jnp.sum((rest - later * change) * change, 1) / squares_of_change
    of_change = of_samples(of_change)
    unit = jnp.sqrt(squares_of_change / size)
    along = Along(later * unit, of_change.std() * unit, _degrees(of_change), later)
    return slope._replace(along=along)


class _Control(NamedTuple):
    """A control variate of each number, and the same about its mean."""

    values: Float[Array, "n numbers"]
    centred: Float[Array, "n numbers"]

    @classmethod
    def about_its_mean(cls, values: Float[Array, "n numbers"]) -> _Control:
        return cls(values, values - values.mean(0))

    def left(self, values: Float[Array, "n numbers"]) -> Float[Array, "n numbers"]:
        """Return values without what follows the control, by least squares."""
        unit = jnp.maximum(jnp.sum(self.centred**2, 0), 1e-20)
        share = jnp.sum(self.centred * (values - values.mean(0)), 0) / unit
        return values - share * self.values


def _degrees(values: Array) -> Array:
    """Degrees of freedom of the variance of centred values, whose samples lead, by
    their kurtosis."""
    squares = jnp.sum(values**2, 0)
    kurtosis = len(values) * jnp.sum(values**4, 0) / jnp.maximum(squares**2, 1e-30)
    # Three coefficients and a mean were fitted.
    return 2 * (len(values) - 4) / jnp.maximum(kurtosis - 1, 2.0)


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
