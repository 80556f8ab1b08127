"""The contract of every refusal, and tables of them."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from composeprob.errors import ComposeProbError
from messages import check_wording

Rows = Mapping[type[ComposeProbError], Mapping[str, Any]]


def rows(table: Rows) -> list[Any]:
    """Parameters (kind, call, words, fix) of a table by the kind of error.

    A row may end before its fix; the name of a row with a call alone is its words.
    """
    parameters = []
    for kind, cases in table.items():
        for name, row in cases.items():
            call, words, *fix = row if isinstance(row, tuple) else (row, name)
            parameters.append(pytest.param(kind, call, words, "".join(fix), id=name))
    return parameters


def refused(
    call: Callable[[], Any],
    kind: type[ComposeProbError],
    facts: str = "",
    fix: str = "",
) -> ComposeProbError:
    """Return the error of a call, which has a fix and names the line of a test.

    Its wording is held by a snapshot.

    Args:
        call: the mistake.
        kind: the error's type.
        facts: a pattern of what was found: names and numbers that the call gives.
        fix: a pattern of the fix.
    """
    with pytest.raises(ComposeProbError) as caught:
        call()
    error = caught.value
    assert type(error) is kind, error
    assert isinstance(error, (ValueError, TypeError))
    assert re.search(facts, str(error), re.DOTALL), error
    assert error.fix, error
    assert re.search(fix, error.fix, re.DOTALL), error
    place = r"(test_\w+|sampling_cases|recipes)\.py:\d+"
    assert re.fullmatch(place, error.where or ""), error
    assert error.where in str(error)
    assert error.fix in str(error)
    check_wording(str(error))
    return error
