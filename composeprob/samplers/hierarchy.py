"""Transitions of latents and of what hangs on them together, for factors that offer
only their score."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Frame, Position, Target
from composeprob.kernels import Adaptive, Info, Kernel, KernelState
from composeprob.kernels.line_integral import LineIntegral, bounded
from composeprob.kernels.metropolis import accept, log_uniform
from composeprob.kernels.step_size import StepSizeLike, as_step_size
from composeprob.pytree import where
from composeprob.samplers.layout import Layout
from composeprob.schedule import Noise


class ClosedFormDensity(eqx.Module):
    """What of π_k(y, z) has a density in closed form, p; the other factors, U(y), offer
    only their score, and depend on no latent."""

    density: AnnealedDensity
    noise: Noise
    layout: Layout = eqx.field(static=True)

    def log_density(self, v: Array) -> Array:
        """log p at the vector of one chain, a scalar."""
        return self.density.evaluator.log_closed_form(
            self.layout.position(v, self.noise.alpha), self.noise.index
        )

    def frames(self, z: Array, unknown: float = 1.0) -> dict[str, Frame]:
        """Where every noised site's prior given latents is; centre 0 and width
        ``unknown`` where a factor is its prior."""
        found = self._found(self._position(z))
        return {
            n: found.get(n, Frame(jnp.zeros(s), jnp.full(s, unknown)))
            for n, s in self.layout.noised
        }

    def _position(self, z: Array) -> Position:
        return self.layout.position(
            jnp.concatenate([jnp.zeros((self.layout.dims,)), z]), 1.0
        )

    def _found(self, position: Position) -> dict[str, Frame]:
        return self.density.evaluator.frames(position, self.noise.index)

    def shifted(self, z: Array, way: Array) -> tuple[Array, Array]:
        """z + way, with the latents that others place taken along, ξ held, from the
        first in the program to the last; and log |dz'/dz|."""
        before, there, after = (
            self._found(self._position(z)),
            self._position(z + way),
            dict[str, Frame](),
        )
        for name in (name for name in before if name in dict(self.layout.static)):
            after[name] = self._found(there)[name]
            there[name] = after[name].place(before[name].standard(there[name]))
        return self.layout.vector(there, 1.0)[self.layout.dims :], _log_wider(
            before, after
        )

    def unit_vector(self, key: Array) -> Array:
        """1 at a number of φ and 0 elsewhere, (m,): every site is as probable, and in
        it every number."""
        sizes = np.array([math.prod(shape) for _, shape in self.layout.static])
        which = jax.random.choice(
            key, sizes.sum(), p=np.repeat(1 / sizes / len(sizes), sizes)
        )
        return jnp.zeros((sizes.sum(),)).at[which].set(1.0)

    @property
    def members(self) -> np.ndarray:
        """The number of the member of a plate that each noised entry belongs to, (d,):
        given latents these are independent."""
        sites = [
            (shape, self.density.sites[name].plates)
            for name, shape in self.layout.noised
        ]
        sizes = [(int(np.prod(s[:n])), int(np.prod(s[n:]))) for s, n in sites]
        starts = np.cumsum([0, *(count for count, _ in sizes)])
        return np.concatenate(
            [
                start + np.repeat(np.arange(n), k)
                for start, (n, k) in zip(starts, sizes, strict=False)
            ]
        )


def interweaves(density: AnnealedDensity) -> bool:
    """Whether `Interweaving` is what moves this density by default: where factors offer
    only their score, or plates have members that are independent given latents; and
    latents are few enough for matrices over them, or nothing else would do."""
    layout, sites = Layout.of_density(density), density.sites.values()
    needs, members = (
        "energy" not in density.capabilities,
        any(site.plates for site in sites),
    )
    if (
        layout.dims == 0
        or not (needs or members)
        or not density.evaluator.knows_latents
    ):
        return False
    return layout.size - layout.dims <= tuning.LATENTS.most or (needs and members)


Evaluate = Callable[[Array], tuple[Array, Array]]
"""The score of π_k at v, (D,), and whether π_k is 0 there."""


class Interweaving(Kernel[KernelState]):
    r"""Latents φ and what hangs on them, η₁ … η_J, where factors that offer only their
    score look at the η_j alone.

    Of $\log\pi(\varphi, \eta) = \log p(\varphi, \eta) + \sum_j U_j(\eta_j)$ the first
    term is known. One transition is

    1. moves of φ given η, where U cancels: exact, and of no evaluation;
    2. MALA of η given φ, in steps no longer than p(η | φ) is wide, each η_j accepted or rejected by itself, as they are
       independent given φ;
    3. moves of one number of φ that take η along, $\eta = m(\varphi) + L(\varphi)\,\xi$ with ξ held and $m$, $LL^\top$
       the mean and the covariance of the prior: the other half of ancillary–sufficient
       interweaving (Yu and Meng 2011), which mixes where step 1 does not. The test
       takes p exactly, with $\log|L|$ for the change of coordinates, and integrates ∇U
       along the path.

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
    widths: Array | None = eqx.field(
        default=None, repr=False
    )  # of latents over the population, (m,), if known
    known: ClosedFormDensity | None = eqx.field(default=None, repr=False)

    optimal_acceptance = 0.574
    scale_exponent = 2
    requires = frozenset({"score"})

    @property
    def evaluations_per_step(self) -> int:
        return 1 + (self.log_ratio.extra_evaluations + 1) * (1 + tuning.LATENTS.joint)

    def under(self, density: AnnealedDensity, noise: Noise) -> Interweaving:
        return dataclasses.replace(
            self, known=ClosedFormDensity(density, noise, Layout.of_density(density))
        )

    def step(
        self, key: Array, state: KernelState, target: Target, step_size: Array
    ) -> tuple[KernelState, Info]:
        assert self.known is not None
        (name, block), known = next(iter(state.position.items())), self.known
        order = known.layout.entries(
            tuple(known.density.sites)
        )  # of the block: sites by name, not noised ones first
        back = np.argsort(order)

        def evaluate(v: Array) -> tuple[Array, Array]:
            found = target({name: v[order]})
            return found.score[name][back], found.zero & ~state.evaluation.zero

        first, second, last = jax.random.split(key, 3)
        v, score = _latents(
            first, known, block[back], state.evaluation.score[name][back]
        )
        v, score, info = _members(
            second, self.log_ratio, known, v, score, evaluate, step_size
        )

        def joint(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            return _joint_move(
                jax.random.fold_in(last, i),
                self.log_ratio,
                known,
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
    """`accept` with a uniform number of its own for each ratio."""
    return accept(log_uniform(jax.random.normal(key, log_ratio.shape)), log_ratio)


class _Local(eqx.Module):
    """log p around φ, as a proposal sees it: its gradient, and the curvature H = −∇²log
    p, made positive definite."""

    log_p: Array
    gradient: Array
    values: Array
    basis: Array

    @classmethod
    def at(cls, known: ClosedFormDensity, y: Array, z: Array) -> _Local:
        def log_p(z: Array) -> Array:
            return known.log_density(jnp.concatenate([y, z]))

        (value, gradient), along = jax.linearize(jax.value_and_grad(log_p), z)
        hessian = jax.vmap(along)(jnp.eye(z.size))[1]
        values, basis = jnp.linalg.eigh(
            jnp.where(jnp.isfinite(hessian), -hessian, jnp.eye(z.size))
        )
        return cls(
            value, gradient, jnp.maximum(jnp.abs(values), tuning.LATENTS.flat), basis
        )

    def newton(self) -> Array:
        """H⁻¹∇log p."""
        return self.basis @ ((self.basis.T @ self.gradient) / self.values)

    def spread(self, noise: Array) -> Array:
        """√H⁻¹ times a vector."""
        return self.basis @ (self.basis.T @ noise / jnp.sqrt(self.values))

    def log_q(self, away: Array, scale: Array) -> Array:
        """log N(away; 0, scale²·H⁻¹) less what does not depend on φ."""
        return 0.5 * jnp.sum(
            jnp.log(self.values) - self.values * (self.basis.T @ away) ** 2 / scale**2
        )


def _latents(
    key: Array, known: ClosedFormDensity, v: Array, score: Array
) -> tuple[Array, Array]:
    """Step 1: v after moves of φ alone, and the score there."""
    y, z = jnp.split(v, [known.layout.dims])

    def newton(i: Array, now: tuple[Array, _Local]) -> tuple[Array, _Local]:
        """N(φ + θ·H⁻¹∇log p, θ(2 − θ)·H⁻¹) with a θ of its own each time: of a Gaussian
        it is never rejected."""
        z, here = now
        draw, length, last = jax.random.split(jax.random.fold_in(key, i), 3)
        theta = jax.random.uniform(length, minval=0.1, maxval=1.0)
        scale = jnp.sqrt(theta * (2 - theta))
        there_at = (
            z
            + theta * here.newton()
            + scale * here.spread(jax.random.normal(draw, z.shape))
        )
        there = _Local.at(known, y, there_at)
        forth = here.log_q(there_at - z - theta * here.newton(), scale)
        back = there.log_q(z - there_at - theta * there.newton(), scale)
        taken, _ = _accept(last, there.log_p - here.log_p + back - forth)
        return where(taken, (there_at, there), now)

    def single(i: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        """One coordinate by a step of any order of magnitude, for where the curvature
        misleads."""
        z, log_p = now
        which, along, length, draw, last = jax.random.split(
            jax.random.fold_in(key, i), 5
        )
        low, high = np.log(tuning.LATENTS.lengths)
        size = jnp.exp(jax.random.uniform(length, minval=low, maxval=high))
        way = known.unit_vector(which) * size * jax.random.normal(draw)
        there_at, wider = where(
            jax.random.bernoulli(along), known.shifted(z, way), (z + way, jnp.zeros(()))
        )
        there = known.log_density(jnp.concatenate([y, there_at]))
        taken, _ = _accept(last, there - log_p + wider)
        return jnp.where(taken, there_at, z), jnp.where(taken, there, log_p)

    turns, singles = tuning.LATENTS.turns, tuning.LATENTS.singles
    z, local = jax.lax.fori_loop(0, turns, newton, (z, _Local.at(known, y, z)))
    z, _ = jax.lax.fori_loop(turns, turns + singles, single, (z, local.log_p))
    after = jnp.concatenate([y, z])
    gradient = jax.grad(known.log_density)
    return after, score + gradient(after) - gradient(v)


def _members(
    key: Array,
    line: LineIntegral,
    known: ClosedFormDensity,
    v: Array,
    score: Array,
    evaluate: Evaluate,
    step_size: Array,
) -> tuple[Array, Array, Info]:
    """Step 2: v after MALA of each member by itself, and the score there."""
    d, members = known.layout.dims, known.members
    draw, last = jax.random.split(key)

    def total(values: Array) -> Array:
        return jnp.zeros((members[-1] + 1,)).at[members].add(values)

    s = score[:d]
    width = jnp.concatenate(
        [frame.width.reshape(-1) for frame in known.frames(v[d:], math.inf).values()]
    )
    h = 1 / (
        1 / step_size + 1 / width**2
    )  # no longer than the prior given latents is wide
    way = h * s + jnp.sqrt(2 * h) * jax.random.normal(draw, s.shape)
    nodes = jax.vmap(lambda share: v.at[:d].add(share * way))(line.shares[1:])
    found, zero = jax.vmap(evaluate)(nodes)
    end = found[-1, :d]
    slopes = jax.vmap(lambda score: total(score * way))(
        jnp.concatenate([s[None], found[:, :d]])
    )
    log_target, off = jax.vmap(line.along, (None, 1))(line.shares, slopes)
    log_back = total(
        0.25 * h * (s**2 - end**2) - 0.5 * (s + end) * way
    )  # log q(η|η') − log q(η'|η)
    ratio = log_target + log_back
    usable = jnp.isfinite(ratio) & ~zero[-1] & (off <= line.tolerance)
    accepted, probability = _accept(last, jnp.where(usable, ratio, jnp.nan))
    taken = accepted[members]
    after = jnp.where(taken, nodes[-1, :d], v[:d])
    after = jnp.concatenate([after, v[d:]])
    gradient = jax.grad(lambda z: known.log_density(jnp.concatenate([after[:d], z])))(
        v[d:]
    )
    error = jnp.sum(jnp.where(usable, off, 0.0) * probability)
    error = error / jnp.maximum(jnp.sum(probability), 1e-6)
    info = Info(
        jnp.mean(probability),
        jnp.any(taken),
        ~jnp.all(jnp.isfinite(ratio)),
        jnp.asarray(jnp.nan),
        error,
    )
    return after, jnp.concatenate([jnp.where(taken, end, s), gradient]), info


def _along(known: ClosedFormDensity, v: Array, way: Array) -> tuple[Array, Array]:
    """log p at v, and how much it curves along a way: −d²/ds² log p(v + s·way), made
    positive."""

    def slope(s: Array) -> tuple[Array, Array]:
        return jax.jvp(
            lambda s: known.log_density(v + s * way), (s,), (jnp.ones_like(s),)
        )

    (log_p, _), (_, second) = jax.jvp(slope, (jnp.zeros(()),), (jnp.ones(()),))
    curvature = jnp.where(jnp.isfinite(second), jnp.abs(second), 1.0)
    return log_p, jnp.maximum(curvature, tuning.LATENTS.flat)


def _log_wider(before: dict[str, Frame], after: dict[str, Frame]) -> Array:
    """log |dη'/dη| of a move that takes η along, a scalar."""
    return sum(
        (frame.log_volume - before[name].log_volume for name, frame in after.items()),
        jnp.zeros(()),
    )


def _joint_move(
    key: Array,
    line: LineIntegral,
    known: ClosedFormDensity,
    widths: Array | None,
    v: Array,
    score: Array,
    evaluate: Evaluate,
) -> tuple[Array, Array]:
    """Step 3: v after a move of φ that takes η along, and the score there; half of the
    time about as far as the population is wide, where that is known."""
    d = known.layout.dims
    z = v[d:]
    draw, far, which, last = jax.random.split(key, 4)
    one = jnp.concatenate([jnp.zeros((d,)), known.unit_vector(which)])
    low, high = np.log(tuning.LATENTS.ratios)
    scale = jnp.exp(jax.random.uniform(far, minval=low, maxval=high))
    here, curvature = _along(known, v, one)
    length, local = scale / jnp.sqrt(curvature), jnp.ones((), bool)
    if widths is not None:
        local = jax.random.bernoulli(jax.random.fold_in(which, 1))
        length = jnp.where(local, length, tuning.LATENTS.reach * (widths @ one[d:]))
    length *= jax.random.normal(draw)
    way = length * one[d:]
    frames, etas = known.frames(z), known.layout.position(v, 1.0)
    xi = {name: frame.standard(etas[name]) for name, frame in frames.items()}

    def along(share: Array) -> Array:
        there, _ = known.shifted(z, share * way)
        return jnp.concatenate(
            [
                *(
                    f.place(xi[name]).reshape(-1)
                    for name, f in known.frames(there).items()
                ),
                there,
            ]
        )

    def log_p(y: Array, z: Array) -> Array:
        return known.log_density(jnp.concatenate([y, z]))

    nodes, velocity = jax.vmap(lambda share: jax.jvp(along, (share,), (jnp.ones(()),)))(
        line.shares
    )
    found, zero = jax.vmap(evaluate)(nodes[1:])
    scores = jnp.concatenate([score[None], found])[:, :d]
    of_u = scores - jax.vmap(jax.grad(log_p))(nodes[:, :d], nodes[:, d:])
    of_moved, off = line.along(line.shares, jnp.sum(of_u * velocity[:, :d], axis=1))
    there, curvature_there = _along(known, nodes[-1], one)
    ratio = (
        there
        - here
        + of_moved
        + _log_wider(frames, known.frames(nodes[-1, d:]))
        + known.shifted(z, way)[1]
    )
    back = (
        jnp.log(curvature_there / curvature)
        - (curvature_there - curvature) * (length / scale) ** 2
    )
    ratio += jnp.where(local, 0.5 * back, 0.0)
    # The nodes are those of the way back too: what is refused for its error is refused
    # both ways.
    usable = jnp.all(jnp.isfinite(found)) & ~zero[-1] & (off <= line.tolerance)
    taken, _ = _accept(last, jnp.where(usable, ratio, jnp.nan))
    return jnp.where(taken, nodes[-1], v), jnp.where(taken, found[-1], score)
