"""Snapshots of messages: statuses, errors, help texts and what is printed.

A test of behaviour matches the kind of an error, the code of a status, and names and
numbers that the user gave. The wording is held here, in ``__snapshots__`` beside each
test file, so that rewording is one command, ``make snapshots``, and one diff.
"""

import html
import re

import pytest

from composeprob.results.status import Code, Status

MASKS = (
    (r"\x1b\[[0-9;]*m", ""),  # colours of a terminal
    (r"\b(\w+\.py):\d+", r"\1:LINE"),
    (r"(/[\w.+~-]+)+/(?=[\w.+-])", "FOLDER/"),
    (r"FOLDER/test_\w+", "FOLDER/TEST"),  # pytest counts folders of equal names
    (r"%2[EF][\w.%-]*", "PATH"),  # as TensorStore writes keys of a store
    (r"\[tensorstore_spec=.*", "[SPECIFICATION"),
    (r"0x[0-9a-f]{6,}", "ADDRESS"),
    (r"JSONDecodeError: [^(]*\(char \d+\)", "JSONDecodeError"),
    # Of safetensors' own words: which of several bad tensors it names is by chance.
    (r"(?<=deserializing header: )[^(\n]*(?= \()", "REASON"),
    (r"\d+\.\d+(e[+-]?\d+)?|\d+e[+-]?\d+", "NUMBER"),
    (r"[ \t]+(?=\n|$)", ""),
)
"""Patterns of what another machine or another line of a test would change.

Numbers with a decimal point are rounded sums, which differ between processors; tests of
behaviour look at them.
"""

ESTIMATES = (
    (r"(?<!\w)[+−-]?(NUMBER|\d[\d,]*)( ?%)?(?!\w)", "NUMBER"),
    (r"NUMBER([–, ]+NUMBER)+", "NUMBER"),  # lists of levels
    (r"(level|chain|group|mode|site)s?\b", r"\1s"),
    (r" {2,}", "  "),  # columns, as wide as their numbers
)
"""Patterns of numbers that a run estimates, and of words that count them."""

_requests: list[pytest.FixtureRequest] = []


@pytest.fixture(autouse=True)
def _message_snapshots(request: pytest.FixtureRequest):
    """Make the running test known to `check_wording`."""
    _requests.append(request)
    yield
    _requests.pop()


def visible(page: str) -> str:
    """Return the text of a page of HTML, without its tags, styles and scripts."""
    page = re.sub(r"<(style|script)\b.*?</\1>", "", page, flags=re.DOTALL)
    lines = html.unescape(re.sub(r"<[^>]*>", "\n", page)).splitlines()
    return "\n".join(line.strip() for line in lines if line.strip())


def wording(text: str, *, estimated: bool = False) -> str:
    """Return a message without what differs between machines.

    Args:
        text: the message.
        estimated: whether a run estimates its whole numbers, which then differ too.
    """
    patterns = MASKS + ESTIMATES if estimated else MASKS
    for pattern, mask in patterns:
        text = re.sub(pattern, mask, text)
    return text


def check_wording(
    text: str, name: str | None = None, *, estimated: bool = False
) -> None:
    """Hold a message of the running test against its snapshot.

    Args:
        text: the message.
        name: of the snapshot, where one test has several; left out, they are counted.
        estimated: whether a run estimates its whole numbers.
    """
    snapshot = _requests[-1].getfixturevalue("snapshot")
    if name is not None:
        snapshot = snapshot(name=name)
    assert wording(text, estimated=estimated) == snapshot


def check_finding(status: Status, code: Code | str) -> str:
    """Return the text of a status's only finding of a code, once its wording is held
    against its snapshot."""
    (text,) = [text for found, text in status.findings if found == code]
    check_wording(text, estimated=True)
    return text
