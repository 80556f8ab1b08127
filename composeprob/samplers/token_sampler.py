"""Common part of the samplers of tokens, whose chains have a token at each position."""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar, cast

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, UInt32

from composeprob.density.annealed import AnnealedDensity
from composeprob.density.categorical import Logs, TokenDensity
from composeprob.density.evaluation import Position
from composeprob.errors import CapabilityError
from composeprob.samplers.descent import Phases
from composeprob.samplers.finishers import Finisher, as_finishers
from composeprob.samplers.random import Stream, stream
from composeprob.samplers.run import Run
from composeprob.samplers.sampler import Sampler


class TokenSampler(Sampler):
    """A sampler of programs of tokens, whose chains have a ``position`` of tokens and
    the ``log_density`` of the program there."""

    may_be_replaced: ClassVar[bool] = False

    @property
    def can_draw(self) -> bool:
        return True

    def estimates_evidence(self, density: AnnealedDensity) -> bool:
        return True

    @property
    def adjusted(self) -> tuple[bool, ...]:
        return (True,)

    def positions(self, run: Run, density: AnnealedDensity) -> Position:
        tokens = cast(TokenDensity, density).tokens
        return run.spread.map(lambda c: tokens.position_of(c.position), run.chains)

    def log_densities(self, run: Run) -> Float[Array, " chains"] | None:
        log_density: Float[Array, " chains"] = run.chains.log_density
        return log_density

    @abc.abstractmethod
    def phases(self, density: AnnealedDensity, run: Run) -> Phases:
        """Phases of the way to level 0, with the redraws on the way and there."""

    @abc.abstractmethod
    def phases_of_draws(self, density: AnnealedDensity) -> Phases:
        """Phases of the redraws between draws."""

    def draw(self, run: Run, density: AnnealedDensity, i: Array, thin: Array) -> Run:
        """Make the ``thin`` passes of redraws at level 0 that lead to draw i."""
        phases = self.phases_of_draws(density)
        number = thin * self.drawing.proposals
        first = i * number
        state = dataclasses.replace(phases.blank(run), turn=first.astype(jnp.int32))
        run, _ = jax.lax.while_loop(
            lambda carry: carry[1].turn < first + number, phases.phase, (run, state)
        )
        return run

    @classmethod
    def finishers_of_tokens(cls, then: object) -> tuple[Finisher, ...]:
        """Return the argument ``then``; refuse moves of numbers."""
        finishers = as_finishers(then)
        for finisher in finishers:
            if not finisher.moves_tokens:
                raise CapabilityError(
                    f"{finisher!r} moves numbers, and the chains of {cls.__name__} "
                    "have tokens.",
                    fix="pass then=cp.Renoise(), or leave then out.",
                )
        return finishers

    @property
    def then_in_words(self) -> str:
        """The finishers, for `describe`."""
        return "".join(f", then {finisher!r}" for finisher in self.finishers)

    @property
    def rule_in_words(self) -> str:
        """The rule of resampling, for `describe`."""
        rule = repr(self.exchange)
        if rule.startswith("Resample("):
            rule = rule.removeprefix("Resample(").removesuffix(")")
        return rule


def current_logs(bases: tuple[Array | None, ...], carried: Logs) -> Logs:
    """Return log f by batch: as evaluated, or else as the chain carries it."""
    logs = []
    for base, own in zip(bases, carried, strict=True):
        if base is None:
            base = own
        logs.append(base)
    return tuple(logs)


def stream_of(run: Run, leads: bool) -> UInt32[Array, "chains 2"]:
    """Return the words of every chain, those of the stream of draws where no levels are
    visited."""
    if leads:
        return run.words
    return run.spread.map(lambda words: stream(words, Stream.DRAWS), run.words)
