"""Chains that barriers part, and chains that hang together however bent the valley is that they lie in."""

from __future__ import annotations

import numpy as np
import pytest

from composeprob.density.barriers import barrier_depth
from composeprob.results.shares import parted, seen_barrier, share_apart, where

CHAINS = 64
KEYS = 10


def log_sum(terms):
    most = terms.max(0)
    return most + np.log(np.exp(terms - most).sum(0))


def barriers(log_density):
    return lambda a, b: barrier_depth(lambda sites: log_density(sites["x"]), a, b)


def gaussian(rng, d):
    return rng.normal(size=(CHAINS, d)), lambda x: -0.5 * (x**2).sum(1)


def heavy(rng, d):
    return rng.standard_cauchy((CHAINS, d)), lambda x: -np.log1p(x**2).sum(1)


def box(rng, d):
    return rng.uniform(size=(CHAINS, d)), lambda x: np.where(((x > 0) & (x < 1)).all(1), 0.0, -np.inf)


def shell(rng, d, width=0.1):
    """A ring, or a sphere, of radius 1.5: two thirds of the segments between its points go through nowhere."""
    u = rng.normal(size=(CHAINS, d))
    u *= (1.5 + width * rng.normal(size=(CHAINS, 1))) / np.linalg.norm(u, axis=1, keepdims=True)
    return u, lambda x: -0.5 * ((np.linalg.norm(x, axis=1) - 1.5) / width) ** 2


def parabola(rng, d):
    a = rng.normal(size=CHAINS)
    points = np.stack([a, a**2 + 0.1 * rng.normal(size=CHAINS)], axis=1)
    return points, lambda x: -0.5 * x[:, 0] ** 2 - 50 * (x[:, 1] - x[:, 0] ** 2) ** 2


def funnel(rng, d):
    a = 3 * rng.normal(size=CHAINS)
    points = np.concatenate([a[:, None], np.exp(a / 2)[:, None] * rng.normal(size=(CHAINS, d - 1))], axis=1)

    def log_density(x):
        return -(x[:, 0] ** 2) / 18 - 0.5 * (x[:, 1:] ** 2).sum(1) * np.exp(-x[:, 0]) - 0.5 * (d - 1) * x[:, 0]

    return points, log_density


def modes(rng, d, share, distance=12.0):
    offset = distance * np.eye(1, d)
    points = rng.normal(size=(CHAINS, d)) + offset * (rng.random((CHAINS, 1)) < share)
    return points, lambda x: log_sum(np.stack([-0.5 * (x**2).sum(1), -0.5 * ((x - offset) ** 2).sum(1)]))


@pytest.mark.parametrize(
    ("shape", "d"),
    [
        (gaussian, 1),
        (gaussian, 40),
        (heavy, 2),
        (heavy, 40),
        (box, 2),
        (box, 20),
        (shell, 2),
        (shell, 3),
        (parabola, 2),
        (funnel, 3),
        (funnel, 40),
    ],
)
def test_chains_of_one_valley_hang_together(shape, d):
    rng = np.random.default_rng(0)
    for _ in range(KEYS):
        points, log_density = shape(rng, d)
        assert parted({"x": points}, barriers(log_density)) is None


def test_pairs_on_a_ring_are_apart_though_it_is_one_valley():
    """So what holds its chains together is the way around, and no test of pairs."""
    points, log_density = shell(np.random.default_rng(0), 2)
    first, second = np.random.default_rng(1).integers(0, CHAINS, (2, 200))
    depth = barriers(log_density)({"x": points[first]}, {"x": points[second]})
    assert share_apart(depth, 2) > 0.4


@pytest.mark.parametrize("d", [1, 10])
def test_two_modes_are_two_groups(d):
    rng = np.random.default_rng(0)
    for _ in range(KEYS):
        points, log_density = modes(rng, d, 0.3)
        groups = parted({"x": points}, barriers(log_density))
        right = points[:, 0] > 6
        assert groups is not None
        assert len(groups.shares) == 2
        assert np.all((groups.index == groups.index[0]) == (right == right[0]))
        assert groups.apart == pytest.approx(2 * right.mean() * (1 - right.mean()), abs=0.2)
        assert groups.depth > 5
        assert "x[0]" in where({"x": points}, groups.index)


@pytest.mark.parametrize("d", [40, 64])
def test_the_noise_of_many_entries_does_not_hide_two_modes(d):
    """On the way from mode to mode it averages out, which lifts log π in the middle by d/4 nats."""
    rng = np.random.default_rng(0)
    named = [parted({"x": points}, barriers(f)) is not None for points, f in (modes(rng, d, 0.3) for _ in range(KEYS))]
    assert sum(named) >= 9


@pytest.mark.parametrize("d", [1, 16, 64])
def test_how_deep_a_barrier_is_on_the_way(d):
    """Between the centres of the noise of both draws, whose squares are d − 1 each, two Gaussians 5 nats apart."""
    way, t = np.sqrt(40.0), np.linspace(0, 1, 100001)
    values = -0.5 * np.minimum(t, 1 - t) ** 2 * way**2 - 0.5 * (d - 1) * (t**2 + (1 - t) ** 2)
    assert seen_barrier(d) == pytest.approx(values.max() - values[50000], rel=1e-3)
    assert seen_barrier(10_000) == 1


def test_a_place_for_every_chain():
    """Bits in 40 dimensions: no two chains share a mode."""
    rng = np.random.default_rng(0)
    points = np.sign(rng.normal(size=(CHAINS, 40))) + 0.1 * rng.normal(size=(CHAINS, 40))
    groups = parted({"x": points}, barriers(lambda x: -50 * ((np.abs(x) - 1) ** 2).sum(1)))
    assert groups is not None
    assert groups.shares.max() < 0.1
    assert "places of their own" in str(groups)


def test_what_is_no_number_is_not_judged():
    points = np.array([[0.0], [1.0], [2.0], [np.nan], [4.0]])
    assert parted({"x": points}, barriers(lambda x: -(x[:, 0] ** 2))) is None
