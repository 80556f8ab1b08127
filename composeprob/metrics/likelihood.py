"""Likelihoods under a sampler's output (RAISE), and bounds of log Z by the same paths.

A `Path` is the path of one chain of a sampler, with its log-probability ratio.
`reverse_walk` follows it from a point at level 0 up, by the reversals of steps and
transitions; `forward_walk` follows it down. Both return a log-weight whose exponential
has a known expectation: the sampler's output density at the point, and ∫f₀.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Generic, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float
from numpy.typing import ArrayLike

from composeprob.arguments import check_count, check_key
from composeprob.core import (
    AnnealedDensity,
    Position,
    ReverseStep,
    Sampler,
    Weights,
    log_densities,
)
from composeprob.errors import CapabilityError, InvalidValueError, WrongTypeError
from composeprob.kernels.gibbs import measures_metric, parts_of, replaced, with_parts
from composeprob.kernels.kernel import log_density_of
from composeprob.metrics import tuning
from composeprob.metrics.distances import as_positions
from composeprob.runtime.infer import not_a_sampler
from composeprob.samplers.choose import check_capabilities
from composeprob.samplers.layout import Layout
from composeprob.samplers.moves import Particles, Transitions
from composeprob.samplers.random import Stream, key_of, normals
from composeprob.samplers.run import Run, Visits, begin
from composeprob.samplers.step import Backward, Step
from composeprob.samplers.weights import Passage
from composeprob.schedule import Noise
from composeprob.text import printable


@dataclass(frozen=True, repr=False, eq=False)
class LogLikelihood:
    """`LogLikelihood` holds the result of `raise_log_likelihood`; ``print`` it.

    Attributes:
        values: log p̂ of each point, (n,). Its expectation lies below log p, by about
            half the square of its error.
        errors: Monte-Carlo standard error of each value, (n,); NaN with one chain a
            point.
        ess: effective number of chains of each point relative to their number, (n,);
            near 1/num_chains a single chain dominates.
        num_chains: chains a point.
        log_evidence: the log-evidence that was subtracted for `SMC`'s weights; None for
            other samplers.
        log_evidence_error: its standard error; NaN where it was given, or is None.
    """

    values: Float[np.ndarray, " n"]
    errors: Float[np.ndarray, " n"]
    ess: Float[np.ndarray, " n"]
    num_chains: int
    log_evidence: float | None = None
    log_evidence_error: float = math.nan

    @property
    def mean(self) -> float:
        """The mean log-likelihood of a point, in nats."""
        return float(np.mean(self.values))

    @property
    def standard_error(self) -> float:
        """The standard error of the mean over points, Monte-Carlo error included."""
        return _standard_error(self.values)

    @property
    def monte_carlo_error(self) -> float:
        """The part of the mean's standard error that more chains would remove."""
        shared = self.log_evidence_error
        if math.isnan(shared):
            shared = 0.0
        # Errors of points are independent; that of the evidence is common to all.
        independent = np.sum(self.errors**2) / len(self.values) ** 2
        return float(np.sqrt(independent + shared**2))

    def __repr__(self) -> str:
        text = (
            f"LogLikelihood({self.mean:.3f} ± {self.standard_error:.3f} nats over "
            f"{len(self.values)} points, ± {self.monte_carlo_error:.3f} of it from "
            f"{self.num_chains} chains a point"
        )
        if self.log_evidence is not None:
            text += f"; log-evidence {self.log_evidence:.3f} subtracted"
        not_finite = int(np.sum(~np.isfinite(self.values)))
        if not_finite:
            text += f"; {not_finite} points are not finite"
        return printable(text + ")")


def raise_log_likelihood(
    density: AnnealedDensity,
    points: ArrayLike | Mapping[str, ArrayLike],
    key: Array,
    *,
    sampler: Sampler,
    num_chains: int = 64,
    log_evidence: float | None = None,
    step_size: ArrayLike | None = None,
    chunk: int | None = None,
) -> LogLikelihood:
    r"""Estimate the log-likelihood of held-out points under a sampler's output (RAISE).

    From each point $x_0$ chains walk the sampler's path backwards, from level 0 to the
    top, and

    $$\hat p(x_0) = \mathrm{top}(x_\top)
      \prod_{\text{transitions}} \frac{T(x' \to x)}{T(x \to x')}
      \prod_k \frac{N(x_k;\, \mu(x_{k+1}), v_k)}{q(x_{k+1} \mid x_k)}$$

    has as its expectation exactly the density of the sampler's chains at $x_0$, for
    adjusted and unadjusted kernels: that of a histogram of infinitely many chains,
    biases included. log p̂, averaged over num_chains inside the logarithm, therefore
    lies below the truth on average, and grows towards it with num_chains.

    Under `SMC` the distribution is that of its weighted path, ∏G/Z: its output for
    infinitely many chains, without the effects of resampling a finite population. With
    ``weights="density"`` and adjusted kernels that is π₀/Z itself.

    Points belong to level 0: they should carry its noise, as samples do.

    Args:
        density: compiled, without static sites.
        points: ``{site: (n, …)}``, or (n, …) alone where there is one site.
        key: typed random key.
        sampler: `Ancestral` (η = 1), `AnnealedMCMC` or `SMC` with any kernel that
            reports the probability of its reversed moves.
        num_chains: reversals of each point.
        log_evidence: the ``result.log_evidence`` of an `SMC` run; by default four runs
            of 1024 chains estimate it.
        step_size: ``result.step_size`` of a run; needed where the kernel's is
            `Adaptive`. The likelihood is that of the sampler with those steps.
        chunk: reversals evaluated at once; chosen from the size of positions by
            default.

    Returns:
        A value for each point, the mean, and its standard errors. The cost is that of
            n·num_chains chains.

    Raises:
        CapabilityError: static sites; an adaptive step size without ``step_size``; a
            kernel that does not report the probability of its reversed moves.
        ShapeError, InvalidValueError, WrongTypeError: a bad argument.

    Example:
        >>> import composeprob as cp, jax, numpyro.distributions as dist
        >>> @cp.program
        ... def single(f):
        ...     return cp.sample("x", f)
        >>> factor = cp.Analytic(dist.Normal(0.0, 1.0), cp.Schedule.log_snr(40))
        >>> density = cp.compile(single, factor)
        >>> points = jax.random.normal(jax.random.key(0), (200,))
        >>> likelihood = cp.metrics.raise_log_likelihood(
        ...     density, points, jax.random.key(1), sampler=cp.Ancestral()
        ... )
        >>> abs(likelihood.mean + 1.42) < 0.2  # −½·log(2πe)
        True

    References:
        Burda, Grosse and Salakhutdinov 2015, *Accurate and conservative estimates of
        MRF log-likelihood using reverse annealing*. Grosse, Ancha and Roy 2016,
        *Measuring the reliability of MCMC inference with bidirectional Monte Carlo*.
    """
    check_key(key)
    count = check_count(num_chains, "num_chains")
    sampler = frozen(sampler, density, step_size)
    positions = as_positions(points, density)
    path = Path.of_sampler(sampler, density)
    # The law of a weighted path is ∏G/Z: its density needs Z.
    evidence: float | None = None
    evidence_error = math.nan
    if path.weights is not None:
        key, evidence_key = jax.random.split(key)
        evidence = log_evidence
        if evidence is None:
            evidence, evidence_error = estimate_evidence(sampler, density, evidence_key)
        if not np.isfinite(evidence):
            raise InvalidValueError(
                f"The log-evidence is {evidence}.",
                fix="look at result.status of an SMC run.",
            )
    at_once = chains_at_once(density, chunk)
    logs = reverse_walks(path, key, positions, count, at_once)
    means = log_means(np.asarray(logs, np.float64).reshape(-1, count), sampler)
    return LogLikelihood(
        values=means.values - float(evidence or 0.0),
        errors=means.errors,
        ess=means.ess,
        num_chains=count,
        log_evidence=evidence,
        log_evidence_error=evidence_error,
    )


class LogMeans(NamedTuple):
    """Logs of means of weights, each of shape (n,).

    ``errors`` are their standard errors, ``ess`` the effective number of weights in a
    mean relative to their number.
    """

    values: Float[np.ndarray, " n"]
    errors: Float[np.ndarray, " n"]
    ess: Float[np.ndarray, " n"]


def log_means(logs: Float[np.ndarray, "n c"], sampler: Sampler) -> LogMeans:
    """Return the log of each row's mean of weights, given their logs.

    Refuses log-weights of which not one is finite; the sampler is for the message.
    """
    from scipy.special import logsumexp, softmax

    if not np.isfinite(logs).any():
        culprit = "the sampler" if sampler.kernel is None else repr(sampler.kernel)
        raise CapabilityError(
            "No reversal has a finite probability: the points lie outside the support, "
            f"or {culprit} does not report how likely its moves are reversed "
            "(`Info.log_reversal` is NaN for BlackJAX's unadjusted algorithms).",
            fix="check density.log_density at a point; use ULA, UHMC, MALA or HMC.",
        )
    count = logs.shape[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        values = logsumexp(logs, axis=1) - math.log(count)
        ess = 1 / (softmax(logs, axis=1) ** 2).sum(1) / count
        if count == 1:
            return LogMeans(values, np.full(len(logs), np.nan), ess)
        # The delta method: the relative variance of the weights is 1/ess − 1.
        errors = np.sqrt((1 / ess - 1) / (count - 1))
    return LogMeans(values, errors, ess)


@eqx.filter_jit
def reverse_walks(
    path: Path, key: Array, points: dict[str, Array], count: int, at_once: int
) -> Array:
    """Return log p̂ of ``count`` reversals of each of n points, (n·count,)."""
    number = jax.tree.leaves(points)[0].shape[0] * count

    def walk(i: Array) -> Array:
        point = jax.tree.map(lambda x: x[i // count], points)
        return reverse_walk(path, jax.random.fold_in(key, i), point)

    return in_batches(walk, number, at_once)


@eqx.filter_jit
def forward_walks(
    path: Path, key: Array, number: int, at_once: int
) -> Float[Array, " number"]:
    """Return log w of ``number`` chains."""

    def walk(i: Array) -> Array:
        return forward_walk(path, jax.random.fold_in(key, i))

    return in_batches(walk, number, at_once)


def in_batches(
    function: Callable[[Array], Array], total: int, at_once: int
) -> Float[Array, " total"]:
    """Return function(0), …, function(total − 1), ``at_once`` at a time.

    The function is traced once: the last batch is filled up with its last index.
    """
    size = min(total, at_once)
    batches = math.ceil(total / size)
    index = jnp.minimum(jnp.arange(batches * size), total - 1).reshape(batches, size)
    return jax.lax.map(jax.vmap(function), index).reshape(-1)[:total]


def estimate_evidence(
    sampler: Sampler, density: AnnealedDensity, key: Array
) -> tuple[float, float]:
    """Return the log-evidence of `SMC`'s path and its standard error.

    Both are of independent runs.
    """
    sampler = sampler.in_numbers()
    first = sampler.first_level(density)
    visits = Visits.every(first, density.num_levels)
    logs = []
    for run_key in jax.random.split(key, tuning.EVIDENCE_RUNS):
        run = begin(run_key, tuning.EVIDENCE_CHAINS, visits)
        logs.append(float(_evidence(sampler, density, run, first)))
    # Z is unbiased, log Z is not: average before the logarithm, relative to the
    # greatest.
    greatest = max(logs)
    relative = np.exp(np.array(logs) - greatest)
    error = relative.std(ddof=1) / relative.mean() / np.sqrt(len(logs))
    return float(greatest + np.log(relative.mean())), float(error)


@eqx.filter_jit
def _evidence(
    sampler: Sampler, density: AnnealedDensity, run: Run, first: int
) -> Float[Array, ""]:
    """Return the log-evidence of one run down to level 0."""
    run = sampler.start(run, density, first)
    constant = start_constant(run.log_evidence)
    run = eqx.tree_at(lambda r: r.log_evidence, run, constant)
    return sampler.advance(run, density, first + 1).log_evidence


def chains_at_once(density: AnnealedDensity, chunk: object) -> int:
    """Return the number of chains that are evaluated at once."""
    if chunk is not None:
        return check_count(chunk, "chunk")
    size = sum(math.prod(site.shape) for site in density.sites.values())
    # A million numbers in the positions at most.
    fitting = max(1, 2**20 // max(size, 1))
    return min(8192, fitting)


@dataclass(frozen=True, repr=False, eq=False)
class EvidenceBounds:
    """`EvidenceBounds` holds a stochastic lower and upper bound of log Z; ``print`` it.

    Attributes:
        lower: mean of log ŵ over forward runs, whose expectation is at most log Z.
        lower_error: standard error of ``lower``.
        upper: mean of log f₀ − log p̂ over exact points, whose expectation is at least
            log Z.
        upper_error: standard error of ``upper``.
        log_evidence: log of the mean of the same ŵ, which estimates log Z itself and
            lies above ``lower``.
        log_evidence_error: standard error of ``log_evidence`` by the delta method,
            unreliable above 0.3.
        lower_values: log ŵ of each forward run, (n,).
        upper_values: log f₀ − log p̂ of each point, (n,).
    """

    lower: float
    lower_error: float
    upper: float
    upper_error: float
    log_evidence: float
    log_evidence_error: float
    lower_values: Float[np.ndarray, " n"]
    upper_values: Float[np.ndarray, " n"]

    @property
    def width(self) -> float:
        """The gap upper − lower, in nats, at least 0 on average.

        It measures the distance of the sampler's path from exact annealing.
        """
        return self.upper - self.lower

    def contains(self, log_z: float, errors: float = 4.0) -> bool:
        """Return whether log Z lies between the bounds.

        Each bound is widened by ``errors`` of its standard errors.
        """
        least = self.lower - errors * self.lower_error
        greatest = self.upper + errors * self.upper_error
        return bool(least <= log_z <= greatest)

    def __repr__(self) -> str:
        return printable(
            f"EvidenceBounds({self.lower:.3f} ± {self.lower_error:.3f} ≤ log Z ≤ "
            f"{self.upper:.3f} ± {self.upper_error:.3f}; forward estimate "
            f"{self.log_evidence:.3f} ± {self.log_evidence_error:.3f})"
        )


def evidence_bounds(
    density: AnnealedDensity,
    exact_points: ArrayLike | Mapping[str, ArrayLike],
    key: Array,
    *,
    sampler: Sampler,
    num_chains: int = 16,
    step_size: ArrayLike | None = None,
    chunk: int | None = None,
) -> EvidenceBounds:
    r"""Bound log Z = log ∫f₀ from below and above, f₀ = exp(density.log_density(·, 0)).

    Annealed importance sampling down the sampler's path has weights w with E w = Z, so
    that E log ŵ ≤ log Z for ŵ the mean of num_chains of them. The reversed path from an
    *exact* draw of π₀ has E p̂(x) the sampler's density (`raise_log_likelihood`), so
    that E[log f₀(x) − log p̂(x)] ≥ log Z. The bounds are equal where the path is exact.

    `SMC`'s moves are taken without its weights and resampling.

    Args:
        density: with an energy; without static sites.
        exact_points: independent draws of π₀, ``{site: (n, …)}`` or (n, …). With draws
            of another distribution the upper value bounds nothing.
        key: typed random key.
        sampler: the sampler whose path is taken: `AnnealedMCMC`, `SMC`, or `Ancestral`
            (η = 1).
        num_chains: chains that each of the n forward runs, and each point, averages
            over; more of them narrow the bounds from both sides.
        step_size: ``result.step_size`` of a run; needed where the kernel's is
            `Adaptive`.
        chunk: chains evaluated at once; chosen from the size of positions by default.

    Raises:
        CapabilityError: no energy, static sites, an adaptive step size without
            ``step_size``, or a kernel that does not report the probability of its
            reversed moves.
        ShapeError, InvalidValueError, WrongTypeError: a bad argument.

    Example:
        >>> import composeprob as cp, jax, numpyro.distributions as dist
        >>> @cp.program
        ... def single(f):
        ...     return cp.sample("x", f)
        >>> factor = cp.Analytic(dist.Normal(0.0, 1.0), cp.Schedule.log_snr(40))
        >>> density = cp.compile(single, factor)
        >>> points = jax.random.normal(jax.random.key(0), (500,))
        >>> kernel = cp.MALA(lambda s: 0.5 * s.sigma**2)
        >>> sampler = cp.AnnealedMCMC(kernel, steps_per_level=2)
        >>> bounds = cp.metrics.evidence_bounds(
        ...     density, points, jax.random.key(1), sampler=sampler
        ... )
        >>> bounds.contains(0.0)
        True

    References:
        Grosse, Ghahramani and Adams 2015, *Sandwiching the marginal likelihood using
        bidirectional Monte Carlo*. Neal 2001, *Annealed importance sampling*.
    """
    check_key(key)
    count = check_count(num_chains, "num_chains")
    sampler = frozen(sampler, density, step_size)
    if "energy" not in density.capabilities:
        raise CapabilityError(
            "Evidence is the integral of a log-density, but a factor here offers only "
            "its score.",
            where=density.described.where,
            fix="use raise_log_likelihood, which needs scores only, or models with an "
            "energy.",
        )
    points = as_positions(exact_points, density)
    path = Path.of_sampler(sampler, density, weighted=False)
    down_key, up_key = jax.random.split(key)
    at_once = chains_at_once(density, chunk)
    number = count * len(jax.tree.leaves(points)[0])
    down = np.asarray(forward_walks(path, down_key, number, at_once), np.float64)
    up = np.asarray(reverse_walks(path, up_key, points, count, at_once), np.float64)

    # By Jensen's inequality, E log of an unbiased mean is at most its logarithm.
    lower = log_means(down.reshape(-1, count), sampler).values
    log_p = log_means(up.reshape(-1, count), sampler).values
    upper = np.asarray(log_densities(density, points), np.float64) - log_p
    # All forward runs in one mean: the least biased estimate of log Z itself.
    pooled = log_means(down[None], sampler)
    return EvidenceBounds(
        lower=float(lower.mean()),
        lower_error=_standard_error(lower),
        upper=float(upper.mean()),
        upper_error=_standard_error(upper),
        log_evidence=float(pooled.values[0]),
        log_evidence_error=float(pooled.errors[0]),
        lower_values=lower,
        upper_values=upper,
    )


def _standard_error(values: Float[np.ndarray, " n"]) -> float:
    """Return the standard error of a mean; NaN of a single value."""
    if len(values) == 1:
        return math.nan
    return float(values.std(ddof=1) / np.sqrt(len(values)))


End = TypeVar("End")


class Ends(NamedTuple, Generic[End]):
    """Two neighbours on a path, the noisier one above: chains, or noises of levels."""

    above: End
    below: End


class Path(eqx.Module):
    """Path of one chain of a sampler, from its first level to level 0 or in reverse.

    The sampler is one that `frozen` returned. With ``weights`` the path's probability
    is that of the weighted path.
    """

    sampler: Sampler
    density: AnnealedDensity
    layout: Layout
    first: int = eqx.field(static=True)
    weights: Weights | None

    @classmethod
    def of_sampler(
        cls, sampler: Sampler, density: AnnealedDensity, weighted: bool = True
    ) -> Path:
        """Return the path of a sampler, which `frozen` has prepared."""
        weights = sampler.weights if weighted else None
        # A walk in reverse cannot carry log-densities from the noise.
        density = density.untracked()
        return cls(
            sampler=sampler.in_numbers(),
            density=density,
            layout=Layout.of_density(density),
            first=sampler.first_level(density),
            weights=weights,
        )

    @property
    def terms(self) -> bool:
        """True if steps need the terms of the density, not its score alone."""
        return self.sampler.needs_terms(self.density)

    @property
    def by_rate(self) -> bool:
        """True if the path's weights integrate a rate over its steps."""
        return self.weights is not None and self.weights.by_rate

    @property
    def twist(self) -> float | None:
        """Greatest shift of a step towards data, in units of its noise, if there is."""
        step = self.sampler.step
        return step.twist if step is not None and self.terms else None

    @property
    def draws(self) -> int:
        """Number of random streams of a level: of the step and of each transition."""
        moves = self.sampler.moves
        return 1 if moves is None else 1 + moves.count

    def top(self) -> tuple[Step, Array]:
        """Return the law of first draws, N(0, s/P), and log |dx/dy| at level 0.

        The law is a step from 0; y is the coordinate that stands for x₀.
        """
        schedule = self.density.schedule
        noise = schedule.at(self.first)
        # Without reverse steps chains keep their x, not their y, from level to level.
        alpha = noise.alpha if self.sampler.step is None else schedule.at(0).alpha
        variance = noise.variance / self.layout.power(self.density, self.first)
        law = Step.diagonal(jnp.zeros_like(variance), variance)
        return law, self.layout.dims * jnp.log(alpha)

    def walk(
        self, words: Array, y: Float[Array, " dims"], reverse: bool
    ) -> tuple[Particles, Float[Array, ""]]:
        """Take one chain from y at the first level to level 0, or in reverse.

        Returns the chain and the sum of log-ratios of its moves: the probability of
        each move back over that of the move itself. In reverse the log-weight
        increments of the moves back are included.
        """
        moves = self.sampler.moves
        # A walk back takes the kernel's reversal, whose log-ratio is of the way down.
        if moves is not None and reverse:
            moves = dataclasses.replace(moves, kernel=moves.kernel.reversal)
        start = 0 if reverse else self.first
        evaluation = self.layout.evaluate(self.density, y, start, self.terms)
        if moves is None:
            chain = Particles(y, evaluation)
        else:
            chain = moves.start(words, y, evaluation)

        def visit(i: Array, carry: tuple[Particles, Array]) -> tuple[Particles, Array]:
            level = i if reverse else self.first - i
            step = partial(self._step, words, reverse, level)
            # The first visit has no step: the chain starts at its level.
            carry = jax.lax.cond(i > 0, step, lambda carry: carry, carry)
            if moves is None:
                return carry
            return self._transitions(moves, words, level, carry)

        return jax.lax.fori_loop(0, self.first + 1, visit, (chain, jnp.zeros(())))

    def _step(
        self,
        words: Array,
        reverse: bool,
        level: Array,
        carry: tuple[Particles, Array],
    ) -> tuple[Particles, Array]:
        """Step to ``level`` from the one above, or in reverse from the one below."""
        chain, total = carry
        above = level if reverse else level + 1
        below = level - 1 if reverse else level
        noises = Ends(self.density.schedule.at(above), self.density.schedule.at(below))
        down, up = self._laws(noises)
        # Streams are numbered by level: the step's first, then each transition's.
        z = normals(words, level * self.draws, self.layout.dims)
        if self.sampler.step is None:
            # Chains keep their x = α·y.
            scale = noises.above.alpha / noises.below.alpha
            if reverse:
                scale = noises.below.alpha / noises.above.alpha
            y = chain.position * scale
        elif reverse:
            y = up.draw(chain.position, self._drift(chain), z)
        else:
            score = chain.evaluation.score
            y, _, _ = down.predict(
                chain.position, self._drift(chain), score, z, self.twist
            )
        evaluation = self.layout.evaluate(self.density, y, level, self.terms)
        moved = Particles(y, evaluation, chain.inner)
        if reverse:
            log_ratio = self._log_ratio(words, Ends(moved, chain), noises, down, up)
            return moved, total + log_ratio
        log_ratio = self._log_ratio(words, Ends(chain, moved), noises, down, up)
        return moved, total - log_ratio

    def _laws(self, noises: Ends[Noise]) -> tuple[Step, Step]:
        """Return DDPM's step between two levels, and RAISE's step back up."""
        variances = noises.above.variance, noises.below.variance
        power = self.layout.power(self.density, noises.above.index)
        has_moves = self.sampler.moves is not None
        up = Step.upward(*variances, power, has_moves, self.by_rate)
        return Step.ddpm(*variances), up

    def _drift(self, chain: Particles) -> Float[Array, " dims"]:
        """Return the drift that a chain's step follows."""
        evaluation = chain.evaluation
        return evaluation.terms.drift if self.terms else evaluation.score

    def _log_ratio(
        self,
        words: Array,
        chains: Ends[Particles],
        noises: Ends[Noise],
        down: Step,
        up: Step,
    ) -> Float[Array, ""]:
        """Return the log-ratio of the weighted law of the step down to the law of the
        step up."""
        above, below = chains
        log_ratio = jnp.zeros(())
        if self.weights is not None:
            passage = Passage(
                start=above,
                moved=below,
                noise=noises.above,
                end=noises.below,
                density=self.density,
                layout=self.layout,
                words=words,
                half=jnp.int32(0),
                backward=self._backward(noises),
                twist_limit=self.twist,
            )
            log_ratio = self.weights.increment(passage).log_weight
        if self.sampler.step is None:
            return log_ratio
        drift = self._drift(above)
        # Weights include p/q of the twist, so that the law down is the untwisted one.
        shift: Array | float = 0.0
        if self.weights is None:
            shift = down.shift(drift, above.evaluation.score, self.twist)
        log_ratio = log_ratio + down.log_density(
            below.position, above.position, drift, shift
        )
        return log_ratio - up.log_density(
            above.position, below.position, self._drift(below)
        )

    def _backward(self, noises: Ends[Noise]) -> Backward | None:
        """Return the backward law of Feynman–Kac weights that are tempered."""
        if not (self.by_rate and self.density.evaluator.has_user_potential):
            return None
        power = self.layout.power(self.density, self.first)
        above, below = noises
        return Backward.of_step(above.variance, below.variance, power, None, False)

    def _transitions(
        self,
        moves: Transitions,
        words: Array,
        level: Array,
        carry: tuple[Particles, Array],
    ) -> tuple[Particles, Array]:
        """Make the MCMC transitions of a level, which add their own log-ratios."""
        setting = (moves.untuned(1), self.density.schedule.at(level))
        terms = self.terms

        def transition(
            j: Array, carry: tuple[Particles, Array]
        ) -> tuple[Particles, Array]:
            chain, total = carry
            key = key_of(words, level * self.draws + 1 + j)
            chain, info = moves.step(self.density, terms, setting, key, chain)
            return chain, total + jnp.sum(info.log_reversal)

        return jax.lax.fori_loop(0, moves.count, transition, carry)


def reverse_walk(path: Path, key: Array, position: Position) -> Float[Array, ""]:
    """Return log p̂ of one reversal from a point at level 0 to the first level.

    As `raise_log_likelihood` has it, E p̂(x₀) is the sampler's output density. Momenta
    start afresh: their terms cancel, as every refreshment leaves N(0, I) invariant.
    With `SMC`'s weights the target is the weighted path, times ∫ over all paths:
    subtract its log-evidence. Steps that a wall rejected are left out.
    """
    words = jax.random.bits(key, (2,), jnp.uint32)
    top, volume = path.top()
    y = path.layout.vector(position, path.density.schedule.at(0).alpha)
    chain, total = path.walk(words, y, reverse=True)
    zero = jnp.zeros_like(y)
    total = total + top.log_density(chain.position, zero, zero) - volume
    if path.weights is not None:
        total = total + path.weights.first(
            path.layout, path.density, chain.position, chain.evaluation, path.first
        )
        constant = path.weights.first_evidence(path.density, path.first)
        total = total + start_constant(constant)
    return jnp.where(jnp.isfinite(total), total, -jnp.inf)


def forward_walk(path: Path, key: Array) -> Float[Array, ""]:
    """Return log w of one chain without weights, with E w = ∫f₀.

    It is annealed importance sampling: log w = log f₀(x₀) − log top(x_top) + Σ log
    T(x'→x)/T(x→x') + Σ log q(x_{k+1}|x_k)/N(x_k; reverse step).
    """
    words = jax.random.bits(key, (2,), jnp.uint32)
    zero = jnp.zeros((path.layout.dims,))
    top, volume = path.top()
    y = top.draw(zero, zero, normals(words, Stream.INITIAL, zero.size))
    chain, total = path.walk(words, y, reverse=False)
    total = total + log_density_of(chain.evaluation) + volume
    total = total - top.log_density(y, zero, zero)
    return jnp.where(jnp.isfinite(total), total, -jnp.inf)


def start_constant(log_evidence: Float[Array, ""]) -> Float[Array, ""]:
    """Return the log-evidence at which weights start, or 0 if it is unknown.

    The same constant is dropped where the evidence is estimated.
    """
    return jnp.where(jnp.isfinite(log_evidence), log_evidence, 0.0)


def frozen(
    sampler: Sampler, density: AnnealedDensity, step_size: ArrayLike | None
) -> Sampler:
    """Return a sampler with fixed step sizes, prepared for the density.

    Adaptive step sizes are replaced by those of a run, (K,) or (K, B). A sampler whose
    path has no known reversal is refused.
    """
    if not isinstance(density, AnnealedDensity):
        raise WrongTypeError(
            "A likelihood belongs to a compiled density; got "
            f"{type(density).__name__}.",
            fix="call cp.compile first.",
        )
    if not isinstance(sampler, Sampler):
        raise not_a_sampler(sampler)
    _check_steps(sampler, density)
    check_capabilities(sampler, density)
    prepared = sampler.prepare(density)
    _check_single_chain(sampler, prepared, density)
    moves = prepared.moves
    kernel = prepared.kernel
    if moves is None or kernel is None or not any(moves.adaptive):
        return prepared
    if step_size is None:
        raise CapabilityError(
            f"An Adaptive step size depends on all chains, {SINGLE_CHAIN}",
            where=density.described.where,
            fix="use the steps of a run: step_size=result.step_size.",
        )
    steps = filled(step_size, density.num_levels, prepared)
    kernels = [
        replaced(block_kernel, step_size=sizes)
        for block_kernel, sizes in zip(parts_of(kernel), steps.T, strict=True)
    ]
    # Transitions that adapted moved the chains too.
    return sampler.with_moves(with_parts(kernel, kernels), moves.total).prepare(density)


SINGLE_CHAIN = "so the likelihood of a single chain's path is not known."


def _check_steps(sampler: Sampler, density: AnnealedDensity) -> None:
    """Refuse a sampler whose steps from level to level have no known reversal."""
    where = density.described.where
    kind = type(sampler)
    if kind.start is not Sampler.start or kind.descent is not Sampler.descent:
        raise CapabilityError(
            f"The likelihood of {kind.__name__} is not known: its path cannot be "
            "reversed.",
            where=where,
            fix="use cp.Ancestral(), cp.AnnealedMCMC(kernel, steps_per_level) or "
            "cp.SMC(kernel).",
        )
    step = sampler.step
    if step is not None and not _is_ddpm(step):
        raise CapabilityError(
            f"The likelihood of {sampler!r} is known only where its reverse steps are "
            "DDPM's: of first order, without control, with eta=1.",
            where=where,
            fix="use cp.SMC(..., step=cp.ReverseStep(order=1, control='none')) or "
            "cp.Ancestral(eta=1.0).",
        )
    static = [
        repr(name) for name, site in density.sites.items() if site.kind != "noised"
    ]
    if static:
        raise CapabilityError(
            f"{', '.join(static)} is a NumPyro latent: only densities of noised sites "
            "have this likelihood.",
            where=where,
            fix="condition on it, or compile a program without static sites.",
        )


def _is_ddpm(step: ReverseStep) -> bool:
    """Return whether a reverse step is DDPM's, of first order and without control."""
    return step.order == 1 and step.control == "none" and float(step.eta) == 1.0


def _check_single_chain(
    sampler: Sampler, prepared: Sampler, density: AnnealedDensity
) -> None:
    """Refuse a sampler whose moves are fitted to all of its chains."""
    where = density.described.where
    if sampler.finishers:
        raise CapabilityError(
            f"The post-processing of {sampler!r} is fitted to all chains, "
            f"{SINGLE_CHAIN}",
            where=where,
            fix="leave then= out.",
        )
    if measures_metric(prepared.kernel):
        raise CapabilityError(
            f"The kernel's metric is measured from all chains, {SINGLE_CHAIN}",
            where=where,
            fix="give it a kernel with a fixed metric, such as "
            'cp.MALA(cp.Adaptive(), metric="none").',
        )


def filled(
    step_size: ArrayLike, num_levels: int, prepared: Sampler
) -> Float[Array, "levels blocks"]:
    """Return the step sizes of a run, (K,) or (K, B), with no level left out.

    A level that the run skipped has NaN, and gets those of the nearest level.
    """
    steps = np.asarray(step_size, float)
    blocks = prepared.blocks
    shape = (num_levels, len(blocks)) if blocks else (num_levels,)
    visited = np.zeros(0, int)
    if steps.shape == shape:
        finite = np.isfinite(steps).reshape(len(steps), -1).all(1)
        visited = np.flatnonzero(finite)
    if not len(visited):
        raise InvalidValueError(
            f"step_size must have one for each of the {num_levels} levels, shape "
            f"{shape}; got shape {steps.shape}.",
            fix="pass result.step_size of a run of this sampler on this density.",
        )
    if np.any(steps[visited] <= 0):
        raise InvalidValueError(
            "Some step sizes are not positive.", fix="pass result.step_size of a run."
        )
    # Nearest in the number of levels, not in log-SNR.
    distance = np.abs(np.arange(num_levels)[:, None] - visited)
    nearest = visited[distance.argmin(1)]
    return jnp.asarray(steps[nearest]).reshape(num_levels, -1)
