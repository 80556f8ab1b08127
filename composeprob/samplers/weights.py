"""What chains weigh: at the first level, and from one level to the next."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

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
    v: Array,
    found: Evaluation,
    level: Array | int,
) -> Array:
    """What one chain's draw v, (D,), from the distribution of the first level weighs, a
    scalar, by its evaluation."""
    parts, noise = found.terms, density.schedule.at(level)
    log_weight = parts.log_potential + parts.log_exact
    if weighs_top(density):
        position = layout.position(v, noise.alpha)
        xs = {name: position[name] for name in density.top.power}
        log_weight = (
            log_weight
            + parts.log_marginal
            - density.top.at(level).log_density(xs, noise.sigma)
        )
    return log_weight


def first_evidence(density: AnnealedDensity, level: int) -> Array:
    """The log-evidence that all weights start from, a scalar; 0 where the first weights
    themselves know ∫F."""
    constant = density.top.at(level).log_normaliser(density.schedule.at(level).sigma)
    return (
        jnp.zeros_like(constant)
        if weighs_top(density) and density.top.normalised
        else constant
    )


def weighs_top(density: AnnealedDensity) -> bool:
    """Whether the first draws are weighed by F over the density that they are drawn
    from, and not taken for draws of F."""
    known = bool(density.top.power) and "energy" in density.capabilities
    return known and (density.top.normalised or not density.top.exact)


def incremental_log_weight(
    before: DensityTerms, after: DensityTerms, noise: Noise, end: Noise
) -> Array:
    r"""What a chain's log-weight gains under Feynman–Kac weights from a level to a
    cleaner one, a scalar:

    $$\int r\,d\tau + \log G'(x') - \log G(x) + \log p(z \mid x') - \log p(z \mid x),$$

    without the log-ratio of its step's twist. The part of r that comes from scores is
    integrated over λ by the trapezoid rule, as s·r per unit of λ; that from the drift
    is exact, excess·log(α/α'). Rates are per unit of τ, with the control in them.
    """
    rate = 0.5 * (noise.variance * before.rate + end.variance * after.rate)
    excess = 0.5 * (before.excess + after.excess)
    gain = (end.log_snr - noise.log_snr) * rate + excess * jnp.log(
        noise.alpha / end.alpha
    )
    gain = gain + after.log_potential - before.log_potential
    return (
        gain + after.log_prior - before.log_prior
    )  # 0 unless a prior looks at a noised site


class Weight(NamedTuple):
    """How chains of a density are weighed from one level to the next."""

    kind: str | None  # ``"density"``, or else by the Feynman–Kac rate
    density: AnnealedDensity  # and its layout: what potentials are averaged by
    layout: Layout
    most: float | None  # how far steps may be twisted, in units of their noise

    def gained(
        self,
        words: Array,
        half: Array,
        start: Particles,
        moved: Particles,
        noise: Noise,
        end: Noise,
        backward: Backward | None,
    ) -> tuple[Array, Array]:
        """What the log-weight of one chain of this ``half``, with these random
        ``words``, gains by a step between two levels, without the log-ratio of its
        twist: −∞ where the density was 0. The plain part of a potential is `averaged`
        over the step's ``backward`` kernel where there is one; second, what it would
        gain more if not."""
        before, after, d = start.evaluation, moved.evaluation, self.layout.dims
        more = jnp.zeros(())
        if self.kind == "density":
            gain = log_density_of(after) - log_density_of(before)
        else:
            parts = before.terms
            if backward is not None and self.most is not None:
                law, y, static = (
                    Step.ddpm(noise.variance, end.variance),
                    moved.position[:d],
                    moved.position[d:],
                )

                def plain(y: Array) -> Array:
                    position = self.layout.position(
                        jnp.concatenate([y, static]), noise.alpha
                    )
                    return self.density.evaluator.user_potential(position, noise.index)

                z = normals(
                    stream(words, Stream.POINTS),
                    noise.index,
                    (tuning.POTENTIAL_POINTS - 1) * d,
                )
                others = jax.vmap(lambda z: backward.draw(y, z, half))(z.reshape(-1, d))
                slope = jax.grad(plain)(backward.draw(y, jnp.zeros_like(y), half))
                slope = within(slope, law.gain * slope / law.noise, self.most)
                # A chain at a zero has no weight to gain or lose; −∞ − (−∞) would make
                # it NaN.
                known = ~jnp.isneginf(parts.log_potential)
                gained, calm = averaged(plain, start.position[:d], others, slope)
                gained = jnp.where(known, gained, 0.0)
                parts = dataclasses.replace(
                    parts, log_potential=parts.log_potential + gained
                )
                more = jnp.where(calm, gained, 0.0)
            gain = incremental_log_weight(parts, after.terms, noise, end)
        # A chain that was at a zero weighs nothing already: it has −∞/−∞ to gain.
        return jnp.where(before.zero, -jnp.inf, gain), more


def averaged(
    plain: Callable[[Array], Array], x: Array, others: Array, slope: Array
) -> tuple[Array, Array]:
    r"""What log P_k(x), the plain part of a potential, gains by being averaged over
    where a step may have come from, and whether these points are alike.

    In the place of P_k(x) stands

        (1/M)·Σ_j P_k(x^(j))·exp(⟨g, x − x^(j)⟩),    x^(1) = x,    x^(2…M) ~ q(x_k | x'),

    the mean over the step's `Backward` kernel q, with g as much of ∇log P_k at its mean
    as the twist allows. Where no point counts M times as much as another they are
    alike, and the first two stand for all.

    A weight G_k'(x')/G_k(x) loses, at every level anew, what noise leads from a point
    that G allows to one that it forbids; where G is nearly 0 it comes back in a few
    chains of huge weight. With the mean a chain is lost only where all M points are
    forbidden, and no weight is more than M times that of the best path. The weights
    stay unbiased: they are those of a process whose backward step draws M points from q
    and picks one of them with probability in proportion to P_k·exp(−⟨g, x^(j)⟩), for
    any g that depends on x' alone (Andrieu, Doucet and Holenstein 2010); of two of them
    just as well, as whether points are alike does not depend on their order. With this
    g the terms are alike where P is smooth and the twist has made up for its slope: the
    mean adds no noise. But q is the kernel of the exact process: with the levels'
    distance the reversal of a step departs from it, the less the fewer points are
    drawn.
    """
    first = plain(x)
    rest = jax.vmap(lambda y: plain(y) + jnp.sum(slope * (x - y)))(others)
    terms = jnp.concatenate([first[None], rest])
    terms = jnp.where(jnp.isnan(terms), -jnp.inf, terms)
    alike = jnp.max(terms) - jnp.min(terms) < math.log(
        len(terms)
    )  # not where all are −∞
    every, two = (
        jax.nn.logsumexp(some) - math.log(len(some)) - first
        for some in (terms, terms[:2])
    )
    return jnp.where(alike, two, every), alike
