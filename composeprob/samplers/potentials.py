"""What the potential G of the level above weighs, seen from where a reverse step ended."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Position
from composeprob.pytree import normal_like
from composeprob.samplers.reverse import leaning
from composeprob.samplers.turned import Turned

POINTS = 8
"""M, the points at which a potential is averaged. What a hard wall loses falls as 2^−M."""
BACKWARD = 2**31 - 7
"""Folded into a level's key for the points that noise leads back to."""


def averaged_potential(
    key: Array,
    half: Array,
    moved: Position,
    position: Position,
    log_potential: Array,
    density: AnnealedDensity,
    levels: tuple[Array, Array],
    turned: Turned | None,
) -> Array:
    r"""log G_k(x) with its plain part P averaged, for a chain that went from x at level k to x' at level k', a scalar.

    In the place of P_k(x) stands

        (1/M)·Σ_j P_k(x^(j))·exp(⟨g, x − x^(j)⟩),    x^(1) = x,    x^(2…M) ~ q(x_k | x'),

    the mean over where noise leads to from x', with q the step `Turned` round and g as much of ∇log P_k at its mean as
    `leaning` allows.

    A weight G_k'(x')/G_k(x) needs that noise never leads from a point that G allows to one that it forbids: what does
    so is lost, at every level anew, and where G is nearly 0 it comes back in a few chains of huge weight. With the mean
    a chain is lost only where all M points are forbidden, and no weight is more than M times that of the best path. The
    weights stay unbiased: they are those of a process whose backward step draws M points from q and picks one of them
    with probability in proportion to P_k·exp(−⟨g, x^(j)⟩), for any g that depends on x' alone. With this g the
    exponential is, to first order, how much less likely a step to x' is from x^(j) than from x under the law that
    leans. So where P is smooth, and leaning has made up for its slope, the terms are alike and the mean adds no noise.

    Args:
        key, half: this level's key of the chain, and which half of the chains it belongs to.
        moved, position: x' and x.
        log_potential: log G_k(x).
        density: gives G and the schedule.
        levels: k and k'.
        turned: q; None where no function is plain.

    References:
        Andrieu, Doucet and Holenstein (2010), *Particle Markov chain Monte Carlo methods*, for the extended law; Del
        Moral, Doucet and Jasra (2006), section 3.3.2, for the backward kernel that M → ∞ leads to.
    """
    if turned is None:
        return log_potential
    noised = [name for name, site in density.sites.items() if site.kind == "noised"]

    def led_to(noise: Position) -> Position:
        return turned.leads(moved, noise, half, density, levels)

    keys = jax.random.split(jax.random.fold_in(key, BACKWARD), POINTS - 1)
    others = jax.vmap(lambda key: led_to(normal_like(key, moved)))(keys)
    points = jax.tree.map(lambda x, rest: jnp.concatenate([x[None], rest]), position, others)

    def plain(point: Position) -> Array:
        return density.evaluator.plain_potential(point, levels[0])

    blank = jax.tree.map(jnp.zeros_like, moved)
    middle = led_to(blank)
    lean = leaning(middle, blank, jax.grad(plain)(middle), density, *levels)

    def term(point: Position) -> Array:
        return plain(point) + sum((jnp.sum(lean[n] * (position[n] - point[n])) for n in noised), jnp.zeros(()))

    terms = jax.vmap(term)(points)
    log_mean = jax.nn.logsumexp(jnp.where(jnp.isnan(terms), -jnp.inf, terms)) - jnp.log(POINTS)
    # A chain at a zero has no weight to gain or lose; −∞ − (−∞) would make it NaN.
    return jnp.where(jnp.isneginf(log_potential), log_potential, log_potential - terms[0] + log_mean)
