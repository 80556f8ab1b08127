r"""Rewards of a program: criteria on the host, added to the samples of the rest.

A run samples the program without its rewards. Then the exponent γ of exp(γ·Σ λ_i·R_i)
goes from 0 to 1 at level 0: each stage adds the most under which half of the chains
count, resamples, and moves the chains by draws from fitted mixtures or by renoising,
whose accept test asks for the rewards of the proposals. Weights telescope to
exp(Σ λ_i·R_i), so that the stages have no error of their own.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import numpy as np
from jax import Array
from jaxtyping import Float, Shaped
from scipy.special import logsumexp

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.reward import SiteReward
from composeprob.errors import (
    CapabilityError,
    InvalidValueError,
    ProgramError,
    ShapeError,
)
from composeprob.findings import Code, Finding
from composeprob.kernels import KernelState
from composeprob.results.result import Result
from composeprob.runtime.population import GlobalMover, Population, next_increment
from composeprob.runtime.progress import Progress
from composeprob.samplers.layout import Layout

Events = Shaped[np.ndarray, "n *event"]


class Criterion:
    """The function of one reward, asked for each event once.

    Attributes:
        asked: number of events that it was asked for.
    """

    def __init__(self, stated: SiteReward):
        self.stated = stated
        self.asked = 0
        self._values: dict[bytes, float] = {}

    def __call__(self, events: Events) -> Float[np.ndarray, " n"]:
        """Return λ·R of events."""
        digests = []
        for event in events:
            digests.append(hashlib.blake2b(event.tobytes(), digest_size=16).digest())
        new = {}
        for i, digest in enumerate(digests):
            if digest not in self._values and digest not in new:
                new[digest] = i
        if new:
            answers = self._ask(events[list(new.values())])
            self._values.update(zip(new, answers.tolist(), strict=True))
        values = [self._values[digest] for digest in digests]
        return self.stated.reward.scale * np.asarray(values, float)

    def _ask(self, events: Events) -> Float[np.ndarray, " n"]:
        """Return the answers of the function; refuse those that are no rewards."""
        self.asked += len(events)
        try:
            answers = np.asarray(self.stated.reward.fn(events), float)
        except Exception as error:
            raise self._failed(events, error) from error
        if answers.shape != (len(events),):
            raise ShapeError(
                f"{self._name} returned shape {answers.shape} for {len(events)} "
                "events.",
                where=self.stated.where,
                fix=f"it gets a batch {events.shape}, and returns one number for each "
                f"event: ({len(events)},).",
            )
        bad = np.isnan(answers) | np.isposinf(answers)
        if bad.any():
            first = int(np.argmax(bad))
            raise InvalidValueError(
                f"{self._name} is {answers[first]} for the event "
                f"{_shown(events[first])}.",
                where=self.stated.where,
                fix="return −np.inf where an event is impossible, and a finite number "
                "elsewhere.",
            )
        return answers

    def _failed(self, events: Events, error: Exception) -> ProgramError:
        """Return the error for an exception of the function, with an event that raises
        it alone."""
        culprit = "no event of the batch raises it alone"
        for event in events:
            try:
                self.stated.reward.fn(event[None])
            except Exception:
                culprit = f"as for the event {_shown(event)} alone"
                break
        return ProgramError(
            f"{self._name} raised {type(error).__name__}: {error} ({culprit}).",
            where=self.stated.where,
            fix=f"let it take a NumPy array {events.shape} of any events of the site, "
            "and return −np.inf where one is impossible.",
        )

    @property
    def _name(self) -> str:
        return f"The reward {self.stated.name!r} at site {self.stated.site!r}"


def _shown(event: np.ndarray) -> str:
    return np.array2string(np.asarray(event), precision=4, threshold=8)


def check_rewards(density: AnnealedDensity, draws: int | None) -> None:
    """Refuse draws of a program with rewards, and a density whose chains could not be
    moved."""
    if not density.described.rewards:
        return
    name = density.described.rewards[0].name
    if draws is not None:
        raise CapabilityError(
            f"Draws at level 0 do not know the reward {name!r}.",
            where=density.described.where,
            fix="leave draws= out, and take more chains.",
        )
    known = not {"energy", "feynman_kac"}.isdisjoint(density.capabilities)
    if density.num_levels > 1 and known:
        return
    raise CapabilityError(
        f"The reward {name!r} needs levels of noise, and a log-density or a "
        "Feynman–Kac rate of the rest.",
        where=density.described.where,
        fix="write the criterion in JAX, as cp.factor(name, log_weight).",
    )


def with_rewards(
    result: Result, key: Array, chunk: int | None, progress: bool
) -> Result:
    """Return the result with the rewards of its program added; the result itself where
    there are none, or where it did not arrive at level 0.

    Args:
        result: of the program without its rewards.
        key: the run's.
        chunk: chains that are evaluated at once.
        progress: whether to show a progress bar.
    """
    density = result.density
    if density is None or not density.described.rewards:
        return result
    if result.status.has(Code.INTERRUPTED):
        return result
    population = Population.of_result(result, density, key, chunk)
    bars = Progress(enabled=progress)
    try:
        return Stages(population, density, bars).finished(result)
    finally:
        bars.close()


class Predicted(NamedTuple):
    r"""The mean of w = exp(Δγ·Σ λ_i·R_i) after a stage, as the weights before it
    predict it:

    $$\operatorname{E}_{\gamma + \Delta\gamma}[w] =
      \frac{\operatorname{E}_\gamma[w^2]}{\operatorname{E}_\gamma[w]}.$$

    Attributes:
        log_mean: its logarithm.
        error: of that logarithm and of the mean of as many samples after the stage.
    """

    log_mean: float
    error: float

    @classmethod
    def by_weights(
        cls, before: Float[np.ndarray, " chains"], log_w: Float[np.ndarray, " chains"]
    ) -> Predicted:
        """Return what samples say.

        Args:
            before: their log-weights.
            log_w: log w at each.
        """
        once = before + log_w
        twice = once + log_w
        log_mean = float(logsumexp(twice) - logsumexp(once))
        shares = np.exp(once - logsumexp(once))
        relative = np.exp(log_w - log_mean) - 1
        of_prediction = np.sum((shares * relative) ** 2)
        of_samples = np.sum(shares * relative**2) / len(shares)
        return cls(log_mean, math.sqrt(of_prediction + of_samples))

    def excess(self, log_w: Float[np.ndarray, " chains"]) -> float:
        """Return by how much the logarithm of the mean of w over samples exceeds the
        prediction, 0 where chance may have done it."""
        log_mean = float(logsumexp(log_w)) - math.log(len(log_w))
        found = log_mean - self.log_mean
        by_chance = tuning.REWARD.by_chance * self.error
        return found if found > max(by_chance, tuning.REWARD.least_excess) else 0.0


class Stages:
    """The stages in which rewards come in.

    Attributes:
        exponent: γ.
        rewards: Σ λ_i·R_i of each chain.
        calls: events asked for, for each chain.
        excess: the most by which the moves of a stage raised the logarithm of the mean
            of exp(Δγ·Σ λ_i·R_i) above what its weights predict.
    """

    def __init__(
        self, population: Population, density: AnnealedDensity, bars: Progress
    ):
        self.population = population
        self.bars = bars
        self.criteria = [Criterion(stated) for stated in density.described.rewards]
        limits = []
        for stated in density.described.rewards:
            limits.append(stated.reward.calls or tuning.REWARD.calls)
        self.limit = min(limits)
        self.calls = 1
        self.exponent = 0.0
        self.layout = Layout.of_density(density)
        self.alpha = float(np.asarray(density.schedule.alpha)[0])
        self.rewards = self.asked(population.points)
        self.mover = GlobalMover(population)
        self.acceptance: list[float] = []
        self.stages = 0
        self.interrupted = False
        self.excess = 0.0

    def asked(self, points: Array) -> Float[np.ndarray, " chains"]:
        """Return Σ λ_i·R_i of points."""
        positions = self.layout.position(points, self.alpha)
        total = np.zeros(len(points))
        for criterion in self.criteria:
            total = total + criterion(np.asarray(positions[criterion.stated.site]))
        return total

    def finished(self, before: Result) -> Result:
        """Go through all stages; return the result."""
        try:
            while self.exponent < 1 and self.calls < self.limit:
                if not np.isfinite(self.rewards).any():
                    break
                step, predicted = self.raised()
                number = tuning.REWARD.moves
                if self.exponent == 1:
                    number = self.limit
                self.move(number)
                excess = predicted.excess(step * self.rewards)
                self.excess = max(self.excess, excess)
        except KeyboardInterrupt:
            self.interrupted = True
        population = self.population
        if self.exponent == 1:
            population.renew(self.mover.renewed)
        names = ", ".join(repr(each.stated.name) for each in self.criteria)
        note = (
            f"then the reward {names} came in by {self.stages} stages, with "
            f"{self.calls - 1} global moves"
        )
        density = before.density
        assert density is not None
        calls = {}
        for criterion in self.criteria:
            calls[criterion.stated.name] = -(-criterion.asked // len(population))
        accepted = before.about.global_acceptance
        if self.acceptance:
            accepted = float(np.mean(self.acceptance))
        return population.result(
            before,
            density,
            self.findings(names),
            note,
            calls=calls,
            global_acceptance=accepted,
        )

    def raised(self) -> tuple[float, Predicted]:
        """Raise the exponent, and resample; return Δγ, and the mean of the weights
        that is to be expected after moves."""
        if self.stages:
            self.population.renew(self.mover.renewed)
        weighed = self.population.log_weights
        step = next_increment(self.rewards, 1 - self.exponent, weighed)
        predicted = Predicted.by_weights(weighed, step * self.rewards)
        self.population.weigh(step * self.rewards)
        chosen = self.population.resample()
        self.rewards = self.rewards[chosen]
        self.mover.choose(chosen)
        self.exponent = min(self.exponent + step, 1.0)
        if self.exponent > 1 - 1e-6:
            self.exponent = 1.0
        self.stages += 1
        return step, predicted

    def move(self, number: int) -> None:
        """Move the chains, at most ``number`` times and within the calls, until nearly
        all have forgotten where they began."""
        forgotten = 1 - tuning.REWARD.remembered
        for _ in range(number):
            if self.calls >= self.limit or np.mean(self.mover.renewed) >= forgotten:
                return
            proposed = np.zeros(0)

            def log_gain(states: KernelState) -> Float[np.ndarray, " chains"]:
                nonlocal proposed
                proposed = self.asked(states.position)
                return self.exponent * (proposed - self.rewards)

            moved, acceptance = self.mover.move(log_gain)
            self.rewards = np.where(moved, proposed, self.rewards)
            self.calls += 1
            self.acceptance.append(acceptance)
            self.bars.show(
                "reward",
                self.limit,
                self.calls,
                exponent=self.exponent,
                acceptance=acceptance,
            )

    def findings(self, names: str) -> list[Finding]:
        """Return what went wrong."""
        if self.interrupted:
            text = (
                f"Stopped while the reward {names} came in, at {self.exponent:.0%} of "
                "its exponent."
            )
            return [Finding(Code.INTERRUPTED, text, True)]
        if not np.isfinite(self.rewards).any():
            text = (
                f"The reward {names} is −inf for every chain, which are samples of the "
                "rest. Let it tell how far an event is from being possible."
            )
            return [Finding(Code.ZERO_DENSITY, text, True)]
        if self.exponent < 1:
            text = (
                f"The reward {names} had come in by {self.exponent:.0%} of its "
                f"exponent when its {self.limit} calls a chain were used. Give it "
                "more, cp.Reward(fn, calls=…), or a smaller scale."
            )
            return [Finding(Code.WEIGHTS_COLLAPSED, text, True)]
        if self.excess:
            text = (
                f"Moves found places where the reward {names} is higher than at the "
                "chains that its weights were made of: the mean weight is "
                f"{math.exp(min(self.excess, 700.0)):.3g} times what these predict. So "
                "too few samples are there, and log Z lacks these places. Take more "
                "chains, or let the reward rise towards these places."
            )
            return [Finding(Code.MODES_UNREACHED, text, True)]
        return []
