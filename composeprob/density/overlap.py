r"""Agreement of the factors of a program where its samples are: `no_overlap` and
`out_of_training`.

The score of a factor's noised marginal is $-E[\varepsilon \mid x]/\sigma$, with ε the
noise in x. Over the factor's own noised samples $\sigma^2\|s(x)\|^2 \le
E[\|\varepsilon\|^2 \mid x]$, and an event of x that has the probability p holds at most
as much of $\|\varepsilon\|^2 \sim \chi^2_d$ as its largest p do. So
$\sigma^2\|s(x)\|^2$ exceeds their mean,

$$t = d\,P(\chi^2_{d+2} > q)/p, \qquad P(\chi^2_d > q) = p,$$

with a probability of p at most, whatever the factor. No rule for every factor can do
with less than q: a single point has $\sigma^2\|s\|^2 \sim \chi^2_d$. Samples are noised
to a few levels, and each factor is evaluated there: a sample far beyond t lies where
the factor has next to no mass. No samples of the factor are needed.

* `no_overlap`: half of the samples are beyond t under a factor that is multiplied with
  others; or a negation has nothing left to take away from: the samples lie where the
  divisor is as flat as the inside of a box.
* `out_of_training`: a tenth of the samples are beyond t under a factor that was
  trained. A closed form is right everywhere, and is not examined.

A trained factor that divides pushes samples to where it was never trained, and the
output of its network there may be small, so that the bound does not see it. Its own
samples are compared with those of the program instead. `out_of_training` is also
reported where a tenth of the program's samples are farther from all of the factor's
than any of these is from the others, by a half. Weights and steps take the divisor for
a noised marginal, which it is not there, so the errors of such a run are withheld.
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
from jaxtyping import Float
from scipy import special

from composeprob import tuning
from composeprob.density.described import Expert
from composeprob.density.evaluation import Position
from composeprob.density.once import compiled_by_size
from composeprob.findings import Code, Finding
from composeprob.pytree import normal_like

if TYPE_CHECKING:
    from composeprob.density.annealed import AnnealedDensity


def check(density: AnnealedDensity, key: Array, num_chains: int) -> tuple[Finding, ...]:
    """See `AnnealedDensity.check`."""
    if not in_question(density):
        return ()
    pilot_key, noise_key = jax.random.split(key)
    positions = _pilot(density, jax.random.split(pilot_key, num_chains))
    return agreement(density, positions, noise_key)


def check_evaluations(
    density: AnnealedDensity, num_chains: int = tuning.PILOT.chains
) -> int:
    """Count the evaluations of the factors by `check`, over all of its chains."""
    # One evaluation a step of the pilot, and one at each level for its samples.
    pilot = tuning.PILOT.steps * len(_spaced_levels(density, tuning.PILOT.levels))
    noised_levels = _spaced_levels(density, tuning.OVERLAP.levels, noisiest=False)
    return num_chains * (pilot + len(noised_levels))


def _spaced_levels(
    density: AnnealedDensity, number: int, noisiest: bool = True
) -> np.ndarray:
    """Levels that are evenly spaced in their index, from level 0 on, with the noisiest
    or without it."""
    levels = np.linspace(0, density.num_levels - 1, number, endpoint=noisiest)
    return np.unique(levels.round().astype(int))


def in_question(density: AnnealedDensity) -> bool:
    """Return whether the program has factors that can disagree.

    There is not where each site has one factor of power 1 and nothing else depends on
    it.
    """
    experts = density.described.experts
    if density.num_levels <= 1 or not experts:
        return False
    if density.graph.observations:
        return True
    sites = {expert.site for expert in experts}
    one_factor_a_site = len(sites) == len(experts)
    unmodified = all(expert.power == 1 and expert.rows == 1 for expert in experts)
    return not (one_factor_a_site and unmodified)


def agreement(
    density: AnnealedDensity,
    positions: Position,
    key: Array,
    num_levels: int = tuning.OVERLAP.levels,
) -> tuple[Finding, ...]:
    """Find factors that disagree at samples of level 0, ``{site: (N, …)}``.

    The samples are noised to ``num_levels`` levels, each of which costs one evaluation
    of every sample.
    """
    experts = density.described.experts
    # At the noisiest level all noised marginals are one, and nothing can disagree.
    levels = _spaced_levels(density, num_levels, noisiest=False)
    statistics = jax.tree.map(
        np.asarray, _expert_statistics(density, positions, jnp.asarray(levels), key)
    )
    shares = [
        _share_beyond_bound(expert, statistic)
        for expert, statistic in zip(experts, statistics, strict=True)
    ]
    candidates = (
        *_disagreements(experts, shares, levels),
        *_empty_negations(density, statistics, levels, positions, key),
        *_untrained_regions(experts, shares, levels),
        *_untrained_divisors(density, positions, key),
    )
    findings: dict[str | None, Finding] = {}  # one for each factor: the first
    for finding in candidates:
        findings.setdefault(finding.factor, finding)
    return tuple(findings.values())


def _finding(
    code: Code,
    message: str,
    expert: Expert,
    level: int,
    share: float,
    divides: bool = False,
) -> Finding:
    """A finding about an expert. Errors are given, as they are those of the model."""
    return Finding(code, message, False, expert.name, level, share, divides)


@cache
def bound(dimension: float, p: float = 1e-6) -> float:
    """Return t such that σ²‖s‖² of a noised marginal in d dimensions exceeds t with a
    probability of at most p."""
    quantile = special.chdtri(dimension, p)
    return float(dimension * special.chdtrc(dimension + 2, quantile) / p)


class ExpertStatistics(NamedTuple):
    """Statistics of an expert at samples of a few levels.

    Attributes:
        energy: σ²·‖∇ log f‖², the squared length of the noise that it predicts.
        log_density: log f; NaN for a factor that offers only its score.
    """

    energy: Float[Array, "levels chains rows"]
    log_density: Float[Array, "levels chains rows"]


@compiled_by_size
def _expert_statistics(
    density: AnnealedDensity, positions: Position, levels: Array, key: Array
) -> tuple[ExpertStatistics, ...]:
    """Statistics of every expert at samples that are noised from level 0 to each
    level."""

    def level_statistics(level: Array) -> tuple[ExpertStatistics, ...]:
        moved = noised(density, positions, level, jax.random.fold_in(key, level))
        variance = density.schedule.at(level).sigma ** 2

        def chain_statistics(position: Position) -> tuple[ExpertStatistics, ...]:
            statistics = []
            for value in density.evaluator.expert_values(position, level):
                energy = variance * jnp.sum(value.score**2, axis=1)
                statistics.append(ExpertStatistics(energy, value.log_density))
            return tuple(statistics)

        return jax.vmap(chain_statistics)(moved)

    # One level after another: all at once would take as many times the memory.
    return jax.lax.map(level_statistics, levels)


def noised(
    density: AnnealedDensity, positions: Position, level: Array | int, key: Array
) -> Position:
    """Add the noise that takes samples of level 0 to another level; chains lead."""
    clean = density.schedule.at(0)
    noise = density.schedule.at(level)
    ratio = noise.alpha / clean.alpha
    # σ² at the level less the part that level 0's own noise makes of it.
    added = jnp.sqrt(jnp.maximum(noise.sigma**2 - (ratio * clean.sigma) ** 2, 0.0))
    xs = {
        name: positions[name]
        for name, site in density.sites.items()
        if site.kind == "noised"
    }
    fresh = normal_like(key, xs)
    moved = {name: ratio * x + added * fresh[name] for name, x in xs.items()}
    return {**positions, **moved}


@eqx.filter_jit
def _pilot(
    density: AnnealedDensity,
    keys: Array,
    conditions: Position | None = None,
    which: int = 0,
) -> Position:
    """Run chains down to level 0 by unadjusted Langevin steps.

    They move under the factors of all noised sites. Where positions are given as
    ``conditions``, there is one chain for each, which moves one expert's site under
    that expert alone and keeps the others as they are.

    Steps are of σ²/Σ|w|, which no product of factors makes unstable (the score of a
    noised marginal falls no faster than x/σ²), tamed where another term does. Along
    directions in which clean events do not vary such steps double the variance σ²/Σ|w|;
    the last, with half of the noise, halves it again.
    """
    levels = jnp.asarray(_spaced_levels(density, tuning.PILOT.levels)[::-1])
    expert = None if conditions is None else density.described.experts[which]
    power: Array | float
    if expert is None:
        sites = [name for name, site in density.sites.items() if site.kind == "noised"]
        size = sum(math.prod(density.sites[name].shape) for name in sites)
        # Σ|w| of an entry, on average; `stacked` exponents have one at each level.
        power = jnp.maximum(jnp.max(density.top.entries) / size, 1.0)
    else:
        sites = [expert.site]
        power = float(expert.rows)

    def drift(position: Position, level: Array) -> Position:
        if expert is None:
            drifts = density.evaluator(position, level).terms.drift
            return {name: drifts[name] for name in sites}
        values = density.evaluator.expert_values(position, level)
        return {expert.site: values[which].total}

    def step(
        position: Position, visit: tuple[Array, Array, Array]
    ) -> tuple[Position, None]:
        key, level, heat = visit
        h = density.schedule.at(level).sigma ** 2 / power
        drifts = drift(position, level)
        fresh = normal_like(key, {name: position[name] for name in sites})

        def move(name: str, x: Array) -> Array:
            pull = h * jnp.nan_to_num(drifts[name].reshape(x.shape))
            # At most 10·√h, where the noise of the step is √(2h).
            tamed = pull / (1 + jnp.abs(pull) / (10 * jnp.sqrt(h)))
            return x + tamed + jnp.sqrt(heat * h) * fresh[name]

        moved = {name: move(name, position[name]) for name in sites}
        return {**position, **moved}, None

    def chain(key: Array, position: Position | None) -> Position:
        start_key, steps_key = jax.random.split(key)
        if expert is None or position is None:
            start = density.initial(start_key)
        else:
            noise = jax.random.normal(start_key, density.sites[expert.site].shape)
            top_sigma = density.schedule.at(levels[0]).sigma
            start = {**position, expert.site: top_sigma * noise}
        visited_levels = jnp.repeat(levels, tuning.PILOT.steps)
        # The variance of a step's noise, in units of h.
        heat = jnp.full(visited_levels.shape, 2.0).at[-1].set(1.0)
        step_keys = jax.random.split(steps_key, len(visited_levels))
        end, _ = jax.lax.scan(step, start, (step_keys, visited_levels, heat))
        return end

    return jax.vmap(chain)(keys, conditions)


def _share_beyond_bound(
    expert: Expert, statistics: ExpertStatistics
) -> Float[np.ndarray, " levels"]:
    """Share of samples that are beyond the bound, under the worst of the expert's
    rows."""
    finite = np.where(np.isfinite(statistics.energy), statistics.energy, 0.0)
    # The mean of b entries has their noise over √b, but is taken for one with all of
    # it.
    worst = expert.averaged * finite.max(-1)
    # A slack, as networks' scores are a little too long in places.
    is_far = worst > tuning.OVERLAP.slack * bound(expert.dimension)
    return np.asarray(is_far.mean(1))


def _disagreements(
    experts: tuple[Expert, ...], shares: list[np.ndarray], levels: np.ndarray
) -> Iterator[Finding]:
    """Factors that are multiplied and have no mass where the samples are."""
    for i, expert in enumerate(experts):
        others = []
        divisor_shares = []
        for j, other in enumerate(experts):
            if other.site != expert.site:
                continue
            if j != i:
                others.append(other.name)
            if other.power < 0:
                divisor_shares.append(shares[j])
        # A factor of several conditions may disagree with itself.
        if expert.power <= 0 or not (others or expert.rows > 1):
            continue
        worst = int(shares[i].argmax())
        share = shares[i][worst]
        if share < tuning.OVERLAP.empty_share:
            continue
        # Both parts of a quotient may be narrow, while the quotient is not.
        if any(other[worst] >= tuning.OVERLAP.empty_share for other in divisor_shares):
            continue
        beside = ", ".join(dict.fromkeys(others))
        if not beside:
            beside = f"its own {expert.rows} conditions"
        message = (
            f"The factors agree nowhere: {share:.0%} of the samples of "
            f"{expert.site!r} lie where {expert.name} has next to no mass, at level "
            f"{levels[worst]} (beside {beside}). A product of factors that exclude "
            "each other has samples, at the edges of its factors, but they mean "
            "nothing. Look at samples of each factor alone; soften one of them by a "
            "power below 1, or use cp.mixture where either is meant."
        )
        yield _finding(
            Code.NO_OVERLAP, message, expert, int(levels[worst]), float(share)
        )


def _empty_negations(
    density: AnnealedDensity,
    statistics: tuple[ExpertStatistics, ...],
    levels: np.ndarray,
    positions: Position,
    key: Array,
) -> Iterator[Finding]:
    """Divisors that are flat where the samples are, so that they exclude nothing within
    the samples.

    Flat over all samples at one level, and at this and every cleaner one within the
    reach of the noise. A level shows the variation that is coarser than its noise, and
    a cleaner one the rest; variation that a learned energy shows at level 0 alone,
    where scores are hardest to learn, is its error. Flat is also the floor around a
    bump, where samples lie that a negation did keep away: so the flat factor is sampled
    from, and the program's samples must be as dense as the factor's own.

    Where the powers of a site sum to 1 or more a quotient is read as Bayes' rule or as
    guidance, whose denominator holds everything by design: a wide prior that is divided
    out is right, however flat it is.
    """
    for i, expert in enumerate(density.described.experts):
        statistic = statistics[i]
        total_power = np.mean(np.asarray(density.top.at(0).power[expert.site]))
        num_samples = statistic.energy.shape[1]
        if expert.power >= 0 or num_samples < 8 or total_power > 0.99:
            continue
        spread = abs(expert.power) * np.std(statistic.log_density, axis=1).max(-1)
        mean_energy = np.mean(statistic.energy, axis=1)
        # Change of log f over one standard deviation of the noise.
        slope = np.sqrt(expert.averaged * mean_energy).max(-1)
        # Levels run from clean to noisy. NaN is not flat.
        locally_flat = np.logical_and.accumulate(slope <= tuning.OVERLAP.flat)
        flat = np.flatnonzero(locally_flat & (spread <= tuning.OVERLAP.flat))
        if not flat.size:
            continue
        index = int(flat[0])
        keys = jax.random.split(jax.random.fold_in(key, i), len(positions[expert.site]))
        # A floor around a bump: the factor's own samples are where it is higher.
        factor_samples = _pilot(density, keys, positions, i)
        factor_statistics = _expert_statistics(
            density, factor_samples, jnp.asarray(levels), key
        )
        factor_height = np.median(factor_statistics[i].log_density, axis=1)[index].max()
        sample_height = np.median(statistic.log_density, axis=1)[index].max()
        if factor_height - sample_height > tuning.OVERLAP.floor:
            continue
        message = (
            f"The negation leaves nothing: all samples of {expert.site!r} lie inside "
            f"of {expert.name}, which the program divides by, and there "
            f"{expert.name}^{abs(expert.power):.3g} varies by {spread[index]:.2g} nats "
            f"at level {levels[index]}. The region that it should take away is still "
            "there. Divide by a factor that holds less, or leave it out."
        )
        yield _finding(Code.NO_OVERLAP, message, expert, int(levels[index]), 1.0)


def _untrained_regions(
    experts: tuple[Expert, ...], shares: list[np.ndarray], levels: np.ndarray
) -> Iterator[Finding]:
    """Trained factors that are evaluated where their own noised samples never are."""
    for expert, shares_at_levels in zip(experts, shares, strict=True):
        if expert.power <= 0 or not expert.trained:
            continue
        if shares_at_levels.max() < tuning.OVERLAP.untrained_share:
            continue
        worst = int(shares_at_levels.argmax())
        share = float(shares_at_levels[worst])
        message = (
            f"{expert.name} is evaluated where it was never trained: {share:.0%} of "
            f"the samples of {expert.site!r}, noised to level {levels[worst]}, lie "
            "where fewer than one in a million of its own noised samples do. The "
            "output of a network there is a guess. Check for observations that "
            "contradict it, for powers below 1, and for data of another scale than "
            "those of the training."
        )
        yield _finding(Code.OUT_OF_TRAINING, message, expert, int(levels[worst]), share)


def _untrained_divisors(
    density: AnnealedDensity, positions: Position, key: Array
) -> Iterator[Finding]:
    """Trained factors that are divided by, and evaluated at level 0 away from their own
    samples."""
    for i, expert in enumerate(density.described.experts):
        size = math.prod(density.sites[expert.site].shape)
        # Distances between events are those between values of the site.
        sees_whole_site = expert.dimension == size and expert.rows == 1
        if expert.power >= 0 or not expert.trained or not sees_whole_site:
            continue
        samples = np.asarray(positions[expert.site]).reshape(-1, size)
        if len(samples) < 8:
            continue
        share = _share_far_from_factor(
            density, i, samples, positions, jax.random.fold_in(key, i)
        )
        if share < tuning.OVERLAP.untrained_share:
            continue
        message = (
            f"The program divides by {expert.name} where it was never trained: "
            f"{share:.0%} of the samples of {expert.site!r} are farther from all of "
            "its own samples than these are from one another. The output of a network "
            "there is a guess. Divide by a model that was trained on a floor of points "
            "from all over the place too, as examples/negation.py does, or by a lower "
            "power."
        )
        yield _finding(Code.OUT_OF_TRAINING, message, expert, 0, share, divides=True)


def _share_far_from_factor(
    density: AnnealedDensity,
    which: int,
    samples: Float[np.ndarray, "n d"],
    positions: Position,
    key: Array,
) -> float:
    """Share of ``samples`` that are far from all samples of an expert.

    A region that holds few of the expert's samples may be all that the program keeps:
    before it is taken for empty, the expert is sampled again.
    """
    from scipy.spatial.distance import cdist

    site = density.described.experts[which].site
    factor_samples = np.empty((0, samples.shape[1]))
    share = 0.0
    for round_key in jax.random.split(key, tuning.OVERLAP.rounds):
        keys = jax.random.split(round_key, len(samples))
        pilot = _pilot(density, keys, positions, which)
        fresh = np.asarray(pilot[site]).reshape(samples.shape)
        finite = fresh[np.isfinite(fresh).all(1)]
        factor_samples = np.concatenate([factor_samples, finite])
        if len(factor_samples) < 8:
            return 0.0
        between = cdist(factor_samples, factor_samples)
        np.fill_diagonal(between, math.inf)  # a sample is not its own neighbour
        # Farther than the most isolated one of the expert's samples, by a half.
        far = tuning.OVERLAP.draws_slack * between.min(1).max()
        share = float(np.mean(cdist(samples, factor_samples).min(1) > far))
        if share < tuning.OVERLAP.untrained_share:
            break
    return share
