"""Findings: the problems that checks name in a run, in its program or in its models."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass


class Code(enum.StrEnum):
    """Codes of the library's findings, the gravest first after `OK`; as a string, each
    is its lower-case name. A check of your own has a string of its own."""

    OK = "ok"
    INTERRUPTED = "interrupted"  # by Ctrl-C, before the run was complete
    SAMPLES_DIVERGED = "samples_diverged"
    NON_FINITE = "non_finite"  # proposals were NaN
    ZERO_DENSITY = (
        "zero_density"  # chains outside of the support, or of what the data allow
    )
    NOT_CONSERVATIVE = (
        "not_conservative"  # a score under a Metropolis test is not a gradient
    )
    NETWORK_DOUBTED = (
        "network_doubted"  # a network is not the distribution that it stands for
    )
    NO_OVERLAP = "no_overlap"  # factors disagree where the samples are
    OUT_OF_TRAINING = "out_of_training"  # samples are where a network was not trained
    ACCEPTANCE_COLLAPSED = "acceptance_collapsed"
    WEIGHTS_COLLAPSED = "weights_collapsed"  # few effective chains at a level
    ANCESTORS_COLLAPSED = "ancestors_collapsed"  # few effective ancestors at the end
    MODES_MISSING = "modes_missing"
    # Importance samples lie where no chain is, or moves under a reward lead there.
    MODES_UNREACHED = "modes_unreached"
    SHARES_FROZEN = "shares_frozen"  # mode proportions are unreliable
    OFF_TARGET = "off_target"  # samples contradict Stein's identity at level 0
    UNSETTLED = "unsettled"  # the warm-up at level 0 did not converge
    LEVELS_TOO_FEW = "levels_too_few"  # discretisation error of the evidence
    CHECK_FAILED = "check_failed"  # a check of a user's raised an exception
    NOT_SAVED = "not_saved"  # a file could not be written


GRAVITY: dict[str, int] = {code.value: rank for rank, code in enumerate(Code)}
"""Ranks of codes, 1 for the gravest, after 0 for `OK`; those of a user's checks come
after all."""


@dataclass(frozen=True)
class Finding:
    """A `Finding` names one problem; it unpacks into its code and its message.

    Args:
        code: a `Code`, or the string of a check of one's own.
        message: what was found, where and how much, and what to try.
        withholds: whether standard errors would mislead, so that none is given.
        factor: the name of the factor that it concerns, if it concerns one.
        level: the level at which it shows, if it shows at one.
        share: the share of samples that it concerns, if it was measured.
        divides: whether the program divides by the factor.

    Example:
        >>> from composeprob.findings import Code, Finding
        >>> code, message = Finding(Code.INTERRUPTED, "Stopped at level 3.", True)
        >>> code.value, message
        ('interrupted', 'Stopped at level 3.')
    """

    code: str
    message: str
    withholds: bool
    factor: str | None = None
    level: int | None = None
    share: float | None = None
    divides: bool = False

    @property
    def gravity(self) -> int:
        """Rank among findings, 1 for the gravest."""
        return GRAVITY.get(self.code, len(GRAVITY))

    def __iter__(self) -> Iterator[str]:
        yield self.code
        yield self.message

    def __str__(self) -> str:
        return f"{self.code.upper()}: {self.message}"
