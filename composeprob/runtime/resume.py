"""Checkpoints of a run of `infer`: what makes two runs the same, when to write, and how one goes on."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import PyTree
from numpyro.distributions import Distribution

from composeprob.checkpoint import DIGEST, Checkpoints, first_line
from composeprob.density.annealed import AnnealedDensity
from composeprob.errors import LoadError
from composeprob.json_data import JSONObject
from composeprob.samplers.base import Run, Sampler
from composeprob.samplers.spread import Spread, agreed, zeros

SECONDS = 10.0
"""Between two checkpoints, at least."""
SHARE = 0.02
"""Of the run's time that may pass in handing over what is to be written."""


class Saves:
    """The checkpoints of one call of `infer`. What goes wrong while the run goes on is told, and never raised.

    Args:
        directory: where they are kept.
        resume: True demands a checkpoint to go on from, False starts again, None takes what is there.
        fingerprint: from `fingerprint`.
        blank: a run with the structure, shapes and dtypes of those to be written.

    Raises:
        InvalidValueError: nothing can be written there.
        LoadError: the directory belongs to another run, cannot be read, or is empty though ``resume`` is True.
    """

    def __init__(self, directory: str | Path, resume: bool | None, fingerprint: JSONObject, blank: Run):
        self.store = Checkpoints(directory, fingerprint, in_background=True)
        if resume is False:
            self.store.clear()
        self.restored = self.store.restore(_state(blank, 0, 0.0))
        if resume and self.restored is None:
            raise LoadError(
                f"There is no checkpoint in {self.store.directory} to resume from.",
                fix="check the folder; without resume=True the run starts from the noisiest level.",
            )
        self.blank = blank
        self.failure: Exception | None = None
        self.due = time.monotonic() + SECONDS

    @property
    def run_id(self) -> str:
        """What tells this run from others, in one word."""
        return digest(repr(sorted(self.store.fingerprint.items())))

    def run(self) -> tuple[Run, int, float] | None:
        """The run as it was saved, how many draws it had taken, and the seconds that it had taken."""
        if self.restored is None:
            return None
        arrays, drawn, seconds = self.restored
        blank = dataclasses.replace(self.blank, spread=Spread())
        whole = eqx.combine(arrays, eqx.filter(blank, eqx.is_array, inverse=True))
        return whole, int(drawn), float(seconds)

    def offer(self, run: Run, drawn: int, seconds: float, flush: Callable[[int], None] | None = None) -> None:
        """Write if it is time to, after the draws that belong to it. The writing itself goes on beside the run."""
        (now,) = agreed(int(time.monotonic() >= self.due and not self.store.writing))
        if not now:
            return
        if flush is not None:
            flush(drawn)
        began = time.monotonic()
        try:
            self.store.save(int(run.visits.made) + drawn, _state(run, drawn, seconds))
        except Exception as error:  # of many kinds: Orbax's, TensorStore's, the file system's
            if self.failure is None:
                warnings.warn(f"No checkpoint could be written: {first_line(error)}. The run goes on.", stacklevel=3)
            self.failure = error
        self.due = time.monotonic() + max(SECONDS, (time.monotonic() - began) / SHARE)

    def finish(self, run: Run, drawn: int, seconds: float) -> str | None:
        """Write the run as it ended and wait for it; says what went wrong."""
        self.failure = None
        for _ in range(2):  # the first may only raise what an earlier one came to
            try:
                self.store.save(int(run.visits.made) + drawn, _state(run, drawn, seconds))
                self.store.wait()
            except Exception as error:
                self.failure = error
            else:
                self.failure = None
                break
        try:
            self.store.close()
        except Exception as error:
            self.failure = self.failure or error
        return None if self.failure is None else first_line(self.failure)


def fingerprint(
    density: AnnealedDensity, sampler: Sampler, key: Array, first_level: int, thin: int | None, blank: Run
) -> dict[str, str | int]:
    """What a run's samples follow from, in words where there are any, else as digests.

    Args:
        density, sampler, first_level: as `infer` runs them.
        key: which the chains' keys come from.
        thin: transitions between two draws; None for a run that takes none.
        blank: a run with the shapes of this one.
    """
    formula = next((line.strip() for line in density.described.text.splitlines() if "∝" in line), "")
    data = {f"data {name!r}": digest(value) for name, value in density.observed().items()}
    return {
        "number of chains": len(blank.keys),
        "number of chains evaluated at once": str(blank.spread.chunk),
        "number of transitions between draws": "none" if thin is None else thin,
        "random key": f"{jax.random.key_impl(key)} {np.asarray(jax.random.key_data(key)).tolist()}",
        "sampler": sampler.describe(),
        "program": formula,
        "levels": repr(density.schedule) + (", which the run chooses" if blank.visits.pace else ""),
        **data,
        "the numbers of the schedule": digest(density.schedule),
        "the numbers of the sampler (step sizes)": digest(sampler),
        "the weights or parameters of its factors": digest(density),
        "version of JAX": jax.__version__,
        "its code (a function in it, precision, or the platform)": digest(code(density, sampler, first_level, blank)),
    }


def code(density: AnnealedDensity, sampler: Sampler, first_level: int, blank: Run) -> str:
    """What one level does, before it is compiled: whatever is no array (functions, say) is in there."""
    arrays, static = eqx.partition((sampler, blank, density), eqx.is_array)
    names = [name for name, _ in named(arrays)]

    def visit(by_name: dict[str, Array], level: Array) -> PyTree[Array]:
        leaves = jax.tree.unflatten(jax.tree.structure(arrays), [by_name[name] for name in names])
        sampler, run, density = eqx.combine(leaves, static)
        return eqx.filter(sampler.visit(run, density, level, level + 1), eqx.is_array)

    text = jax.jit(visit).lower(dict(named(arrays)), jnp.int32(0)).as_text()
    return re.sub(r'backend_config = "\d+"|index = \d+', "", text)  # callbacks are numbered anew in every process


def digest(tree: PyTree[Array] | str) -> str:
    """SHA-256 over every array of a tree, or over a text."""
    whole = hashlib.sha256(tree.encode() if isinstance(tree, str) else b"")
    for name, leaf in sorted(named(eqx.filter(tree, eqx.is_array)), key=lambda pair: pair[0]):
        values = np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)
        whole.update(f"{name} {values.dtype} {values.shape}".encode())
        whole.update(np.ascontiguousarray(values).tobytes())
    return DIGEST + whole.hexdigest()


def named(tree: PyTree[Array], above: str = "") -> list[tuple[str, Array]]:
    """The leaves in `jax.tree.leaves`' order, with names that are the same in every process.

    NumPyro flattens a distribution in the order of a set of strings, which differs from process to process, and its
    key paths number that order; here they are the parameters' names.
    """
    if isinstance(tree, Distribution):
        fields, (children, _) = type(tree).gather_pytree_data_fields(), tree.tree_flatten()
        return [
            pair for field, child in zip(fields, children, strict=True) for pair in named(child, f"{above}.{field}")
        ]
    found: list[tuple[str, Array]] = []
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, Distribution)):
        name = above + jax.tree_util.keystr(path)
        found += named(node, name) if isinstance(node, Distribution) else [(name, node)]
    return found


def blank_like(shapes: PyTree[jax.ShapeDtypeStruct]) -> PyTree[Array]:
    """Zeros where `eqx.filter_eval_shape` says that arrays are."""

    def blank(leaf: object) -> object:
        return zeros(leaf, leaf.shape) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf

    return jax.tree.map(blank, shapes, is_leaf=lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))


def _state(run: Run, drawn: int, seconds: float) -> tuple[PyTree[Array], np.ndarray, np.ndarray]:
    arrays = eqx.filter(run.whole, eqx.is_array)  # another spread may go on
    return arrays, np.asarray(drawn), np.asarray(seconds)
