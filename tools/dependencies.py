"""What an installed distribution pulls in: every package with who asks for it, and its
licence.

    python tools/dependencies.py                      # of composeprob, in this environment
    python tools/dependencies.py 'composeprob[text]'  # and of an extra

Exits with 1 where a licence is not compatible with ours (Apache-2.0), or where
docs/dependencies.md does not name a package. `make release-check` runs it in a fresh
environment of every Python.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, metadata, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

DOCS = Path(__file__).parents[1] / "docs" / "dependencies.md"
COMPATIBLE = (
    "apache",
    "mit",
    "bsd",
    "isc",
    "psf",
    "python software foundation",
    "mpl",
    "mozilla",
    "zlib",
    "cc0",
)
"""Words of licences that Apache-2.0 code may depend on; Mozilla's binds only whoever
changes its own files."""


def closure(root: str) -> dict[str, set[str]]:
    """Follows what is required, here and now (by the markers of this Python and
    system).

    Args:
        root: a requirement such as ``"composeprob[text]"``.

    Returns:
        ``{package: the packages that ask for it}``, without the root and what is not
            installed.
    """
    found: dict[str, set[str]] = {}
    start = Requirement(root)
    todo, seen = [(canonicalize_name(start.name), "")], set()
    todo += [(canonicalize_name(start.name), extra) for extra in start.extras]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for line in requires(name) or []:
            needed = Requirement(line)
            if needed.marker is not None and not needed.marker.evaluate(
                {"extra": extra}
            ):
                continue
            child = canonicalize_name(needed.name)
            try:
                metadata(child)
            except PackageNotFoundError:
                continue  # an extra that is not installed
            if child != canonicalize_name(start.name):
                found.setdefault(child, set()).add(name)
            todo += [(child, ""), *((child, each) for each in needed.extras)]
    return found


def licence(package: str) -> str:
    """Returns a package's licence by its metadata: the expression, else the
    classifiers, else the text's first line."""
    of = metadata(package)
    if of.get("License-Expression"):
        return of["License-Expression"]
    classified = [
        line.rpartition(" :: ")[2]
        for line in of.get_all("Classifier") or []
        if line.startswith("License ::")
    ]
    text = (of.get("License") or "").strip()
    return " AND ".join(classified) or (text.splitlines()[0] if text else "not stated")


def compatible(expression: str) -> bool:
    """Says whether every part of a licence, or one of its alternatives, may be depended
    on."""

    def known(part: str) -> bool:
        return "gpl" not in part and any(
            re.search(rf"\b0?{word}\b", part) for word in COMPATIBLE
        )

    parts = re.split(r"\s+and\s+", re.sub("[()]", " ", expression.lower()))
    return all(any(map(known, re.split(r"\s+or\s+", part))) for part in parts)


def main(root: str = "composeprob") -> int:
    """Prints the list; returns the exit status."""
    named = {
        canonicalize_name(name)
        for name in re.findall(r"`([\w.-]+)`", DOCS.read_text(encoding="utf-8"))
    }
    wrong = []
    for package, askers in sorted(closure(root).items()):
        under = licence(package)
        print(
            f"{package:<24}{metadata(package)['Version']:<16}{under[:40]:<42}{', '.join(sorted(askers))}"
        )
        wrong += (
            [f"{package}: its licence is {under!r}"] if not compatible(under) else []
        )
        wrong += (
            [f"{package}: {DOCS.name} does not name it"] if package not in named else []
        )
    print(*wrong, sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
