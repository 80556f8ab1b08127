"""What chains weigh: at the first level, and from one level to the next."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Evaluation, Parts
from composeprob.samplers.layout import Layout
from composeprob.samplers.random import Stream, normals, stream
from composeprob.samplers.step import Backward, Step
from composeprob.schedule import Noise


def first_weight(layout: Layout, density: AnnealedDensity, v: Array, found: Evaluation, level: Array | int) -> Array:
    """What one chain's draw from the distribution of the first level weighs, a scalar.

    Args:
        layout, density: as they are.
        v, found: the draw, (D,), and its evaluation.
        level: the first.
    """
    parts, noise = found.parts, density.schedule.at(level)
    log_weight = parts.log_potential + parts.log_exact
    if weighs_top(density):
        position = layout.position(v, noise.alpha)
        xs = {name: position[name] for name in density.top.power}
        log_weight = log_weight + parts.log_marginal - density.top.log_density(xs, noise.sigma)
    return log_weight


def first_evidence(density: AnnealedDensity, level: int) -> Array:
    """The log-evidence that all weights start from, a scalar; 0 where the first weights themselves know ∫F."""
    constant = density.top.log_normaliser(density.schedule.at(level).sigma)
    return jnp.zeros_like(constant) if weighs_top(density) and density.top.normalised else constant


def weighs_top(density: AnnealedDensity) -> bool:
    """Whether the first draws are weighed by F over the density that they are drawn from, and not taken for draws of
    F."""
    known = bool(density.top.power) and "energy" in density.capabilities
    return known and (density.top.normalised or not density.top.exact)


def incremental_log_weight(before: Parts, after: Parts, noise: Noise, end: Noise) -> Array:
    r"""What a chain's log-weight gains under Feynman–Kac weights from a level to a cleaner one, a scalar:

    $$\int r\,d\tau + \log G'(x') - \log G(x) + \log p(z \mid x') - \log p(z \mid x),$$

    without the log-ratio of its step's twist. The part of r that comes from scores is integrated over λ by the
    trapezoid rule, as s·r per unit of λ: the second point costs nothing, since the chain is evaluated there anyway. The
    part that comes from the drift is exact, excess·log(α/α').

    Args:
        before, after: at both ends, with rates per unit of τ; where there is a control it is in them.
        noise, end: of both levels.
    """
    rate = 0.5 * (noise.variance * before.rate + end.variance * after.rate)
    excess = 0.5 * (before.excess + after.excess)
    gain = (end.log_snr - noise.log_snr) * rate + excess * jnp.log(noise.alpha / end.alpha)
    gain = gain + after.log_potential - before.log_potential
    return gain + after.log_prior - before.log_prior  # 0 unless a prior looks at a noised site


def averaged_potential(
    words: Array,
    half: Array,
    start: Array,
    moved: Array,
    log_potential: Array,
    density: AnnealedDensity,
    layout: Layout,
    noise: Noise,
    end: Noise,
    backward: Backward,
    most: float,
) -> Array:
    r"""log G_k(x) with its plain part P averaged over where the step may have come from, of one chain, a scalar.

    In the place of P_k(x) stands

        (1/M)·Σ_j P_k(x^(j))·exp(⟨g, x − x^(j)⟩),    x^(1) = x,    x^(2…M) ~ q(x_k | x'),

    the mean over the step's `Backward` kernel q, with g as much of ∇log P_k at its mean as the twist allows.

    A weight G_k'(x')/G_k(x) needs that noise never leads from a point that G allows to one that it forbids: what does
    so is lost, at every level anew, and where G is nearly 0 it comes back in a few chains of huge weight. With the mean
    a chain is lost only where all M points are forbidden, and no weight is more than M times that of the best path. The
    weights stay unbiased: they are those of a process whose backward step draws M points from q and picks one of them
    with probability in proportion to P_k·exp(−⟨g, x^(j)⟩), for any g that depends on x' alone. With this g the
    exponential is, to first order, how much less likely a step to x' is from x^(j) than from x under the twisted law.
    So where P is smooth, and the twist has made up for its slope, the terms are alike and the mean adds no noise.

    Args:
        words: random ones of the chain, (2,).
        half: which half of the chains it belongs to.
        start, moved: v and v', (D,).
        log_potential: log G_k(x).
        density, layout: what gives P_k.
        noise, end: of level k and of the one where the step ended.
        backward: q.
        most: how far the step may be twisted.

    References:
        Andrieu, Doucet and Holenstein (2010), *Particle Markov chain Monte Carlo methods*, for the extended law; Del
        Moral, Doucet and Jasra (2006), section 3.3.2, for the backward kernel that M → ∞ leads to.
    """
    d, level, law = layout.dims, noise.index, Step.ddpm(noise.variance, end.variance)

    def plain(y: Array) -> Array:
        position = layout.position(jnp.concatenate([y, moved[d:]]), noise.alpha)
        return density.evaluator.plain_potential(position, level)

    normal = normals(stream(words, Stream.POINTS), level, (tuning.POTENTIAL_POINTS - 1) * d).reshape(-1, d)
    others = jax.vmap(lambda z: backward.draw(moved[:d], z, half))(normal)
    middle = backward.draw(moved[:d], jnp.zeros((d,), moved.dtype), half)
    slope = jax.grad(plain)(middle)
    length = law.gain**2 * jnp.sum(slope**2) / law.noise**2
    share = jnp.minimum(1.0, most * jnp.sqrt(d / jnp.maximum(length, 1e-30)))
    slope = jnp.where(jnp.isfinite(length), share * slope, 0.0)
    first = plain(start[:d])
    rest = jax.vmap(lambda y: plain(y) + jnp.sum(slope * (start[:d] - y)))(others)
    terms = jnp.concatenate([first[None], rest])
    log_mean = jax.nn.logsumexp(jnp.where(jnp.isnan(terms), -jnp.inf, terms)) - jnp.log(tuning.POTENTIAL_POINTS)
    # A chain at a zero has no weight to gain or lose; −∞ − (−∞) would make it NaN.
    return jnp.where(jnp.isneginf(log_potential), log_potential, log_potential - first + log_mean)
