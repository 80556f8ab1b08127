"""Common part of the samplers of tokens, whose chains have a token at each position."""

from __future__ import annotations

from typing import ClassVar, cast

from jax import Array
from jaxtyping import Float, UInt32

from composeprob.density.annealed import AnnealedDensity
from composeprob.density.categorical import Logs, TokenDensity
from composeprob.density.evaluation import Position
from composeprob.samplers.random import Stream, stream
from composeprob.samplers.run import Run
from composeprob.samplers.sampler import Sampler


class TokenSampler(Sampler):
    """A sampler of programs of tokens, whose chains have a ``position`` of tokens and
    the ``log_density`` of the program there."""

    may_abort: ClassVar[bool] = False

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
