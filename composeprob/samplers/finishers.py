"""Finishers, post-processing moves at level 0, passed as ``then=``: a warm-up at the
target, and global moves by fitted mixtures."""

from __future__ import annotations

import abc
import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, PyTree
from scipy import special

from composeprob import tuning
from composeprob.arguments import check_count
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Evaluation, Position
from composeprob.density.points import correlations
from composeprob.density.stein import departure
from composeprob.errors import CapabilityError, InvalidValueError, WrongTypeError
from composeprob.kernels import HMC, MALA, Adaptive, Kernel, KernelState
from composeprob.kernels.kernel import log_density_of
from composeprob.kernels.line_integral import bounded
from composeprob.kernels.metric import MetricLike, as_metric, regularised
from composeprob.kernels.metropolis import log_density_ratio, log_uniform, metropolis
from composeprob.samplers.descent import at_target, moved_to
from composeprob.samplers.discrete import discrete_sites
from composeprob.samplers.hierarchy import (
    InBothCoordinates,
    Interweaving,
    NonCentred,
    ShortAndLong,
    StandardCoordinates,
    has_dependents,
    interweaves,
    is_non_centred,
    vague_entries,
)
from composeprob.samplers.layout import Layout
from composeprob.samplers.moves import Particles, Transitions
from composeprob.samplers.random import Stream, normals, stream
from composeprob.samplers.run import Run

Points = Float[np.ndarray, "chains size"]
"""Points v of a population."""


class Trail:
    """Populations of chains between the rounds of a finisher.

    Attributes:
        start: points before the first round.
        before: points before the last round.
        after: points after it.
        ancestors: of the chains.
        rounds: number of rounds.
    """

    def __init__(self, start: Points, ancestors: Int[np.ndarray, " chains"]):
        self.start = start
        self.before = start
        self.after = start
        self.ancestors = ancestors
        self.rounds = 0
        # By the number of rounds before them, which is a power of 2.
        self._kept = {0: start}

    def add(self, points: Points) -> None:
        """Add the points after one more round."""
        self.before = self.after
        self.after = points
        self.rounds += 1
        if self.rounds.bit_count() == 1:
            self._kept[self.rounds] = points

    @property
    def halfway(self) -> Points:
        """Points before the latter half of the rounds, or a little earlier."""
        half = self.rounds // 2
        return self._kept[max(number for number in self._kept if number <= half)]


class Finisher(eqx.Module):
    """A kernel for chains at level 0 that adapts to their population: what samplers
    take as ``then=``.

    In each of at most ``rounds`` rounds `adapt` fits, on the host, what `move` takes;
    this is traced and runs on every device. After a round `drift` says whether another
    one follows. ``title`` is that of its progress bar.
    """

    title = "at level 0"
    rounds = 1
    # Rounds before `drift` and `departure` may end them.
    fewest_rounds = 2
    # Transitions of the sampler's own kernel at level 0 before the first round: they
    # are in the executable that came down.
    stay = 0
    # True if `fit` takes ∇log π at the points.
    by_scores: ClassVar[bool] = False
    # True if it can move the tokens of categorical sites.
    moves_tokens: ClassVar[bool] = False
    # False if it moves chains of a sampler without a kernel, too.
    needs_kernel: ClassVar[bool] = True
    # True if chains stay in the modes where they arrived, so that shares are kept.
    keeps_modes: ClassVar[bool] = False

    @property
    def requires(self) -> dict[str, frozenset[str]]:
        """Capabilities that the density must have, by the name of the part that needs
        them."""
        return {}

    def check(self, density: AnnealedDensity, num_chains: int) -> None:
        """Raise where it cannot be used with this density, or there are too few chains
        for it."""

    def begins(self, scores: Callable[[], Points]) -> bool:
        """Return whether there are any rounds, by ∇log π where chains arrived."""
        return True

    @abc.abstractmethod
    def adapt(self, points: Points, density: AnnealedDensity) -> PyTree[Array] | None:
        """Fit to the population's points what `move` takes; None where nothing can be
        fitted."""

    def trials(self, density: AnnealedDensity) -> PyTree[Array] | None:
        """Return what `measure` tries before the finisher is fitted; None where points
        tell enough."""
        return None

    def measure(
        self, run: Run, density: AnnealedDensity, trials: PyTree[Array]
    ) -> Array:
        """Measure on the chains what their points do not tell; traced."""
        raise NotImplementedError

    def fit(
        self, points: Points, density: AnnealedDensity, measured: np.ndarray | None
    ) -> PyTree[Array] | None:
        """Return what `adapt` fits, by what `measure` found where there are `trials`,
        or by ∇log π at the points where ``by_scores``."""
        return self.adapt(points, density)

    @abc.abstractmethod
    def move(
        self, run: Run, density: AnnealedDensity, fitted: PyTree[Array], number: Array
    ) -> Run:
        """Return the run after round ``number`` of moves by what `adapt` ``fitted``;
        traced."""

    def drift(self, trail: Trail, density: AnnealedDensity, supported: bool) -> float:
        """Return by how much rounds moved the population; 0 where chance may have done
        it.

        Args:
            trail: points before and after rounds.
            density: its target.
            supported: whether the chains have the right law for another reason than
                these rounds: importance weights on the way down, or global moves.
        """
        return 0.0

    def entered(self, trail: Trail) -> float:
        """Return the nats of evidence of what chains entered after they had arrived; 0
        where chance may have done it."""
        return 0.0

    def departure(
        self, points: Points, scores: Points, ancestors: Int[np.ndarray, " chains"]
    ) -> float:
        """Return by how much the population contradicts the target, where another round
        is to follow for that; else 0.

        Args:
            points: after a round.
            scores: ∇log π there.
            ancestors: of the chains.
        """
        return 0.0

    @abc.abstractmethod
    def evaluations(self, fitted: PyTree[Array]) -> int:
        """Return the evaluations of each chain in a round with what was fitted."""

    def least_evaluations(self, density: AnnealedDensity) -> int:
        """Return the fewest evaluations of each chain that are sure before the first
        round; 0 where these are few beside those of the levels."""
        return 0


class WarmUp(Finisher):
    """HMC on all sites at the target, MALA by scores, until the population stops
    drifting and has forgotten where it began, for latents or fine data.

    A few transitions a level follow a density that changes little from one level to the
    next. Latents in a hierarchy need more: how wide they are has nothing to do with the
    noise, and a scale and what it scales hold each other back. Blocks of HMC in the
    metric of the population's variances follow until one changes neither means nor
    standard deviations, and latents are uncorrelated with where they were before the
    first. In programs of latents alone half of the transitions move latents together
    with those whose location and scale they are.

    Args:
        across: moves that begin each block, and take chains from mode to mode. HMC
            alone leaves chains in modes that are far apart.

    Raises:
        WrongTypeError: ``across`` is no `GlobalMoves`.

    Example:
        >>> import composeprob as cp
        >>> cp.SMC(then=cp.WarmUp()).finishers
        (WarmUp(),)
        >>> cp.SMC(then=cp.WarmUp(across=cp.GlobalMoves(20))).finishers
        (WarmUp(across=GlobalMoves(20)),)
    """

    across: GlobalMoves | None = None

    rounds = tuning.WARM_UP.blocks

    def __check_init__(self) -> None:
        if not isinstance(self.across, GlobalMoves | None):
            raise WrongTypeError(
                f"WarmUp(across=) is {self.across!r}.",
                fix="pass cp.GlobalMoves(20), or leave it out.",
            )

    def __repr__(self) -> str:
        across = "" if self.across is None else f"across={self.across!r}"
        return f"{type(self).__name__}({across})"

    @property
    def requires(self) -> dict[str, frozenset[str]]:
        return {} if self.across is None else self.across.requires

    def check(self, density: AnnealedDensity, num_chains: int) -> None:
        if self.across is not None:
            self.across.check(density, num_chains)
        held = [name for name, site in density.sites.items() if site.kind == "held"]
        if held:
            raise CapabilityError(
                f"cp.WarmUp would move {', '.join(map(repr, held))}, which a factor's "
                "unknown normaliser depends on.",
                where=density.described.where,
                fix="leave it out.",
            )

    def adapt(self, points: Points, density: AnnealedDensity) -> Transitions:
        """Return HMC, or MALA by scores alone, whose inverse masses are the
        population's variances, in units of the noise at noised entries."""
        if interweaves(density):
            deviation = points.std(0, dtype=np.float64)
            latents = deviation[Layout.of_density(density).dims :]
            kernel: Kernel = Interweaving(
                log_ratio=bounded(len(points)),
                widths=jnp.asarray(latents, jnp.float32),
            )
        elif "energy" in density.capabilities:
            kernel = _hamiltonian(points, density)
        else:
            kernel = MALA(
                Adaptive(),
                log_ratio=bounded(len(points)),
                metric=_variances(points, density),
            )
        return Transitions.resolved(kernel, 1, density)

    def fit(
        self, points: Points, density: AnnealedDensity, measured: np.ndarray | None
    ) -> Transitions | AcrossAndWithin:
        within = self.adapt(points, density)
        mixtures = None
        if self.across is not None:
            mixtures = self.across.adapt(points, density)
        return within if mixtures is None else AcrossAndWithin(mixtures, within)

    def move(
        self,
        run: Run,
        density: AnnealedDensity,
        fitted: Transitions | AcrossAndWithin,
        number: Array,
    ) -> Run:
        words = run.spread.map(
            lambda words: stream(stream(words, Stream.CLOSING), number), run.words
        )
        if isinstance(fitted, AcrossAndWithin):
            assert self.across is not None
            mixtures, fitted = fitted
            # A round has random numbers of its own.
            of_round = dataclasses.replace(run, words=words)
            moved = self.across.move(of_round, density, mixtures, number)
            run = dataclasses.replace(moved, words=run.words)

        def fresh(words: Array, particle: Particles) -> Particles:
            return fitted.start(words, particle.position, particle.evaluation)

        begun = dataclasses.replace(
            run,
            chains=run.spread.map(fresh, words, run.chains),
            tuning=fitted.untuned(len(run.ancestors)),
        )
        end = fitted.settling + tuning.WARM_UP.transitions
        made, _ = at_target(begun, density, fitted, words, 0, end)
        # The kernel that came down goes on from there; its momenta, independent of
        # where the chains are, are as good.
        return moved_to(run, dataclasses.replace(made.chains, inner=run.chains.inner))

    def drift(self, trail: Trail, density: AnnealedDensity, supported: bool) -> float:
        """Return the greatest change of a mean, in standard deviations, or of the
        logarithm of one.

        Where rounds left a latent of most chains near where it began, and nothing else
        supports these, it is the correlation with that, if greater.
        """
        after = trail.after
        change = _greatest_change(trail.before, after)
        if supported:
            return change
        # A population that hardly moves does not drift either: it has to have forgotten
        # where it was.
        return max(change, memory(trail.start, after, Layout.of_density(density)))

    def evaluations(self, fitted: Transitions | AcrossAndWithin) -> int:
        across = 0
        if isinstance(fitted, AcrossAndWithin):
            assert self.across is not None
            mixtures, fitted = fitted
            across = self.across.evaluations(mixtures)
        transitions = tuning.WARM_UP.settling + tuning.WARM_UP.transitions
        return across + transitions * fitted.kernel.evaluations_per_step

    def least_evaluations(self, density: AnnealedDensity) -> int:
        size = Layout.of_density(density).size
        # Any population: the kernel's evaluations depend on the density alone.
        points = np.random.default_rng(0).standard_normal((16, size))
        return self.fewest_rounds * self.evaluations(self.adapt(points, density))


class Relaxation(WarmUp):
    """Moves at the target until the samples satisfy Stein's identity there, for
    energies whose level 0 is not the limit of their noisier levels: by the sampler's
    own kernel, then rounds of MALA in the population's variances.

    A network that learns scores at each level by itself need not agree with itself
    between levels. The weights of SMC do not show that: they lead to the limit of the
    noisier levels. So does a default run that ends with few moves at level 0.

    Example:
        >>> import composeprob as cp
        >>> from composeprob.samplers.finishers import Relaxation
        >>> cp.SMC(then=Relaxation()).finishers
        (Relaxation(),)
    """

    # Its chains keep their modes, as they came down with weights.
    across: None = eqx.field(default=None, init=False)

    rounds = tuning.RELAXATION.rounds
    fewest_rounds = 0
    stay = tuning.RELAXATION.stay
    keeps_modes: ClassVar[bool] = True

    def adapt(self, points: Points, density: AnnealedDensity) -> Transitions:
        kernel = MALA(Adaptive(), metric=_variances(points, density))
        return Transitions.resolved(kernel, 1, density)

    def drift(self, trail: Trail, density: AnnealedDensity, supported: bool) -> float:
        return 0.0

    def least_evaluations(self, density: AnnealedDensity) -> int:
        # Of the kernel that came down, which evaluates once at least.
        return self.stay

    def departure(
        self, points: Points, scores: Points, ancestors: Int[np.ndarray, " chains"]
    ) -> float:
        """Return the shift that Stein's identity implies, where chance hardly makes
        it."""
        _, index = np.unique(ancestors, return_inverse=True)
        equal = np.full(len(points), 1 / len(points))
        found = departure(points, scores, equal, index)
        if found is None or found.chance > tuning.RELAXATION.by_chance:
            return 0.0
        return abs(found.shift)


def _variances(points: Points, density: AnnealedDensity) -> Position:
    """Return the population's variances as a metric, in units of the noise at noised
    entries."""
    return squares(points.std(0, dtype=np.float64), density)


def squares(widths: Float[np.ndarray, " size"], density: AnnealedDensity) -> Position:
    """Return the squares of widths as a metric, in units of the noise at noised
    entries, and of 1 where a width is none."""
    layout = Layout.of_density(density)
    # By NumPy: JAX would compile a program for each of these operations.
    sigma = np.asarray(density.schedule.sigma)
    noise = sigma[0] / np.asarray(density.schedule.alpha)[0]
    noised = np.arange(len(widths)) < layout.dims
    units = np.where(noised, noise, 1.0).astype(np.float32)
    # Chains that are all in one place, or have diverged, give no scale. Of any other
    # the square is finite in single precision.
    usable = (widths > 0) & (widths < 1e18)
    scales = np.where(usable, widths, units).astype(np.float32)
    mass = (scales / units) ** 2
    values: Any = mass  # arithmetic alone, which is NumPy's too
    position = layout.position(values, 1.0)
    for name in discrete_sites(density):
        del position[name]
    return position


def _hamiltonian(points: Points, density: AnnealedDensity) -> Kernel:
    """Return HMC in the metric of the population's variances; half of it in the other
    coordinates where the location and the scale of latents are other latents."""
    step_size = Adaptive(initial=0.3)
    # Full refreshment and jitter, so that no direction is missed.
    jitter = 0.3
    leapfrogs = tuning.WARM_UP.leapfrogs
    dependents = has_dependents(density)
    if dependents:
        leapfrogs //= 2
    metric = _covariance(points, density)
    if not dependents:
        return HMC(step_size, leapfrogs, damping=0.0, jitter=jitter, metric=metric)

    def in_others(inner: type[HMC], entries: Position | None) -> NonCentred:
        layout = Layout.of_density(density)
        coordinates = StandardCoordinates(density, layout, entries)
        standard = np.asarray(_standardised(coordinates, jnp.asarray(points)))
        return NonCentred(
            step_size,
            leapfrogs,
            jitter,
            metric=_covariance(standard, density),
            inner=inner,
            vague=entries,
        )

    centred: Kernel = ShortAndLong(
        step_size, leapfrogs, damping=0.0, jitter=jitter, metric=metric
    )
    if is_non_centred(density):
        centred = in_others(ShortAndLong, None)
    non_centred = in_others(HMC, vague_entries(points, density))
    return InBothCoordinates(centred, non_centred, density)


def _covariance(points: Points, density: AnnealedDensity) -> MetricLike:
    """Return the population's covariance as a metric, where all sites are latents and
    chains are many enough for it; else its variances."""
    layout = Layout.of_density(density)
    limits = tuning.METRIC
    only_latents = layout.dims == 0 and not discrete_sites(density)
    small = layout.size <= limits.most_numbers
    enough = len(points) >= limits.chains_per_latent * layout.size
    sound = np.isfinite(np.square(points, dtype=np.float64)).all()
    if not (only_latents and small and enough and sound):
        return _variances(points, density)
    covariance = np.cov(points, rowvar=False, dtype=np.float64).reshape(
        layout.size, layout.size
    )
    metric = np.asarray(regularised(jnp.asarray(covariance), len(points)))
    if not np.linalg.eigvalsh(metric).min() > 0:  # chains that are all in one place
        return _variances(points, density)
    return as_metric(metric.astype(np.float32))


@eqx.filter_jit
def _standardised(coordinates: StandardCoordinates, points: Array) -> Array:
    return jax.vmap(coordinates.standardise)(points)


def _greatest_change(before: Points, after: Points) -> float:
    """Return the greatest change of a mean, in standard deviations, or of the logarithm
    of a standard deviation; 0 where none is more than chance may have made.

    The standard error of a logarithm is √((κ − 1)/4n) by the kurtosis κ: of heavy tails
    a few chains carry the width.
    """
    n = len(after)
    old_mean = np.mean(before, axis=0, dtype=float)
    new_mean = np.mean(after, axis=0, dtype=float)
    old_deviation = np.maximum(np.std(before, axis=0, dtype=float), 1e-30)
    new_deviation = np.maximum(np.std(after, axis=0, dtype=float), 1e-30)
    shift = np.abs(new_mean - old_mean) / np.maximum(old_deviation, new_deviation)
    ratio = np.abs(np.log(new_deviation / old_deviation))

    old_kurtosis = np.mean(((before - old_mean) / old_deviation) ** 4, axis=0)
    new_kurtosis = np.mean(((after - new_mean) / new_deviation) ** 4, axis=0)
    # A normal distribution has the kurtosis 3; that of 5 gives widths the error of
    # means.
    kurtosis = np.maximum(np.maximum(old_kurtosis, new_kurtosis), 5.0)
    of_shift = np.full_like(shift, 4.0 * math.sqrt(2.0 / n))
    of_ratio = 4.0 * np.sqrt((kurtosis - 1) / (2 * n))

    changes = np.concatenate([shift, ratio])
    chance = np.concatenate([of_shift, of_ratio])
    beyond = changes[changes > tuning.WARM_UP.drift + chance]
    return float(np.max(beyond, initial=0.0))


def memory(start: Points, after: Points, layout: Layout) -> float:
    """Return the greatest correlation, over entries of latents, between a chain's
    present and initial values; 0 where chance may have made it.

    The greatest of many is large by chance. Each site has its own share of the chance,
    so that many members do not hide what their location remembers.
    """
    of_entries = correlations(start, after)
    greatest = 0.0
    for name, _ in layout.static:
        of_site = of_entries[layout.entries((name,))]
        chance = tuning.WARM_UP.by_chance / max(len(of_site) * len(layout.static), 1)
        errors = -float(special.ndtri(chance))
        limit = tuning.WARM_UP.memory + errors / math.sqrt(len(after))
        most = float(np.max(of_site, initial=0.0))
        if most > limit:
            greatest = max(greatest, most)
    return greatest


class AcrossAndWithin(NamedTuple):
    """Fits of a block of `WarmUp` for moves across modes, and for those within them."""

    mixtures: GaussianMixture
    within: Transitions


class GlobalMoves(Finisher):
    r"""Proposals that do not depend on a chain's position, so that modes get their
    shares whatever the chains did before.

    Chains are split in two halves. A Gaussian mixture q is fitted to each, and is what
    the other half's proposals are drawn from, whatever a chain's own position is:

    $$x' \sim q, \qquad a = \min\Big(1, \frac{\pi(x')\,q(x)}{\pi(x)\,q(x')}\Big).$$

    Where positions have few numbers (up to about 20) 20 of them make chains independent
    of one another, however few ancestors they had. For log-densities that can be
    compared between modes: analytic or calibrated factors.

    Args:
        number: proposals to each chain, one evaluation each.

    Raises:
        InvalidValueError: not a whole number ≥ 1.

    References:
        Tierney (1994), *Markov chains for exploring posterior distributions*, for
        independence chains; South, Pettitt and Drovandi (2019), *Sequential Monte Carlo
        samplers with independent Markov chain Monte Carlo proposals*.

    Example:
        >>> import composeprob as cp
        >>> cp.GlobalMoves(20)
        GlobalMoves(20)
    """

    number: int = eqx.field(default=20, static=True)

    title = "global moves"

    def __check_init__(self) -> None:
        check_count(self.number, "GlobalMoves(number=)")

    @property
    def requires(self) -> dict[str, frozenset[str]]:
        return {"GlobalMoves": frozenset({"energy", "mode_depth"})}

    @staticmethod
    def suits(density: AnnealedDensity, num_chains: int) -> bool:
        """Return whether so many chains can fit mixtures that many chains accept: of
        positions of few real numbers, under log-densities that can be compared."""
        size = Layout.of_density(density).size
        comparable = density.comparable_modes
        small = size <= tuning.GLOBAL_MOVES.most_numbers
        enough = num_chains >= fewest_chains(size)
        return comparable and small and enough and not discrete_sites(density)

    def check(self, density: AnnealedDensity, num_chains: int) -> None:
        discrete = discrete_sites(density)
        if discrete:
            raise CapabilityError(
                "cp.GlobalMoves proposes real numbers, and "
                f"{', '.join(map(repr, discrete))} is discrete.",
                where=density.described.where,
                fix="leave cp.GlobalMoves out.",
            )
        size = Layout.of_density(density).size
        fewest = fewest_chains(size)
        if num_chains < fewest:
            numbers = "number" if size == 1 else "numbers"
            raise InvalidValueError(
                "cp.GlobalMoves fits a Gaussian mixture to each half of the chains, "
                f"and {num_chains} are too few for positions of {size} {numbers}.",
                fix=f"use {fewest} chains or more, or leave it out.",
            )

    def __repr__(self) -> str:
        return f"GlobalMoves({self.number})"

    def adapt(self, points: Points, density: AnnealedDensity) -> GaussianMixture | None:
        """Return the mixtures that each half's proposals are drawn from, which are
        fitted to the other half."""
        middle = len(points) // 2
        first = finite_rows(points[:middle])
        second = finite_rows(points[middle:])
        if min(len(first), len(second)) < tuning.MIXTURE.fewest_points:
            return None  # the status says why
        return GaussianMixture.beside(
            GaussianMixture.fitted(second, first), GaussianMixture.fitted(first, second)
        )

    def move(
        self, run: Run, density: AnnealedDensity, fitted: GaussianMixture, number: Array
    ) -> Run:
        spread = run.spread
        layout = Layout.of_density(density)
        size = run.chains.position.shape[1]
        second = spread.numbers(run.words) >= len(run.ancestors) // 2
        halves = second.astype(jnp.int32)
        Carry = tuple[KernelState, Array, Array, Array, Array]

        def chain(
            words: Array, v: Array, evaluation: Evaluation, half: Array
        ) -> tuple[Array, Evaluation, Array]:
            words = stream(words, Stream.CLOSING)

            def log_q(v: Array) -> Array:
                return jax.vmap(lambda fit: fit.log_prob(v))(fitted)[half]

            def draw_q(noise: Array) -> Array:
                return jax.vmap(lambda fit: fit.draw(noise))(fitted)[half]

            def propose(i: Array, carry: Carry) -> Carry:
                state, log_q_here, total, moved, weights = carry
                # One number for the component, d for the point, one for the test.
                noise = normals(words, i, size + 2, v.dtype)
                there = draw_q(noise[:-1]).astype(v.dtype)
                evaluation = layout.evaluate(density, there, 0, terms=False)
                proposed = KernelState(there, evaluation)
                log_q_there = log_q(there)
                weight = log_density_of(evaluation) - log_q_there
                weight = jnp.where(jnp.isnan(weight), -jnp.inf, weight)
                weights = jnp.logaddexp(weights, jnp.stack([weight, 2 * weight]))
                log_ratio = log_density_ratio(proposed, state)
                log_ratio = log_ratio + log_q_here - log_q_there
                log_u = log_uniform(noise[-1])
                state, info = metropolis(log_u, log_ratio, proposed, state)
                log_q_here = jnp.where(info.accepted, log_q_there, log_q_here)
                total = total + info.acceptance
                return state, log_q_here, total, moved | info.accepted, weights

            start = KernelState(v, evaluation.without_terms)
            nothing = jnp.full(2, -jnp.inf)
            carry = (start, log_q(v), jnp.zeros(()), jnp.asarray(False), nothing)
            end = jax.lax.fori_loop(0, self.number, propose, carry)
            state, _, total, moved, weights = end
            facts = jnp.stack([moved, total / self.number, *weights])
            return state.position, state.evaluation, facts

        points, evaluations, facts = spread.map(
            chain, run.words, run.chains.position, run.chains.evaluation, halves
        )

        facts = spread.gather(facts)
        after = spread.on_population(genealogy_after_moves, facts[:, :2], run.ancestors)

        log_volume = layout.log_volume(density.schedule.at(0).alpha)

        def estimate(log_sums: Array) -> Array:
            log_evidence, variance = evidence_by_importance(log_sums, self.number)
            return jnp.stack([log_evidence + log_volume, variance])

        evidence = spread.on_population(estimate, facts[:, 2:])
        chains = Particles(points, evaluations, run.chains.inner)
        run = dataclasses.replace(moved_to(run, chains), **after._asdict())
        return dataclasses.replace(run, importance_evidence=evidence)

    def evaluations(self, fitted: GaussianMixture) -> int:
        return self.number


class GaussianMixture(eqx.Module):
    """q(y) = Σ_j w_j·N(y; m_j, L_j·L_jᵀ) over flattened positions of d numbers."""

    # log w_j; −∞ of components that only fill up.
    log_weights: Float[Array, " components"]
    means: Float[Array, "components d"]  # m_j
    roots: Float[Array, "components d d"]  # L_j
    inverses: Float[Array, "components d d"]  # L_j⁻¹

    def draw(self, noise: Float[Array, " d+1"]) -> Float[Array, " d"]:
        """Make a draw from d + 1 independent normal numbers, the first of which chooses
        the component."""
        below = jnp.cumsum(jnp.exp(self.log_weights))
        uniform = jax.scipy.special.ndtr(noise[0])
        # Weights may add up to a little less than 1.
        j = jnp.minimum(jnp.sum(uniform > below), len(below) - 1)
        return self.means[j] + self.roots[j] @ noise[1:]

    def log_prob(self, row: Float[Array, " d"]) -> Float[Array, ""]:
        """Return log q at one row."""
        z = jnp.einsum("jab,jb->ja", self.inverses, row - self.means)
        diagonals = jnp.diagonal(self.inverses, axis1=1, axis2=2)
        heights = self.log_weights + jnp.sum(jnp.log(diagonals), axis=1)
        log_sum = jax.nn.logsumexp(heights - 0.5 * jnp.sum(z**2, axis=1))
        return log_sum - 0.5 * len(row) * jnp.log(2 * jnp.pi)

    def with_tails(self, width: float) -> GaussianMixture:
        """Return the mixture in which half of each component is ``width`` times as
        wide. Leading axes stay as they are."""

        def both(array: Array, wide: Array) -> Array:
            axis = self.log_weights.ndim - 1
            return jnp.concatenate([array, wide], axis)

        halved = self.log_weights - jnp.log(2.0)
        return GaussianMixture(
            both(halved, halved),
            both(self.means, self.means),
            both(self.roots, width * self.roots),
            both(self.inverses, self.inverses / width),
        )

    @classmethod
    def fitted(
        cls, points: Float[np.ndarray, "m d"], others: Float[np.ndarray, "n d"]
    ) -> GaussianMixture:
        """Return the mixture that maximises the likelihood of points, by the EM
        algorithm (Dempster, Laird and Rubin 1977).

        The number of components is the one under which ``others``, independent points
        of the same distribution, have the highest likelihood.
        """
        # It takes a second to import, and most runs never fit one.
        from sklearn.mixture import GaussianMixture as Fit

        points = _thinned(points)
        others = _thinned(others)
        center = points.mean(0)
        width = points.std(0)
        width = np.where(width > 0, width, 1.0)
        best = None
        highest = -np.inf
        worse = 0
        single = np.zeros(0)
        for count in tuning.MIXTURE.components:
            parameters = count * (points.shape[1] + 1)
            too_many = count > 1 and parameters > len(points)
            if worse == tuning.MIXTURE.patience or too_many:
                break
            with warnings.catch_warnings():
                # A fit that has not converged, or of few distinct points, will do.
                warnings.simplefilter("ignore")
                fit = Fit(count, random_state=0).fit((points - center) / width)
            log_densities = fit.score_samples((others - center) / width)
            if count == 1:
                single = log_densities
            # One point far from all components must not decide alone: it counts as no
            # worse than some nats below what one Gaussian says.
            floor = single - tuning.MIXTURE.most_lost
            mean = np.mean(np.maximum(log_densities, floor))
            worse += 1
            if best is None or mean > highest:
                best = fit
                highest = mean
                worse = 0
        assert best is not None
        roots = width[:, None] * np.linalg.cholesky(best.covariances_)
        arrays = (
            np.log(best.weights_),
            center + width * best.means_,
            roots,
            np.linalg.inv(roots),
        )
        precision = jnp.result_type(float)
        return cls(*(jnp.asarray(array, precision) for array in arrays))

    @classmethod
    def beside(cls, *mixtures: GaussianMixture) -> GaussianMixture:
        """Stack several mixtures along a new leading axis.

        They are filled up with components of no weight to 8, or the most that are
        tried: two numbers of components are then all that is compiled.
        """
        most = max(len(mixture.means) for mixture in mixtures)
        room = 8 if most <= 8 else tuning.MIXTURE.components[-1]

        def filled(array: Array) -> np.ndarray:
            more = np.repeat(np.asarray(array)[:1], room - len(array), axis=0)
            if more.ndim == 1:  # log-weights
                more = np.full_like(more, -np.inf)
            return np.concatenate([array, more])

        def stacked(*arrays: Array) -> Array:
            return jnp.stack([jnp.asarray(filled(array)) for array in arrays])

        return jax.tree.map(stacked, *mixtures)


def finite_rows(points: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "m d"]:
    """Return the rows whose entries, and their squares, are all finite."""
    with np.errstate(over="ignore"):
        return points[np.isfinite(np.square(points, dtype=np.float64)).all(1)]


def _thinned(points: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "m d"]:
    """Return at most `tuning.MIXTURE.most_points` of the rows, evenly spaced, in double
    precision."""
    count = min(len(points), tuning.MIXTURE.most_points)
    chosen = np.linspace(0, len(points) - 1, count).astype(int)
    return points[chosen].astype(np.float64)


def as_finishers(then: object) -> tuple[Finisher, ...]:
    """Return the argument ``then`` as a tuple."""
    finishers = then if isinstance(then, (tuple, list)) else (then,)
    for finisher in finishers:
        if isinstance(finisher, Finisher):
            continue
        shown = repr(finisher)
        if isinstance(finisher, type):
            shown = f"the class {finisher.__name__}"
        raise WrongTypeError(
            f"then= takes post-processing moves at level 0; got {shown}.",
            fix="pass cp.WarmUp(), cp.GlobalMoves(20), or both in a tuple.",
        )
    return tuple(finishers)


def fewest_chains(size: int) -> int:
    """Return the number of chains from which on mixtures over ``size`` numbers are
    fitted to each half of them."""
    return 2 * tuning.MIXTURE.points_per_number * size


class AfterMoves(NamedTuple):
    """Facts of a run after moves across modes: its fields of these names."""

    ancestors: Int[Array, " chains"]
    global_acceptance: Float[Array, ""]
    renewed: Float[Array, ""]


def genealogy_after_moves(
    facts: Float[Array, "chains 2"], ancestors: Int[Array, " chains"]
) -> AfterMoves:
    """Return the ancestors of chains after moves across modes, their mean acceptance,
    and the share that moved.

    Args:
        facts: of each chain, whether it moved, and its share of accepted proposals.
        ancestors: before the moves.
    """
    moved, acceptance = facts.T
    # Where many chains are stuck, the moved ones are not a sample either.
    share = jnp.mean(moved)
    enough = share >= 1 - tuning.GLOBAL_MOVES.most_stuck
    renewed = renewed_ancestors(ancestors, moved > 0)
    ancestors = jnp.where(enough, renewed, ancestors)
    return AfterMoves(ancestors, jnp.mean(acceptance), share)


def evidence_by_importance(
    log_sums: Float[Array, "chains 2"], number: int
) -> Float[Array, " 2"]:
    r"""Return log Z by importance samples, and its variance.

    $$\hat Z = \frac 1M \sum_j w_j, \qquad w_j = \frac{\pi(x_j)}{q(x_j)}, \qquad
      \operatorname{Var}\,\log \hat Z \approx \frac{\sum_j w_j^2}{(\sum_j w_j)^2} -
      \frac 1M.$$

    Args:
        log_sums: the logarithms of the sums of w and of w² over the samples of each
            chain.
        number: of samples of each chain.
    """
    samples = number * len(log_sums)
    log_sum, log_square = jax.nn.logsumexp(log_sums, axis=0)
    variance = jnp.exp(log_square - 2 * log_sum) - 1 / samples
    return jnp.stack([log_sum - jnp.log(samples), variance])


def renewed_ancestors(
    ancestors: Int[Array, " chains"], moved: Bool[Array, " chains"]
) -> Int[Array, " chains"]:
    """Return the ancestors of chains, 0 … N − 1, after those that moved have become
    their own.

    Descendants of others are named after the first of them that is left, a number that
    no chain that moved has.
    """
    numbers = jnp.arange(len(ancestors), dtype=ancestors.dtype)
    nobody = len(ancestors)
    names = (
        jnp.full_like(ancestors, nobody)
        .at[ancestors]
        .min(jnp.where(moved, nobody, numbers))
    )
    return jnp.where(moved, numbers, names[ancestors])
