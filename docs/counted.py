"""Numbers of tests, and of code tokens, counted in the source when the site is built.

    {counted}`NAME`

shows one of them; NAME is a key of `COUNTS`.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, TypeVar

from changed import ROOT
from docutils import nodes
from sphinx.util.docutils import SphinxRole

sys.path.insert(0, str(ROOT / "tools"))
import ledger  # the tools are no package

TESTS = ROOT / "tests"
Node = TypeVar("Node", bound=ast.AST)


@cache
def trees() -> list[ast.Module]:
    """Return every file of tests/, parsed."""
    files = sorted(TESTS.rglob("*.py"))
    return [ast.parse(file.read_text(encoding="utf-8")) for file in files]


def nodes_of(kind: type[Node]) -> Iterator[Node]:
    """Yield all nodes of a kind in the tests."""
    for tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, kind):
                yield node


def functions() -> list[ast.FunctionDef]:
    """Return every test."""
    found = nodes_of(ast.FunctionDef)
    return [node for node in found if node.name.startswith("test_")]


def calls(name: str) -> int:
    """Return the number of calls of a function in the tests."""
    called = [node.func for node in nodes_of(ast.Call)]
    return sum(isinstance(node, ast.Name) and node.id == name for node in called)


def files() -> int:
    """Return the number of files with tests."""
    count = 0
    for tree in trees():
        defined = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        count += any(node.name.startswith("test_") for node in defined)
    return count


def tables() -> int:
    """Return the number of tables of cases of the tests."""
    count = 0
    for test in functions():
        decorators = [ast.unparse(node) for node in test.decorator_list]
        count += sum("parametrize" in text for text in decorators)
    return count


def rows(table: str) -> int:
    """Return the number of rows of a table of tests/registry.py."""
    tree = ast.parse((TESTS / "registry.py").read_text(encoding="utf-8"))
    count = 0
    for node in tree.body:
        if not isinstance(node, ast.AnnAssign) or ast.unparse(node.target) != table:
            continue
        if isinstance(node.value, ast.Dict):
            count += len(node.value.keys)
    return count


def statements() -> int:
    """Return the number of statements of the examples in docstrings."""
    count = 0
    for file in sorted((ROOT / "composeprob").rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        count += len(re.findall(r"^ *>>> ", text, re.MULTILINE))
    return count


@cache
def code_tokens(part: str) -> int:
    """Return the number of code tokens of ``core``, ``outer``, or a folder."""
    if part not in ("core", "outer"):
        return sum(ledger.by_file(ROOT / part).values())
    core, outer = ledger.rings(ledger.by_part(ledger.by_file(ledger.PACKAGE)))
    return core if part == "core" else outer


COUNTS: dict[str, Callable[[], int]] = {
    "tests": lambda: len(functions()),
    "files": files,
    "tables": tables,
    "agreements": lambda: calls("assert_agrees"),
    "disagreements": lambda: calls("assert_disagrees"),
    "kernels": lambda: rows("KERNELS"),
    "factors": lambda: rows("FACTORS"),
    "schedules": lambda: rows("SCHEDULES"),
    "statements": statements,
    "tokens of the core": lambda: code_tokens("core"),
    "tokens of the outer ring": lambda: code_tokens("outer"),
    "tokens of tests": lambda: code_tokens("tests"),
    "tokens of benchmarks": lambda: code_tokens("benchmarks"),
}


class Counted(SphinxRole):
    """One number."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        for folder in ("composeprob", "tests", "benchmarks"):
            for file in sorted((ROOT / folder).rglob("*.py")):
                self.env.note_dependency(str(file))
        return [nodes.Text(f"{COUNTS[self.text]():,}")], []


def setup(app: Any) -> dict[str, Any]:
    """Add the role."""
    app.add_role("counted", Counted())
    return {"parallel_read_safe": True}
