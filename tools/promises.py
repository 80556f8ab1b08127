"""Check the commands of docs/promises.md, without running any of them.

    python tools/promises.py            prints the rows whose command does not exist
    python tools/promises.py --nodes    prints the tests of the page, for pytest

A row of a table is a promise and the commands that show it, in backquotes. A command is
``pytest FILE::TEST``, or ``python -m benchmarks NAME`` with the file of its results and
a row of that file in quotation marks. Other text in backquotes is no command.

Files are read, not imported: a test exists if its function (and class) does. Of a
parametrised test ``FILE::TEST[ID]`` the function is looked for, and not the ID.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "promises.md"
HEADER = "| promise |"
CODE = re.compile(r"`([^`]+)`")
RESULTS_ROW = re.compile(r"`(benchmarks/results/[^`]+)`(?:, “([^”]+)”)?")


@dataclass(frozen=True)
class Promise:
    """A row of the page; `evidence` is the text beside the promise."""

    line: int
    text: str
    evidence: str

    @property
    def is_struck(self) -> bool:
        """True for a promise that is struck out, which needs no command."""
        return self.text.startswith("~~")

    @property
    def commands(self) -> list[str]:
        """Commands of the row, as they are typed."""
        found = CODE.findall(self.evidence)
        return [text for text in found if text.startswith(("pytest ", "python -m "))]

    @property
    def nodes(self) -> list[str]:
        """Ids of the row's tests."""
        words = " ".join(self.commands).split()
        return [word for word in words if word.startswith("tests/")]


def promises(text: str) -> Iterator[Promise]:
    """Rows of the page's tables of promises."""
    in_table = False
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith(HEADER):
            in_table = True
        elif not line.startswith("|"):
            in_table = False
        elif in_table and not line.startswith("|---"):
            promise, evidence = line.strip("|").split(" | ", 1)
            yield Promise(number, promise.strip(), evidence)


def problems(promise: Promise, root: Path = ROOT) -> Iterator[str]:
    """Reasons why a row's commands cannot run."""
    if not promise.commands and not promise.is_struck:
        yield "has no command"
    for node in promise.nodes:
        if not test_exists(root, node):
            yield f"there is no test {node}"
    for command in promise.commands:
        if command.startswith("python -m benchmarks"):
            name = command.split()[3]
            script = root / "benchmarks" / f"{name.replace('-', '_')}.py"
            if not script.is_file():
                yield f"there is no benchmark {name}"
    for file, row in RESULTS_ROW.findall(promise.evidence):
        path = root / file
        if not path.is_file():
            yield f"there is no file {file}"
        elif row and row not in path.read_text(encoding="utf-8"):
            yield f"{file} has no row “{row}”"


def test_exists(root: Path, node: str) -> bool:
    """Return whether pytest would collect the function of a test's id."""
    file, *names = node.split("[")[0].split("::")
    path = root / file
    if not path.is_file():
        return False
    return not names or "::".join(names) in tests_of(path)


@cache
def tests_of(path: Path) -> frozenset[str]:
    """Names of a file's test functions, with the class where there is one."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    found.add(f"{node.name}::{inner.name}")
    return frozenset(found)


def main() -> int:
    """Check the page; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", action="store_true", help="print the tests")
    arguments = parser.parse_args()
    rows = list(promises(PAGE.read_text(encoding="utf-8")))
    if arguments.nodes:
        nodes = {node for row in rows for node in row.nodes}
        print(*sorted(nodes), sep="\n")
        return 0
    dead = 0
    for row in rows:
        for problem in problems(row):
            dead += 1
            print(f"{PAGE.relative_to(ROOT)}:{row.line}: {problem}")
    print(f"{len(rows)} promises, {dead} commands that do not exist")
    return int(dead > 0 or not rows)


if __name__ == "__main__":
    sys.exit(main())
