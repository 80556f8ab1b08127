"""From a run that has ended to its `Result` and status: its diagnostics, read once.

The proportions of modes are checked here too. They are supported by importance weights,
by the weights of paths, or by moves between modes; where nothing supports them the
status says so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Position
from composeprob.density.learned_scores import curl
from composeprob.density.overlap import agreement, in_question
from composeprob.density.points import barriers, log_likelihood, lost_to_noise
from composeprob.kernels.gibbs import integrates_score
from composeprob.results import shares, status
from composeprob.results.estimates import (
    Genealogy,
    effective_chains,
    effective_chains_bound,
)
from composeprob.results.geometry import chosen, spaced
from composeprob.results.importance import can_draw, unreached
from composeprob.results.record import (
    DIAGNOSTICS,
    About,
    as_code,
    by_level,
    later,
    versions,
)
from composeprob.results.result import Result
from composeprob.results.status import Code, Findings, Status
from composeprob.runtime.own_draws import other_laws, own_scores
from composeprob.samplers.layout import Layout
from composeprob.samplers.run import Run
from composeprob.samplers.spread import host

if TYPE_CHECKING:
    from composeprob.runtime.stages import State


class KeyUse(IntEnum):
    """Numbers that are folded into a run's key, one for each use: directions of curl,
    the noise of samples under which factors are compared, the chains of a pilot run,
    importance samples, and samples of single factors whose scores are checked."""

    CURL = 2**31 - 2
    OVERLAP = 2**31 - 7
    PILOT = 2**31 - 8
    IMPORTANCE = 2**31 - 9
    OWN_DRAWS = 2**31 - 10

    def folded_into(self, key: Array) -> Array:
        """The key of this use, from that of a run."""
        return jax.random.fold_in(key, np.uint32(self))


# A check that takes a compilation, made when the status is first looked at.
Check = Callable[[], Findings]


def _no_findings() -> Findings:
    return []


@dataclass(frozen=True, eq=False)
class Ended:
    """A run that has ended, read off the devices; all arrays are without copies of
    chains."""

    state: State
    run: Run  # on the host, without its chains
    positions: Position  # of the chains, {site: (N, …)}
    log_weights: Float[np.ndarray, " chains"]
    path_weights: Float[np.ndarray, " chains"]  # Feynman–Kac log-weights of paths
    log_density: Float[np.ndarray, " chains"] | None  # log π₀ where chains are
    visited: Int[np.ndarray, " visits"]  # levels, from the noisiest
    levels: Int[np.ndarray, " levels"]  # that are reported, from level 0 on
    recorded: dict[str, np.ndarray]  # diagnostics of these levels

    @classmethod
    def of_state(cls, state: State, positions: Position) -> Ended:
        """Read a run whose chains, copies included, are at ``positions``."""
        sampler = state.sampler
        run = host(dataclasses.replace(state.run, chains=None))
        cut = state.run.spread.cut
        log_density = host(sampler.log_densities(state.run))
        positions, log_weights, log_density = cut(
            (positions, run.log_weights, log_density)
        )
        visited = run.visits.visited()
        # Of a run that chose its levels and arrived, those that it visited are
        # reported; else all.
        levels = np.arange(state.density.num_levels)
        if bool(run.visits.arrived) and len(visited) <= int(visited[0]):
            levels = visited[::-1]
        recorded = {name: getattr(run.records, name)[levels] for name in DIAGNOSTICS}
        # A kernel that moves all sites together has no axis of blocks.
        if not sampler.blocks:
            for name, values in recorded.items():
                recorded[name] = values.reshape(len(levels))
        return cls(
            state,
            run,
            positions,
            log_weights,
            cut(run.path_weights),
            log_density,
            visited,
            levels,
            recorded,
        )

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

    @property
    def comparable(self) -> bool:
        """True if log-densities can be compared between modes."""
        return {"energy", "mode_depth"} <= self.state.density.capabilities


def summarised(
    state: State,
    samples: dict[str, np.ndarray],
    positions: Position,
    coarse: tuple[float, float] | None,
) -> Result:
    """Return the result of a run.

    Checks that take a compilation of their own (curl, whether the factors agree), and
    all that depends on them, are left until the result is asked for its status.

    Args:
        state: of a run that has ended.
        samples: values of every site and deterministic.
        positions: of the chains, copies included.
        coarse: log-evidence over every other level, and its variance; None where it was
            not estimated.
    """
    density = state.density
    sampler = state.sampler
    ended = Ended.of_state(state, positions)
    support = Support(ended.log_weights)
    if ended.arrived:
        support = supported(ended)
    genealogy = Genealogy.from_log_weights(support.log_weights, ended.run.ancestors)
    evidence = Evidence.of_run(ended, genealogy, coarse)
    found = _findings(ended, support, genealogy, evidence)
    state.retry_reason = ""
    if ended.arrived and not state.interrupted:
        state.retry_reason = _retry_reason(found)
    found = _with_ending(found, ended)
    checks = _checks(ended, support, genealogy, found)

    # `chosen` copies: the result must not keep all positions alive.
    some = chosen(
        ended.positions, np.arange(min(state.num_chains, tuning.CHECKS.most_chains))
    )
    num_chains = state.num_chains
    log_snr = np.asarray(density.schedule.log_snr)[ended.levels]
    ess = ended.recorded["ess"]

    def full_status(result: Result) -> Status:
        suspects = []
        if found.has(Code.NON_FINITE):
            suspects = _observations_of_nan(density, some)
        full = found.noted(Code.NON_FINITE, status.nan_likelihood(suspects))
        full = full.with_findings(*status.not_conservative(result.about.curl))
        full = full.with_findings(*checks.answers())
        # Importance samples may repeat the finding of another check.
        new: Findings = []
        for code, message in checks.importance():
            if not full.has(code):
                new.append((code, message))
        full = full.with_findings(*new)
        # Draws may be on disk, and are not read for a remark.
        if not full.ok or result.about.draws is not None:
            return full
        remark = status.few_chains(result.effective_chains, num_chains, ess, log_snr)
        return Status(tuple(remark))

    log_evidence: float | None = None
    log_evidence_error: float | None = None
    if math.isfinite(evidence.value):
        log_evidence = evidence.value
        error = evidence.error
        log_evidence_error = later(
            lambda result: math.nan if result.status.withholds else error
        )
    return Result(
        samples=samples,
        log_weights=support.log_weights,
        log_evidence=log_evidence,
        log_evidence_error=log_evidence_error,
        evaluations=_evaluations(ended),
        levels=by_level(log_snr, sampler.blocks, **ended.recorded),
        reason=state.reason + support.note,
        about=_about(ended, some),
        status=later(full_status),
        _genealogy=genealogy,
        density=density,
    )


def _about(ended: Ended, some: Position) -> About:
    """The facts of a run; its curl is measured at ``some`` positions when asked for."""
    state = ended.state
    density = state.density
    key = state.key
    draws = state.draws.number
    if draws is not None:
        draws = max(min(state.writer.drawn, draws), 1)
    round_trips = None
    if ended.arrived:
        round_trips = state.sampler.round_trips(state.run.without_copies)
    accepted = float(ended.run.global_acceptance)
    global_acceptance = accepted if math.isfinite(accepted) else None
    relied_on = dict[str, float]()
    if len(ended.visited) and integrates_score(state.sampler.kernel):
        level = int(ended.visited[-1])
        relied_on = later(lambda _: _curl(density, some, level, key))
    return About(
        sampler=state.sampler.describe(),
        seconds=state.seconds,
        draws=draws,
        thin=int(state.draws.thin),
        devices=state.run.spread.devices,
        blocks=state.sampler.blocks,
        dims=dict(density.graph.dims),
        round_trips=round_trips,
        global_acceptance=global_acceptance,
        curl=relied_on,
        key=as_code(key),
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


def _proposals(ended: Ended) -> Int[np.ndarray, " levels"]:
    """Proposals of all chains at each level."""
    state = ended.state
    n = state.num_chains
    proposals = np.full(len(ended.levels), max(state.sampler.proposals(), 1) * n)
    if state.writer.drawn:
        _, proposals_per_transition, _ = state.sampler.drawing
        proposals[0] += _transitions_of_draws(ended) * proposals_per_transition * n
    return proposals


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
    return math.sqrt(max(difference**2 - noise, asymptotic**2))


class Evidence(NamedTuple):
    """The log-evidence of a run and its errors."""

    value: float  # NaN where the run gives none
    discretisation: float  # error by the distance of levels, in nats
    error: float  # standard error, of everything together

    @classmethod
    def of_run(
        cls, ended: Ended, genealogy: Genealogy, coarse: tuple[float, float] | None
    ) -> Evidence:
        """Read the evidence of a run, with its value over every other level."""
        state = ended.state
        value = math.nan
        # Before level 0 the evidence is that of a noisier density.
        if ended.arrived and state.sampler.estimates_evidence(state.density):
            value = float(ended.run.log_evidence)
        discretisation = 0.0
        if state.sampler.check_order is not None and math.isfinite(value):
            discretisation = _discretisation(
                ended, value, coarse, state.sampler.check_order
            )
        variance = float(ended.run.evidence_variance)
        worth = effective_chains_bound(genealogy, list(ended.positions.values()))
        # Student's t, as for means: few ancestors tell their own variance badly.
        if worth < tuning.ERRORS.fewest_families:
            variance *= worth / max(worth - tuning.ERRORS.fewest_ancestors, 0.1)
        # log ∫F of the first level is known for noise alone; some signal is left there.
        log_snr = np.asarray(state.density.schedule.log_snr)
        of_top = state.density.top.at(state.first).signal(float(log_snr[state.first]))
        error = math.hypot(math.sqrt(variance), discretisation, of_top)
        return cls(value, discretisation, error)


def _discretisation(
    ended: Ended, evidence: float, coarse: tuple[float, float] | None, order: int
) -> float:
    """Error of the log-evidence by the distance of levels, and by potentials that are
    averaged over few points; NaN where it was not estimated."""
    error = math.nan
    if coarse is not None:
        fine = (evidence, float(ended.run.evidence_variance))
        error = discretisation_error(fine, coarse, order)
    averaged, noise = map(float, ended.run.averaging)
    of_averaging = math.sqrt(max(averaged**2 - noise, 0.0))
    return math.hypot(error, of_averaging)


# ── the status ────────────────────────────────────────────────────────────────────────
def _findings(
    ended: Ended, support: Support, genealogy: Genealogy, evidence: Evidence
) -> Status:
    """The status according to all checks that take no compilation."""
    state = ended.state
    density = state.density
    ess = ended.recorded["ess"]
    spread_of_steps = np.asarray(ended.run.records.weight_variance)[ended.levels]
    # The weights of levels then support nothing that is reported: no status on them.
    if not math.isfinite(evidence.value) and _renewed(ended.run, ess):
        ess = np.full(len(ended.levels), np.nan)
        spread_of_steps = ess
    outside = 0.0
    if ended.log_density is not None and ended.arrived:
        forbidden = np.isneginf(ended.log_density) | np.isnan(ended.log_density)
        outside = float(np.mean(forbidden))
    found = status.diagnose(
        ended.recorded["acceptance"],
        ended.recorded["non_finite"],
        _proposals(ended),
        ess,
        state.num_chains,
        ended.completed,
        len(ended.levels),
        state.sampler.adjusted,
        state.sampler.blocks,
        outside,
    )
    worth = effective_chains_bound(genealogy, list(ended.positions.values()))
    distinct = len(np.unique(ended.run.ancestors))
    findings: Findings = []
    if density.num_levels > 1:
        findings += _diverged(ended)
    findings += [(Code.NETWORK_DOUBTED, doubt) for doubt in density.graph.doubts]
    # Erratic steps make weights collapse, which is said already then.
    if not found.has(Code.WEIGHTS_COLLAPSED):
        findings += status.erratic_weights(spread_of_steps)
    findings += status.few_ancestors(worth, distinct, state.num_chains, ended.arrived)
    findings += support.findings
    findings += status.not_converged(float(ended.run.drift))
    findings += status.few_levels(evidence.discretisation)
    return found.with_findings(*findings)


def _diverged(ended: Ended) -> Findings:
    """The finding that samples of noised sites are too large for the noisiest level."""
    density = ended.state.density
    noised = {
        name: values
        for name, values in ended.positions.items()
        if density.sites[name].kind == "noised"
    }
    alpha = float(np.asarray(density.schedule.alpha)[-1])
    sigma = float(np.asarray(density.schedule.sigma)[-1])
    return status.diverged(noised, alpha, sigma)


def _renewed(run: Run, ess: Float[np.ndarray, " levels"]) -> bool:
    """Return whether global moves made the chains independent of one another.

    They could if at every level enough chains counted, by the relative ``ess``, to fit
    the modes. The weights of levels then support nothing but the evidence.
    """
    n = len(run.ancestors)  # without moves few of them have descendants
    distinct = len(np.unique(run.ancestors))
    independent = distinct >= (1 - tuning.GLOBAL_MOVES.most_stuck) * n
    counted = n * np.min(ess, where=np.isfinite(ess), initial=1.0)
    return independent and counted >= status.least_effective_ancestors(n)


def _with_ending(found: Status, ended: Ended) -> Status:
    """Add to the findings how the run ended, and how to go on."""
    state = ended.state
    total = state.draws.number
    drawn = state.writer.drawn
    stopped = state.interrupted in ("descend", "finish")
    if ended.arrived and stopped and state.sampler.finishers:
        text = (
            "Stopped at level 0 before its global moves or its warm-up there had "
            "ended. The samples are those of that moment, and latents may not have "
            "converged."
        )
        found = found.with_findings((Code.INTERRUPTED, text))
    elif ended.arrived and total is not None and drawn < total:
        text = (
            f"Stopped after {drawn} of {total} draws; these are of level 0. Run it "
            "again to the end, or with fewer."
        )
        found = found.with_findings((Code.INTERRUPTED, text))
    if state.checkpoints is None or not state.checkpoints.ended:
        return found
    if state.checkpoints.failure is None:
        text = " The same call goes on from its checkpoint."
        return found.noted(Code.INTERRUPTED, text)
    text = (
        f"The last checkpoint could not be written: {state.checkpoints.failure}. The "
        "samples are those of a run without it: save them with result.save; make room "
        "or choose another folder."
    )
    return found.with_findings((Code.NOT_SAVED, text))


def _retry_reason(found: Status) -> str:
    """The defect of a run that closer levels may remedy, as a clause for the reason of
    the next run; empty without such a defect."""
    reasons = {
        Code.SHARES_FROZEN: "nothing supported the proportions of separated modes",
        Code.WEIGHTS_COLLAPSED: "too few chains supported the importance weights",
        Code.ANCESTORS_COLLAPSED: "the chains had too few distinct ancestors",
        Code.LEVELS_TOO_FEW: "the levels were too far apart for the log-evidence",
    }
    for code, reason in reasons.items():
        if found.has(code):
            return reason
    return ""


# ── checks that take a compilation ────────────────────────────────────────────────────
class Checks(NamedTuple):
    """Checks that are made when the status is first looked at, in their order."""

    others: Sequence[Check] = ()
    importance: Check = _no_findings  # after the others, as it costs most

    def answers(self) -> Findings:
        """Findings of all but the importance samples."""
        findings: Findings = []
        for check in self.others:
            findings += check()
        return findings


def _checks(
    ended: Ended, support: Support, genealogy: Genealogy, found: Status
) -> Checks:
    """The checks of a run at level 0, which take at most a share of its evaluations.

    They are functions that keep few positions, or copies: not those of the run.
    """
    if not ended.arrived:
        return Checks()
    state = ended.state
    evaluations = state.sampler.evaluations(len(ended.visited))
    most = tuning.CHECKS.share * state.num_chains * evaluations
    others = [
        support.later,
        _check_of_data(ended, genealogy, found.withholds),
        _check_of_overlap(ended, most),
        _check_of_scores(ended, most),
    ]
    if not can_draw(state.density):
        return Checks(others)
    return Checks(others, _check_by_importance(ended, genealogy, most))


def _check_by_importance(ended: Ended, genealogy: Genealogy, most: float) -> Check:
    """Return a check for modes that no chain has reached, by importance samples."""
    density = ended.state.density
    key = ended.state.key
    positions = jax.tree.map(np.copy, ended.positions)

    def check() -> Findings:
        of_samples = KeyUse.IMPORTANCE.folded_into(key)
        return unreached(density, positions, genealogy, of_samples, most)

    return check


def _all_finite(positions: Position) -> bool:
    return all(np.isfinite(values).all() for values in positions.values())


def _check_of_overlap(ended: Ended, most: float) -> Check:
    """Return a check that factors agree where the chains are.

    It takes ``most`` evaluations, at levels and chains in proportion, and is left out
    where chains are at numbers that are not finite.
    """
    density = ended.state.density
    key = ended.state.key
    n = ended.state.num_chains
    limits = tuning.CHECKS
    levels = most // min(n, limits.most_chains)
    levels = int(np.clip(levels, 2, tuning.OVERLAP.levels))
    number = np.clip(most // levels, 1, limits.most_chains)
    some = chosen(ended.positions, spaced(n, number))
    if not in_question(density) or not _all_finite(some):
        return _no_findings

    def check() -> Findings:
        of_noise = KeyUse.OVERLAP.folded_into(key)
        answers = agreement(density, some, of_noise, levels)
        findings = [(Code(answer.code), answer.message) for answer in answers]
        divisors = [answer.factor for answer in answers if answer.divides]
        return findings + status.untrained_divisors(divisors)

    return check


def _check_of_scores(ended: Ended, most: float) -> Check:
    """Return a check of the factors whose score a line integral relied on: it must be
    the score of the factor's own samples. It takes ``most`` evaluations."""
    density = ended.state.density
    key = ended.state.key
    draws = tuning.FINDINGS.own_draws
    number = int(min(most / density.num_levels, ended.state.num_chains, draws))
    # Fewer samples would tell too little beyond their errors.
    if not integrates_score(ended.state.sampler.kernel) or number < draws // 8:
        return _no_findings
    some = chosen(ended.positions, np.arange(number))
    log_snr = np.asarray(density.schedule.log_snr)

    def check() -> Findings:
        of_samples = KeyUse.OWN_DRAWS.folded_into(key)
        return other_laws(own_scores(density, some, of_samples), log_snr)

    return check


def _check_of_data(ended: Ended, genealogy: Genealogy, withheld: bool) -> Check:
    """Return a check of the data, for densities without a log-density to show the
    problem.

    The data may be all but impossible where chains ended; and, if errors are
    ``withheld`` or fewer than half of the chains count, finer than level 0 is.
    """
    density = ended.state.density
    positions = ended.positions
    if "energy" in density.capabilities or not _all_finite(positions):
        return _no_findings
    weights = genealogy.weights
    counting = effective_chains(genealogy, list(positions.values()))
    few = withheld or counting < len(weights) / 2
    weighted = np.flatnonzero(weights >= weights.max() / len(weights))
    some = chosen(positions, weighted[: tuning.SHARES.most])

    def check() -> Findings:
        measured = sum(np.size(values) for values in density.observed().values())
        if not measured:
            return []
        numbers = min(measured, Layout.of_density(density).size)
        findings = status.impossible_data(log_likelihood(density, some), numbers)
        if few or findings:
            lost = lost_to_noise(density, some)
            log_snr = np.asarray(density.schedule.log_snr)
            findings += status.fine_data(lost, float(log_snr[0]), len(log_snr))
        return findings

    return check


def _observations_of_nan(density: AnnealedDensity, positions: Position) -> list[str]:
    """Observations whose likelihood is NaN four times as far from the mean of the
    chains as these are: where proposals go that have no finite density."""
    if not density.observed():
        return []
    far = jax.tree.map(lambda x: x.mean(0) + 4 * (x - x.mean(0)), positions)
    values = density.log_likelihood(jax.vmap(density.to_samples)(far))
    return [name for name, value in values.items() if np.isnan(value).any()]


def _curl(
    density: AnnealedDensity, positions: Position, level: int, key: Array
) -> dict[str, float]:
    """Relative curl of each factor whose score a line integral relied on; NaN if JAX
    cannot differentiate a network, so that the run is not lost."""
    try:
        return curl(density, positions, level, KeyUse.CURL.folded_into(key))
    # JAX raises these for custom rules and callbacks.
    except (TypeError, ValueError, NotImplementedError):
        return {
            name: np.nan
            for name, _, offered in density.described.offers
            if "conservative" not in offered
        }


# ── support of mode proportions ───────────────────────────────────────────────────────
@dataclass(frozen=True, eq=False)
class Support:
    """Weights of the chains, and the defects of the mode proportions that they give."""

    # Of the run, or of its paths where these correct the proportions.
    log_weights: Float[np.ndarray, " chains"]
    findings: Findings = field(default_factory=list)
    later: Check = _no_findings  # more findings, which take a compilation
    note: str = ""  # added to the reason of the run


def supported(ended: Ended) -> Support:
    """Return what supports the mode proportions of a run that ended at level 0."""
    if ended.state.sampler.round_trips(ended.state.run) is not None:
        return Support(ended.log_weights)  # replicas swap between modes
    if np.isfinite(np.asarray(ended.run.records.ess)).any():
        return _support_of_weighted(ended)
    return _support_of_independent(ended)


def _support_of_weighted(ended: Ended) -> Support:
    """Support of chains with importance weights, which were resampled on the way."""
    log_weights = ended.log_weights
    if not ended.comparable or ended.log_density is None or np.ptp(log_weights):
        return Support(log_weights)
    equal = np.ones(len(log_weights))
    genealogy = Genealogy.from_ancestors(equal, np.asarray(ended.run.ancestors))
    findings = shares.unreliable_proportions(
        ended.positions, ended.log_density, genealogy
    )
    return Support(log_weights, findings)


def _support_of_independent(ended: Ended) -> Support:
    """Support of chains without importance weights, by the weights of their paths.

    Where path weights contradict the proportions of the chains, or cannot support them,
    they replace the chains' equal weights if they are worth enough chains. Else the
    contradiction is a finding, and so are separated modes that nothing supports.
    """
    state = ended.state
    number = len(ended.log_weights)
    worth = effective(ended.path_weights)
    cause = _cause(ended, worth)
    reason = _reason_of_proportions(ended)
    unmoved = _is_unmoved(ended)
    lost = shares.weightless(ended.positions, ended.path_weights)
    kept = np.flatnonzero(~lost)
    positions = chosen(ended.positions, kept)
    paths = ended.path_weights[kept]
    log_density = None if ended.log_density is None else ended.log_density[kept]
    log_weights = ended.log_weights
    note = ""
    if state.aborted:
        note = (
            "; the proportions of separated modes are supported by path weights worth "
            f"{worth:.3g} of {number} chains"
        )

    findings: Findings = []
    if paths.any():
        findings = shares.path_weight_dependence(positions, paths, log_density, reason)
    if lost.any() and unmoved:
        log_weights = np.where(lost, -np.inf, log_weights)
        note += (
            f"; {lost.sum()} separated chains, whose path weights are negligible, get "
            "weight 0"
        )
    elif lost.any() and not findings:
        text = (
            f"{lost.mean():.2%} of the chains are separated from the others, in places "
            "of negligible path weight, which hold next to no probability. "
        )
        findings = [(Code.SHARES_FROZEN, text + reason)]

    separated = _check_of_separation(ended, positions, kept, cause, reason)
    exact = "exact_marginals" in state.density.capabilities
    fewest = max(
        tuning.SHARES.support * number, min(tuning.ERRORS.fewest_families, number / 8)
    )
    if unmoved and worth >= fewest:
        # Shares are off by √(N/worth − 1) of their standard deviation at most: too
        # little for few chains to show it.
        hidden = ended.comparable and not exact and worth < tuning.SHARES.even * number
        if findings or (hidden and separated()):
            return _reweighted(ended, lost, worth)
    if not findings and ended.comparable and log_density is not None:
        findings = shares.unreliable_proportions(positions, log_density)
    by_weights = _path_weights_known(ended) and (worth >= fewest or alike(paths))
    if findings or by_weights or exact:
        return Support(log_weights, findings, _no_findings, note)
    # Asked at once where another run can follow, which must know the answer.
    if ended.comparable:
        return Support(log_weights, separated(), _no_findings, note)
    return Support(log_weights, [], separated, note)


def _reweighted(ended: Ended, lost: np.ndarray, worth: float) -> Support:
    """Support by path weights in the place of the chains' own."""
    paths = ended.path_weights
    weights = np.where(np.isfinite(paths) & ~lost, paths, -np.inf)
    note = (
        f"; path weights, worth {worth:.0f} of {len(paths)} chains, correct the mode "
        "proportions"
    )
    return Support(weights - weights.max(), [], _no_findings, note)


def _path_weights_known(ended: Ended) -> bool:
    """Return whether the run accumulated weights of paths; with one level there are
    none to accumulate, and all are equal."""
    density = ended.state.density
    return ended.state.sampler.needs_terms(density) or density.num_levels == 1


def _is_unmoved(ended: Ended) -> bool:
    """Return whether the chains are where their paths led, so that the path weights are
    theirs: a kernel corrected their way down, and neither draws nor global moves
    followed."""
    state = ended.state
    return (
        state.sampler.kernel is not None
        and not state.writer.drawn
        and bool(np.isnan(float(ended.run.global_acceptance)))
    )


def _reason_of_proportions(ended: Ended) -> shares.Reason:
    """The reason why independent chains may have wrong proportions."""
    if ended.state.sampler.kernel is None:
        return shares.Reason.SUMMED
    if ended.state.density.num_levels == 1:
        return shares.Reason.STARTED
    return shares.Reason.FROZEN


def _cause(ended: Ended, worth: float) -> str:
    """The cause for which nothing supports the proportions, as a clause."""
    number = len(ended.log_weights)
    cause = f"the path weights are worth {worth:.2g} of {number} chains"
    if not _path_weights_known(ended):
        cause = (
            "independent chains have no importance weights, and the weights of their "
            "paths are unknown"
        )
    if ended.state.aborted:
        return f"SMC was aborted, and {cause}"
    return cause


def effective(log_weights: Float[np.ndarray, " chains"]) -> float:
    """Effective sample size of weights; those that are not finite count as 0."""
    finite = log_weights[np.isfinite(log_weights)]
    if not finite.size:
        return 0.0
    return Genealogy.from_log_weights(finite).effective


def alike(log_weights: Float[np.ndarray, " chains"]) -> bool:
    """Return whether weights differ so little that they support shares, although chance
    may leave few of them.

    Log-normal weights whose logarithms have standard deviation s have the relative
    effective size e^(−s²). Few chains tell s far better than their effective size.
    """
    finite = log_weights[np.isfinite(log_weights)]
    if len(finite) <= 0.95 * len(log_weights):
        return False
    return float(shares.clipped(finite).std()) <= tuning.SHARES.alike


def _check_of_separation(
    ended: Ended, positions: Position, kept: np.ndarray, cause: str, reason: str
) -> Check:
    """Return a check for separated modes of the ``kept`` chains at these positions.

    Chains that moved at level 0 are fine if they have crossed as many barriers as lie
    between them. The finding states the ``cause`` for which nothing supports the
    proportions, and the ``reason`` why they may be wrong.
    """
    state = ended.state
    density = state.density
    moved = bool(state.sampler.finishers) or state.writer.drawn > 0
    if moved and state.arrival_points is None:
        return _no_findings
    some = spaced(len(kept), tuning.CHECKS.most_chains)
    final = chosen(positions, some)
    arrival: Position | None = None
    if moved:
        points = np.asarray(state.arrival_points)[kept[some]]
        alpha = float(density.schedule.alpha[0])
        at_arrival = Layout.of_density(density).position(points, alpha)
        arrival = jax.tree.map(np.asarray, at_arrival)

    def check() -> Findings:
        depths = barriers(density)
        groups = shares.separated(final, depths)
        if groups is None:
            return []
        if arrival is not None:
            size = Layout.of_density(density).size
            crossed = shares.share_separated(depths(arrival, final), size)
            if crossed >= tuning.SHARES.crossing * groups.separated:
                return []
        places = shares.largest_difference(final, groups.index)
        text = (
            f"The chains lie in {groups}: {places}. Nothing supports these mode "
            f"proportions: {cause}. {reason}"
        )
        return [(Code.SHARES_FROZEN, text)]

    return check
