"""Densities of programs of categorical sites: their levels are reveals of positions, or
levels of uniform noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn, Protocol, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike

from composeprob import tuning
from composeprob.arguments import check_count
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Position
from composeprob.errors import (
    AlignmentError,
    CapabilityError,
    InvalidValueError,
    ShapeError,
)
from composeprob.schedule import Schedule, check_schedule

Logs = tuple[Float[Array, " rows"], ...]
"""log f of what is visible, of every row of each batch of factors."""
Rises = tuple[Float[Array, "rows block values"], ...]
"""The growth of these if a position becomes visible, for each of its values."""


NoisedLogs = tuple[Float[Array, "rows length values"], ...]
"""The growth of these if one position has another value, for every position and
value."""


class NoisedAnswer(NamedTuple):
    """Answer of the factors about noised tokens, by batch.

    Attributes:
        rises: the growth of log f at the level.
        onward: the growth if that position alone has the noise of the level below.
        bases: log f; None for batches that do not know it.
        at_top: log f, if the level is the noisiest.
    """

    rises: NoisedLogs
    onward: NoisedLogs
    bases: tuple[Float[Array, " rows"] | None, ...]
    at_top: Logs


class Reveals(Schedule):
    """The levels of categorical sites: at level k the chains have k reveals before
    them.

    Its log-SNR is the log-odds of a position to be visible, with half a position added
    on either side, so that it is finite.
    """

    @classmethod
    def over(cls, visible: Int[np.ndarray, " levels"], length: int) -> Reveals:
        """Return the levels after which so many of the positions are visible."""
        share = (np.asarray(visible) + 0.5) / (length + 1)
        return cast(Reveals, cls.from_arrays(np.sqrt(share), np.sqrt(1 - share)))

    def __repr__(self) -> str:
        return f"{self.num_levels} reveals"


class TokenEvaluator(Protocol):
    """Evaluator of a program of categorical sites: an `equinox.Module` with these
    methods. Positions of all sites stand in one row of P."""

    @property
    def allowed(self) -> Float[Array, "length values"]:
        """0 where a position may have a value, −∞ where not."""

    @property
    def sizes(self) -> Int[Array, " length"]:
        """The number of values of each position."""

    @property
    def given(self) -> Bool[Array, " length"]:
        """True at positions whose tokens were observed."""

    @property
    def path_evaluations(self) -> int:
        """Evaluations of the factors in an `extend` with ``paths``."""

    @property
    def looks_ahead(self) -> bool:
        """True if a factor answers for all hidden positions from one evaluation."""

    def blank(self) -> Logs:
        """Return zeros: log f of chains without a visible token."""

    def extend(
        self,
        tokens: Int[Array, " length"],
        rank: Int[Array, " length"],
        time: Int[Array, ""],
        positions: Int[Array, " block"],
        paths: bool,
        block: int | None = None,
    ) -> tuple[tuple[Float[Array, " rows"] | None, ...], Rises]:
        """Return log f of the tokens of lower rank than ``time``, None for batches that
        do not know it, and how much it grows if one of the positions becomes visible.
        Each network is called once. Of the positions after the first ``block`` some
        factors know nothing without a further evaluation, and answer 0."""

    def noised(
        self,
        tokens: Int[Array, " length"],
        level: Int[Array, ""],
        below: Int[Array, ""],
    ) -> NoisedAnswer:
        """Return what the factors say of tokens at a level of uniform noise, with
        ``below`` the level that follows. Each network is called once."""

    def log_density(self, logs: Logs) -> Float[Array, ""]:
        """log of the program's density of what is visible, from that of its factors."""

    def row_of(self, position: Position) -> Int[Array, " length"]:
        """Return the tokens of all sites in one row."""

    def position_of(self, tokens: Int[Array, " length"]) -> Position:
        """Return the tokens by site."""


class TokenDensity(AnnealedDensity):
    """The density of a program of categorical sites, made by `cp.compile`. There are no
    scores."""

    @property
    def tokens(self) -> TokenEvaluator:
        """The evaluator."""
        return cast(TokenEvaluator, self.evaluator)

    @property
    def length(self) -> int:
        """P, the number of positions of all sites."""
        return int(self.tokens.given.shape[0])

    @property
    def one_joint(self) -> bool:
        """True if log π of tokens is known."""
        return "one_joint" in self.capabilities

    def score(self, position: Position, level: Array | int) -> NoReturn:
        """Refuse: tokens have no gradient."""
        raise CapabilityError(
            "A density of tokens has no score.",
            where=self.described.where,
            fix="use density.log_density, or cp.infer.",
        )

    evaluate = score
    value_and_score = score

    def _not_of_one_joint(self) -> str:
        """The name of the first factor whose log-density of tokens is unknown."""
        return next(n for n, _, offers in self.described.offers if not _joint(offers))

    def _check(self, position: Position) -> None:
        super()._check(position)
        for name in self.sites:
            dtype = jnp.result_type(position[name])
            if not jnp.issubdtype(dtype, jnp.integer):
                raise ShapeError(
                    f"Site {name!r} has whole numbers; got {dtype}.",
                    fix="pass tokens 0, 1, 2, …",
                )
        concrete = [*position.values(), self.tokens.sizes]
        if any(isinstance(value, jax.core.Tracer) for value in concrete):
            return
        # A gather would take the nearest value that exists in the place of others.
        with jax.ensure_compile_time_eval():
            sizes = self.tokens.position_of(self.tokens.sizes)
        for name in self.sites:
            tokens = np.asarray(position[name])
            wrong = tokens[(tokens < 0) | (tokens >= np.asarray(sizes[name]))]
            if wrong.size:
                most = int(np.max(sizes[name])) - 1
                raise InvalidValueError(
                    f"Site {name!r} has the tokens 0 to {most}; got {wrong[0]}.",
                    fix="number the values of a token from 0 on.",
                )


class CategoricalDensity(TokenDensity):
    """π_k(x, σ) ∝ Π_s Π_i q_i(x_{σ_s} | x_{σ_<s})^{β_i} over the first positions of a
    random order σ, all but k reveals of them; made by `cp.compile` of a program with
    categorical sites.

    At level 0 all positions are visible. Chains travel by reveals (`cp.Reveal`).

    Attributes:
        steps: the reveal in which the s-th position of an order becomes visible.
    """

    steps: tuple[int, ...] = eqx.field(static=True, default=())

    @property
    def in_blocks(self) -> bool:
        """True if several positions become visible in one reveal."""
        return self.num_levels < self.length

    def in_steps(self, levels: str | ArrayLike) -> CategoricalDensity:
        """Return the density on ``levels`` reveals, each but the last of several
        positions at once; the last one of one position.

        Raises:
            InvalidValueError: anything but a whole number of reveals, of 1 to P.
        """
        if isinstance(levels, str) or np.ndim(levels) != 0:
            raise InvalidValueError(
                f"The levels of categorical sites are reveals; got {levels!r}.",
                fix=f"pass their number, such as levels={max(self.length // 2, 1)}, or "
                "leave levels out: one position becomes visible in each.",
            )
        number = check_count(levels, "levels")
        least = min(2, self.length)
        if not least <= number <= self.length:
            raise InvalidValueError(
                f"{self.length} positions cannot become visible in {number} reveals.",
                fix=f"pass a number from {least} to {self.length}.",
            )
        steps = reveal_steps(self.length, number)
        schedule = Reveals.over(visible_after(steps), self.length)
        return dataclasses.replace(self, steps=steps, schedule=schedule)

    def log_density(
        self, position: Mapping[str, ArrayLike], level: Array | int = 0
    ) -> Float[Array, ""]:
        """log π_0 of tokens at all positions, up to a constant.

        Raises:
            CapabilityError: a factor depends on the order of the reveals, so that the
                density is an average over orders; or a level above 0.
            ShapeError: a site is missing, unknown or of the wrong shape.
        """
        if not self.one_joint:
            name = self._not_of_one_joint()
            raise CapabilityError(
                f"log π of tokens is an average over all orders, as '{name}' depends "
                "on the order in which they become visible.",
                where=self.described.where,
                fix="estimate probabilities from samples, result.probability(…).",
            )
        if isinstance(level, jax.core.Tracer) or level != 0:
            raise CapabilityError(
                "Above level 0 a chain has an order beside its tokens.",
                where=self.described.where,
                fix="ask for level 0.",
            )
        self._check(dict(position))
        return _log_density(self.tokens, jax.tree.map(jnp.asarray, dict(position)))


class UniformDensity(TokenDensity):
    """π_k(x) ∝ Π_i p_{i,k}(x)^{β_i} of factors under uniform noise.

    `cp.compile` makes it of a program of tokens with a `cp.UniformDiffusion`, or with a
    schedule. At each level all tokens are visible, and chains travel by τ-leaping
    (`cp.TauLeaping`).

    Attributes:
        log_snr_range: the least and greatest log-SNR that all factors know.
    """

    log_snr_range: tuple[float, float] = eqx.field(
        static=True, default=(-np.inf, np.inf)
    )

    def on(self, schedule: Schedule) -> UniformDensity:
        """Return the same program on other levels.

        Raises:
            AlignmentError: a factor does not know one of these levels.
        """
        check_schedule(schedule)
        check_range(schedule, self.log_snr_range, self.described.where)
        evaluator: Any = self.evaluator
        on_levels = dataclasses.replace(evaluator, levels=schedule)
        return dataclasses.replace(self, schedule=schedule, evaluator=on_levels)

    def log_density(
        self, position: Mapping[str, ArrayLike], level: Array | int = 0
    ) -> Float[Array, ""]:
        """log π_k of tokens, up to a constant.

        Raises:
            CapabilityError: a factor is a network, which knows ratios alone.
            ShapeError: a site is missing, unknown or of the wrong shape.
        """
        if not self.one_joint:
            raise CapabilityError(
                f"log π of tokens is unknown, as '{self._not_of_one_joint()}' knows "
                "ratios of densities alone.",
                where=self.described.where,
                fix="estimate probabilities from samples, result.probability(…).",
            )
        self._check(dict(position))
        tokens = jax.tree.map(jnp.asarray, dict(position))
        return _noised_log_density(self.tokens, tokens, jnp.asarray(level))


def check_range(
    schedule: Schedule, log_snr_range: tuple[float, float], where: str
) -> None:
    """Refuse levels that a factor does not know."""
    low, high = log_snr_range
    log_snr = np.asarray(schedule.log_snr)
    slack = tuning.SAME_LOG_SNR
    outside = (log_snr < low - slack) | (log_snr > high + slack)
    if not outside.any():
        return
    level = int(np.argmax(outside))
    # Rounded inwards.
    low = float(np.ceil(100 * low) / 100)
    high = float(np.floor(100 * high) / 100)
    raise AlignmentError(
        f"A network was trained for log-SNR {low:g} to {high:g}, but level {level} has "
        f"{log_snr[level]:.3g}.",
        where=where,
        fix=f"use levels in this range, such as cp.Schedule.log_snr({len(log_snr)}, "
        f"min={low:g}, max={high:g}).",
    )


def reveal_steps(length: int, number: int) -> tuple[int, ...]:
    """Return the reveal of the s-th position of an order, for so many reveals of which
    the last has one position.

    Before a reveal of one position all that is visible is known exactly, so that
    potentials of the whole event are.
    """
    if number >= length:
        return tuple(range(length))
    blocks = np.array_split(np.arange(length - 1), number - 1)
    steps = np.concatenate([np.full(len(block), i) for i, block in enumerate(blocks)])
    return (*(int(step) for step in steps), number - 1)


def visible_after(steps: tuple[int, ...]) -> Int[np.ndarray, " levels"]:
    """Return the number of positions that are visible at each level, level 0 first."""
    counts = np.bincount(np.asarray(steps, int))
    return np.cumsum(counts)[::-1]


def _joint(offers: frozenset[str]) -> bool:
    return "one_joint" in offers


@eqx.filter_jit
def _log_density(evaluator: TokenEvaluator, position: Position) -> Array:
    tokens = evaluator.row_of(position)
    length = tokens.shape[0]
    last = jnp.asarray([length - 1])
    places = jnp.arange(length)
    bases, rises = evaluator.extend(tokens, places, last[0], last, paths=True)
    value = tokens[-1]
    logs = []
    for base, rise in zip(bases, rises, strict=True):
        assert base is not None
        logs.append(base + rise[:, 0, value])
    # Its own value at the last position is one of those that it may have.
    allowed = evaluator.allowed[places, tokens]
    return evaluator.log_density(tuple(logs)) + jnp.sum(allowed)


@eqx.filter_jit
def _noised_log_density(
    evaluator: TokenEvaluator, position: Position, level: Array
) -> Array:
    tokens = evaluator.row_of(position)
    bases = evaluator.noised(tokens, level, level).bases
    logs = []
    for base in bases:
        assert base is not None
        logs.append(base)
    allowed = evaluator.allowed[jnp.arange(tokens.shape[0]), tokens]
    return evaluator.log_density(tuple(logs)) + jnp.sum(allowed)
