r"""p(y | x_k) in closed form: y = A·x₀ + b + N(0, Σ) under a prior Σ_j w_j·N(μ_j, C_j)
of x₀.

With x = x_k = α·x₀ + σ·ε, S_j = α²·C_j + σ²·I and K_j = C_j·S_j⁻¹, component j states
of x and of y given x

    N(x; α·μ_j, S_j)    and    N(y; A·m_j + b, Σ + σ²·A·K_j·Aᵀ),
    m_j = μ_j + α·K_j·(x − α·μ_j),

so p(y | x) is the average of the second under the responsibilities that the first gives
the components. C_j is stored by its eigenvectors U_j and eigenvalues, so nothing of the
size of x is ever inverted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree
from jax.scipy.linalg import block_diag
from jaxtyping import Bool, Float, Int

from composeprob.compiler.conjugate import (
    NotGaussian,
    Prior,
    alike,
    check_size,
    connected,
)
from composeprob.compiler.facts import Bound, Facts
from composeprob.compiler.linearity import Kind
from composeprob.compiler.trace import (
    Moments,
    Replay,
    Shapes,
    Sites,
    Traced,
    moments,
    not_linear,
)
from composeprob.density.once import once
from composeprob.factors.gaussians import Gaussians, joint
from composeprob.factors.whitening import log_normal_of_sum, whitener
from composeprob.ir.leaves import Observation
from composeprob.language.policies import Policy, bridge
from composeprob.schedule import Noise, Schedule


class Exact(Policy):
    """The density of the value given x_k in closed form: of a linear observation with
    Gaussian noise, under a prior that is a mixture of Gaussians."""

    @property
    def form(self) -> str:
        return "exactly"

    def bind(self, observation: Observation, facts: Facts) -> Bound | str:
        reason = facts.not_mixture(observation) or facts.not_linear(observation)
        if reason:
            return reason
        # The closed form itself may be a reason, if it is too large.
        name = observation.name
        joint = facts.shared(_joint_form)
        if name not in joint.asked:
            joint = _form_of(facts, (*joint.asked, name))
        return joint.reasons.get(name) or Bound(self, _joined)


class JointForm(NamedTuple):
    """Observations in one closed form, and reasons against those that cannot be in it.

    Attributes:
        asked: the observations that may be in it.
        term: the closed form of those without a reason; None where there are none.
        reasons: why an observation makes the closed form too large, or is not linear.
    """

    asked: tuple[str, ...]
    term: ExactTerm | None
    reasons: dict[str, str]


def _joint_form(facts: Facts) -> JointForm:
    """Return the closed form of all observations that ask for one, or left it open."""
    names = []
    for o in facts.candidates:
        asks = o.anneal is None or isinstance(o.anneal, Exact)
        if asks and not facts.not_mixture(o) and not facts.not_linear(o):
            names.append(o.name)
    return _form_of(facts, tuple(names))


def _form_of(facts: Facts, names: tuple[str, ...]) -> JointForm:
    """Return the closed form of these observations, without as few as need be."""
    reasons: dict[str, str] = {}
    term = None
    priors = {name: facts.priors[name] for name, _ in facts.shapes}
    left = names
    # Each pass without success has added a reason, so the loop ends.
    while left and term is None:
        bridged = facts.depend_on_statics(left)
        term = grouped(
            facts.traced, left, facts.shapes, priors, facts.xs, bridged, reasons
        )
        left = tuple(name for name in left if name not in reasons)
    return JointForm(names, term, reasons)


def _joined(policy: Policy, names: tuple[str, ...], facts: Facts) -> object:
    """Return the term of the observations that are bound."""
    term = facts.shared(_joint_form).term
    if term is None or term.names != names:
        # A policy of another class has bound some of them by this law.
        term = _form_of(facts, names).term
    return term


class Measurement(NamedTuple):
    """Every measurement, to first order in every noised entry."""

    residual: Float[Array, " m"]  # y − b
    slope: Float[Array, "m d"]  # A
    covariance: Float[Array, "m m"]  # Σ


class LogDensities(NamedTuple):
    """Three log-densities of a group.

    They are computed as one array of shape (3,), so that a single transposed pass gives
    the gradient of any of them.
    """

    exact: Array | float  # log p(y | x)
    clean: Array | float  # log p(y | x₀ = x/α)
    prior: Array | float  # log p(x)


class Stack(eqx.Module):
    """Measurements that share no entry of a site, with mixtures of one shape: B groups
    evaluated together.

    Attributes:
        rows: the measurements of each group.
        columns: the entries that they depend on.
        log_weights: log w_j.
        means: μ_j.
        basis: U_j, with one for all components where these are alike; None where every
            C is diagonal.
        widths: eigenvalues of C_j, with one row for all components where these are
            alike.
    """

    rows: Int[Array, "groups m"]
    columns: Int[Array, "groups n"]
    log_weights: Float[Array, "groups components"]
    means: Float[Array, "groups components n"]
    basis: Float[Array, "groups components_or_1 n n"] | None
    widths: Float[Array, "groups components_or_1 n"]

    def __call__(
        self, x: Float[Array, " d"], measured: Measurement, noise: Noise
    ) -> Float[Array, " terms"]:
        """The `LogDensities` of all groups together."""
        y, a, covariance = measured
        x = x[self.columns]
        y = y[self.rows]
        a = a[self.rows[:, :, None], self.columns[:, None, :]]
        covariance = covariance[self.rows[:, :, None], self.rows[:, None, :]]
        of_group = jax.vmap(partial(_log_densities, noise))
        return jnp.sum(of_group(self, x, y, a, covariance), 0)


def _log_densities(
    noise: Noise,
    group: Stack,
    x: Float[Array, " n"],
    y: Float[Array, " m"],
    a: Float[Array, "m n"],
    covariance: Float[Array, "m m"],
) -> Float[Array, " terms"]:
    """The `LogDensities` of one group, a `Stack` without its leading axis."""
    alpha = noise.alpha
    squared = noise.sigma**2
    away = x - alpha * group.means
    # Uᵀ·(x − α·μ), in which S and K are diagonal.
    rotated = away
    if group.basis is not None:
        rotated = jnp.einsum("...ik,...i->...k", group.basis, away)
    spread = alpha**2 * group.widths + squared
    size = x.shape[-1] * math.log(2 * math.pi)
    of_x = (
        group.log_weights
        - 0.5 * jnp.sum(rotated**2 / spread + jnp.log(spread), -1)
        - 0.5 * size
    )
    gain = group.widths / spread
    step = gain * rotated
    if group.basis is not None:
        step = jnp.einsum("...ik,...k->...i", group.basis, step)
    loadings = a if group.basis is None else a @ group.basis
    instrument = whitener(covariance)
    # σ²·A·K·Aᵀ = blur·blurᵀ: kept apart from Σ, which may be far smaller than it, or
    # rounding would cost hundreds of nats.
    blur = noise.sigma * loadings * jnp.sqrt(gain)[..., None, :]
    predicted = (group.means + alpha * step) @ a.T  # A·m_j
    of_y = log_normal_of_sum(y - predicted, instrument, blur)
    no_blur = jnp.zeros_like(y)[:, None]
    clean = log_normal_of_sum(y - a @ (x / alpha), instrument, no_blur)
    # p(y | x): the mean over components under their responsibilities for x.
    exact = jax.nn.logsumexp(jax.nn.log_softmax(of_x) + of_y)
    return jnp.stack(LogDensities(exact, clean, jax.nn.logsumexp(of_x)))


class ClosedForm(NamedTuple):
    """The closed-form term E = p(y | x_k) at one position.

    ``annealed`` is not E but a power of it or, at level 0, the likelihood. Where E is
    tiny that power is not a sum of log E and a correction, which would cancel to
    rounding.

    Attributes:
        log_exact: log E.
        of_exact: ∇log E.
        annealed: the term that the density has in the place of log E.
        of_annealed: its gradient.
        crossed: what the rate gains.
    """

    log_exact: Float[Array, ""]
    of_exact: Sites
    annealed: Float[Array, ""]
    of_annealed: Sites
    crossed: Float[Array, ""]

    @property
    def correction(self) -> Float[Array, ""]:
        """The log-potential that turns E into the density's term."""
        return self.annealed - self.log_exact


def no_closed_form(xs: Sites, zs: Sites) -> ClosedForm:
    """The constant 1, for programs without exactly annealed observations."""
    zero = jnp.zeros((), jnp.result_type(float))
    zeros = jax.tree.map(jnp.zeros_like, {**xs, **zs})
    return ClosedForm(zero, zeros, zero, zeros, zero)


class ExactTerm(eqx.Module):
    """The likelihood of every observation that is annealed exactly.

    Attributes:
        stacks: the groups.
        inside: True for the entries of A that the groups read; were another one more
            than rounding, the density is NaN.
        names: the observations.
        shapes: the noised sites that they depend on, ``(site, shape)``.
        marginal: True if the sites' densities are the noised marginals of the prior
            that the groups hold.
        bridged: True if they depend on static sites: their power then rises level by
            level.
    """

    stacks: tuple[Stack, ...]
    inside: Bool[Array, "m d"] | Bool[np.ndarray, "m d"]
    names: tuple[str, ...] = eqx.field(static=True)
    shapes: Shapes = eqx.field(static=True)
    marginal: bool = eqx.field(static=True)
    bridged: bool = eqx.field(static=True)

    def __call__(
        self,
        replay: Replay,
        xs: Sites,
        zs: Sites,
        schedule: Schedule,
        noise: Noise,
        drift: Sites,
    ) -> ClosedForm:
        """The closed-form term at a position, where ``drift`` is ∇log F, with zeros at
        static sites.

        At level 0 every policy is the posterior that the program promises, seen at x/α;
        E has level 0's noise in it like a marginal, and the correction takes it out. At
        the noisiest levels it takes out a power of E that static sites shall not see
        yet. The rate of F·E is that of F where F is the noised prior q that E is
        derived from, as E·q is a noised marginal too; elsewhere it is ⟨∇log F − ∇log q,
        ∇log E⟩ more, by the rule for the product F·(E·q)·q⁻¹.
        """
        terms, pull = jax.vjp(partial(self._log_densities, replay, noise), xs, zs)
        log_exact, log_clean, _ = terms

        def gradient(weights: LogDensities) -> Sites:
            """The gradient of the log-densities' sum under these weights."""
            of_x, of_z = pull(jnp.asarray(weights, terms.dtype))
            return {**of_x, **of_z}

        of_exact = gradient(LogDensities(exact=1.0, clean=0.0, prior=0.0))
        of_clean = gradient(LogDensities(exact=0.0, clean=1.0, prior=0.0))
        is_last = noise.index == 0
        power = bridge(schedule, noise) if self.bridged else jnp.ones_like(log_exact)
        annealed = jnp.where(is_last, log_clean, power * log_exact)
        of_annealed = {
            name: jnp.where(is_last, of_clean[name], power * slope)
            for name, slope in of_exact.items()
        }
        crossed = jnp.zeros((), jnp.result_type(float))
        if not self.marginal:
            of_prior = gradient(LogDensities(exact=0.0, clean=0.0, prior=1.0))
            for name, _ in self.shapes:
                beside_prior = drift[name] - of_prior[name]
                crossed = crossed + jnp.sum(beside_prior * of_exact[name])
        return ClosedForm(log_exact, of_exact, annealed, of_annealed, crossed)

    def _log_densities(
        self, replay: Replay, noise: Noise, xs: Sites, zs: Sites
    ) -> Float[Array, " terms"]:
        """The `LogDensities` of all observations at a position."""

        def moments_at(at: Sites) -> list[tuple[Array, Array]]:
            statements, _ = replay(at, zs, noise.index)
            return [moments(statements[name]) for name in self.names]

        # About the origin, where the residual is y − b.
        origin = {name: jnp.zeros_like(x) for name, x in xs.items()}
        measured = measure(self.shapes, moments_at, origin)
        x = jnp.concatenate([jnp.ravel(xs[name]) for name, _ in self.shapes])
        total = jnp.zeros(3)
        for stack in self.stacks:
            total = total + stack(x, measured, noise)
        # A that depends on latents may come to read entries that it never read where
        # the groups were formed.
        sizes = jnp.abs(measured.slope)
        outside = jnp.where(self.inside, 0.0, sizes)
        misread = outside > 1e-4 * jnp.max(sizes, -1, keepdims=True)
        return jnp.where(jnp.any(misread), jnp.nan, total)


def measure(
    shapes: Shapes,
    moments_at: Moments,
    at: Sites,
    jacobian: Callable[..., Any] = jax.jacfwd,
) -> Measurement:
    """Observations of noised sites to first order about ``at``: the residual there, its
    slope, its noise."""
    names = [name for name, _ in shapes]
    start, unravel = ravel_pytree([at[name] for name in names])

    def residuals(flat: Array) -> tuple[Array, tuple[Array, Array]]:
        values = dict(zip(names, unravel(flat), strict=True))
        pairs = moments_at({**at, **values})
        residual = jnp.concatenate([residual for residual, _ in pairs])
        covariance = block_diag(*[covariance for _, covariance in pairs])
        return residual, (residual, covariance)

    slope, (residual, covariance) = jacobian(residuals, has_aux=True)(start)
    return Measurement(residual, -slope, covariance)


def stack_of(mixture: Gaussians, rows: np.ndarray) -> Stack:
    """One group: a mixture over entries, and the measurements that depend on them."""
    covariances = mixture.covariances
    if alike(mixture):
        covariances = covariances[:1]
    basis = None
    widths = covariances
    if covariances.ndim == 3:
        widths, basis = np.linalg.eigh(covariances)
        widths = np.maximum(widths, 0.0)  # negative ones are rounding
    dtype = jnp.result_type(float)
    if basis is not None:
        basis = basis.astype(dtype)
    fields = {
        "rows": rows,
        "columns": mixture.entries,
        "log_weights": mixture.log_weights.astype(dtype),
        "means": mixture.means.astype(dtype),
        "basis": basis,
        "widths": widths.astype(dtype),
    }
    return Stack(**jax.tree.map(lambda a: a[None], fields))


def stacked(groups: list[Stack]) -> tuple[Stack, ...]:
    """Groups whose arrays have the same shapes joined."""
    by_shapes: dict[tuple[tuple[int, ...], ...], list[Stack]] = {}
    for group in groups:
        shapes = tuple(map(np.shape, jax.tree.leaves(group)))
        by_shapes.setdefault(shapes, []).append(group)
    stacks = []
    for alike_groups in by_shapes.values():
        stack = jax.tree.map(lambda *arrays: np.concatenate(arrays), *alike_groups)
        stacks.append(stack)
    return tuple(stacks)


def grouped(
    traced: Traced,
    names: tuple[str, ...],
    shapes: Shapes,
    priors: Mapping[str, Prior | str],
    xs: Sites,
    bridged: bool,
    reasons: dict[str, str],
) -> ExactTerm | None:
    """The measurements, sorted into groups that share no entry.

    None if the closed form of an observation is impossible: ``reasons`` then gains it.
    """
    structure = _structure(traced, names, shapes, xs)
    depends, correlated, errors = (np.asarray(a) for a in structure)
    # The observation that each row of the measurement belongs to.
    owner = np.repeat(np.arange(len(names)), traced.sizes(names))
    # A derivative was stopped or replaced where A·x + b is not the mean.
    not_linear_names = {names[i] for i in owner[np.abs(errors).max(0) > 1e-3]}
    if not_linear_names:
        reasons |= dict.fromkeys(not_linear_names, not_linear())
        return None
    mixtures = _mixtures(shapes, priors)
    count = len(owner)
    reads = np.zeros((count, len(mixtures)), bool)
    for column, mixture in enumerate(mixtures):
        reads[:, column] = depends[:, mixture.entries].any(1)
    # A row holds together itself, the rows that its noise is correlated with, and the
    # mixtures that it depends on.
    holds = np.hstack([correlated | np.eye(count, dtype=bool), reads])
    inside = np.zeros(depends.shape, bool)
    groups: list[Stack] = []
    for rows in connected([np.flatnonzero(row) for row in holds]):
        read = [mixtures[column] for column in np.flatnonzero(reads[rows].any(0))]
        try:
            check_size(read, len(rows))
        except NotGaussian as reason:
            # Without the observation that joins most, the others may be small enough.
            widest = rows[holds[rows].sum(1).argmax()]
            reasons[names[owner[widest]]] = str(reason)
            return None
        mixture = joint(read) if read else _no_entries()
        inside[np.ix_(rows, mixture.entries)] = True
        groups.append(stack_of(mixture, rows))
    marginal = True
    for prior in priors.values():
        if isinstance(prior, Prior) and not prior.marginal:
            marginal = False
    return ExactTerm(stacked(groups), inside, names, shapes, marginal, bridged)


def _mixtures(shapes: Shapes, priors: Mapping[str, Prior | str]) -> list[Gaussians]:
    """The priors' mixtures, with the entries of all noised sites counted one site after
    another."""
    mixtures = []
    offset = 0
    for name, shape in shapes:
        prior = priors[name]
        if isinstance(prior, Prior):
            for mixture in prior.parts:
                entries = mixture.entries + offset
                mixtures.append(replace(mixture, entries=entries))
        offset += int(np.prod(shape))
    return mixtures


def _no_entries() -> Gaussians:
    """The prior of measurements that read no noised entry."""
    return Gaussians(np.zeros(0, int), np.zeros(1), np.zeros((1, 0)), np.zeros((1, 0)))


@once
def _structure(
    traced: Traced, names: tuple[str, ...], shapes: Shapes, xs: Sites
) -> tuple[Bool[Array, "m d"], Bool[Array, "m m"], Float[Array, "4 m"]]:
    """Masks of the entries of A and of Σ that can be non-zero, and the error of A·x + b
    at x for some draws of the static sites."""

    def at_draw(key: Array) -> tuple[Array, Array, Array]:
        moments_at = traced.moments_at(names, xs, key)
        origin = jax.tree.map(jnp.zeros_like, xs)
        y, a, covariance = measure(shapes, moments_at, origin)
        at_x = measure(shapes, moments_at, xs)
        x = jnp.concatenate([jnp.ravel(xs[name]) for name, _ in shapes])
        scale = 1.0 + jnp.abs(y) + jnp.abs(a) @ jnp.abs(x)
        return a, covariance, (y - a @ x - at_x.residual) / scale

    keys = jax.random.split(jax.random.key(0), 4)
    slopes, covariances, errors = jax.vmap(at_draw)(keys)
    size = slopes.shape[-1]
    # By the program's equations, which see what no draw shows, and by draws, which see
    # the coefficients that the equations leave open.
    linearity = traced.linearity(shapes)
    of_means = []
    of_noise = []
    for name in names:
        mean, noise = linearity[name]
        slope_of_mean = jnp.zeros((len(noise.array), size))
        if mean.kind == Kind.LINEAR:
            slope_of_mean = mean.array.T
        of_means.append(slope_of_mean)
        of_noise.append(noise.array)
    depends = (jnp.concatenate(of_means) != 0) | jnp.any(slopes != 0, 0)
    correlated = (block_diag(*of_noise) != 0) | jnp.any(covariances != 0, 0)
    return depends, correlated, errors
