"""Files that could not be written."""

from __future__ import annotations

from composeprob.findings import Code, Finding
from composeprob.results.checks.check import Check
from composeprob.results.ended import EndedRun


class NotSaved(Check):
    """Ask whether a checkpoint, or a store of samples, could not be written."""

    code = Code.NOT_SAVED
    withholds = False
    meaning = "a checkpoint or a store could not be written"

    def ask(self, run: EndedRun) -> list[Finding]:
        failure = run.ending.unsaved
        if failure is None:
            return []
        text = (
            f"The last checkpoint could not be written: {failure}. The samples are "
            "those of a run without it: save them with result.save; make room or "
            "choose another folder."
        )
        return [self.finding(text)]

    def of_store(self, failure: str) -> Finding:
        """The finding on a store, which is written after all checks."""
        return self.finding(
            f"The store could not be written: {failure}. The samples of this result "
            "are those that the store has. Make room or choose another folder; with "
            "checkpoint_dir= the same call goes on from the last checkpoint."
        )
