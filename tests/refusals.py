"""The contract of every refusal, and tables of them."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from composeprob.errors import ComposeProbError
from messages import check_wording

Rows = Mapping[type[ComposeProbError], Mapping[str, Callable[..., Any]]]


def rows(table: Rows) -> list[Any]:
    """Parameters (kind, call) of a table of calls by the kind of error and by name."""
    parameters = []
    for kind, calls in table.items():
        for name, call in calls.items():
            parameters.append(pytest.param(kind, call, id=name))
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
        facts: a pattern of names and numbers that the call gives.
        fix: a pattern of names that the fix gives.
    """
    with pytest.raises(ComposeProbError) as caught:
        call()
    error = caught.value
    assert type(error) is kind, error
    assert isinstance(error, (ValueError, TypeError, ImportError))
    assert re.search(facts, str(error), re.DOTALL), error
    assert error.fix, error
    assert re.search(fix, error.fix, re.DOTALL), error
    place = r"(test_\w+|sampling_cases|recipes)\.py:\d+"
    assert re.fullmatch(place, error.where or ""), error
    assert error.where in str(error)
    assert error.fix in str(error)
    check_wording(str(error))
    return error
