"""A run that was stopped before its end."""

from __future__ import annotations

from composeprob.findings import Code, Finding
from composeprob.results.checks.check import Check
from composeprob.results.ended import EndedRun


class Interrupted(Check):
    """Ask whether Ctrl-C ended the run, and what its samples are then."""

    code = Code.INTERRUPTED
    withholds = True
    meaning = "the run was stopped before its end"

    def ask(self, run: EndedRun) -> list[Finding]:
        text = self.stopped_above(run.completed, len(run.log_snr))
        if text and run.reveals:
            text = (
                f"Stopped after {run.completed} of {len(run.log_snr)} reveals: tokens "
                "that are still hidden are 0. Run it again to the end, or with fewer "
                "chains if it takes too long."
            )
        if not text and run.arrived:
            text = self.stopped_at_level_0(run)
        if not text:
            return []
        if run.ending.is_saved:
            text += " The same call goes on from its checkpoint."
        return [self.finding(text)]

    @staticmethod
    def stopped_above(completed: int, num_levels: int) -> str:
        """Text on a run that completed some of its levels; empty if all."""
        if completed >= num_levels:
            return ""
        state = "the samples are pure noise"
        if completed:
            state = f"the samples carry the noise of level {num_levels - completed}"
        return (
            f"Stopped after {completed} of {num_levels} levels: {state}, not level 0. "
            "Run it again to the end, or with fewer chains or levels if it takes too "
            "long."
        )

    @staticmethod
    def stopped_at_level_0(run: EndedRun) -> str:
        """Text on a run that arrived and did not end; empty if it did."""
        ending = run.ending
        if ending.interrupted in ("descend", "finish") and ending.finishers:
            return (
                "Stopped at level 0 before its global moves or its warm-up there had "
                "ended. The samples are those of that moment, and latents may not have "
                "converged."
            )
        if ending.asked is not None and ending.drawn < ending.asked:
            return (
                f"Stopped after {ending.drawn} of {ending.asked} draws; these are of "
                "level 0. Run it again to the end, or with fewer."
            )
        return ""
