r"""The sampler of tokens under uniform noise: τ-leaping with weights, and Metropolis
tests of single tokens.

From a level to the cleaner one below, every position i draws its token v anew, all of
them at once, in proportion to

    F(x, with v at i under the noise below)/F(x) · K(x_i | v),

with K the kernel that noises the level below to the one above. Of a single model this
is its own reverse kernel of one position. The chain's weight gains

    F_below(x')/F_above(x) · Π K(x_i | x'_i)/q(x'_i | x),

so that the weighted chains have the density F at each level. A closed form has values
of F at both ends. A network has ratios alone: its log f grows by Bayes' identity,
log f'(x') − log f(x) = Σ_i log B_i(x'_i | x) − log K(x_i | x'_i), with its own reverse
kernels B_i of single positions. What these leave out vanishes with the levels'
distance.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, UInt32

from composeprob import tuning
from composeprob.arguments import check_count
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.categorical import (
    Logs,
    NoisedAnswer,
    NoisedLogs,
    UniformDensity,
)
from composeprob.kernels import mean_acceptance
from composeprob.kernels.gibbs import replaced
from composeprob.pytree import where
from composeprob.samplers.finishers import Finisher
from composeprob.samplers.population import reweighted
from composeprob.samplers.random import Stream, categorical, uniforms
from composeprob.samplers.resampling import Resampler
from composeprob.samplers.run import Run
from composeprob.samplers.sampler import DrawCost, Sampler, as_resampler
from composeprob.samplers.token_sampler import TokenSampler, current_logs, stream_of

NUMBERS = 3
"""Uniform numbers of a redraw: its position, its value, its test."""


class NoisyChain(eqx.Module):
    """One chain at a level of noise, with its evaluation.

    Attributes:
        position: the tokens.
        logs: log f of every row of each batch of factors.
        log_density: log F.
        rises: how much ``logs`` grow with another value at one position.
        onward: the same if that position alone has the noise of the level below.
    """

    position: Int[Array, " length"]
    logs: Logs
    log_density: Float[Array, ""]
    rises: NoisedLogs
    onward: NoisedLogs


class Leap(NamedTuple):
    """Tokens that a chain may go to.

    Attributes:
        tokens: these.
        logs: log f there, as far as it is known before the factors are evaluated.
        log_ratio: log-probability of the way back, less that of the way there.
        place: the position that a redraw changes.
    """

    tokens: Int[Array, " length"]
    logs: Logs
    log_ratio: Float[Array, ""]
    place: Int[Array, ""]


class LeapState(eqx.Module):
    """The state of the level in progress."""

    turn: Int[Array, ""]  # 0 for the leap to the level, then redraws
    accepted: Float[Array, " chains"]  # sum of the probabilities of redraws' tests


class Place(NamedTuple):
    """The levels around the phase in progress.

    Attributes:
        level: of the phase.
        above: the level before it; the same at the first visit.
        below: the one that follows; level 0 after level 0.
        first: True at the first visit.
        number: of the phase, which counts random numbers.
    """

    level: Int[Array, ""]
    above: Int[Array, ""]
    below: Int[Array, ""]
    first: Array
    number: Int[Array, ""]


Carry: TypeAlias = tuple[Run, LeapState]


@dataclasses.dataclass(eq=False)
class LeapPhases:
    """The phases of a level while they are traced: a leap to it, then redraws, around
    ONE place where the factors are evaluated.

    Args:
        density: of the program.
        rule: of resampling.
        between: the number of redraws at a level above 0.
        at_end: the same at level 0.
        leads: whether leaps lead to levels; if not, there are redraws at level 0 alone,
            for draws.
    """

    density: UniformDensity
    rule: Resampler
    between: int
    at_end: int
    leads: bool = True

    def __post_init__(self) -> None:
        self.tokens = self.density.tokens
        self.kept = jnp.asarray(self.density.schedule.kept)
        given = self.tokens.given
        self.num_free = jnp.sum(~given, dtype=jnp.int32)
        self.free_first = jnp.argsort(given)
        self.sizes = self.tokens.sizes

    # The loop

    def blank(self, run: Run) -> LeapState:
        """Return the state of a level that has not begun."""
        return LeapState(jnp.int32(0), jnp.zeros(len(run.words)))

    def phase(self, carry: Carry) -> Carry:
        """Run one phase: choose tokens, evaluate the factors there, go there or not."""
        run, state = carry
        place = self.place(run, state)
        words = stream_of(run, self.leads)
        leaps = self.leads & (state.turn == 0)

        def leapt() -> Leap:
            return run.spread.map(partial(self.leap, place), words, run.chains)

        def redrawn() -> Leap:
            return run.spread.map(partial(self.redraw, place), words, run.chains)

        proposals = jax.lax.cond(leaps, leapt, redrawn)
        # The only place where the loop evaluates factors.
        answers = run.spread.map(partial(self.evaluate, place), proposals)
        run, state = jax.lax.cond(
            leaps,
            self.arrived,
            self.tested,
            place,
            run,
            state,
            words,
            proposals,
            answers,
        )
        return self.onwards(run, state, place.level)

    def place(self, run: Run, state: LeapState) -> Place:
        """Return the levels around a phase."""
        zero = jnp.int32(0)
        if not self.leads:
            return Place(zero, zero, zero, jnp.asarray(False), state.turn)
        level, above = run.visits.now
        order = run.visits.order
        below = order.at[run.visits.made + 1].get(mode="fill", fill_value=0)
        first = run.visits.made == 0
        most = 1 + max(self.between, self.at_end)
        number = level * most + state.turn
        return Place(level, above, below, first, number)

    def onwards(self, run: Run, state: LeapState, level: Array) -> Carry:
        """Return the run before the next phase, which may be that of another level."""
        turn = state.turn + 1
        state = dataclasses.replace(state, turn=turn)
        if not self.leads:
            return run, state
        redraws = jnp.where(level == 0, self.at_end, self.between)

        def leave() -> Carry:
            share = state.accepted / jnp.maximum(redraws, 1)
            mean = mean_acceptance(share, run.spread.total, len(run.ancestors))
            mean = jnp.where(redraws > 0, mean, jnp.nan)
            records = run.records.at(level, acceptance=mean[None])
            visits = run.visits.onwards(self.density.schedule, records)
            after = dataclasses.replace(run, records=records, visits=visits)
            return after, self.blank(run)

        return jax.lax.cond(turn > redraws, leave, lambda: (run, state))

    def evaluate(self, place: Place, proposal: Leap) -> NoisedAnswer:
        """Evaluate every factor once."""
        return self.tokens.noised(proposal.tokens, place.level, place.below)

    # Leaps

    def leap(self, place: Place, words: UInt32[Array, " 2"], chain: NoisyChain) -> Leap:
        """Draw every token of a chain for the next level; at the first level leave the
        chain where it began, with probability 1/V for each token that is not given."""
        tokens = chain.position
        noising = self.log_noising(place, tokens)
        values = self.log_values(chain, chain.onward) + noising
        u = uniforms(words, place.number, len(tokens))
        drawn, log_probs = jax.vmap(categorical)(u, values)
        positions = jnp.arange(len(tokens))
        logs = tuple(
            log + jnp.sum(onward[:, positions, drawn], axis=1)
            for log, onward in zip(chain.logs, chain.onward, strict=True)
        )
        back = noising[positions, drawn]
        leap = Leap(drawn, logs, jnp.sum(back - log_probs), jnp.int32(-1))
        uniform = jnp.sum(jnp.where(self.tokens.given, 0.0, jnp.log(self.sizes)))
        stay = Leap(tokens, chain.logs, uniform, jnp.int32(-1))
        leapt: Leap = where(place.first, stay, leap)
        return leapt

    def log_noising(
        self, place: Place, tokens: Int[Array, " length"]
    ) -> Float[Array, "length values"]:
        """log K(x_i | v): of the tokens at the level above, given values below. A given
        token is never noised."""
        kept = self.kept[place.above] / self.kept[place.level]
        number = self.tokens.allowed.shape[1]
        own = jnp.arange(number) == tokens[:, None]
        log_k = jnp.log(jnp.where(own, kept, 0.0) + (1 - kept) / self.sizes[:, None])
        return jnp.where(self.tokens.given[:, None], 0.0, log_k)

    def log_values(
        self, chain: NoisyChain, growth: NoisedLogs
    ) -> Float[Array, "length values"]:
        """log F with every value at every position, less that of the chain."""
        by_position = tuple(jnp.moveaxis(rows, 1, 0) for rows in growth)
        of_position = partial(self._log_values, chain)
        return jax.vmap(of_position)(by_position, self.tokens.allowed)

    def arrived(
        self,
        place: Place,
        run: Run,
        state: LeapState,
        words: UInt32[Array, "chains 2"],
        proposals: Leap,
        answers: NoisedAnswer,
    ) -> Carry:
        """Weight every chain for its leap, and resample the chains."""

        def arrive(
            chain: NoisyChain, leap: Leap, answer: NoisedAnswer
        ) -> tuple[NoisyChain, Float[Array, ""]]:
            top = current_logs(answer.bases, answer.at_top)
            logs = where(place.first, top, current_logs(answer.bases, leap.logs))
            there = self.evaluated(leap.tokens, logs, answer)
            gain = there.log_density - chain.log_density + leap.log_ratio
            nowhere = jnp.isneginf(there.log_density) | jnp.isneginf(chain.log_density)
            return there, jnp.where(nowhere, -jnp.inf, gain)

        chains, gain = run.spread.map(arrive, run.chains, proposals, answers)
        run = dataclasses.replace(run, chains=chains)
        zero = jnp.zeros_like(gain)
        return reweighted(run, self.rule, place.level, gain, zero, zero), state

    def evaluated(self, tokens: Array, logs: Logs, answer: NoisedAnswer) -> NoisyChain:
        """Return the chain at tokens where the factors were evaluated."""
        log_density = self.tokens.log_density(logs)
        return NoisyChain(tokens, logs, log_density, answer.rises, answer.onward)

    # Redraws

    def redraw(
        self, place: Place, words: UInt32[Array, " 2"], chain: NoisyChain
    ) -> Leap:
        """Draw one token of a chain anew given all others."""
        u = uniforms(words, place.number, NUMBERS)
        chosen = jnp.floor(u[0] * self.num_free).astype(jnp.int32)
        chosen = jnp.clip(chosen, 0, jnp.maximum(self.num_free - 1, 0))
        i = self.free_first[chosen].astype(jnp.int32)
        rises = tuple(rows[:, i] for rows in chain.rises)
        values = self.log_values_at(chain, rises, i)
        value, log_prob = categorical(u[1], values)
        # Half of the growth as it is seen from here; the other half as from there.
        logs = tuple(
            log + 0.5 * rise[:, value]
            for log, rise in zip(chain.logs, rises, strict=True)
        )
        return Leap(chain.position.at[i].set(value), logs, -log_prob, i)

    def log_values_at(
        self, chain: NoisyChain, rises: tuple[Array, ...], i: Int[Array, ""]
    ) -> Float[Array, " values"]:
        """log F with every value at one position, less that of the chain."""
        return self._log_values(chain, rises, self.tokens.allowed[i])

    def _log_values(
        self,
        chain: NoisyChain,
        growth: tuple[Float[Array, "rows values"], ...],
        allowed: Float[Array, " values"],
    ) -> Float[Array, " values"]:
        """log F by the growth of log f with each value, less that of the chain."""

        def with_value(rows: tuple[Float[Array, " rows"], ...]) -> Array:
            return self.tokens.log_density(jax.tree.map(jnp.add, chain.logs, rows))

        values = jax.vmap(with_value)(tuple(rows.T for rows in growth)) + allowed
        here = chain.log_density
        return values - jnp.where(jnp.isfinite(here), here, 0.0)

    def tested(
        self,
        place: Place,
        run: Run,
        state: LeapState,
        words: UInt32[Array, "chains 2"],
        proposals: Leap,
        answers: NoisedAnswer,
    ) -> Carry:
        """Accept the redraw of every chain or not."""

        def test(
            words: Array, chain: NoisyChain, leap: Leap, answer: NoisedAnswer
        ) -> tuple[NoisyChain, Float[Array, ""]]:
            i = leap.place
            old = chain.position[i]
            rises = tuple(rows[:, i] for rows in answer.rises)
            tracked = tuple(
                log - 0.5 * rise[:, old]
                for log, rise in zip(leap.logs, rises, strict=True)
            )
            logs = current_logs(answer.bases, tracked)
            there = self.evaluated(leap.tokens, logs, answer)
            values = self.log_values_at(there, rises, i)
            back = values[old] - jax.nn.logsumexp(values)
            log_ratio = there.log_density - chain.log_density + back + leap.log_ratio
            probability = jnp.minimum(jnp.exp(log_ratio), 1.0)
            probability = jnp.where(jnp.isnan(log_ratio), 0.0, probability)
            u = uniforms(words, place.number, NUMBERS)[2]
            movable = jnp.isfinite(chain.log_density) & jnp.isfinite(there.log_density)
            movable &= self.num_free > 0
            return where((u < probability) & movable, there, chain), probability

        chains, probability = run.spread.map(
            test, words, run.chains, proposals, answers
        )
        state = dataclasses.replace(state, accepted=state.accepted + probability)
        return dataclasses.replace(run, chains=chains), state


class LeapPlan(NamedTuple):
    """The phases of a sampler that is prepared for a density.

    Attributes:
        between: redraws at a level above 0.
        at_end: redraws at level 0.
        drawing: redraws between draws.
        num_levels: the number of levels.
        tracked: True if a factor's log f is known by its growth alone.
    """

    between: int
    at_end: int
    drawing: int
    num_levels: int
    tracked: bool


class TauLeaping(TokenSampler):
    r"""τ-leaping with weights: the sampler of programs of tokens under uniform noise.

    Chains begin with uniform tokens. From level to level every token is drawn anew at
    once, from the program's reverse kernel of single positions, and the chain is
    weighted by

    $$\frac{F'(x')}{F(x)} \prod_i \frac{K(x_i \mid x'_i)}{q(x'_i \mid x)},$$

    with F' and F the program's densities at the two levels, K the noising kernel and q
    the law of the draw. So the chains have the program's density at each level, and the
    mean weight is its normaliser. Then chains are resampled, and single tokens drawn
    anew, with a Metropolis test of the composed ratios at both ends; where log f is
    known this is a Gibbs move.

    Where a factor is a network, which knows ratios of densities alone, its log f is
    carried along each path by Bayes' identity with its reverse kernels of single
    positions. This has an error that vanishes with the levels' distance;
    ``result.log_evidence_error`` includes it, by weights over every other level.

    Each leap and each redraw evaluates every factor once.

    Args:
        redraws: redraws of each chain at each level.
        passes: passes at level 0, each of a redraw for every token.
        resample: a `Resampler`, or the threshold of the relative effective sample size.
        check_levels: whether weights are computed once more over every other level,
            where a factor is a network.
        then: moves of many tokens at once at level 0, `Renoise`.

    References:
        Lou, Meng and Ermon 2024, *Discrete diffusion modeling by estimating the ratios
        of the data distribution*, for the step (Tweedie τ-leaping); Del Moral, Doucet
        and Jasra 2006, *Sequential Monte Carlo samplers*, for the weights.

    Example:
        >>> import composeprob as cp
        >>> cp.TauLeaping(redraws=1)
        TauLeaping(1 redraws a level, 4 passes at level 0, resample=0.5)
    """

    redraws: int = eqx.field(static=True, default=tuning.LEAPS.redraws)
    passes: int = eqx.field(static=True, default=tuning.LEAPS.passes)

    # Resolved by `prepare`.
    plan: LeapPlan = eqx.field(static=True, default=None)

    def __init__(
        self,
        redraws: int = tuning.LEAPS.redraws,
        passes: int = tuning.LEAPS.passes,
        resample: float | Resampler = 0.5,
        check_levels: bool = True,
        then: Finisher | tuple[Finisher, ...] = (),
    ):
        super().__init__(
            exchange=as_resampler(resample),
            finishers=self.finishers_of_tokens(then),
            check_levels=bool(check_levels),
        )
        self.redraws = check_count(redraws, "redraws", least=0)
        self.passes = check_count(passes, "passes", least=0)

    @property
    def requires(self) -> dict[str, frozenset[str]]:
        return {"TauLeaping": frozenset({"uniform_noise"})}

    @property
    def check_order(self) -> int | None:
        if not (self.check_levels and self.plan is not None and self.plan.tracked):
            return None
        return 1

    def prepare(self, density: AnnealedDensity) -> Sampler:
        density = _uniform(density)
        free = density.length - int(np.sum(density.tokens.given))
        between = 0
        if free:
            between = self.redraws
        plan = LeapPlan(
            between,
            self.passes * free,
            max(free, 1),
            density.num_levels,
            not density.one_joint,
        )
        return replaced(self, plan=plan)

    def evaluations(self, completed: int) -> int:
        evaluations = completed * (1 + self.plan.between)
        if completed == self.plan.num_levels:
            evaluations += self.plan.at_end - self.plan.between
        return evaluations

    def proposals(self) -> int:
        return 1 + self.plan.between

    @property
    def drawing(self) -> DrawCost:
        number = self.plan.drawing
        return DrawCost(number, proposals=number, settling=0)

    def start(self, run: Run, density: AnnealedDensity, level: int) -> Run:
        tokens = _uniform(density).tokens
        blank = tokens.blank()
        shape = tokens.allowed.shape

        def chain(words: UInt32[Array, " 2"]) -> NoisyChain:
            u = uniforms(words, Stream.INITIAL, shape[0])
            drawn = jnp.floor(u * tokens.sizes)
            drawn = jnp.minimum(drawn, tokens.sizes - 1).astype(jnp.int32)
            observed = jnp.argmax(tokens.allowed, axis=1).astype(jnp.int32)
            position = jnp.where(tokens.given, observed, drawn)
            growth = tuple(jnp.zeros((len(rows), *shape)) for rows in blank)
            return NoisyChain(position, blank, jnp.zeros(()), growth, growth)

        return dataclasses.replace(run, chains=run.spread.map(chain, run.words))

    def phases(self, density: AnnealedDensity, run: Run) -> LeapPhases:
        assert self.exchange is not None
        plan = self.plan
        return LeapPhases(_uniform(density), self.exchange, plan.between, plan.at_end)

    def phases_of_draws(self, density: AnnealedDensity) -> LeapPhases:
        assert self.exchange is not None
        return LeapPhases(_uniform(density), self.exchange, 0, 0, leads=False)

    def describe(self) -> str:
        return (
            f"TauLeaping({self.redraws} redraws a level, {self.passes} passes at level "
            f"0, resample={self.rule_in_words}{self.then_in_words})"
        )


def _uniform(density: AnnealedDensity) -> UniformDensity:
    """The density, which `TauLeaping.requires` has checked."""
    assert isinstance(density, UniformDensity)
    return density
