"""What is said of a run that has ended: its diagnostics, read once, become the `Result` and its status."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jax import Array

from composeprob.density.annealed import AnnealedDensity
from composeprob.density.overlap import Finding
from composeprob.results.estimates import Families, island_variance
from composeprob.results.result import Result
from composeprob.results.shares import FROZEN, STARTED, SUMMED, frozen_shares, uneven_paths
from composeprob.results.status import Code, diagnose, diverged, erratic_weights, few_ancestors, few_levels, unsettled
from composeprob.runtime.stay import LEAPFROGS
from composeprob.samplers.base import Run, Sampler
from composeprob.samplers.spread import host

ENOUGH = 8
"""Islands from which on the variance of the evidence is what theirs shows."""


class Ended(NamedTuple):
    """What a run came to.

    Attributes:
        run: as it ended.
        samples: every site's samples, ``{name: (N, …)}``.
        first: the level where it started.
        drawn: transitions between draws.
        coarse: log-evidence over every other level, None without it.
        apart: what is wrong with how the factors agree at the samples.
        curl: relative curl of each factor whose score a line integral relied on.
    """

    run: Run
    samples: dict[str, np.ndarray]
    first: int
    drawn: int
    coarse: float | None
    apart: tuple[Finding, ...]
    curl: dict[str, float]


def summed_up(sampler: Sampler, density: AnnealedDensity, ended: Ended, reason: str, seconds: float) -> Result:
    """The result of a run."""
    run, first = ended.run.whole, ended.first
    records, num_chains = run.records, run.log_weights.shape[0]
    visits, log_snr = host(run.visits), np.asarray(density.schedule.log_snr)
    visited, arrived = visits.visited(), bool(visits.arrived)
    told = _told(visited, arrived, density)
    *per_transition, settling = sampler.drawing
    drawn = ended.drawn + (settling if ended.drawn else 0)
    proposals = np.full(len(told), max(sampler.proposals(), 1) * num_chains)
    proposals[0] += drawn * per_transition[1] * num_chains
    log_weights, ancestors = host(run.log_weights), np.asarray(run.ancestors)

    def by_block(values: Array) -> np.ndarray:
        """(levels, B), or (levels,) of a kernel that moves all sites together."""
        return np.asarray(values)[told] if sampler.blocks else np.asarray(values)[told, 0]

    found = diagnose(
        np.asarray(records.acceptance)[told],
        np.asarray(records.non_finite)[told],
        proposals,
        np.asarray(records.ess)[told],
        num_chains,
        len(told) if arrived else density.num_levels - int(min(visited, default=density.num_levels)),
        len(told),
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
        *([] if found.has(Code.WEIGHTS_COLLAPSED) else erratic_weights(np.asarray(records.weight_variance)[told])),
        *few_ancestors(families.effective, len(np.unique(ancestors)), num_chains, arrived),
        *(_frozen(run, sampler, density) if arrived else ()),
        *unsettled(float(run.drift)),
        *few_levels(of_levels),
    )
    shared = float(run.global_acceptance)
    evaluations = sampler.evaluations(first, len(visited)) + int(run.stayed) * LEAPFROGS
    evaluations += int(sampler.global_moves) if math.isfinite(shared) else 0
    apart = np.asarray(run.islands, np.float64)
    variance = float(run.evidence_variance) if len(apart) < ENOUGH else island_variance(apart)
    of_top = density.top.signal(float(log_snr[first]))
    error = math.hypot(math.sqrt(variance), of_levels, of_top)
    return Result(
        samples=ended.samples,
        log_weights=log_weights,
        log_evidence=evidence if math.isfinite(evidence) else None,
        log_evidence_error=None if not math.isfinite(evidence) else math.nan if status.withholds else error,
        evaluations=evaluations + drawn * per_transition[0],
        acceptance=by_block(records.acceptance),
        step_size=by_block(records.step_size),
        ess=np.asarray(records.ess)[told],
        ancestors=np.asarray(records.ancestors)[told],
        first_ancestors=ancestors,
        islands=_islands(apart + evidence, ancestors) if arrived and len(apart) > 1 else None,
        global_acceptance=shared if math.isfinite(shared) else None,
        swaps=np.asarray(records.swaps)[told],
        round_trips=sampler.round_trips(run) if arrived else None,
        non_finite=np.asarray(records.non_finite)[told],
        quadrature_error=by_block(records.quadrature_error),
        curl=ended.curl,
        status=status,
        seconds=seconds,
        sampler=sampler.describe(),
        reason=reason,
        log_snr=log_snr[told],
        dims=dict(density.graph.dims),
        blocks=sampler.blocks,
        devices=ended.run.spread.devices,
        density=density,
    )


def _islands(log_evidence: np.ndarray, ancestors: np.ndarray) -> np.ndarray:
    """What a result tells of each island, (I, 2)."""
    left, size = np.unique(ancestors), len(ancestors) // len(log_evidence)
    return np.stack([log_evidence, np.bincount(left // size, minlength=len(log_evidence))], axis=1)


def _told(visited: np.ndarray, arrived: bool, density: AnnealedDensity) -> np.ndarray:
    """The levels that a result tells of: all, or, of a run that chose its own and arrived, those that it visited."""
    every = np.arange(density.num_levels)
    chose = arrived and len(visited) <= int(visited[0])
    return visited[::-1] if chose else every


def _doubts(run: Run, sampler: Sampler, density: AnnealedDensity) -> list[tuple[Code, str]]:
    """What is wrong with where chains ended, and what the compiler found strange."""
    positions = host(sampler.positions(run))
    noised = {name: x for name, x in positions.items() if density.sites[name].kind == "noised"}
    alpha, sigma = (float(np.asarray(each)[-1]) for each in (density.schedule.alpha, density.schedule.sigma))
    doubts = [(Code.NETWORK_DOUBTED, doubt) for doubt in density.graph.doubts]
    far = diverged(noised, alpha, sigma) if density.num_levels > 1 else []
    return [*far, *doubts]


def _frozen(run: Run, sampler: Sampler, density: AnnealedDensity) -> list[tuple[Code, str]]:
    """What is wrong with the modes' shares, of chains that do not weigh one another: by the ways that they came, and
    where log-densities can be compared between modes, by these."""
    evaluation, paths = getattr(run.chains, "evaluation", None), host(run.path_weights)
    if np.isfinite(np.asarray(run.records.ess)).any():
        return []
    why = SUMMED if sampler.kernel is None else STARTED if density.num_levels == 1 else FROZEN
    uneven = uneven_paths(host(sampler.positions(run)), paths, why) if paths.any() else []
    if uneven or not {"energy", "mode_depth"} <= density.capabilities:
        return uneven
    if evaluation is None or np.shape(evaluation.log_density) != np.shape(paths):  # replicas have several
        return []
    return frozen_shares(host(sampler.positions(run)), np.asarray(host(evaluation.log_density)))


def _outside(run: Run) -> float:
    """The share of chains that are where the density is 0 or NaN, as far as their last evaluation has its value."""
    evaluation = getattr(run.chains, "evaluation", None)
    if evaluation is None or evaluation.log_density is None:
        return 0.0
    value = host(evaluation.log_density)
    return float(np.mean(np.isneginf(value) | np.isnan(value)))
