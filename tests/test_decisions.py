"""Numbers that tune a default are in one file, and each has its entry in the decision log."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from budget import assigned, assignments

from composeprob import tuning

ROOT = Path(__file__).parents[1]
SOURCE = (ROOT / "composeprob/tuning.py").read_text(encoding="utf-8")
BODY = ast.parse(SOURCE).body
FIELDS = [field for each in BODY if isinstance(each, ast.ClassDef) for field in assignments(each.body)]


def numbers() -> list[str]:
    """What tunes a default: constants, and the fields of those that are a family, ``NAME.field``."""
    found = []
    for name, _ in assignments(BODY):
        fields = getattr(getattr(tuning, name), "_fields", None)
        found += [name] if fields is None else [f"{name}.{field}" for field in fields]
    return found


def test_every_tuning_constant_has_an_entry_in_the_decision_log():
    named = set(re.findall(r"`([A-Z_]+(?:\.[a-z_]+)?)`", (ROOT / "docs/decisions.md").read_text(encoding="utf-8")))
    assert [name for name in numbers() if name not in named] == []


def test_the_decision_log_names_nothing_that_is_gone():
    named = re.findall(r"^\*\*(.*?)\*\*", (ROOT / "docs/decisions.md").read_text(encoding="utf-8"), re.M | re.S)
    entries = {name for heading in named for name in re.findall(r"`([A-Z_]+(?:\.[a-z_]+)?)`", heading)}
    assert sorted(entries - set(numbers())) == []


def test_every_tuning_constant_has_a_comment_of_one_line():
    """Behind the number, or above it where the line would be too long."""
    lines = SOURCE.splitlines()
    for name, statement in [*assignments(BODY), *FIELDS]:
        behind, above = lines[statement.end_lineno - 1], lines[statement.lineno - 2].strip()
        assert re.search(r"  # \w.+", behind) or re.match(r"# \w.+", above), f"{name} has no comment of one line"


def test_a_constant_in_a_tuple_counts():
    assert list(assigned(ast.parse("A, (B, c) = D = 1").body[0].targets[0])) == ["A", "B", "c"]
