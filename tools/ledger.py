"""Print the size of the code in tokens: by folder, the rings apart, and the largest
files.

    python tools/ledger.py

A token is one of Python's `tokenize` that is code: comments, docstrings, line breaks
and indentation count nothing, so that dense lines save nothing. This is a report;
nothing fails on its figures. Ratios are those of `tools/style.py`.
"""

from __future__ import annotations

import ast
import io
import tokenize
import tomllib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "composeprob"
LARGEST = 10
"""Number of files that are listed."""

SILENT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def tokens(text: str) -> int:
    """Return the number of code tokens of a source."""
    docstrings = _docstrings(ast.parse(text))
    count = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        count += token.type not in SILENT and token.start not in docstrings
    return count


def _docstrings(tree: ast.Module) -> set[tuple[int, int]]:
    """Return the places, line and column, where docstrings begin."""
    places = set()
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False):
            first = node.body[0]
            places.add((first.lineno, first.col_offset))
    return places


def by_file(folder: Path) -> dict[Path, int]:
    """Return the tokens of each Python file of a folder."""
    files = sorted(folder.rglob("*.py"))
    return {file: tokens(file.read_text(encoding="utf-8")) for file in files}


def by_part(files: Mapping[Path, int]) -> Counter[str]:
    """Return the tokens of each folder and file that lies directly in the package."""
    parts: Counter[str] = Counter()
    for file, count in files.items():
        parts[file.relative_to(PACKAGE).parts[0].removesuffix(".py")] += count
    return parts


def outer_ring() -> set[str]:
    """Return the parts of the outer ring, which pyproject.toml's contract names."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for contract in settings["tool"]["importlinter"]["contracts"]:
        if contract["name"].startswith("Two rings: the outer ring"):
            return {name.split(".")[1] for name in contract["source_modules"]}
    raise LookupError("pyproject.toml has no contract of the outer ring")


def rings(parts: Mapping[str, int]) -> tuple[int, int]:
    """Return the tokens of the core and of the outer ring."""
    outer = sum(parts[part] for part in outer_ring())
    return sum(parts.values()) - outer, outer


def main() -> None:
    """Print the report."""
    files = by_file(PACKAGE)
    parts = by_part(files)
    core, outer = rings(parts)
    totals = {"core": core, "outer ring": outer}
    for name in ("tests", "benchmarks"):
        totals[name] = sum(by_file(ROOT / name).values())
    names = outer_ring()
    print("Code tokens")
    for name, count in totals.items():
        print(f"  {count:>9,}  {name}")
    print("Parts of composeprob")
    for name, count in parts.most_common():
        ring = "outer ring" if name in names else ""
        print(f"  {count:>9,}  {name:16}{ring}".rstrip())
    print("Largest files")
    for file, count in Counter(files).most_common(LARGEST):
        print(f"  {count:>9,}  {file.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
