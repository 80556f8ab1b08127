"""List the dependencies of an installed distribution, with their licences.

Each package is shown with those that require it.

    python tools/dependencies.py                      # of composeprob, as installed
    python tools/dependencies.py 'composeprob[text]'  # and of an extra

Exits with 1 if a licence is not compatible with ours (Apache-2.0), or if
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
    """Return all packages that a requirement needs, directly or not.

    Markers are evaluated for this Python and system.

    Args:
        root: a requirement such as ``"composeprob[text]"``.

    Returns:
        ``{package: the packages that require it}``, without the root and packages that
            are not installed.
    """
    found: dict[str, set[str]] = {}
    start = Requirement(root)
    start_name = canonicalize_name(start.name)
    todo = [(start_name, "")]
    todo += [(start_name, extra) for extra in start.extras]
    seen = set()
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for line in requires(name) or []:
            needed = Requirement(line)
            marker = needed.marker
            if marker is not None and not marker.evaluate({"extra": extra}):
                continue
            child = canonicalize_name(needed.name)
            try:
                metadata(child)
            except PackageNotFoundError:
                continue  # an extra that is not installed
            if child != start_name:
                found.setdefault(child, set()).add(name)
            todo.append((child, ""))
            todo += [(child, child_extra) for child_extra in needed.extras]
    return found


def licence(package: str) -> str:
    """Return a package's licence from its metadata.

    It is the expression, else the classifiers, else the first line of the text.
    """
    fields = metadata(package)
    if fields.get("License-Expression"):
        return fields["License-Expression"]
    classified = []
    for line in fields.get_all("Classifier") or []:
        if line.startswith("License ::"):
            classified.append(line.rpartition(" :: ")[2])
    if classified:
        return " AND ".join(classified)
    text = (fields.get("License") or "").strip()
    return text.splitlines()[0] if text else "not stated"


def compatible(expression: str) -> bool:
    """Return whether Apache-2.0 code may depend on code under a licence.

    Of the alternatives of each of its terms, one must be compatible.
    """

    def is_compatible(alternative: str) -> bool:
        if "gpl" in alternative:
            return False
        return any(re.search(rf"\b0?{word}\b", alternative) for word in COMPATIBLE)

    terms = re.split(r"\s+and\s+", re.sub("[()]", " ", expression.lower()))
    return all(any(map(is_compatible, re.split(r"\s+or\s+", term))) for term in terms)


def main(root: str = "composeprob") -> int:
    """Print the list, and return the exit status."""
    names = re.findall(r"`([\w.-]+)`", DOCS.read_text(encoding="utf-8"))
    documented = {canonicalize_name(name) for name in names}
    problems = []
    for package, required_by in sorted(closure(root).items()):
        package_licence = licence(package)
        version = metadata(package)["Version"]
        print(
            f"{package:<24}{version:<16}{package_licence[:40]:<42}"
            f"{', '.join(sorted(required_by))}"
        )
        if not compatible(package_licence):
            problems.append(f"{package}: its licence is {package_licence!r}")
        if package not in documented:
            problems.append(f"{package}: {DOCS.name} does not name it")
    print(*problems, sep="\n")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
