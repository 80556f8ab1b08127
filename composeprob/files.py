"""Files that are written whole or not at all: arrays in safetensors, and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from composeprob.errors import LoadError
from composeprob.json_data import JSON


def write_arrays(
    path: str | Path,
    arrays: Mapping[str, np.ndarray],
    texts: dict[str, str] | None = None,
) -> None:
    """Write arrays, and texts beside them, as one safetensors file."""
    # safetensors takes the buffer as it lies in memory. `ascontiguousarray` gives 0-d
    # arrays an axis, hence the reshape. A file of `save_file` only its owner can read.
    contiguous = {
        name: np.ascontiguousarray(array).reshape(np.shape(array))
        for name, array in arrays.items()
    }
    write_whole(Path(path), save(contiguous, metadata=texts))


def read_arrays(
    path: str | Path, what: str, fix: str
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read the arrays and texts that `write_arrays` wrote.

    Raises:
        LoadError: says that ``what`` cannot be read, with the ``fix``.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            names = file.keys()
            arrays = {name: file.get_tensor(name) for name in names}
            return arrays, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise LoadError(
            f"{what} cannot be read as safetensors: {error}", fix=fix
        ) from error


def write_json(path: Path, content: JSON) -> None:
    """Write a JSON file."""
    write_whole(path, json.dumps(content, indent=1).encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a reader never sees half of it; make its folder if there is
    none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)
