"""Benchmarks of a checkout: `python -m benchmarks` lists them, `python -m benchmarks
NAME …` runs one.

The arguments after the name go to the benchmark: `python -m benchmarks paper-2d
--chains 100`. It prints its table, writes it to benchmarks/results/, and exits with 1
if one of its checks fails.

`python -m benchmarks --stale` runs nothing. Each results file names the commit that it
was made at and the paths that it depends on: the library without its command line, the
benchmark's own scripts, and the models if it uses them. The command counts the commits
since then that touch these paths, and exits with 1 if there are any.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import runpy
import sys
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Column, Table

from benchmarks.ages import Age, ages
from composeprob.errors import ComposeProbError, LoadError


def benchmarks() -> dict[str, Path]:
    """Scripts of all benchmarks by name, such as ``paper-2d``."""
    shared = ("__main__", "ages", "ahead", "mode_weights", "report", "sizes")
    scripts = [
        path
        for path in sorted(Path(__file__).parent.glob("*.py"))
        if path.stem not in shared
    ]
    return {path.stem.replace("_", "-"): path for path in scripts}


def title(script: Path) -> str:
    """Return the first line of a benchmark's docstring."""
    return parsed(script).description.split("\n", 1)[0]


class Parsed(NamedTuple):
    """A benchmark's docstring, and whether it reads the command line."""

    description: str
    has_options: bool


def parsed(script: Path) -> Parsed:
    """Read a benchmark without running it."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    return Parsed(ast.get_docstring(tree) or "", "argparse" in imported)


def table_of_ages(known: list[Age]) -> Table:
    """Make the table that `python -m benchmarks --stale` shows."""
    names = (
        "results",
        "made at",
        "later commits",
        "the newest of them",
        "how to make it again",
    )
    table = Table(*(Column(name, overflow="fold") for name in names))
    for age in known:
        notes = list(age.later[:1])
        if age.why:
            notes.append(f"({age.why})")
        commit = (age.commit or "unknown")[:9]
        table.add_row(
            age.file, commit, later_commits(age), "\n".join(notes), age.command
        )
    return table


def later_commits(age: Age) -> str:
    """Number of commits that a result is behind, as text."""
    if not age.stale:
        return "none"
    number = len(age.later)
    return f"at least {number}" if age.commit is None else str(number)


def run_benchmark(name: str, arguments: list[str]) -> None:
    """Run a benchmark as ``python benchmarks/….py`` does, with its own exit status.

    Raises:
        LoadError: no such benchmark.
    """
    known = benchmarks()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        fix = f"did you mean {near[0]!r}?" if near else "use one of these names."
        raise LoadError(
            f"There is no benchmark {name!r}; there are: {', '.join(known)}.", fix=fix
        )
    script = known[name]
    description, has_options = parsed(script)
    if not has_options:
        # Answers --help, and refuses what the benchmark would not read.
        argparse.ArgumentParser(
            prog=f"python -m benchmarks {name}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        ).parse_args(arguments)
    sys.path.insert(0, str(script.parent))
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def main(arguments: list[str]) -> int:
    """List the benchmarks or the ages of their results, or run one.

    Returns:
        The exit status.
    """
    name, *rest = arguments or [""]
    if name in ("-h", "--help"):
        print(__doc__)
    elif name == "--stale":
        if rest:
            raise LoadError(
                f"--stale looks at all results, and {rest[0]!r} was given.",
                fix="leave the name out.",
            )
        found = ages(Path(__file__).parents[1])
        console().print(table_of_ages(found))
        return int(any(age.stale for age in found))
    elif name:
        run_benchmark(name, rest)
    else:
        table = Table("benchmark", "what it measures")
        for known, script in benchmarks().items():
            table.add_row(known, title(script))
        console().print(table)
    return 0


def console() -> Console:
    """Console that a pipe does not make narrow."""
    return Console(width=max(120, Console().width))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ComposeProbError as refused:
        print(f"error: {refused}", file=sys.stderr)
        sys.exit(2)
