"""Check the rules of style that ruff has no rule for, and report how dense code is.

    python tools/style.py                  checks all Python of the repository
    python tools/style.py composeprob      checks one folder, or one file

A violation is reported as ``file:line: rule`` and makes the script exit with 1:

- ``parallel-assignment``: one statement assigns two values that stand side by side,
  ``a, b = x, y``. Unpacking one value, ``a, b = pair``, and exchanging two names are
  fine, and so are literals that belong together, as in ``low, high = 0.1, 0.9``.
- ``nested-conditional``: a conditional expression inside another one.
- ``conditional-argument``: a conditional expression among the arguments of a call.
- ``conditional-comprehension``: a conditional expression inside a comprehension.
- ``named-lambda``: a lambda that is bound to a name.
- ``vars-update``: ``vars().update`` or ``locals().update`` in the body of a class.

The table that follows has figures of density. Nothing fails on them: each is a
symptom, which tells where to look.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
RELATIVE = re.compile(r"(Whether|What|Which|How|Where|That|Of|By|Those)\b")
"""First words of docstrings that begin with a clause in place of a noun or a verb."""


@dataclass(frozen=True)
class Violation:
    """A place where a rule is broken."""

    file: Path
    line: int
    rule: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.rule}"


@dataclass
class Figures:
    """Counts over source files, of which the table shows ratios."""

    lines: int = 0
    code_lines: int = 0
    characters: int = 0  # of code lines, without indentation at the ends
    wide_lines: int = 0  # above 100 columns
    comments: int = 0  # lines with a comment, on its own or behind code
    conditionals: int = 0
    comprehensions: int = 0
    statements: int = 0
    parallel: int = 0
    docstrings: int = 0
    relative: list[str] = field(default_factory=list)  # docstrings that begin so

    def rows(self) -> Iterator[tuple[str, str]]:
        """Name and value of each figure."""
        hundred = max(self.code_lines, 1) / 100
        thousand = max(self.statements, 1) / 1000
        yield "lines", f"{self.lines}"
        yield "characters a code line", f"{self.characters / (100 * hundred):.1f}"
        yield "lines over 100 columns, %", f"{100 * self.wide_lines / self.lines:.2f}"
        yield "comments, 100 code lines", f"{self.comments / hundred:.1f}"
        yield "conditional expressions, same", f"{self.conditionals / hundred:.1f}"
        yield "comprehensions, same", f"{self.comprehensions / hundred:.1f}"
        yield (
            "parallel assignments, 1,000 statements",
            f"{self.parallel / thousand:.1f}",
        )
        heads = f"{len(self.relative)} of {self.docstrings}"
        yield "docstrings that begin with a clause", heads


def is_parallel(node: ast.AST) -> bool:
    """Return whether a statement assigns a tuple display to a tuple of names."""
    if not isinstance(node, ast.Assign) or len(node.targets) != 1:
        return False
    target = node.targets[0]
    tuples = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
    return tuples and not any(isinstance(e, ast.Starred) for e in node.value.elts)


def is_related(node: ast.Assign) -> bool:
    """Return whether the values of a parallel assignment belong together.

    They do where names are exchanged (``a, b = b, a``), where all are literals, and
    where they differ in names and constants alone, as ``x, y = points[0], points[1]``
    and ``n, m = len(rows), len(columns)``.
    """
    assert isinstance(node.value, ast.Tuple)
    assert isinstance(node.targets[0], ast.Tuple)
    values = node.value.elts
    sources = {ast.unparse(value) for value in values}
    targets = {ast.unparse(target) for target in node.targets[0].elts}
    if sources == targets:
        return True
    if all(_is_literal(value) for value in values):
        return True
    return len({_shape(value) for value in values}) == 1 and not all(
        isinstance(value, ast.Name) for value in values
    )


def _is_literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError):
        return False
    return True


def _shape(node: ast.expr) -> str:
    """An expression without names and constants, but for the functions it calls."""
    copy = ast.parse(ast.unparse(node), mode="eval")
    called = [each.func for each in ast.walk(copy) if isinstance(each, ast.Call)]
    for each in ast.walk(copy):
        if each in called:
            continue
        if isinstance(each, ast.Name):
            each.id = "_"
        elif isinstance(each, ast.Attribute):
            each.attr = "_"
        elif isinstance(each, ast.Constant):
            each.value = None
    return ast.dump(copy)


def violations(tree: ast.Module, file: Path) -> Iterator[Violation]:
    """Places of a module where a rule is broken, in the order of a walk."""
    for node in ast.walk(tree):
        for line, rule in broken_rules(node):
            yield Violation(file, line, rule)


def broken_rules(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of each rule that one node breaks."""
    if isinstance(node, ast.Assign) and is_parallel(node) and not is_related(node):
        yield node.lineno, "parallel-assignment"
    if isinstance(node, ast.Assign | ast.AnnAssign) and is_named_lambda(node):
        yield node.lineno, "named-lambda"
    yield from misplaced_conditionals(node)
    if isinstance(node, ast.ClassDef):
        for statement in node.body:
            if updates_namespace(statement):
                yield statement.lineno, "vars-update"


def misplaced_conditionals(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Conditional expressions in a place that hides them, each with its rule."""
    if isinstance(node, ast.IfExp):
        for inner in conditionals_within(node):
            yield inner.lineno, "nested-conditional"
    if isinstance(node, COMPREHENSIONS):
        for inner in conditionals_within(node):
            yield inner.lineno, "conditional-comprehension"
    if isinstance(node, ast.Call):
        keywords = [keyword.value for keyword in node.keywords]
        for argument in [*node.args, *keywords]:
            if isinstance(argument, ast.IfExp):
                yield argument.lineno, "conditional-argument"


def is_named_lambda(node: ast.Assign | ast.AnnAssign) -> bool:
    """Return whether a statement binds a lambda to a plain name."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    names = all(isinstance(target, ast.Name) for target in targets)
    return names and isinstance(node.value, ast.Lambda)


def conditionals_within(node: ast.AST) -> Iterator[ast.IfExp]:
    """Conditional expressions below a node, outside of functions of their own."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Lambda):
            continue
        if isinstance(child, ast.IfExp):
            yield child
        else:
            yield from conditionals_within(child)


def updates_namespace(statement: ast.stmt) -> bool:
    """Return whether a statement is ``vars().update(…)`` or ``locals().update(…)``."""
    return bool(re.match(r"(vars|locals)\(\)\.update\(", ast.unparse(statement)))


def measure(figures: Figures, text: str, tree: ast.Module) -> None:
    """Add one file's counts."""
    lines = text.splitlines()
    code, comments = code_and_comments(text, tree)
    figures.lines += len(lines)
    figures.code_lines += len(code)
    figures.characters += sum(len(lines[number - 1].strip()) for number in code)
    figures.wide_lines += sum(len(line) > 100 for line in lines)
    figures.comments += len(comments)
    for node in ast.walk(tree):
        figures.conditionals += isinstance(node, ast.IfExp)
        figures.comprehensions += isinstance(node, COMPREHENSIONS)
        figures.statements += isinstance(node, ast.stmt)
        figures.parallel += is_parallel(node)
        if isinstance(node, DOCUMENTED) and (docstring := ast.get_docstring(node)):
            figures.docstrings += 1
            if RELATIVE.match(docstring):
                figures.relative.append(docstring.splitlines()[0])


def code_and_comments(text: str, tree: ast.Module) -> tuple[set[int], set[int]]:
    """Numbers of the lines that hold code, docstrings left out, and comments."""
    documented: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            documented |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    empty = {
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    code: set[int] = set()
    comments: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        elif token.type not in empty:
            code |= set(range(token.start[0], token.end[0] + 1))
    return code - documented, comments


def python_files(places: list[Path]) -> list[Path]:
    """Python files at these places that git tracks, or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--"]
    names = subprocess.run(
        [*command, *(str(place) for place in places)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    files = [ROOT / name for name in sorted(set(names)) if name.endswith(".py")]
    return [file for file in files if file.is_file()]


def main() -> int:
    """Check the files that the command line names; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("places", nargs="*", type=Path, help="folders or files")
    parser.add_argument("--heads", action="store_true", help="list such docstrings")
    arguments = parser.parse_args()
    places = [place.resolve() for place in arguments.places] or [ROOT]
    figures = Figures()
    found: list[Violation] = []
    for file in python_files(places):
        text = file.read_text(encoding="utf-8")
        tree = ast.parse(text)
        found += violations(tree, file.relative_to(ROOT))
        measure(figures, text, tree)
    for violation in found:
        print(violation)
    for name, value in figures.rows():
        print(f"{name:<40} {value:>14}")
    if arguments.heads:
        print(*figures.relative, sep="\n")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
