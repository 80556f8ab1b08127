r"""Whether the factors of a program agree where its samples are: `no_overlap` and
`out_of_training`.

The score of a factor's noised marginal is $-E[\varepsilon \mid x]/\sigma$, with ε the
noise in x. Over the factor's own noised draws $\sigma^2\|s(x)\|^2 \le
E[\|\varepsilon\|^2 \mid x]$, and an event of x that has the probability p holds at most
as much of $\|\varepsilon\|^2 \sim \chi^2_d$ as its largest p do. So
$\sigma^2\|s(x)\|^2$ exceeds their mean,

$$t = d\,P(\chi^2_{d+2} > q)/p, \qquad P(\chi^2_d > q) = p,$$

with a probability of p at most, whatever the factor. No rule for every factor can do
with less than q: a single point has $\sigma^2\|s\|^2 \sim \chi^2_d$. Samples are noised
to a few levels, and each factor evaluated there: a sample that is far beyond t is where
the factor's own noised draws never are. No draws of the factor are needed.

* `no_overlap`: that holds for half of the samples, under a factor that is multiplied with others; or a negation has
  nothing left to take away from: the samples lie where what it divides by is as flat as
  the inside of a box.
* `out_of_training`: that holds for a tenth of the samples under a factor that was trained. A closed form is right
  everywhere, and is not examined.

A trained factor that divides pushes samples to where it was never trained, and what its
network returns there may be small: the bound sees nothing. Its draws are compared with
the samples instead. A tenth of these that are farther from all of its draws than any
draw is from the others, by a half, is `out_of_training` too. Weights and steps take the
divisor for a noised marginal, which it is nowhere but there, so the errors of such a
run are withheld.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy import special

from composeprob import tuning
from composeprob.density.described import Expert
from composeprob.density.evaluation import Position
from composeprob.pytree import normal_like

if TYPE_CHECKING:
    from composeprob.density.annealed import AnnealedDensity


class FactorFinding(NamedTuple):
    """What is wrong with which factor, at which level, for which share of samples, and
    what to try; and whether the program divides by that factor."""

    code: str
    message: str
    factor: str
    level: int
    share: float
    divides: bool = False


def check(
    density: AnnealedDensity, key: Array, num_chains: int
) -> tuple[FactorFinding, ...]:
    """See `AnnealedDensity.check`."""
    if not in_question(density):
        return ()
    first, second = jax.random.split(key)
    return agreement(
        density, _pilot(density, jax.random.split(first, num_chains)), second
    )


def check_evaluations(
    density: AnnealedDensity, num_chains: int = tuning.PILOT.chains
) -> int:
    """How often `check` evaluates the factors, over all of its chains."""
    pilot = tuning.PILOT.steps * len(_spaced_levels(density, tuning.PILOT.levels))
    return num_chains * (
        pilot + len(_spaced_levels(density, tuning.OVERLAP.levels, False))
    )


def _spaced_levels(
    density: AnnealedDensity, number: int, noisiest: bool = True
) -> np.ndarray:
    """Levels that are evenly spaced in their index, from level 0 on, with the noisiest
    or without it."""
    levels = np.linspace(0, density.num_levels - 1, number, endpoint=noisiest)
    return np.unique(levels.round().astype(int))


def in_question(density: AnnealedDensity) -> bool:
    """Whether there is something to agree on: more than one factor of power 1 that
    nothing else depends on."""
    experts = density.described.experts
    lonely = len({expert.site for expert in experts}) == len(experts) and all(
        expert.power == 1 and expert.rows == 1 for expert in experts
    )
    return (
        density.num_levels > 1
        and bool(experts)
        and not (lonely and not density.graph.observations)
    )


def agreement(
    density: AnnealedDensity,
    positions: Position,
    key: Array,
    num_levels: int = tuning.OVERLAP.levels,
) -> tuple[FactorFinding, ...]:
    """Finds where the factors disagree at samples of level 0, ``{site: (N, …)}``,
    noised to so many levels, each of which costs an evaluation of every sample."""
    experts = density.described.experts
    levels = _spaced_levels(density, num_levels, noisiest=False)
    statistics = jax.tree.map(
        np.asarray, _expert_statistics(density, positions, jnp.asarray(levels), key)
    )
    shares = [
        _share(expert, measured)
        for expert, measured in zip(experts, statistics, strict=True)
    ]
    found: dict[str, FactorFinding] = {}  # one of each factor: the first
    for finding in (
        *_disagreements(experts, shares, levels),
        *_empty_negations(density, statistics, levels, positions, key),
        *_untrained_regions(experts, shares, levels),
        *_untrained_divisors(density, positions, key),
    ):
        found.setdefault(finding.factor, finding)
    return tuple(found.values())


@cache
def bound(dimension: float, p: float = 1e-6) -> float:
    """Returns t, which σ²‖s‖² of a noised marginal in d dimensions exceeds with a
    probability of at most p."""
    return float(
        dimension * special.chdtrc(dimension + 2, special.chdtri(dimension, p)) / p
    )


class ExpertStatistics(NamedTuple):
    """Statistics of an expert at samples of a few levels, each (levels, chains,
    rows)."""

    energy: (
        Array  # σ²·‖∇ log f‖²: the squared length of the noise that it predicts there
    )
    log_density: Array  # log f; NaN of a factor that offers only its score


@eqx.filter_jit
def _expert_statistics(
    density: AnnealedDensity, positions: Position, levels: Array, key: Array
) -> tuple[ExpertStatistics, ...]:
    """Statistics of every expert at samples that are noised from level 0 to each
    level."""

    def level_statistics(level: Array) -> tuple[ExpertStatistics, ...]:
        moved = noised(density, positions, level, jax.random.fold_in(key, level))
        variance = density.schedule.at(level).sigma ** 2

        def chain_statistics(position: Position) -> tuple[ExpertStatistics, ...]:
            values = density.evaluator.expert_values(position, level)
            return tuple(
                ExpertStatistics(variance * jnp.sum(v.score**2, axis=1), v.log_density)
                for v in values
            )

        return jax.vmap(chain_statistics)(moved)

    return jax.lax.map(level_statistics, levels)


def noised(
    density: AnnealedDensity, positions: Position, level: Array | int, key: Array
) -> Position:
    """Samples of level 0, chains lead, with the noise that takes them to another
    level."""
    clean, noise = density.schedule.at(0), density.schedule.at(level)
    ratio = noise.alpha / clean.alpha
    added = jnp.sqrt(jnp.maximum(noise.sigma**2 - (ratio * clean.sigma) ** 2, 0.0))
    xs = {
        name: positions[name]
        for name, site in density.sites.items()
        if site.kind == "noised"
    }
    fresh = normal_like(key, xs)
    return {
        **positions,
        **{name: ratio * x + added * fresh[name] for name, x in xs.items()},
    }


@eqx.filter_jit
def _pilot(
    density: AnnealedDensity,
    keys: Array,
    conditions: Position | None = None,
    which: int = 0,
) -> Position:
    """Chains at level 0, moved there by Langevin steps under the factors of all noised
    sites; or, where there are positions with its ``conditions``, one for each, which
    stay as they are, under this one expert alone. Steps are unadjusted, of σ²/Σ|w|,
    which no product of factors makes unstable (the score of a noised marginal falls no
    faster than x/σ²), tamed where something else does. Along directions in which clean
    events do not vary such steps double the variance σ²/Σ|w|; the last, with half of
    the noise, halves it again."""
    expert = None if conditions is None else density.described.experts[which]
    levels = jnp.asarray(_spaced_levels(density, tuning.PILOT.levels)[::-1])
    sites = (
        [name for name, site in density.sites.items() if site.kind == "noised"]
        if expert is None
        else [expert.site]
    )
    size = sum(math.prod(density.sites[name].shape) for name in sites)
    power = (
        jnp.maximum(jnp.max(density.top.entries) / size, 1.0)
        if expert is None
        else float(expert.rows)
    )

    def drift(position: Position, level: Array) -> Position:
        if expert is None:
            found = density.evaluator(position, level).terms.drift
            return {name: found[name] for name in sites}
        return {
            expert.site: density.evaluator.expert_values(position, level)[which].total
        }

    def step(
        position: Position, at: tuple[Array, Array, Array]
    ) -> tuple[Position, None]:
        key, level, heat = at
        h = density.schedule.at(level).sigma ** 2 / power
        pulls = drift(position, level)
        fresh = normal_like(key, {name: position[name] for name in sites})

        def move(name: str, x: Array) -> Array:
            pull = h * jnp.nan_to_num(pulls[name].reshape(x.shape))
            tamed = pull / (1 + jnp.abs(pull) / (10 * jnp.sqrt(h)))
            return x + tamed + jnp.sqrt(heat * h) * fresh[name]

        return {
            **position,
            **{name: move(name, position[name]) for name in sites},
        }, None

    def chain(key: Array, position: Position | None) -> Position:
        first, rest = jax.random.split(key)
        if expert is None or position is None:
            start = density.initial(first)
        else:
            noise = jax.random.normal(first, density.sites[expert.site].shape)
            start = {
                **position,
                expert.site: density.schedule.at(levels[0]).sigma * noise,
            }
        visits = jnp.repeat(levels, tuning.PILOT.steps)
        heat = jnp.full(visits.shape, 2.0).at[-1].set(1.0)
        return jax.lax.scan(
            step, start, (jax.random.split(rest, len(visits)), visits, heat)
        )[0]

    return jax.vmap(chain)(keys, conditions)


def _share(expert: Expert, statistics: ExpertStatistics) -> np.ndarray:
    """The share of samples that are beyond the bound, at each level, under whichever of
    its rows is worst."""
    # The mean of b entries has their noise over √b, but is taken for one with all of
    # it.
    worst = expert.averaged * np.where(
        np.isfinite(statistics.energy), statistics.energy, 0.0
    ).max(-1)
    return np.asarray((worst > tuning.OVERLAP.slack * bound(expert.dimension)).mean(1))


def _disagreements(
    experts: tuple[Expert, ...], found: list[np.ndarray], levels: np.ndarray
) -> Iterator[FactorFinding]:
    """Factors that are multiplied and have nothing where the samples are."""
    for i, (expert, shares) in enumerate(zip(experts, found, strict=True)):
        others = [
            e.name for j, e in enumerate(experts) if e.site == expert.site and j != i
        ]
        if expert.power <= 0 or not (others or expert.rows > 1):
            continue
        at = int(shares.argmax())
        # Of a quotient both parts may be narrow, while the quotient is not.
        divided = [
            s[at]
            for e, s in zip(experts, found, strict=True)
            if e.site == expert.site and e.power < 0
        ]
        if shares[at] < tuning.OVERLAP.empty_share or any(
            share >= tuning.OVERLAP.empty_share for share in divided
        ):
            continue
        beside = ", ".join(dict.fromkeys(others)) or f"its own {expert.rows} conditions"
        text = (
            f"The factors agree nowhere: {shares[at]:.0%} of the samples of {expert.site!r} lie where {expert.name} "
            f"has next to nothing, at level {levels[at]} (beside {beside}). A product of factors that exclude each "
            "other has samples, at the edges of its factors, but they mean nothing. Look at samples of each factor "
            "alone; soften one of them by a power below 1, or use cp.mixture where either is meant."
        )
        yield FactorFinding(
            "no_overlap", text, expert.name, int(levels[at]), float(shares[at])
        )


def _empty_negations(
    density: AnnealedDensity,
    statistics: tuple[ExpertStatistics, ...],
    levels: np.ndarray,
    positions: Position,
    key: Array,
) -> Iterator[FactorFinding]:
    """Factors that are divided by and are flat where the samples are: what they exclude
    is all there is.

    Flat over all samples at one level, and at this and every cleaner one within the
    reach of the noise. Of a distribution that varies a level shows what is coarser than
    its noise, and a cleaner one the rest; what a learned energy shows at level 0 alone,
    where scores are hardest to learn, is its error. Flat is also the floor around a
    bump, where samples lie that a negation did keep away: so what is flat is drawn
    from, and samples must be as dense as its draws.

    Where the powers of a site sum to 1 or more a quotient is read as Bayes' rule or as
    guidance, whose denominator holds everything by design: a wide prior that is divided
    out is right, however flat it is.
    """
    for i, (expert, measured) in enumerate(
        zip(density.described.experts, statistics, strict=True)
    ):
        total = np.mean(density.top.at(0).power[expert.site])
        if expert.power >= 0 or measured.energy.shape[1] < 8 or total > 0.99:
            continue
        spread = abs(expert.power) * np.std(measured.log_density, axis=1).max(-1)
        nearby = np.sqrt(expert.averaged * np.mean(measured.energy, axis=1)).max(-1)
        flat_so_far = np.logical_and.accumulate(
            nearby <= tuning.OVERLAP.flat
        )  # NaN is not flat
        flat = np.flatnonzero(flat_so_far & (spread <= tuning.OVERLAP.flat))
        if not flat.size:
            continue
        at = int(flat[0])
        keys = jax.random.split(jax.random.fold_in(key, i), len(positions[expert.site]))
        pilot = _pilot(density, keys, positions, i)
        own_draws = _expert_statistics(density, pilot, jnp.asarray(levels), key)[
            i
        ].log_density
        if (
            np.median(own_draws, axis=1)[at].max()
            - np.median(measured.log_density, axis=1)[at].max()
            > tuning.OVERLAP.floor
        ):
            continue
        text = (
            f"The negation leaves nothing: all samples of {expert.site!r} lie inside of {expert.name}, which the "
            f"program divides by, and there {expert.name}^{abs(expert.power):.3g} varies by {spread[at]:.2g} nats at "
            f"level {levels[at]}. What it was to take away is still there. Divide by something that holds less, or "
            "leave it out."
        )
        yield FactorFinding("no_overlap", text, expert.name, int(levels[at]), 1.0)


def _untrained_regions(
    experts: tuple[Expert, ...], found: list[np.ndarray], levels: np.ndarray
) -> Iterator[FactorFinding]:
    """Trained factors that are asked where their own noised draws never are."""
    for expert, shares in zip(experts, found, strict=True):
        if (
            expert.power <= 0
            or not expert.trained
            or shares.max() < tuning.OVERLAP.untrained_share
        ):
            continue
        at = int(shares.argmax())
        text = (
            f"{expert.name} is asked where it was never trained: {shares[at]:.0%} of the samples of {expert.site!r}, "
            f"noised to level {levels[at]}, lie where its own noised draws are less than once in a million. What a "
            "network returns there is a guess. Check observations that contradict it, at powers below 1, and at data "
            "of another scale than those of the training."
        )
        yield FactorFinding(
            "out_of_training", text, expert.name, int(levels[at]), float(shares[at])
        )


def _untrained_divisors(
    density: AnnealedDensity, positions: Position, key: Array
) -> Iterator[FactorFinding]:
    """Trained factors that are divided by, and asked at level 0 where their draws are
    not."""
    for i, expert in enumerate(density.described.experts):
        size = math.prod(density.sites[expert.site].shape)
        if (
            expert.power >= 0
            or not expert.trained
            or (expert.dimension, expert.rows) != (size, 1)
        ):
            continue
        samples = np.asarray(positions[expert.site]).reshape(-1, size)
        if len(samples) < 8:
            continue
        share = _far_from_draws(
            density, i, samples, positions, jax.random.fold_in(key, i)
        )
        if share < tuning.OVERLAP.untrained_share:
            continue
        text = (
            f"The program divides by {expert.name} where it was never trained: {share:.0%} of the samples of "
            f"{expert.site!r} are farther from all of its draws than these are from one another. What a network "
            "returns there is a guess. Divide by a model that was trained on a floor of points from all over the place "
            "too, as examples/negation.py does, or by a lower power."
        )
        yield FactorFinding(
            "out_of_training", text, expert.name, 0, share, divides=True
        )


def _far_from_draws(
    density: AnnealedDensity,
    which: int,
    samples: np.ndarray,
    positions: Position,
    key: Array,
) -> float:
    """The share of samples, (n, d), that are far from all draws of an expert. A part
    that holds few of its draws may be all that the program keeps: before it is taken
    for missing, more are taken."""
    from scipy.spatial.distance import cdist

    draws, share = np.empty((0, samples.shape[1])), 0.0
    for round_key in jax.random.split(key, tuning.OVERLAP.rounds):
        fresh = _pilot(
            density, jax.random.split(round_key, len(samples)), positions, which
        )
        fresh = np.asarray(fresh[density.described.experts[which].site]).reshape(
            samples.shape
        )
        draws = np.concatenate([draws, fresh[np.isfinite(fresh).all(1)]])
        if len(draws) < 8:
            return 0.0
        between = cdist(draws, draws)
        np.fill_diagonal(between, math.inf)
        far = tuning.OVERLAP.draws_slack * between.min(1).max()
        share = float(np.mean(cdist(samples, draws).min(1) > far))
        if share < tuning.OVERLAP.untrained_share:
            break
    return share
