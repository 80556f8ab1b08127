"""Checkpoints by Orbax: a pytree of arrays, beside a text of what they belong to."""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path
from typing import TypeVar

from jax import Array
from jaxtyping import PyTree

from composeprob.errors import InvalidValueError, LoadError
from composeprob.json_data import JSONObject

DIGEST = (
    "sha256:"  # what entries of a fingerprint begin with that only a machine can read
)

Tree = TypeVar("Tree")


class CheckpointFolder:
    """`CheckpointFolder` keeps the last two checkpoints of one run (of training or of
    sampling) in a directory.

    A directory whose checkpoints have another ``fingerprint``, ``{what: value}``, is
    refused, and so is one that cannot be made or written to. In the background `save`
    returns as soon as the arrays are copied, and the writing runs beside it; its errors
    are raised by a later `save`, or by `wait`.
    """

    def __init__(
        self,
        directory: str | Path,
        fingerprint: JSONObject,
        in_background: bool = False,
    ):
        self.path = Path(directory).absolute()
        self.fingerprint = fingerprint
        try:  # now, and not after an hour
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                dir=self.path, prefix=".writable-"
            ) as file:
                file.write(b"\0")
        except OSError as error:
            raise InvalidValueError(
                f"No checkpoint can be written to checkpoint_dir={str(directory)!r}: {error.strerror or error}.",
                fix="choose a folder that you may write to, on a disk with room.",
            ) from error
        # Orbax takes seconds to import, and only runs with checkpoints need it.
        import orbax.checkpoint as ocp

        self.args = ocp.args
        logging.getLogger("absl").setLevel(
            logging.ERROR
        )  # Orbax reports every file that it writes
        # Folders that a thread of Orbax's own makes are waited for by others, for 5
        # minutes where they cannot be made.
        now = ocp.AsyncOptions(create_directories_asynchronously=False)
        kept = {
            "max_to_keep": 2,
            "enable_async_checkpointing": in_background,
            "async_options": now,
        }
        self.manager = ocp.CheckpointManager(
            self.path, options=ocp.CheckpointManagerOptions(**kept)
        )
        self.wait = (
            self.manager.wait_until_finished
        )  # and raises what went wrong with what is being written
        self.close = self.manager.close  # waits too, and releases Orbax's threads

    def clear(self) -> None:
        """Delete what is there."""
        for step in self.manager.all_steps():
            self.manager.delete(step)

    def save(self, step: int, state: PyTree[Array]) -> None:
        """Write ``state``, a pytree of arrays and random keys, as of ``step``; one that
        exists already is kept."""
        if step not in self.manager.all_steps():
            args = self.args.Composite(state=self.args.StandardSave(state))
            self.manager.save(step, args=args, custom_metadata=self.fingerprint)

    @property
    def writing(self) -> bool:
        """Whether a save runs in the background."""
        return self.manager.is_saving_in_progress()

    def restore(self, like: Tree) -> Tree | None:
        """The last state that can be read, in the structure of ``like``; None when
        there is none. A damaged checkpoint is passed over with a warning where the one
        before it can be read; raises where none can, or the directory belongs to
        another run."""
        damaged: dict[int, Exception] = {}
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                self._check(self.manager.metadata(step).custom_metadata)
                args = self.args.Composite(state=self.args.StandardRestore(like))
                state: Tree = self.manager.restore(step, args=args)["state"]
            except LoadError:
                raise
            # of many kinds: Orbax's, TensorStore's, JSON's, the file system's
            except Exception as error:
                damaged[step] = error
                continue
            for bad, why in damaged.items():
                warnings.warn(
                    f"Checkpoint {bad} in {self.path} cannot be read ({first_line(why)}); going on from "
                    f"checkpoint {step}.",
                    stacklevel=4,
                )
            return state
        if not damaged:
            return None
        step, why = next(iter(damaged.items()))
        raise LoadError(
            f"The checkpoint {step} in {self.path} cannot be read: {first_line(why)}",
            fix="it is damaged: choose another folder, or start again: cp.Checkpoint(folder, resume=False).",
        ) from why

    def _check(self, found: JSONObject) -> None:
        """Refuses another run's fingerprint."""
        for name, value in self.fingerprint.items():
            if found.get(name) != value:
                differs = f"its {name} is {found.get(name)!r}, not {value!r}"
                raise LoadError(
                    f"The checkpoint in {self.path} belongs to another run: "
                    f"{f'it differs in: {name}' if str(value).startswith(DIGEST) else differs}.",
                    fix="choose another checkpoint_dir, or start again: cp.Checkpoint(folder, resume=False).",
                )


def first_line(error: Exception) -> str:
    """What an error is, in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
