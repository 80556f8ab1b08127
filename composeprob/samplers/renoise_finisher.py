"""`cp.Renoise`: moves by noise and reverse steps at level 0 and, as a kernel, at every
level; of numbers and of tokens."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from composeprob import tuning
from composeprob.arguments import check_count
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.categorical import TokenDensity
from composeprob.density.evaluation import Evaluation
from composeprob.errors import InvalidValueError
from composeprob.kernels import Kernel, KernelState
from composeprob.samplers.descent import moved_to
from composeprob.samplers.finishers import Finisher, Points, genealogy_after_moves
from composeprob.samplers.layout import Layout
from composeprob.samplers.moves import Particles
from composeprob.samplers.random import Stream, stream
from composeprob.samplers.renoise import (
    Ladder,
    OneFactor,
    Renoising,
    accept,
    acceptance_by_rung,
    check_levels,
    check_noised,
    chosen_turns,
    ladder_of,
    one_factor,
)
from composeprob.samplers.renoise_kernel import RenoiseKernel
from composeprob.samplers.renoise_tokens import (
    TokenTurns,
    candidates,
    check_tokens,
    chosen,
    moved_run,
    num_free,
    proposed,
)
from composeprob.samplers.run import Run


class FittedMoves(eqx.Module):
    """Moves of a round: the rungs with their turns, and the factor whose reverse steps
    are made.

    Attributes:
        ladder: the rungs.
        factor: None for the steps of the whole program.
        beside: evaluations of a proposal beside those of its steps.
    """

    ladder: Ladder
    factor: OneFactor | None = eqx.field(static=True)
    beside: int = eqx.field(static=True)


class Renoise(Finisher):
    r"""Moves up to a level of noise and down again by reverse steps, accepted so that
    the target is left invariant.

    $$u_T \sim q(\cdot \mid x),\qquad y \sim r(\cdot \mid u_T),\qquad
      a = \min\Big(1, \frac{\pi(y)}{\pi(x)}\,Q\Big),$$

    with Q the ratio of the noising and the reverse steps along both ways. They need no
    gradient of observations, and turns at much noise lead from mode to mode. By scores
    alone the rest of π decides, and ∫R dτ along both ways with R the Feynman–Kac rate:
    right up to the error of the steps.

    As ``then=`` they are made at level 0. As the kernel of `SMC` or `AnnealedMCMC`, or
    of a block of `Gibbs`, each transition at a level is one proposal, from that level
    up to a turn whose height adapts to the acceptance of all chains.

    Tokens move the same way, as ``then=`` of `Reveal` and `TauLeaping`: hidden or
    replaced on the way up, and drawn anew by all factors together on the way down.

    Args:
        number: proposals to each chain, with one evaluation for each step, up and down;
            20 unless given. A kernel makes one in each transition.
        levels: the range of log-SNR where chains turn, such as ``(-6, 3)``; left out,
            the levels of the density, each as often as what it renews is accepted. Of
            tokens that are hidden, the range of numbers of hidden positions.
        factor: the name of the one factor whose reverse steps are made, as
            ``print(density)`` shows it, such as ``"prior"``. It moves its own site, and
            all other factors are left to the ratio. Left out, the steps are those of
            the whole program.

    Raises:
        InvalidValueError: ``number`` is not a whole number ≥ 1, or ``levels`` has no
            level in it; from `infer`, no factor has this name.
        CapabilityError: from `infer`, a program without noised sites, or a factor by
            its score alone beside others that have no log-density.

    Example:
        >>> import composeprob as cp
        >>> cp.SMC(then=(cp.Renoise(20), cp.WarmUp())).finishers
        (Renoise(20), WarmUp())
        >>> cp.AnnealedMCMC(cp.Renoise(factor="prior"), 2)
        AnnealedMCMC(Renoise(factor='prior'), 2 steps a level)

    References:
        Meng et al. 2022, *SDEdit*, for the proposal; Andrieu, Doucet and Holenstein
        2010, *Particle Markov chain Monte Carlo methods*, for ratios along paths.
    """

    number: int | None = eqx.field(default=None, static=True)
    levels: tuple[float, float] | None = eqx.field(default=None, static=True)
    factor: str | None = eqx.field(default=None, static=True)

    title = "renoising"
    moves_tokens: ClassVar[bool] = True
    needs_kernel: ClassVar[bool] = False

    def __check_init__(self) -> None:
        if self.number is not None:
            check_count(self.number, "Renoise(number=)")
        if self.levels is not None and not np.all(np.isfinite(self.levels)):
            raise InvalidValueError(
                f"Renoise(levels={self.levels!r}) is not a range of log-SNR.",
                fix="pass two numbers, such as levels=(-6.0, 3.0).",
            )

    @property
    def requires(self) -> dict[str, frozenset[str]]:
        return {"Renoise": frozenset({"score"})}

    def __repr__(self) -> str:
        settings = []
        if self.number is not None:
            settings.append(f"{self.number}")
        if self.levels is not None:
            settings.append(f"levels={self.levels}")
        if self.factor is not None:
            settings.append(f"factor={self.factor!r}")
        return f"Renoise({', '.join(settings)})"

    @property
    def proposals(self) -> int:
        """Proposals to each chain at level 0."""
        return self.number or tuning.RENOISE.proposals

    def as_kernel(self) -> Kernel:
        """Return the kernel of one proposal in each transition."""
        if self.number is not None:
            raise InvalidValueError(
                f"cp.Renoise({self.number}) as a kernel makes one proposal in each "
                "transition.",
                fix=f"write cp.Renoise() and steps_per_level={self.number}.",
            )
        return RenoiseKernel(within=self.levels, factor=self.factor)

    def check(self, density: AnnealedDensity, num_chains: int) -> None:
        if isinstance(density, TokenDensity):
            check_tokens(density, self.levels, self.factor)
            return
        check_noised(density)
        one_factor(density, self.factor)
        check_levels(density, self.levels)

    def trials(self, density: AnnealedDensity) -> TokenTurns | None:
        if not isinstance(density, TokenDensity) or not num_free(density):
            return None
        return candidates(density, self.levels)

    def measure(self, run: Run, density: AnnealedDensity, trials: TokenTurns) -> Array:
        """Return the mean acceptance of one proposal to tokens at each turn."""
        # Random numbers of a round that is never made.
        tokens = cast(TokenDensity, density)
        return proposed(run, tokens, trials, Stream.CLOSING).acceptance

    def fit(
        self, points: Points, density: AnnealedDensity, measured: np.ndarray | None
    ) -> FittedMoves | TokenTurns | None:
        if not isinstance(density, TokenDensity):
            return self.adapt(points, density)
        if measured is None:
            return None
        tried = candidates(density, self.levels)
        acceptance = np.asarray(measured, np.float64)
        return chosen(tried, acceptance, self.proposals)

    def adapt(self, points: Points, density: AnnealedDensity) -> FittedMoves | None:
        """Return the rungs, with the turns of a round."""
        points = points[np.isfinite(points).all(1)]
        if not len(points):
            return None  # the status says why
        untracked = None
        if density.tracks:
            density = untracked = density.untracked()
        factor = one_factor(density, self.factor)
        ladder, renewed = ladder_of(points, density, self.levels, factor)
        if not renewed.any():
            return None
        some = jnp.asarray(points[: tuning.RENOISE.pilots], jnp.result_type(float))
        renoising = Renoising(density, Layout.of_density(density), ladder, factor)
        acceptance = np.asarray(acceptance_by_rung(renoising, some), np.float64)
        turns = chosen_turns(renewed, acceptance, self.proposals)
        rungs = len(acceptance)
        steps = rungs * (rungs - 1) + rungs * renoising.beside_steps
        pilots = len(some) * (1 + steps)
        ladder = dataclasses.replace(
            ladder,
            turns=jnp.asarray(turns),
            piloted=ladder.piloted + -(-pilots // len(points)),
            untracked=untracked,
        )
        return FittedMoves(ladder, factor, renoising.beside_steps)

    def move(
        self,
        run: Run,
        density: AnnealedDensity,
        fitted: FittedMoves | TokenTurns,
        number: Array,
    ) -> Run:
        if isinstance(fitted, TokenTurns):
            return moved_run(run, cast(TokenDensity, density), fitted, number)
        ladder = fitted.ladder
        if ladder.untracked is not None:
            density = ladder.untracked
        layout = Layout.of_density(density)
        renoising = Renoising(density, layout, ladder, fitted.factor)
        spread = run.spread
        Carry = tuple[KernelState, Array, Array]

        def chain(words: Array, v: Array) -> tuple[Array, Evaluation, Array]:
            words = stream(stream(words, Stream.CLOSING), number)

            def propose(i: Array, carry: Carry) -> Carry:
                state, total, renewed = carry
                turn = ladder.turns[i]
                of_proposal = stream(words, i)
                proposed, log_ratio = renoising.propose(of_proposal, state, turn)
                state, info = accept(of_proposal, proposed, state, log_ratio)
                renews = info.accepted & (ladder.renews[turn] > 0)
                return state, total + info.acceptance, renewed | renews

            carry = (renoising.state(v), jnp.zeros(()), jnp.asarray(False))
            state, total, renewed = jax.lax.fori_loop(
                0, len(ladder.turns), propose, carry
            )
            facts = jnp.stack([renewed, total / len(ladder.turns)])
            return state.position, state.evaluation.without_terms, facts

        points, evaluations, facts = spread.map(chain, run.words, run.chains.position)

        after = spread.on_population(
            genealogy_after_moves, spread.gather(facts), run.ancestors
        )
        chains = Particles(points, evaluations, run.chains.inner)
        return dataclasses.replace(moved_to(run, chains), **after._asdict())

    def evaluations(self, fitted: FittedMoves | TokenTurns) -> int:
        if isinstance(fitted, TokenTurns):
            return fitted.evaluations
        turns = np.asarray(fitted.ladder.turns)
        moves = 2 * int(np.sum(turns)) + fitted.beside * len(turns)
        return fitted.ladder.piloted + 1 + moves
