"""What is known of a run that has ended: its diagnostics, read once, become the
`Result` and its status.

What the shares of modes rest on is asked here too: weights, the paths of chains, or
moves between modes. Where that is nothing the status says so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax import Array

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Position
from composeprob.density.learned_scores import curl
from composeprob.density.overlap import agreement, in_question
from composeprob.density.points import barriers, log_likelihood, lost_to_noise
from composeprob.kernels.gibbs import integrates_score
from composeprob.results import shares, status
from composeprob.results.estimates import Families, effective_chains, known_chains
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
    """Numbers that are folded into a run's key: for directions of curl, for the noise
    of samples under which factors are asked whether they agree, for the chains of a
    pilot run, for draws of the program's factors, and for those whose scores are
    asked."""

    CURL = 2**31 - 2
    OVERLAP = 2**31 - 7
    PILOT = 2**31 - 8
    IMPORTANCE = 2**31 - 9
    OWN_DRAWS = 2**31 - 10

    def folded_into(self, key: Array) -> Array:
        """The key of this use, of a run's."""
        return jax.random.fold_in(key, np.uint32(self))


Question = Callable[
    [], Findings
]  # asked of a run when its status is first looked at, as it takes a compilation


def error_of_levels(
    found: tuple[float, float], coarse: tuple[float, float], order: int
) -> float:
    """What the levels' distance does to a log-evidence, by the same over every other
    level; each with its variance.

    An error of order p is 1/(2^p − 1) of the difference, but only where levels are
    close enough; farther apart it falls more slowly. As nothing tells which, what of
    the difference is not noise counts whole.
    """
    difference, noise = abs(coarse[0] - found[0]), coarse[1] + found[1]
    return math.sqrt(max(difference**2 - noise, (difference / (2**order - 1)) ** 2))


def summarised(
    state: State,
    samples: dict[str, np.ndarray],
    positions: Position,
    coarse: tuple[float, float] | None,
) -> Result:
    """The result of a run, of its samples, the chains' positions (copies included), and
    the log-evidence over every other level with its variance. What takes a compilation
    of its own (curl, whether the factors agree) is left to who asks for it, and so is
    what depends on that."""
    sampler, density, key, n = state.sampler, state.density, state.key, state.num_chains
    run, cut = host(dataclasses.replace(state.run, chains=None)), state.run.spread.cut
    visited, arrived = run.visits.visited(), bool(run.visits.arrived)
    positions, log_weights, values = cut(
        (positions, run.log_weights, host(sampler.log_densities(state.run)))
    )
    log_snr = np.asarray(density.schedule.log_snr)
    # Of a run that chose its levels and arrived, those that it visited are reported;
    # else all.
    chose = arrived and len(visited) <= int(visited[0])
    levels = visited[::-1] if chose else np.arange(density.num_levels)
    recorded = {name: getattr(run.records, name)[levels] for name in DIAGNOSTICS}
    if (
        not sampler.blocks
    ):  # a kernel that moves all sites together has no axis of blocks
        recorded = {
            name: values.reshape(len(levels)) for name, values in recorded.items()
        }

    cost, moves, settling = sampler.drawing if state.writer.drawn else (0, 0, 0)
    transitions = state.writer.drawn * int(state.draws.thin) + settling
    evaluations = state.spent + sampler.evaluations(len(visited)) + transitions * cost
    evaluations += int(run.spent)
    proposals = np.full(len(levels), max(sampler.proposals(), 1) * n)
    proposals[0] += transitions * moves * n

    # Before level 0 the evidence is that of a noisier density.
    evidence = (
        float(run.log_evidence)
        if arrived and sampler.estimates_evidence(density)
        else math.nan
    )
    of_levels = 0.0
    if sampler.check_order is not None and math.isfinite(evidence):
        own = evidence, float(run.evidence_variance)
        of_levels = (
            math.nan
            if coarse is None
            else error_of_levels(own, coarse, sampler.check_order)
        )
        more, noise = map(float, run.averaging)
        of_levels = math.hypot(of_levels, math.sqrt(max(more**2 - noise, 0.0)))
    of_top = density.top.at(state.first).signal(float(log_snr[state.first]))
    completed = (
        len(levels)
        if arrived
        else density.num_levels - int(min(visited, default=density.num_levels))
    )
    outside = (
        0.0
        if values is None or not arrived
        else float(np.mean(np.isneginf(values) | np.isnan(values)))
    )
    ess, spreading = recorded["ess"], run.records.weight_variance[levels]
    if not math.isfinite(evidence) and _renewed(run, ess):
        ess, spreading = np.full((2, len(levels)), np.nan)
    health = (
        recorded["acceptance"],
        recorded["non_finite"],
        proposals,
        ess,
        n,
        completed,
        len(levels),
    )
    found = status.diagnose(*health, sampler.adjusted, sampler.blocks, outside)
    paths = cut(run.path_weights)
    support = (
        supported(state, positions, log_weights, paths, values)
        if arrived
        else Support(log_weights)
    )
    log_weights = support.log_weights
    families = Families.from_log_weights(log_weights, run.ancestors)
    worth, squared = (
        known_chains(families, list(positions.values())),
        float(run.evidence_variance),
    )
    if (
        worth < tuning.ERRORS.fewest_families
    ):  # as of means: a variance of few families, and Student's t
        squared *= worth / max(worth - tuning.ERRORS.fewest_ancestors, 0.1)
    error = math.hypot(math.sqrt(squared), of_levels, of_top)
    noised = {
        name: x for name, x in positions.items() if density.sites[name].kind == "noised"
    }
    alpha, sigma = (
        float(np.asarray(each)[-1])
        for each in (density.schedule.alpha, density.schedule.sigma)
    )
    found = found.with_findings(
        *(status.diverged(noised, alpha, sigma) if density.num_levels > 1 else []),
        *((Code.NETWORK_DOUBTED, doubt) for doubt in density.graph.doubts),
        *(
            []
            if found.has(Code.WEIGHTS_COLLAPSED)
            else status.erratic_weights(spreading)
        ),
        *status.few_ancestors(worth, len(np.unique(run.ancestors)), n, arrived),
        *support.findings,
        *status.not_converged(float(run.drift)),
        *status.few_levels(of_levels),
    )
    state.weak = _weak(found) if arrived and not state.interrupted else ""
    # Copies, which keep no other positions alive.
    found, some = (
        _ended(found, state, arrived),
        chosen(positions, np.arange(min(n, tuning.CHECKS.most_chains))),
    )
    questions: list[Question] = []
    scouts: Question = list
    if arrived:
        most = tuning.CHECKS.share * n * sampler.evaluations(len(visited))
        questions = [
            support.later,
            _data(state, positions, families, found.withholds),
            _overlap(state, positions, most),
            _own_scores(state, positions, most),
        ]
        if can_draw(density):
            chains = jax.tree.map(np.copy, positions)
            scouts = lambda: unreached(
                density, chains, families, KeyUse.IMPORTANCE.folded_into(key), most
            )  # noqa: E731

    def with_answers(result: Result) -> Status:
        suspects = _suspects(density, some) if found.has(Code.NON_FINITE) else []
        known = found.noted(Code.NON_FINITE, status.no_number(suspects)).with_findings(
            *status.not_conservative(result.about.curl),
            *(each for question in questions for each in question()),
        )
        known = known.with_findings(
            *(each for each in scouts() if not known.has(each[0]))
        )
        if (
            not known.ok or result.about.draws is not None
        ):  # draws may be on disk, and are not read for it
            return known
        return Status(
            tuple(
                status.few_chains(
                    result.effective_chains, n, recorded["ess"], log_snr[levels]
                )
            )
        )

    relied_on = dict[str, float]()
    if len(visited) and integrates_score(sampler.kernel):
        relied_on = later(lambda _: _curl(density, some, int(visited[-1]), key))
    known = math.isfinite(evidence)
    accepted = float(run.global_acceptance)
    return Result(
        samples=samples,
        log_weights=log_weights,
        log_evidence=evidence if known else None,
        log_evidence_error=later(
            lambda result: math.nan if result.status.withholds else error
        )
        if known
        else None,
        evaluations=evaluations,
        levels=by_level(log_snr[levels], sampler.blocks, **recorded),
        reason=state.reason + support.note,
        about=About(
            sampler=sampler.describe(),
            seconds=state.seconds,
            draws=None
            if state.draws.number is None
            else max(min(state.writer.drawn, state.draws.number), 1),
            thin=int(state.draws.thin),
            devices=state.run.spread.devices,
            blocks=sampler.blocks,
            dims=dict(density.graph.dims),
            round_trips=sampler.round_trips(state.run.without_copies)
            if arrived
            else None,
            global_acceptance=accepted if math.isfinite(accepted) else None,
            curl=relied_on,
            key=as_code(key),
            versions=dict(versions()),
        ),
        status=later(with_answers),
        _families=families,
        density=density,
    )


def _renewed(run: Run, ess: np.ndarray) -> bool:
    """Whether global moves made chains independent of one another, of which so many had
    counted at each level, by its relative ``ess``, that the moves knew the modes:
    nothing but the evidence rests on weights of levels then."""
    n = len(run.ancestors)  # without moves they descend from as few as counted
    independent = (
        len(np.unique(run.ancestors)) >= (1 - tuning.GLOBAL_MOVES.most_stuck) * n
    )
    counted = n * np.min(ess, where=np.isfinite(ess), initial=1.0)
    return independent and counted >= status.fewest_families(n)


def _overlap(state: State, positions: Position, most: float) -> Question:
    """Asks whether factors agree where the chains are: of some, over the chains, by so
    many evaluations at most; not where they ended at what is no number."""
    density, n, checks = state.density, state.num_chains, tuning.CHECKS
    levels = int(np.clip(most // min(n, checks.most_chains), 2, tuning.OVERLAP.levels))
    some = chosen(positions, spaced(n, np.clip(most // levels, 1, checks.most_chains)))
    if not in_question(density) or not all(np.isfinite(x).all() for x in some.values()):
        return list

    def found() -> Findings:
        answers = agreement(
            density, some, KeyUse.OVERLAP.folded_into(state.key), levels
        )
        divisors = [finding.factor for finding in answers if finding.divides]
        return [
            (Code(finding.code), finding.message) for finding in answers
        ] + status.untrained_divisors(divisors)

    return found


def _own_scores(state: State, positions: Position, most: float) -> Question:
    """Asks factors whose score a line integral relied on whether it is that of their
    own draws, by so many evaluations at most."""
    density, draws = state.density, tuning.FINDINGS.own_draws
    number = int(min(most / density.num_levels, state.num_chains, draws))
    if not integrates_score(state.sampler.kernel) or number < draws // 8:
        return list
    some, log_snr = (
        chosen(positions, np.arange(number)),
        np.asarray(density.schedule.log_snr),
    )
    return lambda: other_laws(
        own_scores(density, some, KeyUse.OWN_DRAWS.folded_into(state.key)), log_snr
    )


def _data(
    state: State, positions: Position, families: Families, withheld: bool
) -> Question:
    """Asks of chains that have no log-density to tell it whether the data can be what
    they are where these ended, and, if their errors are ``withheld`` or fewer than half
    of them count, whether the data are finer than level 0 is."""
    density = state.density
    if "energy" in density.capabilities or not all(
        np.isfinite(x).all() for x in positions.values()
    ):
        return list
    few = (
        withheld
        or effective_chains(families, list(positions.values()))
        < len(families.weights) / 2
    )
    counted = np.flatnonzero(
        families.weights >= families.weights.max() / len(families.weights)
    )
    some = chosen(positions, counted[: tuning.SHARES.most])

    def found() -> Findings:
        seen = sum(np.size(y) for y in density.observed().values())
        if not seen:
            return []
        answers = status.impossible_data(
            log_likelihood(density, some), min(seen, Layout.of_density(density).size)
        )
        if few or answers:
            lost, log_snr = (
                lost_to_noise(density, some),
                np.asarray(density.schedule.log_snr),
            )
            answers += status.fine_data(lost, float(log_snr[0]), len(log_snr))
        return answers

    return found


def _suspects(density: AnnealedDensity, positions: Position) -> list[str]:
    """Where proposals were no numbers: the observations whose likelihood is NaN four
    times as far from the mean of the chains as these are."""
    if not density.observed():
        return []
    far = jax.tree.map(lambda x: x.mean(0) + 4 * (x - x.mean(0)), positions)
    values = density.log_likelihood(jax.vmap(density.to_samples)(far))
    return [name for name, value in values.items() if np.isnan(value).any()]


def _curl(
    density: AnnealedDensity, positions: Position, level: int, key: Array
) -> dict[str, float]:
    """Of each factor whose score a line integral relied on; NaN where a network cannot
    be differentiated, which no run is lost for."""
    try:
        return curl(density, positions, level, KeyUse.CURL.folded_into(key))
    except (
        TypeError,
        ValueError,
        NotImplementedError,
    ):  # what JAX raises for custom rules and callbacks
        return {
            name: np.nan
            for name, _, offered in density.described.offers
            if "conservative" not in offered
        }


def _ended(found: Status, state: State, arrived: bool) -> Status:
    """What was found, with how the run ended."""
    number, drawn = state.draws.number, state.writer.drawn
    if arrived and state.interrupted in ("descend", "finish") and state.sampler.finishers:
        text = (
            "Stopped at level 0, before its global moves or its warm-up there had ended; the samples are as they were "
            "then, and latents may not have converged."
        )
        found = found.with_findings((Code.INTERRUPTED, text))
    elif arrived and number is not None and drawn < number:
        text = f"Stopped after {drawn} of {number} draws; these are of level 0. Run it again to the end, or with fewer."
        found = found.with_findings((Code.INTERRUPTED, text))
    if state.checkpoints is None or not state.checkpoints.ended:
        return found
    if state.checkpoints.failure is None:
        return found.noted(
            Code.INTERRUPTED, " The same call goes on from its checkpoint."
        )
    text = (
        f"The last checkpoint could not be written: {state.checkpoints.failure}. The samples are those of a run "
        "without it: save them with result.save; make room or choose another folder."
    )
    return found.with_findings((Code.NOT_SAVED, text))


def _weak(found: Status) -> str:
    """What a run lacks that one on closer levels may have, in the words of that one's
    reason."""
    words = {
        Code.SHARES_FROZEN: "the chains lay apart, and their shares rested on nothing",
        Code.WEIGHTS_COLLAPSED: "weights had come to rest on too few chains",
        Code.ANCESTORS_COLLAPSED: "the chains descended from too few ancestors",
        Code.LEVELS_TOO_FEW: "the levels were too far apart for the log-evidence",
    }
    return next((why for code, why in words.items() if found.has(code)), "")


@dataclass(frozen=True, eq=False)
class Support:
    """What is known of the modes' shares."""

    # of the chains, (N,): those of the run, or of its paths where these mend the shares
    log_weights: np.ndarray
    findings: Findings = field(default_factory=list)  # what is wrong with them
    later: Question = list  # more of these, which take a compilation
    note: str = ""  # what is added to the reason of the run


def supported(
    state: State,
    positions: Position,
    log_weights: np.ndarray,
    paths: np.ndarray,
    log_density: np.ndarray | None,
) -> Support:
    """What the shares of a run that ended at level 0 rest on: of its chains, on the
    host, with the run's weights, those of the ways that they came, and log π₀ where
    they ended, (N,), None where it is not known."""
    run, sampler, density = state.run, state.sampler, state.density
    number, comparable = (
        len(log_weights),
        {"energy", "mode_depth"} <= density.capabilities,
    )
    if sampler.round_trips(state.run) is not None:  # replicas, which swap
        return Support(log_weights)
    if np.isfinite(np.asarray(run.records.ess)).any():
        if not comparable or log_density is None or np.ptp(log_weights):
            return Support(log_weights)
        families = Families.from_ancestors(np.ones(number), np.asarray(run.ancestors))
        return Support(
            log_weights, shares.frozen_shares(positions, log_density, families)
        )
    note, worth = "", effective(paths)
    unknown = not sampler.needs_terms(density) and density.num_levels > 1
    if state.given_up:
        note = (
            f"; what modes that are far apart hold rests on the weights of their paths, worth {worth:.3g} of "
            f"{number} chains"
        )
    why = shares.Reason.STARTED if density.num_levels == 1 else shares.Reason.FROZEN
    why = shares.Reason.SUMMED if sampler.kernel is None else why
    stayed = (
        sampler.kernel is not None
        and not state.writer.drawn
        and np.isnan(float(run.global_acceptance))
    )
    lost = shares.weightless(positions, paths)
    kept, weighed = (
        np.flatnonzero(~lost),
        np.where(np.isfinite(paths) & ~lost, paths, -np.inf),
    )
    positions, paths = chosen(positions, kept), paths[kept]
    log_density = None if log_density is None else log_density[kept]
    uneven = (
        shares.uneven_paths(positions, paths, log_density, why) if paths.any() else []
    )
    if lost.any() and stayed:
        log_weights = np.where(lost, -np.inf, log_weights)
        note += f"; {lost.sum()} of them, which lie apart and whose paths weigh nothing beside the others', weigh 0"
    elif lost.any() and not uneven:
        found = f"{lost.mean():.2%} of the chains lie apart, where by what their paths weigh there is nothing. "
        uneven = [(Code.SHARES_FROZEN, found + why)]
    cause = f"the weights of their paths are worth {worth:.2g} of {number} chains"
    if unknown:
        cause = (
            "chains do not weigh one another, and what their paths weigh is not known"
        )
    if state.given_up:
        cause = f"SMC was given up, and {cause}"
    apart, exact = (
        _later(state, positions, kept, cause, why),
        "exact_marginals" in density.capabilities,
    )
    fewest = max(
        tuning.SHARES.support * number, min(tuning.ERRORS.fewest_families, number / 8)
    )
    if stayed and worth >= fewest:
        # Shares are off by √(N/worth − 1) of their standard deviation at most: too
        # little for few chains to show it.
        hidden = comparable and not exact and worth < tuning.SHARES.even * number
        if uneven or (hidden and apart()):
            note = f"; the weights of their paths, worth {worth:.0f} of {number} chains, mend the shares of modes"
            return Support(weighed - weighed.max(), [], list, note)
    if not uneven and comparable and log_density is not None:
        uneven = shares.frozen_shares(positions, log_density)
    rests = not unknown and (worth >= fewest or alike(paths))
    if uneven or rests or exact:
        return Support(log_weights, uneven, list, note)
    # Where another run can follow it is asked at once.
    return (
        Support(log_weights, apart(), list, note)
        if comparable
        else Support(log_weights, [], apart, note)
    )


def effective(log_weights: np.ndarray) -> float:
    """How many independent chains weights are worth; those that are no numbers count as
    0."""
    finite = log_weights[np.isfinite(log_weights)]
    return Families.from_log_weights(finite).effective if finite.size else 0.0


def alike(log_weights: np.ndarray) -> bool:
    """Whether weights differ so little that what they say is known, although chance may
    leave few of them.

    Of log-normal weights whose logarithms have a standard deviation s a share e^(−s²)
    counts. Few chains tell s far better than the effective sample size.
    """
    finite = log_weights[np.isfinite(log_weights)]
    return (
        len(finite) > 0.95 * len(log_weights)
        and float(shares.clipped(finite).std()) <= tuning.SHARES.alike
    )


def _later(
    state: State, positions: Position, kept: np.ndarray, cause: str, why: str
) -> Question:
    """What is asked of chains whose shares no weights support, ``kept`` of all: whether
    they are in groups that they did not cross between. It says the ``cause`` why
    nothing supports these, and ``why`` this is so."""
    density = state.density
    moved = bool(state.sampler.finishers) or state.writer.drawn > 0
    if moved and state.came is None:
        return list
    some = spaced(len(kept), tuning.CHECKS.most_chains)
    # where they were when they had come down to level 0, if they have moved since
    came = None
    if moved:
        at = Layout.of_density(density).position(
            np.asarray(state.came)[kept[some]], float(density.schedule.alpha[0])
        )
        came = jax.tree.map(np.asarray, at)
    ended = chosen(positions, some)

    def apart() -> Findings:
        depths = barriers(density)
        groups = shares.parted(ended, depths)
        if groups is None:
            return []
        size = Layout.of_density(density).size
        if (
            came is not None
            and shares.share_apart(depths(came, ended), size)
            >= tuning.SHARES.crossing * groups.apart
        ):
            return []
        places = shares.where(ended, groups.index)
        text = f"The chains lie in {groups}: {places}. Their shares rest on nothing: {cause}. {why}"
        return [(Code.SHARES_FROZEN, text)]

    return apart
