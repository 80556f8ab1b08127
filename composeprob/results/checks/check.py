"""The interface of checks: `Check`, and `Need`, what a check needs of a run."""

from __future__ import annotations

import abc
import enum
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int

from composeprob.density.annealed import AnnealedDensity
from composeprob.density.overlap import in_question
from composeprob.findings import Finding
from composeprob.results.ended import EndedRun
from composeprob.results.importance import can_draw


class Need(enum.Enum):
    """Things that a check may need of a run, each with its words as the value."""

    LEVEL_0 = "chains at level 0"
    # Made when the status is first looked at, as it takes a compilation.
    EVALUATIONS = "evaluations of the density, within the checks' share"
    LEVEL_WEIGHTS = "weights of levels that support what is reported"
    LINE_INTEGRAL = "an accept test by line integrals"
    TRUSTED_SCORES = "an accept test by line integrals, or weights by scores alone"
    SCORES_ALONE = "a density without a log-density"
    COMPOSITION = "factors that can disagree"
    IMPORTANCE = "factors that can be drawn from and compared"
    FINITE = "finite positions"
    LAST_POSITIONS = "a run without draws"
    NO_FINDING = "a run without a finding"
    ANOTHER_RUN = "another run of the program"

    def met_by(self, run: EndedRun) -> bool:
        """Return whether a run offers it."""
        if self is Need.LEVEL_0:
            return run.arrived
        if self is Need.LEVEL_WEIGHTS:
            return run.level_weights
        if self is Need.LINE_INTEGRAL:
            return run.kernel.integrates_score
        if self is Need.TRUSTED_SCORES:
            return run.kernel.integrates_score or run.weighted_by_scores
        if self in (Need.SCORES_ALONE, Need.COMPOSITION, Need.IMPORTANCE):
            return self._met_by(run.density)
        if self is Need.FINITE:
            return run.finite
        # Draws may be on disk, and are not read for a check.
        if self is Need.LAST_POSITIONS:
            return run.ending.asked is None
        if self is Need.NO_FINDING:
            return not run.found
        return self is Need.EVALUATIONS

    def _met_by(self, density: AnnealedDensity) -> bool:
        """Return whether a run's density offers it."""
        if self is Need.COMPOSITION:
            return in_question(density)
        if self is Need.IMPORTANCE:
            return can_draw(density)
        return "energy" not in density.capabilities


class Check(abc.ABC):
    """A `Check` asks a run one question, and answers by findings of one code.

    ``code`` names its findings, ``withholds`` says whether they mislead standard
    errors, so that none is given, and ``meaning`` is its row in the table of *Did it
    work?*. A run is asked where it meets all of ``needs``; with `Need.EVALUATIONS` when
    the status is first looked at, else as the run ends. ``unless_said`` leaves a check
    out where another has found its code already.

    Example:
        >>> from composeprob.results.checks import CHECKS
        >>> [check.code.value for check in CHECKS if check.code == "not_saved"]
        ['not_saved']
    """

    code: ClassVar[str]
    withholds: ClassVar[bool]
    meaning: ClassVar[str]
    needs: ClassVar[frozenset[Need]] = frozenset()
    unless_said: ClassVar[bool] = False
    of_numbers: ClassVar[bool] = False
    """True for checks of scores, distances or barriers, which tokens do not have."""
    for_tokens: ClassVar[tuple[str, str]] = ("", "")
    """The text of its messages from which on a run of reveals has other advice, and
    that advice."""
    for_noised_tokens: ClassVar[tuple[str, str]] = ("", "")
    """The same for runs of tokens under uniform noise."""

    @abc.abstractmethod
    def ask(self, run: Any) -> list[Finding]:
        """Return what it finds in an `EndedRun`; an empty list where nothing is
        wrong."""

    def answers(self, run: Any) -> list[Finding]:
        """Return what it finds, with the advice for tokens where it has another."""
        findings = self.ask(run)
        if not run.tokens:
            return findings
        words = self.for_noised_tokens
        if run.reveals:
            words = self.for_tokens
        begin, advice = words
        if not begin:
            return findings
        told = []
        for finding in findings:
            known, found, _ = finding.message.partition(begin)
            text = known + advice if found else finding.message
            told.append(self.finding(text))
        return told

    def chains(self, run: EndedRun) -> Int[np.ndarray, " some"]:
        """Indices of the chains whose positions it evaluates. With `Need.EVALUATIONS`
        it is asked of a run that holds no others, so that a result is small."""
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
