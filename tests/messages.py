"""Snapshots of messages: statuses, errors, help texts and what is printed.

A test of behaviour matches the kind of an error, the code of a status, and names and
numbers that the user gave. The wording is held here, in ``__snapshots__`` beside each
test file, so that rewording is one command, ``make snapshots``, and one diff.
"""

import re

import pytest

MASKS = (
    (r"\x1b\[[0-9;]*m", ""),  # colours of a terminal
    (r"\b(\w+\.py):\d+", r"\1:LINE"),
    (r"(/[\w.+~-]+)+/(?=[\w.+-])", "FOLDER/"),
    (r"0x[0-9a-f]{6,}", "ADDRESS"),
    (r"\d+\.\d+(e[+-]?\d+)?|\d+e[+-]?\d+", "NUMBER"),
    (r"[ \t]+(?=\n|$)", ""),
)
"""Patterns of what another machine or another line of a test would change.

Numbers with a decimal point are rounded sums, which differ between processors; tests of
behaviour look at them.
"""

_requests: list[pytest.FixtureRequest] = []


@pytest.fixture(autouse=True)
def _message_snapshots(request: pytest.FixtureRequest):
    """Make the running test known to `check_wording`."""
    _requests.append(request)
    yield
    _requests.pop()


def wording(text: str) -> str:
    """Return a message without what differs between machines."""
    for pattern, mask in MASKS:
        text = re.sub(pattern, mask, text)
    return text


def check_wording(text: str, name: str | None = None) -> None:
    """Hold a message of the running test against its snapshot.

    Args:
        text: the message.
        name: of the snapshot, where one test has several; left out, they are counted.
    """
    snapshot = _requests[-1].getfixturevalue("snapshot")
    if name is not None:
        snapshot = snapshot(name=name)
    assert wording(text) == snapshot
