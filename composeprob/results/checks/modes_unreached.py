"""Modes that no chain has reached."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from composeprob import tuning
from composeprob.density.evaluation import Position
from composeprob.findings import Code, Finding
from composeprob.results.checks.check import Check, Need
from composeprob.results.ended import EndedRun, KeyUse
from composeprob.results.estimates import Genealogy
from composeprob.results.geometry import spaced
from composeprob.results.importance import Unlike, unlike


class ByImportance(Check):
    """Common part of the checks that ask `composeprob.results.importance`."""

    needs = frozenset({Need.LEVEL_0, Need.EVALUATIONS, Need.IMPORTANCE})

    def unlike(self, run: EndedRun) -> Unlike:
        """Differences of importance samples from the chains, asked once for all of
        these checks."""
        return run.once("importance samples", lambda: _unlike(run))


def _unlike(run: EndedRun) -> Unlike:
    """Compare importance samples with the chains, or with the draws of few of them."""
    key = KeyUse.IMPORTANCE.folded_into(run.key)
    few = run.num_chains < tuning.COMPARISON.fewest
    if not (few and run.ending.drawn):
        return unlike(run.density, run.positions, run.genealogy, key, run.evaluations)
    positions = _draws(run)
    number = len(next(iter(positions.values())))
    genealogy = Genealogy.from_log_weights(np.zeros(number))
    # A share of the evaluations of few chains would be nothing.
    evaluations = max(run.evaluations, tuning.IMPORTANCE.block)
    found = unlike(run.density, positions, genealogy, key, evaluations)
    # Draws depend on one another, so that shares of them differ by more than chance.
    return found._replace(shares="")


def _draws(run: EndedRun) -> Position:
    """Positions of draws of few chains, at most a block, evenly spaced."""
    values = {}
    for name in run.density.sites:
        drawn = np.asarray(run.samples[name])
        drawn = drawn.reshape(-1, *drawn.shape[2:])
        some = spaced(len(drawn), tuning.IMPORTANCE.block)
        values[name] = jnp.asarray(drawn[some])
    # Nothing is drawn anew: all sites have values.
    key = jax.random.key(0)
    unread = run.density.evaluator.unread
    positions = jax.vmap(lambda one: unread(one, key))(values)
    return {name: np.asarray(each) for name, each in positions.items()}


class ModesUnreached(ByImportance):
    """Ask whether importance samples find probability where no chain is."""

    code = Code.MODES_UNREACHED
    withholds = True
    meaning = (
        "importance samples from the program's own factors find probability where no "
        "chain is, behind a barrier of log π₀; with the probability, and an example"
    )
    unless_said = True

    def ask(self, run: EndedRun) -> list[Finding]:
        text = self.unlike(run).unreached
        return [self.finding(text)] if text else []
