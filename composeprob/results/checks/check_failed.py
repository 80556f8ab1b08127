"""A check of a user's that failed."""

from __future__ import annotations

from composeprob.findings import Code, Finding
from composeprob.results.checks.check import Check, Need
from composeprob.results.ended import EndedRun


class CheckFailed(Check):
    """Say that a check of a user's raised an exception: its question is open, so that
    the run is not OK. It is not lost either, nor are its errors."""

    code = Code.CHECK_FAILED
    withholds = False
    meaning = "a check of your own raised an exception, so that its question is open"
    needs = frozenset({Need.ELSEWHERE})
    advice = (
        "Let ask(run) return a list, [self.finding(text)], or [] where nothing is "
        "wrong."
    )

    def ask(self, run: EndedRun) -> list[Finding]:
        return []

    def of(self, check: Check, error: Exception) -> Finding:
        """The finding about a check that raised this error."""
        return self.finding(
            f"The check {type(check).__name__} failed, and says nothing of this run: "
            f"{type(error).__name__}: {error}. {self.advice}"
        )
