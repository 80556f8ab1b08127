"""Importance weights of chains at the first level, and their increments from one level
to the next."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, UInt32

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import DensityTerms, Evaluation
from composeprob.kernels.kernel import log_density_of
from composeprob.samplers.layout import Layout
from composeprob.samplers.moves import Particles
from composeprob.samplers.random import Stream, normals, stream
from composeprob.samplers.step import Backward, Step, within
from composeprob.schedule import Noise


def first_weight(
    layout: Layout,
    density: AnnealedDensity,
    v: Float[Array, " size"],
    evaluation: Evaluation,
    level: Array | int,
) -> Float[Array, ""]:
    """Return the log-weight of one chain's initial draw v, from the distribution of the
    first level, by its evaluation:

        log G + log E, and log F − log(top) where `weighs_top`,

    with F, E and G the `DensityTerms`."""
    terms = evaluation.terms
    noise = density.schedule.at(level)
    log_weight = terms.log_potential + terms.log_exact
    if weighs_top(density):
        position = layout.position(v, noise.alpha)
        xs = {name: position[name] for name in density.top.power}
        log_top = density.top.at(level).log_density(xs, noise.sigma)
        log_weight = log_weight + terms.log_marginal - log_top
    return log_weight


def first_evidence(density: AnnealedDensity, level: int) -> Float[Array, ""]:
    """Return the log-evidence that all weights start from; 0 where the first weights
    already contain ∫F."""
    constant = density.top.at(level).log_normaliser(density.schedule.at(level).sigma)
    if weighs_top(density) and density.top.normalised:
        return jnp.zeros_like(constant)
    return constant


def weighs_top(density: AnnealedDensity) -> bool:
    """Return whether the first draws are weighted by F over the density that they are
    drawn from; otherwise they count as draws of F."""
    has_density = bool(density.top.power) and "energy" in density.capabilities
    return has_density and (density.top.normalised or not density.top.exact)


def incremental_log_weight(
    before: DensityTerms, after: DensityTerms, noise: Noise, end: Noise
) -> Float[Array, ""]:
    r"""Return the Feynman–Kac log-weight increment of a chain from a level to a cleaner
    one,

    $$\int r\,d\tau + \log G'(x') - \log G(x) + \log p(z \mid x') - \log p(z \mid x),$$

    without the log-ratio of its step's twist. The part of r that comes from scores is
    integrated over λ by the trapezoid rule, as s·r per unit of λ; that from the drift
    is exact, excess·log(α/α'). Rates are per unit of τ, with the control in them.
    """
    rate = 0.5 * (noise.variance * before.rate + end.variance * after.rate)
    excess = 0.5 * (before.excess + after.excess)
    from_scores = (end.log_snr - noise.log_snr) * rate
    gain = from_scores + excess * jnp.log(noise.alpha / end.alpha)
    gain = gain + after.log_potential - before.log_potential
    # 0 unless a prior depends on a noised site
    return gain + after.log_prior - before.log_prior


class Weight(NamedTuple):
    """A rule for the log-weight increments of chains between two levels."""

    kind: str | None  # "density", or else by the Feynman–Kac rate
    density: AnnealedDensity
    layout: Layout
    twist_limit: float | None  # of steps, in units of their noise

    def increment(
        self,
        words: UInt32[Array, " 2"],
        half: Int[Array, ""],
        start: Particles,
        moved: Particles,
        noise: Noise,
        end: Noise,
        backward: Backward | None,
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Return the log-weight increment of one chain by a step between two levels,
        and how much greater it would be if potentials were not averaged.

        The log-ratio of the step's twist is not in it. It is −∞ where the density was
        0.

        Args:
            words: the chain's random words.
            half: the half of the population that the chain is in, 0 or 1.
            start: the chain at the noisier level.
            moved: the chain at the cleaner one.
            noise: of the noisier level.
            end: noise of the cleaner one.
            backward: the step's backward kernel, over which the user-defined part of
                the potential is `averaged`; None where nothing is.
        """
        before = start.evaluation
        after = moved.evaluation
        averaging = jnp.zeros(())
        if self.kind == "density":  # log π'(x)/π(x): the chain has not moved
            gain = log_density_of(after) - log_density_of(before)
        else:
            terms = before.terms
            if backward is not None and self.twist_limit is not None:
                rise, alike = self._averaged_potential(
                    words, half, start, moved, noise, end, backward
                )
                log_potential = terms.log_potential + rise
                terms = dataclasses.replace(terms, log_potential=log_potential)
                averaging = jnp.where(alike, rise, 0.0)
            gain = incremental_log_weight(terms, after.terms, noise, end)
        # A chain that was at a zero has no weight left: its increment would be −∞/−∞.
        return jnp.where(before.zero, -jnp.inf, gain), averaging

    def _averaged_potential(
        self,
        words: Array,
        half: Array,
        start: Particles,
        moved: Particles,
        noise: Noise,
        end: Noise,
        backward: Backward,
    ) -> tuple[Float[Array, ""], Bool[Array, ""]]:
        """Return the rise of a chain's log-potential at ``start`` by averaging, as
        `averaged` defines it, and whether its points are alike."""
        d = self.layout.dims
        # Its gain and noise say how far a step follows a slope: as `Step.shift` does.
        law = Step.ddpm(noise.variance, end.variance)
        y = moved.position[:d]
        static = moved.position[d:]

        def potential(y: Array) -> Array:
            v = jnp.concatenate([y, static])
            position = self.layout.position(v, noise.alpha)
            return self.density.evaluator.user_potential(position, noise.index)

        def draw(z: Array) -> Array:
            return backward.draw(y, z, half)

        count = tuning.POTENTIAL_POINTS - 1
        # Random numbers of their own: the step's were used on the way here.
        z = normals(stream(words, Stream.POINTS), noise.index, count * d)
        points = jax.vmap(draw)(z.reshape(-1, d))
        slope = jax.grad(potential)(draw(jnp.zeros_like(y)))
        assert self.twist_limit is not None
        slope = within(slope, law.gain * slope / law.noise, self.twist_limit)
        # A chain at a zero has no weight to gain or lose; −∞ − (−∞) would make it NaN.
        positive = ~jnp.isneginf(start.evaluation.terms.log_potential)
        rise, alike = averaged(potential, start.position[:d], points, slope)
        return jnp.where(positive, rise, 0.0), alike


def averaged(
    potential: Callable[[Array], Array],
    x: Float[Array, " dims"],
    points: Float[Array, "points dims"],
    slope: Float[Array, " dims"],
) -> tuple[Float[Array, ""], Bool[Array, ""]]:
    r"""Return the rise of log P_k(x), the user-defined part of a potential, by
    averaging over points where a step may have come from, and whether these are alike.

    In the place of P_k(x) stands

        (1/M)·Σ_j P_k(x^(j))·exp(⟨g, x − x^(j)⟩),
        x^(1) = x,    x^(2…M) ~ q(x_k | x'),

    the mean over the step's `Backward` kernel q, with g, the ``slope``, as much of
    ∇log P_k at its mean as the twist allows. Where no point counts M times as much as
    another they are alike, and the first two stand for all.

    A weight G_k'(x')/G_k(x) loses, at every level anew, the mass that noise leads from
    a point that G allows to one that it forbids; where G is nearly 0 it comes back in a
    few chains of huge weight. With the mean a chain is lost only where all M points are
    forbidden, and no weight is more than M times that of the best path. The weights
    stay unbiased: they are those of a process whose backward step draws M points from q
    and picks one of them with probability in proportion to P_k·exp(−⟨g, x^(j)⟩), for
    any g that depends on x' alone (Andrieu, Doucet and Holenstein 2010); of two of them
    just as well, as whether points are alike does not depend on their order. With this
    g the terms are alike where P is smooth and the twist has made up for its slope: the
    mean adds no noise. But q is the kernel of the exact process: the reversal of a step
    departs from it by its discretisation error, the less the fewer points are drawn.
    """
    first = potential(x)

    def term(point: Array) -> Array:
        return potential(point) + jnp.sum(slope * (x - point))

    terms = jnp.concatenate([first[None], jax.vmap(term)(points)])
    terms = jnp.where(jnp.isnan(terms), -jnp.inf, terms)
    # NaN, and so false, where all are −∞.
    alike = jnp.max(terms) - jnp.min(terms) < math.log(len(terms))
    rise_of_all = _log_mean(terms) - first
    rise_of_two = _log_mean(terms[:2]) - first
    return jnp.where(alike, rise_of_two, rise_of_all), alike


def _log_mean(terms: Float[Array, " points"]) -> Float[Array, ""]:
    """Return log of the mean of exponentials."""
    return jax.nn.logsumexp(terms) - math.log(len(terms))
