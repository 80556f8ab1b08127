"""The sampler of categorical sites: positions become visible one after another, with
weights, and visible ones are drawn anew.

A chain has an order σ, uniform at first, and tokens at the first positions of it. A
reveal takes the next position i = σ_s, evaluates F of what is visible with each value v
at i, draws v in proportion, and multiplies the chain's weight by

    z = Σ_v F(visible + v)/F(visible),

so that the weighted chains have the density F(x, σ) = Π_s Π_k q_k(x_{σ_s} |
x_{σ_<s})^{β_k} without any error of levels, and the mean weight is its integral at any
number of chains.

z is known before v is drawn. So chains are weighted and resampled first, and copies of
one chain draw values of their own. A network answers for all hidden positions j in the
same evaluation. The weights then look ahead: they are those of F(x, σ)·A(x), with

    A = z_i·Π_j z_j^γ

over the hidden positions j other than i. Once nothing is hidden A is 1, so the density
at level 0 is F for any γ.

At level 0 chains also make remask–Metropolis moves: the last positions A of the order
are hidden and drawn anew one after the other, in an order τ of their own, and the whole
is accepted with probability min(1, Π z(new)/Π z(old)).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from enum import IntEnum
from functools import partial
from typing import NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, UInt32

from composeprob import tuning
from composeprob.arguments import check_count
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.categorical import CategoricalDensity, Logs, Rises
from composeprob.errors import CapabilityError, InvalidValueError
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

NUMBERS = 4
"""Uniform numbers of a redraw: its direction, its place, its test, its value."""


class Kind(IntEnum):
    """Kinds of phases.

    A remask first takes the hidden positions away from the last on, which gives Π z of
    the old tokens, and then reveals others.
    """

    REVEAL = 0
    REDRAW = 1
    HIDE = 2
    REMASK = 3


class Turn(NamedTuple):
    """One phase of a level.

    Attributes:
        kind: of `Kind`.
        place: in the order, for phases of a remask.
        begins: True for the first phase of its kind in a remask.
        ends: True for the last one.
        size: the number of positions that a remask hides.
    """

    kind: Kind
    place: int = 0
    begins: bool = False
    ends: bool = False
    size: int = 0


def remask(length: int, size: int) -> list[Turn]:
    """Return the phases of a remask of the last ``size`` places of an order."""
    places = range(length - size, length)
    turns = []
    for kind, order in ((Kind.HIDE, places[::-1]), (Kind.REMASK, places)):
        for place in order:
            begins = place == order[0]
            turns.append(Turn(kind, place, begins, place == order[-1], size))
    return turns


class TokenChain(eqx.Module):
    """One chain.

    Attributes:
        position: the tokens; 0 at hidden positions.
        order: the positions in the order in which they become visible.
        logs: log f of what is visible, of every row of each batch of factors.
        log_density: log F of what is visible.
        last: how much ``logs`` grew with each value at the last visible position.
        ahead: log Π z_j^γ of the positions that are still hidden, which the chain's
            weight contains.
    """

    position: Int[Array, " length"]
    order: Int[Array, " length"]
    logs: Logs
    log_density: Float[Array, ""]
    last: tuple[Float[Array, "rows values"], ...]
    ahead: Float[Array, ""]


class Proposal(NamedTuple):
    """The order of a chain, and what the factors are asked: the arguments of
    `TokenEvaluator.extend`."""

    tokens: Int[Array, " length"]
    order: Int[Array, " length"]
    rank: Int[Array, " length"]
    time: Int[Array, ""]
    positions: Int[Array, " asked"]


class RevealState(eqx.Module):
    """The state of the level in progress."""

    turn: Int[Array, ""]  # the next row of the table of turns
    accepted: Float[Array, " chains"]  # sum of the probabilities of redraws' tests
    remasked: Float[Array, " chains"]  # and of those of remasks
    # Of a remask in progress: the chain without what is hidden, and Σ log z of the new
    # tokens less that of the old ones.
    trial: TokenChain
    log_ratio: Float[Array, " chains"]
    # True of chains that accepted a remask of all their positions.
    renewed: Bool[Array, " chains"]


class Now(NamedTuple):
    """The phase in progress.

    Attributes:
        level: of the run.
        step: the number of the level's reveal, from 0 on.
        number: of the phase, which counts random numbers.
        turn: the row of the table.
    """

    level: Int[Array, ""]
    step: Int[Array, ""]
    number: Int[Array, ""]
    turn: Turn


Carry: TypeAlias = tuple[Run, RevealState]
Propose: TypeAlias = Callable[[Now, Array, TokenChain, TokenChain], "Proposal"]
Answer: TypeAlias = tuple[tuple[Array | None, ...], Rises]


@dataclasses.dataclass(eq=False)
class RevealPhases:
    """The phases of a level while they are traced: a reveal, then redraws, around ONE
    place where the factors are evaluated.

    Args:
        density: of the program.
        rule: of resampling.
        between: the number of redraws at a level above 0.
        turns: all phases of level 0. Levels above it make the first of them, a reveal
            and ``between`` redraws.
        leads: whether reveals lead to levels; if not, the turns are made again and
            again at level 0, for draws.
        look_ahead: γ.
    """

    density: CategoricalDensity
    rule: Resampler
    between: int
    turns: list[Turn]
    leads: bool = True
    look_ahead: float = 0.0

    def __post_init__(self) -> None:
        density = self.density
        self.tokens = density.tokens
        # With one joint the order does not matter, and no redraw is rejected.
        self.tested = not density.one_joint
        kinds = [turn.kind for turn in self.turns]
        self.paths = self.tested and Kind.REDRAW in kinds
        self.table = jnp.asarray(np.array(self.turns, int), jnp.int32)
        self.redraws = kinds.count(Kind.REDRAW)
        self.remasks = sum(t.kind == Kind.REMASK and t.ends for t in self.turns)
        self.num_given = jnp.sum(self.tokens.given, dtype=jnp.int32)
        steps = np.asarray(density.steps)
        self.steps = jnp.asarray(steps, jnp.int32)
        counts = np.bincount(steps)
        self.ends = jnp.asarray(np.cumsum(counts), jnp.int32)
        # The places of each reveal, −1 where it has fewer than another.
        table = np.full((len(counts), counts.max()), -1)
        for step, count in enumerate(counts):
            table[step, :count] = np.flatnonzero(steps == step)
        self.places = jnp.asarray(table, jnp.int32)
        self.block = table.shape[1]
        self.looks_ahead = self.look_ahead > 0 and self.tokens.looks_ahead
        # Of positions that are drawn together the weights are known afterwards only.
        self.looks_ahead &= self.block == 1
        self.asked = self.block
        if self.looks_ahead:
            self.asked = len(steps)

    # The loop

    def blank(self, run: Run) -> RevealState:
        """Return the state of a level that has not begun."""
        zero = jnp.zeros(len(run.words))
        renewed = jnp.zeros(len(run.words), bool)
        return RevealState(jnp.int32(0), zero, zero, run.chains, zero, renewed)

    def phase(self, carry: Carry) -> Carry:
        """Run one phase: choose what is asked, evaluate the factors, act on the
        answer."""
        run, state = carry
        level = jnp.int32(0)
        if self.leads:
            level = run.visits.number
        row = Turn(*self.table[state.turn % len(self.turns)])
        number = state.turn
        if self.leads:
            number = level * len(self.turns) + state.turn
        now = Now(level, self.density.num_levels - 1 - level, number, row)
        words = stream_of(run, self.leads)
        proposes = [self.propose_reveal, self.propose_redraw]
        acts = [self.revealed, self.redrawn]
        if self.remasks:
            proposes += [self.propose_hidden, self.propose_remask]
            acts += [self.hidden, self.remasked]

        def proposing(propose: Propose) -> Callable[[], Proposal]:
            on_chain = partial(propose, now)
            return lambda: run.spread.map(on_chain, words, run.chains, state.trial)

        proposals = jax.lax.switch(row.kind, [proposing(p) for p in proposes])
        # The only place where the loop evaluates factors.
        answers = run.spread.map(self.evaluate, proposals)
        run, state = jax.lax.switch(
            row.kind, acts, now, run, state, words, proposals, answers
        )
        return self.onwards(run, state, level)

    def onwards(self, run: Run, state: RevealState, level: Array) -> Carry:
        """Return the run before the next phase, which may be that of another level."""
        turn = state.turn + 1
        state = dataclasses.replace(state, turn=turn)
        if not self.leads:
            return run, state
        at_end = level == 0
        total = jnp.where(at_end, len(self.turns), 1 + self.between)

        def mean(sums: Array, count: Array | int) -> Array:
            share = sums / jnp.maximum(count, 1)
            mean = mean_acceptance(share, run.spread.total, len(run.ancestors))
            return jnp.where(count > 0, mean, jnp.nan)

        def leave() -> Carry:
            records = run.records
            accepted = run.global_acceptance
            if self.tested:
                count = jnp.where(at_end, self.redraws, self.between)
                records = records.at(
                    level, acceptance=mean(state.accepted, count)[None]
                )
            if self.remasks:
                # Only at level 0 are there any.
                remasked = mean(state.remasked, self.remasks)
                accepted = jnp.where(at_end, remasked, accepted)
            visits = run.visits.onwards(self.density.schedule, records)
            after = dataclasses.replace(
                run, records=records, visits=visits, global_acceptance=accepted
            )
            return after, dataclasses.replace(self.blank(run), trial=state.trial)

        return jax.lax.cond(turn >= total, leave, lambda: (run, state))

    # What is asked

    def propose_reveal(
        self, now: Now, words: UInt32[Array, " 2"], chain: TokenChain, trial: TokenChain
    ) -> Proposal:
        """Ask about the next positions of a chain's order."""
        places = self.places[now.step]
        positions = jnp.where(places >= 0, chain.order[places], -1)
        rank = self.steps[inverse(chain.order)]
        time = now.step.astype(jnp.int32)
        if self.looks_ahead:
            places = now.step + jnp.arange(self.asked)
            hidden = chain.order[jnp.minimum(places, self.asked - 1)]
            positions = jnp.where(places < self.asked, hidden, -1)
            # Each hidden position sees the visible ones alone.
            rank = jnp.minimum(rank, time)
        return Proposal(chain.position, chain.order, rank, time, positions)

    def propose_redraw(
        self, now: Now, words: UInt32[Array, " 2"], chain: TokenChain, trial: TokenChain
    ) -> Proposal:
        """Move one visible position to the end of the order, and ask about it.

        Where the density depends on the order, half of the proposals move the last
        position to another place instead: so each is as probable as its reverse.
        """
        u = uniforms(words, now.number, NUMBERS)
        last = self.ends[now.step] - 1
        free = last + 1 - self.num_given
        place = self.num_given + jnp.floor(u[1] * free).astype(jnp.int32)
        place = jnp.clip(place, jnp.minimum(self.num_given, last), last)
        begin = place
        end = last
        if self.tested:
            back = u[0] < 0.5
            begin, end = where(back, (last, place), (place, last))
        order = moved(chain.order, begin, end)
        return self.one_position(chain.position, order, last)

    def propose_hidden(
        self, now: Now, words: UInt32[Array, " 2"], chain: TokenChain, trial: TokenChain
    ) -> Proposal:
        """Ask about the last position that a remask has not hidden yet."""
        order = trial.order
        if self.tested:
            order = jnp.where(now.turn.begins, chain.order, order)
        else:
            # Of one joint every order is as good: a new one chooses what is hidden.
            fresh = self.uniform_order(words, now.number)
            order = jnp.where(now.turn.begins, fresh, order)
        return self.one_position(chain.position, order, now.turn.place)

    def propose_remask(
        self, now: Now, words: UInt32[Array, " 2"], chain: TokenChain, trial: TokenChain
    ) -> Proposal:
        """Ask about the next position that a remask has hidden."""
        order = trial.order
        if self.tested:
            # What is hidden becomes visible in an order of its own.
            # The first numbers of the phase draw its token and make its test.
            number = self.block + NUMBERS + len(order)
            u = uniforms(words, now.number, number)[-len(order) :]
            places = jnp.arange(len(order))
            hidden = places >= now.turn.place
            shuffled = order[jnp.argsort(jnp.where(hidden, len(order) + u, places))]
            order = jnp.where(now.turn.begins, shuffled, order)
        return self.one_position(trial.position, order, now.turn.place)

    def one_position(self, tokens: Array, order: Array, place: Array | int) -> Proposal:
        """Ask about the position at a place of an order, given those before it."""
        positions = jnp.full(self.asked, -1).at[0].set(order[place])
        return Proposal(tokens, order, inverse(order), jnp.asarray(place), positions)

    def uniform_order(
        self, words: UInt32[Array, " 2"], number: Array | int
    ) -> Int[Array, " length"]:
        """Draw an order: given positions first, uniform among these and the others."""
        return uniform_order(words, number, self.tokens.given)

    def evaluate(self, proposal: Proposal) -> Answer:
        """Evaluate every factor once."""
        tokens, _, rank, time, positions = proposal
        return self.tokens.extend(tokens, rank, time, positions, self.paths, self.block)

    # What follows

    def revealed(
        self,
        now: Now,
        run: Run,
        state: RevealState,
        words: UInt32[Array, "chains 2"],
        proposals: Proposal,
        answers: Answer,
    ) -> Carry:
        """Reveal positions of every chain; weight the chains, and resample them."""
        reveal = partial(self._reveal, now.number)
        zero = jnp.zeros(len(words))
        if self.block > 1:
            chains, gain = run.spread.map(reveal, words, run.chains, proposals, answers)
            run = dataclasses.replace(run, chains=chains)
            return reweighted(run, self.rule, now.level, gain, zero, zero), state
        chains, gain = run.spread.map(self._weighed, run.chains, proposals, answers)
        # Copies of a chain share its answers, and draw values of their own.
        asked = dataclasses.replace(run, chains=(chains, proposals, answers))
        asked = reweighted(asked, self.rule, now.level, gain, zero, zero)
        chains, _ = run.spread.map(reveal, words, *asked.chains)
        return dataclasses.replace(asked, chains=chains), state

    def _weighed(
        self, chain: TokenChain, proposal: Proposal, answer: Answer
    ) -> tuple[TokenChain, Float[Array, ""]]:
        """Return one chain before a reveal, with what its weight says of positions that
        stay hidden, and its log-weight increment."""
        bases, rises = answer
        logs = current_logs(bases, chain.logs)
        before = self.tokens.log_density(logs)

        def log_z(
            position: Int[Array, ""], *rise: Float[Array, "rows values"]
        ) -> Float[Array, ""]:
            total = self.log_total(logs, rise, before, position)
            return jnp.where(position >= 0, total, 0.0)

        by_position = tuple(jnp.moveaxis(r, 1, 0) for r in rises)
        log_zs = jax.vmap(log_z)(proposal.positions, *by_position)
        ahead = jnp.zeros(())
        if self.looks_ahead:
            ahead = self.look_ahead * jnp.sum(log_zs[1:])
        # An energy may have a value where nothing is visible, which counts too.
        gain = log_zs[0] + before - chain.log_density + ahead - chain.ahead
        dead = jnp.isneginf(chain.log_density) | jnp.isneginf(chain.ahead)
        dead |= jnp.isneginf(before) | jnp.isneginf(log_zs[0]) | jnp.isneginf(ahead)
        gain = jnp.where(dead, -jnp.inf, gain)
        gain = jnp.where(gain < jnp.inf, gain, jnp.nan)
        return dataclasses.replace(chain, ahead=ahead), gain

    def _reveal(
        self,
        number: Array,
        words: UInt32[Array, " 2"],
        chain: TokenChain,
        proposal: Proposal,
        answer: Answer,
    ) -> tuple[TokenChain, Float[Array, ""]]:
        """Return one chain after a reveal, and its log-weight increment."""
        bases, rises = answer
        logs = current_logs(bases, chain.logs)
        before = self.tokens.log_density(logs)
        u = uniforms(words, number, max(self.block, NUMBERS))
        tokens = chain.position
        log_proposal = jnp.zeros(())
        grown = logs
        # The positions of a block are drawn independently of one another.
        for j in range(self.block):
            position = proposal.positions[j]
            asked = position >= 0
            rise = tuple(r[:, j] for r in rises)
            value, log_prob = self.drawn(u[j], logs, rise, before, position)
            log_proposal = log_proposal + jnp.where(asked, log_prob, 0.0)
            grown = tuple(
                jnp.where(asked, g + r[:, value], g)
                for g, r in zip(grown, rise, strict=True)
            )
            place = jnp.where(asked, position, len(tokens))
            tokens = tokens.at[place].set(value, mode="drop")
        log_density = self.tokens.log_density(grown)
        # log z, or of a block the sum of these.
        gain = log_density - chain.log_density - log_proposal
        nowhere = jnp.isneginf(log_density) | jnp.isneginf(chain.log_density)
        gain = jnp.where(nowhere | jnp.isneginf(log_proposal), -jnp.inf, gain)
        gain = jnp.where(gain < jnp.inf, gain, jnp.nan)
        dead = jnp.isneginf(gain)
        log_density = jnp.where(dead, -jnp.inf, log_density)
        last = tuple(r[:, 0] for r in rises)
        revealed = dataclasses.replace(
            chain, position=tokens, logs=grown, log_density=log_density, last=last
        )
        return revealed, gain

    def log_values(
        self,
        logs: Logs,
        rises: tuple[Float[Array, "rows values"], ...],
        before: Float[Array, ""],
        position: Int[Array, ""],
    ) -> Float[Array, " values"]:
        """log F of what is visible with each value of a position, less ``before``."""

        def with_value(rise: tuple[Float[Array, " rows"], ...]) -> Array:
            return self.tokens.log_density(jax.tree.map(jnp.add, logs, rise))

        by_value = tuple(r.T for r in rises)
        values = jax.vmap(with_value)(by_value) + self.tokens.allowed[position]
        return values - jnp.where(jnp.isfinite(before), before, 0.0)

    def log_total(
        self,
        logs: Logs,
        rises: tuple[Float[Array, "rows values"], ...],
        before: Float[Array, ""],
        position: Int[Array, ""],
    ) -> Float[Array, ""]:
        """log z of a position."""
        return jax.nn.logsumexp(self.log_values(logs, rises, before, position))

    def drawn(
        self,
        u: Float[Array, ""],
        logs: Logs,
        rises: tuple[Float[Array, "rows values"], ...],
        before: Float[Array, ""],
        position: Int[Array, ""],
    ) -> tuple[Int[Array, ""], Float[Array, ""]]:
        """Draw the value of a position in proportion to F; return it with its
        log-probability, −∞ where no value is possible."""
        return categorical(u, self.log_values(logs, rises, before, position))

    def redrawn(
        self,
        now: Now,
        run: Run,
        state: RevealState,
        words: UInt32[Array, "chains 2"],
        proposals: Proposal,
        answers: Answer,
    ) -> Carry:
        """Test the proposed order of every chain, and draw its last position anew."""
        redraw = partial(self._redraw, now.step, now.number)
        chains, probability = run.spread.map(
            redraw, words, run.chains, proposals, answers
        )
        accepted = state.accepted + probability
        state = dataclasses.replace(state, accepted=accepted)
        return dataclasses.replace(run, chains=chains), state

    def _redraw(
        self,
        step: Array,
        number: Array,
        words: UInt32[Array, " 2"],
        chain: TokenChain,
        proposal: Proposal,
        answer: Answer,
    ) -> tuple[TokenChain, Float[Array, ""]]:
        """Return one chain after a redraw, and the probability of its test.

        First (x, σ) goes to (x, σ') by a Metropolis test, then the last position of the
        order is drawn anew given all others: both leave F(x, σ) invariant. Of one
        joint F(x, σ') = F(x, σ), and this is a Gibbs move.
        """
        u = uniforms(words, number, NUMBERS)
        bases, rises = answer
        rise = tuple(r[:, 0] for r in rises)
        position = proposal.positions[0]
        value = chain.position[position]
        own = tuple(r[:, value] for r in rise)
        # A batch that does not know log f of the others is of one joint: it has the
        # chain's own log f, whichever position is the last.
        others = current_logs(bases, jax.tree.map(jnp.subtract, chain.logs, own))
        logs = jax.tree.map(jnp.add, others, own)
        log_density = self.tokens.log_density(logs)
        probability = jnp.ones(())
        if self.tested:
            log_ratio = log_density - chain.log_density
            probability = jnp.where(jnp.isnan(log_ratio), 0.0, jnp.exp(log_ratio))
            probability = jnp.minimum(probability, 1.0)
        proposed = dataclasses.replace(
            chain, order=proposal.order, logs=logs, log_density=log_density, last=rise
        )
        there: TokenChain = where(u[2] < probability, proposed, chain)

        last = there.order[self.ends[step] - 1]
        old = there.position[last]
        without = tuple(
            log - r[:, old] for log, r in zip(there.logs, there.last, strict=True)
        )
        before = self.tokens.log_density(without)
        new, _ = self.drawn(u[3], without, there.last, before, last)
        grown = tuple(
            log + r[:, new] for log, r in zip(without, there.last, strict=True)
        )
        redrawn = dataclasses.replace(
            there,
            position=there.position.at[last].set(new),
            logs=grown,
            log_density=self.tokens.log_density(grown),
        )
        # Chains without weight stay as they are, and so do those of given tokens alone.
        movable = jnp.isfinite(chain.log_density) & jnp.isfinite(redrawn.log_density)
        movable &= self.ends[step] > self.num_given
        return where(movable, redrawn, chain), probability

    def hidden(
        self,
        now: Now,
        run: Run,
        state: RevealState,
        words: UInt32[Array, "chains 2"],
        proposals: Proposal,
        answers: Answer,
    ) -> Carry:
        """Hide one more position of every chain's trial, and divide by its z."""

        def hide(
            chain: TokenChain, trial: TokenChain, proposal: Proposal, answer: Answer
        ) -> tuple[TokenChain, Float[Array, ""]]:
            bases, rises = answer
            begins = jnp.asarray(now.turn.begins, bool)
            logs = where(begins, chain.logs, trial.logs)
            rise = tuple(r[:, 0] for r in rises)
            value = chain.position[proposal.positions[0]]
            own = tuple(r[:, value] for r in rise)
            logs = current_logs(bases, jax.tree.map(jnp.subtract, logs, own))
            log_density = self.tokens.log_density(logs)
            log_z = self.log_total(logs, rise, log_density, proposal.positions[0])
            trial = dataclasses.replace(
                chain, order=proposal.order, logs=logs, log_density=log_density
            )
            return trial, log_z

        trial, log_z = run.spread.map(hide, run.chains, state.trial, proposals, answers)
        log_ratio = jnp.where(now.turn.begins, 0.0, state.log_ratio) - log_z
        return run, dataclasses.replace(state, trial=trial, log_ratio=log_ratio)

    def remasked(
        self,
        now: Now,
        run: Run,
        state: RevealState,
        words: UInt32[Array, "chains 2"],
        proposals: Proposal,
        answers: Answer,
    ) -> Carry:
        """Reveal one more position of every chain's trial, multiply by its z, and after
        the last one accept the trial or not."""

        def reveal(
            words: Array, trial: TokenChain, proposal: Proposal, answer: Answer
        ) -> tuple[TokenChain, Float[Array, ""]]:
            trial = dataclasses.replace(trial, order=proposal.order)
            return self._reveal(now.number, words, trial, proposal, answer)

        trial, log_z = run.spread.map(reveal, words, state.trial, proposals, answers)
        log_ratio = state.log_ratio + log_z

        def accept(
            words: Array, chain: TokenChain, trial: TokenChain, log_ratio: Array
        ) -> tuple[TokenChain, Float[Array, ""], Bool[Array, ""]]:
            # The numbers before it drew the token.
            u = uniforms(words, now.number, NUMBERS)[-1]
            probability = jnp.where(
                jnp.isnan(log_ratio), 0.0, jnp.minimum(jnp.exp(log_ratio), 1.0)
            )
            probability = jnp.where(now.turn.ends, probability, 0.0)
            movable = jnp.isfinite(chain.log_density) & jnp.isfinite(trial.log_density)
            accepted = (u < probability) & movable
            whole = now.turn.size == len(chain.position) - self.num_given
            return where(accepted, trial, chain), probability, accepted & whole

        chains, probability, renewed = run.spread.map(
            accept, words, run.chains, trial, log_ratio
        )
        state = dataclasses.replace(
            state,
            trial=trial,
            log_ratio=log_ratio,
            remasked=state.remasked + probability,
            renewed=state.renewed | renewed,
        )
        return dataclasses.replace(run, chains=chains), state


def uniform_order(
    words: UInt32[Array, " 2"], number: Array | int, given: Bool[Array, " length"]
) -> Int[Array, " length"]:
    """Draw an order: given positions first, uniform among these and the others."""
    u = uniforms(words, number, len(given))
    return jnp.argsort(u + ~given).astype(jnp.int32)


def inverse(order: Int[Array, " length"]) -> Int[Array, " length"]:
    """Return the place of each position in an order."""
    length = len(order)
    return jnp.zeros_like(order).at[order].set(jnp.arange(length, dtype=order.dtype))


def moved(
    order: Int[Array, " length"], begin: Int[Array, ""], end: Int[Array, ""]
) -> Int[Array, " length"]:
    """Return the order with the position at one place moved to another."""
    places = jnp.arange(len(order))
    # Those between the two places make room.
    left = (places >= begin) & (places < end)
    right = (places > end) & (places <= begin)
    source = jnp.where(left, places + 1, jnp.where(right, places - 1, places))
    source = jnp.where(places == end, begin, source)
    return order[source]


class RevealPlan(NamedTuple):
    """The phases of a sampler that is prepared for a density.

    Attributes:
        between: redraws at a level above 0.
        turns: the phases of level 0.
        drawing: the phases of a transition between draws.
        num_levels: the number of reveals.
        cost: evaluations that one of paths takes.
    """

    between: int
    turns: tuple[Turn, ...]
    drawing: tuple[Turn, ...]
    num_levels: int
    cost: int


class Reveal(TokenSampler):
    r"""Reveals of categorical sites with weights: the sampler of programs of tokens.

    At each level one more position of every chain becomes visible, or a block of
    positions where ``cp.infer(levels=)`` asks for fewer reveals. A chain draws the new
    token in proportion to the program's density and is weighted by

    $$z = \sum_v \prod_k q_k(v \mid x_{\text{visible}})^{\beta_k},$$

    which leaves no error of levels: means of weights are unbiased at any number of
    chains. Networks know z of every hidden position from the same evaluation. Weights
    contain the power ``look_ahead`` of these until their positions become visible, so
    that chains are resampled by what follows too.

    Between reveals visible tokens are drawn anew. Such a redraw hides one position,
    moves it to the end of the chain's order and draws it given all others. If all
    conditionals come from one joint distribution (``one_joint``) this is a Gibbs move.
    Otherwise a Metropolis test decides about the order, so that the density of tokens
    and orders stays exact. At level 0 a remask hides several positions, draws them one
    after the other, and accepts all of it with probability min(1, Π z(new)/Π z(old)).

    Each reveal and each redraw evaluates every factor once. A network with
    ``mask="boolean"`` that is not of one joint has to be evaluated for every place of
    the order in a redraw, and at each reveal between redraws.

    Args:
        redraws: redraws of each chain after each reveal.
        passes: passes at level 0, each of a redraw for every token and a remask: of all
            of them, in the next pass of half as many, and so on.
        resample: a `Resampler`, or the threshold of the relative effective sample size.
        look_ahead: the power of the normalisers z of hidden positions in the weights,
            from 0 to 1. Factors other than networks know nothing of these.
        then: moves at level 0, `Renoise`: further remasks, whose sizes adapt to
            acceptance.

    References:
        Del Moral, Doucet and Jasra 2006, *Sequential Monte Carlo samplers*; Pitt and
        Shephard 1999, *Filtering via simulation: auxiliary particle filters*; Hoogeboom
        et al. 2022, *Autoregressive diffusion models*.

    Example:
        >>> import composeprob as cp
        >>> cp.Reveal(redraws=2)
        Reveal(2 redraws a level, 4 passes at level 0, resample=0.5)
    """

    redraws: int = eqx.field(static=True, default=tuning.REVEALS.redraws)
    passes: int = eqx.field(static=True, default=tuning.REVEALS.passes)
    look_ahead: float = eqx.field(static=True, default=tuning.REVEALS.look_ahead)

    # Resolved by `prepare`.
    plan: RevealPlan = eqx.field(static=True, default=None)

    def __init__(
        self,
        redraws: int = tuning.REVEALS.redraws,
        passes: int = tuning.REVEALS.passes,
        resample: float | Resampler = 0.5,
        look_ahead: float = tuning.REVEALS.look_ahead,
        then: Finisher | tuple[Finisher, ...] = (),
    ):
        finishers = self.finishers_of_tokens(then)
        super().__init__(exchange=as_resampler(resample), finishers=finishers)
        self.redraws = check_count(redraws, "redraws", least=0)
        self.passes = check_count(passes, "passes", least=0)
        if not 0 <= look_ahead <= 1:
            raise InvalidValueError(
                f"look_ahead is a power from 0 to 1; got {look_ahead!r}.",
                fix="pass look_ahead=0.5, or 0 for weights of what is visible alone.",
            )
        self.look_ahead = float(look_ahead)

    @property
    def requires(self) -> dict[str, frozenset[str]]:
        return {"Reveal": frozenset({"categorical"})}

    def prepare(self, density: AnnealedDensity) -> Sampler:
        density = _categorical(density)
        if density.in_blocks and not density.one_joint and self.redraws + self.passes:
            raise CapabilityError(
                "Redraws of single tokens would leave the model as it is drawn in "
                "blocks, whose order matters.",
                where=density.described.where,
                fix="use cp.Reveal(redraws=0, passes=0), or leave levels= out.",
            )
        # Of a block the potentials are known before the next reveal only.
        between = 0 if density.in_blocks else self.redraws
        free = density.length - int(np.sum(density.tokens.given))
        drawing: list[Turn] = []
        passes: list[Turn] = []
        number = self.passes if free else 0
        for i in range(number):
            drawing = self.one_pass(density.length, free, i)
            passes += drawing
        turns = [Turn(Kind.REVEAL), *[Turn(Kind.REDRAW)] * between, *passes]
        # Between draws the longest remask is made.
        drawing = self.one_pass(density.length, free, 0)
        redraws = any(turn.kind == Kind.REDRAW for turn in (*turns, *drawing))
        cost = 1
        if not density.one_joint and redraws:
            cost = density.tokens.path_evaluations
        plan = RevealPlan(
            between, tuple(turns), tuple(drawing), density.num_levels, cost
        )
        return replaced(self, plan=plan)

    def one_pass(self, length: int, free: int, number: int) -> list[Turn]:
        """Return the phases of a pass: a redraw for each position that is not given,
        and a remask of all of them, in the next pass of half as many, and so on."""
        redraws: list[Turn] = []
        if self.redraws:
            redraws = [Turn(Kind.REDRAW)] * free
        halvings = max(free, 1).bit_length()
        size = -(-free // 2 ** (number % halvings))
        return [*redraws, *remask(length, size)]

    def evaluations(self, completed: int) -> int:
        plan = self.plan
        evaluations = completed * (1 + plan.between)
        if completed == plan.num_levels:
            evaluations += len(plan.turns) - 1 - plan.between
        return evaluations * plan.cost

    def proposals(self) -> int:
        return 1 + self.plan.between

    @property
    def drawing(self) -> DrawCost:
        number = len(self.plan.drawing)
        return DrawCost(number * self.plan.cost, proposals=number, settling=0)

    def start(self, run: Run, density: AnnealedDensity, level: int) -> Run:
        tokens = _categorical(density).tokens
        length = _categorical(density).length
        blank = tokens.blank()
        values = tokens.allowed.shape[1]

        def chain(words: UInt32[Array, " 2"]) -> TokenChain:
            order = uniform_order(words, Stream.INITIAL, tokens.given)
            hidden = jnp.zeros((length,), jnp.int32)
            last = tuple(jnp.zeros((len(rows), values)) for rows in blank)
            zero = jnp.zeros(())
            return TokenChain(hidden, order, blank, zero, last, zero)

        return dataclasses.replace(run, chains=run.spread.map(chain, run.words))

    def phases(self, density: AnnealedDensity, run: Run) -> RevealPhases:
        assert self.exchange is not None
        return RevealPhases(
            _categorical(density),
            self.exchange,
            self.plan.between,
            list(self.plan.turns),
            look_ahead=self.look_ahead,
        )

    def phases_of_draws(self, density: AnnealedDensity) -> RevealPhases:
        assert self.exchange is not None
        turns = list(self.plan.drawing)
        return RevealPhases(_categorical(density), self.exchange, 0, turns, leads=False)

    def describe(self) -> str:
        ahead = ""
        if self.look_ahead != tuning.REVEALS.look_ahead:
            ahead = f", look_ahead={self.look_ahead:g}"
        return (
            f"Reveal({self.redraws} redraws a level, {self.passes} passes at level 0, "
            f"resample={self.rule_in_words}{ahead}{self.then_in_words})"
        )


def _categorical(density: AnnealedDensity) -> CategoricalDensity:
    """The density, which `Reveal.requires` has checked."""
    assert isinstance(density, CategoricalDensity)
    return density
