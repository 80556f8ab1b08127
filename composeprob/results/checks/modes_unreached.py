"""Modes that no chain has reached."""

from __future__ import annotations

from composeprob.findings import Code, Finding
from composeprob.results.checks.check import Check, Need
from composeprob.results.ended import EndedRun, KeyUse
from composeprob.results.importance import Unlike, unlike


class ByImportance(Check):
    """Common part of the checks that ask `composeprob.results.importance`."""

    needs = frozenset({Need.LEVEL_0, Need.EVALUATIONS, Need.IMPORTANCE})

    def unlike(self, run: EndedRun) -> Unlike:
        """Differences of importance samples from the chains, asked once for all of
        these checks."""
        key = KeyUse.IMPORTANCE.folded_into(run.key)
        return run.once(
            "importance samples",
            lambda: unlike(
                run.density, run.positions, run.genealogy, key, run.evaluations
            ),
        )


class ModesUnreached(ByImportance):
    """Ask whether importance samples find probability where no chain is."""

    code = Code.MODES_UNREACHED
    withholds = True
    meaning = (
        "importance samples from the program's own factors find probability where no "
        "chain is, behind a barrier of log π₀; with the probability, and an example"
    )

    def ask(self, run: EndedRun) -> list[Finding]:
        text = self.unlike(run).unreached
        return [self.finding(text)] if text else []
