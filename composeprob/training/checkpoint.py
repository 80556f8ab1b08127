"""Checkpoints of training by Orbax: arrays under their key paths, beside a text that says what they belong to."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np

from composeprob.errors import LoadError


class Checkpoints:
    """The checkpoints of one run of training in one directory; the last two are kept.

    Args:
        directory: made when missing.
        fingerprint: what the run is. A directory with another one is refused.
    """

    def __init__(self, directory: str | Path, fingerprint: dict[str, Any]):
        # Orbax takes seconds to import, and only training with checkpoints needs it.
        import orbax.checkpoint as ocp

        self.args: Any = ocp.args
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every file that it writes
        self.directory = Path(directory).absolute()
        self.fingerprint = fingerprint
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True, enable_async_checkpointing=False)
        self.manager = ocp.CheckpointManager(self.directory, options=options)

    def clear(self) -> None:
        """Delete what is there."""
        for step in self.manager.all_steps():
            self.manager.delete(step)

    def save(self, step: int, state: Any) -> None:
        """Write ``state``, a pytree of arrays, as of ``step``; one that exists already is kept."""
        if step in self.manager.all_steps():
            return
        items = self.args.Composite(
            state=self.args.StandardSave(_named(state)), run=self.args.JsonSave(self.fingerprint)
        )
        self.manager.save(step, args=items)

    def restore(self, like: Any) -> Any | None:
        """The last state, in the structure of ``like``; None when there is none.

        Raises:
            LoadError: the directory belongs to another recipe or key.
        """
        step = self.manager.latest_step()
        if step is None:
            return None
        found = self.manager.restore(step, args=self.args.Composite(run=self.args.JsonRestore()))["run"]
        different = [name for name in self.fingerprint if found.get(name) != self.fingerprint[name]]
        if different:
            name = different[0]
            raise LoadError(
                f"The checkpoint in {self.directory} belongs to another run: its {name} is {found.get(name)!r}, not "
                f"{self.fingerprint[name]!r}.",
                fix="choose another checkpoint_dir, or pass resume=False to start again.",
            )
        target = {name: np.asarray(leaf) for name, leaf in _named(like).items()}
        items = self.args.Composite(state=self.args.StandardRestore(target))
        restored = self.manager.restore(step, args=items)["state"]
        # What was a NumPy array comes back as one: the history is written to in place.
        leaves = [
            np.array(restored[name]) if isinstance(leaf, np.ndarray) else jax.numpy.asarray(restored[name])
            for name, leaf in _named(like).items()
        ]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def close(self) -> None:
        """Wait for what is being written."""
        self.manager.close()


def _named(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
