"""Finding and running the benchmarks of a checkout."""

from __future__ import annotations

import ast
import difflib
import runpy
import sys
from pathlib import Path

from rich.table import Column, Table

from composeprob.cli.ages import Age, ages
from composeprob.errors import LoadError


def benchmarks() -> dict[str, Path]:
    """Finds the script of every benchmark by name, such as ``paper-2d``.

    Raises:
        LoadError: not in a checkout; an installed wheel has no benchmarks.
    """
    folder = Path(__file__).parents[2] / "benchmarks"
    if not (folder / "report.py").is_file():
        raise LoadError(
            "The benchmarks are not installed: a wheel leaves them out.",
            fix="clone the repository, and run composeprob bench there.",
        )
    shared = ("report", "mode_weights")
    scripts = [path for path in sorted(folder.glob("*.py")) if path.stem not in shared]
    return {path.stem.replace("_", "-"): path for path in scripts}


def title(script: Path) -> str:
    """Returns the first line of a benchmark's docstring."""
    text = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    return text.split("\n", 1)[0]


def oldest_first() -> list[Age]:
    """Lists the age of every results file, in commits.

    Raises:
        LoadError: not in a git checkout.
    """
    return ages(next(iter(benchmarks().values())).parents[1])


def table_of_ages(known: list[Age]) -> Table:
    """Makes the table that `composeprob bench --stale` shows."""
    names = ("results", "made at", "later commits", "the newest of them", "how to make it again")
    table = Table(*(Column(name, overflow="fold") for name in names))
    for age in known:
        number = len(age.later)
        behind = "none" if not age.stale else f"at least {number}" if age.commit is None else str(number)
        notes = [*age.later[:1], *([f"({age.why})"] if age.why else [])]
        table.add_row(age.file, (age.commit or "unknown")[:9], behind, "\n".join(notes), age.command)
    return table


def run_benchmark(name: str, arguments: list[str]) -> None:
    """Runs a benchmark as ``python benchmarks/….py`` would; it exits with its own status.

    Raises:
        LoadError: no such benchmark.
    """
    known = benchmarks()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        raise LoadError(
            f"There is no benchmark {name!r}; there are: {', '.join(known)}.",
            fix=f"did you mean {near[0]!r}?" if near else "use one of these names.",
        )
    script = known[name]
    sys.path.insert(0, str(script.parent))
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")
