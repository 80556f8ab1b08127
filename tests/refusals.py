"""The contract of every refusal, and tables of them."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from composeprob.errors import ComposeProbError

Rows = Mapping[type[ComposeProbError], Mapping[str, Any]]


def rows(table: Rows) -> list[Any]:
    """Parameters (kind, call, words, fix) of a table by the kind of error; a row may
    end before its fix, and a call alone has its words for a name."""
    named = [
        (kind, name, row)
        for kind, cases in table.items()
        for name, row in cases.items()
    ]
    full = [
        (kind, name, row if isinstance(row, tuple) else (row, name))
        for kind, name, row in named
    ]
    return [
        pytest.param(kind, call, words, "".join(fix), id=name)
        for kind, name, (call, words, *fix) in full
    ]


def refused(
    call: Callable[[], Any], kind: type[ComposeProbError], words: str, fix: str = ""
) -> ComposeProbError:
    """The error of a call: of this kind, in these words, with the line of a test, and a
    way out in these words."""
    with pytest.raises(ComposeProbError) as caught:
        call()
    error = caught.value
    assert type(error) is kind, error
    assert isinstance(error, (ValueError, TypeError))
    assert re.search(words, str(error), re.DOTALL), error
    assert error.fix, error
    assert re.search(fix, error.fix, re.DOTALL), error
    assert re.fullmatch(
        r"(test_\w+|sampling_cases|recipes)\.py:\d+", error.where or ""
    ), error
    assert error.where in str(error)
    assert error.fix in str(error)
    return error
