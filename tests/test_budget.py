"""The house is within `budget.toml`; numbers that tune a default are in one file, each
with an entry in the log."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import budget
import pytest
from budget import assigned, assignments

from composeprob import tuning


@pytest.fixture(scope="module")
def here():
    return budget.counted()


@pytest.fixture
def checked(monkeypatch, here):
    """What `budget.py` says of these counts, with these options."""
    monkeypatch.setattr(budget, "counted", lambda: here)

    def check(*options):
        monkeypatch.setattr(sys, "argv", ["budget.py", *options])
        return budget.main()

    return check


def test_the_house_is_within_its_budget(checked, capsys):
    assert checked() == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "told"),
    [("files = 3", "files"), ("cellars = 3", "cellars is gone"), ("", "none")],
)
def test_what_is_above_it_or_unknown_is_found(
    line, told, checked, tmp_path, monkeypatch, capsys
):
    text = budget.BUDGET.read_text(encoding="utf-8")
    files = next(each for each in text.splitlines() if each.startswith("files = "))
    (tmp_path / "budget.toml").write_text(
        text.replace(files, line if line != "cellars = 3" else f"{files}\n{line}")
    )
    monkeypatch.setattr(budget, "BUDGET", tmp_path / "budget.toml")
    assert checked() == 1
    assert told in capsys.readouterr().err


def test_a_budget_is_only_lowered(checked, here, tmp_path, monkeypatch):
    most = tomllib.loads(budget.BUDGET.read_text(encoding="utf-8"))
    text = f"[lines]\ncomposeprob = {most['lines']['composeprob'] + 5}\ntests = 1\n"
    (tmp_path / "budget.toml").write_text(text)
    monkeypatch.setattr(budget, "BUDGET", tmp_path / "budget.toml")
    assert checked("--lower") == 1
    lowered = tomllib.loads((tmp_path / "budget.toml").read_text())["lines"]
    assert lowered == {"composeprob": here["lines"]["composeprob"], "tests": 1}


# ── the decision log ──────────────────────────────────────────────────────────────────

ROOT = Path(__file__).parents[1]
SOURCE = (ROOT / "composeprob/tuning.py").read_text(encoding="utf-8")
BODY = ast.parse(SOURCE).body
FIELDS = [
    field
    for each in BODY
    if isinstance(each, ast.ClassDef)
    for field in assignments(each.body)
]


def numbers() -> list[str]:
    """What tunes a default: constants, and the fields of those that are a family,
    ``NAME.field``."""
    found = []
    for name, _ in assignments(BODY):
        fields = getattr(getattr(tuning, name), "_fields", None)
        found += [name] if fields is None else [f"{name}.{field}" for field in fields]
    return found


def test_every_tuning_constant_has_an_entry_in_the_decision_log_which_names_nothing_that_is_gone():
    log, constant = (
        (ROOT / "docs/decisions.md").read_text(encoding="utf-8"),
        r"`([A-Z_]+(?:\.[a-z_]+)?)`",
    )
    assert set(numbers()) <= set(re.findall(constant, log))
    headings = re.findall(r"^\*\*(.*?)\*\*", log, re.M | re.S)
    assert (
        sorted(
            {name for text in headings for name in re.findall(constant, text)}
            - set(numbers())
        )
        == []
    )


def test_every_tuning_constant_has_a_comment_of_one_line():
    """Behind the number, or above it where the line would be too long."""
    lines = SOURCE.splitlines()
    for name, statement in [*assignments(BODY), *FIELDS]:
        behind, above = (
            lines[statement.end_lineno - 1],
            lines[statement.lineno - 2].strip(),
        )
        assert re.search(r"  # \w.+", behind) or re.match(r"# \w.+", above), (
            f"{name} has no comment of one line"
        )


def test_a_constant_in_a_tuple_counts():
    assert list(assigned(ast.parse("A, (B, c) = D = 1").body[0].targets[0])) == [
        "A",
        "B",
        "c",
    ]
