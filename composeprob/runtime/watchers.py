"""What watches a run as it reports: its checkpoints, whether it is to be given up, and whether its factors agree."""

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
from composeprob.density.overlap import check, check_evaluations, in_question
from composeprob.errors import LoadError
from composeprob.results.status import fewest_families
from composeprob.runtime.record import Fold
from composeprob.samplers.run import Run
from composeprob.samplers.spread import Spread, from_first_process, zeros_of

if TYPE_CHECKING:
    from composeprob.runtime.infer import Checkpoint
    from composeprob.runtime.stages import State


class RunCheckpoints:
    """The checkpoints of one run, written as it reports. What goes wrong meanwhile is reported, and never raised.

    `saved` is the run as it was found in the folder, with ``drawn`` draws in so many ``seconds``; None without. Runs
    look as ``started`` does, of shapes and dtypes. `failure` says why the last one could not be written.
    """

    def __init__(self, state: State, checkpoint: Checkpoint, started: Run | None):
        blank = zeros_of(started)
        known = fingerprint(state, blank)
        self.run_id = digest(repr(sorted(known.items())))
        self.folder = CheckpointFolder(checkpoint.folder, known, in_background=True)
        if checkpoint.resume is False:
            self.folder.clear()
        arrays, static = eqx.partition(dataclasses.replace(blank, spread=Spread()), eqx.is_array)
        found = self.folder.restore((arrays, np.asarray(0), np.asarray(0.0)))
        if found is None and checkpoint.resume:
            raise LoadError(
                f"There is no checkpoint in {self.folder.path} to resume from.",
                fix="check the folder; without resume=True a run starts from the noisiest level.",
            )
        self.saved: Run | None = None if found is None else eqx.combine(found[0], static)
        self.drawn, self.seconds = (0, 0.0) if found is None else (int(found[1]), float(found[2]))
        self.failure: str | None = None
        self.ended, self.due = False, time.monotonic() + tuning.CHECKPOINTS.seconds

    def __call__(self, state: State) -> None:
        """Writes if it is time to, after the draws that belong to it. The writing itself runs beside it."""
        if self.ended:
            return
        began = time.monotonic()
        if from_first_process(int(began >= self.due and not self.folder.writing)) == (0,):
            return
        state.writer.flush()
        if state.writer.failure is not None:
            return
        if failure := self._save(state):
            if self.failure is None:
                warnings.warn(f"No checkpoint could be written: {failure}. The run goes on.", stacklevel=3)
            self.failure = failure
        seconds, share = tuning.CHECKPOINTS
        self.due = time.monotonic() + max(seconds, (time.monotonic() - began) / share)

    def finish(self, state: State) -> None:
        """Writes the run as it ended and waits for it."""
        self.ended = True
        # The first attempt may only raise what an earlier one came to.
        self.failure = self._save(state, wait=True) and self._save(state, wait=True)
        try:
            self.folder.close()
        except Exception as error:
            self.failure = self.failure or first_line(error)

    def _save(self, state: State, wait: bool = False) -> str | None:
        """Writes the run without copies of chains, as another spread may go on; returns what went wrong."""
        try:
            arrays = eqx.filter(state.run.without_copies, eqx.is_array)
            step = int(state.run.visits.made) + state.writer.drawn
            self.folder.save(step, (arrays, np.asarray(state.writer.drawn), np.asarray(state.seconds)))
            if wait:
                self.folder.wait()
        except Exception as error:  # of many kinds: Orbax's, TensorStore's, the file system's
            return first_line(error)
        return None


class FewAncestors(Exception):
    """SMC's chains have become copies of few, at a level where something else can still be done."""


def give_up(state: State) -> None:
    """Raises `FewAncestors`, once the run is saved, where too few of the first chains have descendants."""
    visits, run, n = state.visits, state.run, state.num_chains
    if not int(visits.made):
        return
    effective = 1.0 / (float(run.evidence_variance) * (n - 1) / n + 1 / n)
    if effective < fewest_families(n):
        if state.checkpoints is not None:
            state.checkpoints.finish(state)
        level = int(visits.visited()[-1])
        raise FewAncestors(
            f"{np.asarray(run.records.ancestors)[level]:.0f} first ones, some so much more than others that they are "
            f"worth {effective:.1f}, at level {level}"
        )


class PilotRun:
    """Sends a few chains ahead by `density.check`, once, if the run turns out to be long, and warns of what they find.

    The run's own samples answer the same question better, at its end; a run of seconds waits for them, as compiling the
    pilot run would take as long. How long a level takes is known after the second stretch, as the first one compiles.
    """

    def __init__(self, state: State):
        visits = state.first + 1 if state.pace is None else min(state.first + 1, tuning.CHECKS.fewest_chosen)
        most = tuning.CHECKS.share * state.num_chains * state.sampler.evaluations(state.first, visits)
        self.due = state.first > 0 and in_question(state.density) and check_evaluations(state.density) <= most
        self.began: tuple[float, int] | None = None

    def __call__(self, state: State) -> None:
        if not self.due:
            return
        now, level = time.monotonic(), int(state.visits.visited()[-1])
        if self.began is None or level >= self.began[1]:
            self.began = now, level
            return
        began, above = self.began
        self.due = False
        (long,) = from_first_process(int(level * (now - began) / (above - level) >= tuning.CHECKS.long_seconds))
        if not long:
            return
        key = Fold.PILOT.folded_into(state.key)
        for finding in check(state.density, key, tuning.PILOT.chains):
            warnings.warn(f"{finding.message} The run goes on; Ctrl-C ends it.", stacklevel=2)


def fingerprint(state: State, blank: Run) -> dict[str, str | int]:
    """What a run's samples follow from, in words where there are any, else as digests."""
    density, sampler, key, thin = state.density, state.sampler, state.key, int(state.draws.thin)
    formula = next((line.strip() for line in density.described.text.splitlines() if "∝" in line), "")
    return {
        "number of chains": state.num_chains,
        "number of chains evaluated at once": str(state.spread.chunk),
        "number of transitions between draws": "none" if state.draws.number is None else thin,
        "random key": f"{jax.random.key_impl(key)} {np.asarray(jax.random.key_data(key)).tolist()}",
        "sampler": sampler.describe(),
        "program": formula,
        "levels": repr(density.schedule) + (", which the run chooses" if state.pace else ""),
        **{f"data {name!r}": digest(value) for name, value in density.observed().items()},
        "the numbers of the schedule": digest(density.schedule),
        "the numbers of the sampler (step sizes)": digest(sampler),
        "the weights or parameters of its factors": digest(density),
        "version of JAX": jax.__version__,
        "its code (a function in it, precision, or the platform)": digest(lowered(state, blank)),
    }


def lowered(state: State, blank: Run) -> str:
    """What one level does, before it is compiled: whatever is no array (functions, say) is in there."""
    arrays, static = eqx.partition((state.sampler, blank, state.density), eqx.is_array)
    named = dict(named_leaves(arrays))

    def visit(leaves: dict[str, Array], end: Array) -> PyTree[Array]:
        ordered = jax.tree.unflatten(jax.tree.structure(arrays), [leaves[name] for name in named])
        sampler, run, density = eqx.combine(ordered, static)
        return eqx.filter(sampler.advance(run, density, end), eqx.is_array)

    text = jax.jit(visit).lower(named, np.int32(1)).as_text()
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
    """The leaves in `jax.tree.leaves`' order; those of a distribution by the names of its fields, which key paths
    number and another version of NumPyro has more of."""
    if isinstance(tree, Distribution):
        fields, (children, _) = type(tree).gather_pytree_data_fields(), tree.tree_flatten()
        pairs = zip(fields, children, strict=True)
        return [leaf for field, child in pairs for leaf in named_leaves(child, f"{above}.{field}")]
    found: list[tuple[str, Array]] = []
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, Distribution)):
        name = above + jax.tree_util.keystr(path)
        found += named_leaves(node, name) if isinstance(node, Distribution) else [(name, node)]
    return found
