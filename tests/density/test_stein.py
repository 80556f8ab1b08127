"""Stein's identity: exact draws satisfy it, samples of another distribution do not."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from composeprob.density.stein import departure, has_edges
from composeprob.results.estimates import Genealogy

KEYS = 25
"""Of draws of each law. Each is named with a probability of 0.001 at most: two of 50
have the probability 0.0012, and those of any law of this file 0.013."""


@functools.cache
def compiled(log_density):
    return jax.jit(jax.vmap(jax.grad(log_density)))


class Law(NamedTuple):
    """A distribution with exact draws, (generator, n) → (n, d), and its log-density."""

    draw: object
    log_density: object

    def scores(self, x):
        return np.asarray(compiled(self.log_density)(x))

    def departure(self, x, ancestors=None):
        n = len(x)
        index = np.arange(n) if ancestors is None else ancestors
        x = x.astype(np.float32)
        return departure(x, self.scores(x), np.full(n, 1 / n), index)


def gaussian(d):
    return Law(lambda rng, n: rng.normal(size=(n, d)), lambda x: -0.5 * jnp.sum(x**2))


def two_modes(means, sds, shares, d=2):
    """Separated normal modes in d dimensions."""
    means = np.array(means, float)[:, None] * np.ones(d)
    sds = np.array(sds)

    def draw(rng, n):
        of = rng.choice(len(shares), n, p=shares)
        return means[of] + sds[of, None] * rng.normal(size=(n, d))

    def log_density(x):
        away = jnp.sum((x - means) ** 2, 1) / sds**2
        return jax.nn.logsumexp(
            jnp.log(jnp.array(shares)) - d * jnp.log(sds) - away / 2
        )

    return Law(draw, log_density)


def student(degrees):
    return Law(
        lambda rng, n: rng.standard_t(degrees, size=(n, 2)),
        lambda x: -(degrees + 1) / 2 * jnp.sum(jnp.log1p(x**2 / degrees)),
    )


def log_gamma(shape):
    """A gamma prior in its unconstrained coordinate."""
    return Law(
        lambda rng, n: np.log(rng.gamma(shape, size=(n, 2)) + 1e-30),
        lambda u: jnp.sum(shape * u - jnp.exp(u)),
    )


def funnel():
    """A half-normal scale, and five numbers of that scale."""

    def draw(rng, n):
        tau = np.abs(rng.normal(size=(n, 1)))
        return np.hstack([np.log(tau), tau * rng.normal(size=(n, 5))])

    def log_density(v):
        u = v[0]
        prior = u - 0.5 * jnp.exp(2 * u)
        return prior - 5 * u - 0.5 * jnp.sum(v[1:] ** 2) * jnp.exp(-2 * u)

    return Law(draw, log_density)


def ridge(width=1.0):
    """A narrow parabola; of less ``width``, chains that did not travel along it."""

    def draw(rng, n):
        x = width * rng.normal(size=n)
        return np.stack([x, x**2 + 0.05 * rng.normal(size=n)], axis=1)

    return Law(
        draw, lambda v: -0.5 * v[0] ** 2 - 0.5 * ((v[1] - v[0] ** 2) / 0.05) ** 2
    )


def box(wall):
    """Uniform in a square, whose walls are as thick as level 0's noise."""

    def log_density(x):
        inside = jax.scipy.special.ndtr((x + 1) / wall)
        outside = jax.scipy.special.ndtr((x - 1) / wall)
        return jnp.sum(jnp.log(inside - outside + 1e-30))

    return Law(
        lambda rng, n: rng.uniform(-1, 1, (n, 2)) + wall * rng.normal(size=(n, 2)),
        log_density,
    )


LAWS = {
    "a normal": gaussian(2),
    "a normal in 100 dimensions": gaussian(100),
    "two modes": two_modes([-2, 2], [0.3, 0.5], [0.3, 0.7]),
    "modes of unequal width": two_modes([-2, 2], [1.0, 0.1], [0.8, 0.2]),
    "a heavy tail": student(3.0),
    "a tail without a mean": student(1.0),
    "a gamma": log_gamma(0.5),
    "a skewed gamma": log_gamma(0.1),
    "a funnel": funnel(),
    "a narrow ridge": ridge(),
    "a box": box(0.007),
}


@pytest.mark.parametrize("name", LAWS)
def test_exact_draws_satisfy_the_identity(name):
    law = LAWS[name]
    named = 0
    for n in (64, 300):
        for key in range(KEYS):
            found = law.departure(law.draw(np.random.default_rng(key), n))
            named += found is not None and found.significant
    assert named <= 1


def test_the_few_samples_of_a_light_mode_are_not_fitted():
    """Sixty functions, and fifty samples of a wide mode of 5 % that carry nearly all of
    the variance: a third of the draws were named."""
    law = two_modes([-0.8, 0.7], [0.6, 0.14], [0.05, 0.95], d=4)
    named = 0
    for key in range(2 * KEYS):
        found = law.departure(law.draw(np.random.default_rng(key), 1000))
        named += found.significant
    assert named <= 1


WRONG = {
    "shifted": (gaussian(2), lambda x: x + 6 / np.sqrt(len(x)), 300),
    "too wide": (gaussian(2), lambda x: 1.3 * x, 300),
    "too narrow": (gaussian(2), lambda x: 0.75 * x, 300),
    "shifted in 100 dimensions": (gaussian(100), lambda x: x + 0.3, 300),
    "shifted, of few": (gaussian(1), lambda x: x + 0.9, 64),
    "two modes, shifted": (LAWS["two modes"], lambda x: x + 0.5, 1000),
}


@pytest.mark.parametrize("name", WRONG)
def test_samples_of_another_distribution_are_named(name):
    law, moved, n = WRONG[name]
    found = [
        law.departure(moved(law.draw(np.random.default_rng(k), n))) for k in range(4)
    ]
    assert sum(one.significant for one in found) >= 3


def test_the_implied_shift_is_that_of_the_mean_or_of_the_variance():
    law = gaussian(1)
    x = law.draw(np.random.default_rng(0), 1000)
    shifted = law.departure(x + 0.5)
    assert not shifted.square
    # Of a normal distribution the second estimate is exact.
    np.testing.assert_allclose(shifted.shift, -(x + 0.5).mean() / x.std(), rtol=1e-3)
    wide = law.departure(1.5 * (x - x.mean()))
    assert wide.square
    np.testing.assert_allclose(wide.shift, 1 / (1.5**2 * x.var()) - 1, rtol=1e-3)


def test_chains_that_did_not_travel_along_a_ridge_are_named():
    """A linear field does not see it, for the noise across the ridge."""
    short = ridge(0.8)
    for key in range(4):
        x = short.draw(np.random.default_rng(key), 300)
        assert ridge().departure(x).significant


def test_a_shift_that_errors_cover_is_not_named():
    """The shift of 10,000 samples is a hundredth of a standard deviation."""
    law = gaussian(2)
    for key in range(4):
        x = law.draw(np.random.default_rng(key), 10_000)
        assert not law.departure(x + 0.01).significant


def test_copies_of_few_ancestors_are_worth_so_few():
    """A shift that would be beyond the errors of as many independent samples."""
    law = gaussian(2)
    rng = np.random.default_rng(0)
    x = np.repeat(law.draw(rng, 30), 20, axis=0) + 0.2
    assert law.departure(x).significant
    assert not law.departure(x, np.repeat(np.arange(30), 20)).significant
    assert law.departure(x[:100], np.arange(100) // 20) is None  # five ancestors


def test_weights_are_those_of_the_samples():
    """Importance weights make samples of N(0, 1) those of N(0.5, 1)."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1000, 1))
    scores = -(x - 0.5)
    equal = np.full(1000, 1e-3)
    weighted = Genealogy.from_log_weights(0.5 * x[:, 0]).weights
    assert departure(x, scores, equal, np.arange(1000)).significant
    assert not departure(x, scores, weighted, np.arange(1000)).significant


@pytest.mark.parametrize(
    ("log_density", "edges"),
    [
        (lambda x: -0.5 * jnp.sum(x**2), False),
        (lambda x: jnp.where(x[0] > 0.3, -0.5 * jnp.sum(x**2), -jnp.inf), True),
        (lambda x: -0.5 * jnp.sum(x**2) + 3.0 * (jnp.abs(x[0] - 1) < 0.3), True),
        (lambda x: -jnp.sum(jnp.abs(x)), False),  # a kink has no boundary term
    ],
)
def test_walls_and_jumps_are_edges(log_density, edges):
    values = jax.jit(jax.vmap(jax.value_and_grad(log_density)))
    x = np.random.default_rng(0).normal(size=(64, 2))
    x[:, 0] = np.abs(x[:, 0]) + 0.3
    scores = np.asarray(values(x)[1])
    found = has_edges(lambda x: tuple(map(np.asarray, values(x))), x, scores, 0)
    assert found == edges
