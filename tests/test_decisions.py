"""Every number that tunes a default has an entry in the log of decisions."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(ROOT.glob("composeprob/**/tuning.py"))


def assigned(target: ast.expr) -> Iterator[str]:
    """Names that one target of an assignment binds."""
    if isinstance(target, ast.Name):
        yield target.id
    if isinstance(target, ast.Tuple | ast.List):
        for element in target.elts:
            yield from assigned(element)


def assignments(body: list[ast.stmt]) -> list[tuple[str, ast.stmt]]:
    """Names that statements assign, each with its statement."""
    found = []
    for statement in body:
        targets = []
        if isinstance(statement, ast.Assign):
            targets = statement.targets
        elif isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        for target in targets:
            found += [(name, statement) for name in assigned(target)]
    return found


def body(file: Path) -> list[ast.stmt]:
    """Statements of a file of tuning constants."""
    return ast.parse(file.read_text(encoding="utf-8")).body


def constants(file: Path) -> list[str]:
    """Tuning constants of a file; the fields of a family are ``NAME.field``."""
    module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    tuning = importlib.import_module(module)
    found = []
    for name, _ in assignments(body(file)):
        fields = getattr(getattr(tuning, name), "_fields", None)
        if fields is None:
            found.append(name)
        else:
            found += [f"{name}.{field}" for field in fields]
    return found


def test_every_tuning_constant_has_an_entry_and_no_entry_names_a_missing_one():
    log = (ROOT / "docs/decisions.md").read_text(encoding="utf-8")
    constant = re.compile(r"`([A-Z_]+(?:\.[a-z_]+)?)`")
    known = {name for file in FILES for name in constants(file)}
    assert known <= set(constant.findall(log))
    headings = re.findall(r"^\*\*(.*?)\*\*", log, re.M | re.S)
    named = {name for heading in headings for name in constant.findall(heading)}
    assert sorted(named - known) == []


def test_a_constant_has_one_home():
    names = [name for file in FILES for name in constants(file)]
    assert len(FILES) > 1
    assert len(names) == len(set(names))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)
def test_every_tuning_constant_has_a_comment(file):
    """The comment stands behind the number, or on the line above it."""
    lines = file.read_text(encoding="utf-8").splitlines()
    statements = body(file)
    classes = [each for each in statements if isinstance(each, ast.ClassDef)]
    fields = [field for each in classes for field in assignments(each.body)]
    for name, statement in [*assignments(statements), *fields]:
        span = lines[statement.lineno - 1 : statement.end_lineno]
        behind = any(re.search(r"  # \w.+", line) for line in span)
        above = re.match(r"# \w.+", lines[statement.lineno - 2].strip())
        assert behind or above, f"{name} has no comment"


def test_a_constant_in_a_tuple_counts():
    target = ast.parse("A, (B, c) = D = 1").body[0].targets[0]
    assert list(assigned(target)) == ["A", "B", "c"]
