"""What is said of a run that has ended: its diagnostics, read once, become the `Result` and its status."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from composeprob.density.annealed import AnnealedDensity
from composeprob.density.overlap import Finding
from composeprob.results.estimates import Families
from composeprob.results.result import Result
from composeprob.results.status import Code, diagnose, diverged, few_ancestors, few_levels, unsettled
from composeprob.runtime.stay import LEAPFROGS
from composeprob.samplers.base import Run, Sampler
from composeprob.samplers.spread import host


class Ended(NamedTuple):
    """What a run came to.

    Attributes:
        run: as it ended.
        samples: every site's samples, ``{name: (N, …)}``.
        first: the level where it started.
        completed: visits made.
        drawn: transitions between draws.
        coarse: log-evidence over every other level, None without it.
        apart: what is wrong with how the factors agree at the samples.
        curl: relative curl of each factor whose score a line integral relied on.
    """

    run: Run
    samples: dict[str, Any]
    first: int
    completed: int
    drawn: int
    coarse: float | None
    apart: tuple[Finding, ...]
    curl: dict[str, float]


def summed_up(sampler: Sampler, density: AnnealedDensity, ended: Ended, reason: str, seconds: float) -> Result:
    """The result of a run."""
    run, first, completed = ended.run.whole, ended.first, ended.completed
    records, num_chains = run.records, run.log_weights.shape[0]
    skipped, arrived = density.num_levels - 1 - first, completed == first + 1
    moves = sampler.moves
    per_transition = (moves.kernel.evaluations_per_step, len(moves.follows)) if moves else (0, 0)
    drawn = ended.drawn + (moves.settling if moves and ended.drawn else 0)
    proposals = np.full(density.num_levels, max(sampler.proposals(), 1) * num_chains)
    proposals[0] += drawn * per_transition[1] * num_chains
    log_weights, ancestors = host(run.log_weights), np.asarray(run.ancestors)

    def by_block(values: Any) -> np.ndarray:
        """(K, B), or (K,) of a kernel that moves all sites together."""
        return np.asarray(values) if sampler.blocks else np.asarray(values)[:, 0]

    found = diagnose(
        np.asarray(records.acceptance),
        np.asarray(records.non_finite),
        proposals,
        np.asarray(records.ess),
        num_chains,
        completed + skipped,
        density.num_levels,
        sampler.adjusted,
        ended.curl,
        sampler.blocks,
        _outside(run) if arrived else 0.0,
    )
    families = Families.of(np.exp(log_weights - log_weights.max()), ancestors)
    # Before level 0 the evidence is that of a noisier density.
    evidence = float(np.asarray(run.log_evidence)) if arrived and sampler.estimates_evidence(density) else math.nan
    of_levels = 0.0
    if sampler.check_order is not None and math.isfinite(evidence):
        of_levels = math.nan if ended.coarse is None else abs(ended.coarse - evidence) / (2**sampler.check_order - 1)
    status = found.with_findings(
        *_doubts(run, sampler, density),
        *((Code(finding.code), finding.message) for finding in ended.apart),
        *few_ancestors(families.effective, len(np.unique(ancestors)), num_chains, arrived),
        *unsettled(float(run.drift)),
        *few_levels(of_levels),
    )
    of_top = density.top.signal(float(np.asarray(density.schedule.log_snr)[first]))
    error = math.hypot(math.sqrt(float(run.evidence_variance)), of_levels, of_top)
    return Result(
        samples=ended.samples,
        log_weights=log_weights,
        log_evidence=evidence if math.isfinite(evidence) else None,
        log_evidence_error=None if not math.isfinite(evidence) else math.nan if status.withholds else error,
        evaluations=sampler.evaluations(first, completed) + drawn * per_transition[0] + int(run.stayed) * LEAPFROGS,
        acceptance=by_block(records.acceptance),
        step_size=by_block(records.step_size),
        ess=np.asarray(records.ess),
        ancestors=np.asarray(records.ancestors),
        first_ancestors=ancestors,
        non_finite=np.asarray(records.non_finite),
        quadrature_error=by_block(records.quadrature_error),
        curl=ended.curl,
        status=status,
        seconds=seconds,
        sampler=sampler.describe(),
        reason=reason,
        log_snr=np.asarray(density.schedule.log_snr),
        dims=dict(density.graph.dims),
        blocks=sampler.blocks,
        devices=ended.run.spread.devices,
        density=density,
    )


def _doubts(run: Run, sampler: Sampler, density: AnnealedDensity) -> list[tuple[Code, str]]:
    """What is wrong with where chains ended, and what the compiler found strange."""
    positions = host(sampler.positions(run))
    noised = {name: x for name, x in positions.items() if density.sites[name].kind == "noised"}
    top = density.schedule.at(density.num_levels - 1)
    doubts = [(Code.NETWORK_DOUBTED, doubt) for doubt in density.graph.doubts]
    far = diverged(noised, float(top.alpha), float(top.sigma)) if density.num_levels > 1 else []
    return [*far, *doubts]


def _outside(run: Run) -> float:
    """The share of chains that are where the density is 0, as far as their last evaluation has its value."""
    evaluation = getattr(run.chains, "evaluation", None)
    if evaluation is None or evaluation.log_density is None:
        return 0.0
    return float(np.mean(np.isneginf(host(evaluation.log_density))))
