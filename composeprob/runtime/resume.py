"""Checkpoints of a run of `infer`: what makes two runs the same, when to write, and how one continues."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import time
import warnings
from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import PyTree
from numpyro.distributions import Distribution

from composeprob import tuning
from composeprob.checkpoint import DIGEST, CheckpointFolder, first_line
from composeprob.density.annealed import AnnealedDensity
from composeprob.errors import LoadError
from composeprob.runtime.progress import Report
from composeprob.samplers.run import Run
from composeprob.samplers.sampler import Sampler
from composeprob.samplers.spread import Spread, from_first_process, zeros

if TYPE_CHECKING:
    from composeprob.runtime.infer import Request
    from composeprob.runtime.stages import State


class RunCheckpoints:
    """The checkpoints of one run, written as it reports. What goes wrong meanwhile is reported, and never raised.

    Args:
        request: with a `Checkpoint`.
        sampler: prepared.
        first: the level where chains start.
        blank: a run with the structure, shapes and dtypes of those to be written.

    Attributes:
        saved: the run as it was saved, how many draws it had taken, and in how many seconds; None without.
        ended: whether the last checkpoint was written, or could not be.

    Raises:
        InvalidValueError: nothing can be written there.
        LoadError: the folder belongs to another run, cannot be read, or is empty though the run must go on from one.
    """

    def __init__(self, request: Request, sampler: Sampler, first: int, blank: Run):
        assert request.checkpoint is not None
        known, resume = fingerprint(request, sampler, first, blank), request.checkpoint.resume
        self.run_id = digest(repr(sorted(known.items())))
        self.folder = CheckpointFolder(request.checkpoint.folder, known, in_background=True)
        if resume is False:
            self.folder.clear()
        arrays, static = eqx.partition(dataclasses.replace(blank, spread=Spread()), eqx.is_array)
        self.saved: tuple[Run, int, float] | None = None
        if (found := self.folder.restore((arrays, np.asarray(0), np.asarray(0.0)))) is not None:
            self.saved = eqx.combine(found[0], static), int(found[1]), float(found[2])
        elif resume:
            raise LoadError(
                f"There is no checkpoint in {self.folder.path} to resume from.",
                fix="check the folder; without resume=True a run starts from the noisiest level.",
            )
        self.failure: Exception | None = None
        self.ended = False
        self.due = time.monotonic() + tuning.CHECKPOINTS.seconds

    def __call__(self, state: State, report: Report) -> None:
        """Writes if it is time to, after the draws that belong to it. The writing itself runs beside it."""
        if report.doing or self.ended:
            return
        (now,) = from_first_process(int(time.monotonic() >= self.due and not self.folder.writing))
        if not now:
            return
        if state.writer is not None and state.drawn:
            state.writer.flush(state.drawn)
        began = time.monotonic()
        try:
            self._save(state)
        except Exception as error:  # of many kinds: Orbax's, TensorStore's, the file system's
            if self.failure is None:
                warnings.warn(f"No checkpoint could be written: {first_line(error)}. The run goes on.", stacklevel=3)
            self.failure = error
        seconds, share = tuning.CHECKPOINTS
        self.due = time.monotonic() + max(seconds, (time.monotonic() - began) / share)

    @property
    def failed(self) -> str | None:
        """Why the last one could not be written; None where it was."""
        return None if self.failure is None else first_line(self.failure)

    def finish(self, state: State) -> None:
        """Writes the run as it ended and waits for it."""
        self.ended = True
        for _ in range(2):  # the first may only raise what an earlier one came to
            self.failure = None
            try:
                self._save(state)
                self.folder.wait()
                break
            except Exception as error:
                self.failure = error
        try:
            self.folder.close()
        except Exception as error:
            self.failure = self.failure or error

    def _save(self, state: State) -> None:
        arrays = eqx.filter(state.run.without_copies, eqx.is_array)  # another spread may go on
        step = int(state.run.visits.made) + state.drawn
        self.folder.save(step, (arrays, np.asarray(state.drawn), np.asarray(state.seconds)))


def fingerprint(request: Request, sampler: Sampler, first: int, blank: Run) -> dict[str, str | int]:
    """What a run's samples follow from, in words where there are any, else as digests."""
    density, key, draws = request.density, request.key, request.draws
    formula = next((line.strip() for line in density.described.text.splitlines() if "∝" in line), "")
    data = {f"data {name!r}": digest(value) for name, value in density.observed().items()}
    return {
        "number of chains": request.num_chains,
        "number of chains evaluated at once": str(request.spread.chunk),
        "number of transitions between draws": "none" if draws.number is None else int(draws.thin),
        "random key": f"{jax.random.key_impl(key)} {np.asarray(jax.random.key_data(key)).tolist()}",
        "sampler": sampler.describe(),
        "program": formula,
        "levels": repr(density.schedule) + (", which the run chooses" if request.pace else ""),
        **data,
        "the numbers of the schedule": digest(density.schedule),
        "the numbers of the sampler (step sizes)": digest(sampler),
        "the weights or parameters of its factors": digest(density),
        "version of JAX": jax.__version__,
        "its code (a function in it, precision, or the platform)": digest(lowered(density, sampler, blank)),
    }


def lowered(density: AnnealedDensity, sampler: Sampler, blank: Run) -> str:
    """What one level does, before it is compiled: whatever is no array (functions, say) is in there."""
    arrays, static = eqx.partition((sampler, blank, density), eqx.is_array)
    names = [name for name, _ in named_leaves(arrays)]

    def visit(leaves: dict[str, Array], end: Array) -> PyTree[Array]:
        ordered = jax.tree.unflatten(jax.tree.structure(arrays), [leaves[name] for name in names])
        sampler, run, density = eqx.combine(ordered, static)
        return eqx.filter(sampler.advance(run, density, end), eqx.is_array)

    text = jax.jit(visit).lower(dict(named_leaves(arrays)), np.int32(1)).as_text()
    return re.sub(r'backend_config = "\d+"|index = \d+', "", text)  # callbacks are numbered anew in every process


def digest(tree: PyTree[Array] | str) -> str:
    """SHA-256 over every array of a tree, or over a text."""
    whole = hashlib.sha256(tree.encode() if isinstance(tree, str) else b"")
    for name, leaf in sorted(named_leaves(eqx.filter(tree, eqx.is_array)), key=lambda pair: pair[0]):
        values = np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)
        whole.update(f"{name} {values.dtype} {values.shape}".encode())
        whole.update(np.ascontiguousarray(values).tobytes())
    return DIGEST + whole.hexdigest()


def named_leaves(tree: PyTree[Array], above: str = "") -> list[tuple[str, Array]]:
    """The leaves in `jax.tree.leaves`' order, with names that are the same in every process.

    NumPyro flattens a distribution in the order of a set of strings, which differs from process to process, and its
    key paths number that order; here they are the parameters' names.
    """
    if isinstance(tree, Distribution):
        fields, (children, _) = type(tree).gather_pytree_data_fields(), tree.tree_flatten()
        pairs = zip(fields, children, strict=True)
        return [leaf for field, child in pairs for leaf in named_leaves(child, f"{above}.{field}")]
    found: list[tuple[str, Array]] = []
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, Distribution)):
        name = above + jax.tree_util.keystr(path)
        found += named_leaves(node, name) if isinstance(node, Distribution) else [(name, node)]
    return found


def blank_like(shapes: PyTree[jax.ShapeDtypeStruct]) -> PyTree[Array]:
    """Zeros where `eqx.filter_eval_shape` says that arrays are."""
    is_shape = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)  # noqa: E731
    return jax.tree.map(lambda leaf: zeros(leaf, leaf.shape) if is_shape(leaf) else leaf, shapes, is_leaf=is_shape)
