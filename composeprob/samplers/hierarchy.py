"""Transitions of hierarchies: latents together with the members that depend on them,
for factors that offer only their score; and latents alone, by HMC in centred and in
non-centred coordinates."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.special import ndtr, ndtri
from jaxtyping import Float, Int, Key

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Evaluation, Frame, Position, Target
from composeprob.kernels import HMC, Adaptive, Info, Kernel, KernelState
from composeprob.kernels.gibbs import Gibbs, replaced
from composeprob.kernels.hamiltonian import HamiltonianState, HamiltonianTrajectory
from composeprob.kernels.kernel import log_density_of
from composeprob.kernels.line_integral import LineIntegral, bounded
from composeprob.kernels.metric import MetricLike, as_metric
from composeprob.kernels.metropolis import accept, log_density_ratio, log_uniform
from composeprob.kernels.step_size import StepSizeLike, as_step_size
from composeprob.pytree import where
from composeprob.samplers.layout import Layout
from composeprob.schedule import Noise

Point = Float[Array, " size"]
"""Vector v = (y, z) of one chain: noised entries, then latents."""

Noised = Float[Array, " dims"]
Latents = Float[Array, " latents"]
Scalar = Float[Array, ""]

Evaluate = Callable[[Point], tuple[Point, Array]]
"""The score of π_k at v, and whether π_k is 0 there."""


class ClosedFormDensity(eqx.Module):
    """The part p of π_k(y, z) that has a density in closed form; the other factors,
    U(y), offer only their score, and depend on no latent."""

    density: AnnealedDensity
    noise: Noise
    layout: Layout = eqx.field(static=True)

    def log_density(self, v: Point) -> Scalar:
        """Return log p at the vector of one chain."""
        position = self.layout.position(v, self.noise.alpha)
        return self.density.evaluator.log_closed_form(position, self.noise.index)

    def frames(self, z: Latents, unknown: float = 1.0) -> dict[str, Frame]:
        """Return location and width of every noised site's prior given latents; centre
        0 and width ``unknown`` where a factor is its prior."""
        by_latents = self._frames(self._position(z))
        frames: dict[str, Frame] = {}
        for name, shape in self.layout.noised:
            if name in by_latents:
                frames[name] = by_latents[name]
            else:
                frames[name] = Frame(jnp.zeros(shape), jnp.full(shape, unknown))
        return frames

    def _position(self, z: Latents) -> Position:
        noised = jnp.zeros((self.layout.dims,))
        return self.layout.position(jnp.concatenate([noised, z]), 1.0)

    def _frames(self, position: Position) -> dict[str, Frame]:
        return self.density.evaluator.frames(position, self.noise.index)

    def shifted(self, z: Latents, shift: Latents) -> tuple[Latents, Scalar]:
        """Return z + shift, and log |dz'/dz|.

        Latents whose location and scale are other latents move along, with their
        standard coordinates ξ held, from the first in the program to the last.
        """
        before = self._frames(self._position(z))
        position = self._position(z + shift)
        static = dict(self.layout.static)
        after: dict[str, Frame] = {}
        for name in before:
            if name not in static:
                continue
            # Computed anew each time: latents before this one have moved.
            after[name] = self._frames(position)[name]
            xi = before[name].standard(position[name])
            position[name] = after[name].place(xi)
        moved = self.layout.vector(position, 1.0)[self.layout.dims :]
        return moved, _log_volume_change(before, after)

    def unit_vector(self, key: Key[Array, ""]) -> Latents:
        """Return 1 at a random coordinate of φ and 0 elsewhere: first a site is chosen,
        then one of its coordinates, each uniformly."""
        sizes = np.array([math.prod(shape) for _, shape in self.layout.static])
        probabilities = np.repeat(1 / sizes / len(sizes), sizes)
        coordinate = jax.random.choice(key, sizes.sum(), p=probabilities)
        return jnp.zeros((sizes.sum(),)).at[coordinate].set(1.0)

    @property
    def members(self) -> Int[np.ndarray, " dims"]:
        """Number of the plate's member that each noised entry belongs to: given
        latents members are independent."""
        numbers = []
        first = 0
        for name, shape in self.layout.noised:
            plates = self.density.sites[name].plates
            count = int(np.prod(shape[:plates]))
            size = int(np.prod(shape[plates:]))
            numbers.append(first + np.repeat(np.arange(count), size))
            first += count
        return np.concatenate(numbers)


def interweaves(density: AnnealedDensity) -> bool:
    """Return whether `Interweaving` moves this density in default runs.

    It does where factors offer only their score, or plates have members that are
    independent given latents; and latents are few enough for matrices over them, or
    nothing else would do.
    """
    layout = Layout.of_density(density)
    # Joint moves shift latents by real numbers.
    if any(site.kind == "discrete" for site in density.sites.values()):
        return False
    only_score = "energy" not in density.capabilities
    members = any(site.plates for site in density.sites.values())
    if layout.dims == 0 or not density.evaluator.knows_latents:
        return False
    if only_score and members:
        return True
    few = layout.size - layout.dims <= tuning.LATENTS.most
    return few and (only_score or members)


class Interweaving(Kernel[KernelState]):
    r"""Moves of latents φ and of their members, η₁ … η_J, where factors that offer only
    their score look at the η_j alone.

    Of $\log\pi(\varphi, \eta) = \log p(\varphi, \eta) + \sum_j U_j(\eta_j)$ the first
    term has a closed form. One transition is

    1. moves of φ given η, where U cancels: exact, and of no evaluation;
    2. MALA of η given φ, in steps no longer than p(η | φ) is wide, each η_j accepted or
       rejected by itself, as they are independent given φ;
    3. moves of one coordinate of φ that take η along, $\eta = m(\varphi) +
       L(\varphi)\,\xi$ with ξ held and $m$, $LL^\top$ the mean and the covariance of
       the prior: the other half of ancillary–sufficient interweaving (Yu and Meng
       2011), which mixes where step 1 does not. The test takes p exactly, with
       $\log|L|$ for the change of coordinates, and integrates ∇U along the path.

    Latents whose location and scale are other latents (a subject's, above its
    sessions') are taken along too, always in step 3 and half of the time in step 1.

    Proposals of φ follow the curvature of log p at φ, which their accept test counts
    both ways, and need no tuning (Martin, Wilcox, Burstedde and Ghattas 2012, *A
    stochastic Newton MCMC method*).
    """

    step_size: StepSizeLike = eqx.field(
        default_factory=Adaptive, converter=as_step_size
    )
    log_ratio: LineIntegral = eqx.field(
        default_factory=bounded, static=True, repr=False
    )
    # Standard deviations of latents over the population, (m,); None for unknown.
    widths: Array | None = eqx.field(default=None, repr=False)
    closed_form: ClosedFormDensity | None = eqx.field(default=None, repr=False)

    optimal_acceptance = 0.574
    scale_exponent = 2
    requires = frozenset({"score"})

    @property
    def evaluations_per_step(self) -> int:
        # Nodes of a path without its start: of the members, and of each joint move;
        # and one more at the point where all of it led.
        nodes = self.log_ratio.extra_evaluations + 1
        return 1 + nodes * (1 + tuning.LATENTS.joint)

    def under(self, density: AnnealedDensity, noise: Noise) -> Interweaving:
        layout = Layout.of_density(density)
        closed_form = ClosedFormDensity(density, noise, layout)
        return dataclasses.replace(self, closed_form=closed_form)

    def step(
        self, key: Array, state: KernelState, target: Target, step_size: Array
    ) -> tuple[KernelState, Info]:
        assert self.closed_form is not None
        closed_form = self.closed_form
        name, block = next(iter(state.position.items()))
        # The block has sites by name; vectors have noised ones first.
        order = closed_form.layout.entries(tuple(closed_form.density.sites))
        back = np.argsort(order)

        def evaluate(v: Array) -> tuple[Array, Array]:
            evaluation = target({name: v[order]})
            beyond_wall = evaluation.zero & ~state.evaluation.zero
            return evaluation.score[name][back], beyond_wall

        first, second, last = jax.random.split(key, 3)
        v = block[back]
        score = state.evaluation.score[name][back]
        v, score = _move_latents(first, closed_form, v, score)
        v, score, info = _move_members(
            second, self.log_ratio, closed_form, v, score, evaluate, step_size
        )

        def joint(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            return _move_jointly(
                jax.random.fold_in(last, i),
                self.log_ratio,
                closed_form,
                self.widths,
                *carry,
                evaluate,
            )

        v, score = jax.lax.fori_loop(0, tuning.LATENTS.joint, joint, (v, score))
        moved = KernelState({name: v[order]}, target({name: v[order]}))
        bad = ~jnp.all(jnp.isfinite(moved.evaluation.score[name]))
        chosen = jax.tree.map(lambda new, old: jnp.where(bad, old, new), moved, state)
        return chosen, dataclasses.replace(info, non_finite=info.non_finite | bad)


def _accept(key: Array, log_ratio: Array) -> tuple[Array, Array]:
    """Return `accept` with an independent uniform number for each ratio."""
    return accept(log_uniform(jax.random.normal(key, log_ratio.shape)), log_ratio)


class _LocalGaussian(eqx.Module):
    """Gaussian approximation of p around φ: gradient of log p and the curvature H =
    −∇²log p, made positive definite by the absolute values of its eigenvalues."""

    log_p: Scalar
    gradient: Latents
    values: Latents
    basis: Float[Array, "latents latents"]

    @classmethod
    def at(cls, closed_form: ClosedFormDensity, y: Noised, z: Latents) -> Self:
        def log_p(z: Array) -> Array:
            return closed_form.log_density(jnp.concatenate([y, z]))

        identity = jnp.eye(z.size)
        (value, gradient), along = jax.linearize(jax.value_and_grad(log_p), z)
        _, hessian = jax.vmap(along)(identity)
        finite = jnp.isfinite(hessian)
        values, basis = jnp.linalg.eigh(jnp.where(finite, -hessian, identity))
        values = jnp.maximum(jnp.abs(values), tuning.LATENTS.flat)
        return cls(value, gradient, values, basis)

    def newton(self) -> Latents:
        """Return H⁻¹∇log p."""
        return self.basis @ ((self.basis.T @ self.gradient) / self.values)

    def spread(self, noise: Latents) -> Latents:
        """Return √H⁻¹ times a vector."""
        return self.basis @ (self.basis.T @ noise / jnp.sqrt(self.values))

    def log_q(self, difference: Latents, scale: Scalar) -> Scalar:
        """Return log N(difference; 0, scale²·H⁻¹) up to a term that does not depend on
        φ."""
        squares = self.values * (self.basis.T @ difference) ** 2 / scale**2
        return 0.5 * jnp.sum(jnp.log(self.values) - squares)


def _move_latents(
    key: Array, closed_form: ClosedFormDensity, v: Point, score: Point
) -> tuple[Point, Point]:
    """Step 1: v after moves of φ alone, and the score there."""
    y, z = jnp.split(v, [closed_form.layout.dims])

    def newton(
        i: Array, current: tuple[Array, _LocalGaussian]
    ) -> tuple[Array, _LocalGaussian]:
        """Move by N(φ + θ·H⁻¹∇log p, θ(2 − θ)·H⁻¹), with a new θ each time: of a
        Gaussian it is never rejected."""
        z, here = current
        draw, length, last = jax.random.split(jax.random.fold_in(key, i), 3)
        theta = jax.random.uniform(length, minval=0.1, maxval=1.0)
        scale = jnp.sqrt(theta * (2 - theta))
        noise = scale * here.spread(jax.random.normal(draw, z.shape))
        proposed = z + theta * here.newton() + noise
        there = _LocalGaussian.at(closed_form, y, proposed)
        log_forth = here.log_q(proposed - z - theta * here.newton(), scale)
        log_back = there.log_q(z - proposed - theta * there.newton(), scale)
        accepted, _ = _accept(last, there.log_p - here.log_p + log_back - log_forth)
        return where(accepted, (proposed, there), current)

    def single(i: Array, current: tuple[Array, Array]) -> tuple[Array, Array]:
        """Move one coordinate by a step of random order of magnitude, for places where
        the curvature misleads."""
        z, log_p = current
        keys = jax.random.split(jax.random.fold_in(key, i), 5)
        coordinate, along, length, draw, last = keys
        low, high = np.log(tuning.LATENTS.lengths)
        size = jnp.exp(jax.random.uniform(length, minval=low, maxval=high))
        shift = closed_form.unit_vector(coordinate) * size * jax.random.normal(draw)
        # Half of the time with the latents that depend on it, which changes volumes.
        alone = (z + shift, jnp.zeros(()))
        together = closed_form.shifted(z, shift)
        proposed, log_volume = where(jax.random.bernoulli(along), together, alone)
        there = closed_form.log_density(jnp.concatenate([y, proposed]))
        accepted, _ = _accept(last, there - log_p + log_volume)
        return where(accepted, (proposed, there), current)

    turns = tuning.LATENTS.turns
    local = _LocalGaussian.at(closed_form, y, z)
    z, local = jax.lax.fori_loop(0, turns, newton, (z, local))
    end = turns + tuning.LATENTS.singles
    z, _ = jax.lax.fori_loop(turns, end, single, (z, local.log_p))
    # The score of U is unchanged, as η is: only ∇log p is to be computed anew.
    after = jnp.concatenate([y, z])
    gradient = jax.grad(closed_form.log_density)
    return after, score + gradient(after) - gradient(v)


def _move_members(
    key: Array,
    line: LineIntegral,
    closed_form: ClosedFormDensity,
    v: Point,
    score: Point,
    evaluate: Evaluate,
    step_size: Scalar,
) -> tuple[Point, Point, Info]:
    """Step 2: v after MALA of each member by itself, and the score there."""
    d = closed_form.layout.dims
    members = closed_form.members
    draw, last = jax.random.split(key)

    def total(values: Array) -> Array:
        """Return sums over each member's entries."""
        return jnp.zeros((members[-1] + 1,)).at[members].add(values)

    s = score[:d]
    z = v[d:]
    frames = closed_form.frames(z, unknown=math.inf)
    width = jnp.concatenate([frame.width.reshape(-1) for frame in frames.values()])
    # Steps are no longer than the prior given latents is wide.
    h = 1 / (1 / step_size + 1 / width**2)
    shift = h * s + jnp.sqrt(2 * h) * jax.random.normal(draw, s.shape)

    nodes = jax.vmap(lambda share: v.at[:d].add(share * shift))(line.shares[1:])
    scores, zero = jax.vmap(evaluate)(nodes)
    end = scores[-1, :d]
    on_line = jnp.concatenate([s[None], scores[:, :d]])
    slopes = jax.vmap(lambda score: total(score * shift))(on_line)
    log_target, error = jax.vmap(line.along, (None, 1))(line.shares, slopes)
    # log q(η|η') − log q(η'|η)
    log_proposal = total(0.25 * h * (s**2 - end**2) - 0.5 * (s + end) * shift)
    log_ratio = log_target + log_proposal
    usable = jnp.isfinite(log_ratio) & ~zero[-1] & (error <= line.tolerance)
    accepted, probability = _accept(last, jnp.where(usable, log_ratio, jnp.nan))

    moved = accepted[members]
    y = jnp.where(moved, nodes[-1, :d], v[:d])
    after = jnp.concatenate([y, z])
    # ∇log π at latents is that of log p: U does not depend on them.
    gradient = jax.grad(lambda z: closed_form.log_density(jnp.concatenate([y, z])))(z)
    mean_error = jnp.sum(jnp.where(usable, error, 0.0) * probability)
    mean_error = mean_error / jnp.maximum(jnp.sum(probability), 1e-6)
    info = Info(
        acceptance=jnp.mean(probability),
        accepted=jnp.any(moved),
        non_finite=~jnp.all(jnp.isfinite(log_ratio)),
        log_reversal=jnp.asarray(jnp.nan),
        quadrature_error=mean_error,
    )
    return after, jnp.concatenate([jnp.where(moved, end, s), gradient]), info


def _move_jointly(
    key: Array,
    line: LineIntegral,
    closed_form: ClosedFormDensity,
    widths: Latents | None,
    v: Point,
    score: Point,
    evaluate: Evaluate,
) -> tuple[Point, Point]:
    """Step 3: v after a move of φ that takes η along, and the score there.

    Half of the time it is about as far as the population is wide, where that is known;
    else its length follows the curvature of log p along the move.
    """
    d = closed_form.layout.dims
    z = v[d:]
    draw, far, coordinate, last = jax.random.split(key, 4)
    unit = closed_form.unit_vector(coordinate)
    direction = jnp.concatenate([jnp.zeros((d,)), unit])
    low, high = np.log(tuning.LATENTS.ratios)
    scale = jnp.exp(jax.random.uniform(far, minval=low, maxval=high))
    here, curvature = _curvature_along(closed_form, v, direction)
    length = scale / jnp.sqrt(curvature)
    local = jnp.ones((), bool)
    if widths is not None:
        local = jax.random.bernoulli(jax.random.fold_in(coordinate, 1))
        length = jnp.where(local, length, tuning.LATENTS.reach * (widths @ unit))
    length *= jax.random.normal(draw)
    shift = length * unit

    # Along the path φ moves, and η with it: ξ is held.
    frames = closed_form.frames(z)
    etas = closed_form.layout.position(v, 1.0)
    xi = {name: frame.standard(etas[name]) for name, frame in frames.items()}

    def path(share: Array) -> Array:
        there, _ = closed_form.shifted(z, share * shift)
        moved = closed_form.frames(there)
        etas = [moved[name].place(xi[name]).reshape(-1) for name in moved]
        return jnp.concatenate([*etas, there])

    def path_and_velocity(share: Array) -> tuple[Array, Array]:
        return jax.jvp(path, (share,), (jnp.ones(()),))

    def log_p(y: Array, z: Array) -> Array:
        return closed_form.log_density(jnp.concatenate([y, z]))

    nodes, velocity = jax.vmap(path_and_velocity)(line.shares)
    found, zero = jax.vmap(evaluate)(nodes[1:])
    scores = jnp.concatenate([score[None], found])[:, :d]
    # ∇U is the score less ∇log p; its integral is log U(η') − log U(η).
    of_u = scores - jax.vmap(jax.grad(log_p))(nodes[:, :d], nodes[:, d:])
    slopes = jnp.sum(of_u * velocity[:, :d], axis=1)
    log_u_ratio, error = line.along(line.shares, slopes)
    there, curvature_there = _curvature_along(closed_form, nodes[-1], direction)
    log_ratio = (
        there
        - here
        + log_u_ratio
        + _log_volume_change(frames, closed_form.frames(nodes[-1, d:]))
        + closed_form.shifted(z, shift)[1]
    )
    # log q(φ|φ') − log q(φ'|φ) where the length follows the curvature.
    log_proposal = (
        jnp.log(curvature_there / curvature)
        - (curvature_there - curvature) * (length / scale) ** 2
    )
    log_ratio += jnp.where(local, 0.5 * log_proposal, 0.0)
    # The nodes are those of the way back too: what is refused for its error is refused
    # both ways.
    usable = jnp.all(jnp.isfinite(found)) & ~zero[-1] & (error <= line.tolerance)
    accepted, _ = _accept(last, jnp.where(usable, log_ratio, jnp.nan))
    return jnp.where(accepted, nodes[-1], v), jnp.where(accepted, found[-1], score)


def _curvature_along(
    closed_form: ClosedFormDensity, v: Point, direction: Point
) -> tuple[Scalar, Scalar]:
    """Return log p at v, and its curvature along a direction, −d²/ds² log p(v +
    s·direction), made positive."""

    def log_p(s: Array) -> Array:
        return closed_form.log_density(v + s * direction)

    def slope(s: Array) -> tuple[Array, Array]:
        return jax.jvp(log_p, (s,), (jnp.ones_like(s),))

    zero_and_one = (jnp.zeros(()),), (jnp.ones(()),)
    (value, _), (_, second) = jax.jvp(slope, *zero_and_one)
    curvature = jnp.where(jnp.isfinite(second), jnp.abs(second), 1.0)
    return value, jnp.maximum(curvature, tuning.LATENTS.flat)


def _log_volume_change(before: dict[str, Frame], after: dict[str, Frame]) -> Scalar:
    """Return log |dη'/dη| of a move that takes η along."""
    changes = [after[name].log_volume - before[name].log_volume for name in after]
    return sum(changes, jnp.zeros(()))


def has_dependents(density: AnnealedDensity) -> bool:
    """Return whether a program of latents alone has some whose location and scale are
    other latents, as a hierarchy has, or whose data have such a location and scale, as
    a hierarchy in standard coordinates has."""
    layout = Layout.of_density(density)
    others = any(site.kind in ("held", "discrete") for site in density.sites.values())
    if layout.dims or not layout.size or others:
        return False
    zeros = jnp.zeros((layout.size,))

    def frames(v: Array) -> dict[str, Frame]:
        coordinates = StandardCoordinates(density, layout)
        return coordinates.frames(layout.position(v, 1.0))

    return bool(jax.eval_shape(frames, zeros))


def has_members(density: AnnealedDensity) -> bool:
    """Return whether latents give some site the location and scale of its prior, by
    which `Interweaving` moves it together with them."""
    layout = Layout.of_density(density)
    zeros = jnp.zeros((layout.size,))

    def frames(v: Array) -> dict[str, Frame]:
        return density.evaluator.frames(layout.position(v, 1.0), 0)

    return bool(jax.eval_shape(frames, zeros))


def is_non_centred(density: AnnealedDensity) -> bool:
    """Return whether a program of latents alone has standard coordinates itself, and
    its data those of a centred hierarchy."""
    layout = Layout.of_density(density)
    zeros = jnp.zeros((layout.size,))

    def frames(v: Array) -> dict[str, Frame]:
        return density.evaluator.frames(layout.position(v, 1.0), 0)

    return has_dependents(density) and not jax.eval_shape(frames, zeros)


class StandardCoordinates(eqx.Module):
    """Coordinates u = (φ, ξ) of latents v = (φ, m(φ) + s(φ)·ξ), where location m and
    scale s of some are other latents: those of a *non-centred* hierarchy.

    If a program has such coordinates itself, and its data have the location m + s·ξ,
    these are the coordinates u = (φ, m(φ) + s(φ)·ξ) of a centred one.

    Attributes:
        density: of the latents.
        layout: of these.
        vague: the entries that have these coordinates, ``{site: truth values}``; the
            others are as they are. None for all.
    """

    density: AnnealedDensity
    layout: Layout = eqx.field(static=True)
    vague: Position | None = None

    def frames(self, position: Position) -> dict[str, Frame]:
        """Return location and scale of the latents that depend on others, then of those
        whose data do."""
        evaluator = self.density.evaluator
        return {**evaluator.frames(position, 0), **self.by_data(position)}

    def by_data(self, position: Position) -> dict[str, Frame]:
        """Return location and scale of the latents whose data depend on others."""
        return self.density.evaluator.frames_by_data(position, 0)

    def scales(self, position: Position) -> dict[str, Array]:
        """Return the scale s of members m + s·ξ, whichever of these the program has."""
        by_data = self.by_data(position)
        found = {}
        for name, frame in self.frames(position).items():
            width = jnp.abs(frame.width)
            found[name] = 1 / width if name in by_data else width
        return found

    def _standardised(self, name: str, frame: Frame) -> Array:
        if self.vague is None:
            return jnp.ones(frame.width.shape, bool)
        return self.vague[name]

    def standardise(self, v: Latents) -> Latents:
        """Return the coordinates u of latents."""
        position = self.layout.position(v, 1.0)
        coordinates = dict(position)
        for name, frame in self.frames(position).items():
            value = position[name]
            standardised = self._standardised(name, frame)
            xi = frame.standard(value)
            coordinates[name] = jnp.where(standardised, xi, value)
        return self.layout.vector(coordinates, 1.0)

    def place(self, u: Latents) -> tuple[Latents, Scalar, Array]:
        """Return the latents at these coordinates, log |dv/du|, and whether rounding of
        v leaves ξ what it was.

        Where s is near the rounding error of v, all of v are m, their ξ become 0, and
        the density of u would be far too high.
        """
        position = self.layout.position(u, 1.0)
        log_volume = jnp.zeros(())
        accurate = jnp.asarray(True)
        by_data = self.by_data(position)
        # From the first in the program to the last. Frames are computed anew each time:
        # those of a latent depend on latents that have been placed before it.
        for name in self.frames(position):
            frame = self.frames(position)[name]
            coordinate = position[name]
            standardised = self._standardised(name, frame)
            placed = jnp.where(standardised, frame.place(coordinate), coordinate)
            position[name] = placed
            size = jnp.abs(frame.width)
            log_width = jnp.where(standardised, jnp.log(size), 0.0)
            log_volume += jnp.sum(log_width)
            rounding = jnp.finfo(u.dtype).eps * jnp.abs(placed)
            fine = size > tuning.LATENTS.rounding * rounding
            accurate &= jnp.all(fine | ~standardised)
            if name in by_data:
                # Where the scale 1/width of θ is near the rounding error of θ, all ξ
                # are 0 likewise.
                rounding = jnp.finfo(u.dtype).eps * jnp.abs(coordinate)
                fine = tuning.LATENTS.rounding * rounding * size < 1
                accurate &= jnp.all(fine | ~standardised)
        return self.layout.vector(position, 1.0), log_volume, accurate


def vague_entries(
    points: Float[np.ndarray, "chains size"], density: AnnealedDensity
) -> Position:
    """Return the entries of latents that are not far narrower than their prior given
    other latents, ``{site: truth values}``; all where there are none.

    Entries that sharp data hold stay where they are when a scale above them moves: in
    standard coordinates they would forbid all but the shortest steps to the others. Of
    latents that the program has in standard coordinates, these entries alone leave
    them. Widths of the population are medians, as single chains may be far from the
    others.
    """
    layout = Layout.of_density(density)
    coordinates = StandardCoordinates(density, layout)
    vague: dict[str, np.ndarray] = {}
    for name, member in _members(coordinates, jnp.asarray(points)).items():
        values = np.asarray(member.value)
        away = np.abs(values - np.median(values, axis=0))
        # The standard deviation of a normal distribution, by its median deviation.
        spread = 1.4826 * np.median(away, axis=0)
        of_prior = np.median(np.asarray(member.width), axis=0)
        is_vague = spread > tuning.LATENTS.vague * of_prior
        vague[name] = is_vague != np.asarray(member.by_data).all()
    if is_non_centred(density):
        return jax.tree.map(jnp.asarray, vague)
    if not any(entries.any() for entries in vague.values()):
        vague = {name: np.ones_like(entries) for name, entries in vague.items()}
    return jax.tree.map(jnp.asarray, vague)


class _Member(eqx.Module):
    """Values of members θ = m + s·ξ, their scale s, and whether the program has ξ."""

    value: Array
    width: Array
    by_data: Array


@eqx.filter_jit
def _members(coordinates: StandardCoordinates, points: Array) -> dict[str, _Member]:
    def members(v: Array) -> dict[str, _Member]:
        position = coordinates.layout.position(v, 1.0)
        by_data = coordinates.by_data(position)
        found = {}
        for name, width in coordinates.scales(position).items():
            value = position[name]
            if name in by_data:
                value = by_data[name].standard(value)
            found[name] = _Member(value, width, jnp.asarray(name in by_data))
        return found

    return jax.vmap(members)(points)


class ShortAndLong(HMC):
    """HMC of which some transitions have far shorter steps than the others.

    A chain whose scale is near 0 has members near their location, and needs steps as
    short as that scale. By the step size of the other chains it would stay there.
    Lengths do not depend on where a chain is, which leaves the density invariant.
    """

    def begin(
        self, noise: Array, state: HamiltonianState, step_size: Array
    ) -> tuple[HamiltonianTrajectory, Position]:
        share, most = tuning.LATENTS.short
        uniform = ndtr(noise[-1])
        shorter = jnp.exp(-jnp.log(most) * uniform / share)
        scale = jnp.where(uniform < share, shorter, 1.0)
        # The rest of the uniform number is that of the jitter.
        rest = jnp.where(
            uniform < share, uniform / share, (uniform - share) / (1 - share)
        )
        eps = jnp.finfo(rest.dtype).eps
        jittered = noise.at[-1].set(ndtri(jnp.clip(rest, eps, 1 - eps)))
        return super().begin(jittered, state, step_size * scale.astype(step_size.dtype))


class NonCentred(Kernel[KernelState]):
    r"""HMC in `StandardCoordinates`: where location and scale of latents move, these
    move along.

    In the coordinates $u$ the log-density is $\log\pi(v(u)) + \log|dv/du|$: HMC leaves
    it invariant, and so π. Step size and metric are those of u. Only the entries that
    are ``vague`` have these coordinates, where they are known. Trajectories are those
    of the class ``inner``.
    """

    step_size: StepSizeLike = eqx.field(
        default_factory=Adaptive, converter=as_step_size
    )
    num_leapfrog: int = eqx.field(default=8, static=True)
    jitter: float = eqx.field(default=0.3, static=True, repr=False)
    metric: MetricLike = eqx.field(default="none", converter=as_metric, repr=False)
    inner: type[HMC] = eqx.field(default=HMC, static=True, repr=False)
    vague: Position | None = eqx.field(default=None, repr=False)
    coordinates: StandardCoordinates | None = eqx.field(default=None, repr=False)

    optimal_acceptance = HMC.optimal_acceptance
    scale_exponent = HMC.scale_exponent
    requires = frozenset({"energy", "score"})

    @property
    def evaluations_per_step(self) -> int:
        return self.num_leapfrog

    def under(self, density: AnnealedDensity, noise: Noise) -> NonCentred:
        layout = Layout.of_density(density)
        coordinates = StandardCoordinates(density, layout, self.vague)
        return replaced(self, coordinates=coordinates)

    def step(
        self, key: Array, state: KernelState, target: Target, step_size: Array
    ) -> tuple[KernelState, Info]:
        assert self.coordinates is not None
        coordinates = self.coordinates
        ((name, v),) = state.position.items()

        def in_standard(u: Array, evaluate: Target) -> Evaluation:
            """Evaluate the density of u. The point v and its own evaluation travel as
            the ``terms``, so that nothing is evaluated again."""

            def place(u: Array) -> tuple[tuple[Array, Array], Array]:
                v, log_volume, accurate = coordinates.place(u)
                return (v, log_volume), accurate

            (v, log_volume), pull_back, accurate = jax.vjp(place, u, has_aux=True)
            evaluation = evaluate({name: v})
            score = evaluation.score[name]
            (score_of_u,) = pull_back((score, jnp.ones_like(log_volume)))
            point = KernelState({name: v}, evaluation)
            log_density = log_density_of(evaluation) + log_volume
            return Evaluation(
                # Moves stay within the region where coordinates are accurate.
                jnp.where(accurate, log_density, -jnp.inf),
                {name: score_of_u},
                terms=point,
            )

        def target_of_u(position: Position) -> Evaluation:
            return in_standard(position[name], target)

        u = coordinates.standardise(v)
        evaluation = in_standard(u, lambda _: state.evaluation)
        momentum = {name: jnp.zeros_like(u)}  # drawn anew, as the damping is 0
        start = HamiltonianState({name: u}, evaluation, momentum)
        hmc = self.inner(
            1.0, self.num_leapfrog, 0.0, jitter=self.jitter, metric=self.metric
        )
        end, info = hmc.step(key, start, target_of_u, step_size)
        # From outside of that region, or of π's support, this kernel moves nothing.
        inside = ~evaluation.zero
        accepted = info.accepted & inside
        # A chain that stays is where it was, not where rounding brings it back to.
        moved = where(accepted, end.evaluation.terms, state)
        log_reversal = jnp.where(accepted, -log_density_ratio(moved, state), 0.0)
        return moved, Info(
            acceptance=jnp.where(inside, info.acceptance, 0.0),
            accepted=accepted,
            non_finite=info.non_finite & inside,
            log_reversal=log_reversal,
        )


class InBothCoordinates(Gibbs):
    """Moves of all latents, as they are by one kernel and then in their standard
    coordinates by another.

    Where data are sharp the first mixes, where they are vague the second: ancillary–
    sufficient interweaving (Yu and Meng 2011). Each has its step size. The program may
    state its latents in either.
    """

    def __init__(self, centred: Kernel, non_centred: Kernel, density: AnnealedDensity):
        sites = tuple(density.sites)
        super().__init__({sites: centred})
        # `Gibbs` refuses a site in two blocks, which a user may have meant otherwise.
        self.sites = (sites, sites)
        self.kernels = (centred, non_centred)

    def __repr__(self) -> str:
        return f"InBothCoordinates({self.kernels[0]!r}, {self.kernels[1]!r})"

    @property
    def labels(self) -> tuple[str, ...]:
        centred, non_centred = super().labels
        return centred, f"{non_centred}, non-centred"
