"""Weight files: safetensors of the arrays of a network.

An array is named by its place in the network, such as ``blocks.0.enter.weight``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from jax import Array
from jaxtyping import PyTree

from composeprob.errors import InvalidValueError, LoadError
from composeprob.files import read_arrays, write_arrays
from composeprob.pretrained.tensors import first_three
from composeprob.pytree import is_array

Tree = TypeVar("Tree")

CHANGED = (
    "the network's definition changed since it was trained: restore it, or train again."
)


def weights_file(retraining: int) -> str:
    """Return the name of the file with a retraining's weights."""
    return f"weights-{retraining}.safetensors" if retraining else "weights.safetensors"


def save_weights(
    network: PyTree[Array], path: str | Path, *, half: bool = False
) -> None:
    """Write the arrays of a network to ``path``.

    Args:
        network: the network as a factor holds it, ``factor.network``.
        path: the file, replaced where it exists.
        half: write single-precision numbers in half precision (float16), at half the
            size; `load_weights` returns them in single precision, rounded to 11 bits.

    Raises:
        InvalidValueError: a number is too large for half precision.
    """
    tensors = {name: np.asarray(array) for name, array in _named(network)}
    if half:
        tensors = {name: _halved(name, array) for name, array in tensors.items()}
    write_arrays(path, tensors)


def load_weights(network: Tree, path: str | Path) -> Tree:
    """Read the arrays of ``network`` from ``path``.

    Of the network that is passed, only shapes and dtypes are used. Half precision is
    read as single precision where the network is in single precision.

    Raises:
        LoadError: the file is missing or damaged, or a tensor is missing, unknown, or
            of another shape or dtype.
    """
    retrain = "train the model, or restore the file."
    stored, _ = read_arrays(path, f"The weights {path}", retrain)
    expected = dict(_named(network))
    _check_names(stored, expected, path)
    loaded = {
        name: _converted(name, stored[name], array, path)
        for name, array in expected.items()
    }
    names = iter(expected)

    def replacement(leaf: object) -> object:
        return jax.numpy.asarray(loaded[next(names)]) if is_array(leaf) else leaf

    return jax.tree.map(replacement, network)


def _check_names(
    stored: Mapping[str, np.ndarray], expected: Mapping[str, Array], path: str | Path
) -> None:
    """Refuse a file whose tensors are not those of the network."""
    missing = sorted(set(expected) - set(stored))
    unknown = sorted(set(stored) - set(expected))
    differences = []
    if missing:
        differences.append(f"it lacks {first_three(missing)}")
    if unknown:
        differences.append(f"it has {first_three(unknown)}, which the network lacks")
    if differences:
        raise LoadError(
            f"The weights {path} are of another network: {'; '.join(differences)}.",
            fix=CHANGED,
        )


def _converted(
    name: str, stored: np.ndarray, expected: Array, path: str | Path
) -> np.ndarray:
    """Return a stored tensor as it is loaded; refuse another shape or dtype."""
    if stored.dtype == np.float16 and expected.dtype in (np.float32, np.float64):
        stored = stored.astype(np.float32)
    # With jax_enable_x64 a recipe builds its network in double precision, while the
    # file holds the single precision that it was trained in.
    widened = stored.dtype == np.float32 and expected.dtype == np.float64
    same_dtype = stored.dtype == expected.dtype or widened
    if stored.shape != expected.shape or not same_dtype:
        raise LoadError(
            f"Tensor {name!r} in {path} is {stored.dtype}{list(stored.shape)}; the "
            f"network needs {expected.dtype}{list(expected.shape)}.",
            fix=CHANGED,
        )
    return stored


def _halved(name: str, array: np.ndarray) -> np.ndarray:
    """Return a float32 array as float16, and any other array unchanged."""
    if array.dtype != np.float32:
        return array
    greatest = np.abs(array).max(initial=0.0)
    if greatest > np.finfo(np.float16).max:
        raise InvalidValueError(
            f"Tensor {name!r} holds {greatest:.4g}, too large for half precision.",
            fix="write it in full: half=False.",
        )
    return array.astype(np.float16)


def _named(network: PyTree[Array]) -> list[tuple[str, Array]]:
    """Return the arrays of a network with their names in the file."""
    named = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(network):
        if is_array(leaf):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            named.append((name, leaf))
    return named
