"""A run that has ended, as checks see it: where its chains are, how they came there,
and what its estimates rest on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.categorical import CategoricalDensity, TokenDensity
from composeprob.density.evaluation import Position
from composeprob.density.learned_scores import OwnScore
from composeprob.findings import Finding
from composeprob.records import Records
from composeprob.results.chains import Chains
from composeprob.results.estimates import Genealogy
from composeprob.results.shares import Proportions
from composeprob.results.trust import Trust

Value = TypeVar("Value")


def weighs_by_scores(weighted: bool, density: AnnealedDensity) -> bool:
    """Return whether importance weights, if there are any, are those of scores
    alone."""
    return weighted and "energy" not in density.capabilities


class KeyUse(IntEnum):
    """Numbers that are folded into a run's key, one for each use: directions of curl,
    the noise of samples under which factors are compared, the chains of a pilot run,
    importance samples, and samples of single factors whose scores are checked."""

    CURL = 2**31 - 2
    OVERLAP = 2**31 - 7
    PILOT = 2**31 - 8
    IMPORTANCE = 2**31 - 9
    OWN_DRAWS = 2**31 - 10

    def folded_into(self, key: Array) -> Array:
        """The key of this use, from that of a run."""
        return jax.random.fold_in(key, np.uint32(self))


class Ending(NamedTuple):
    """End of a run: how far it came, and whether it was saved."""

    interrupted: str | None = None  # the name of the stage that Ctrl-C ended
    finishers: int = 0  # of the sampler
    drawn: int = 0  # draws of each chain
    asked: int | None = None  # draws that were asked for; None for last positions only
    is_saved: bool = False  # whether a last checkpoint was written
    unsaved: str | None = None  # the reason why it could not be written


class Kernel(NamedTuple):
    """Facts about the sampler's moves."""

    adjusted: bool | Sequence[bool] = True  # has it, or each block, a Metropolis test
    blocks: Sequence[str] = ()  # names of blocks; empty where all sites move together
    proposals: np.ndarray | int = 1  # of all chains, at each level or at all alike
    integrates_score: bool = False  # its accept test is a line integral of the score


@dataclass(frozen=True, eq=False)
class EndedRun(Chains):
    """An `EndedRun` is what a check asks: the `Chains` of a run, and the facts below.
    Arrays over levels begin at level 0, and positions are those of the sampler: static
    sites unconstrained.

    Args:
        density: that was sampled.
        key: of the run.
        arrived: whether the chains are at level 0.
        completed: number of levels that were completed, from the noisiest.
        log_snr: of the levels, (K,).
        records: of these levels, NumPy's arrays (K,), or (K, B) of B blocks.
        level_weights: whether the weights of levels support what is reported.
        kernel: the sampler's moves.
        ending: how far the run came, and whether it was saved.
        samples: as those of the result.
        genealogy: their ancestors and weights.
        proportions: what the mode proportions rest on.
        trust: what means, shares and evidence rest on.
        evaluations: what one check may spend on this density, over all chains: a
            twentieth of what the levels took.
        curl: returns the relative curl of each factor whose score is not promised to be
            a gradient.
        own_scores: compares trained scores with samples of their own factors, under the
            conditions of given positions, by so many evaluations.
        untracked: whether the density has constant exponents since its chains carry no
            log-densities, with which they would grow.
        found: findings of the checks that were asked before.
        withheld: whether errors are withheld by a check that needs no evaluations.
    """

    density: AnnealedDensity
    key: Array
    arrived: bool
    completed: int
    log_snr: Float[np.ndarray, " levels"]
    records: Records
    level_weights: bool
    kernel: Kernel
    ending: Ending
    samples: dict[str, np.ndarray]
    genealogy: Genealogy
    proportions: Proportions
    trust: Trust
    evaluations: float
    curl: Callable[[], dict[str, float]]
    own_scores: Callable[[Position, Array, float], dict[str, OwnScore]]
    untracked: bool = False
    found: tuple[Finding, ...] = ()
    withheld: bool = False
    # Answers that several checks share, by name.
    answers: dict[str, object] = field(default_factory=dict)

    @property
    def num_chains(self) -> int:
        """N."""
        return self.trust.num_chains

    @property
    def tokens(self) -> bool:
        """True if its sites have tokens."""
        return isinstance(self.density, TokenDensity)

    @property
    def reveals(self) -> bool:
        """True if its levels are reveals of tokens."""
        return isinstance(self.density, CategoricalDensity)

    @property
    def size(self) -> int:
        """Number of numbers of one position."""
        return sum(math.prod(site.shape) for site in self.density.sites.values())

    @property
    def visited(self) -> Bool[np.ndarray, " levels"]:
        """The levels that were completed."""
        number = len(self.log_snr)
        return np.arange(number) >= number - self.completed

    @property
    def weighted_by_scores(self) -> bool:
        """True if chains had importance weights, of a density without an energy."""
        return weighs_by_scores(self.records.weighted, self.density)

    @property
    def finite(self) -> bool:
        """True if all positions are finite."""
        return all(np.isfinite(values).all() for values in self.positions.values())

    @property
    def first_chains(self) -> Int[np.ndarray, " few"]:
        """As many chains as most checks evaluate."""
        return np.arange(min(self.num_chains, tuning.CHECKS.most_chains))

    def with_findings(self, found: tuple[Finding, ...], withheld: bool) -> EndedRun:
        """The run after checks that found so much."""
        return dataclasses.replace(self, found=found, withheld=withheld)

    def once(self, name: str, measure: Callable[[], Value]) -> Value:
        """Return what ``measure`` returns, which is called once for each name: several
        checks may ask one measurement."""
        if name not in self.answers:
            self.answers[name] = measure()
        answer: Value = self.answers[name]  # type: ignore[assignment]
        return answer
