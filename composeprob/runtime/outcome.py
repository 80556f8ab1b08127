"""From a run that has ended to its `Result`: its diagnostics, read once, what supports
its estimates, and its status."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from composeprob import tuning
from composeprob.arguments import as_code
from composeprob.density.categorical import CategoricalDensity
from composeprob.density.evaluation import Position
from composeprob.density.learned_scores import curl
from composeprob.kernels.gibbs import integrates_score
from composeprob.records import Records
from composeprob.results.chains import Chains
from composeprob.results.checks import ask_at_end, ask_later, could_meet
from composeprob.results.checks.own_scores import OwnScores
from composeprob.results.ended import EndedRun, Ending, Kernel, KeyUse
from composeprob.results.estimates import (
    Genealogy,
    effective_chains,
    effective_chains_bound,
)
from composeprob.results.geometry import chosen
from composeprob.results.record import About, by_level, later, versions
from composeprob.results.repetition import Repetition, repeated_weights
from composeprob.results.result import Result
from composeprob.results.shares import Proportions
from composeprob.results.support import Arrived, Support, supported
from composeprob.results.trust import (
    Trust,
    effective_share_of_steps,
    least_effective_ancestors,
    least_effective_share,
)
from composeprob.runtime.own_draws import compared_experts, own_levels, own_scores
from composeprob.samplers.finishers import GlobalMoves
from composeprob.samplers.layout import Layout
from composeprob.samplers.run import Run
from composeprob.samplers.spread import host

if TYPE_CHECKING:
    from composeprob.runtime.stages import State


@dataclass(frozen=True, eq=False)
class Ended:
    """A run that has ended, read off the devices; all arrays are without copies of
    chains."""

    state: State
    run: Run  # on the host, without its chains
    chains: Chains
    visited: Int[np.ndarray, " visits"]  # levels, from the noisiest
    levels: Int[np.ndarray, " levels"]  # that are reported, from level 0 on
    records: Records  # of these levels

    @classmethod
    def of_state(cls, state: State, positions: Position) -> Ended:
        """Read a run whose chains, copies included, are at ``positions``."""
        sampler = state.sampler
        run = host(dataclasses.replace(state.run, chains=None))
        with_copies = {
            "positions": positions,
            "log_density": host(sampler.log_densities(state.run)),
            "scores": _scores_by_site(state),
            "log_weights": run.log_weights,
            "path_weights": run.path_weights,
        }
        chains = Chains(
            **state.run.spread.cut(with_copies),
            arrival=_arrival(state),
            ancestors=np.asarray(run.ancestors),
        )
        visited = run.visits.visited()
        # Of a run that chose its levels and arrived, those that it visited are
        # reported; else all.
        levels = np.arange(state.density.num_levels)
        if bool(run.visits.arrived) and len(visited) <= int(visited[0]):
            levels = visited[::-1]
        return cls(
            state,
            run,
            chains,
            visited,
            levels,
            run.records.of_levels(levels, blocks=bool(sampler.blocks)),
        )

    @property
    def positions(self) -> Position:
        """Positions of the chains."""
        return self.chains.positions

    @property
    def arrived(self) -> bool:
        """True if the chains are at level 0."""
        return bool(self.run.visits.arrived)

    @property
    def completed(self) -> int:
        """Number of reported levels that the run has completed."""
        if self.arrived:
            return len(self.levels)
        num_levels = self.state.density.num_levels
        return num_levels - int(min(self.visited, default=num_levels))

    @functools.cached_property
    def round_trips(self) -> float | None:
        """Round trips of replicas; None without replicas, or above level 0."""
        state = self.state
        if not self.arrived:
            return None
        return state.sampler.round_trips(state.run.without_copies)

    @property
    def global_acceptance(self) -> float:
        """Mean acceptance of global moves, NaN without."""
        return float(self.run.global_acceptance)


def _is_moved(state: State) -> bool:
    """Return whether draws or finishers moved the chains at level 0."""
    return bool(state.sampler.finishers) or state.writer.drawn > 0


def _arrival(state: State) -> Position | None:
    """Positions on arrival at level 0, if the chains have moved since."""
    if not _is_moved(state) or state.arrival_points is None:
        return None
    alpha = float(np.asarray(state.density.schedule.alpha)[0])
    layout = Layout.of_density(state.density)
    points: Any = state.arrival_points  # arithmetic alone, which is NumPy's too
    return layout.position(points, alpha)


def _scores_by_site(state: State) -> Position | None:
    """∇log π₀ where chains are, ``{site: (N, …)}``; None where it is unknown."""
    on_host = host(state.sampler.scores(state.run))
    if on_host is None:
        return None
    # Indexing NumPy's arrays compiles nothing.
    scores: Any = np.asarray(on_host)
    # A gradient in y = x/α is α times that in x.
    alpha = float(np.asarray(state.density.schedule.alpha)[0])
    return Layout.of_density(state.density).position(scores, 1 / alpha)


def summarised(
    state: State,
    samples: dict[str, np.ndarray],
    positions: Position,
    repetition: Repetition | None,
) -> Result:
    """Return the result of a run.

    Checks that take a compilation of their own (curl, whether the factors agree), and
    all that depends on them, are left until the result is asked for its status.

    Args:
        state: of a run that has ended.
        samples: values of every site and deterministic.
        positions: of the chains, copies included.
        repetition: the run over every other level; None where none was made.
    """
    density = state.density
    sampler = state.sampler
    ended = Ended.of_state(state, positions)
    support = Support(ended.chains.log_weights, Proportions())
    if ended.arrived:
        support = supported(_arrived(ended))
    genealogy = Genealogy.from_log_weights(support.log_weights, ended.run.ancestors)
    # The repetition's chains were not moved after their arrival.
    places = ended.positions
    if sampler.finishers and ended.chains.arrival is not None:
        places = ended.chains.arrival
    genealogy = dataclasses.replace(
        genealogy, repeated=repeated_weights(places, repetition)
    )
    evidence = Evidence.of_run(ended, genealogy, repetition)
    trust = _trust(ended, support, genealogy, evidence)
    run = _as_asked(ended, support, genealogy, evidence, trust, samples)
    run = ask_at_end(run, state.checks)
    status = ask_later(run, state.checks)

    log_evidence: float | None = None
    log_evidence_error: float | None = None
    if math.isfinite(evidence.value):
        log_evidence = evidence.value
        error = evidence.error
        log_evidence_error = later(
            lambda result: math.nan if result.status.withholds else error
        )
    log_snr = np.asarray(density.schedule.log_snr)[ended.levels]
    records = vars(ended.records)  # not the run, which has all positions
    return Result(
        samples=samples,
        log_weights=support.log_weights,
        log_evidence=log_evidence,
        log_evidence_error=log_evidence_error,
        evaluations=_evaluations(ended),
        levels=later(lambda _: by_level(log_snr, sampler.blocks, records)),
        reason=state.attempt.why + evidence.correction + trust.corrections,
        about=_about(ended, run, repetition),
        status=later(lambda _: status()),
        trust=trust,
        _genealogy=genealogy,
        density=density,
    )


def _about(ended: Ended, run: EndedRun, repetition: Repetition | None) -> About:
    """The facts of a run; its curl is measured when asked for."""
    state = ended.state
    density = state.density
    draws = state.draws.number
    if draws is not None:
        draws = max(min(state.writer.drawn, draws), 1)
    accepted = ended.global_acceptance
    global_acceptance = accepted if math.isfinite(accepted) else None
    measured = run.curl  # not the run, which has all positions
    return About(
        sampler=state.sampler.describe(),
        seconds=state.seconds,
        draws=draws,
        thin=int(state.draws.thin),
        devices=state.run.spread.devices,
        blocks=state.sampler.blocks,
        dims=dict(density.graph.dims),
        round_trips=ended.round_trips,
        global_acceptance=global_acceptance,
        curl=later(lambda _: measured()),
        checks=_evaluations_of_checks(state, run, repetition),
        key=as_code(state.key),
        versions=dict(versions()),
    )


# ── costs, evidence and its error ─────────────────────────────────────────────────────
def _transitions_of_draws(ended: Ended) -> int:
    """Transitions at level 0 that draws took, with those that adapted step sizes."""
    state = ended.state
    if not state.writer.drawn:
        return 0
    _, _, settling = state.sampler.drawing
    return state.writer.drawn * int(state.draws.thin) + settling


def _evaluations(ended: Ended) -> int:
    """Evaluations of each chain: of runs before this one, levels, draws, finishers."""
    state = ended.state
    evaluations = state.spent + state.sampler.evaluations(len(ended.visited))
    if state.writer.drawn:
        evaluations_per_transition, _, _ = state.sampler.drawing
        evaluations += _transitions_of_draws(ended) * evaluations_per_transition
    return evaluations + int(ended.run.spent)


def _evaluations_of_checks(
    state: State, run: EndedRun, repetition: Repetition | None
) -> int:
    """Evaluations of each chain that tell errors and status: of the repetition, and of
    trained factors at their own samples."""
    evaluations = 0
    if repetition is not None:
        evaluations = repetition.evaluations
    for check in state.checks:
        if isinstance(check, OwnScores) and could_meet(check, run):
            evaluations += _own_evaluations(check, run)
    return evaluations


def _own_evaluations(check: OwnScores, run: EndedRun) -> int:
    """Evaluations of trained factors at their own samples, in those of each chain."""
    if not (check.asks(run) and compared_experts(run.density)):
        return 0
    n = len(check.chains(run))
    levels = own_levels(run.density, run.evaluations // n)
    return math.ceil(n * levels.evaluations / run.num_chains)


def _proposals(ended: Ended) -> Int[np.ndarray, " levels"]:
    """Proposals of all chains at each level."""
    state = ended.state
    n = state.num_chains
    proposals = np.full(len(ended.levels), max(state.sampler.proposals(), 1) * n)
    if state.writer.drawn:
        _, proposals_per_transition, _ = state.sampler.drawing
        proposals[0] += _transitions_of_draws(ended) * proposals_per_transition * n
    return proposals


def beyond_noise(difference: float, variance: float) -> float:
    """Return √(difference² − variance), what is left of a difference whose noise has
    this variance; 0 where nothing is."""
    return math.sqrt(max(difference**2 - variance, 0.0))


def discretisation_error(
    fine: tuple[float, float], coarse: tuple[float, float], order: int
) -> float:
    """Estimate the discretisation error of a log-evidence from that over every other
    level; each comes with its variance.

    An error of order p is 1/(2^p − 1) of the difference, but only where levels are
    close enough; farther apart it falls more slowly. Nothing tells the two cases apart,
    so the whole difference beyond noise counts.
    """
    difference = abs(coarse[0] - fine[0])
    noise = coarse[1] + fine[1]
    asymptotic = difference / (2**order - 1)
    return max(beyond_noise(difference, noise), asymptotic)


class Evidence(NamedTuple):
    """The log-evidence of a run and its errors."""

    value: float  # NaN where the run gives none
    discretisation: float  # error by the distance of levels, in nats
    missing: float  # nats that the run over every other level found more
    error: float  # standard error, of everything together
    by_weights: bool = True  # whether the weights of levels give the value
    correction: str = ""  # a clause for the reason of the run

    @classmethod
    def of_run(
        cls, ended: Ended, genealogy: Genealogy, repetition: Repetition | None
    ) -> Evidence:
        """Read the evidence of a run, with its value over every other level."""
        state = ended.state
        value = math.nan
        # Before level 0 the evidence is that of a noisier density.
        if ended.arrived and state.sampler.estimates_evidence(state.density):
            value = float(ended.run.log_evidence)
        if math.isfinite(value) and _collapsed(ended) and not _needs_weights(ended):
            return cls._of_moves(ended, value)
        discretisation = 0.0
        missing = 0.0
        if state.sampler.check_order is not None and math.isfinite(value):
            discretisation = _discretisation(
                ended, value, repetition, state.sampler.check_order
            )
            missing = _missing(ended, value, repetition)
        variance = float(ended.run.evidence_variance)
        unfound = _unfound(ended, value)
        worth = effective_chains_bound(genealogy, list(ended.positions.values()))
        # Student's t, as for means: few ancestors tell their own variance badly.
        if worth < tuning.ERRORS.fewest_families:
            variance *= worth / max(worth - tuning.ERRORS.fewest_ancestors, 0.1)
        # log ∫F of the first level is known for noise alone; some signal is left there.
        log_snr = np.asarray(state.density.schedule.log_snr)
        of_top = state.density.top.at(state.first).signal(float(log_snr[state.first]))
        distance = discretisation
        if repetition is not None and repetition.positions is not None:
            # What moves whole modes is no noise that the two variances know of.
            distance = max(distance, abs(value - repetition.log_evidence))
        noise = math.sqrt(variance)
        entered = float(ended.run.entered)
        error = math.hypot(noise, distance, of_top, unfound, entered)
        return cls(value, discretisation, missing, error, math.isfinite(value))

    @classmethod
    def _of_moves(cls, ended: Ended, by_weights: float) -> Evidence:
        """The evidence of a run whose weights collapsed before global moves renewed its
        chains: that of the moves' importance samples, where constants are known.

        What the weights found more, beyond noise, may be a place that the samples miss.
        """
        value, variance = _by_importance(ended)
        missed = 0.0
        if by_weights > value:
            noise = variance + float(ended.run.evidence_variance)
            missed = beyond_noise(by_weights - value, noise)
        correction = "; the weights of levels had collapsed before the global moves"
        if math.isfinite(value):
            correction += ", whose importance samples give the log-evidence"
        else:
            correction += ", so that there is no log-evidence"
        error = math.hypot(math.sqrt(variance), missed)
        return cls(
            value=value,
            discretisation=0.0,
            missing=0.0,
            error=error,
            by_weights=False,
            correction=correction,
        )


def _discretisation(
    ended: Ended, evidence: float, repetition: Repetition | None, order: int
) -> float:
    """Error of the log-evidence by the distance of levels, and by potentials that are
    averaged over few points; NaN where it was not estimated."""
    error = math.nan
    if repetition is not None:
        coarse = (repetition.log_evidence, repetition.variance)
        fine = (evidence, float(ended.run.evidence_variance))
        error = discretisation_error(fine, coarse, order)
    of_averaging = beyond_noise(*map(float, ended.run.averaging))
    return math.hypot(error, of_averaging)


def _unfound(ended: Ended, evidence: float) -> float:
    """The nats by which importance samples of global moves find a greater evidence,
    beyond noise; 0 where they do not, or constants are unknown.

    Weights that are uneven leave a mode that few chains reach with too little, and do
    not show it in their variance. Importance samples that find less say nothing: they
    may have missed a place.
    """
    log_evidence, variance = _by_importance(ended)
    more = log_evidence - evidence
    if not more > 0:  # nor where it is NaN
        return 0.0
    return beyond_noise(more, variance + float(ended.run.evidence_variance))


def _by_importance(ended: Ended) -> tuple[float, float]:
    """The log-evidence by importance samples of global moves, and its variance; NaN
    without such moves, or where constants are unknown."""
    if not ended.state.density.top.normalised:
        return math.nan, math.nan
    log_evidence, variance = map(float, ended.run.importance_evidence)
    return log_evidence, variance


def _missing(ended: Ended, evidence: float, repetition: Repetition | None) -> float:
    """The nats by which the evidence over every other level is greater, less two
    standard errors; 0 where it is not.

    Chains that global moves have renewed are where these found probability, whatever
    the weights of levels had missed: the greater of both evidences counts.
    """
    if repetition is None:
        return 0.0
    found = evidence
    variance = float(ended.run.evidence_variance)
    if float(ended.run.renewed) >= 1 - tuning.GLOBAL_MOVES.most_stuck:
        of_moves, its_variance = _by_importance(ended)
        if of_moves > found:
            found = of_moves
            variance = its_variance
    noise = repetition.variance + variance
    more = repetition.log_evidence - found
    return max(more - 2 * math.sqrt(noise), 0.0)


# ── what checks ask ───────────────────────────────────────────────────────────────────
def _arrived(ended: Ended) -> Arrived:
    """The chains, as their support is judged."""
    state = ended.state
    density = state.density
    paths_known = state.sampler.needs_terms(density) or density.num_levels == 1
    return Arrived(
        **vars(ended.chains),
        density=density,
        replicas=ended.round_trips is not None,
        weighted=ended.run.records.weighted,
        has_kernel=state.sampler.kernel is not None,
        paths_known=paths_known,
        drawn=state.writer.drawn > 0,
        globally_moved=not math.isnan(ended.global_acceptance),
        half_moved=_is_half_moved(ended),
        moved=_is_moved(state),
        instead_of=state.attempt.instead_of,
    )


def _is_half_moved(ended: Ended) -> bool:
    """Return whether one round of global moves left many chains where they were.

    In rounds that take turns with other moves, all chains have another turn, and are
    asked what they remember.
    """
    finishers = ended.state.sampler.finishers
    in_one_round = any(isinstance(each, GlobalMoves) for each in finishers)
    renewed = float(ended.run.renewed) >= 1 - tuning.GLOBAL_MOVES.most_stuck
    return in_one_round and not renewed


def _trust(
    ended: Ended, support: Support, genealogy: Genealogy, evidence: Evidence
) -> Trust:
    """The numbers on which the estimates of a run rest."""
    values = list(ended.positions.values())
    level_weights = math.nan
    step_weights = math.nan
    if _level_weights_support(ended, evidence):
        level_weights = _least(np.asarray(ended.records.ess))
        variance = np.asarray(ended.records.weight_variance)
        step_weights = _least(effective_share_of_steps(variance))
    round_trips = math.nan
    if ended.round_trips is not None:
        round_trips = ended.round_trips
    memory = ended.state.memory
    if support.by_paths:
        # Weights of the paths hold for chains that stay in the mode where they began.
        memory = 0.0
    return Trust(
        num_chains=ended.state.num_chains,
        independent=effective_chains_bound(genealogy, values),
        effective_chains=effective_chains(genealogy, values),
        ancestors=len(np.unique(ended.run.ancestors)),
        level_weights=level_weights,
        step_weights=step_weights,
        path_weights=support.path_weights,
        exact_weights=_has_exact_weights(ended),
        proportions=support.proportions.verdict,
        global_acceptance=ended.global_acceptance,
        round_trips=round_trips,
        drift=float(ended.run.drift),
        memory=memory,
        discretisation=evidence.discretisation,
        missing=evidence.missing,
        narrowing=_narrowing(ended),
        corrections=support.corrections,
    )


def _narrowing(ended: Ended) -> float:
    """Share of a variance that reverse steps lose, which nothing corrects; 0 where
    transitions or weights do."""
    state = ended.state
    sampler = state.sampler
    corrected = sampler.kernel is not None or sampler.weights is not None
    if corrected or sampler.step is None:
        return 0.0
    # σ²/α² is the inverse of the ratio of signal and noise.
    log_snr = np.asarray(state.density.schedule.log_snr, np.float64)
    return sampler.step.narrowing(np.exp(-log_snr[np.sort(ended.visited)]))


def _least(values: Float[np.ndarray, " levels"]) -> float:
    """The least of numbers, but for those that are NaN; NaN if all are."""
    finite = values[~np.isnan(values)]
    return float(finite.min()) if finite.size else math.nan


def _collapsed(ended: Ended) -> bool:
    """Return whether the weights of a level are worth too few chains."""
    ess = np.asarray(ended.records.ess)
    least = least_effective_share(len(ended.run.ancestors), _has_exact_weights(ended))
    return bool(np.min(ess, where=np.isfinite(ess), initial=1.0) < least)


def _has_exact_weights(ended: Ended) -> bool:
    """Return whether the weights of levels have no error by the distance of these, as
    those of reveals."""
    return isinstance(ended.state.density, CategoricalDensity)


def _level_weights_support(ended: Ended, evidence: Evidence) -> bool:
    """Return whether the weights of levels support what is reported.

    They do not where global moves made the chains independent of one another, and no
    evidence is stated that rests on weights.
    """
    return evidence.by_weights or _needs_weights(ended)


def _needs_weights(ended: Ended) -> bool:
    """Return whether samples rest on the weights of levels.

    They do not where nine of ten first chains have a descendant: weights were even, or
    global moves made the chains independent of one another. Moves could if at every
    level enough chains counted to fit the modes.
    """
    n = len(ended.run.ancestors)
    distinct = len(np.unique(ended.run.ancestors))
    independent = distinct >= (1 - tuning.GLOBAL_MOVES.most_stuck) * n
    ess = np.asarray(ended.records.ess)
    counted = n * np.min(ess, where=np.isfinite(ess), initial=1.0)
    return not (independent and counted >= least_effective_ancestors(n))


def _as_asked(
    ended: Ended,
    support: Support,
    genealogy: Genealogy,
    evidence: Evidence,
    trust: Trust,
    samples: dict[str, np.ndarray],
) -> EndedRun:
    """The run as checks ask it."""
    state = ended.state
    density = state.density
    sampler = state.sampler
    integrates = integrates_score(sampler.kernel)
    curl_of: Callable[[], dict[str, float]] = dict
    if integrates and len(ended.visited):
        curl_of = _measured_curl(ended)
    evaluations = sampler.evaluations(len(ended.visited))
    return EndedRun(
        **vars(ended.chains),
        density=density,
        key=state.key,
        arrived=ended.arrived,
        completed=ended.completed,
        log_snr=np.asarray(density.schedule.log_snr)[ended.levels],
        records=ended.records,
        level_weights=_level_weights_support(ended, evidence),
        kernel=Kernel(
            adjusted=sampler.adjusted,
            blocks=sampler.blocks,
            proposals=_proposals(ended),
            integrates_score=integrates,
        ),
        ending=_ending(ended),
        samples=samples,
        genealogy=genealogy,
        proportions=support.proportions,
        trust=trust,
        evaluations=tuning.CHECKS.share * state.num_chains * evaluations,
        curl=curl_of,
        own_scores=functools.partial(own_scores, density),
        untracked=state.untracked,
    )


def _ending(ended: Ended) -> Ending:
    """End of a run: how far it came, and whether it was saved."""
    state = ended.state
    checkpoints = state.checkpoints
    is_saved = False
    unsaved: str | None = None
    if checkpoints is not None and checkpoints.ended:
        is_saved = checkpoints.failure is None
        unsaved = checkpoints.failure
    return Ending(
        interrupted=state.interrupted,
        finishers=len(state.sampler.finishers),
        drawn=state.writer.drawn,
        asked=state.draws.number,
        is_saved=is_saved,
        unsaved=unsaved,
    )


def _measured_curl(ended: Ended) -> Callable[[], dict[str, float]]:
    """Return a function for the relative curl of each factor whose score a line
    integral relied on, which measures it once.

    NaN if JAX cannot differentiate a network, so that the run is not lost.
    """
    density = ended.state.density
    key = KeyUse.CURL.folded_into(ended.state.key)
    level = int(ended.visited[-1])
    number = min(ended.state.num_chains, tuning.CHECKS.most_chains)
    # Copies: a result must not keep all positions alive.
    some = chosen(ended.positions, np.arange(number))

    @functools.cache
    def measured() -> dict[str, float]:
        try:
            return curl(density, some, level, key)
        # JAX raises these for custom rules and callbacks.
        except (TypeError, ValueError, NotImplementedError):
            return {
                name: np.nan
                for name, _, offered in density.described.offers
                if "conservative" not in offered
            }

    return measured
