"""What an executed page depends on beside its own text: the library, its models, and
the versions under them."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
AT_ONCE = 2
"""Examples, or pages, that are executed at once: each takes a gigabyte or two."""
SUFFIXES = {".py", ".json", ".safetensors", ".css", ".txt", ".md"}


@cache
def library_hash() -> str:
    """Twelve hexadecimal digits of composeprob/, models/, constraints.txt and the tests
    that pages run."""
    run = ("kernel_chains.py", "targets.py", "zscores.py", "kernels/test_mutants.py")
    tests = [ROOT / "tests" / file for file in run]
    return hash_of(
        ROOT / "composeprob", ROOT / "models", ROOT / "constraints.txt", *tests
    )


def hash_of(*paths: Path) -> str:
    """Twelve hexadecimal digits of the names and contents of files, and of the files in
    folders."""
    digest = hashlib.sha256()
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if (
                file.is_file()
                and file.suffix in SUFFIXES
                and "checkpoints" not in file.parts
            ):
                digest.update(
                    f"{file.relative_to(ROOT)}\0{file.stat().st_size}\0".encode()
                )
                digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
