"""What is known of a run that has ended: its diagnostics, read once, become the `Result` and its status."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from enum import IntEnum
from functools import partial
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax import Array

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.curl import curl
from composeprob.density.evaluation import Position
from composeprob.density.overlap import Finding, agreement, in_question
from composeprob.results.estimates import Families
from composeprob.results.later import later
from composeprob.results.origin import as_code, versions
from composeprob.results.result import Result
from composeprob.results.shares import Reason, frozen_shares, uneven_paths
from composeprob.results.status import (
    Code,
    Status,
    diagnose,
    diverged,
    erratic_weights,
    few_ancestors,
    few_levels,
    not_conservative,
    not_converged,
)
from composeprob.samplers.run import Run
from composeprob.samplers.sampler import Sampler
from composeprob.samplers.spread import host
from composeprob.settings import usual

if TYPE_CHECKING:
    from composeprob.runtime.stages import State


class Fold(IntEnum):
    """Numbers that are folded into a run's key."""

    CURL = 2**31 - 2
    """For the directions along which curl is measured."""
    OVERLAP = 2**31 - 7
    """For the noise that samples get where factors are asked whether they agree."""
    PILOT = 2**31 - 8
    """For the chains of a pilot run."""


def summarised(state: State, samples: dict[str, np.ndarray], positions: Position, coarse: float | None) -> Result:
    """The result of a run.

    What takes a compilation of its own (curl, whether the factors agree) is left to who asks for it, and so is what
    depends on that.

    Args:
        state: as the run ended.
        samples: every site's, ``{name: (N, …)}``.
        positions: of the chains, on the host, copies included.
        coarse: log-evidence over every other level, None without it.
    """
    request, sampler, density, run = state.request, state.sampler, state.request.density, state.run
    records, visits, log_snr = host(run.records), state.visits, np.asarray(density.schedule.log_snr)
    visited, arrived, num_chains = visits.visited(), bool(visits.arrived), request.num_chains
    # Of a run that chose its levels and arrived, those that it visited are reported; else all.
    chose = arrived and len(visited) <= int(visited[0])
    levels = visited[::-1] if chose else np.arange(density.num_levels)
    records = jax.tree.map(lambda values: values[levels], records)
    positions, log_weights = run.spread.cut((positions, host(run.log_weights)))
    ancestors, settling = np.asarray(run.ancestors), sampler.drawing[2]
    transitions = state.drawn * int(request.draws.thin)
    transitions += settling if transitions else 0
    # Before level 0 the evidence is that of a noisier density.
    evidence = float(np.asarray(run.log_evidence)) if arrived and sampler.estimates_evidence(density) else math.nan
    of_levels = 0.0
    if sampler.check_order is not None and math.isfinite(evidence):
        of_levels = math.nan if coarse is None else abs(coarse - evidence) / (2**sampler.check_order - 1)
    of_top = density.top.signal(float(log_snr[state.first]))
    error = math.hypot(math.sqrt(float(run.evidence_variance)), of_levels, of_top)
    proposals = np.full(len(levels), max(sampler.proposals(), 1) * num_chains)
    proposals[0] += transitions * sampler.drawing[1] * num_chains
    found = diagnose(
        records.acceptance,
        records.non_finite,
        proposals,
        records.ess,
        num_chains,
        len(levels) if arrived else density.num_levels - int(min(visited, default=density.num_levels)),
        len(levels),
        sampler.adjusted,
        sampler.blocks,
        _outside(run, sampler) if arrived else 0.0,
    )
    families = Families.from_ancestors(np.exp(log_weights - log_weights.max()), ancestors)
    found = found.with_findings(
        *_diverged(positions, density),
        *((Code.NETWORK_DOUBTED, doubt) for doubt in density.graph.doubts),
        *([] if found.has(Code.WEIGHTS_COLLAPSED) else erratic_weights(records.weight_variance)),
        *few_ancestors(families.effective, len(np.unique(ancestors)), num_chains, arrived),
        *(_frozen(run, positions, sampler, density) if arrived else ()),
        *not_converged(float(run.drift)),
        *few_levels(of_levels),
    )
    shared = float(run.global_acceptance)
    evaluations = sampler.evaluations(state.first, len(visited))
    evaluations += sum(closing.evaluations(run) for closing in sampler.then)
    if not sampler.blocks:  # a kernel that moves all sites together has no axis of blocks
        shape = {name: getattr(records, name)[:, 0] for name in ("acceptance", "step_size", "quadrature_error")}
        records = dataclasses.replace(records, **shape)
    overlap, relied_on = _overlap_later(state, positions), dict[str, float]()
    if len(visited) and sampler.integrates_score:
        some = jax.tree.map(lambda leaf: leaf[: tuning.CHECKS.most_chains].copy(), positions)
        relied_on = later(partial(_curl, positions=some, level=int(visited[-1]), key=request.key))
    return Result(
        samples=samples,
        log_weights=log_weights,
        log_evidence=evidence if math.isfinite(evidence) else None,
        evaluations=evaluations + transitions * sampler.drawing[0],
        acceptance=records.acceptance,
        step_size=records.step_size,
        ess=records.ess,
        ancestors=records.ancestors,
        first_ancestors=ancestors,
        global_acceptance=shared if math.isfinite(shared) else None,
        swaps=records.swaps,
        round_trips=sampler.round_trips(run.without_copies) if arrived else None,
        non_finite=records.non_finite,
        quadrature_error=records.quadrature_error,
        seconds=state.seconds,
        sampler=sampler.describe(),
        reason=state.reason,
        log_snr=log_snr[levels],
        dims=dict(density.graph.dims),
        blocks=sampler.blocks,
        draws=None if request.draws.number is None else max(min(state.drawn, request.draws.number), 1),
        thin=int(request.draws.thin),
        devices=run.spread.devices,
        key=as_code(request.key),
        versions=versions(),
        density=density,
        status=later(partial(_with_answers, found=_ended(found, state, arrived), overlap=overlap)),
        log_evidence_error=later(partial(_unless_withheld, error=error)) if math.isfinite(evidence) else None,
        curl=relied_on,
    )


def _unless_withheld(result: Result, error: float) -> float:
    return math.nan if result.status.withholds else error


def _with_answers(result: Result, found: Status, overlap: Callable[[], tuple[Finding, ...]]) -> Status:
    """What the run's numbers show, with what only its factors can say."""
    answers = ((Code(finding.code), finding.message) for finding in overlap())
    return found.with_findings(*not_conservative(result.curl), *answers)


def _overlap_later(state: State, positions: Position) -> Callable[[], tuple[Finding, ...]]:
    """Asks whether factors agree where the chains are: of some, over the chains, for a small share of what the run has
    taken; not where they ended at what is no number."""
    density, n, visits = state.request.density, state.request.num_chains, state.visits
    if not visits.arrived or not in_question(density):
        return tuple
    most = tuning.CHECKS.share * n * state.sampler.evaluations(state.first, int(visits.made))
    levels = int(np.clip(most // min(n, tuning.CHECKS.most_chains), 2, tuning.OVERLAP_LEVELS))
    some = np.unique(np.linspace(0, n - 1, int(np.clip(most // levels, 1, tuning.CHECKS.most_chains))).astype(int))
    positions = jax.tree.map(lambda leaf: leaf[some], positions)
    if not all(np.isfinite(x).all() for x in positions.values()):
        return tuple
    return partial(_agreement, density, positions, state.request.key, levels)


def _agreement(density: AnnealedDensity, positions: Position, key: Array, levels: int) -> tuple[Finding, ...]:
    with usual():
        return agreement(density, positions, jax.random.fold_in(key, np.uint32(Fold.OVERLAP)), levels)


def _curl(result: Result, positions: Position, level: int, key: Array) -> dict[str, float]:
    """Of each factor whose score a line integral relied on; NaN where a network cannot be differentiated, which no run
    is lost for."""
    density = result.density
    assert density is not None
    try:
        with usual():
            return curl(density, positions, level, jax.random.fold_in(key, np.uint32(Fold.CURL)))
    except (TypeError, ValueError, NotImplementedError):  # what JAX raises for custom rules and callbacks
        return {name: np.nan for name, _, offered in density.described.offers if "conservative" not in offered}


def _ended(found: Status, state: State, arrived: bool) -> Status:
    """What was found, with how the run ended."""
    sampler, number = state.sampler, state.request.draws.number
    if arrived and state.interrupted in ("descend", "finish") and sampler.then:
        found = found.stopped_at_target()
    elif arrived and number is not None and state.drawn < number:
        found = found.stopped(state.drawn, number)
    if state.checkpoints is not None and state.checkpoints.ended:
        found = found.saved(state.checkpoints.failed)
    return found


def _diverged(positions: Position, density: AnnealedDensity) -> list[tuple[Code, str]]:
    """What is wrong with where chains ended."""
    noised = {name: x for name, x in positions.items() if density.sites[name].kind == "noised"}
    alpha, sigma = (float(np.asarray(each)[-1]) for each in (density.schedule.alpha, density.schedule.sigma))
    return diverged(noised, alpha, sigma) if density.num_levels > 1 else []


def _frozen(run: Run, positions: Position, sampler: Sampler, density: AnnealedDensity) -> list[tuple[Code, str]]:
    """What is wrong with the modes' shares, of chains that do not weigh one another: by the ways that they came, and
    where log-densities can be compared between modes, by these."""
    if np.isfinite(np.asarray(run.records.ess)).any():
        return []
    paths, why = run.spread.cut(host(run.path_weights)), Reason.STARTED if density.num_levels == 1 else Reason.FROZEN
    uneven = uneven_paths(positions, paths, Reason.SUMMED if sampler.kernel is None else why) if paths.any() else []
    log_density = _log_density(run, sampler)
    if uneven or not {"energy", "mode_depth"} <= density.capabilities:
        return uneven
    if log_density is None or log_density.shape != paths.shape:  # replicas have several
        return []
    return frozen_shares(positions, log_density)


def _outside(run: Run, sampler: Sampler) -> float:
    """The share of chains that are where the density is 0 or NaN, as far as their last evaluation has its value."""
    value = _log_density(run, sampler)
    return 0.0 if value is None else float(np.mean(np.isneginf(value) | np.isnan(value)))


def _log_density(run: Run, sampler: Sampler) -> np.ndarray | None:
    """Of every chain where it ended, (N,); None where its last evaluation has none."""
    value = sampler.log_densities(run)
    return None if value is None else np.asarray(run.spread.cut(host(value)))
