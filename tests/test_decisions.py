"""Numbers that tune a default are in one file, and each has its entry in the decision log."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from budget import assigned, constants

from composeprob import tuning

ROOT = Path(__file__).parents[1]
TUNING = constants(ROOT / "composeprob/tuning.py")


def families() -> dict[str, list[tuple[str, ast.stmt | None]]]:
    """The fields of each class of numbers that belong together, with the statements after them."""
    found = {}
    for each in ast.parse((ROOT / "composeprob/tuning.py").read_text(encoding="utf-8")).body:
        if isinstance(each, ast.ClassDef):
            pairs = zip(each.body, [*each.body[1:], None], strict=True)
            found[each.name] = [(s.target.id, after) for s, after in pairs if isinstance(s, ast.AnnAssign)]
    return found


def numbers() -> list[str]:
    """What tunes a default: constants, and the fields of those that are a family, ``NAME.field``."""
    found = []
    for name, _ in TUNING:
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


def test_every_tuning_constant_has_a_docstring_of_one_line():
    for name, following in [*TUNING, *(field for fields in families().values() for field in fields)]:
        text = (
            following.value.value
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            else ""
        )
        assert re.fullmatch(".+", text), f"{name} has no docstring of one line"


def test_a_constant_in_a_tuple_counts():
    assert list(assigned(ast.parse("A, (B, c) = D = 1").body[0].targets[0])) == ["A", "B", "c"]
