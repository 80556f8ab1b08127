"""How many tests there are, counted in their source when the site is built:
{counted}`WHAT`, a key of `COUNTS`."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from functools import cache
from typing import Any

from changed import ROOT
from docutils import nodes
from sphinx.util.docutils import SphinxRole

TESTS = ROOT / "tests"


@cache
def trees() -> list[ast.Module]:
    """Every file of tests/, parsed."""
    return [
        ast.parse(file.read_text(encoding="utf-8"))
        for file in sorted(TESTS.rglob("*.py"))
    ]


def functions() -> list[ast.FunctionDef]:
    """Every test."""
    found = [
        node
        for tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    ]
    return [node for node in found if node.name.startswith("test_")]


def calls(name: str) -> int:
    """How often a function is called in the tests."""
    found = [
        node.func
        for tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    ]
    return sum(isinstance(called, ast.Name) and called.id == name for called in found)


def rows(table: str) -> int:
    """Rows of a table of tests/registry.py."""
    tree = ast.parse((TESTS / "registry.py").read_text(encoding="utf-8"))
    found = [
        node
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == table
    ]
    return sum(
        len(node.value.keys) for node in found if isinstance(node.value, ast.Dict)
    )


def statements() -> int:
    """Statements of the examples in docstrings."""
    files = sorted((ROOT / "composeprob").rglob("*.py"))
    return sum(
        len(re.findall(r"^ *>>> ", file.read_text(encoding="utf-8"), re.MULTILINE))
        for file in files
    )


COUNTS: dict[str, Callable[[], int]] = {
    "tests": lambda: len(functions()),
    "files": lambda: sum(
        any(
            n.name.startswith("test_") for n in t.body if isinstance(n, ast.FunctionDef)
        )
        for t in trees()
    ),
    "tables": lambda: sum(
        "parametrize" in ast.unparse(node)
        for test in functions()
        for node in test.decorator_list
    ),
    "agreements": lambda: calls("assert_agrees"),
    "disagreements": lambda: calls("assert_disagrees"),
    "kernels": lambda: rows("KERNELS"),
    "factors": lambda: rows("FACTORS"),
    "schedules": lambda: rows("SCHEDULES"),
    "statements": statements,
}


class Counted(SphinxRole):
    """One number."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        for file in sorted(TESTS.rglob("*.py")):
            self.env.note_dependency(str(file))
        return [nodes.Text(f"{COUNTS[self.text]():,}")], []


def setup(app: Any) -> dict[str, Any]:
    """Add the role."""
    app.add_role("counted", Counted())
    return {"parallel_read_safe": True}
