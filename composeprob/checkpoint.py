"""Checkpoints by Orbax: arrays under their key paths, beside a text of what they belong to."""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax import Array
from jaxtyping import PyTree
from numpy.typing import ArrayLike

from composeprob.errors import InvalidValueError, LoadError
from composeprob.json_data import JSONObject

DIGEST = "sha256:"
"""What entries of a fingerprint begin with that only a machine can read."""


Tree = TypeVar("Tree")


class CheckpointFolder:
    """`CheckpointFolder` keeps the last two checkpoints of one run (of training or of sampling) in a directory.

    Args:
        directory: made when missing.
        fingerprint: what the run is, ``{what: value}``. A directory with another one is refused.
        in_background: whether `save` returns as soon as the arrays are copied, and the writing runs beside it;
            its errors are raised by a later `save`, or by `wait`.

    Raises:
        InvalidValueError: the directory cannot be made or written to.
    """

    def __init__(self, directory: str | Path, fingerprint: JSONObject, in_background: bool = False):
        self.path = Path(directory).absolute()
        self.fingerprint = fingerprint
        try:  # now, and not after an hour
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.path, prefix=".writable-") as file:
                file.write(b"\0")
        except OSError as error:
            raise InvalidValueError(
                f"No checkpoint can be written to checkpoint_dir={str(directory)!r}: {error.strerror or error}.",
                fix="choose a folder that you may write to, on a disk with room.",
            ) from error
        # Orbax takes seconds to import, and only runs with checkpoints need it.
        import orbax.checkpoint as ocp

        self.args: Any = ocp.args
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every file that it writes
        # Folders that a thread of Orbax's own makes are waited for by others, for 5 minutes where they cannot be made.
        at_once = ocp.AsyncOptions(create_directories_asynchronously=False)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2, create=True, enable_async_checkpointing=in_background, async_options=at_once
        )
        self.manager = ocp.CheckpointManager(self.path, options=options)

    def clear(self) -> None:
        """Delete what is there."""
        for step in self.manager.all_steps():
            self.manager.delete(step)

    def save(self, step: int, state: PyTree[Array]) -> None:
        """Write ``state``, a pytree of arrays and random keys, as of ``step``; one that exists already is kept."""
        if step in self.manager.all_steps():
            return
        items = self.args.Composite(
            state=self.args.StandardSave(_by_path(state)), run=self.args.JsonSave(self.fingerprint)
        )
        self.manager.save(step, args=items)

    @property
    def writing(self) -> bool:
        """Whether a save runs in the background."""
        return self.manager.is_saving_in_progress()

    def restore(self, like: Tree) -> Tree | None:
        """The last state that can be read, in the structure of ``like``; None when there is none.

        A damaged checkpoint is passed over with a warning where the one before it can be read.

        Raises:
            LoadError: the directory belongs to another run, or none of its checkpoints can be read.
        """
        damaged: list[tuple[int, Exception]] = []
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                found = self.manager.restore(step, args=self.args.Composite(run=self.args.JsonRestore()))["run"]
                self._check(found)
                state = self._read(step, like)
            except LoadError:
                raise
            except Exception as error:  # of many kinds: Orbax's, TensorStore's, JSON's, the file system's
                damaged.append((step, error))
                continue
            for bad, why in damaged:
                warnings.warn(
                    f"Checkpoint {bad} in {self.path} cannot be read ({first_line(why)}); going on from "
                    f"checkpoint {step}.",
                    stacklevel=4,
                )
            return state
        if damaged:
            step, why = damaged[0]
            raise LoadError(
                f"The checkpoint {step} in {self.path} cannot be read: {first_line(why)}",
                fix="it is damaged: choose another folder, or start again: cp.Checkpoint(folder, resume=False).",
            ) from why
        return None

    def wait(self) -> None:
        """Wait for what is being written, and raise what went wrong with it."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        """Wait for what is being written, and release Orbax's threads."""
        self.manager.close()

    def _check(self, found: JSONObject) -> None:
        different = [name for name in self.fingerprint if found.get(name) != self.fingerprint[name]]
        if not different:
            return
        name = different[0]
        if str(self.fingerprint[name]).startswith(DIGEST):
            difference = f"it differs in: {name}"
        else:
            difference = f"its {name} is {found.get(name)!r}, not {self.fingerprint[name]!r}"
        raise LoadError(
            f"The checkpoint in {self.path} belongs to another run: {difference}.",
            fix="choose another checkpoint_dir, or start again: cp.Checkpoint(folder, resume=False).",
        )

    def _read(self, step: int, like: Tree) -> Tree:
        named = _by_path(like)
        target = {name: np.asarray(leaf) for name, leaf in named.items()}
        restored = self.manager.restore(step, args=self.args.Composite(state=self.args.StandardRestore(target)))
        leaves = [_as(restored["state"][name], leaf) for name, leaf in zip(named, jax.tree.leaves(like), strict=True)]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _by_path(tree: PyTree[Array]) -> dict[str, Array]:
    """The leaves by their key paths, random keys as the numbers that they are made of."""
    return {
        jax.tree_util.keystr(path): jax.random.key_data(leaf) if _is_key(leaf) else leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _as(value: ArrayLike, leaf: Array | np.ndarray) -> Array | np.ndarray:
    """A restored value as what ``leaf`` is: what was a NumPy array comes back as one, since histories are written to in
    place."""
    if isinstance(leaf, np.ndarray):
        return np.array(value)
    if _is_key(leaf):
        return jax.random.wrap_key_data(jax.numpy.asarray(value), impl=jax.random.key_impl(leaf))
    return jax.numpy.asarray(value)


def _is_key(leaf: object) -> bool:
    return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def first_line(error: Exception) -> str:
    """What an error is, in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
