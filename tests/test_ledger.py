"""Code tokens, which the ledger counts."""

import ledger
import pytest


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n    return x\n",
        '"""A module."""\ndef f(x):\n    """Return x."""\n    # Why.\n    return x\n',
        "def f(x): return x\n",
    ],
)
def test_only_code_counts(text):
    assert ledger.tokens(text) == 8  # def f ( x ) : return x


def test_a_text_that_is_no_docstring_counts():
    assert ledger.tokens("x = 1\n'text'\n") == 4


def test_every_token_is_of_one_ring():
    parts = ledger.by_part(ledger.by_file(ledger.PACKAGE))
    core, outer = ledger.rings(parts)
    assert core > outer > 0
    assert core + outer == sum(parts.values())
    assert ledger.outer_ring() <= set(parts)
