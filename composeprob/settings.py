"""JAX's settings: those that the library's own code needs, and the folder where `cache`
keeps what XLA compiles for the next process, which must then trace the same
programs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

import jax
from numpyro.distributions import Distribution

from composeprob.errors import InvalidValueError

_fields = Distribution.gather_pytree_data_fields.__func__
# NumPyro flattens a distribution in the order of a set of strings, which each process
# hashes anew: compiled code would be found in half of them, and processes of one run
# would not hold the same program.
Distribution.gather_pytree_data_fields = classmethod(
    lambda cls: tuple(sorted(_fields(cls)))
)

_warned: ContextVar[set[object] | None] = ContextVar("seen", default=None)


@contextmanager
def usual() -> Iterator[None]:
    """Types and ranks are promoted, and neither NaN, here for what is not known, nor
    infinity, here for log 0, raises.

    With ``jax_debug_nans``, ``jax_numpy_rank_promotion="raise"`` or
    ``jax_numpy_dtype_promotion="strict"`` users look for mistakes in code of their own;
    where a network gives a NaN in a run, `Result.status` reports it.
    """
    warned = _warned.set(set()) if _warned.get() is None else None
    with (
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
        jax.debug_nans(False),
        jax.debug_infs(False),
    ):
        try:
            yield
        finally:
            if warned is not None:
                _warned.reset(warned)


def once_a_call(thing: object) -> bool:
    """Whether it is the first time that this is asked of a thing within one `usual`;
    outside of it always."""
    warned = _warned.get()
    if warned is None:
        return True
    known = thing in warned
    warned.add(thing)
    return not known


def cache(folder: str | Path | None = None) -> Path:
    """Keeps compiled code in a folder of this user's, where the next process with the
    same program finds it.

    Most of what a short run takes is compilation. The library keeps nothing unless this
    is called, before the first run; the programs of the command line call it unless
    ``--no-cache`` is given. Each call cuts what is there to 1 GiB: the oldest goes
    first. Code that another user could write would be run as yours: a folder that
    others may write into, or that belongs to someone else, is refused. Many processes
    may share one, on a disk that all of them see.

    Args:
        folder: made where it is missing, for this user alone; left out,
            ``JAX_COMPILATION_CACHE_DIR`` where that is set, with JAX's own settings,
            else ``composeprob`` in the user's cache: ``$XDG_CACHE_HOME`` or
            ``~/.cache``, ``~/Library/Caches`` on macOS, ``%LOCALAPPDATA%`` on Windows.

    Returns:
        The folder.

    Raises:
        InvalidValueError: it cannot be made, or others may write into it.

    Example:
        >>> import composeprob as cp
        >>> cp.cache("out/compiled").name
        'compiled'
    """
    given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if folder is None and given:
        return Path(given)
    place = default_cache() if folder is None else Path(folder).expanduser().absolute()
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = place.stat()
    except OSError as error:
        raise InvalidValueError(
            f"Compiled code cannot be kept in {place}: {error}.",
            fix="give another folder: cp.cache(folder).",
        ) from error
    if hasattr(os, "getuid") and (found.st_uid != os.getuid() or found.st_mode & 0o022):
        raise InvalidValueError(
            f"Others may write into {place}, and what is compiled there would be run as yours.",
            fix=f"chmod go-w {place}, or give a folder of your own: cp.cache(folder).",
        )
    jax.config.update("jax_compilation_cache_dir", str(place))
    _cut(place, 2**30)
    jax.config.update(
        "jax_persistent_cache_min_compile_time_secs", 0.1
    )  # short ones too: a run has many
    return place


def _cut(folder: Path, most: int) -> None:
    """Removes the oldest files until ``most`` bytes are left; another process may do
    the same."""
    sizes = []
    for file in folder.glob("*-cache"):
        with suppress(OSError):  # gone meanwhile
            sizes.append((file.stat().st_mtime, file.stat().st_size, file))
    kept = 0
    for _, size, file in sorted(sizes, reverse=True):
        kept += size
        if kept > most:
            with suppress(OSError):
                file.unlink()


def default_cache() -> Path:
    """The folder of compiled code in this user's cache, made or not."""
    home = Path.home()
    if sys.platform == "darwin":
        base = home / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local"))
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "composeprob"
