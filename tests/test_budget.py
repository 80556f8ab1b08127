"""The house is within `budget.toml`, and what is above it is found."""

import sys
import tomllib

import budget
import pytest


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


@pytest.mark.parametrize(("line", "told"), [("files = 3", "files"), ("cellars = 3", "cellars is gone"), ("", "none")])
def test_what_is_above_it_or_unknown_is_found(line, told, checked, tmp_path, monkeypatch, capsys):
    text = budget.BUDGET.read_text(encoding="utf-8")
    files = next(each for each in text.splitlines() if each.startswith("files = "))
    (tmp_path / "budget.toml").write_text(text.replace(files, line if line != "cellars = 3" else f"{files}\n{line}"))
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
