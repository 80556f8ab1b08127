"""Files of weights: safetensors, plain arrays under the names of their place in the
network."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from jax import Array
from jaxtyping import PyTree

from composeprob.errors import InvalidValueError, LoadError
from composeprob.pretrained.tensors import first_three
from composeprob.pytree import is_array
from composeprob.results.store import read_arrays, write_arrays

Tree = TypeVar("Tree")


def weights_file(retraining: int) -> str:
    """Returns the name of the file with a retraining's weights."""
    return f"weights-{retraining}.safetensors" if retraining else "weights.safetensors"


def save_weights(
    network: PyTree[Array], path: str | Path, *, half: bool = False
) -> None:
    """Writes the arrays of ``network`` (as adapted by a factor, ``factor.network``) to
    ``path``.

    Args:
        network: whose arrays to write.
        path: the file, replaced where it exists.
        half: write single-precision numbers in half precision (float16), at half the
            size; `load_weights` brings them back as single precision, rounded to 11
            bits.

    Raises:
        InvalidValueError: a number is too large for half precision.
    """
    tensors = {name: np.asarray(array) for name, array in _named(network)}
    if half:
        tensors = {name: _halved(name, array) for name, array in tensors.items()}
    write_arrays(path, tensors)


def load_weights(network: Tree, path: str | Path) -> Tree:
    """Reads the arrays of ``network`` from ``path``; of its own only shapes and dtypes
    are used.

    Half precision is read as single precision where the network is in that.

    Raises:
        LoadError: the file is missing or damaged, or a tensor is missing, unknown, or
            of another shape or dtype.
    """
    stored, _ = read_arrays(
        path, f"The weights {path}", "train the model, or restore the file."
    )
    wanted = dict(_named(network))
    missing, unknown = (
        sorted(set(wanted) - set(stored)),
        sorted(set(stored) - set(wanted)),
    )
    changed = "the network's definition changed since it was trained: restore it, or train again."
    if missing or unknown:
        differences = [f"it lacks {first_three(missing)}"] if missing else []
        differences += (
            [f"it has {first_three(unknown)}, which the network has not"]
            if unknown
            else []
        )
        raise LoadError(
            f"The weights {path} are of another network: {'; '.join(differences)}.",
            fix=changed,
        )
    for name, array in wanted.items():
        found = stored[name]
        if found.dtype == np.float16 and array.dtype in (np.float32, np.float64):
            found = stored[name] = found.astype(np.float32)
        # With jax_enable_x64 a recipe builds its network in double precision; it was
        # trained in single.
        same = found.dtype == array.dtype or (
            found.dtype == np.float32 and array.dtype == np.float64
        )
        if found.shape != array.shape or not same:
            raise LoadError(
                f"Tensor {name!r} in {path} is {found.dtype}{list(found.shape)}; the network needs "
                f"{array.dtype}{list(array.shape)}.",
                fix=changed,
            )
    names = iter(wanted)
    return jax.tree.map(
        lambda leaf: jax.numpy.asarray(stored[next(names)]) if is_array(leaf) else leaf,
        network,
    )


def _halved(name: str, array: np.ndarray) -> np.ndarray:
    """A float32 array as float16; any other array as it is."""
    if array.dtype != np.float32:
        return array
    if np.abs(array).max(initial=0.0) > np.finfo(np.float16).max:
        raise InvalidValueError(
            f"Tensor {name!r} holds {np.abs(array).max():.4g}, too large for half precision.",
            fix="write it in full: half=False.",
        )
    return array.astype(np.float16)


def _named(network: PyTree[Array]) -> list[tuple[str, Array]]:
    leaves = jax.tree_util.tree_leaves_with_path(network)
    return [
        (jax.tree_util.keystr(path, simple=True, separator="."), leaf)
        for path, leaf in leaves
        if is_array(leaf)
    ]
