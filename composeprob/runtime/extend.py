r"""A result that goes on with further data: iterated batch importance sampling.

The chains of π are samples of π' once they have the weights π'(x)/π(x); new members of
a plate and new latents are drawn from their priors given the others, which cancels
their priors. Weights multiply from datum to datum. Where fewer than half of the chains
count, these are resampled and moved; where one datum alone leaves fewer, it comes in by
powers γ of its likelihood, under π^(1−γ)·π'^γ. New latents whose draws from the prior
miss their data are proposed near these (`new_latents`).
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from composeprob import tuning
from composeprob.arguments import check_key
from composeprob.density.annealed import AnnealedDensity, Evaluates
from composeprob.density.evaluation import Evaluation, Position
from composeprob.errors import (
    CapabilityError,
    InvalidValueError,
    ShapeError,
    WrongTypeError,
)
from composeprob.findings import Finding
from composeprob.kernels import KernelState
from composeprob.results.checks.limits import DRIFT
from composeprob.results.result import Result
from composeprob.runtime.new_latents import Logs, evaluations, new_entries, proposed
from composeprob.runtime.next_step import Steps, stepped
from composeprob.runtime.population import (
    Execution,
    GlobalMover,
    Population,
    next_increment,
    over_chains,
)
from composeprob.runtime.progress import Progress
from composeprob.samplers.finishers import Trail, WarmUp
from composeprob.samplers.layout import Layout
from composeprob.samplers.moves import Particles, Transitions
from composeprob.samplers.resampling import relative_ess
from composeprob.samplers.run import Run, Visits, begin, placed
from composeprob.samplers.spread import Spread
from composeprob.settings import usual

Values = TypeVar("Values", Array, np.ndarray)


class Change(NamedTuple):
    """The part of a density that another one lacks.

    Attributes:
        grows: whether static sites are new or have more members.
        text: in words.
    """

    grows: bool
    text: str

    @classmethod
    def between(cls, before: AnnealedDensity, after: AnnealedDensity) -> Change:
        """Find what is new; refuse densities that differ otherwise."""
        if before.described.rewards or after.described.rewards:
            raise _other("has a reward, which is not a datum")
        same = np.array_equal(before.schedule.log_snr[:1], after.schedule.log_snr[:1])
        if not same:
            raise _other("has another noise at level 0")
        news = _new_sites(before, after)
        grows = bool(news)
        news += _new_data(before, after)
        if not news:
            raise _other("has no datum, member or site more")
        if grows:
            _check_priors(before, after)
        return cls(grows, ", ".join(news))


def _new_sites(before: AnnealedDensity, after: AnnealedDensity) -> list[str]:
    """Return the static sites that are new or have more members; refuse all else."""
    news = []
    for name, site in before.sites.items():
        if name not in after.sites:
            raise _other(f"lacks the site {name!r}")
        grown = _grown(name, site.shape, after.sites[name].shape)
        if grown and site.kind != "static":
            raise _other(f"has more members of the noised site {name!r}", fix=NEXT_STEP)
        news += grown
    for name, site in after.sites.items():
        if name in before.sites:
            continue
        if site.kind != "static":
            raise _other(f"has the new noised site {name!r}", fix=NEXT_STEP)
        news.append(f"the site {name!r}")
    return news


def _grown(name: str, old: tuple[int, ...], new: tuple[int, ...]) -> list[str]:
    """Return how many members a site, or its data, has gained; refuse other shapes."""
    if old == new:
        return []
    if len(old) != len(new) or old[1:] != new[1:] or not old or new[0] < old[0]:
        raise _other(f"has {name!r} of shape {new} in the place of {old}")
    return [f"{new[0] - old[0]} of {name!r}"]


def _new_data(before: AnnealedDensity, after: AnnealedDensity) -> list[str]:
    """Return what is new among the data; refuse others in the place of the former."""
    news = []
    then = before.observed()
    now = after.observed()
    for name, value in then.items():
        if name not in now:
            raise _other(f"lacks the data {name!r}")
        old = np.asarray(value)
        new = np.asarray(now[name])
        news += _grown(name, old.shape, new.shape)
        former = _first(new, old.shape)
        # Data that were awaited are NaN under a mask, so that shapes stay as they are.
        arrived = np.isnan(old) & ~np.isnan(former)
        if arrived.any():
            news.append(f"{np.sum(arrived)} of {name!r}")
        if not np.array_equal(former[~arrived], old[~arrived], equal_nan=True):
            raise _other(f"has other values of {name!r}")
    news += [f"the data {name!r}" for name in now if name not in then]
    return news


def _check_priors(before: AnnealedDensity, after: AnnealedDensity) -> None:
    """Refuse other priors of the former static sites, at one draw of them all.

    The weights take the whole change of the log-prior for the prior of what is new, so
    that another prior would count for nothing.
    """
    key = jax.random.key(0)
    values = after.to_samples(after.initial(key))
    former = {}
    for name, value in before.to_samples(before.initial(key)).items():
        if name in values:
            former[name] = _first(values[name], value.shape)
    then = before.evaluator.log_priors(former)
    now = after.evaluator.log_priors(values)
    for name, log_prior in then.items():
        grown = values[name].shape != former[name].shape
        if grown and now[name].shape == log_prior.shape:
            continue  # one law of all members together
        new = _first(now[name], log_prior.shape)
        if not np.allclose(new, log_prior, 1e-4, 1e-4, equal_nan=True):
            raise _other(f"has another prior of {name!r}")


def _first(values: Values, shape: tuple[int, ...]) -> Values:
    """Return the first entries of an array that has grown."""
    return values[tuple(map(slice, shape))]


MORE_DATA = (
    "extend by the same program with more data at the end: one datum, member or latent "
    "more. For the next step of a Markov chain name the site that its past takes: "
    "given={'past': 'x'}. For another density start anew: cp.infer(density, key, …)."
)
NEXT_STEP = (
    "write a program of the new site alone, whose factor depends on a latent past = "
    "cp.sample('past', distribution), and name the site of the result that it takes: "
    "result.extend(density, key, given={'past': 'x'}). A model of several states has "
    "no such latent: train the law of the next state given the past on its samples, "
    "cp.training.estimator(next, past, key)."
)


def _other(difference: str, fix: str = MORE_DATA) -> InvalidValueError:
    """Return the error for a density that is no extension of a result's."""
    return InvalidValueError(
        f"This density {difference}, compared with that of the result.", fix=fix
    )


class Between(eqx.Module):
    """Evaluates π^(1−γ)·π'^γ, and all else as π' does.

    Attributes:
        before, after: evaluators of π and π'.
        exponent: γ.
        shapes: of the static sites of π that π' has more members of, and of the others;
            None where both have the same sites.
    """

    before: Evaluates
    after: Evaluates
    exponent: Float[Array, ""]
    shapes: tuple[tuple[str, tuple[int, ...]], ...] | None = eqx.field(static=True)

    def logs(self, position: Position, level: Array | int = 0) -> Logs:
        """Return log π and log π'/π at a position, with the priors of what is new."""
        old = self.before(self._former(position), level)
        new = self.after(position, level)
        prior = new.terms.log_prior - old.terms.log_prior
        log_old = old.log_density
        log_new = new.log_density
        if log_old is None or log_new is None:
            # Factors that offer only scores are the same in both.
            of_old = _without_factors(old) + old.terms.log_prior
            of_new = _without_factors(new) + new.terms.log_prior
            return Logs(jnp.zeros(()), of_new - of_old, prior)
        if self.shapes is None:
            return Logs(log_old, log_new - log_old, jnp.zeros(()))
        base = log_old + prior
        return Logs(base, log_new - base, prior)

    def _former(self, position: Position) -> Position:
        """The part of a position that π has."""
        if self.shapes is None:
            return position
        former = {}
        for name, shape in self.shapes:
            former[name] = _first(position[name], shape)
        return former

    def __call__(self, position: Position, level: Array | int) -> Evaluation:
        former = self._former(position)
        old = self.before(former, level)
        new = self.after(position, level)

        def mixed(a: Array, b: Array) -> Array:
            return (1 - self.exponent) * a + self.exponent * b

        if self.shapes is None:
            log_density = mixed(old.log_density, new.log_density)  # type: ignore[arg-type]
            score = jax.tree.map(mixed, old.score, new.score)
        else:
            # A gradient through the evaluators, as priors of what is new have none of
            # their own.
            def log_between(position: Position) -> Array:
                logs = self.logs(position, level)
                return logs.base + self.exponent * logs.gain

            log_density, score = jax.value_and_grad(log_between)(position)
        # Noised sites, which alone have a drift, are the same in both.
        drift = dict(new.terms.drift)
        for name, of_old in old.terms.drift.items():
            if of_old.shape == drift[name].shape:
                drift[name] = mixed(of_old, drift[name])
        return dataclasses.replace(
            new,
            log_density=log_density,
            score=score,
            wall=None,
            terms=dataclasses.replace(new.terms, drift=drift),
        )


def _without_factors(evaluation: Evaluation) -> Float[Array, ""]:
    return evaluation.terms.log_potential + evaluation.terms.log_exact


def _passed_on(name: str) -> Any:
    """Return a member of `Evaluates` for `Between`: that of π'."""
    if isinstance(vars(Evaluates)[name], property):
        return property(lambda self: getattr(self.after, name))

    def method(self: Between, *arguments: Any) -> Any:
        return getattr(self.after, name)(*arguments)

    return method


for _name in vars(Evaluates):
    if not _name.startswith("_"):
        setattr(Between, _name, _passed_on(_name))


class Course(NamedTuple):
    """The way a result has come, and goes on.

    Attributes:
        execution: of the run that it began with.
        steps: those of a Markov chain that it has made.
    """

    execution: Execution
    steps: Steps = Steps()


def can_extend(result: Result, course: Course) -> Result:
    """Return the result, which can go on by `Result.extend`."""
    # Not a field, as copies with other samples must not go on.
    object.__setattr__(result, "_onwards", partial(extended, course=course))
    return result


def extended(
    result: Result,
    density: AnnealedDensity,
    key: Array,
    given: dict[str, str] | None = None,
    keep: int | None = None,
    before: AnnealedDensity | None = None,
    *,
    course: Course | None = None,
) -> Result:
    """Return a result that goes on with what a density has more, on its course so far;
    see `Result.extend`."""
    result = _with_density(result, before)
    before = result.density
    assert before is not None
    if course is None:
        # Of a result from a file, whose lag begins anew.
        course = Course(Execution(), Steps(result.about.steps))
    if not isinstance(density, AnnealedDensity):
        raise WrongTypeError(
            f"extend takes a compiled density; got {type(density).__name__}.",
            fix="compile the program with the further data: cp.compile(program, …).",
        )
    check_key(key)
    if given is not None:
        with usual():
            after, steps = stepped(
                result, density, key, given, keep, course.steps, course.execution
            )
            return can_extend(after, course._replace(steps=steps))
    _check_more_data(density, course, keep)
    change = Change.between(before, density)
    with usual():
        extension = Extension(result, before, density, key, change, course.execution)
        try:
            return can_extend(extension.finished(result), course)
        finally:
            extension.bars.close()


def _check_more_data(
    density: AnnealedDensity, course: Course, keep: int | None
) -> None:
    """Refuse further data after steps of a Markov chain, a lag without steps, and sites
    that cannot be moved between two sets of data."""
    if course.steps.number:
        raise InvalidValueError(
            "This result has gone on by steps, whose given sites have no prior to "
            "weight more data under.",
            fix="go on by steps, extend(density, key, given={…}), or start anew.",
        )
    if keep is not None:
        raise InvalidValueError(
            f"keep={keep} counts steps, and this is none: given= is missing.",
            fix="leave keep out, or name the sites of the step before: "
            "given={'past': 'x'}.",
        )
    latents = any(site.kind != "noised" for site in density.sites.values())
    if latents and "energy" not in density.capabilities:
        raise CapabilityError(
            "Latents under factors that offer only scores cannot be moved between two "
            "sets of data.",
            where=density.described.where,
            fix="start anew: cp.infer(density, key, …).",
        )
    still = []
    for name, site in density.sites.items():
        if site.kind not in ("noised", "static"):
            still.append(repr(name))
    if still:
        raise CapabilityError(
            f"{', '.join(still)} cannot be moved between two sets of data.",
            where=density.described.where,
            fix="start anew: cp.infer(density, key, …).",
        )


def _with_density(result: Result, before: AnnealedDensity | None) -> Result:
    """Return the result with its density, which a result from a file lacks; refuse one
    that cannot be its own."""
    if before is None:
        if result.density is None:
            raise _no_density()
        return result
    if result.density is not None:
        raise InvalidValueError(
            "before= is the density of a result that was read from a file, and this "
            "one has its own.",
            fix="leave it out.",
        )
    if not isinstance(before, AnnealedDensity):
        raise WrongTypeError(
            f"before= is a compiled density; got {type(before).__name__}.",
            fix="compile the program with the data of the result: "
            "before=cp.compile(program, …).",
        )
    for name, site in before.sites.items():
        found = "no such samples"
        if name in result.samples:
            shape = result.drawn(name).shape[2:]
            if shape == site.shape:
                continue
            found = f"samples of the shape {shape}"
        raise ShapeError(
            f"before= has the site {name!r} of shape {site.shape}, and the result has "
            f"{found}.",
            where=before.described.where,
            fix="compile the program with the data that the result had.",
        )
    return dataclasses.replace(result, density=before)


def _no_density() -> CapabilityError:
    """Return the error for a result from a file without its density."""
    return CapabilityError(
        "This result was read from a file, and has no density to be extended.",
        fix="compile the program with the data that the result had, and pass it: "
        "extend(density, key, before=cp.compile(program, …)).",
    )


class Extension:
    """The stages in which further data come in.

    Attributes:
        population: the chains.
        exponent: γ.
        gains: log π'/π of each chain.
        moves: blocks of moves so far.
        acceptance: of each move across modes, the mean over chains.
        untracked: π' with constant exponents.
    """

    def __init__(
        self,
        result: Result,
        before: AnnealedDensity,
        density: AnnealedDensity,
        key: Array,
        change: Change,
        execution: Execution,
    ):
        chunk = execution.chunk
        self.population = Population.of_result(result, density, key, chunk)
        self.change = change
        self.bars = Progress(enabled=execution.progress)
        shapes = None
        if change.grows:
            shapes = tuple((name, site.shape) for name, site in before.sites.items())
        self.density = density
        self.before = before
        # Exponents that grow by what chains carry lead to the same level 0 as constant
        # ones; between two densities nothing could be compiled again without them.
        self.untracked = density.untracked()
        self.between = Between(
            before.untracked().evaluator,
            self.untracked.evaluator,
            jnp.zeros(()),
            shapes,
        )
        self.exponent = 0.0
        self.layout = Layout.of_density(density)
        self.moves = 0
        self.acceptance: list[float] = []
        self.drift: float | None = None  # after the last warm-up
        self.gains = self.gained(self.population.points)

    def gained(self, points: Array) -> Float[np.ndarray, " chains"]:
        """Return the gains at points; −∞ of chains that are lost."""
        self.population.evaluations += 1
        chunk = self.population.chunk
        gains = np.asarray(_gains(self.between, self.density, points, chunk), float)
        return np.where(np.isnan(gains), -np.inf, gains)

    def finished(self, result: Result) -> Result:
        """Bring everything in; return the result."""
        population = self.population
        if not self.proposed_near_data():
            population.bring_in(self.gains, self.moved)
        if result.log_evidence is None and _has_no_data(self.before):
            result = dataclasses.replace(
                result, log_evidence=0.0, log_evidence_error=0.0
            )
        error = math.sqrt(population.variance)
        reason = result.reason
        times = ""
        number = result.about.extensions + 1
        if number > 1:
            reason = result.about.extended_from
            times = f"{number} times, the last "
        note = (
            f"extended {times}by {self.change.text}, log p "
            f"{population.log_evidence:.4g} ± {error:.2g}, with {self.moves} blocks of "
            "moves"
        )
        facts: dict[str, Any] = {"extensions": number, "extended_from": reason}
        if self.acceptance:
            accepted = float(np.mean(self.acceptance))
            facts["global_acceptance"] = accepted
            note += f" ({accepted:.2g} accepted)"
        findings: list[Finding] = []
        if self.drift is not None:
            findings = DRIFT.findings(self.drift)
        return population.result(
            result, self.density, findings, note, reason, self.drift, **facts
        )

    def proposed_near_data(self) -> bool:
        """Propose new latents near their data, where too few of those from the priors
        count; return whether enough of the proposals do, and have come in."""
        population = self.population
        if not self.change.grows:
            return False
        new = new_entries(self.density, self.before)
        if len(new) > tuning.NEW_LATENTS.most_numbers:
            return False
        counting = tuning.REWARD.counting
        if next_increment(self.gains, 1.0, population.log_weights) == 1.0:
            return False  # those from the priors do
        points, of_proposals = proposed(
            self.between.logs,
            self.density,
            new,
            population.random_words(),
            population.points,
            population.chunk,
        )
        population.evaluations += evaluations(new)
        log_weights = np.asarray(of_proposals, float)
        log_weights = np.where(np.isnan(log_weights), -np.inf, log_weights)
        worth = relative_ess(jnp.asarray(population.log_weights + log_weights))
        if not float(worth) >= tuning.NEW_LATENTS.counting:
            return False
        population.points = points
        population.weigh(log_weights)
        if population.ess < counting:
            self.moved(1.0, population.resample())
        return True

    def moved(
        self, exponent: float, chosen: Int[np.ndarray, " chains"]
    ) -> Float[np.ndarray, " chains"]:
        """Move chains that were resampled under π^(1−γ)·π'^γ, noised sites by a
        `GlobalMover`, programs with latents by a warm-up; return their gains."""
        self.exponent = exponent
        self.moves += 1
        if self.layout.dims:
            self.move_noised()
        if self.layout.size > self.layout.dims:
            self.warm_up()
        self.gains = self.gained(self.population.points)
        return self.gains

    def report(self, doing: str) -> None:
        """Show what is done, and how much of the data has come in."""
        percent = round(100 * self.exponent)
        self.bars.show("extension", 100, percent, doing, moves=self.moves)

    def target(self) -> AnnealedDensity:
        """Return π^(1−γ)·π'^γ as a density."""
        exponent = jnp.asarray(self.exponent, jnp.result_type(float))
        between = eqx.tree_at(lambda b: b.exponent, self.between, exponent)
        evaluator: Any = between  # its other methods are set above
        return dataclasses.replace(self.untracked, evaluator=evaluator)

    def move_noised(self) -> None:
        """Move noised sites across modes: by proposals for the target itself, or by
        scores alone by those for π, weighed by what is new."""
        population = self.population
        by_values = "energy" in self.density.capabilities
        population.density = self.target()
        exponent = 0.0
        if not by_values and self.exponent == 1:
            population.density = self.density
        elif not by_values:
            population.density = self.before
            exponent = self.exponent
        mover = GlobalMover(population)
        gains = self.gains
        if exponent:
            gains = self.gained(population.points)
        proposed = gains

        def log_gain(states: KernelState) -> Float[np.ndarray, " chains"]:
            nonlocal proposed
            if not exponent:
                return np.zeros(len(population))
            proposed = self.gained(states.position)
            return exponent * (proposed - gains)

        self.report("moving noised sites")
        for _ in range(tuning.REWARD.most_moves):
            moved, accepted = mover.move(log_gain)
            self.acceptance.append(accepted)
            gains = np.where(moved, proposed, gains)
            if np.mean(mover.renewed) >= 1 - tuning.REWARD.remembered:
                break
        population.density = self.density
        population.renew(mover.renewed)

    def warm_up(self) -> None:
        """Move all sites by `WarmUp`, until they have forgotten where they began."""
        population = self.population
        target = self.target()
        finisher = WarmUp()
        points = np.asarray(population.points)
        trail = Trail(points, np.asarray(population.ancestors))
        drift = 1.0
        while trail.rounds < finisher.rounds:
            if trail.rounds >= finisher.fewest_rounds and drift == 0:
                break
            self.report("warming up")
            fitted = finisher.adapt(points, target)
            words = population.random_words()
            population.points = _warmed(
                target, fitted, words, population.points, population.chunk
            )
            points = np.asarray(population.points)
            trail.add(points)
            population.evaluations += finisher.evaluations(fitted)
            drift = finisher.drift(trail, target, False)
        if drift == 0 and not self.layout.dims:
            population.renew(np.ones(len(population), bool))
        self.drift = drift


def _has_no_data(density: AnnealedDensity) -> bool:
    """Return whether a density is a normalised prior of NumPyro's latents: without
    data, or with data that are all awaited."""
    if any(site.kind != "static" for site in density.sites.values()):
        return False
    observed = density.observed()
    if len(observed) < len(density.graph.observations):  # some is soft evidence
        return False
    return all(np.isnan(np.asarray(value)).all() for value in observed.values())


def _warmed(
    density: AnnealedDensity,
    fitted: Transitions,
    words: Array,
    points: Array,
    chunk: int | None,
) -> Array:
    """Return points after a round of `WarmUp`."""
    visits = Visits.every(0, density.num_levels)
    run = begin(jax.random.key(0), len(points), visits)
    spread = Spread.checked(None, chunk, len(points))
    run = placed(dataclasses.replace(run, words=words), spread)
    return _round_of_warm_up(run, density, fitted, points)


@eqx.filter_jit
def _round_of_warm_up(
    run: Run, density: AnnealedDensity, fitted: Transitions, points: Array
) -> Array:
    layout = Layout.of_density(density)

    def evaluated(v: Array) -> Particles:
        return Particles(v, layout.evaluate(density, v, 0, terms=False))

    chains = run.spread.map(evaluated, run.spread.padded(points))
    run = dataclasses.replace(run, chains=chains)
    moved = WarmUp().move(run, density, fitted, jnp.int32(0))
    return run.spread.cut(moved.chains.position)


@eqx.filter_jit
def _gains(
    between: Between, density: AnnealedDensity, points: Array, chunk: int | None
) -> Array:
    layout = Layout.of_density(density)
    alpha = density.schedule.at(0).alpha

    def of_chain(v: Array) -> Array:
        return between.logs(layout.position(v, alpha)).gain

    return over_chains(of_chain, chunk)(points)


# Results know no samplers: those that were read from a file go on by it.
Result._extends = staticmethod(extended)
