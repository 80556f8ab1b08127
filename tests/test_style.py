"""The script of style finds each thing that it names, and nothing else."""

import ast
from pathlib import Path

import pytest

from tools import style

BROKEN = {
    "parallel-assignment": [
        "a, b = f(x), y",
        "first, second = x, y",
        "n, text = len(x), str(x)",
    ],
    "nested-conditional": ["a = x if p else (y if q else z)"],
    "conditional-argument": ["f(x if p else y)", "f(key=x if p else y)"],
    "conditional-comprehension": ["[x if p else y for x in xs]"],
    "named-lambda": ["f = lambda x: x", "f: Callable = lambda x: x"],
    "vars-update": ["class A:\n    vars().update(names)"],
}
FINE = [
    "a, b = pair",
    "a, b = b, a",
    "low, high = 0.1, 0.9",
    "x, y = points[0], points[1]",
    "first, *rest = x, *xs",
    "a = x if p else y",
    "f(key=lambda x: x)",
    "[x for x in xs if p]",
    "f(lambda: x if p else y)",
]


def rules(code):
    return [found.rule for found in style.violations(ast.parse(code), Path("a.py"))]


@pytest.mark.parametrize(
    ("code", "rule"), [(code, rule) for rule, codes in BROKEN.items() for code in codes]
)
def test_what_breaks_a_rule_is_found(code, rule):
    assert rules(code) == [rule]


@pytest.mark.parametrize("code", FINE)
def test_what_breaks_none_is_left_alone(code):
    assert rules(code) == []


def test_figures_count_code_comments_and_heads():
    text = '"""Whether it is."""\n\n# why\na = 1  # here\nb = "x"\n'
    figures = style.Figures()
    style.measure(figures, text, ast.parse(text))
    assert (figures.lines, figures.code_lines, figures.comments) == (5, 2, 2)
    assert figures.relative == ["Whether it is."]
    assert dict(figures.rows())["docstrings that begin with a clause"] == "1 of 1"


def test_the_command_fails_where_a_rule_is_broken(tmp_path, monkeypatch, capsys):
    (tmp_path / "wrong.py").write_text("f = lambda x: x\n")
    (tmp_path / "right.py").write_text("x = 1\n")
    monkeypatch.setattr(style, "ROOT", tmp_path)
    monkeypatch.setattr(style, "python_files", lambda places: places)
    for name, status in (("right.py", 0), ("wrong.py", 1)):
        monkeypatch.setattr("sys.argv", ["style.py", str(tmp_path / name)])
        assert style.main() == status
    assert "wrong.py:1: named-lambda" in capsys.readouterr().out
