"""Chains in shares that rest on nothing: named where log-densities or barriers say so,
however bent their valley is."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy.special import logsumexp

import composeprob as cp
import sampling_cases
from composeprob import tuning
from composeprob.density.points import barrier_depth
from composeprob.results.shares import (
    _log_density,
    frozen_shares,
    parted,
    seen_barrier,
    share_apart,
    where,
)

FIRST_ORDER = cp.ReverseStep(order=1, control="none")

# ── frozen shares ─────────────────────────────────────────────────────────────────────

KEYS = 20
RING = 3 * np.stack(
    [np.cos(np.arange(8) * np.pi / 4), np.sin(np.arange(8) * np.pi / 4)], axis=1
)


def drawn(rng, means, sds, held, n):
    """Points of Gaussians in shares that are held, and the log-density of equal
    shares."""
    which = rng.choice(len(means), n, p=held)
    x = means[which] + sds[which, None] * rng.normal(size=(n, means.shape[1]))
    squares = ((x[:, None] - means) ** 2).sum(-1) / sds**2
    return {"x": x}, logsumexp(-0.5 * squares - means.shape[1] * np.log(sds), axis=1)


@pytest.mark.parametrize("n", [64, 1000])
@pytest.mark.parametrize(
    ("means", "sds"),
    [
        (np.array([[-2.0], [2.0]]), np.array([0.3, 0.1])),
        (RING, np.linspace(0.1, 0.3, 8)),
        (np.eye(3), np.full(3, 0.1)),
    ],
    ids=["two", "ring", "3-d"],
)
def test_right_shares_are_not_named(means, sds, n):
    rng, equal = np.random.default_rng(0), np.full(len(means), 1 / len(means))
    assert not any(
        frozen_shares(*drawn(rng, means, sds, equal, n)) for _ in range(KEYS)
    )


@pytest.mark.parametrize("d", [1, 2, 3, 6, 10])
def test_log_z_of_modes_of_any_shape_is_off_by_less_than_the_slack(d):
    rng = np.random.default_rng(0)
    laws = {
        "Gaussian": (
            rng.normal,
            lambda x: -0.5 * (x**2).sum(1) - 0.5 * d * np.log(2 * np.pi),
        ),
        "exponential": (rng.exponential, lambda x: -x.sum(1)),
        "uniform": (rng.uniform, lambda x: 0.0),
    }
    for n in (max(20, 5 * d), 500):
        found = []
        for draw, log_density in laws.values():
            x = draw(size=(n, d))
            found.append(np.mean(log_density(x) - _log_density(x)))
        noise = 4 * np.sqrt(2 * (0.6 + 0.5 * d) / n)
        assert max(found) - min(found) < tuning.SHARES.slack * d + noise


def test_one_mode_is_not_named_and_chains_that_stand_still_are_not_judged():
    rng = np.random.default_rng(0)
    for d in (1, 2, 20):
        x = rng.normal(size=(500, d)) ** 3
        assert not frozen_shares({"x": x, "y": x[:, 0]}, rng.normal(size=500))
    x = np.repeat([[-1.0], [1.0]], 50, axis=0)
    assert not frozen_shares({"x": x}, x[:, 0])


def test_a_share_that_is_wrong_by_little_is_named_where_chains_are_many():
    """73 % held by what has half: 1 nat."""
    rng, means = np.random.default_rng(0), np.array([[-2.0], [2.0]])
    for _ in range(KEYS):
        assert frozen_shares(
            *drawn(rng, means, np.array([0.3, 0.1]), [0.73, 0.27], 1000)
        )


@pytest.mark.parametrize("n", [64, 1000])
def test_wrong_shares_are_named(n):
    rng, means = np.random.default_rng(0), np.array([[-2.0], [2.0]])
    for _ in range(KEYS):
        sites, log_density = drawn(rng, means, np.array([0.3, 0.1]), [0.5, 0.5], n)
        ((code, text),) = frozen_shares(
            sites, log_density + 4.0 * (sites["x"][:, 0] > 0)
        )
        assert code == "shares_frozen"
        assert (
            0.93
            < float(re.search(r"should hold about ([\d.]+)%", text)[1]) / 100
            < 0.995
        )  # e⁴ to 1


def test_a_default_run_that_gives_way_says_so():
    """x = ±√y, and the prior has e⁷ times as much at the one as at the other:
    independent chains take either."""
    f = cp.Analytic(
        sampling_cases.modes([0.2, 0.3, 0.5], [-2.0, 0.0, 2.5], [0.2, 0.05, 0.4]),
        cp.Schedule.log_snr(100),
    )
    density = cp.compile(
        sampling_cases.measured,
        f * f,
        lambda x: dist.Normal(x**2, 0.01),
        jnp.float32(1.29),
    )
    sampler = cp.AnnealedMCMC(cp.HMC(cp.Adaptive()), 5, reverse_step=FIRST_ORDER)
    result = cp.infer(
        density, jax.random.key(0), num_chains=200, sampler=sampler, progress=False
    )
    assert 0.2 < np.mean(np.asarray(result["x"]) > 0) < 0.8
    assert result.status.has("shares_frozen")
    assert np.isnan(result.mean(lambda x: x["x"]).error)


# ── barriers ──────────────────────────────────────────────────────────────────────────

CHAINS = 64
SEEDS = 10


def barriers(log_density):
    return lambda a, b: barrier_depth(lambda sites: log_density(sites["x"]), a, b)


def gaussian(rng, d):
    return rng.normal(size=(CHAINS, d)), lambda x: -0.5 * (x**2).sum(1)


def heavy(rng, d):
    return rng.standard_cauchy((CHAINS, d)), lambda x: -np.log1p(x**2).sum(1)


def box(rng, d):
    return rng.uniform(size=(CHAINS, d)), lambda x: np.where(
        ((x > 0) & (x < 1)).all(1), 0.0, -np.inf
    )


def shell(rng, d, width=0.1):
    """A ring, or a sphere, of radius 1.5: two thirds of the segments between its points
    go through nowhere."""
    u = rng.normal(size=(CHAINS, d))
    u *= (1.5 + width * rng.normal(size=(CHAINS, 1))) / np.linalg.norm(
        u, axis=1, keepdims=True
    )
    return u, lambda x: -0.5 * ((np.linalg.norm(x, axis=1) - 1.5) / width) ** 2


def parabola(rng, d):
    a = rng.normal(size=CHAINS)
    points = np.stack([a, a**2 + 0.1 * rng.normal(size=CHAINS)], axis=1)
    return points, lambda x: -0.5 * x[:, 0] ** 2 - 50 * (x[:, 1] - x[:, 0] ** 2) ** 2


def funnel(rng, d):
    a = 3 * rng.normal(size=CHAINS)
    points = np.concatenate(
        [a[:, None], np.exp(a / 2)[:, None] * rng.normal(size=(CHAINS, d - 1))], axis=1
    )

    def log_density(x):
        return (
            -(x[:, 0] ** 2) / 18
            - 0.5 * (x[:, 1:] ** 2).sum(1) * np.exp(-x[:, 0])
            - 0.5 * (d - 1) * x[:, 0]
        )

    return points, log_density


def modes(rng, d, share, distance=12.0):
    offset = distance * np.eye(1, d)
    points = rng.normal(size=(CHAINS, d)) + offset * (rng.random((CHAINS, 1)) < share)
    return points, lambda x: np.logaddexp(
        -0.5 * (x**2).sum(1), -0.5 * ((x - offset) ** 2).sum(1)
    )


VALLEYS = {
    gaussian: (1, 40),
    heavy: (2, 40),
    box: (2, 20),
    shell: (2, 3),
    parabola: (2,),
    funnel: (3, 40),
}


@pytest.mark.parametrize(
    ("shape", "d"), [(shape, d) for shape, dims in VALLEYS.items() for d in dims]
)
def test_chains_of_one_valley_hang_together(shape, d):
    rng = np.random.default_rng(0)
    for _ in range(SEEDS):
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
    for _ in range(SEEDS):
        points, log_density = modes(rng, d, 0.3)
        groups = parted({"x": points}, barriers(log_density))
        right = points[:, 0] > 6
        assert groups is not None
        assert len(groups.shares) == 2
        assert np.all((groups.index == groups.index[0]) == (right == right[0]))
        assert groups.apart == pytest.approx(
            2 * right.mean() * (1 - right.mean()), abs=0.2
        )
        assert groups.depth > 5
        assert "x[0]" in where({"x": points}, groups.index)


@pytest.mark.parametrize("d", [40, 64])
def test_the_noise_of_many_entries_does_not_hide_two_modes(d):
    """On the way from mode to mode it averages out, which lifts log π in the middle by
    d/4 nats."""
    rng = np.random.default_rng(0)
    named = [
        parted({"x": points}, barriers(f)) is not None
        for points, f in (modes(rng, d, 0.3) for _ in range(SEEDS))
    ]
    assert sum(named) >= 9


@pytest.mark.parametrize("d", [1, 16, 64])
def test_how_deep_a_barrier_is_on_the_way(d):
    """Between the centres of the noise of both draws, whose squares are d − 1 each, two
    Gaussians 5 nats apart."""
    way, t = np.sqrt(40.0), np.linspace(0, 1, 100001)
    values = -0.5 * np.minimum(t, 1 - t) ** 2 * way**2 - 0.5 * (d - 1) * (
        t**2 + (1 - t) ** 2
    )
    assert seen_barrier(d) == pytest.approx(values.max() - values[50000], rel=1e-3)
    assert seen_barrier(10_000) == 1


def test_a_place_for_every_chain():
    """Bits in 40 dimensions: no two chains share a mode."""
    rng = np.random.default_rng(0)
    points = np.sign(rng.normal(size=(CHAINS, 40))) + 0.1 * rng.normal(
        size=(CHAINS, 40)
    )
    groups = parted(
        {"x": points}, barriers(lambda x: -50 * ((np.abs(x) - 1) ** 2).sum(1))
    )
    assert groups is not None
    assert groups.shares.max() < 0.1
    assert "places of their own" in str(groups)


def test_what_is_no_number_is_not_judged():
    points = np.array([[0.0], [1.0], [2.0], [np.nan], [4.0]])
    assert parted({"x": points}, barriers(lambda x: -(x[:, 0] ** 2))) is None
