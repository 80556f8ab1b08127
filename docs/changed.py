"""Hashes of the library, its models and versions, on which executed pages depend."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
AT_ONCE = 2
"""Number of examples, or pages, executed at once: each takes a gigabyte or two."""
SUFFIXES = {".py", ".json", ".safetensors", ".css", ".txt", ".md"}


@cache
def library_hash() -> str:
    """Return twelve hexadecimal digits of the library, and of tests that pages run."""
    run = ("kernel_chains.py", "targets.py", "zscores.py", "kernels/test_mutants.py")
    tests = [ROOT / "tests" / file for file in run]
    library = [ROOT / "composeprob", ROOT / "models", ROOT / "constraints.txt"]
    return hash_of(*library, *tests)


def hash_of(*paths: Path) -> str:
    """Return twelve hexadecimal digits of names and contents of files.

    Folders stand for the files in them.
    """
    digest = hashlib.sha256()
    for path in paths:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if not file.is_file() or file.suffix not in SUFFIXES:
                continue
            if "checkpoints" in file.parts:
                continue
            head = f"{file.relative_to(ROOT)}\0{file.stat().st_size}\0"
            digest.update(head.encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
