"""A network's weights as safetensors: plain arrays under the names of their place in the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from composeprob.errors import LoadError


def tensor_names(network: Any) -> list[str]:
    """The name of every array of a network, in order, such as ``blocks.0.enter.weight``."""
    return [name for name, _ in _named(network)]


def save_weights(network: Any, path: str | Path) -> None:
    """Write the arrays of ``network`` (as adapted by a factor, ``factor.network``) to ``path``."""
    # safetensors writes the buffer as it lies in memory: a transposed view must be made contiguous first.
    tensors = {name: np.ascontiguousarray(array) for name, array in _named(network)}
    Path(path).write_bytes(save(tensors))  # not save_file, whose files only their owner can read


def load_weights(network: Any, path: str | Path) -> Any:
    """``network`` with its arrays read from ``path``; only their shapes and dtypes are looked at.

    Raises:
        LoadError: the file is missing or damaged, or a tensor is missing, unknown, or of another shape or dtype.
    """
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        fix = "train the model, or restore the file."
        raise LoadError(f"The weights {path} cannot be read: {error}", fix=fix) from error
    wanted = dict(_named(network))
    missing, unknown = sorted(set(wanted) - set(stored)), sorted(set(stored) - set(wanted))
    if missing or unknown:
        raise LoadError(
            f"The weights {path} are of another network"
            + (f": it lacks {_some(missing)}" if missing else "")
            + (f"{'; ' if missing else ': '}it has {_some(unknown)}, which the network has not" if unknown else "")
            + ".",
            fix="the network's definition changed since it was trained: restore it, or train again.",
        )
    for name, array in wanted.items():
        found = stored[name]
        # With jax_enable_x64 a recipe builds its network in double precision; it was trained in single.
        same = found.dtype == array.dtype or (found.dtype == np.float32 and array.dtype == np.float64)
        if found.shape != array.shape or not same:
            raise LoadError(
                f"Tensor {name!r} in {path} is {found.dtype}{list(found.shape)}; the network needs "
                f"{array.dtype}{list(array.shape)}.",
                fix="the network's definition changed since it was trained: restore it, or train again.",
            )
    leaves, structure = jax.tree.flatten(network)
    names = iter(wanted)
    filled = [jax.numpy.asarray(stored[next(names)]) if _is_array(leaf) else leaf for leaf in leaves]
    return jax.tree.unflatten(structure, filled)


def _named(network: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(network)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves if _is_array(leaf)]


def _is_array(leaf: Any) -> bool:
    return eqx.is_array(leaf) or isinstance(leaf, (np.ndarray, jax.ShapeDtypeStruct))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
