"""Limits on single numbers of a run: a table of checks, one row each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from composeprob import tuning
from composeprob.findings import Code, Finding
from composeprob.results.checks.check import Check, Need
from composeprob.results.ended import EndedRun


def _zero() -> float:
    """The limit of numbers that are 0 where there is nothing to say."""
    return 0.0


@dataclass(frozen=True)
class Limit(Check):
    """A check that a number of a run is above a limit.

    Args:
        name: of the row, as benchmarks print it.
        code: of its findings.
        withholds: whether these mislead standard errors.
        meaning: its row in the table of *Did it work?*.
        number: that is read from a run; NaN where the run has none.
        text: of the finding, from the number.
        most: the limit; a function, as experiments set the numbers of `tuning`.
        needs: of a run.
        unless_said: as for every check.
    """

    name: str
    code: Code
    withholds: bool
    meaning: str
    number: Callable[[EndedRun], float]
    text: Callable[[float], str]
    most: Callable[[], float] = _zero
    needs: frozenset[Need] = frozenset()
    unless_said: bool = False

    def ask(self, run: EndedRun) -> list[Finding]:
        return self.findings(self.number(run))

    def findings(self, number: float) -> list[Finding]:
        """Findings on the number."""
        if not number > self.most():
            return []
        return [self.finding(self.text(number))]


def _share_outside(run: EndedRun) -> float:
    """Share of the chains at density 0 or NaN; NaN where there is no log-density."""
    if run.log_density is None:
        return math.nan
    forbidden = np.isneginf(run.log_density) | np.isnan(run.log_density)
    return float(np.mean(forbidden))


def _text_on_missing(missing: float) -> str:
    """The text on nats by which log Z over every other level is greater."""
    times = f"e^{missing:.2g}"
    if missing < 5:
        times = f"{math.exp(missing):.2g}"
    return (
        f"The run over every other level found {times} times as much probability as "
        f"this one (log Z is greater by {missing:.2g}): this run misses most of it, "
        "such as a mode that few chains reach. Compile with more levels (schedule=), "
        "or try more chains."
    )


OUTSIDE_WALLS = Limit(
    name="OutsideWalls",
    code=Code.ZERO_DENSITY,
    withholds=True,
    meaning="chains ended at points of density 0 or NaN; with their share",
    number=_share_outside,
    text=(
        "{:.2%} of the chains are at points of density 0 or NaN, outside of the walls "
        "that bound the posterior: they did not find the way in. Their samples belong "
        "to no posterior; leave them out. Try cp.SMC, which gives such chains no "
        "weight, with more chains, or give the wall a slope, such as "
        "jax.nn.log_sigmoid(distance / width)."
    ).format,
    needs=frozenset({Need.LEVEL_0}),
)
DRIFT = Limit(
    name="Drift",
    code=Code.UNSETTLED,
    withholds=True,
    meaning=(
        "the population still drifted, or latents were still correlated with their "
        "earlier values, when the warm-up at level 0 ended"
    ),
    number=lambda run: run.trust.drift,
    text=(
        "The warm-up at level 0 ended while the population still drifted: its last "
        "block changed a mean or a width, or left latents correlated with their "
        "earlier values, by {:.2g} standard deviations. Go on with draws=, or try a "
        "smoother parameterization of the latents, such as a log-normal scale."
    ).format,
)
MEMORY = Limit(
    name="Memory",
    code=Code.UNSETTLED,
    withholds=True,
    meaning=(
        "in a run without a warm-up, latents are still correlated with their initial "
        "draws"
    ),
    number=lambda run: run.trust.memory,
    text=(
        "Latents are correlated by {:.2g} with where their chains began: the sampler "
        "moved them too little to forget it. End the run by a warm-up "
        "(then=cp.WarmUp()), or take more transitions at each level."
    ).format,
)
# Both runs have the same number of chains. A mode that one of them missed is missing in
# its evidence, and its means are those of the other modes.
MASS_MISSING = Limit(
    name="MassMissing",
    code=Code.LEVELS_TOO_FEW,
    withholds=True,
    meaning=(
        "the run over every other level found more than e² times as much probability, "
        "so that this one misses most of it"
    ),
    number=lambda run: run.trust.missing,
    text=_text_on_missing,
    most=lambda: tuning.FINDINGS.levels_error,
)
LEVELS_TOO_FEW = Limit(
    name="LevelsTooFew",
    code=Code.LEVELS_TOO_FEW,
    withholds=False,  # it concerns the evidence alone, whose error has it
    meaning="the discretisation error of log Z is more than 2 nats",
    number=lambda run: run.trust.discretisation,
    text=(
        "The discretisation error of log Z is about {:.2g} (estimated by using every "
        "other level). Compile with more levels (schedule=)."
    ).format,
    most=lambda: tuning.FINDINGS.levels_error,
    unless_said=True,
)
