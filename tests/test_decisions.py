"""Numbers that tune a default are in one file, each has its entry in the decision log, and there are few others."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from composeprob import tuning

ROOT = Path(__file__).parents[1]
MOST_CONSTANTS = 107
"""Upper-case names at module level that the package may have. To be lowered, and never to be raised."""


def assigned(target: ast.expr) -> Iterator[str]:
    """The names that one target of an assignment binds."""
    if isinstance(target, ast.Name):
        yield target.id
    for element in target.elts if isinstance(target, ast.Tuple | ast.List) else ():
        yield from assigned(element)


def constants(file: Path) -> list[tuple[str, ast.stmt | None]]:
    """The upper-case names that a module assigns, each with the statement after it, where its docstring would be."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    found = []
    for statement, following in zip(body, [*body[1:], None], strict=True):
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        targets = [statement.target] if isinstance(statement, ast.AnnAssign) else targets
        found += [(name, following) for target in targets for name in assigned(target) if name.isupper()]
    return found


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


def test_the_package_has_few_constants():
    number = sum(len(constants(file)) for file in (ROOT / "composeprob").rglob("*.py"))
    assert number <= MOST_CONSTANTS


def test_a_constant_in_a_tuple_counts():
    assert list(assigned(ast.parse("A, (B, c) = D = 1").body[0].targets[0])) == ["A", "B", "c"]
