"""A population at level 0 that goes on after its run: weighed by further factors,
resampled, moved, and made a result of."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, PyTree

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Position
from composeprob.findings import Code, Finding
from composeprob.kernels import KernelState
from composeprob.kernels.metropolis import log_density_ratio
from composeprob.results.checks.ancestors_collapsed import AncestorsCollapsed
from composeprob.results.estimates import (
    Genealogy,
    effective_chains,
    effective_chains_bound,
)
from composeprob.results.record import later
from composeprob.results.result import Result
from composeprob.results.status import Status
from composeprob.results.trust import Trust
from composeprob.samplers.finishers import (
    GaussianMixture,
    GlobalMoves,
    renewed_ancestors,
)
from composeprob.samplers.layout import Layout
from composeprob.samplers.random import Stream, key_of, normals, stream, words_of
from composeprob.samplers.renoise import (
    Ladder,
    Renoising,
    accept,
    chosen_turns,
    ladder_of,
)
from composeprob.samplers.resampling import Resample, log_mean_weight, relative_ess

LogGain = Callable[[KernelState], Float[np.ndarray, " chains"]]
"""Function of proposals: the part of their log-ratio that added factors make."""


Resampled = Callable[[float, Int[np.ndarray, " chains"]], Float[np.ndarray, " chains"]]
"""Function of the exponent of a factor that comes in, and of the chains that resampling
has left: moves them, and returns the factor's logarithm at each."""


class Execution(NamedTuple):
    """The way in which a call of `infer` evaluates chains, and what follows it too.

    Attributes:
        chunk: chains that are evaluated at once; None for all.
        progress: whether to show a progress bar.
    """

    chunk: int | None = None
    progress: bool = False


def over_chains(function: Callable[..., Any], chunk: int | None) -> Callable[..., Any]:
    """Map a function of one chain over all, at most ``chunk`` of them at once."""
    if chunk is None:
        return jax.vmap(function)

    def mapped(*arguments: PyTree[Array]) -> Any:
        return jax.lax.map(lambda each: function(*each), arguments, batch_size=chunk)

    return mapped


@dataclass
class Population:
    """N chains at level 0, and what they have gone through.

    Attributes:
        density: of which they are samples, up to the factors that `reweight` added.
        points: their vectors v, (N, D).
        ancestors: the initial chain that each descends from, of 0 … N − 1.
        words: random words of each, (N, 2); ``shared`` those of common decisions.
        log_weights: of each, up to a constant.
        chunk: chains that are evaluated at once; None for all.
        repeated: for each, the weight that the repetition of the run gives it, over its
            own; None where there was none, or the chains have forgotten the run.
        log_evidence: what the added factors add to it.
        variance: the variance of that, by the genealogy.
        evaluations: of each chain.
        draws: number of random decisions so far.
        excluded: whether added factors are 0 at every chain.
    """

    density: AnnealedDensity
    points: Float[Array, "chains size"]
    ancestors: Int[np.ndarray, " chains"]
    words: Array
    shared: Array
    log_weights: Float[np.ndarray, " chains"]
    chunk: int | None
    repeated: Float[np.ndarray, " chains"] | None = None
    log_evidence: float = 0.0
    variance: float = 0.0
    evaluations: int = 0
    draws: int = 0
    excluded: bool = False

    @classmethod
    def of_result(
        cls, result: Result, density: AnnealedDensity, key: Array, chunk: int | None
    ) -> Population:
        """Return the chains of a result under a density with its sites, or with more
        static ones, which are drawn from their priors."""
        values = {}
        for name in density.sites:
            if name in result.samples:
                values[name] = jnp.asarray(result.drawn(name)[:, -1])
        return cls.with_values(result, density, values, key, chunk)

    @classmethod
    def with_values(
        cls,
        result: Result,
        density: AnnealedDensity,
        values: dict[str, Array],
        key: Array,
        chunk: int | None,
    ) -> Population:
        """Return the chains of a result with these values, (N, …), of the latents of a
        density."""
        log_weights = np.asarray(result.log_weights, float)
        words, shared = words_of(key, len(log_weights), tuning.SERIES_AFTER)
        points = _points(density, values, jnp.asarray(words), chunk)
        genealogy = result._genealogy
        repeated = genealogy.repeated
        if repeated is not None:
            # Without weight a chain is lost to both.
            own = np.where(genealogy.weights > 0, genealogy.weights, np.inf)
            repeated = repeated / own
        return cls(
            density,
            points,
            genealogy.index,
            jnp.asarray(words),
            shared,
            log_weights,
            chunk,
            repeated,
        )

    def __len__(self) -> int:
        return len(self.ancestors)

    @property
    def genealogy(self) -> Genealogy:
        """Their ancestors and weights, and those that the repetition of the run they
        came from gives them: these multiply and are resampled as their own do."""
        genealogy = Genealogy.from_log_weights(self.log_weights, self.ancestors)
        if self.repeated is None:
            return genealogy
        repeated = genealogy.weights * self.repeated
        total = repeated.sum()
        if not total > 0:
            return genealogy
        return dataclasses.replace(genealogy, repeated=repeated / total)

    @property
    def ess(self) -> float:
        """Their relative effective sample size."""
        return float(relative_ess(jnp.asarray(self.log_weights)))

    def random_words(self) -> Array:
        """Words of all chains for the next random decision."""
        self.draws += 1
        return _streams(self.words, jnp.uint32(self.draws))

    def weigh(self, increment: Float[np.ndarray, " chains"]) -> None:
        """Add increments to the log-weights, and their mean to the evidence; keep the
        weights where none would be left."""
        weighed = self.log_weights + increment
        if not np.isfinite(weighed).any():
            self.excluded = True
            self.log_evidence = -math.inf
            return
        before = log_mean_weight(jnp.asarray(self.log_weights))
        log_mean = float(log_mean_weight(jnp.asarray(weighed)) - before)
        relative = np.exp(increment - log_mean)
        self.log_evidence += log_mean
        self.variance += float(self.genealogy.variance(relative))
        self.log_weights = weighed

    def resample(self) -> Int[np.ndarray, " chains"]:
        """Resample the chains by their weights; return which ones are left."""
        self.draws += 1
        shared = stream(jnp.asarray(self.shared), self.draws)
        logs = jnp.asarray(self.log_weights, jnp.result_type(float))
        chosen = np.asarray(Resample().ancestors(shared, logs))
        self.points = self.points[chosen]
        self.ancestors = self.ancestors[chosen]
        self.log_weights = np.zeros(len(self))
        if self.repeated is not None:
            self.repeated = self.repeated[chosen]
        return chosen

    def bring_in(
        self,
        gains: Float[np.ndarray, " chains"],
        resampled: Resampled,
        at_once: Float[np.ndarray, " chains"] | float = 0.0,
    ) -> None:
        """Bring a factor in by powers γ, each the greatest under which half of the
        chains count.

        Args:
            gains: the factor's logarithm at each chain.
            resampled: takes γ and the chains that resampling has left; moves them, and
                returns their gains. Not called where one power is enough and half of
                the chains count.
            at_once: log-weights that come in with the first power.
        """
        exponent = 0.0
        while exponent < 1:
            before = self.log_weights + at_once
            step = next_increment(gains, 1 - exponent, before)
            self.weigh(at_once + step * gains)
            at_once = 0.0
            exponent = min(exponent + step, 1.0)
            if exponent > 1 - 1e-6:
                exponent = 1.0
            if self.excluded:
                return
            if exponent < 1 or self.ess < tuning.REWARD.counting:
                gains = resampled(exponent, self.resample())

    def renew(self, renewed: Bool[np.ndarray, " chains"]) -> None:
        """Count chains as their own ancestors, if nearly all of them have forgotten
        where they began: those that could are not a random part of them all."""
        if np.mean(renewed) < 1 - tuning.GLOBAL_MOVES.most_stuck:
            return
        ancestors = renewed_ancestors(jnp.asarray(self.ancestors), jnp.asarray(renewed))
        self.ancestors = np.asarray(ancestors)
        self.repeated = None

    def result(
        self,
        before: Result,
        density: AnnealedDensity,
        findings: list[Finding],
        note: str,
        reason: str | None = None,
        drift: float | None = None,
        **facts: Any,
    ) -> Result:
        """Return the result of the run before with this population in the place of its
        chains.

        Args:
            before: the result that the population came from.
            density: what it is a sample of.
            findings: what went wrong since.
            note: what was done, for the reason.
            reason: what the note follows; left out, the reason of the run before.
            drift: of the population by the last moves; left out, that of the run
                before.
            facts: of `About`, that have changed.
        """
        if reason is None:
            reason = before.reason
        samples, positions = _read(self.density, self.points, self.chunk)
        genealogy = self.genealogy
        changed = {"global_acceptance": facts.get("global_acceptance"), "drift": drift}
        trust = self._trust(before, positions, changed)
        found = [*findings, *self._findings(trust)]
        # The former status and error are computed when they are first asked for.
        former = before.__dict__
        variance = self.variance

        def full_status(result: Result) -> Status:
            base = former["status"]
            if callable(base):
                base = base(result)
            new = [finding for finding in found if not base.has(finding.code)]
            return base.with_findings(*new)

        def error(result: Result) -> float:
            if result.status.withholds:
                return math.nan
            base = former["log_evidence_error"]
            if callable(base):
                base = base(before)
            return math.hypot(base, math.sqrt(variance))

        log_evidence = before.log_evidence
        log_evidence_error = None
        if log_evidence is not None:
            log_evidence += self.log_evidence
            log_evidence_error = later(error)
        # These chains have one position each, whatever the run before had drawn.
        facts |= {"draws": None, "thin": 1}
        curl = before.about.__dict__["curl"]
        return dataclasses.replace(
            before,
            samples={name: np.asarray(value) for name, value in samples.items()},
            log_weights=self.log_weights,
            log_evidence=log_evidence,
            log_evidence_error=log_evidence_error,
            evaluations=before.evaluations + self.evaluations,
            reason=f"{reason}; {note}",
            about=dataclasses.replace(before.about, curl=curl, **facts),
            status=later(full_status),
            trust=trust,
            density=density,
            _genealogy=genealogy,
        )

    def _trust(
        self, before: Result, positions: Position, changed: dict[str, float | None]
    ) -> Trust:
        """Return what the estimates rest on now; numbers of moves that were not made
        are None, and stay those of the run before."""
        genealogy = self.genealogy
        values = [np.asarray(value) for value in positions.values()]
        measured: dict[str, Any] = {
            name: value for name, value in changed.items() if value is not None
        }
        assert before.trust is not None  # a run has ended in it
        return dataclasses.replace(
            before.trust,
            independent=effective_chains_bound(genealogy, values),
            effective_chains=effective_chains(genealogy, values),
            ancestors=len(np.unique(self.ancestors)),
            **measured,
        )

    def _findings(self, trust: Trust) -> list[Finding]:
        """Return what the weights since the run before have come to, if it is wrong."""
        if self.excluded:
            text = (
                "What is new has probability 0 at every chain, so that none can go on. "
                "Check its values, or start anew: cp.infer(density, key, …)."
            )
            return [Finding(Code.ZERO_DENSITY, text, True)]
        few = AncestorsCollapsed()
        return few.findings(trust.independent, trust.ancestors, trust.num_chains)


@eqx.filter_jit
def _streams(words: Array, number: Array) -> Array:
    return jax.vmap(lambda words: stream(words, number))(words)


@eqx.filter_jit
def _points(
    density: AnnealedDensity,
    values: dict[str, Array],
    words: Array,
    chunk: int | None,
) -> Array:
    """Vectors of the latents' values."""
    layout = Layout.of_density(density)
    alpha = density.schedule.at(0).alpha

    def of_chain(values: dict[str, Array], words: Array) -> Array:
        key = key_of(words, Stream.STATIC)
        return layout.vector(density.evaluator.unread(values, key), alpha)

    return over_chains(of_chain, chunk)(values, words)


@eqx.filter_jit
def _read(
    density: AnnealedDensity, points: Array, chunk: int | None
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Values of all sites, and positions."""
    layout = Layout.of_density(density)
    positions = layout.position(points, density.schedule.at(0).alpha)
    return over_chains(density.to_samples, chunk)(positions), positions


def next_increment(
    log_weights: Float[np.ndarray, " chains"],
    most: float,
    before: Float[np.ndarray, " chains"] | float = 0.0,
) -> float:
    """Return the greatest power of weights, at most ``most``, under which half of the
    chains count that have any weight.

    Args:
        log_weights: of the chains.
        most: the greatest power.
        before: log-weights that they have already.
    """
    possible = float(np.mean(np.isfinite(log_weights)))
    target = tuning.REWARD.counting * possible

    def enough(power: float) -> bool:
        return float(relative_ess(jnp.asarray(before + power * log_weights))) >= target

    if enough(most):
        return most
    low = 0.0
    high = most
    for _ in range(30):
        middle = 0.5 * (low + high)
        if enough(middle):
            low = middle
        else:
            high = middle
    return max(low, most * 1e-3)


class GlobalMover:
    """Moves of a population across modes, one at a time: by `Renoising`, with the rungs
    where they turn adapted to what was accepted there; or by draws from mixtures that
    are fitted to its halves, as `GlobalMoves` makes them, where these renew more of a
    chain. Mixtures move all sites, so there are none where static sites are
    ``frozen``."""

    def __init__(self, population: Population, frozen: bool = False):
        points = np.asarray(population.points)
        self.population = population
        # Rates along a way up lack the growth of exponents that only weighted chains
        # carry: constant ones lead to the same level 0.
        self.density = population.density.untracked()
        self.ladder, self.share = ladder_of(points, self.density)
        self.tried = np.ones(len(self.share))
        self.accepted = np.ones(len(self.share))
        self.waiting: list[int] = []
        self.states: KernelState = _evaluated(
            self.density, self.ladder, population.points, population.chunk
        )
        population.evaluations += 1 + self.ladder.piloted
        self.renewed = np.zeros(len(population), bool)
        suited = GlobalMoves.suits(self.density, len(population))
        self.fits_mixtures = suited and not frozen
        self.mixtures: GaussianMixture | None = None
        self.draws = np.zeros(len(population), int)
        self.mixtures_tried = 1.0
        self.mixtures_accepted = 1.0

    def choose(self, chosen: Int[np.ndarray, " chains"]) -> None:
        """Follow a resampling: chains start anew."""
        self.states = jax.tree.map(lambda leaf: leaf[chosen], self.states)
        self.renewed = np.zeros(len(chosen), bool)
        self.mixtures = None
        self.draws = np.zeros(len(chosen), int)
        # What was accepted under smaller exponents counts half.
        self.tried = 1 + 0.5 * (self.tried - 1)
        self.accepted = 1 + 0.5 * (self.accepted - 1)
        self.mixtures_tried = 1 + 0.5 * (self.mixtures_tried - 1)
        self.mixtures_accepted = 1 + 0.5 * (self.mixtures_accepted - 1)
        self.waiting = []

    def next_turn(self) -> int:
        """Return the rung where the next move turns."""
        if not self.waiting:
            rates = self.accepted / self.tried
            turns = chosen_turns(self.share, rates, tuning.REWARD.moves)
            self.waiting = turns.tolist()
        return self.waiting.pop()

    def mixtures_renew_more(self) -> bool:
        """Return whether a draw from fitted mixtures, which renews all of a chain, is
        expected to renew more than a move up to a rung and down again."""
        if not self.fits_mixtures:
            return False
        gains = self.share * self.accepted / self.tried
        # Rungs are chosen in proportion to their gains.
        expected = np.sum(gains**2) / max(np.sum(gains), 1e-30)
        return bool(self.mixtures_accepted / self.mixtures_tried >= expected)

    def move(self, log_gain: LogGain) -> tuple[Bool[np.ndarray, " chains"], float]:
        """Propose to all chains, and accept by the ratio of the density and what is
        added to it.

        Args:
            log_gain: takes the proposals; returns what the added factors add to the
                log-ratio.

        Returns:
            Which chains moved, and the mean acceptance.
        """
        if self.mixtures_renew_more():
            fitted = self.fitted()
            if fitted is not None:
                return self.move_by_mixtures(fitted, log_gain)
        return self.move_by_noise(log_gain)

    def fitted(self) -> GaussianMixture | None:
        """Return the mixtures of each half of the chains, fitted once after each
        resampling; None where too few chains are finite."""
        if self.mixtures is None:
            points = np.asarray(self.states.position)
            fitted = GlobalMoves().adapt(points, self.density)
            if fitted is None:
                self.fits_mixtures = False
                return None
            # A factor that comes in stage by stage moves chains into the tails of what
            # was fitted, where few were.
            self.mixtures = fitted.with_tails(tuning.REWARD.tails)
        return self.mixtures

    def move_by_mixtures(
        self, fitted: GaussianMixture, log_gain: LogGain
    ) -> tuple[Bool[np.ndarray, " chains"], float]:
        """Propose draws from the mixture that is fitted to the other half."""
        population = self.population
        words = population.random_words()
        second = np.arange(len(population)) >= len(population) // 2
        proposed, log_ratio = _drawn(
            self.density,
            self.ladder,
            fitted,
            words,
            self.states,
            jnp.asarray(second, int),
            population.chunk,
        )
        population.evaluations += 1
        moved, mean = self.decide(words, proposed, log_ratio, log_gain)
        # A fit repeats the errors of the chains that it was fitted to, of which each
        # accepted draw takes away about half.
        self.draws += moved
        self.renewed |= self.draws >= tuning.REWARD.draws
        self.mixtures_tried += 1
        self.mixtures_accepted += mean
        return moved, mean

    def move_by_noise(
        self, log_gain: LogGain
    ) -> tuple[Bool[np.ndarray, " chains"], float]:
        """Propose to go up to a rung and down again."""
        population = self.population
        turn = self.next_turn()
        words = population.random_words()
        proposed, log_ratio = _proposed(
            self.density,
            self.ladder,
            words,
            self.states,
            jnp.int32(turn),
            population.chunk,
        )
        population.evaluations += 2 * turn
        moved, mean = self.decide(words, proposed, log_ratio, log_gain)
        # A move tells of turns nearby too: as many rungs have never been tried.
        nearby = np.exp(-0.5 * np.abs(np.arange(len(self.share)) - turn))
        self.tried += nearby
        self.accepted += nearby * mean
        if float(self.ladder.renews[turn]) > 0:
            self.renewed |= moved
        return moved, mean

    def decide(
        self, words: Array, proposed: KernelState, log_ratio: Array, log_gain: LogGain
    ) -> tuple[Bool[np.ndarray, " chains"], float]:
        """Accept or reject a proposal of each chain."""
        gain = jnp.asarray(log_gain(proposed), log_ratio.dtype)
        self.states, accepted, mean = decided(
            words, proposed, self.states, log_ratio + gain
        )
        self.population.points = self.states.position
        return np.asarray(accepted), float(mean)


@eqx.filter_jit
def _evaluated(
    density: AnnealedDensity, ladder: Ladder, points: Array, chunk: int | None
) -> KernelState:
    renoising = Renoising(density, Layout.of_density(density), ladder)
    return over_chains(renoising.state, chunk)(points)


@eqx.filter_jit
def _proposed(
    density: AnnealedDensity,
    ladder: Ladder,
    words: Array,
    states: KernelState,
    turn: Array,
    chunk: int | None,
) -> tuple[KernelState, Array]:
    renoising = Renoising(density, Layout.of_density(density), ladder)
    propose = partial(renoising.propose, turn=turn)
    return over_chains(propose, chunk)(words, states)


@eqx.filter_jit
def _drawn(
    density: AnnealedDensity,
    ladder: Ladder,
    fitted: GaussianMixture,
    words: Array,
    states: KernelState,
    halves: Array,
    chunk: int | None,
) -> tuple[KernelState, Array]:
    renoising = Renoising(density, Layout.of_density(density), ladder)

    def of_chain(
        words: Array, state: KernelState, half: Array
    ) -> tuple[KernelState, Array]:
        mixture = jax.tree.map(lambda leaf: leaf[half], fitted)
        noise = normals(words, 0, len(state.position) + 1, state.position.dtype)
        proposed = renoising.state(mixture.draw(noise).astype(noise.dtype))
        log_q_there = mixture.log_prob(proposed.position)
        log_q_here = mixture.log_prob(state.position)
        log_ratio = log_density_ratio(proposed, state)
        return proposed, log_ratio + log_q_here - log_q_there

    return over_chains(of_chain, chunk)(words, states, halves)


@eqx.filter_jit
def decided(
    words: Array, proposed: KernelState, states: KernelState, log_ratio: Array
) -> tuple[KernelState, Array, Array]:
    """Accept or reject the proposals of all chains; return the states, which chains
    moved, and the mean acceptance."""
    states, info = jax.vmap(accept)(words, proposed, states, log_ratio)
    return states, info.accepted, jnp.mean(info.acceptance)
