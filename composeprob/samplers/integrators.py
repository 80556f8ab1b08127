"""How chains that are weighed come from a level to the next: what a reverse step of `SMC` is asked for."""

from __future__ import annotations

import abc
from typing import ClassVar, NamedTuple, TypeAlias

import equinox as eqx
from jax import Array
from jaxtyping import PyTree

from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Evaluation, Position
from composeprob.samplers.spread import Spread
from composeprob.samplers.turned import Turned

Seen: TypeAlias = PyTree[Array]
"""What all chains together say of a level; None where nobody asks."""


class Departure(NamedTuple):
    """Where a reverse step leads one chain before it is corrected.

    Attributes:
        moved: x' at the level below.
        noise: what `Integrator.settle` has to know of the noise in it.
        log_ratio: log p(x')/q(x'), p the law of the step along ∇log F, q that of the one that is made, which leans
            towards ∇log G; a scalar.
    """

    moved: Position
    noise: PyTree[Array]
    log_ratio: Array


class Integrator(eqx.Module):
    """A step of the reverse process from a level to the one below it, for chains that are weighed.

    The step follows S + u, the score of F and a control, and weights have ∇·u + ⟨u, S⟩ added to the rate; so they stay
    exact for every u that is the same function for all chains.

    Attributes:
        control: whether it has one.
    """

    control: bool = eqx.field(static=True)
    name: ClassVar[str]

    @abc.abstractmethod
    def look(
        self,
        spread: Spread,
        density: AnnealedDensity,
        level: Array,
        chains: tuple[Position, Evaluation],
        log_weights: Array,
    ) -> Seen:
        """What all chains together say of a level, the same on every device; None where nobody asks.

        Args:
            spread: which chains are where.
            density, level: where they are.
            chains: (position, evaluation) of every chain here, evaluated under ``level``.
            log_weights: theirs, (n,).
        """

    @abc.abstractmethod
    def steered(
        self,
        evaluation: Evaluation,
        position: Position,
        half: Array,
        seen: Seen,
        density: AnnealedDensity,
        level: Array,
    ) -> Evaluation:
        """One chain's evaluation with u added to what a reverse step follows, and ∇·u + ⟨u, S⟩ to the rate.

        Args:
            evaluation, position: the chain, under ``level``.
            half: 0 or 1, the half of the chains that it belongs to.
            seen: what `look` said of the level.
        """

    @abc.abstractmethod
    def depart(
        self, key: Array, position: Position, began: Evaluation, seen: Seen, density: AnnealedDensity, *levels: Array
    ) -> Departure:
        """The step of one chain from the first of two levels to the second, by what is known at its start.

        Args:
            key: the chain's, of this level.
            position: x.
            began: `steered`, at x.
            seen: what `look` said of the first level.
            density: gives the schedule.
            levels: where it starts, and where it ends.
        """

    @abc.abstractmethod
    def settle(
        self,
        departure: Departure,
        ended: Evaluation,
        position: Position,
        began: Evaluation,
        seen: tuple[Seen, Seen],
        density: AnnealedDensity,
        *levels: Array,
    ) -> tuple[Position, Array]:
        """The step once more, by what is known at both ends; and by how much that moved the chain, squared, in units of
        the density's width there, as a mean over entries.

        Args:
            departure: of `depart`.
            ended: `steered`, where that led.
            position, began: where the step started.
            seen: what `look` said of both levels.
            density, levels: as of `depart`.
        """

    @abc.abstractmethod
    def turned(self, seen: tuple[Seen, Seen], density: AnnealedDensity, *levels: Array) -> Turned:
        """Where noise leads back to from where the step ends, for `averaged_potential`.

        Args:
            seen: what `look` said of both levels.
            density, levels: as of `depart`.
        """
