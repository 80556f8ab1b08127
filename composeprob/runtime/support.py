"""What the shares of modes rest on: weights, the paths of chains, or moves between modes; else the status says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import jax
import numpy as np

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.barriers import barrier_depth, log_densities
from composeprob.density.evaluation import Position
from composeprob.results.estimates import Families
from composeprob.results.shares import (
    Reason,
    clipped,
    distant,
    frozen_shares,
    parted,
    share_apart,
    uneven_paths,
    where,
)
from composeprob.results.status import Code
from composeprob.samplers.layout import Layout

if TYPE_CHECKING:
    from composeprob.runtime.stages import State

Findings = list[tuple[Code, str]]


@dataclass(frozen=True, eq=False)
class Support:
    """What is known of the modes' shares."""

    log_weights: np.ndarray  # of the chains, (N,): those of the run, or of its paths where these mend the shares
    findings: Findings = field(default_factory=list)  # what is wrong with them
    later: Callable[[], Findings] = list  # more of these, which take a compilation
    note: str = ""  # what is added to the reason of the run


def supported(
    state: State, positions: Position, log_weights: np.ndarray, paths: np.ndarray, log_density: np.ndarray | None
) -> Support:
    """What the shares of a run that ended at level 0 rest on: of its chains, on the host, with the run's weights, those
    of the ways that they came, and log π₀ where they ended, (N,), None where it is not known."""
    run, sampler, density = state.run, state.sampler, state.density
    number, comparable = len(log_weights), {"energy", "mode_depth"} <= density.capabilities
    if log_density is not None and log_density.shape != paths.shape:  # replicas, which swap
        return Support(log_weights)
    if np.isfinite(np.asarray(run.records.ess)).any():
        if not comparable or log_density is None or np.ptp(log_weights):
            return Support(log_weights)
        families = Families.from_ancestors(np.ones(number), np.asarray(run.ancestors))
        return Support(log_weights, frozen_shares(positions, log_density, families), list)
    note, worth = "", effective(paths)
    unknown = not sampler.needs_parts(density) and density.num_levels > 1
    if state.given_up:
        note = (
            f"; what modes that are far apart hold rests on the weights of their paths, worth {worth:.3g} of "
            f"{number} chains"
        )
    why = Reason.STARTED if density.num_levels == 1 else Reason.FROZEN
    why = Reason.SUMMED if sampler.kernel is None else why
    uneven = uneven_paths(positions, paths, log_density, why) if paths.any() else []
    stayed = sampler.kernel is not None and not state.writer.drawn and np.isnan(float(run.global_acceptance))
    cause = f"the weights of their paths are worth {worth:.2g} of {number} chains"
    if unknown:
        cause = "chains do not weigh one another, and what their paths weigh is not known"
    if state.given_up:
        cause = f"SMC was given up, and {cause}"
    apart, exact = _later(state, positions, cause, why), "exact_marginals" in density.capabilities
    fewest = max(tuning.SHARES.support * number, min(tuning.ERRORS.fewest_families, number / 8))
    if stayed and worth >= fewest:
        # Shares are off by √(N/worth − 1) of their standard deviation at most: too little for few chains to show it.
        hidden = comparable and not exact and worth < tuning.SHARES.even * number
        if uneven or (hidden and apart()):
            note = f"; the weights of their paths, worth {worth:.0f} of {number} chains, mend the shares of modes"
            return Support(np.where(np.isfinite(paths), paths, -np.inf) - np.nanmax(paths), [], list, note)
    if not uneven and comparable and log_density is not None:
        uneven = frozen_shares(positions, log_density)
    rests = not unknown and (worth >= tuning.SHARES.support * number or alike(paths))
    if uneven or rests or exact:
        return Support(log_weights, uneven, list, note)
    # Where another run can follow it is asked at once.
    return Support(log_weights, apart(), list, note) if comparable else Support(log_weights, [], apart, note)


def effective(log_weights: np.ndarray) -> float:
    """How many independent chains weights are worth; those that are no numbers count as 0."""
    finite = log_weights[np.isfinite(log_weights)]
    return Families.from_log_weights(finite).effective if finite.size else 0.0


def alike(log_weights: np.ndarray) -> bool:
    """Whether weights differ so little that what they say is known, although chance may leave few of them.

    Of log-normal weights whose logarithms have a standard deviation s a share e^(−s²) counts. Few chains tell s far
    better than the effective sample size.
    """
    finite = log_weights[np.isfinite(log_weights)]
    return len(finite) > 0.95 * len(log_weights) and float(clipped(finite).std()) <= tuning.SHARES.alike


def _later(state: State, positions: Position, cause: str, why: str) -> Callable[[], Findings]:
    """What is asked of chains whose shares no weights support: whether they are apart."""
    density, number = state.density, state.num_chains
    moved = bool(state.sampler.then) or state.writer.drawn > 0
    if moved and state.came is None:
        return list
    some = np.unique(np.linspace(0, number - 1, tuning.CHECKS.most_chains).astype(int))
    came = None
    if moved:
        at = Layout.of_density(density).position(np.asarray(state.came)[some], float(density.schedule.alpha[0]))
        came = jax.tree.map(np.asarray, at)
    ended = jax.tree.map(lambda x: np.asarray(x)[some], positions)
    return partial(_apart, density, ended, came, cause, why)


def _apart(density: AnnealedDensity, ended: Position, came: Position | None, cause: str, why: str) -> Findings:
    """The finding that chains are in groups between which they did not cross, if they are: from where they came down to
    level 0, None of chains that have not moved since, to where they ended, {site: (m, …)} of some chains. It says why
    nothing supports their shares, the ``cause``, and ``why`` this is so."""
    if "energy" in density.capabilities:
        value = partial(log_densities, density)
        groups = parted(ended, value)
        if groups is None:
            return []
        crossed = 0.0 if came is None else share_apart(barrier_depth(value, came, ended))
        if crossed >= tuning.SHARES.crossing * groups.apart:
            return []
    else:
        groups = distant(ended)
        if groups is None:
            return []
    text = f"The chains lie in {groups}: {where(ended, groups.index)}. Their shares rest on nothing: {cause}. {why}"
    return [(Code.SHARES_FROZEN, text)]
