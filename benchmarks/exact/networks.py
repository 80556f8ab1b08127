"""Programs of factors that are learned: powers, guidance and products by scores or
energies alone, energies whose level 0 is not the limit of their noisier levels,
networks that are wrong, and sharp data.

The networks are closed forms that the library does not know as such. Exact values are
those of the right networks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

import composeprob as cp
from exact.axis import Mixture, Terms, along, two
from exact.case import Answer, Case, schedule, share, single
from exact.grids import on_grid

UNEVEN = two(0.8, (-2.0, 2.0), (1.0, 0.1))
FOURTH = two(0.8, (-2.0, 2.0), (0.8, 0.45))
AHEAD, BASE = two(0.55, (-2.0, 2.0), (0.5, 0.45)), two(0.5, (-1.5, 1.5), (0.9, 0.75))
THREE = (UNEVEN, two(0.6, (-2.0, 2.0), (1.0, 0.3)), two(0.5, (-2.0, 2.0), (0.8, 0.2)))
"""Mixtures whose product has a mode that is narrow, and light at noisy levels."""
PLAIN = two(0.3, (-1.0, 1.5), (0.3, 0.5))
RIPPLES, SLOPE = 0.3, 1.0
"""Size of the ripples that only level 0 has, in nats, and its slope beside."""

Network = Callable[[Any, Any], Any]


def noise_at(log_snr: Any) -> tuple[Any, Any]:
    """α and σ."""
    return jnp.sqrt(jax.nn.sigmoid(log_snr)), jnp.sqrt(jax.nn.sigmoid(-log_snr))


def log_noised(mixture: Mixture, dims: int) -> Network:
    """Return log f of a mixture along the diagonal, of x and the log-SNR."""
    along_line = np.full(dims, dims**-0.5)
    centres = jnp.asarray(np.outer(mixture.centres, along_line))
    widths = jnp.asarray(mixture.widths)

    def log_density(x: Any, log_snr: Any) -> Any:
        alpha, sigma = noise_at(log_snr)
        variance = (alpha * widths) ** 2 + sigma**2
        away = jnp.sum((jnp.reshape(x, (1, dims)) - alpha * centres) ** 2, axis=1)
        volume = dims * jnp.log(2 * jnp.pi * variance)
        each = jnp.log(jnp.asarray(mixture.weights)) - 0.5 * (away / variance + volume)
        return jax.nn.logsumexp(each)

    return log_density


def factor(network: Network, form: str, dims: int) -> cp.Diffusion:
    """Return a factor of a network of x and the log-SNR."""
    shape = (dims,) if dims > 1 else ()
    return cp.Diffusion(
        network,
        schedule(),
        event_shape=shape,
        parameterization=form,
        time="log_snr",
    )


def by_score(mixture: Mixture, dims: int) -> cp.Diffusion:
    """Return a mixture of which only the score is offered."""
    return factor(jax.grad(log_noised(mixture, dims)), "score", dims)


def by_energy(mixture: Mixture, dims: int) -> cp.Diffusion:
    """Return a mixture as an energy whose modes need not have the right heights, for
    all that the library knows."""
    log_density = log_noised(mixture, dims)

    def energy(x: Any, log_snr: Any) -> Any:
        return -noise_at(log_snr)[1] * log_density(x, log_snr)

    return factor(energy, "energy", dims)


# ── powers, guidance, products ────────────────────────────────────────────────────────
def powers() -> list[Case]:
    """Cubes, guidance, and products of three."""
    cube: Terms = ((UNEVEN, 3.0),)
    in_four: Terms = ((FOURTH, 3.0),)
    guided: Terms = ((AHEAD, 5.0), (BASE, -4.0))
    product: Terms = tuple((mixture, 1.0) for mixture in THREE)
    named = (
        ("learned, powers", "cube, score", cube, 1, by_score),
        ("learned, powers", "cube, energy", cube, 1, by_energy),
        ("learned, powers", "cube, d = 4, score", in_four, 4, by_score),
        ("learned, guidance", "guidance 5, score", guided, 1, by_score),
        ("learned, guidance", "guidance 5, energy", guided, 1, by_energy),
        ("learned, AND", "three mixtures, score", product, 1, by_score),
    )
    cases = []
    for family, name, terms, dims, form in named:
        cases.append(along(family, name, terms, dims, 0.3, form=form))
    return cases


# ── energies whose levels disagree ────────────────────────────────────────────────────
def only_level_0(log_snr: Any) -> Any:
    """Return 1 at level 0 and nearly 0 at the others."""
    log_snrs = np.asarray(schedule().log_snr)
    between = float(log_snrs[:2].mean())
    gap = float(log_snrs[0] - log_snrs[1])
    return jax.nn.sigmoid(30 / gap * (log_snr - between))


def ripples(dims: int) -> Case:
    """N(0, I) at all levels but level 0, whose density has ripples and a slope beside:
    the share of the first number above 0.5."""

    def energy(x: Any, log_snr: Any) -> Any:
        wrong = jnp.sum(RIPPLES * jnp.cos(4 * x) - SLOPE * x)
        return noise_at(log_snr)[1] * (
            0.5 * jnp.sum(x**2) + only_level_0(log_snr) * wrong
        )

    def exact() -> Answer:
        found = on_grid(
            (-9.0, 9.0, 18_000),
            log_joint=lambda x: -0.5 * x**2 - RIPPLES * np.cos(4 * x) + SLOPE * x,
            inside=lambda x: x > 0.5,
        )
        return Answer(found.value)  # an energy has no normaliser

    def first(sample: dict[str, Any]) -> Any:
        return jnp.ravel(sample["x"])[0] > 0.5

    return Case(
        "levels disagree",
        f"ripples at level 0, d = {dims}",
        lambda: cp.compile(single, factor(energy, "energy", dims)),
        share(first),
        exact,
    )


# ── wrong networks ────────────────────────────────────────────────────────────────────
def steeper(score: Network) -> Network:
    """1.15 times a score."""
    return lambda x, log_snr: 1.15 * score(x, log_snr)


def shifted(score: Network) -> Network:
    """A score plus 0.3."""
    return lambda x, log_snr: score(x, log_snr) + 0.3


def at_other_noise(score: Network) -> Network:
    """A score of a log-SNR that is greater by 1."""
    return lambda x, log_snr: score(x, log_snr + 1)


def wrong_networks() -> list[Case]:
    """Squares of a mixture by wrong scores."""
    errors = {
        "score × 1.15": steeper,
        "score + 0.3": shifted,
        "log-SNR + 1": at_other_noise,
    }
    cases = []
    for name, error in errors.items():

        def wrong(mixture: Mixture, dims: int, error: Any = error) -> cp.Diffusion:
            return factor(error(jax.grad(log_noised(mixture, dims))), "score", dims)

        terms: Terms = ((PLAIN, 2.0),)
        cases.append(along("wrong network", name, terms, 2, 0.2, form=wrong))
    return cases


# ── sharp data ────────────────────────────────────────────────────────────────────────
NUMBERS, MEASURED, ERROR = 20, 10, 0.03


@cp.program
def seen(f: Any, matrix: Any, y: Any) -> Any:
    x = cp.sample("x", f)
    cp.observe("y", dist.Normal(matrix @ x, ERROR).to_event(1), y)


def sharp_data() -> Case:
    """Ten sharp measurements of 20 correlated numbers, by a learned energy, on which
    chains with weights collapse: the share of the first above its exact mean."""
    rng = np.random.default_rng(0)
    axes, _ = np.linalg.qr(rng.normal(size=(NUMBERS, NUMBERS)))
    variances = np.exp(np.linspace(np.log(0.1), 0.0, NUMBERS))
    matrix = rng.normal(size=(MEASURED, NUMBERS)) / np.sqrt(NUMBERS)
    alpha, sigma = noise_at(float(schedule().log_snr[0]))
    noised = float(alpha) ** 2 * variances + float(sigma) ** 2
    prior = (axes * noised) @ axes.T
    truth = rng.multivariate_normal(np.zeros(NUMBERS), prior)
    y = matrix @ truth + ERROR * rng.normal(size=MEASURED)
    seen_covariance = matrix @ prior @ matrix.T + ERROR**2 * np.eye(MEASURED)
    mean = prior @ matrix.T @ np.linalg.solve(seen_covariance, y)

    def energy(x: Any, log_snr: Any) -> Any:
        alpha, sigma = noise_at(log_snr)
        along_axes = jnp.asarray(axes, jnp.float32).T @ x
        spread = alpha**2 * jnp.asarray(variances, jnp.float32) + sigma**2
        return sigma * 0.5 * jnp.sum(along_axes**2 / spread)

    def compiled() -> cp.AnnealedDensity:
        prior = factor(energy, "energy", NUMBERS)
        data = (jnp.asarray(matrix, jnp.float32), jnp.asarray(y, jnp.float32))
        return cp.compile(seen, prior, *data)

    first = share(lambda s: s["x"][..., 0] > mean[0])
    name = f"{MEASURED} sharp measurements, d = {NUMBERS}"
    return Case("learned, data", name, compiled, first, lambda: Answer(0.5))


def cases() -> list[Case]:
    """Every program of this module."""
    return [*powers(), ripples(1), ripples(3), *wrong_networks(), sharp_data()]
