r"""Renoising of tokens: up to hidden or replaced tokens, and down again by the steps of
their sampler.

Of a program of reveals a way up hides the last positions of a chain's order, and the
way down reveals them again in an order of its own: a remask, whose log-ratio is Σ log z
of the new tokens less that of the old ones (`RevealPhases`).

Under uniform noise a way up u_0 = x, …, u_T replaces tokens by the noising kernel K,
and the way down d_T = u_T, …, d_0 = y draws every token by the composed reverse kernels
q of single positions, as a leap does. With F the program's density at level 0 the
log-ratio is

$$\log\frac{F(y)}{F(x)}
  + \sum_j \log\frac{K(d_{j+1} \mid d_j)}{q(d_j \mid d_{j+1})}
  - \sum_j \log\frac{K(u_{j+1} \mid u_j)}{q(u_j \mid u_{j+1})}.$$

A network knows ratios alone: its log f is carried along both ways by Bayes' identity,
as along a leap. Of a single network the log-ratio is then 0.
"""

from __future__ import annotations

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, UInt32

from composeprob import tuning
from composeprob.density.categorical import (
    CategoricalDensity,
    TokenDensity,
    UniformDensity,
)
from composeprob.errors import CapabilityError, InvalidValueError
from composeprob.kernels import mean_acceptance
from composeprob.kernels.metropolis import accept
from composeprob.pytree import where
from composeprob.samplers.finishers import genealogy_after_moves
from composeprob.samplers.leaping import LeapPhases, NoisyChain, Place
from composeprob.samplers.random import Stream, categorical, stream, uniforms
from composeprob.samplers.renoise import chosen_turns, ladder_step, levels_of_rungs
from composeprob.samplers.resampling import Resample
from composeprob.samplers.reveal import RevealPhases, RevealState, remask
from composeprob.samplers.run import Run
from composeprob.samplers.token_sampler import current_logs


class TokenTurns(eqx.Module):
    """Turns of a round of proposals to tokens.

    Attributes:
        turns: of each proposal, the number of positions that it hides, or the rung
            where it turns.
        renewed: of each proposal, the share of a chain's tokens that it renews.
        levels: of the rungs, from level 0 up; none of reveals.
        piloted: evaluations that measuring acceptance took.
    """

    turns: tuple[int, ...] = eqx.field(static=True)
    renewed: tuple[float, ...] = eqx.field(static=True)
    levels: tuple[int, ...] = eqx.field(static=True, default=())
    piloted: int = eqx.field(static=True, default=0)

    @property
    def evaluations(self) -> int:
        """Evaluations of each chain: one for each step, up and down."""
        return self.piloted + 2 * sum(self.turns)


def candidates(density: TokenDensity, within: tuple[float, float] | None) -> TokenTurns:
    """Return the turns that are tried: remasks of all free positions, of half of them,
    and so on; or a few rungs at equal distances.

    Args:
        density: the target.
        within: the range of numbers of hidden positions, or of log-SNR; None for all.
    """
    if isinstance(density, CategoricalDensity):
        sizes = []
        size = num_free(density)
        while size:
            if within is None or min(within) <= size <= max(within):
                sizes.append(size)
            size //= 2
        shares = tuple(size / num_free(density) for size in sizes)
        return TokenTurns(tuple(sizes), shares)
    log_snr = np.asarray(density.schedule.log_snr, np.float64)
    spacing = tuning.RENOISE.spacing
    if not density.one_joint:
        spacing = tuning.RENOISE.spacing_by_score
    levels = levels_of_rungs(log_snr, spacing)
    top = len(levels) - 1
    rungs = np.unique(np.linspace(1, top, min(tuning.RENOISE.turns, top)).astype(int))
    kept = np.asarray(density.schedule.kept, np.float64)
    turns = []
    renewed = []
    for rung in rungs.tolist():
        place = log_snr[levels[rung]]
        if within is None or min(within) <= place <= max(within):
            turns.append(rung)
            renewed.append(float(1 - kept[levels[rung]] / kept[0]))
    return TokenTurns(tuple(turns), tuple(renewed), tuple(levels))


def num_free(density: TokenDensity) -> int:
    """Return the number of positions whose tokens were not observed."""
    return density.length - int(np.sum(density.tokens.given))


def check_tokens(
    density: TokenDensity, within: tuple[float, float] | None, factor: str | None
) -> None:
    """Refuse programs of tokens whose chains cannot be renoised, and what only numbers
    have."""
    where = density.described.where
    if factor is not None:
        raise CapabilityError(
            f"cp.Renoise(factor={factor!r}) makes the reverse steps of one density of "
            "numbers, and this program has tokens.",
            where=where,
            fix="leave factor out: tokens are drawn by all factors together.",
        )
    blocks = isinstance(density, CategoricalDensity) and density.in_blocks
    if blocks and not density.one_joint:
        raise CapabilityError(
            "Tokens that are hidden and revealed one by one would leave the model as "
            "it is drawn in blocks, whose order matters.",
            where=where,
            fix="leave levels= out, or leave out then=.",
        )
    if num_free(density) and not candidates(density, within).turns:
        meant = "numbers of hidden positions"
        if isinstance(density, UniformDensity):
            meant = "log-SNR"
        turns = candidates(density, None)
        ends = np.array([turns.turns[0], turns.turns[-1]], float)
        if turns.levels:
            log_snr = np.asarray(density.schedule.log_snr, np.float64)
            rungs = np.array(turns.levels)
            ends = log_snr[rungs[[turns.turns[0], turns.turns[-1]]]]
        raise InvalidValueError(
            f"No turn of this program's tokens lies in levels={within}, which are "
            f"{meant} here.",
            where=where,
            fix=f"they go from {min(ends):.3g} to {max(ends):.3g}.",
        )


def chosen(
    tried: TokenTurns, acceptance: Float[np.ndarray, " n"], number: int
) -> TokenTurns:
    """Return the turns of a round of so many proposals, by the acceptance that was
    measured of each that was tried."""
    numbers = chosen_turns(np.array(tried.renewed), acceptance, number)
    turns = tuple(tried.turns[i] for i in numbers)
    renewed = tuple(tried.renewed[i] for i in numbers)
    return TokenTurns(turns, renewed, tried.levels, 2 * sum(tried.turns))


class Moved(eqx.Module):
    """Chains after proposals.

    Attributes:
        run: with the chains.
        acceptance: mean probability of acceptance of each proposal.
        total: the sum of these of each chain.
        renewed: whether each chain accepted a proposal that forgets where it began.
    """

    run: Run
    acceptance: Float[Array, " proposals"]
    total: Float[Array, " chains"]
    renewed: Bool[Array, " chains"]


def proposed(
    run: Run, density: TokenDensity, turns: TokenTurns, number: Array | int
) -> Moved:
    """Return the run after one proposal for each turn, with the random numbers of a
    round; traced."""
    words = run.spread.map(
        lambda words: stream(stream(words, Stream.CLOSING), number), run.words
    )
    of_round = dataclasses.replace(run, words=words)
    if isinstance(density, CategoricalDensity):
        moved = _remasked(of_round, density, turns)
    else:
        assert isinstance(density, UniformDensity)
        moved = _renoised(of_round, density, turns)
    after = dataclasses.replace(run, chains=moved.run.chains)
    return dataclasses.replace(moved, run=after)


def moved_run(
    run: Run, density: TokenDensity, turns: TokenTurns, number: Array | int
) -> Run:
    """Return the run after a round, with the ancestors and the acceptance of its
    chains; traced."""
    moved = proposed(run, density, turns, number)
    facts = jnp.stack([moved.renewed, moved.total / len(turns.turns)], axis=1)
    after = run.spread.on_population(
        genealogy_after_moves, run.spread.gather(facts), run.ancestors
    )
    return dataclasses.replace(moved.run, **after._asdict())


def _remasked(run: Run, density: CategoricalDensity, turns: TokenTurns) -> Moved:
    """Make a remask of each size in turn."""
    rows = []
    remasks = []
    for i, size in enumerate(turns.turns):
        phases_of_one = remask(density.length, size)
        rows += phases_of_one
        remasks += [i] * len(phases_of_one)
    phases = RevealPhases(density, Resample(), 0, rows, leads=False)
    of_proposal = jnp.asarray(remasks)
    Carry = tuple[Run, RevealState, Array]

    def phase(carry: Carry) -> Carry:
        run, before, acceptance = carry
        run, state = phases.phase((run, before))
        share = state.remasked - before.remasked
        mean = mean_acceptance(share, run.spread.total, len(run.ancestors))
        acceptance = acceptance.at[of_proposal[before.turn]].add(mean)
        return run, state, acceptance

    def unfinished(carry: Carry) -> Array:
        return carry[1].turn < len(rows)

    carry = (run, phases.blank(run), jnp.zeros(len(turns.turns)))
    run, state, acceptance = jax.lax.while_loop(unfinished, phase, carry)
    return Moved(run, acceptance, state.remasked, state.renewed)


def _renoised(run: Run, density: UniformDensity, turns: TokenTurns) -> Moved:
    """Make a proposal that turns at each rung in turn."""
    walks = TokenWalks(density, jnp.asarray(turns.levels, jnp.int32))
    at = jnp.asarray(turns.turns, jnp.int32)
    # A few tokens that are kept may tell the mode: so few are to be left of them all.
    kept = 1 - np.array(turns.renewed)
    left = jnp.asarray(kept) * jnp.sum(~density.tokens.given)
    renews = left <= tuning.RENOISE.memory
    Carry = tuple[NoisyChain, Array, Array, Array]

    def of_chain(
        words: UInt32[Array, " 2"], chain: NoisyChain
    ) -> tuple[NoisyChain, Array, Array]:
        def propose(i: Array, carry: Carry) -> Carry:
            chain, acceptance, renewed, own = carry
            here = stream(own, i)
            there, log_ratio = walks.propose(here, chain, at[i])
            u = uniforms(here, Stream.STATES, 1)[0]
            accepted, probability = accept(jnp.log(u), log_ratio)
            chain = where(accepted, there, chain)
            acceptance = acceptance.at[i].set(probability)
            return chain, acceptance, renewed | (accepted & renews[i]), own

        carry = (chain, jnp.zeros(len(at)), jnp.asarray(False), words)
        chain, acceptance, renewed, _ = jax.lax.fori_loop(0, len(at), propose, carry)
        return chain, acceptance, renewed

    chains, acceptance, renewed = run.spread.map(of_chain, run.words, run.chains)
    mean = mean_acceptance(acceptance, run.spread.total, len(run.ancestors))
    after = dataclasses.replace(run, chains=chains)
    return Moved(after, mean, jnp.sum(acceptance, axis=1), renewed)


@dataclasses.dataclass(eq=False)
class TokenWalks:
    """Ways up and down of single chains under uniform noise.

    Args:
        density: of the program.
        levels: of the rungs, from level 0 up.
    """

    density: UniformDensity
    levels: Int[Array, " rungs"]

    def __post_init__(self) -> None:
        self.tokens = self.density.tokens
        self.leaps = LeapPhases(self.density, Resample(), 0, 0, leads=False)

    def step_from(self, rung: Array) -> Place:
        """Return the levels of the step from a rung to the one below."""
        below = self.levels[jnp.maximum(rung - 1, 0)]
        return Place(below, self.levels[rung], below, jnp.asarray(False), rung)

    def log_reverse(
        self, above: NoisyChain, place: Place
    ) -> Float[Array, "length values"]:
        """Return log q of the reverse step of every position, normalised."""
        noising = self.leaps.log_noising(place, above.position)
        values = self.leaps.log_values(above, above.onward) + noising
        return jax.nn.log_softmax(values, axis=1)

    def log_edge(
        self, below: Int[Array, " length"], above: NoisyChain, place: Place
    ) -> Float[Array, ""]:
        """Return log K(above | below) − log q(below | above) of one step."""
        positions = jnp.arange(len(below))
        noising = self.leaps.log_noising(place, above.position)
        reverse = self.log_reverse(above, place)
        return jnp.sum(noising[positions, below] - reverse[positions, below])

    def noised(
        self, u: Float[Array, " length"], tokens: Int[Array, " length"], place: Place
    ) -> Int[Array, " length"]:
        """Draw tokens of the level above from the noising kernel."""
        # K(x | v) is symmetric in the values of a position.
        kernel = self.leaps.log_noising(place, tokens) + self.tokens.allowed
        drawn, _ = jax.vmap(categorical)(u, kernel)
        return drawn

    def propose(
        self, words: UInt32[Array, " 2"], chain: NoisyChain, turn: Int[Array, ""]
    ) -> tuple[NoisyChain, Float[Array, ""]]:
        """Go up to a rung and down again; 2·turn evaluations, in one loop.

        Returns:
            The proposal y at level 0, evaluated, and the logarithm of π(y)·Q/π(x).
        """
        length = len(chain.position)
        positions = jnp.arange(length)
        Carry = tuple[NoisyChain, Array]

        def step(i: Array, carry: Carry) -> Carry:
            here, log_steps = carry
            up, rung, next_rung = ladder_step(i, turn)
            place = self.step_from(jnp.maximum(rung, next_rung))
            u = uniforms(words, i, length)
            noised = self.noised(u, here.position, place)
            denoised, _ = jax.vmap(categorical)(u, self.log_reverse(here, place))
            tokens = jnp.where(up, noised, denoised)
            level = self.levels[next_rung]
            below = self.levels[jnp.maximum(next_rung - 1, 0)]
            # The only place where the loop evaluates factors.
            answer = self.tokens.noised(tokens, level, below)
            # log f of the upper end, less that of the lower one, by Bayes' identity.
            onward = where(up, answer.onward, here.onward)
            lower = jnp.where(up, here.position, tokens)
            logs = []
            for log, growth in zip(here.logs, onward, strict=True):
                rise = jnp.sum(growth[:, positions, lower], axis=1)
                logs.append(log + jnp.where(up, -rise, rise))
            carried = current_logs(answer.bases, tuple(logs))
            there = self.leaps.evaluated(tokens, carried, answer)
            above: NoisyChain = where(up, there, here)
            along = self.log_edge(lower, above, place)
            return there, log_steps + jnp.where(up, -along, along)

        carry = (chain, jnp.zeros(()))
        there, log_steps = jax.lax.fori_loop(0, 2 * turn, step, carry)
        gained = there.log_density - chain.log_density
        nowhere = jnp.isneginf(there.log_density) | ~jnp.isfinite(chain.log_density)
        return there, jnp.where(nowhere, -jnp.inf, gained + log_steps)
