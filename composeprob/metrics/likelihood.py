"""RAISE, the log-likelihood of held-out points under a sampler's output, and bounds of
log Z by the same paths.

`Path` is what a chain of a sampler goes, in either direction, with its log-probability
ratio: `reverse_walk` goes it from a point at level 0 up, by the reversals of steps and
transitions; `forward_walk` goes down. Both return a log-weight whose exponential has a
known expectation: the sampler's output density at the point, and ∫f₀.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from composeprob import tuning
from composeprob.arguments import check_count, check_key
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Position
from composeprob.density.points import log_densities
from composeprob.errors import CapabilityError, InvalidValueError, WrongTypeError
from composeprob.kernels.gibbs import measures_metric, parts_of, replaced, with_parts
from composeprob.kernels.kernel import log_density_of
from composeprob.metrics.distances import as_positions
from composeprob.runtime.infer import not_a_sampler
from composeprob.samplers.choose import check_capabilities
from composeprob.samplers.layout import Layout
from composeprob.samplers.moves import Particles
from composeprob.samplers.random import Stream, key_of, normals
from composeprob.samplers.run import Run, Visits, begin
from composeprob.samplers.sampler import Sampler
from composeprob.samplers.step import Backward, Step
from composeprob.samplers.weights import Weight, first_evidence, first_weight
from composeprob.text import printable


@dataclass(frozen=True, repr=False, eq=False)
class LogLikelihood:
    """`LogLikelihood` holds what `raise_log_likelihood` found; ``print`` it.

    Attributes:
        values: log p̂ of each point, (n,): expected to lie below log p, by about half
            the square of its error.
        errors: Monte-Carlo standard error of each value, (n,); NaN with one chain a
            point.
        ess: effective number of chains of each point relative to their number, (n,):
            near 1/num_chains, one chain decides.
        num_chains: chains a point.
        log_evidence: what was subtracted for `SMC`'s weights; None for other samplers.
        log_evidence_error: its standard error; NaN where it was given, or is None.
    """

    values: np.ndarray
    errors: np.ndarray
    ess: np.ndarray
    num_chains: int
    log_evidence: float | None = None
    log_evidence_error: float = math.nan

    @property
    def mean(self) -> float:
        """The mean log-likelihood of a point, in nats."""
        return float(np.mean(self.values))

    @property
    def standard_error(self) -> float:
        """The standard error of the mean over points, their Monte-Carlo error
        included."""
        return _error(self.values)

    @property
    def monte_carlo_error(self) -> float:
        """The part of the mean's standard error that more chains would remove."""
        shared = 0.0 if math.isnan(self.log_evidence_error) else self.log_evidence_error
        return float(
            np.sqrt(np.sum(self.errors**2) / len(self.values) ** 2 + shared**2)
        )

    def __repr__(self) -> str:
        lost = int(np.sum(~np.isfinite(self.values)))
        text = (
            f"LogLikelihood({self.mean:.3f} ± {self.standard_error:.3f} nats over {len(self.values)} points, "
            f"± {self.monte_carlo_error:.3f} of it from {self.num_chains} chains a point"
        )
        if self.log_evidence is not None:
            text += f"; log-evidence {self.log_evidence:.3f} taken off"
        return printable(text + (f"; {lost} points are not finite)" if lost else ")"))


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
    r"""Estimates the log-likelihood of held-out points under the distribution of a
    sampler's output (RAISE).

    From each point $x_0$ chains walk the sampler's path backwards, level 0 to the top,
    and

    $$\hat p(x_0) = \mathrm{top}(x_\top) \prod_{\text{transitions}} \frac{T(x' \to x)}{T(x \to x')}
      \prod_k \frac{N(x_k;\, \mu(x_{k+1}), v_k)}{q(x_{k+1} \mid x_k)}$$

    has as its expectation exactly the density that the sampler's chains have at $x_0$,
    for adjusted and unadjusted kernels: what a histogram of infinitely many of them
    would show, biases included. log p̂, averaged over num_chains inside the logarithm,
    is therefore expected to lie below the truth and grows towards it with num_chains.

    Under `SMC` the distribution is that of its weighted path, ∏G/Z: its output for
    infinitely many chains, so what resampling does to a finite population is not seen.
    With ``weights="density"`` and adjusted kernels that is π₀/Z itself.

    Points belong to level 0: they should carry its noise, as samples do.

    Args:
        density: compiled, without static sites.
        points: ``{site: (n, …)}``, or (n, …) alone where there is one site.
        key: typed random key.
        sampler: `Ancestral` (η = 1), `AnnealedMCMC` or `SMC` with any kernel that
            reports how its moves are reversed.
        num_chains: reversals of each point.
        log_evidence: of `SMC`'s run, ``result.log_evidence``; left out, four runs of
            1024 chains estimate it.
        step_size: ``result.step_size`` of a run; needed where the kernel's is
            `Adaptive`. The likelihood then is that of the sampler with those steps.
        chunk: reversals evaluated at once; left out, as many as suit the positions'
            size.

    Returns:
        A value for each point, the mean, and its standard errors. The cost is that of
            n·num_chains chains.

    Raises:
        CapabilityError: static sites; an adaptive step size without ``step_size``; a
            kernel that does not know how its moves are reversed.
        ShapeError, InvalidValueError, WrongTypeError: a bad argument.

    Example:
        >>> import composeprob as cp, jax, numpyro.distributions as dist
        >>> @cp.program
        ... def single(f):
        ...     return cp.sample("x", f)
        >>> density = cp.compile(single, cp.Analytic(dist.Normal(0.0, 1.0), cp.Schedule.log_snr(40)))
        >>> points = jax.random.normal(jax.random.key(0), (200,))
        >>> found = cp.metrics.raise_log_likelihood(density, points, jax.random.key(1), sampler=cp.Ancestral())
        >>> abs(found.mean + 1.42) < 0.2  # −½·log(2πe)
        True

    References:
        Burda, Grosse and Salakhutdinov 2015, *Accurate and conservative estimates of
        MRF log-likelihood using reverse annealing*. Grosse, Ancha and Roy 2016,
        *Measuring the reliability of MCMC inference with bidirectional Monte Carlo*.
    """
    check_key(key)
    count = check_count(num_chains, "num_chains")
    sampler = frozen(sampler, density, step_size)
    placed = as_positions(points, density)
    path = Path.of_sampler(sampler, density)
    evidence, error = None, math.nan
    if path.weights is not None:
        key, evidence_key = jax.random.split(key)
        evidence = log_evidence
        if evidence is None:
            evidence, error = estimate_evidence(sampler, density, evidence_key)
        if not np.isfinite(evidence):
            raise InvalidValueError(
                f"The log-evidence is {evidence}.",
                fix="look at result.status of an SMC run.",
            )
    logs = reverse_walks(path, key, placed, count, chains_at_once(density, chunk))
    values, errors, ess = reduced(
        np.asarray(logs, np.float64).reshape(-1, count), sampler
    )
    return LogLikelihood(
        values - float(evidence or 0.0), errors, ess, count, evidence, error
    )


def reduced(
    logs: np.ndarray, sampler: Sampler
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of log-weights (n, c): the log of each row's mean, its standard error, the
    relative effective sample size."""
    from scipy.special import logsumexp, softmax

    if not np.isfinite(logs).any():
        who = "the sampler" if sampler.kernel is None else f"{sampler.kernel!r}"
        raise CapabilityError(
            f"No reversal has a finite probability: the points lie outside the support, or {who} does not report how "
            "likely its moves are reversed (`Info.log_reversal` is NaN for BlackJAX's unadjusted algorithms).",
            fix="check density.log_density at a point; use ULA, UHMC, MALA or HMC.",
        )
    count = logs.shape[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        values = logsumexp(logs, axis=1) - math.log(count)
        ess = 1 / (softmax(logs, axis=1) ** 2).sum(1) / count
        errors = (
            np.sqrt((1 / ess - 1) / (count - 1))
            if count > 1
            else np.full(len(logs), np.nan)
        )
    return values, errors, ess


@eqx.filter_jit
def reverse_walks(
    path: Path, key: Array, points: dict[str, Array], count: int, at_once: int
) -> Array:
    """log p̂ of ``count`` reversals of each of n points, (n·count,)."""

    def walk(i: Array) -> Array:
        return reverse_walk(
            path,
            jax.random.fold_in(key, i),
            jax.tree.map(lambda x: x[i // count], points),
        )

    return in_batches(walk, jax.tree.leaves(points)[0].shape[0] * count, at_once)


@eqx.filter_jit
def forward_walks(path: Path, key: Array, number: int, at_once: int) -> Array:
    """log w of so many chains, (number,)."""
    return in_batches(
        lambda i: forward_walk(path, jax.random.fold_in(key, i)), number, at_once
    )


def in_batches(function: Callable[[Array], Array], total: int, at_once: int) -> Array:
    """function(0), …, function(total − 1), ``at_once`` at a time; traced once."""
    size = min(total, at_once)
    batches = -(-total // size)
    index = jnp.minimum(jnp.arange(batches * size), total - 1).reshape(batches, size)
    return jax.lax.map(jax.vmap(function), index).reshape(-1)[:total]


def estimate_evidence(
    sampler: Sampler, density: AnnealedDensity, key: Array
) -> tuple[float, float]:
    """The log-evidence of `SMC`'s path and its standard error, from independent
    runs."""
    sampler, first = sampler.in_numbers(), sampler.first_level(density)
    visits, keys = (
        Visits.every(first, density.num_levels),
        jax.random.split(key, tuning.EVIDENCE_RUNS),
    )
    logs = np.array(
        [
            float(
                _evidence(
                    sampler, density, begin(k, tuning.EVIDENCE_CHAINS, visits), first
                )
            )
            for k in keys
        ]
    )
    relative = np.exp(logs - logs.max())
    error = relative.std(ddof=1) / relative.mean() / np.sqrt(len(logs))
    return float(logs.max() + np.log(relative.mean())), float(error)


@eqx.filter_jit
def _evidence(
    sampler: Sampler, density: AnnealedDensity, run: Run, first: int
) -> Array:
    run = sampler.start(run, density, first)
    run = eqx.tree_at(lambda r: r.log_evidence, run, start_constant(run.log_evidence))
    return sampler.advance(run, density, first + 1).log_evidence


def chains_at_once(density: AnnealedDensity, chunk: object) -> int:
    """How many chains are evaluated at once."""
    if chunk is not None:
        return check_count(chunk, "chunk")
    size = sum(math.prod(site.shape) for site in density.sites.values())
    return min(
        8192, max(1, 2**20 // max(size, 1))
    )  # a million numbers in their positions at most


@dataclass(frozen=True, repr=False, eq=False)
class EvidenceBounds:
    """`EvidenceBounds` holds a stochastic lower and upper bound of log Z; ``print`` it.

    Attributes:
        lower: mean of log ŵ over forward runs: its expectation is at most log Z.
        lower_error: its standard error.
        upper: mean of log f₀ − log p̂ over exact points: its expectation is at least
            log Z.
        upper_error: its standard error.
        log_evidence: log of the mean of the same ŵ, which estimates log Z itself and
            lies above ``lower``.
        log_evidence_error: its standard error, by the delta method; not to be trusted
            where it exceeds 0.3.
        lower_values: log ŵ of each forward run, (n,).
        upper_values: log f₀ − log p̂ of each point, (n,).
    """

    lower: float
    lower_error: float
    upper: float
    upper_error: float
    log_evidence: float
    log_evidence_error: float
    lower_values: np.ndarray
    upper_values: np.ndarray

    @property
    def width(self) -> float:
        """The gap upper − lower, in nats: how far the sampler's path is from exact
        annealing, at least 0 on average."""
        return self.upper - self.lower

    def contains(self, log_z: float, errors: float = 4.0) -> bool:
        """Returns whether log Z lies between the bounds, each widened by this many
        standard errors."""
        return bool(
            self.lower - errors * self.lower_error
            <= log_z
            <= self.upper + errors * self.upper_error
        )

    def __repr__(self) -> str:
        return printable(
            f"EvidenceBounds({self.lower:.3f} ± {self.lower_error:.3f} ≤ log Z ≤ {self.upper:.3f} ± "
            f"{self.upper_error:.3f}; forward estimate {self.log_evidence:.3f} ± {self.log_evidence_error:.3f})"
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
    r"""Bounds log Z = log ∫f₀, with f₀ = exp(density.log_density(·, 0)), from below and
    from above.

    Annealed importance sampling down the sampler's path has weights w with E w = Z, so
    that E log ŵ ≤ log Z for ŵ the mean of num_chains of them. The reversed path from an
    *exact* draw of π₀ has E p̂(x) the sampler's density (`raise_log_likelihood`), so
    that E[log f₀(x) − log p̂(x)] ≥ log Z. The two meet where the path is exact.

    `SMC`'s moves are taken without its weights and resampling.

    Args:
        density: with an energy; without static sites.
        exact_points: independent draws of π₀, ``{site: (n, …)}`` or (n, …). From
            another distribution the upper bound is none.
        key: typed random key.
        sampler: whose path to take: `AnnealedMCMC`, `SMC`, or `Ancestral` (η = 1).
        num_chains: chains that each of the n forward runs, and each point, averages
            over; more close in from both sides.
        step_size: ``result.step_size`` of a run; needed where the kernel's is
            `Adaptive`.
        chunk: chains evaluated at once; left out, as many as suit the positions' size.

    Raises:
        CapabilityError: no energy, static sites, an adaptive step size without
            ``step_size``, or a kernel that does not know how its moves are reversed.
        ShapeError, InvalidValueError, WrongTypeError: a bad argument.

    Example:
        >>> import composeprob as cp, jax, numpyro.distributions as dist
        >>> @cp.program
        ... def single(f):
        ...     return cp.sample("x", f)
        >>> density = cp.compile(single, cp.Analytic(dist.Normal(0.0, 1.0), cp.Schedule.log_snr(40)))
        >>> points = jax.random.normal(jax.random.key(0), (500,))
        >>> sampler = cp.AnnealedMCMC(cp.MALA(lambda s: 0.5 * s.sigma**2), steps_per_level=2)
        >>> cp.metrics.evidence_bounds(density, points, jax.random.key(1), sampler=sampler).contains(0.0)
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
            "Evidence is the integral of a log-density, but a factor here offers only its score.",
            where=density.described.where,
            fix="use raise_log_likelihood, which needs scores only, or models with an energy.",
        )
    points = as_positions(exact_points, density)
    path = Path.of_sampler(sampler, density, weighted=False)
    (down_key, up_key), at_once = jax.random.split(key), chains_at_once(density, chunk)
    number = count * len(jax.tree.leaves(points)[0])
    down = np.asarray(forward_walks(path, down_key, number, at_once), np.float64)
    up = np.asarray(reverse_walks(path, up_key, points, count, at_once), np.float64)
    lower, _, _ = reduced(down.reshape(-1, count), sampler)
    below, _, _ = reduced(up.reshape(-1, count), sampler)
    upper = np.asarray(log_densities(density, points), np.float64) - below
    pooled, pooled_error, _ = reduced(down[None], sampler)
    return EvidenceBounds(
        lower=float(lower.mean()), lower_error=_error(lower), upper=float(upper.mean()), upper_error=_error(upper),
        log_evidence=float(pooled[0]), log_evidence_error=float(pooled_error[0]), lower_values=lower,
        upper_values=upper,
    )  # fmt: skip


def _error(values: np.ndarray) -> float:
    return (
        float(values.std(ddof=1) / np.sqrt(len(values)))
        if len(values) > 1
        else math.nan
    )


class Path(eqx.Module):
    """What one chain of a sampler, as `frozen` prepares it, does from the level
    ``first`` on, with its ``weights``."""

    sampler: Sampler
    density: AnnealedDensity
    layout: Layout
    first: int = eqx.field(static=True)
    weights: str | None = eqx.field(static=True)

    @classmethod
    def of_sampler(
        cls, sampler: Sampler, density: AnnealedDensity, weighted: bool = True
    ) -> Path:
        """The path of a sampler that `frozen` returned, with or without its weights."""
        layout, first = Layout.of_density(density), sampler.first_level(density)
        return cls(
            sampler.in_numbers(),
            density,
            layout,
            first,
            sampler.weights if weighted else None,
        )

    def top(self) -> tuple[Step, Array]:
        """N(0, s/P), which first draws have, as a step from 0; and log |dx/dy| of the y
        that stands for x₀."""
        noise, schedule = self.density.schedule.at(self.first), self.density.schedule
        alpha = noise.alpha if self.sampler.step is None else schedule.at(0).alpha
        variance = noise.variance / self.layout.power(self.density, self.first)
        return Step.diagonal(
            jnp.zeros_like(variance), variance
        ), self.layout.dims * jnp.log(alpha)

    def walk(self, words: Array, y: Array, reverse: bool) -> tuple[Particles, Array]:
        """One chain from y at the first level to level 0, or in reverse, and Σ log of
        the probability of each way back over that of the way there; in reverse with
        what the way back gains in weight."""
        density, layout, move, moves = (
            self.density,
            self.layout,
            self.sampler.step,
            self.sampler.moves,
        )
        parts, mixed = self.sampler.needs_terms(density), moves is not None
        twist = move.twist if move is not None and parts else None
        if moves is not None and reverse:
            moves = dataclasses.replace(moves, kernel=moves.kernel.reversal)
        draws = 1 + (0 if moves is None else moves.count)

        def drift(chain: Particles) -> Array:
            return chain.evaluation.terms.drift if parts else chain.evaluation.score

        def step(
            level: Array, carry: tuple[Particles, Array]
        ) -> tuple[Particles, Array]:
            chain, total = carry
            noise, end = (
                density.schedule.at(k + (0 if reverse else 1))
                for k in (level, level - 1)
            )
            s = noise.variance, end.variance
            down, up = (
                Step.ddpm(*s),
                Step.upward(
                    *s, layout.power(density, noise.index), mixed, self.weights
                ),
            )
            z = normals(words, level * draws, layout.dims)
            if move is None:
                y = chain.position * (
                    end.alpha / noise.alpha if reverse else noise.alpha / end.alpha
                )
            elif reverse:
                y = up.draw(chain.position, drift(chain), z)
            else:
                y, _, _ = down.predict(
                    chain.position, drift(chain), chain.evaluation.score, z, twist
                )
            moved = Particles(y, layout.evaluate(density, y, level, parts), chain.inner)
            above, below = (moved, chain) if reverse else (chain, moved)
            ratio = jnp.zeros(())
            if self.weights is not None:
                tempered = (
                    density.evaluator.has_user_potential
                    and self.weights == "feynman_kac"
                )
                backward = (
                    Backward.of_step(*s, layout.power(density, self.first), None, False)
                    if tempered
                    else None
                )
                weight = Weight(self.weights, density, layout, twist)
                ratio, _ = weight.increment(
                    words, jnp.int32(0), above, below, noise, end, backward
                )
            if move is not None:
                # Weights have p/q of the twist in them: of the two nothing is left.
                shift = (
                    0.0
                    if self.weights
                    else down.shift(drift(above), above.evaluation.score, twist)
                )
                ratio = ratio + down.log_density(
                    below.position, above.position, drift(above), shift
                )
                ratio = ratio - up.log_density(
                    above.position, below.position, drift(below)
                )
            return moved, total + (ratio if reverse else -ratio)

        def visit(i: Array, carry: tuple[Particles, Array]) -> tuple[Particles, Array]:
            level = i if reverse else self.first - i
            carry = jax.lax.cond(
                i > 0, partial(step, level), lambda carry: carry, carry
            )
            if moves is None:
                return carry
            place = density, parts, (moves.untuned(1), density.schedule.at(level))

            def transition(
                j: Array, carry: tuple[Particles, Array]
            ) -> tuple[Particles, Array]:
                chain, info = moves.step(
                    *place, key_of(words, level * draws + 1 + j), carry[0]
                )
                return chain, carry[1] + jnp.sum(info.log_reversal)

            return jax.lax.fori_loop(0, moves.count, transition, carry)

        found = layout.evaluate(density, y, 0 if reverse else self.first, parts)
        chain = Particles(y, found) if moves is None else moves.start(words, y, found)
        return jax.lax.fori_loop(0, self.first + 1, visit, (chain, jnp.zeros(())))


def reverse_walk(path: Path, key: Array, position: Position) -> Array:
    """One reversal from a point at level 0 to the first level: log p̂, as
    `raise_log_likelihood` has it, with E p̂(x₀) the sampler's output density.

    Momenta start afresh: their terms cancel, as every refreshment leaves N(0, I) alone.
    With `SMC`'s weights the target is the weighted path, times ∫ over all paths:
    subtract its log-evidence. Steps that a wall kept where they were are left out.
    """
    words, layout, (top, volume) = (
        jax.random.bits(key, (2,), jnp.uint32),
        path.layout,
        path.top(),
    )
    y = layout.vector(position, path.density.schedule.at(0).alpha)
    chain, total = path.walk(words, y, reverse=True)
    total = (
        total
        + top.log_density(chain.position, jnp.zeros_like(y), jnp.zeros_like(y))
        - volume
    )
    if path.weights is not None:
        total = total + first_weight(
            layout, path.density, chain.position, chain.evaluation, path.first
        )
        total = total + start_constant(first_evidence(path.density, path.first))
    return jnp.where(jnp.isfinite(total), total, -jnp.inf)


def forward_walk(path: Path, key: Array) -> Array:
    """One chain of the sampler, without weights: log w with E w = ∫f₀ (annealed
    importance sampling).

    log w = log f₀(x₀) − log top(x_top) + Σ log T(x'→x)/T(x→x') + Σ log
    q(x_{k+1}|x_k)/N(x_k; reverse step).
    """
    words, zero, (top, volume) = (
        jax.random.bits(key, (2,), jnp.uint32),
        jnp.zeros((path.layout.dims,)),
        path.top(),
    )
    y = top.draw(zero, zero, normals(words, Stream.INITIAL, zero.size))
    chain, total = path.walk(words, y, reverse=False)
    total = (
        total
        + log_density_of(chain.evaluation)
        + volume
        - top.log_density(y, zero, zero)
    )
    return jnp.where(jnp.isfinite(total), total, -jnp.inf)


def start_constant(log_evidence: Array) -> Array:
    """The log-evidence that weights start from; an unknown one is dropped, here and
    where the evidence is estimated."""
    return jnp.where(jnp.isfinite(log_evidence), log_evidence, 0.0)


def frozen(
    sampler: Sampler, density: AnnealedDensity, step_size: ArrayLike | None
) -> Sampler:
    """The sampler, prepared for the density, with adaptive step sizes replaced by those
    that a run came to, (K,) or (K, B); refused where its path has no reversal."""
    if not isinstance(density, AnnealedDensity):
        fix = "call cp.compile first."
        raise WrongTypeError(
            f"A likelihood belongs to a compiled density; got {type(density).__name__}.",
            fix=fix,
        )
    if not isinstance(sampler, Sampler):
        raise not_a_sampler(sampler)

    def refuse(when: object, found: str, fix: str) -> None:
        if when:
            raise CapabilityError(found, where=density.described.where, fix=fix)

    kind, step = type(sampler), sampler.step
    refuse(kind.start is not Sampler.start or kind.descent is not Sampler.descent,
           f"The likelihood of {kind.__name__} is not known: its path cannot be reversed.",
           "use cp.Ancestral(), cp.AnnealedMCMC(kernel, steps_per_level) or cp.SMC(kernel).")  # fmt: skip
    refuse(step is not None and (step.order != 1 or step.control != "none" or float(step.eta) != 1.0),
           f"The likelihood of {sampler!r} is known only where its reverse steps are DDPM's: of first order, without "
           "control, with eta=1.",
           "use cp.SMC(..., step=cp.ReverseStep(order=1, control='none')) or cp.Ancestral(eta=1.0).")  # fmt: skip
    static = ", ".join(
        repr(name) for name, site in density.sites.items() if site.kind != "noised"
    )
    refuse(static, f"{static} is a NumPyro latent: only densities of noised sites have this likelihood.",
           "condition on it, or compile a program without static sites.")  # fmt: skip
    check_capabilities(sampler, density)
    prepared, chain = (
        sampler.prepare(density),
        "so the likelihood of a single chain's path is not known.",
    )
    moves, kernel = prepared.moves, prepared.kernel
    refuse(
        sampler.finishers,
        f"What closes {sampler!r} is fitted to all chains, {chain}",
        "leave then= out.",
    )
    refuse(measures_metric(kernel), f"The kernel's metric is measured from all chains, {chain}",
           'give it a kernel with a fixed metric, such as cp.MALA(cp.Adaptive(), metric="none").')  # fmt: skip
    if moves is None or kernel is None or not any(moves.adaptive):
        return prepared
    refuse(step_size is None, f"An Adaptive step size depends on all chains, {chain}",
           "take the steps that a run came to: step_size=result.step_size.")  # fmt: skip
    assert step_size is not None
    steps = filled(step_size, density.num_levels, prepared)
    kernels = [
        replaced(part, step_size=h)
        for part, h in zip(parts_of(kernel), steps.T, strict=True)
    ]
    # Transitions that adapted moved the chains too.
    return sampler.with_moves(with_parts(kernel, kernels), moves.total).prepare(density)


def filled(step_size: ArrayLike, num_levels: int, prepared: Sampler) -> Array:
    """Steps of a run of a sampler, (K,) or (K, B), as (K, B); of a level that it
    skipped, where they are NaN, those of the nearest level."""
    steps = np.asarray(step_size, float)
    shape = (num_levels, len(prepared.blocks)) if prepared.blocks else (num_levels,)
    finite = (
        np.isfinite(steps).reshape(len(steps), -1).all(1)
        if steps.shape == shape
        else np.zeros(0, bool)
    )
    known = np.flatnonzero(finite)
    if not len(known):
        raise InvalidValueError(
            f"step_size must have one for each of the {num_levels} levels, shape {shape}; got shape {steps.shape}.",
            fix="pass result.step_size of a run of this sampler on this density.",
        )
    if np.any(steps[known] <= 0):
        raise InvalidValueError(
            "Some step sizes are not positive.", fix="pass result.step_size of a run."
        )
    nearest = known[np.abs(np.arange(num_levels)[:, None] - known).argmin(1)]
    return jnp.asarray(steps[nearest]).reshape(num_levels, -1)
