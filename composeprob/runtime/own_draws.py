r"""Whether the scores of a trained factor are those of the distribution which its own
reverse diffusion draws.

A distribution with the score s has $E[s] = 0$ and $E[s\,(x - \bar x)^\top] = -I$
(Stein's identity). The error of a network that predicts noise grows like 1/σ in its
score. Reverse diffusion, whose steps are of length σ², hardly sees that, but a
Metropolis test leads chains where such a score leads. Of each number of the site are
asked, over draws of the factor alone at each level,

$$\text{shift}_i = \mathrm{sd}_i\,|E[s_i]|, \qquad \text{steepness}_i = -E[s_i\,(x_i - \bar x_i)],$$

0 and 1 where they agree: about by how many standard deviations chains are led away, and
how many times too narrow, in variance, they become.

Errors that the J members of a plate have in common add up in the group. With $v_j$ the
variances of a member's draws, $m_j$ their mean, m and P mean and covariance of all
members' draws together, data of J members tell the group's mean to $\sqrt{P/J}$, which
errors move by about the mean over members of $v_j\,E[s_j]$, and its covariance to
$\sqrt{(P_{pp}P_{qq} + P_{pq}^2)/J}$, which they move by that of the symmetric part of

$$2\,v_j\,E[s_j]\,(m_j - m)^\top - v_j\,\big(E[s_j\,(x_j - m_j)^\top] + I\big).$$

Both are asked in these units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Position
from composeprob.results.status import Code, Findings
from composeprob.samplers.step import Step


class OwnScore(NamedTuple):
    """What a factor's score at its own draws of level 0 comes to: of all numbers of its
    site, and of those of a plate's members together, the one where that is farthest
    from what it should be, less four standard errors; 0 and 1 where nothing is
    wrong."""

    shift: float  # of the number, or of an entry of the group's mean or covariance
    steepness: float
    right_from: (
        int | None
    )  # the cleanest level from which on both are about right; None where no level is
    members: int = 1  # of a plate, J

    @property
    def wrong(self) -> bool:
        """Whether chains are led where the factor's own draws are not; not where
        nothing is a number."""
        return max(2 * self.shift, abs(self.steepness - 1)) > tuning.FINDINGS.own_score


def own_scores(
    density: AnnealedDensity, positions: Position, key: Array
) -> dict[str, OwnScore]:
    """Asks every trained factor of a whole noised site for its score at its own draws,
    one under the conditions of each position, ``{site: (n, …)}``: of a plate of
    observations its first member, and nothing of a plate in which a mask leaves members
    out, or of one in another."""
    found = {}
    for i, expert in enumerate(density.described.experts):
        size = math.prod(density.sites[expert.site].shape)
        if (
            not expert.trained
            or expert.dimension * expert.members != size
            or expert.averaged != 1
        ):
            continue
        if expert.members not in (1, expert.rows):
            continue
        # What is divided by is asked where its draws are, not where those of the group
        # are.
        together = expert.members if expert.power > 0 else 1
        moments = _own_moments(
            density, i, positions, jax.random.fold_in(key, i), together
        )
        found[expert.name] = _compared(
            moments, len(positions[expert.site]), expert.members
        )
    return found


def other_laws(found: Mapping[str, OwnScore], log_snr: np.ndarray) -> Findings:
    """The finding that chains follow scores which belong to other distributions than
    the factors' own draws, of factors whose score a line integral relied on, with the
    levels' log-SNR, (K,)."""
    wrong = {name: own for name, own in found.items() if own.wrong}
    if not wrong:
        return []
    told = ", ".join(
        f"that of {name} is {own.steepness:.2g} times as steep as their spread says, and shifted by {own.shift:.2g} sd"
        + f" (the worst of {own.members} members, or in sd of their group's mean or covariance)"
        * (own.members > 1)
        for name, own in wrong.items()
    )
    known = [own.right_from for own in wrong.values() if own.right_from is not None]
    end = (
        f"at a log-SNR of {log_snr[max(known)]:.2g} and below"
        if len(known) == len(wrong)
        else "at no level"
    )
    text = (
        f"At level 0 scores are not those of the factors' own draws by reverse diffusion: {told}. Errors of a network "
        "grow as noise falls, and Metropolis tests lead chains where such a score leads, not to what was learned. They "
        f"are about right {end}: end the levels there (schedule=cp.Schedule.log_snr(60, max=…)), train with more "
        "weight on little noise, or use cp.Ancestral, for one factor alone."
    )
    return [(Code.NETWORK_DOUBTED, text)]


Moments = tuple[Array, Array, Array, Array]
"""Over n draws of a level, mean and standard deviation of each shift, whose mean's
absolute value counts, and of each steepness − 1."""


def _compared(found: Moments, n: int, members: int) -> OwnScore:
    """Of moments with an axis of levels, from level 0 on."""
    shifts, shifts_sd, offs, offs_sd = (np.asarray(leaf, float) for leaf in found)

    def less(errors: float) -> tuple[np.ndarray, np.ndarray]:
        """Shift and steepness − 1 at each level, of the number where it is farthest off
        by more than its errors."""
        shift = np.maximum(abs(shifts) - errors * shifts_sd / math.sqrt(n), 0.0).max(1)
        off = np.sign(offs) * np.maximum(
            abs(offs) - errors * offs_sd / math.sqrt(n), 0.0
        )
        return shift, np.take_along_axis(off, abs(off).argmax(1)[:, None], 1)[:, 0]

    shift, off = less(
        2.0 if members == 1 else 4.0
    )  # of many numbers the farthest is more errors off by chance
    right = np.maximum(2 * shift, abs(off)) <= tuning.FINDINGS.own_score_right
    shift, off = less(4.0)
    right_from = int(np.flatnonzero(~right).max(initial=-1)) + 1
    return OwnScore(
        float(shift[0]),
        1.0 + float(off[0]),
        right_from if right_from < len(off) else None,
        members,
    )


@eqx.filter_jit
def _own_moments(
    density: AnnealedDensity, which: int, positions: Position, key: Array, together: int
) -> Moments:
    """Moments over draws of one expert alone by its reverse diffusion, at every level,
    from level 0 on. Steps are those of a Gaussian with the draws' slope, of which steps
    of any length keep the variance."""
    expert = density.described.experts[which]
    site, n = density.sites[expert.site], len(positions[expert.site])
    size, last = math.prod(site.shape), density.num_levels - 1

    def scores(x: Array, level: Array) -> Array:
        def score(x: Array, position: Position) -> Array:
            at = {**position, expert.site: x.reshape(site.shape)}
            value = density.evaluator.expert_values(at, level)[which]
            return value.total if expert.members > 1 else value.score[0]

        return jax.vmap(score)(x, positions)

    def descend(x: Array, at: tuple[Array, Array]) -> tuple[Array, Moments]:
        key, level = at
        start, end, s = (
            density.schedule.at(level),
            density.schedule.at(jnp.maximum(level - 1, 0)),
            scores(x, level),
        )
        variance, off = x.var(0, ddof=1), -s * (x - x.mean(0)) * n / (n - 1) - 1
        shift = jnp.concatenate(
            [s * jnp.sqrt(variance), *_of_group(x, s * variance, variance, together)],
            axis=1,
        )
        found = shift.mean(0), shift.std(0), off.mean(0), off.std(0)
        slope = (
            -(off.mean(0) + 1) * start.alpha**2 / variance
        )  # E[∂S/∂y] of a Gaussian is E[S·(y − ȳ)]/Var(y)
        step = Step.fitted(
            slope, slope, start.variance, end.variance, jnp.ones(()), both=False
        )
        y = jax.vmap(step.draw)(
            x / start.alpha, start.alpha * s, jax.random.normal(key, x.shape)
        )
        return (end.alpha * y).astype(x.dtype), found

    first, rest = jax.random.split(key)
    x = density.schedule.at(last).sigma * jax.random.normal(
        first, (n, size), jnp.result_type(positions[expert.site])
    )
    levels = jnp.arange(last, -1, -1)
    _, found = jax.lax.scan(descend, x, (jax.random.split(rest, len(levels)), levels))
    return jax.tree.map(lambda leaf: leaf[::-1], found)


def _of_group(x: Array, moved: Array, variance: Array, members: int) -> list[Array]:
    """Shifts of the group's mean and covariance, in their standard deviations, (n, …)
    each, of draws x of all members, of v·s, and of v; nothing outside of a plate."""
    if members == 1:
        return []
    x, moved = (a.reshape(len(x), members, -1) for a in (x, moved))
    n, of_member, away = len(x), x.mean(0), x - x.mean((0, 1))
    pooled = jnp.einsum("njp,njq->pq", away, away) / (n * members)
    found = [jnp.sum(moved, 1) / jnp.sqrt(members * jnp.diag(pooled))]
    if x.shape[2] <= tuning.METRIC.most_numbers:
        led = jnp.einsum(
            "njp,njq->npq", moved, 2 * (of_member - x.mean((0, 1))) - (x - of_member)
        )
        led -= (1 - 3 / n) * jnp.diag(
            variance.reshape(members, -1).sum(0)
        )  # m_j is of the same n draws
        known = jnp.sqrt(
            members * (jnp.outer(jnp.diag(pooled), jnp.diag(pooled)) + pooled**2)
        )
        found.append(((led + led.mT) / (2 * known)).reshape(len(x), -1))
    return found
