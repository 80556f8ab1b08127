"""Age of benchmark results: the commit of a result, and later changes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from composeprob.errors import LoadError
from composeprob.json_data import JSONObject

LIBRARY = ("composeprob", ":(exclude)composeprob/cli")
"""Paths of git that every benchmark measures."""
CARDS = ":(exclude)models/*/card.md"
"""Descriptions of models, which quote results and change none."""
RECORD = ("__main__.py", "ages.py", "report.py")
"""Files that find, run and record benchmarks, and measure nothing."""
STAMP = "made_at"
"""Key of a results file, or of one of its cells, for the code it was made by."""


@dataclass(frozen=True)
class Code:
    """The code that is running: a commit, and files that are not as they are there.

    Attributes:
        root: the checkout.
        commit: None outside of a git checkout.
        changed: paths relative to the root.
    """

    root: Path
    commit: str | None
    changed: tuple[str, ...] = ()

    @classmethod
    def now(cls, root: Path) -> Code:
        """Read the state of the checkout; a long run does so before it begins."""
        try:
            commit = git(root, "rev-parse", "HEAD").strip()
            lines = git(
                root, "status", "--porcelain", "--untracked-files=all", "--no-renames"
            ).splitlines()
        except LoadError:
            return cls(root, None)
        return cls(root, commit, tuple(line[3:] for line in lines))

    def stamp(self) -> JSONObject | None:
        """Return what a result stores about its code.

        It is the commit, the paths that the result depends on, and those of them that
        changed since the commit.
        """
        if self.commit is None:
            return None
        paths = [*LIBRARY, *self._scripts()]
        if any(name.startswith("composeprob.models.") for name in list(sys.modules)):
            paths.append("models")
        changed = [file for file in self.changed if _within(file, paths)]
        return {"commit": self.commit, "paths": paths, "changed": changed}

    def _scripts(self) -> list[str]:
        """Modules of benchmarks that are imported; some run an example's program."""
        folders = {self.root / "benchmarks", self.root / "examples"}
        modules = list(sys.modules.values())
        names = {getattr(module, "__file__", None) for module in modules}
        files = {Path(name).resolve() for name in names | {sys.argv[0]} if name}
        scripts = []
        for file in files:
            if folders & set(file.parents) and file.name not in RECORD:
                scripts.append(str(file.relative_to(self.root)))
        return sorted(scripts)


def _within(file: str, paths: list[str]) -> bool:
    """Return whether a file is within git's paths, from which ``:(exclude)`` takes
    some."""
    exclude = ":(exclude)"
    folders = [path.removeprefix(exclude) for path in paths]
    under = []
    for path, folder in zip(paths, folders, strict=True):
        if f"{file}/".startswith(f"{folder}/"):
            under.append(path)
    return bool(under) and not any(path.startswith(exclude) for path in under)


@dataclass(frozen=True)
class Age:
    """Age of one results file.

    Attributes:
        file: its name.
        command: the command that makes it.
        commit: the commit that it was made at; None if it is not recorded.
        later: the commits since then that touch the code it measures, newest first, as
            "hash date subject". Without a recorded commit, those since the file was
            last written: there may be more.
        why: the reason why its age is unknown, or "".
    """

    file: str
    command: str
    commit: str | None
    later: tuple[str, ...]
    why: str = ""

    @property
    def stale(self) -> bool:
        """True if the file may be older than the code it measures."""
        return bool(self.later or self.why)


def ages(root: Path) -> list[Age]:
    """Ages of all results files of a checkout, those with most later commits first.

    Raises:
        LoadError: no git, or not a git checkout.
    """
    files = sorted((root / "benchmarks" / "results").glob("*.json"))
    return sorted((_age(root, file) for file in files), key=lambda age: -len(age.later))


def _age(root: Path, file: Path) -> Age:
    record = json.loads(file.read_text(encoding="utf-8"))
    command = record.get("command", "?")
    kept = list(_stamps(record))
    stamps = [stamp for stamp in kept if stamp is not None]
    lacking = len(kept) - len(stamps)
    if lacking:
        why = "no commit recorded"
        if len(kept) > 1:
            why = f"no commit recorded for {lacking} of {len(kept)} parts"
        name = str(file.relative_to(root))
        written = git(root, "log", "-1", "--format=%H", "--", name).strip()
        later: list[str] = []
        if written:
            later = _since(root, written, [*LIBRARY, *_script(root, command)])
        return Age(file.name, command, None, tuple(later), why)
    found: list[tuple[str, list[str]]] = []
    for stamp in {json.dumps(stamp): stamp for stamp in stamps}.values():
        if not _in_history(root, stamp["commit"]):
            why = f"commit {stamp['commit'][:9]} is not in this history"
            return Age(file.name, command, stamp["commit"], (), why)
        found.append((stamp["commit"], _since(root, stamp["commit"], stamp["paths"])))
    commit, later = max(found, key=lambda pair: len(pair[1]))
    changed = sorted({name for stamp in stamps for name in stamp["changed"]})
    why = ""
    if changed:
        why = f"made with changes that no commit had: {', '.join(changed)}"
    return Age(file.name, command, commit, tuple(later), why)


def _stamps(record: JSONObject) -> Iterator[JSONObject | None]:
    """Stamps of a file, or of its cells or rows where these were run one by one; beside
    the file's own, those of parts that were kept."""
    rows = record.get("rows", [])
    kept = list(record.get("cells", {}).values()) or [
        row for row in rows if STAMP in row
    ]
    parts = list(record.get("parts", {}).values())
    for made in [*(kept or [record]), *parts]:
        yield made.get(STAMP)


def _script(root: Path, command: str) -> list[str]:
    """The script that a command runs: ``python -m benchmarks NAME …`` or ``python
    benchmarks/NAME.py``."""
    words = command.split()
    if len(words) > 3 and words[1:3] == ["-m", "benchmarks"]:
        words = [f"benchmarks/{words[3].replace('-', '_')}.py"]
    return [
        word
        for word in words
        if word.startswith("benchmarks/") and (root / word).is_file()
    ]


def _since(root: Path, commit: str, paths: list[str]) -> list[str]:
    paths = [*paths, CARDS]
    log = git(root, "log", "--format=%h %cs %s", f"{commit}..HEAD", "--", *paths)
    return log.splitlines()


def _in_history(root: Path, commit: str) -> bool:
    try:
        git(root, "merge-base", "--is-ancestor", commit, "HEAD")
    except LoadError:
        return False
    return True


def git(root: Path, *arguments: str) -> str:
    """The output of git.

    Raises:
        LoadError: there is no git, the folder is not a checkout, or git refuses.
    """
    command = ["git", "-C", str(root), *arguments]
    fix = (
        "run python -m benchmarks --stale in a clone made by git; an unpacked archive "
        "has no history."
    )
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise LoadError(
            "git cannot be started, and ages are counted in commits.",
            fix="install git.",
        ) from error
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        reason = lines[0] if lines else "it gave no reason"
        raise LoadError(f"git found no history in {root}: {reason}.", fix=fix)
    return done.stdout
