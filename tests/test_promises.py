"""Every promise of docs/promises.md has a command that exists."""

import pytest

from tools import promises

HERE = "tests/test_promises.py::test_every_command_of_the_page_exists"
RESULTS = "`benchmarks/results/modes.md`"


def found(evidence, promise="It holds."):
    page = f"| promise | shown by |\n|---|---|\n| {promise} | {evidence} |\n"
    (row,) = promises.promises(page)
    return list(promises.problems(row))


def test_every_command_of_the_page_exists():
    rows = list(promises.promises(promises.PAGE.read_text(encoding="utf-8")))
    assert len(rows) > 100
    assert [problem for row in rows for problem in promises.problems(row)] == []


@pytest.mark.parametrize(
    ("evidence", "problem"),
    [
        ("by hand", "no command"),
        ("`pytest tests/test_gone.py::test_x`", "no test"),
        (f"`pytest {HERE}_no_more`", "no test"),
        ("`python -m benchmarks gone`", "no benchmark"),
        ("`python -m benchmarks modes` → `benchmarks/results/gone.md`", "no file"),
        (f"`python -m benchmarks modes` → {RESULTS}, “gone”", "no row"),
    ],
)
def test_a_dead_row_is_reported(evidence, problem):
    (message,) = found(evidence)
    assert problem in message


@pytest.mark.parametrize(
    "evidence",
    [
        f"`pytest {HERE}`",
        f"`pytest {HERE}[an-id]`",
        f"`python -m benchmarks modes` → {RESULTS}, “Ancestral”",
    ],
)
def test_a_row_that_stands_is_not(evidence):
    assert found(evidence) == []


def test_a_struck_promise_needs_no_command_but_names_none_that_is_gone():
    assert found("goes with its redraw", "~~It held.~~") == []
    assert found("`pytest tests/test_gone.py`", "~~It held.~~")


def test_the_command_fails_where_a_row_is_dead(tmp_path, monkeypatch, capsys):
    page = tmp_path / "promises.md"
    page.write_text("| promise | shown by |\n|---|---|\n| It holds. | by hand |\n")
    monkeypatch.setattr(promises, "PAGE", page)
    monkeypatch.setattr(promises, "ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["promises.py"])
    assert promises.main() == 1
    assert "promises.md:3: has no command" in capsys.readouterr().out
