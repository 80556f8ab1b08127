"""The interface of checks: `Check`, and `Need`, what a check needs of a run."""

from __future__ import annotations

import abc
import enum
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int

from composeprob.density.overlap import in_question
from composeprob.findings import Finding
from composeprob.results.ended import EndedRun
from composeprob.results.importance import can_draw


class Need(enum.Enum):
    """Things that a check may need of a run: the words for each, and the question
    whether a run offers it."""

    LEVEL_0 = ("chains at level 0", lambda run: run.arrived)
    EVALUATIONS = ("evaluations of the density", lambda run: True)
    LEVEL_WEIGHTS = (
        "weights of levels that support what is reported",
        lambda run: run.level_weights,
    )
    LINE_INTEGRAL = (
        "an accept test by line integrals",
        lambda run: run.kernel.integrates_score,
    )
    TRUSTED_SCORES = (
        "an accept test by line integrals, or weights by scores alone",
        lambda run: run.kernel.integrates_score or run.weighted_by_scores,
    )
    SCORES_ALONE = (
        "a density without a log-density",
        lambda run: "energy" not in run.density.capabilities,
    )
    COMPOSITION = (
        "factors that can disagree",
        lambda run: in_question(run.density),
    )
    IMPORTANCE = (
        "factors that can be drawn from and compared",
        lambda run: can_draw(run.density),
    )
    FINITE = ("finite positions", lambda run: run.finite)
    # Scores, distances and barriers are of numbers.
    NUMBERS = ("positions of numbers, not of tokens", lambda run: not run.tokens)
    # Draws may be on disk, and are not read for a check.
    LAST_POSITIONS = ("a run without draws", lambda run: run.ending.asked is None)
    NO_FINDING = ("a run without a finding", lambda run: not run.found)
    # Nothing that one run has: `Result.compare`, or the asking itself, finds it.
    ELSEWHERE = ("an answer from elsewhere", lambda run: False)

    def __init__(self, words: str, met_by: Callable[[EndedRun], bool]):
        self.words = words
        self.met_by = met_by


LATER = frozenset({Need.EVALUATIONS, Need.NO_FINDING})
"""Needs with which a check is asked when the status is first looked at: evaluations
take a compilation, and findings may come until then."""


class Check(abc.ABC):
    """A `Check` asks a run one question, and answers by findings of one code.

    ``code`` names its findings, ``withholds`` says whether they mislead standard
    errors, so that none is given, and ``meaning`` is its row in the table of *Did it
    work?*. A run is asked where it meets all of ``needs``: when the status is first
    looked at if one of these is in `LATER`, else as the run ends. ``unless_said``
    leaves a check out where one that was asked before it has found its code already.

    ``advice`` says what to try, at the end of a message; runs of tokens have other
    advice where ``advice_for_reveals`` or ``advice_for_noise``, of tokens under uniform
    noise, is not empty.

    Example:
        >>> from composeprob.results.checks import CHECKS
        >>> [check.code.value for check in CHECKS if check.code == "not_saved"]
        ['not_saved']
    """

    # Of a class, or of an object where these are rows of a table.
    code: str
    withholds: bool
    meaning: str
    needs: frozenset[Need] = frozenset()
    unless_said: bool = False
    advice: ClassVar[str] = ""
    advice_for_reveals: ClassVar[str] = ""
    advice_for_noise: ClassVar[str] = ""

    @abc.abstractmethod
    def ask(self, run: Any) -> list[Finding]:
        """Return what it finds in an `EndedRun`; an empty list where nothing is
        wrong."""

    def advised(self, run: EndedRun) -> str:
        """What to try, by the kind of run."""
        if run.reveals:
            return self.advice_for_reveals or self.advice
        if run.tokens:
            return self.advice_for_noise or self.advice
        return self.advice

    def chains(self, run: EndedRun) -> Int[np.ndarray, " some"]:
        """Indices of the chains whose positions it evaluates.

        With `Need.EVALUATIONS` the run that it is asked holds the arrays of `Chains`
        for these alone, so that a result is small. Its genealogy, samples and number of
        chains are those of all.
        """
        return np.arange(run.num_chains)

    def finding(self, message: str) -> Finding:
        """A finding of this check."""
        return Finding(self.code, message, self.withholds)


def levels_in_words(mask: Sequence[bool] | np.ndarray) -> str:
    """``level 3`` or ``levels 0–4, 9`` for a boolean mask over levels."""
    index = np.flatnonzero(mask)
    runs = np.split(index, np.flatnonzero(np.diff(index) > 1) + 1)
    ranges = []
    for run in runs:
        if len(run) == 1:
            ranges.append(str(run[0]))
        elif len(run):
            ranges.append(f"{run[0]}–{run[-1]}")
    if len(ranges) > 6:
        ranges = [*ranges[:5], f"… ({len(index)} levels in all)"]
    noun = "level" if len(index) == 1 else "levels"
    return f"{noun} {', '.join(ranges)}"
