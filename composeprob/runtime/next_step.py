r"""A result that goes on with the next noised site of a Markov chain: particle filters.

A step's density π(z, x) = p(z)·f(x | z)·p(y | x) has sites z that an earlier result
gives, such as the state before, and noised sites x that are new. Each chain keeps its z
and draws x by the reverse steps of its own factor from noise alone. The weight of these
steps is of expectation ∫f(x | z)·p(y | x) dx, so that

$$\hat p(y_{t+1} \mid y_{1:t}) = \sum_i W_i\, w_i$$

is that of a particle filter. Where fewer than half of the chains count, these are
resampled, and propose x once more: accepted by the ratio of weights, which leaves π
given z invariant (particle independent Metropolis–Hastings). Where fewer than a tenth
count, the datum comes in by powers γ of p(y | x), between which x goes up to a level of
noise and down again by reverse steps of f (`Renoise`), given its z.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from composeprob import tuning
from composeprob.arguments import check_count
from composeprob.density.annealed import AnnealedDensity
from composeprob.errors import (
    CapabilityError,
    DoublyIntractableError,
    InvalidValueError,
    ShapeError,
    WrongTypeError,
)
from composeprob.kernels import KernelState
from composeprob.results.result import Result
from composeprob.runtime.population import (
    Execution,
    GlobalMover,
    Population,
    decided,
    over_chains,
)
from composeprob.samplers.layout import Layout
from composeprob.samplers.renoise import (
    Ladder,
    Renoising,
    ladder_of,
    least_narrowing,
)
from composeprob.samplers.resampling import relative_ess


class Steps(NamedTuple):
    """The steps that a result has gone so far.

    Attributes:
        number: how many there were.
        parents: for each of the last ones, the chain of the step before that each chain
            descends from, (N,).
    """

    number: int = 0
    parents: tuple[Int[np.ndarray, " chains"], ...] = ()

    def onwards(
        self, parents: Int[np.ndarray, " chains"], keep: int | None
    ) -> tuple[Steps, Int[np.ndarray, " chains"] | None]:
        """Add a step; return the steps, and the ancestors of the chains ``keep`` steps
        ago, or None where those of the first run still count: without a lag, and before
        so many steps."""
        if keep is None:
            return Steps(self.number + 1), None
        kept = (*self.parents, parents)[-keep:]
        steps = Steps(self.number + 1, kept)
        if len(kept) < keep:
            return steps, None
        ancestors = np.arange(len(parents))
        for of_step in reversed(kept):
            ancestors = of_step[ancestors]
        return steps, ancestors


def check_not_given(density: AnnealedDensity) -> None:
    """Refuse a run of its own of a density whose latents an earlier result gives."""
    given = [name for name, site in density.sites.items() if site.kind == "given"]
    if not given:
        return
    entries = ", ".join(f"{name!r}: …" for name in given)
    raise DoublyIntractableError(
        f"A factor depends on {', '.join(map(repr, given))}, and data on its site: no "
        "chain can be moved there.",
        where=density.described.where,
        fix="take the samples of an earlier result: result = earlier.extend(density, "
        f"key, given={{{entries}}}), with the names of its sites.",
    )


def stepped(
    result: Result,
    density: AnnealedDensity,
    key: Array,
    given: dict[str, str],
    keep: int | None,
    steps: Steps,
    execution: Execution,
) -> tuple[Result, Steps]:
    """Return a result at the next step, and the steps so far.

    Args:
        result: of the step before.
        density: of the next step.
        key: a random key.
        given: the site of the result whose values each site of the density takes.
        keep: steps back over which errors look; None for all.
        steps: those that led to the result.
        execution: of the run that they began with.
    """
    if keep is not None:
        check_count(keep, "keep")
    _check_sites(result, density, given)
    _check_normalised(density)
    # Rates of exponents that grow lack what only weighted chains carry.
    density = density.untracked()
    step = NextStep(result, density, key, given, execution.chunk)
    step.advance()
    steps, ancestors = steps.onwards(step.parents, keep)
    if ancestors is not None:
        step.population.ancestors = ancestors
        # The repetition's weights are those of the chains of the first run.
        step.population.repeated = None
    return step.finished(result, density, steps, keep), steps


class Draw(NamedTuple):
    """Draws of the new sites of all chains.

    Attributes:
        states: the chains with them, evaluated with their terms.
        log_steps: log-weights of the reverse steps that drew them.
        log_likelihood: log p(y | x) of the data that these steps did not see.
    """

    states: KernelState
    log_steps: Float[np.ndarray, " chains"]
    log_likelihood: Float[np.ndarray, " chains"]

    @property
    def log_weights(self) -> Float[np.ndarray, " chains"]:
        """log w of each draw."""
        return self.log_steps + self.log_likelihood


class NextStep:
    """The stages of a step.

    Attributes:
        population: the chains.
        parents: the chain of the step before that each descends from.
        ladder: the levels that the reverse steps visit.
        drawn: the first draws.
        mover: moves between powers of the data; None where these are not far.
        acceptance: of each move, the mean over chains.
    """

    def __init__(
        self,
        result: Result,
        density: AnnealedDensity,
        key: Array,
        given: dict[str, str],
        chunk: int | None,
    ):
        values = _values(result, density, given)
        self.population = Population.with_values(result, density, values, key, chunk)
        self.parents = np.arange(len(self.population))
        self.ladder = self._narrowed()
        self.drawn = self._draw()
        self.mover: GlobalMover | None = None
        self.acceptance: list[float] = []

    def advance(self) -> None:
        """Weigh the chains by their draws, and resample and move them where few
        count."""
        population = self.population
        drawn = self.drawn
        population.points = drawn.states.position
        worth = relative_ess(jnp.asarray(population.log_weights + drawn.log_weights))
        if float(worth) < tuning.NEXT_STEP.far:
            population.bring_in(drawn.log_likelihood, self._moved, drawn.log_steps)
            return
        population.weigh(drawn.log_weights)
        if not population.excluded and population.ess < tuning.REWARD.counting:
            self._propose_once_more(population.resample())

    def _moved(
        self, exponent: float, chosen: Int[np.ndarray, " chains"]
    ) -> Float[np.ndarray, " chains"]:
        """Move the new sites of chains that were resampled, under a power of the data,
        so that copies differ; return their log-likelihoods."""
        self.parents = self.parents[chosen]
        if self.mover is None:
            self.mover = GlobalMover(self.population, frozen=True)
        else:
            self.mover.choose(chosen)
        mover = self.mover

        def log_gain(states: KernelState) -> Float[np.ndarray, " chains"]:
            # The ratio of a move has the data without their power. Where a proposal
            # excludes them, it is rejected anyway.
            change = _log_likelihood(states) - _log_likelihood(mover.states)
            return np.where(np.isfinite(change), (exponent - 1) * change, 0.0)

        for _ in range(tuning.REWARD.moves):
            _, accepted = mover.move(log_gain)
            self.acceptance.append(accepted)
        return _log_likelihood(mover.states)

    def _propose_once_more(self, chosen: Int[np.ndarray, " chains"]) -> None:
        """Propose to chains that were resampled draws from noise alone, accepted by the
        ratio of weights, so that copies differ."""
        population = self.population
        self.parents = self.parents[chosen]
        states = jax.tree.map(lambda leaf: leaf[chosen], self.drawn.states)
        log_weights = self.drawn.log_weights[chosen]
        proposed = self._draw()
        log_ratio = jnp.asarray(proposed.log_weights - log_weights)
        words = population.random_words()
        moved, _, accepted = decided(words, proposed.states, states, log_ratio)
        population.points = moved.position
        self.acceptance.append(float(accepted))

    def _draw(self) -> Draw:
        """Draw the new sites of all chains."""
        population = self.population
        states, log_weights = _fallen(
            population.density,
            self.ladder,
            population.random_words(),
            population.points,
            population.chunk,
        )
        population.evaluations += len(self.ladder.levels)
        log_likelihood = _log_likelihood(states)
        log_steps = np.asarray(log_weights, float) - log_likelihood
        # A chain that left the numbers that there are counts as lost.
        lost = ~np.isfinite(log_steps)
        log_likelihood = np.where(lost, -np.inf, log_likelihood)
        return Draw(states, np.where(lost, 0.0, log_steps), log_likelihood)

    def _narrowed(self) -> Ladder:
        """Return the rungs with the widths of reverse steps, which pilots measure."""
        population = self.population
        density = population.density
        some = population.points[: tuning.RENOISE.pilots]
        words = population.random_words()[: len(some)]
        # Without a width to go by, the first pilots take the narrowest steps.
        ladder, _ = ladder_of(np.asarray(some), density)
        log_snr = np.asarray(density.schedule.log_snr, np.float64)
        s = np.exp(-log_snr[np.asarray(ladder.levels)])
        narrowest = jnp.asarray(least_narrowing(s))[:, None]
        widths = ladder.narrowing
        assert widths is not None  # of a population it is measured
        narrowing = jnp.broadcast_to(narrowest, widths.shape)
        ladder = eqx.tree_at(
            lambda ladder: ladder.narrowing,
            ladder,
            narrowing.astype(widths.dtype),
        )
        for _ in range(tuning.NEXT_STEP.pilots):
            states, _ = _fallen(density, ladder, words, some, None)
            ladder, _ = ladder_of(np.asarray(states.position), density)
        share = len(some) / len(population)
        spent = 1 + 2 * tuning.NEXT_STEP.pilots
        population.evaluations += math.ceil(spent * share * len(ladder.levels))
        return ladder

    def finished(
        self, result: Result, density: AnnealedDensity, steps: Steps, keep: int | None
    ) -> Result:
        """Return the result of the step."""
        population = self.population
        # Those of the step before are computed now, so that a series of steps does not
        # keep all samples for them.
        _ = result.status
        _ = result.log_evidence_error
        names = [name for name, site in density.sites.items() if site.kind == "noised"]
        error = math.sqrt(population.variance)
        lag = ""
        if keep is not None:
            lag = f", errors by ancestors {keep} steps back"
        note = (
            f"extended by {steps.number} steps of {', '.join(names)}, the last with "
            f"log p {population.log_evidence:.4g} ± {error:.2g} and "
            f"{moves_in_words(self.acceptance)}{lag}"
        )
        reason = result.reason
        if result.about.steps:
            # Older files do not have it.
            reason = result.about.extended_from or reason
        facts: dict[str, Any] = {"steps": steps.number, "extended_from": reason}
        if self.acceptance:
            facts["global_acceptance"] = float(np.mean(self.acceptance))
        return population.result(result, density, [], note, reason, **facts)


def moves_in_words(acceptance: list[float]) -> str:
    """Return the number of moves, and the share of proposals that they accepted."""
    text = f"{len(acceptance)} moves"
    if not acceptance:
        return text
    return f"{text} ({np.mean(acceptance):.2g} accepted)"


def _log_likelihood(states: KernelState) -> Float[np.ndarray, " chains"]:
    """Return log p(y | x), which reverse steps do not see, of evaluated chains."""
    potential = np.asarray(states.evaluation.terms.log_potential, float)
    return np.where(np.isnan(potential), -np.inf, potential)


def _values(
    result: Result, density: AnnealedDensity, given: dict[str, str]
) -> dict[str, Array]:
    """Return the values of all sites: those that are given, and zeros of new ones."""
    before = result.density
    assert before is not None
    alpha = before.schedule.at(0).alpha
    number = len(result.log_weights)
    values = {}
    for name, site in density.sites.items():
        if name not in given:
            values[name] = jnp.zeros((number, *site.shape))
            continue
        source = given[name]
        value = jnp.asarray(result.drawn(source)[:, -1])
        if source in before.sites and before.sites[source].kind == "noised":
            # As statements see it, x/α.
            value = value / alpha
        values[name] = value
    return values


def _check_sites(
    result: Result, density: AnnealedDensity, given: dict[str, str]
) -> None:
    """Refuse sites that are neither noised nor given, and given values that the result
    does not have."""
    if not isinstance(given, dict) or not given:
        raise WrongTypeError(
            f"given={given!r} is not a dict of sites.",
            fix="name the site of the result whose samples each site of the density "
            "takes: given={'past': 'x'}.",
        )
    for name, source in given.items():
        if name not in density.sites or density.sites[name].kind == "noised":
            static = [n for n, s in density.sites.items() if s.kind != "noised"]
            raise InvalidValueError(
                f"given has {name!r}, which is not a latent of NumPyro's in this "
                f"density; it has {static}.",
                where=density.described.where,
                fix="write the site as past = cp.sample('past', distribution), of "
                "which only the shape counts.",
            )
        if source not in result.samples:
            raise InvalidValueError(
                f"given takes {name!r} from {source!r}, which is not a site of the "
                f"result; it has {sorted(result.samples)}.",
                fix="name one of these sites.",
            )
        shape = result.drawn(source).shape[2:]
        if shape != density.sites[name].shape:
            raise ShapeError(
                f"{name!r} has the shape {density.sites[name].shape}, and {source!r} "
                f"of the result {shape}.",
                where=density.described.where,
                fix="give both the shape of one chain.",
            )
    for name, site in density.sites.items():
        if name not in given and site.kind != "noised":
            raise CapabilityError(
                f"The latent {name!r} is new in this step, and only noised sites are "
                "proposed.",
                where=density.described.where,
                fix=f"write {name!r} in the first program, and pass it on by "
                f"given={{{name!r}: {name!r}, …}}; or sample it from a cp.Analytic.",
            )
    if all(name in given for name in density.sites):
        raise InvalidValueError(
            "Every site of this density is given, so that no step is left.",
            where=density.described.where,
            fix="leave out of given what is new: the noised site of the next step.",
        )


def _check_normalised(density: AnnealedDensity) -> None:
    """Refuse new sites whose factors have an unknown normaliser, or no weights."""
    described = density.described
    if described.rewards:
        raise CapabilityError(
            "This step contains a reward, whose weights a step cannot take.",
            where=described.where,
            fix="add it by the last program, under cp.infer.",
        )
    if "energy" in density.capabilities and not density.top.normalised:
        raise CapabilityError(
            "The factors of the new site have a log-density without its constant, so "
            "that the weights of steps are unknown.",
            where=described.where,
            fix="use one model with a parameterization of scores, such as 'epsilon', "
            "or closed forms.",
        )


@eqx.filter_jit
def _fallen(
    density: AnnealedDensity,
    ladder: Ladder,
    words: Array,
    points: Array,
    chunk: int | None,
) -> tuple[KernelState, Array]:
    renoising = Renoising(density, Layout.of_density(density), ladder)
    return over_chains(renoising.draw_from_noise, chunk)(words, points)
