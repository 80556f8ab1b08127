r"""A result that goes on with the next noised site of a Markov chain: particle filters.

A step's density π(z, x) = p(z)·f(x | z)·p(y | x) has sites z that an earlier result
gives, such as the state before, and noised sites x that are new. Each chain keeps its z
and draws x by the reverse steps of its own factor from noise alone. The weight of these
steps is of expectation ∫f(x | z)·p(y | x) dx, so that

$$\hat p(y_{t+1} \mid y_{1:t}) = \sum_i W_i\, w_i$$

is that of a particle filter. Where fewer than half of the chains count, these are
resampled, and propose x once more: accepted by the ratio of weights, which leaves π
given z invariant (particle independent Metropolis–Hastings).
"""

from __future__ import annotations

import math
from typing import NamedTuple

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
from composeprob.runtime.population import Population, decided, over_chains
from composeprob.samplers.layout import Layout
from composeprob.samplers.renoise import (
    Ladder,
    Renoising,
    ladder_of,
    least_narrowing,
)


class Steps(NamedTuple):
    """The steps that a result has gone so far.

    Attributes:
        reason: of the run that they began with.
        number: how many there were.
        parents: for each of the last ones, the chain of the step before that each chain
            descends from, (N,).
    """

    reason: str
    number: int = 0
    parents: tuple[Int[np.ndarray, " chains"], ...] = ()

    def onwards(
        self, parents: Int[np.ndarray, " chains"], keep: int | None
    ) -> tuple[Steps, Int[np.ndarray, " chains"] | None]:
        """Add a step; return the steps, and the ancestors of the chains ``keep`` steps
        ago, or None where those of the first run still count: without a lag, and before
        so many steps."""
        if keep is None:
            return Steps(self.reason, self.number + 1), None
        kept = (*self.parents, parents)[-keep:]
        steps = Steps(self.reason, self.number + 1, kept)
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
) -> tuple[Result, Steps]:
    """Return a result at the next step, and the steps so far.

    Args:
        result: of the step before.
        density: of the next step.
        key: a random key.
        given: the site of the result whose values each site of the density takes.
        keep: steps back over which errors look; None for all.
        steps: those that led to the result.
    """
    if keep is not None:
        check_count(keep, "keep")
    _check_sites(result, density, given)
    _check_normalised(density)
    # Rates of exponents that grow lack what only weighted chains carry.
    density = density.untracked()
    step = NextStep(result, density, key, given)
    step.advance()
    steps, ancestors = steps.onwards(step.parents, keep)
    if ancestors is not None:
        step.population.ancestors = ancestors
        # The repetition's weights are those of the chains of the first run.
        step.population.repeated = None
    return step.finished(result, density, steps, keep), steps


class NextStep:
    """The stages of a step.

    Attributes:
        population: the chains.
        parents: the chain of the step before that each descends from.
        ladder: the levels that the reverse steps visit.
        log_weights: log w of each chain's draw.
    """

    def __init__(
        self,
        result: Result,
        density: AnnealedDensity,
        key: Array,
        given: dict[str, str],
    ):
        values = _values(result, density, given)
        self.population = Population.with_values(result, density, values, key, None)
        self.parents = np.arange(len(self.population))
        self.ladder = self._narrowed()
        self.moves = 0

    def advance(self) -> None:
        """Draw the new sites, weigh the chains, and resample and move them where few
        count."""
        population = self.population
        states, log_weights = self._drawn()
        population.points = states.position
        population.weigh(log_weights)
        if population.excluded or population.ess >= tuning.REWARD.counting:
            return
        chosen = population.resample()
        self.parents = self.parents[chosen]
        states = jax.tree.map(lambda leaf: leaf[chosen], states)
        self._move(states, log_weights[chosen])

    def _move(
        self, states: KernelState, log_weights: Float[np.ndarray, " chains"]
    ) -> None:
        """Propose the new sites once more, so that copies of a chain differ."""
        population = self.population
        proposed, log_proposed = self._drawn()
        log_ratio = jnp.asarray(log_proposed - log_weights)
        moved, _, _ = decided(population.random_words(), proposed, states, log_ratio)
        population.points = moved.position
        self.moves += 1

    def _drawn(self) -> tuple[KernelState, Float[np.ndarray, " chains"]]:
        """Draw the new sites of all chains; return these and their log-weights."""
        population = self.population
        states, log_weights = _fallen(
            population.density,
            self.ladder,
            population.random_words(),
            population.points,
            population.chunk,
        )
        population.evaluations += len(self.ladder.levels)
        weights = np.asarray(log_weights, float)
        # A chain that left the numbers that there are counts as lost.
        return states, np.where(np.isnan(weights), -np.inf, weights)

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
            f"log p {population.log_evidence:.4g} ± {error:.2g} and {self.moves} moves"
            f"{lag}"
        )
        return population.result(result, density, [], note, reason=steps.reason)


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
    """Refuse sites that are neither new noised ones nor given, and values that are
    none of the result's."""
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
            "A reward is no part of a step.",
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
