"""The outcome of a run: `Status`, the findings of all checks."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import NoReturn

from composeprob.errors import InvalidValueError, WrongTypeError, a_kind
from composeprob.findings import Code, Finding
from composeprob.text import printable


@dataclass(frozen=True)
class Status:
    """The outcome of a run: nothing found, or one finding per problem with the levels,
    how much, and what to try.

    Args:
        findings: the gravest first; each has a ``.code``, a ``.message`` and
            ``.withholds``, and unpacks into the first two. A run without problems has
            none, or one of code `OK` that says why few of its chains count.

    Example:
        >>> from composeprob.findings import Code, Finding
        >>> from composeprob.results.status import Status
        >>> Status().ok
        True
        >>> Status((Finding(Code.INTERRUPTED, "Stopped at level 3.", True),)).code
        <Code.INTERRUPTED: 'interrupted'>
    """

    findings: tuple[Finding, ...] = ()

    @property
    def ok(self) -> bool:
        """True if there is no finding of a problem."""
        return self.code == Code.OK

    @property
    def code(self) -> str:
        """The gravest finding, `Code.OK` where there is none."""
        return self.findings[0].code if self.findings else Code.OK

    @property
    def withholds(self) -> bool:
        """True if standard errors would mislead, so that none is given."""
        return any(finding.withholds for finding in self.findings)

    @property
    def message(self) -> str:
        """Every finding, one per line."""
        messages = [finding.message for finding in self.findings]
        return "\n".join(messages) or "No problem was found."

    def has(self, code: Code | str) -> bool:
        """Return whether ``code``, such as ``"acceptance_collapsed"``, is among the
        findings.

        Args:
            code: a code of the library, or the string of a check of one's own.

        Raises:
            WrongTypeError: a code that is no text.
            InvalidValueError: text that is nearly a code of the library.
        """
        if not isinstance(code, str):
            raise WrongTypeError(
                f"has takes the code of a finding; got {a_kind(code)}.",
                fix='write result.status.has("shares_frozen").',
            )
        wanted = code.lower()  # printed in capitals
        if self.ok and wanted == Code.OK:
            return True
        if any(finding.code.lower() == wanted for finding in self.findings):
            return True
        # The code of a user's check may be any text, but a misspelled one of the
        # library would never be found.
        known = [each.value for each in Code]
        near = difflib.get_close_matches(wanted, known, 1, 0.8)
        if near and wanted not in known:
            raise InvalidValueError(
                f"The library has no finding of the code {code!r}.",
                fix=f'did you mean "{near[0]}"? A check of your own needs a code that '
                "differs more from it.",
            )
        return False

    def with_findings(self, *findings: Finding) -> Status:
        """The same outcome with more findings, the gravest first; a remark of code `OK`
        stays only where it is alone."""
        merged = sorted(
            (*self.findings, *findings), key=lambda finding: finding.gravity
        )
        if len(merged) > 1:
            merged = [finding for finding in merged if finding.code != Code.OK]
        return Status(tuple(merged))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, str):
            raise WrongTypeError(
                f"A status is no text, and was compared with {other!r}.",
                fix="ask result.status.ok, or compare its code: "
                "result.status.code == 'ok'.",
            )
        if not isinstance(other, Status):
            return NotImplemented
        return self.findings == other.findings

    def __bool__(self) -> NoReturn:
        raise WrongTypeError(
            "A status is neither true nor false: most runs have one.",
            fix="ask result.status.ok.",
        )

    def __hash__(self) -> int:
        return hash(self.findings)

    def __str__(self) -> str:
        lines = [str(finding) for finding in self.findings]
        return printable("\n".join(lines) or "OK")
