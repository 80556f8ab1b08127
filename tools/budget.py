"""What the house may hold: lines by folder, files, constants, public parameters, the
shapes that tests compile.

    python tools/budget.py            counts, and fails where something is above `budget.toml`
    python tools/budget.py --lower    writes what is counted where that is less

What is above its budget is made smaller, or its number is raised by hand, with a
comment on its line that says why.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUDGET = ROOT / "budget.toml"


def count_lines(folder: Path, pattern: str = "**/*.py") -> int:
    """Lines of the Python files in a folder."""
    return sum(
        len(file.read_text(encoding="utf-8").splitlines())
        for file in sorted(folder.glob(pattern))
    )


def assigned(target: ast.expr) -> Iterator[str]:
    """The names that one target of an assignment binds."""
    if isinstance(target, ast.Name):
        yield target.id
    for element in target.elts if isinstance(target, ast.Tuple | ast.List) else ():
        yield from assigned(element)


def assignments(body: list[ast.stmt]) -> list[tuple[str, ast.stmt]]:
    """The names that statements assign, each with its statement."""
    found = []
    for statement in body:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        targets = (
            [statement.target] if isinstance(statement, ast.AnnAssign) else targets
        )
        found += [(name, statement) for target in targets for name in assigned(target)]
    return found


def constants(file: Path) -> list[str]:
    """The upper-case names that a module assigns."""
    return [
        name
        for name, _ in assignments(ast.parse(file.read_text(encoding="utf-8")).body)
        if name.isupper()
    ]


def numbers(pattern: str, folder: Path) -> set[int]:
    """The different numbers that a pattern finds in the Python files of a folder."""
    texts = (file.read_text(encoding="utf-8") for file in folder.rglob("*.py"))
    return {int(number) for text in texts for number in re.findall(pattern, text)}


def counted() -> dict[str, dict[str, int]]:
    """What is here, in the form of `budget.toml`."""
    import composeprob as cp  # slow, and only counted by its objects

    package, tests = ROOT / "composeprob", ROOT / "tests"
    folders = sorted(
        path
        for path in package.iterdir()
        if path.is_dir() and path.name != "__pycache__"
    )
    public = {
        name: getattr(cp, name) for name in cp.__all__ if callable(getattr(cp, name))
    }
    files = list(package.rglob("*.py"))
    return {
        "lines": {
            "composeprob": count_lines(package),
            **{f"composeprob/{folder.name}": count_lines(folder) for folder in folders},
            "composeprob/*.py": count_lines(package, "*.py"),
            "tests": count_lines(tests),
        },
        "names": {
            "files": len(files),
            "constants": sum(len(constants(file)) for file in files),
            "public": len(cp.__all__),
            "parameters": sum(
                len(inspect.signature(each).parameters) for each in public.values()
            ),
        },
        "tests": {
            "numbers of levels": len(numbers(r"log_snr\((\d+)", tests)),
            "numbers of chains": len(numbers(r"num_chains=(\d+)", tests)),
        },
    }


def main() -> int:
    """Counts, and says what is above its budget; what the process exits with."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--lower", action="store_true", help="write what is counted where that is less"
    )
    lower = parser.parse_args().lower
    found, text = counted(), BUDGET.read_text(encoding="utf-8")
    budget, over = tomllib.loads(text), list[str]()
    for table, counts in found.items():
        for name, count in counts.items():
            most = budget.get(table, {}).get(name)
            if most is None or count > most:
                over.append(
                    f"{table}: {name} {count}, budget {'none' if most is None else most}"
                )
            elif lower:
                text = re.sub(
                    rf'^("?{re.escape(name)}"? = ){most}\b',
                    rf"\g<1>{count}",
                    text,
                    flags=re.MULTILINE,
                )
        over += [
            f"{table}: {name} is gone"
            for name in budget.get(table, {}).keys() - counts.keys()
        ]
    if lower:
        BUDGET.write_text(text, encoding="utf-8")
    for line in over:
        print(line, file=sys.stderr)
    return bool(over)


if __name__ == "__main__":
    sys.exit(main())
