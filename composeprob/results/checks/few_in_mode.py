"""Separated modes whose share rests on copies of few ancestors."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from composeprob import tuning
from composeprob.density.points import barriers
from composeprob.findings import Code, Finding
from composeprob.results import shares
from composeprob.results.checks.check import Check, Need
from composeprob.results.ended import EndedRun
from composeprob.results.estimates import Genealogy
from composeprob.results.geometry import chosen, spaced


class FewInMode(Check):
    """Ask whether each group of chains, separated from the others by barriers of log π₀
    (integrals of the score where there is no log-density), rests on enough ancestors.

    A mode that holds little at noisy levels and much at level 0 begins with few chains,
    and resampling copies these. Its share is known as badly as their number, which the
    effective number of all ancestors does not show.

    Where log-densities are tracked, means have an error by the run's repetition
    (`Genealogy.departure`), which knows more of such a share than the number of its
    ancestors: then only shares that no error can rest on are found. Where chains moved
    after their arrival, the number of ancestors is asked all the same.
    """

    code = Code.SHARES_FROZEN
    withholds = True
    meaning = (
        "the share of a separated mode rests on copies of fewer than eight effective "
        "ancestors; than three, where exponents grow by tracked log-densities and "
        "chains did not move at level 0; unless as great a share of the other chains "
        "has fewer than that too, and all together have five"
    )
    needs = frozenset({Need.LEVEL_0, Need.EVALUATIONS, Need.FINITE, Need.NUMBERS})
    unless_said = True

    def chains(self, run: EndedRun) -> Int[np.ndarray, " some"]:
        return spaced(run.num_chains, tuning.SHARES.most)

    def ask(self, run: EndedRun) -> list[Finding]:
        some = self.chains(run)
        weights = run.genealogy.weights[some]
        weighted = np.flatnonzero(weights)
        genealogy = Genealogy.from_ancestors(
            weights[weighted], run.genealogy.index[some][weighted]
        )
        # Groups of chains that are their own ancestors are not copies.
        copied = len(np.unique(genealogy.index)) < len(genealogy.weights)
        gaps = _affordable_gaps(run)
        if len(weighted) < tuning.SHARES.fewest_ancestors or gaps < 1 or not copied:
            return []
        positions = chosen(run.positions, weighted)
        index = shares.across_gaps(positions, barriers(run.density), gaps)
        found = shares.few_in_group(index, genealogy, fewest_of_mode(run))
        if found is None or not index.any():
            return []
        # In the words of two groups, this one and all others.
        places = shares.largest_difference(positions, (index != found.group) * 1)
        text = (
            f"A group of chains behind a barrier of log π₀ holds {found.share:.1%} of "
            "them, which are copies of few ancestors (effective number "
            f"{found.ancestors:.1f}): {places}. The share is as uncertain as with so "
            "few chains, and usually too small. Try more chains, closer levels, or "
            "factors whose log-densities can be compared (cp.calibrate), whose "
            "exponents grow."
        )
        return [self.finding(text)]


def fewest_of_mode(run: EndedRun) -> float:
    """Effective number of ancestors that the share of a mode needs."""
    repeated = run.density.tracks and run.genealogy.repeated is not None
    if repeated and run.arrival is None:
        return tuning.ERRORS.fewest_ancestors
    return tuning.SHARES.fewest_ancestors


def _affordable_gaps(run: EndedRun) -> int:
    """Number of gaps whose barriers the checks' share of evaluations pays."""
    points = 11
    if "energy" not in run.density.capabilities:
        points = tuning.BY_SCORE.between + 2
    return int(min(tuning.SHARES.gaps, run.evaluations // points))
