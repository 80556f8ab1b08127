"""One sampler's way through one call of `infer`: prepared, down the levels, its stay, its draws, the result."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from composeprob.density.annealed import AnnealedDensity
from composeprob.density.curl import curl
from composeprob.density.overlap import LEVELS, Finding, agreement, in_question
from composeprob.errors import CapabilityError
from composeprob.results.result import Result
from composeprob.results.status import fewest_families
from composeprob.runtime import parts
from composeprob.runtime.compiled import read, sample_shapes, start
from composeprob.runtime.descend import descend
from composeprob.runtime.early import Early
from composeprob.runtime.ended import Ended, summed_up
from composeprob.runtime.global_moves import global_moves
from composeprob.runtime.origin import as_code, versions
from composeprob.runtime.resume import Saves, blank_like, fingerprint
from composeprob.runtime.stay import stay
from composeprob.runtime.stream import Kept, NotKept, check_draws, stream
from composeprob.runtime.trail import Trail
from composeprob.samplers.base import Run, Sampler, begin, placed
from composeprob.samplers.choose import check_capabilities
from composeprob.samplers.ends import check_enough
from composeprob.samplers.spread import Spread, everywhere, host
from composeprob.samplers.visits import Pace

CURL = 2**31 - 2
"""Folded into the run's key for the directions along which curl is measured."""
COARSE = 2**31 - 6
"""Folded into the run's key for the run over every other level."""
APART = 2**31 - 7
"""Folded into the run's key for the noise that samples get where factors are asked whether they agree."""
AGREEMENT = 0.05
"""The share of a run's evaluations that this may take."""
FEWEST_CHOSEN = 24
"""About as few levels does a run visit that chooses its own."""
DRAWS = "draws.zarr"
"""In a folder of checkpoints: the draws of a run without a store of its own."""
LOOKED_AT = 64
"""Chains at whose positions curl is measured, and factors are asked whether they agree."""


class Asked(NamedTuple):
    """What `infer` was asked for, checked; see there."""

    density: AnnealedDensity
    key: Array
    num_chains: int
    spread: Spread
    mesh: Mesh | None
    progress: bool
    resume: bool | None
    draws: int | None
    thin: int
    store: str | Path | None
    shard_above: int | None
    pace: Pace | None
    keep_path: int | None


class FewAncestors(Exception):
    """SMC's chains have become copies of few, at a level where something else can still be done."""

    def __init__(self, distinct: int, effective: float, level: int):
        super().__init__(f"{distinct} first ones, some so much more than others that they are worth {effective:.1f},")
        self.level = level


class Job:
    """What one sampler does of a call of `infer`: `levels`, `global_moves`, `stay`, `draw` and `result`, in this order.

    Args:
        asked: the call.
        sampler: not yet prepared.
        folder: of its checkpoints, None without.

    Raises:
        ComposeProbError: the sampler cannot do it, or the folder belongs to another run; nothing is compiled before.
    """

    def __init__(self, asked: Asked, sampler: Sampler, folder: str | Path | None):
        density = asked.density
        self.asked, self.began = asked, time.monotonic()
        check_capabilities(sampler, density)
        _check_pace(asked.pace, sampler, density)
        self.sampler = sampler.prepare(density)
        if int(self.sampler.global_moves):
            check_enough(asked.num_chains, density)
        check_draws(asked.draws, asked.thin, asked.store, self.sampler, density.described.where)
        parts.check_parts(asked.shard_above, asked.mesh, self.sampler)
        self.first = self.sampler.first_level(density)
        self.trail = None if asked.keep_path is None else Trail(asked.keep_path)
        self.saves: Saves | None = None
        self.done = 0
        alone = dataclasses.replace(asked.spread, mesh=None, copies=0)
        run = begin(asked.key, asked.num_chains, self.sampler.visits(density, asked.pace), alone)
        if folder is not None:
            run = self._resumed(run, folder)
        self.run = placed(run, asked.spread)
        whole = parts.in_parts(density, asked.spread, asked.shard_above)
        self.ready = asked.spread.place(self.sampler.in_numbers(), everywhere), parts.placed(whole, asked.spread)
        self.kept = self._kept(folder)
        self.interrupted = False
        self.coarse: float | None = None
        self.turning: dict[str, float] = {}
        self.lost: str | None = None

    @property
    def arrived(self) -> bool:
        """Whether the chains are at level 0."""
        return bool(host(self.run.visits).arrived)

    @property
    def seconds(self) -> float:
        """That the run has taken, with what it took before it was resumed."""
        return time.monotonic() - self.began

    def levels(self, give_up: bool) -> None:
        """Go down the levels, and measure what is to be measured of the chains there.

        Raises:
            FewAncestors: if it shall be given up where too few of the first chains have descendants.
        """

        asked = self.asked
        visits = self.first + 1 if asked.pace is None else min(self.first + 1, FEWEST_CHOSEN)
        whole = asked.num_chains * self.sampler.evaluations(self.first, visits)
        early = Early(asked.density, asked.key, self.first, whole, AGREEMENT)

        def judge(run: Run) -> None:
            few = _few_ancestors(run) if give_up and int(run.visits.made) else None
            if few is not None:
                if self.saves is not None:
                    self.saves.finish(run, 0, self.seconds)
                raise few

        def after(run: Run) -> None:
            judge(run)
            early(run)

        judge(self.run)
        self.run = descend(self.ready, self.run, self.first, asked.progress, self._save, after, trail=self.trail)
        if int(self.run.visits.made) and self.sampler.integrates_score:
            self.turning = self._curl(int(self.run.visits.visited()[-1]))

    def stay(self) -> None:
        """Let the chains settle at level 0, if the sampler says so. Ctrl-C leaves them as they came down: a run that
        goes on from its checkpoint begins the stay again."""
        if self.sampler.stay and self.arrived and int(self.run.stayed) == 0 and not self.interrupted:
            try:
                self.run = stay(self.run, self.ready[1], self.asked.progress)
            except KeyboardInterrupt:
                self.interrupted = True

    def global_moves(self) -> None:
        """Propose places from anywhere to the chains, if the sampler says so. Ctrl-C leaves them as they came down."""
        count, made = int(self.sampler.global_moves), math.isfinite(float(self.run.global_acceptance))
        if count and self.arrived and not made and not self.interrupted:
            try:
                self.run = global_moves(self.run, self.ready[1], count, self.asked.progress)
            except KeyboardInterrupt:
                self.interrupted = True

    def draw(self) -> None:
        """Take the draws, write the last checkpoint, and estimate what the levels' distance does to the evidence."""
        if self.asked.draws is not None and self.arrived and not self.interrupted:
            assert self.kept is not None
            sampler, density = self.ready
            self.run, self.done, self.lost = stream(
                sampler, self.run, density, self.kept, self.done, self.asked.thin, self.asked.progress, self._save
            )
        self.unsaved: str | None = None
        if self.saves is not None and self.lost is None:  # else the last checkpoint is the one whose draws are there
            self.unsaved = self.saves.finish(self.run, self.done, self.seconds)
        checked = self.sampler.check_order is not None and self.sampler.estimates_evidence(self.asked.density)
        if checked and self.arrived and not self.interrupted:
            self.coarse = self._coarse()

    def result(self, reason: str) -> Result:
        """All of it, with what is to be said of it; ``reason`` says why it was this sampler."""
        asked, shown = self.asked, min(self.done, self.asked.draws or 0)  # of a run that went further before
        samples, failed = self._samples(shown)
        if asked.store is None:
            samples = {name: np.asarray(values) for name, values in samples.items()}
        drawn = self.done * asked.thin
        apart = self._apart() if self.arrived else ()
        ended = Ended(self.run, samples, self.first, drawn, self.coarse, apart, self.turning)
        result = summed_up(self.sampler, asked.density, ended, reason, self.seconds)
        status = result.status.unstayed() if self.interrupted else result.status
        if asked.draws is not None:
            short = self.arrived and self.done < asked.draws and not self.interrupted
            status = status.stopped(self.done, asked.draws) if short else status
            result = dataclasses.replace(result, draws=max(shown, 1), thin=asked.thin)
        if self.saves is not None and self.lost is None:
            status = status.saved(self.unsaved)
        path = None if self.trail is None else self.trail.descent(np.asarray(asked.density.schedule.log_snr))
        result = dataclasses.replace(result, status=status, key=as_code(asked.key), versions=versions(), path=path)
        lost = self.lost or failed
        if self.kept is not None and asked.store is not None and lost is None:
            lost = self.kept.finish(*result.parts())
        return result if lost is None else dataclasses.replace(result, status=result.status.not_stored(lost))

    def _resumed(self, run: Run, folder: str | Path) -> Run:
        """Open the checkpoints and go on from what is there; traces one level more, and compiles nothing."""
        asked = self.asked
        blank = blank_like(eqx.filter_eval_shape(start, self.sampler, run, asked.density, self.first))
        apart = None if asked.draws is None else asked.thin
        known = fingerprint(asked.density, self.sampler, asked.key, self.first, apart, blank)
        self.saves = Saves(folder, asked.resume, known, blank)
        if (saved := self.saves.run()) is not None:
            run, self.done, earlier = saved
            self.began -= earlier
        return run

    def _kept(self, folder: str | Path | None) -> Kept | None:
        """Where samples go, if it is not only the chains' last positions in memory."""
        asked = self.asked
        if asked.draws is None and asked.store is None:
            return None
        # Draws that a checkpoint goes on from are on disk too.
        path = Path(folder) / DRAWS if asked.store is None and folder is not None else asked.store
        names = sample_shapes(self.sampler, self.run, asked.density, self.first)
        run_id = "" if self.saves is None else self.saves.run_id
        return Kept(names, asked.draws, path, asked.spread, run_id, self.done)

    def _save(self, run: Run, drawn: int = 0) -> None:
        if self.saves is not None:
            flush = None if self.kept is None or not drawn else self.kept.flush
            self.saves.offer(run, drawn, self.seconds, flush)

    def _coarse(self) -> float | None:
        """The log-evidence over every other level; None where it was interrupted."""
        asked = self.asked
        key = jax.random.fold_in(asked.key, COARSE)
        blank = placed(begin(key, asked.num_chains, self.run.visits.coarser()), asked.spread)
        run = descend(self.ready, blank, self.first, asked.progress, name="error of the evidence")
        return float(np.asarray(run.log_evidence)) if bool(host(run.visits).arrived) else None

    def _samples(self, done: int) -> tuple[dict[str, np.ndarray], str | None]:
        """Every site's samples, and what went wrong with keeping them on disk."""
        kept = self.kept
        if kept is not None and kept.draws is not None and done:
            return kept.samples(done), None
        sampler, density = self.ready
        spread = self.run.spread
        values = read(spread, density, sampler.positions(self.run))
        if kept is None:
            return spread.cut(host(values)), None
        if kept.draws is not None:  # none was drawn yet: where the chains are
            return {name: value[:, None] for name, value in spread.cut(host(values)).items()}, None
        try:
            kept.last(values)
        except NotKept as error:
            return spread.cut(host(values)), str(error)
        return kept.samples(1), None

    def _apart(self) -> tuple[Finding, ...]:
        """Whether factors agree where the chains are: asked of some, over the chains, for a small share of what the run
        has taken; not where they ended at what is no number."""
        density, n = self.asked.density, self.asked.num_chains
        if not in_question(density):
            return ()
        most = AGREEMENT * n * self.sampler.evaluations(self.first, int(self.run.visits.made))
        levels = int(np.clip(most // min(n, LOOKED_AT), 2, LEVELS))
        some = np.unique(np.linspace(0, n - 1, int(np.clip(most // levels, 1, LOOKED_AT))).astype(int))
        positions = jax.tree.map(lambda leaf: leaf[some], host(self.sampler.positions(self.run)))
        if not all(np.isfinite(x).all() for x in positions.values()):
            return ()
        return agreement(density, positions, jax.random.fold_in(self.asked.key, APART), levels)

    def _curl(self, level: int) -> dict[str, float]:
        """The curl of what a line integral relied on; NaN where a network cannot be differentiated, which no run is
        lost for."""
        density = self.asked.density
        some = min(LOOKED_AT, self.asked.num_chains)
        positions = host(jax.tree.map(lambda leaf: leaf[:some], self.sampler.positions(self.run)))
        try:
            return curl(density, positions, level, jax.random.fold_in(self.asked.key, CURL))
        except (TypeError, ValueError, NotImplementedError):  # what JAX raises for custom rules and callbacks
            return {name: np.nan for name, _, offered in density.described.offers if "conservative" not in offered}


def _check_pace(pace: Pace | None, sampler: Sampler, density: AnnealedDensity) -> None:
    if pace is not None and not sampler.paces:
        raise CapabilityError(
            f"levels='adaptive' goes by the variance of weights, and {type(sampler).__name__} has no weights.",
            where=density.described.where,
            fix="pass sampler=cp.SMC(), or 256 chains or more, or an array of log-SNR as levels.",
        )


def _few_ancestors(run: Run) -> FewAncestors | None:
    """Whether too few of the first chains have descendants where the run is."""
    level = int(run.visits.visited()[-1])
    n, variance = len(run.ancestors), float(run.evidence_variance)
    effective = 1.0 / (variance * (n - 1) / n + 1 / n)
    if effective >= fewest_families(n):
        return None
    return FewAncestors(int(np.asarray(run.records.ancestors)[level]), effective, level)
