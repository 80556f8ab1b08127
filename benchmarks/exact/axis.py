"""Powers, products and quotients of Gaussian mixtures whose centres lie on one line, in
any number of dimensions.

With isotropic components a density depends on the place t along the line and on the
distance r from it alone, so that

    ∫ Π_i f_i(x)^{w_i} dx = |S^{d−2}| · ∫∫ Π_i f_i(t, r)^{w_i} · r^{d−2} dr dt

is a sum over a grid of two numbers (of one where d = 1). Exact values are of level 0 as
it is, noise included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from scipy.special import gammaln, logsumexp

import composeprob as cp
from exact.case import Answer, Case, schedule, share, single


@dataclass(frozen=True)
class Mixture:
    """Σ_j w_j·N(c_j·u, s_j²·I) with u the unit vector along the line: weights, centres
    and widths, (J,) each."""

    weights: tuple[float, ...]
    centres: tuple[float, ...]
    widths: tuple[float, ...]

    def factor(self, dims: int) -> cp.Analytic:
        """The same as a factor; of events () where there is one dimension."""
        centres, widths = jnp.asarray(self.centres), jnp.asarray(self.widths)
        parts = dist.Normal(centres, widths)
        if dims > 1:
            along = jnp.full(dims, dims**-0.5)
            parts = dist.Normal(centres[:, None] * along, widths[:, None]).to_event(1)
        return cp.Analytic(
            dist.MixtureSameFamily(dist.Categorical(jnp.asarray(self.weights)), parts),
            schedule(),
        )

    def log_density(
        self, t: np.ndarray, square: np.ndarray, dims: int, alpha: float, sigma: float
    ) -> np.ndarray:
        """log f at noise (α, σ), t along the line and r² = ``square`` from it."""
        terms = []
        for weight, centre, width in zip(
            self.weights, self.centres, self.widths, strict=True
        ):
            variance = (alpha * width) ** 2 + sigma**2
            far = (t - alpha * centre) ** 2 + square
            terms.append(
                np.log(weight)
                - 0.5 * far / variance
                - 0.5 * dims * np.log(2 * np.pi * variance)
            )
        return np.logaddexp.reduce(terms)


Terms = tuple[tuple[Mixture, float], ...]
"""Mixtures and their exponents."""


def exact(terms: Terms, dims: int, cut: float) -> Answer:
    """The share of t < cut, and log Z.

    Steps are parts of the narrowest width s that a component has under the sum of the
    exponents: s/6 is enough for sums of Gaussians. A cut leaves an error of (h/s)²/24
    times its density, and so does r = 0 in three dimensions: s/20.
    """
    levels = schedule()
    alpha, sigma = float(levels.alpha[0]), float(levels.sigma[0])
    above = [(mixture, w) for mixture, w in terms if w > 0]
    widths = np.concatenate([mixture.widths for mixture, _ in above])
    centres = np.concatenate([mixture.centres for mixture, _ in above])
    narrowest = widths.min() / np.sqrt(sum(w for _, w in above))
    step = narrowest / 20
    across = narrowest / (20 if dims == 3 else 6)
    reach = 10 * widths.max()
    t = np.arange(centres.min() - reach, centres.max() + reach, step)
    # The cut lies halfway between two points of the grid.
    t = t + cut - t[np.searchsorted(t, cut)] + step / 2
    if dims == 1:
        squares, log_area = np.zeros(1), np.zeros(1)
    else:
        r = (np.arange(int(widths.max() * (np.sqrt(dims) + 8) / across)) + 0.5) * across
        squares = r**2
        log_area = (
            np.log(2 * across)
            + 0.5 * (dims - 1) * np.log(np.pi)
            - gammaln(0.5 * (dims - 1))
        )
        log_area = log_area + (dims - 2) * np.log(r)
    lines = []
    for some in np.array_split(t, max(1, t.size * squares.size // 500_000)):
        each = sum(
            w * m.log_density(some[:, None], squares, dims, alpha, sigma)
            for m, w in terms
        )
        lines.append(logsumexp(each + log_area, axis=1))
    mass = np.concatenate(lines) + np.log(step)
    log_evidence = float(logsumexp(mass))
    return Answer(float(np.exp(logsumexp(mass[t < cut]) - log_evidence)), log_evidence)


def along(
    family: str,
    name: str,
    terms: Terms,
    dims: int = 1,
    cut: float = 0.0,
    sampler: Callable[[], cp.Sampler] | None = None,
    form: Callable[[Mixture, int], Any] = Mixture.factor,
) -> Case:
    """The case of a program of one site whose factor is Π_i f_i^{w_i}, asked for the
    share of t < cut; ``form`` makes the factor of a mixture."""

    def compiled() -> cp.AnnealedDensity:
        return cp.compile(
            single, cp.product(*(form(mixture, dims) ** w for mixture, w in terms))
        )

    below = (
        share(lambda s: s["x"] < cut)
        if dims == 1
        else share(lambda s: s["x"].sum() < cut * dims**0.5)
    )
    return Case(family, name, compiled, below, lambda: exact(terms, dims, cut), sampler)


def two(
    weight: float, centres: tuple[float, float], widths: tuple[float, float]
) -> Mixture:
    """Two components, of which the first has this weight."""
    return Mixture((weight, 1 - weight), centres, widths)


F, G = two(0.3, (-2.0, 1.0), (0.3, 1.0)), two(0.5, (-2.0, 2.0), (1.2, 1.5))
UNEVEN = two(0.6, (-3.0, 3.0), (1.0, 0.1))


def guidance(scale: float, f: Mixture = F, g: Mixture = G) -> Terms:
    """f·(f/g)^(scale − 1)."""
    return (f, scale), (g, 1 - scale)


def squared_mixture(dims: int, per_entry: float = 1.0) -> Terms:
    """(½ N(−m, ½²) + ½ N(m, ¼²))² with every entry of m as given."""
    centre = per_entry * dims**0.5
    return ((two(0.5, (-centre, centre), (0.5, 0.25)), 2.0),)


def common_cases() -> list[Case]:
    """Strong guidance, a high power, squares in many dimensions, and reverse diffusion
    alone."""
    even = two(2 - 2**0.5, (-2.0, 2.0), (0.5, 0.25))  # whose square has equal shares
    return [
        along("guidance 7", "guidance 7", guidance(7.0), cut=-0.5),
        along("power 20", "power 20", ((UNEVEN, 20.0),)),
        along("squared mixture", "squared mixture, d = 10", squared_mixture(10), 10),
        along("squared mixture", "squared mixture, d = 32", squared_mixture(32), 32),
        along(
            "Ancestral", "Ancestral on two modes", ((even, 2.0),), sampler=cp.Ancestral
        ),
    ]


def more_cases() -> list[Case]:
    """Other weights, exponents from 3 to 30, dimensions from 1 to 40, negations."""
    three = Mixture((0.5, 0.2, 0.3), (-3.0, 0.5, 3.0), (0.8, 0.3, 0.15))
    ahead, base = two(0.4, (-1.5, 1.5), (0.4, 0.6)), two(0.5, (-1.0, 1.0), (1.0, 1.2))
    broad, hole = two(0.45, (-2.0, 2.0), (0.9, 0.5)), two(0.2, (-2.0, 2.0), (1.2, 1.0))
    wide = Mixture((0.6, 0.4), (0.0, 1.5), (2.0, 1.0))
    return [
        along(
            "Ancestral",
            "Ancestral on a product, d = 2",
            ((broad, 1.0), (ahead, 1.0)),
            2,
            sampler=cp.Ancestral,
        ),
        along("powers", "power 3, three modes", ((three, 3.0),), cut=-0.8),
        along(
            "powers",
            "power 30, d = 2",
            ((two(0.5, (-2.0, 2.0), (0.5, 0.48)), 30.0),),
            2,
        ),
        along(
            "powers", "power 8, d = 5", ((two(0.9, (-2.0, 2.0), (0.6, 0.46)), 8.0),), 5
        ),
        along(
            "guidance of mixtures", "guidance 3, d = 2", guidance(3.0, ahead, base), 2
        ),
        along("guidance of mixtures", "guidance 15", guidance(15.0), cut=-0.5),
        along(
            "guidance of mixtures", "guidance 5, d = 10", guidance(5.0, ahead, base), 10
        ),
        along("negation", "f² / g, d = 3", ((broad, 2.0), (hole, -1.0)), 3),
        along(
            "product of four",
            "four mixtures, d = 4",
            ((broad, 1.0), (hole, 1.0), (ahead, 1.0), (wide, 1.0)),
            4,
        ),
        along(
            "many dimensions",
            "cubed, d = 20",
            ((two(0.8, (-2.5, 2.5), (0.5, 0.48)), 3.0),),
            20,
        ),
        along(
            "many dimensions",
            "squared, d = 40",
            ((two(0.3, (-3.0, 3.0), (0.4, 0.42)), 2.0),),
            40,
        ),
    ]
