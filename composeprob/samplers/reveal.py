"""The sampler of categorical sites: positions become visible one after another, with
weights, and visible ones are drawn anew.

A chain has an order σ, uniform at first, and tokens at the first positions of it. A
reveal takes the next position i = σ_s, evaluates F of what is visible with each value v
at i, draws v in proportion, and multiplies the chain's weight by

    z = Σ_v F(visible + v)/F(visible),

so that the weighted chains have the density F(x, σ) = Π_s Π_k q_k(x_{σ_s} |
x_{σ_<s})^{β_k} without any error of levels, and the mean weight is its integral at any
number of chains.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import ClassVar, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, UInt32

from composeprob import tuning
from composeprob.arguments import check_count
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.categorical import CategoricalDensity, Logs, Rises
from composeprob.density.evaluation import Position
from composeprob.errors import CapabilityError
from composeprob.kernels import mean_acceptance
from composeprob.kernels.gibbs import replaced
from composeprob.pytree import where
from composeprob.samplers.population import reweighted
from composeprob.samplers.random import Stream, stream, uniforms
from composeprob.samplers.resampling import Resampler
from composeprob.samplers.run import Run
from composeprob.samplers.sampler import DrawCost, Sampler, as_resampler

NUMBERS = 4
"""Uniform numbers of a redraw: its direction, its place, its test, its value."""


class TokenChain(eqx.Module):
    """One chain.

    Attributes:
        position: the tokens; 0 at hidden positions.
        order: the positions in the order in which they become visible.
        logs: log f of what is visible, of every row of each batch of factors.
        log_density: log F of what is visible.
        last: how much ``logs`` grew with each value at the last visible position.
    """

    position: Int[Array, " length"]
    order: Int[Array, " length"]
    logs: Logs
    log_density: Float[Array, ""]
    last: tuple[Float[Array, "rows values"], ...]


class Proposal(NamedTuple):
    """The order of a chain, and what the factors are asked: the arguments of
    `TokenEvaluator.extend`."""

    order: Int[Array, " length"]
    rank: Int[Array, " length"]
    time: Int[Array, ""]
    positions: Int[Array, " block"]


class RevealState(eqx.Module):
    """The state of the level in progress."""

    turn: Int[Array, ""]  # 0 for the reveal, then the redraws
    accepted: Float[Array, " chains"]  # sum of the probabilities of their tests


Carry: TypeAlias = tuple[Run, RevealState]
Answer: TypeAlias = tuple[tuple[Array | None, ...], Rises]


@dataclasses.dataclass(eq=False)
class RevealPhases:
    """The phases of a level while they are traced: a reveal, then redraws, around ONE
    place where the factors are evaluated.

    Args:
        density: of the program.
        rule: of resampling.
        redraws: their number at levels above 0, and at level 0.
        leads: whether reveals lead to levels; if not, all phases are redraws at level 0
            for draws.
    """

    density: CategoricalDensity
    rule: Resampler
    redraws: tuple[int, int]
    leads: bool = True

    def __post_init__(self) -> None:
        density = self.density
        self.tokens = density.tokens
        # With one joint the order does not matter, and no redraw is rejected.
        self.tested = not density.one_joint
        self.paths = self.tested and max(self.redraws) > 0
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

    # The loop

    def blank(self, run: Run) -> RevealState:
        """Return the state of a level that has not begun."""
        return RevealState(jnp.int32(0), jnp.zeros(len(run.words)))

    def phase(self, carry: Carry) -> Carry:
        """Run one phase: choose what is asked, evaluate the factors, act on the
        answer."""
        run, state = carry
        level = run.visits.number if self.leads else jnp.int32(0)
        reveals = (state.turn == 0) & self.leads
        words = stream_of(run, self.leads)
        number = state.turn
        if self.leads:
            number = level * (1 + max(self.redraws)) + state.turn
        step = self.density.num_levels - 1 - level
        propose_reveal = partial(self.propose_reveal, step)
        propose_redraw = partial(self.propose_redraw, step, number)
        proposals = jax.lax.cond(
            reveals,
            lambda: run.spread.map(propose_reveal, words, run.chains),
            lambda: run.spread.map(propose_redraw, words, run.chains),
        )
        # The only place where the loop evaluates factors.
        answers = run.spread.map(self.evaluate, run.chains, proposals)
        reveal = partial(self.revealed, level, number)
        redraw = partial(self.redrawn, step, number)
        run, state = jax.lax.cond(
            reveals, reveal, redraw, run, state, words, proposals, answers
        )
        return self.onwards(run, state, level)

    def onwards(self, run: Run, state: RevealState, level: Array) -> Carry:
        """Return the run before the next phase, which may be that of another level."""
        turn = state.turn + 1
        state = dataclasses.replace(state, turn=turn)
        if not self.leads:
            return run, state
        total = jnp.where(level == 0, self.redraws[1], self.redraws[0])

        def leave() -> Carry:
            records = run.records
            if self.tested:
                mean = mean_acceptance(
                    state.accepted / jnp.maximum(total, 1),
                    run.spread.total,
                    len(run.ancestors),
                )
                mean = jnp.where(total > 0, mean, jnp.nan)
                records = records.at(level, acceptance=mean[None])
            visits = run.visits.onwards(self.density.schedule, records)
            after = dataclasses.replace(run, records=records, visits=visits)
            return after, jax.tree.map(jnp.zeros_like, state)

        return jax.lax.cond(turn > total, leave, lambda: (run, state))

    # What is asked

    def propose_reveal(
        self, step: Array, words: UInt32[Array, " 2"], chain: TokenChain
    ) -> Proposal:
        """Ask about the next positions of a chain's order."""
        places = self.places[step]
        positions = jnp.where(places >= 0, chain.order[places], -1)
        rank = self.steps[inverse(chain.order)]
        return Proposal(chain.order, rank, step.astype(jnp.int32), positions)

    def propose_redraw(
        self, step: Array, number: Array, words: UInt32[Array, " 2"], chain: TokenChain
    ) -> Proposal:
        """Move one visible position to the end of the order, and ask about it.

        Where the density depends on the order, half of the proposals move the last
        position to another place instead: so each is as probable as its reverse.
        """
        u = uniforms(words, number, NUMBERS)
        last = self.ends[step] - 1
        free = last + 1 - self.num_given
        place = self.num_given + jnp.floor(u[1] * free).astype(jnp.int32)
        place = jnp.clip(place, jnp.minimum(self.num_given, last), last)
        begin = place
        end = last
        if self.tested:
            back = u[0] < 0.5
            begin, end = where(back, (last, place), (place, last))
        order = moved(chain.order, begin, end)
        positions = jnp.full(self.block, -1).at[0].set(order[last])
        return Proposal(order, inverse(order), last, positions)

    def evaluate(self, chain: TokenChain, proposal: Proposal) -> Answer:
        """Evaluate every factor once."""
        _, rank, time, positions = proposal
        return self.tokens.extend(chain.position, rank, time, positions, self.paths)

    # What follows

    def revealed(
        self,
        level: Array,
        number: Array,
        run: Run,
        state: RevealState,
        words: UInt32[Array, "chains 2"],
        proposals: Proposal,
        answers: Answer,
    ) -> Carry:
        """Reveal positions of every chain; weight the chains, and resample them."""
        reveal = partial(self._reveal, number)
        chains, gain = run.spread.map(reveal, words, run.chains, proposals, answers)
        run = dataclasses.replace(run, chains=chains)
        zero = jnp.zeros_like(gain)
        return reweighted(run, self.rule, level, gain, zero, zero), state

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
        logs = known(bases, chain.logs)
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
        return TokenChain(tokens, chain.order, grown, log_density, last), gain

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

        def with_value(rise: tuple[Float[Array, " rows"], ...]) -> Array:
            return self.tokens.log_density(jax.tree.map(jnp.add, logs, rise))

        by_value = tuple(r.T for r in rises)
        values = jax.vmap(with_value)(by_value) + self.tokens.allowed[position]
        values = values - jnp.where(jnp.isfinite(before), before, 0.0)
        total = jax.nn.logsumexp(values)
        cumulative = jnp.cumsum(jnp.exp(values - jnp.max(values)))
        # Strictly below the total: a value without probability is never chosen.
        value = jnp.sum(cumulative <= u * cumulative[-1])
        value = jnp.minimum(value, len(values) - 1).astype(jnp.int32)
        possible = ~jnp.isneginf(total)
        return value, jnp.where(possible, values[value] - total, -jnp.inf)

    def redrawn(
        self,
        step: Array,
        number: Array,
        run: Run,
        state: RevealState,
        words: UInt32[Array, "chains 2"],
        proposals: Proposal,
        answers: Answer,
    ) -> Carry:
        """Test the proposed order of every chain, and draw its last position anew."""
        redraw = partial(self._redraw, step, number)
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
        others = known(bases, jax.tree.map(jnp.subtract, chain.logs, own))
        logs = jax.tree.map(jnp.add, others, own)
        log_density = self.tokens.log_density(logs)
        probability = jnp.ones(())
        if self.tested:
            log_ratio = log_density - chain.log_density
            probability = jnp.where(jnp.isnan(log_ratio), 0.0, jnp.exp(log_ratio))
            probability = jnp.minimum(probability, 1.0)
        proposed = TokenChain(chain.position, proposal.order, logs, log_density, rise)
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
        redrawn = TokenChain(
            there.position.at[last].set(new),
            there.order,
            grown,
            self.tokens.log_density(grown),
            there.last,
        )
        # Chains without weight stay as they are, and so do those of given tokens alone.
        movable = jnp.isfinite(chain.log_density) & jnp.isfinite(redrawn.log_density)
        movable &= self.ends[step] > self.num_given
        return where(movable, redrawn, chain), probability


def known(bases: tuple[Array | None, ...], carried: Logs) -> Logs:
    """Return log f by batch: as evaluated, or else as the chain carries it."""
    logs = []
    for base, own in zip(bases, carried, strict=True):
        logs.append(own if base is None else base)
    return tuple(logs)


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


def stream_of(run: Run, leads: bool) -> UInt32[Array, "chains 2"]:
    """Return the words of every chain, those of the stream of draws where no reveals
    are made."""
    if leads:
        return run.words
    return run.spread.map(lambda words: stream(words, Stream.DRAWS), run.words)


class RevealPlan(NamedTuple):
    """Numbers of a sampler that is prepared for a density.

    Attributes:
        between: redraws at a level above 0.
        at_end: redraws at level 0.
        num_levels: the number of reveals.
        length: the number of positions.
        cost: evaluations that one of paths takes.
    """

    between: int
    at_end: int
    num_levels: int
    length: int
    cost: int


class Reveal(Sampler):
    r"""Reveals of categorical sites with weights: the sampler of programs of tokens.

    At each level one more position of every chain becomes visible, or a block of
    positions where ``cp.infer(levels=)`` asks for fewer reveals. A chain draws the new
    token in proportion to the program's density and is weighted by

    $$z = \sum_v \prod_k q_k(v \mid x_{\text{visible}})^{\beta_k},$$

    which leaves no error of levels: means of weights are unbiased at any number of
    chains. Between reveals chains are resampled, and visible tokens drawn anew. Such a
    redraw hides one position, moves it to the end of the chain's order and draws it
    given all others. If all conditionals come from one joint distribution
    (``one_joint``) this is a Gibbs move. Otherwise a Metropolis test decides about the
    order, so that the density of tokens and orders stays exact.

    Each reveal and each redraw evaluates every factor once. A network with
    ``mask="boolean"`` that is not of one joint has to be evaluated for every place of
    the order in a redraw, and at each reveal between redraws.

    Args:
        redraws: redraws of each chain after each reveal.
        passes: redraws at level 0, in units of the number of positions.
        resample: a `Resampler`, or the threshold of the relative effective sample size.

    References:
        Del Moral, Doucet and Jasra 2006, *Sequential Monte Carlo samplers*; Hoogeboom
        et al. 2022, *Autoregressive diffusion models*.

    Example:
        >>> import composeprob as cp
        >>> cp.Reveal(redraws=2)
        Reveal(2 redraws a level, 2 passes at level 0, resample=0.5)
    """

    redraws: int = eqx.field(static=True, default=1)
    passes: int = eqx.field(static=True, default=2)

    # Resolved by `prepare`.
    plan: RevealPlan = eqx.field(static=True, default=None)  # type: ignore[assignment]

    may_abort: ClassVar[bool] = False

    def __init__(
        self,
        redraws: int = tuning.REVEALS.redraws,
        passes: int = tuning.REVEALS.passes,
        resample: float | Resampler = 0.5,
    ):
        super().__init__(exchange=as_resampler(resample))
        self.redraws = check_count(redraws, "redraws", least=0)
        self.passes = check_count(passes, "passes", least=0)

    @property
    def requires(self) -> dict[str, frozenset[str]]:
        return {"Reveal": frozenset({"categorical"})}

    @property
    def can_draw(self) -> bool:
        return True

    def estimates_evidence(self, density: AnnealedDensity) -> bool:
        return True

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
        at_end = self.redraws + self.passes * density.length
        cost = 1
        if not density.one_joint and at_end:
            cost = density.tokens.path_evaluations
        plan = RevealPlan(between, at_end, density.num_levels, density.length, cost)
        return replaced(self, plan=plan)

    def evaluations(self, completed: int) -> int:
        plan = self.plan
        evaluations = completed * (1 + plan.between)
        if completed == plan.num_levels:
            evaluations += plan.at_end - plan.between
        return evaluations * plan.cost

    def proposals(self) -> int:
        return 1 + self.plan.between

    @property
    def adjusted(self) -> tuple[bool, ...]:
        return (True,)

    @property
    def drawing(self) -> DrawCost:
        evaluations = self.plan.length * self.plan.cost
        return DrawCost(evaluations, proposals=self.plan.length, settling=0)

    def start(self, run: Run, density: AnnealedDensity, level: int) -> Run:
        tokens = _categorical(density).tokens
        length = _categorical(density).length
        blank = tokens.blank()
        values = tokens.allowed.shape[1]

        def chain(words: UInt32[Array, " 2"]) -> TokenChain:
            # Given positions come first; a uniform order of these, and of the others.
            u = uniforms(words, Stream.INITIAL, length)
            order = jnp.argsort(u + ~tokens.given).astype(jnp.int32)
            hidden = jnp.zeros((length,), jnp.int32)
            last = tuple(jnp.zeros((len(rows), values)) for rows in blank)
            return TokenChain(hidden, order, blank, jnp.zeros(()), last)

        return dataclasses.replace(run, chains=run.spread.map(chain, run.words))

    def advance(self, run: Run, density: AnnealedDensity, end: Array | int) -> Run:
        tokens = _categorical(density)
        assert self.exchange is not None
        redraws = (self.plan.between, self.plan.at_end)
        phases = RevealPhases(tokens, self.exchange, redraws)
        run, _ = jax.lax.while_loop(
            lambda carry: carry[0].visits.before(end),
            phases.phase,
            (run, phases.blank(run)),
        )
        return run

    def draw(self, run: Run, density: AnnealedDensity, i: Array, thin: Array) -> Run:
        """Make the ``thin`` passes of redraws at level 0 that lead to draw i."""
        tokens = _categorical(density)
        assert self.exchange is not None
        phases = RevealPhases(tokens, self.exchange, (1, 1), leads=False)
        first = i * thin * tokens.length
        end = first + thin * tokens.length
        state = dataclasses.replace(phases.blank(run), turn=first.astype(jnp.int32))
        run, _ = jax.lax.while_loop(
            lambda carry: carry[1].turn < end, phases.phase, (run, state)
        )
        return run

    def positions(self, run: Run, density: AnnealedDensity) -> Position:
        tokens = _categorical(density).tokens
        return run.spread.map(lambda c: tokens.position_of(c.position), run.chains)

    def log_densities(self, run: Run) -> Float[Array, " chains"] | None:
        log_density: Float[Array, " chains"] = run.chains.log_density
        return log_density

    def describe(self) -> str:
        rule = repr(self.exchange)
        if rule.startswith("Resample("):
            rule = rule.removeprefix("Resample(").removesuffix(")")
        return (
            f"Reveal({self.redraws} redraws a level, {self.passes} passes at level 0, "
            f"resample={rule})"
        )


def _categorical(density: AnnealedDensity) -> CategoricalDensity:
    """The density, which `Reveal.requires` has checked."""
    assert isinstance(density, CategoricalDensity)
    return density
