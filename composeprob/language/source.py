"""Where in the user's program a statement stands."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpyro

_LIBRARIES = (str(Path(__file__).parents[1]), str(Path(numpyro.__file__).parent), str(Path(jax.__file__).parent))


def caller() -> str:
    """``"file.py:line"`` of the innermost frame that belongs to no library."""
    frame = sys._getframe(1)
    while frame is not None:
        filename = frame.f_code.co_filename
        if not filename.startswith(_LIBRARIES) and not filename.startswith("<frozen") and "contextlib" not in filename:
            return f"{Path(filename).name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "unknown place"
