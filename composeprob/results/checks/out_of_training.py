"""Trained factors that are evaluated where they were never trained."""

from __future__ import annotations

from composeprob.findings import Code, Finding
from composeprob.results.checks.no_overlap import Agreement
from composeprob.results.ended import EndedRun


class OutOfTraining(Agreement):
    """Ask whether a trained factor is evaluated where its own noised samples never
    are."""

    code = Code.OUT_OF_TRAINING
    withholds = False  # errors are those of the model as it stands
    meaning = "a trained factor is evaluated where its own noised samples never are"

    def ask(self, run: EndedRun) -> list[Finding]:
        return [found for found in self.findings(run) if found.code == self.code]
