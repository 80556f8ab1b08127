"""Checkpoints by Orbax: a pytree of arrays, and the fingerprint of its run."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import TypeVar

from jax import Array
from jaxtyping import PyTree

from composeprob.arguments import check_writable
from composeprob.errors import LoadError
from composeprob.extras import needed
from composeprob.json_data import JSONObject

DIGEST = "sha256:"
"""Prefix of a fingerprint's entries that are hashes: a message does not show them."""

Tree = TypeVar("Tree")


class CheckpointFolder:
    """`CheckpointFolder` keeps the last two checkpoints of one run (of training or of
    sampling) in a directory.

    A directory whose checkpoints have another ``fingerprint``, ``{name: value}``, is
    refused, and so is one that cannot be created or written to. ``start_again`` is the
    code by which a user starts again in a folder. In the background `save` returns as
    soon as the arrays are copied, while a thread writes them; its errors are raised by
    a later `save`, or by `wait`.
    """

    def __init__(
        self,
        directory: str | Path,
        fingerprint: JSONObject,
        start_again: str = "cp.Checkpoint(folder, resume=False)",
        in_background: bool = False,
    ):
        self.path = Path(directory).absolute()
        self.start_again = start_again
        self.fingerprint = fingerprint
        check_writable(
            self.path,
            f"No checkpoint can be written to checkpoint_dir={str(directory)!r}",
        )
        # Orbax takes seconds to import, and only runs with checkpoints need it.
        with needed("store", "A checkpoint"):
            import orbax.checkpoint as ocp

        self.args = ocp.args
        # Orbax reports every file that it writes.
        logging.getLogger("absl").setLevel(logging.ERROR)
        # A thread of Orbax's creates folders otherwise, and others wait for them: 5
        # minutes where they cannot be created.
        synchronous = ocp.AsyncOptions(create_directories_asynchronously=False)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2,
            enable_async_checkpointing=in_background,
            async_options=synchronous,
        )
        self.manager = ocp.CheckpointManager(self.path, options=options)
        # Raises the error of a failed write in the background.
        self.wait = self.manager.wait_until_finished
        # Waits too, and releases Orbax's threads.
        self.close = self.manager.close

    def clear(self) -> None:
        """Delete all checkpoints."""
        for step in self.manager.all_steps():
            self.manager.delete(step)

    def save(self, step: int, state: PyTree[Array]) -> None:
        """Write ``state``, a pytree of arrays and random keys, as of ``step``; an
        existing checkpoint of that step is kept."""
        if step in self.manager.all_steps():
            return
        args = self.args.Composite(state=self.args.StandardSave(state))
        self.manager.save(step, args=args, custom_metadata=self.fingerprint)

    @property
    def writing(self) -> bool:
        """True while a save runs in the background."""
        return self.manager.is_saving_in_progress()

    def restore(self, like: Tree) -> Tree | None:
        """Return the last readable state, in the structure of ``like``; None without a
        checkpoint.

        A damaged checkpoint is skipped with a warning where the one before it can be
        read.

        Raises:
            LoadError: no checkpoint can be read, or the directory belongs to another
                run.
        """
        damaged: dict[int, Exception] = {}
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                self._check(self.manager.metadata(step).custom_metadata)
                args = self.args.Composite(state=self.args.StandardRestore(like))
                state: Tree = self.manager.restore(step, args=args)["state"]
            except LoadError:
                raise
            # Of many kinds: Orbax's, TensorStore's, JSON's, the file system's.
            except Exception as error:
                damaged[step] = error
                continue
            for unreadable, reason in damaged.items():
                warnings.warn(
                    f"Checkpoint {unreadable} in {self.path} cannot be read "
                    f"({first_line(reason)}); going on from checkpoint {step}.",
                    stacklevel=4,
                )
            return state
        if not damaged:
            return None
        latest, reason = next(iter(damaged.items()))
        raise LoadError(
            f"The checkpoint {latest} in {self.path} cannot be read: "
            f"{first_line(reason)}",
            fix="it is damaged: choose another folder, or start again: "
            f"{self.start_again}.",
        ) from reason

    def _check(self, stored: JSONObject) -> None:
        """Refuse the fingerprint of another run."""
        for name, value in self.fingerprint.items():
            if stored.get(name) == value:
                continue
            difference = f"its {name} is {stored.get(name)!r}, not {value!r}"
            if self.fingerprint.keys().isdisjoint(stored):
                kind = "cp.training.train" if "learning_rate" in stored else "cp.infer"
                difference = f"it is one of {kind}"
            elif str(value).startswith(DIGEST):
                difference = f"it differs in: {name}"
            raise LoadError(
                f"The checkpoint in {self.path} belongs to another run: {difference}.",
                fix="choose another checkpoint_dir, or start again: "
                f"{self.start_again}.",
            )


def first_line(error: Exception) -> str:
    """Type of an error and the first line of its text."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
