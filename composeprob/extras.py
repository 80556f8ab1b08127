"""Packages that single features need, as extras of this distribution: their imports,
and the error where one is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from composeprob.errors import MissingPackageError

EXTRAS: dict[str, tuple[str, ...]] = {
    "blackjax": ("blackjax",),
    "cli": ("rich", "typer"),
    "flax": ("flax",),
    "graph": ("graphviz",),
    "hub": ("huggingface-hub",),
    "pandas": ("pandas",),
    "store": ("orbax-checkpoint", "tensorstore"),
    "text": ("tokenizers",),
    "train": ("optax",),
}
"""Packages of each extra of one feature, as in ``pyproject.toml``; ``all`` brings all
of them."""


@contextmanager
def needed(extra: str, use: str) -> Iterator[None]:
    """Name the extra of a package whose import fails inside.

    Args:
        extra: a key of `EXTRAS`.
        use: what needs the package, as the subject of a sentence.

    Raises:
        MissingPackageError: a module could not be imported.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        # A distribution's name begins with that of its module: orbax-checkpoint.
        if not any(package.startswith(module) for package in EXTRAS[extra]):
            raise
        packages = " ".join(EXTRAS[extra])
        raise MissingPackageError(
            f"{use} needs the extra {extra!r}: {module} is not installed.",
            fix=f"pip install {packages}, or in a clone of composeprob "
            f"pip install '.[{extra}]'.",
        ) from error
