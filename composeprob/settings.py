"""JAX's settings: those that the library's code needs, and the folder where `cache`
keeps compiled code for the next process.

Compiled code is found again only if that process traces the same programs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

import jax
from numpyro.distributions import Distribution

from composeprob.arguments import check_path
from composeprob.errors import InvalidValueError

_fields = Distribution.gather_pytree_data_fields.__func__
# NumPyro flattens a distribution in the order of a set of strings, whose hashes differ
# from process to process: compiled code would be found again in half of them, and the
# processes of one run would not hold the same program.
Distribution.gather_pytree_data_fields = classmethod(
    lambda cls: tuple(sorted(_fields(cls)))
)

MOST_BYTES = 2**30
"""Size to which a folder of compiled code is cut."""

_reported: ContextVar[set[object] | None] = ContextVar("reported", default=None)
"""Warnings that this call has reported; None outside of `usual`."""


@contextmanager
def usual() -> Iterator[None]:
    """Run the library's code under JAX's defaults: types and ranks are promoted,
    numbers of the host become arrays, and neither NaN (an unknown value) nor infinity
    (log 0) raises.

    With ``jax_debug_nans``, ``jax_transfer_guard="disallow"``,
    ``jax_numpy_rank_promotion="raise"`` or ``jax_numpy_dtype_promotion="strict"`` users
    look for mistakes in their own code.
    Where a network gives a NaN in a run, `Result.status` reports it.
    """
    token = None
    if _reported.get() is None:
        token = _reported.set(set())
    with (
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
        jax.debug_nans(False),
        jax.debug_infs(False),
        jax.transfer_guard("allow"),
    ):
        try:
            yield
        finally:
            if token is not None:
                _reported.reset(token)


def once_a_call(thing: object) -> bool:
    """Return whether a thing has not been reported within this `usual`, and note it.

    Outside of a `usual` always true.
    """
    reported = _reported.get()
    if reported is None:
        return True
    first = thing not in reported
    reported.add(thing)
    return first


def cache(folder: str | Path | None = None) -> Path:
    """Keep compiled code in a folder of this user's, where the next process with the
    same program finds it.

    Most of a short run's time is compilation. The library keeps nothing unless this
    function is called, before the first run; the programs of the command line call it
    unless ``--no-cache`` is given. Each call cuts the folder to 1 GiB: the oldest files
    go first. Code that another user could write would be run as yours: a folder that
    others may write into, or that belongs to someone else, is refused. Many processes
    may share one folder, on a disk that all of them can read.

    Args:
        folder: created where it is missing, for this user alone; left out,
            ``JAX_COMPILATION_CACHE_DIR`` where that is set, with JAX's own settings,
            else ``composeprob`` in the user's cache: ``$XDG_CACHE_HOME`` or
            ``~/.cache``, ``~/Library/Caches`` on macOS, ``%LOCALAPPDATA%`` on Windows.

    Returns:
        The folder.

    Raises:
        InvalidValueError: it cannot be created, or others may write into it.

    Example:
        >>> import composeprob as cp
        >>> cp.cache("out/compiled").name
        'compiled'
    """
    if folder is None:
        by_environment = os.environ.get("JAX_COMPILATION_CACHE_DIR")
        if by_environment:
            return Path(by_environment)
        place = default_cache()
    else:
        place = check_path(folder, "The folder of compiled code", "out/compiled")
        place = place.expanduser().absolute()
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = place.stat()
    except OSError as error:
        raise InvalidValueError(
            f"Compiled code cannot be kept in {place}: {error}.",
            fix="give another folder: cp.cache(folder).",
        ) from error
    if _others_may_write(status):
        raise InvalidValueError(
            f"Others may write into {place}, "
            "and the code that is compiled there would be run as yours.",
            fix=f"chmod go-w {place}, or give a folder of your own: cp.cache(folder).",
        )
    jax.config.update("jax_compilation_cache_dir", str(place))
    cut(place)
    # A run compiles many short programs, which JAX would not keep by default.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return place


def _others_may_write(status: os.stat_result) -> bool:
    """Return whether a folder is another user's, or writable by group or others."""
    if not hasattr(os, "getuid"):  # Windows: its cache lies in the user's profile
        return False
    return status.st_uid != os.getuid() or bool(status.st_mode & 0o022)


def cut(folder: Path, most: int = MOST_BYTES) -> None:
    """Remove the compiled code of longest ago until ``most`` bytes are left.

    JAX's own bound, ``JAX_COMPILATION_CACHE_MAX_SIZE``, reads the whole folder for each
    program that it writes.
    """
    by_use = []
    for file in folder.glob("*-cache"):
        with suppress(OSError):  # another process has removed it meanwhile
            status = file.stat()
            used = max(status.st_mtime, status.st_atime)
            by_use.append((used, status.st_size, file))
    kept = 0
    for _, size, file in sorted(by_use, reverse=True):
        kept += size
        if kept > most:
            with suppress(OSError):
                file.unlink()


def default_cache() -> Path:
    """Return the folder of compiled code in this user's cache; it may not exist yet."""
    home = Path.home()
    if sys.platform == "darwin":
        base = home / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local"))
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "composeprob"
