"""Mode proportions that nothing supports: findings by log-densities and by barriers,
however bent a valley is."""

import re
from types import SimpleNamespace

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
from composeprob.results.checks.few_in_mode import fewest_of_mode
from composeprob.results.estimates import Genealogy
from composeprob.results.shares import (
    _log_density,
    across_gaps,
    detectable_barrier,
    few_in_group,
    largest_difference,
    remembered,
    separated,
    share_separated,
    unreliable_proportions,
)
from messages import check_wording

FIRST_ORDER = cp.ReverseStep(order=1, control="none")

# ── unreliable proportions ────────────────────────────────────────────────────────────

KEYS = 20
RING = 3 * np.stack(
    [np.cos(np.arange(8) * np.pi / 4), np.sin(np.arange(8) * np.pi / 4)], axis=1
)


def drawn(rng, means, sds, held, n):
    """Points of Gaussians in the shares ``held``, and the log-density of equal
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
def test_right_shares_have_no_finding(means, sds, n):
    rng = np.random.default_rng(0)
    equal = np.full(len(means), 1 / len(means))
    for _ in range(KEYS):
        assert not unreliable_proportions(*drawn(rng, means, sds, equal, n))


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
        log_z = []
        for draw, log_density in laws.values():
            x = draw(size=(n, d))
            log_z.append(np.mean(log_density(x) - _log_density(x)))
        noise = 4 * np.sqrt(2 * (0.6 + 0.5 * d) / n)
        assert max(log_z) - min(log_z) < tuning.SHARES.slack * d + noise


def test_one_mode_has_no_finding_and_chains_that_stand_still_are_not_judged():
    rng = np.random.default_rng(0)
    for d in (1, 2, 20):
        x = rng.normal(size=(500, d)) ** 3
        assert not unreliable_proportions({"x": x, "y": x[:, 0]}, rng.normal(size=500))
    x = np.repeat([[-1.0], [1.0]], 50, axis=0)
    assert not unreliable_proportions({"x": x}, x[:, 0])


def test_a_share_that_is_wrong_by_little_is_found_where_chains_are_many():
    """73 % in a mode that should hold half: 1 nat."""
    rng = np.random.default_rng(0)
    means = np.array([[-2.0], [2.0]])
    sds = np.array([0.3, 0.1])
    for _ in range(KEYS):
        assert unreliable_proportions(*drawn(rng, means, sds, [0.73, 0.27], 1000))


@pytest.mark.parametrize("n", [64, 1000])
def test_wrong_shares_are_found(n):
    rng = np.random.default_rng(0)
    means = np.array([[-2.0], [2.0]])
    sds = np.array([0.3, 0.1])
    for _ in range(KEYS):
        sites, log_density = drawn(rng, means, sds, [0.5, 0.5], n)
        wrong = log_density + 4.0 * (sites["x"][:, 0] > 0)
        text = unreliable_proportions(sites, wrong)
        expected = float(re.search(r"should hold about ([\d.]+)%", text)[1]) / 100
        assert 0.93 < expected < 0.995  # e⁴ to 1


def test_independent_chains_of_wrong_proportions_have_the_finding():
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
    lead through density 0."""
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
        assert separated({"x": points}, barriers(log_density)) is None


def test_pairs_on_a_ring_are_separated_though_it_is_one_valley():
    """The way around holds its chains together, and no test of pairs shows that."""
    points, log_density = shell(np.random.default_rng(0), 2)
    first, second = np.random.default_rng(1).integers(0, CHAINS, (2, 200))
    depth = barriers(log_density)({"x": points[first]}, {"x": points[second]})
    assert share_separated(depth, 2) > 0.4


@pytest.mark.parametrize("d", [1, 10])
def test_two_modes_are_two_groups(d):
    rng = np.random.default_rng(0)
    for _ in range(SEEDS):
        points, log_density = modes(rng, d, 0.3)
        groups = separated({"x": points}, barriers(log_density))
        right = points[:, 0] > 6
        assert groups is not None
        assert len(groups.shares) == 2
        assert np.all((groups.index == groups.index[0]) == (right == right[0]))
        of_pairs = 2 * right.mean() * (1 - right.mean())
        assert groups.separated == pytest.approx(of_pairs, abs=0.2)
        assert groups.depth > 5
        assert "x[0]" in largest_difference({"x": points}, groups.index)


def test_one_chain_is_a_group_only_where_any_group_counts():
    """Whichever chain it is: few of the pairs that are examined have it."""
    points, log_density = gaussian(np.random.default_rng(0), 2)
    depths = barriers(
        lambda x: np.logaddexp(log_density(x), log_density(x - 14.0))  # two modes
    )
    assert separated({"x": points}, depths, apart=0.0) is None
    for chain in range(CHAINS):
        moved = points.copy()
        moved[chain] += 14.0
        assert separated({"x": moved}, depths) is None
        groups = separated({"x": moved}, depths, apart=0.0)
        assert groups is not None
        assert np.bincount(groups.index).min() == 1
        assert groups.separated > 0
        assert groups.depth > 5


@pytest.mark.parametrize("d", [40, 64])
def test_the_noise_of_many_entries_does_not_hide_two_modes(d):
    """On the way from mode to mode it averages out, which lifts log π in the middle by
    d/4 nats."""
    rng = np.random.default_rng(0)
    number = 0
    for _ in range(SEEDS):
        points, log_density = modes(rng, d, 0.3)
        number += separated({"x": points}, barriers(log_density)) is not None
    assert number >= 9


@pytest.mark.parametrize("d", [1, 16, 64])
def test_the_height_of_a_barrier_between_two_draws(d):
    """Between the centres of the noise of both draws, whose squares are d − 1 each, two
    Gaussians 5 nats apart."""
    distance = np.sqrt(40.0)
    t = np.linspace(0, 1, 100001)
    of_modes = -0.5 * np.minimum(t, 1 - t) ** 2 * distance**2
    values = of_modes - 0.5 * (d - 1) * (t**2 + (1 - t) ** 2)
    height = values.max() - values[50000]
    assert detectable_barrier(d) == pytest.approx(height, rel=1e-3)
    assert detectable_barrier(10_000) == 1


def test_a_mode_for_every_chain():
    """Bits in 40 dimensions: no two chains share a mode."""
    rng = np.random.default_rng(0)
    signs = np.sign(rng.normal(size=(CHAINS, 40)))
    points = signs + 0.1 * rng.normal(size=(CHAINS, 40))
    log_density = barriers(lambda x: -50 * ((np.abs(x) - 1) ** 2).sum(1))
    groups = separated({"x": points}, log_density)
    assert groups is not None
    assert groups.shares.max() < 0.1
    check_wording(str(groups))


def test_chains_at_nan_are_not_judged():
    points = np.array([[0.0], [1.0], [2.0], [np.nan], [4.0]])
    assert separated({"x": points}, barriers(lambda x: -(x[:, 0] ** 2))) is None


def test_groups_behind_barriers_are_found_however_small():
    """Two of 300 chains are in the second mode; outliers of a mode are no group."""
    rng = np.random.default_rng(0)
    x = rng.standard_t(3, size=(300, 1))
    x[-2:] += 40

    def barriers(a, b):
        apart = np.abs(a["x"] - b["x"])[:, 0] > 15
        return np.where(apart, 30.0, 0.0)

    index = across_gaps({"x": x}, barriers, 16)
    assert np.bincount(index).tolist() == [298, 2]
    assert index[-2:].tolist() == [1, 1]
    together = across_gaps({"x": x[:-2]}, barriers, 16)
    assert not together.any()


@pytest.mark.parametrize(
    ("ancestors", "supported"),
    [
        (np.arange(40), True),  # a mode of forty chains
        (np.arange(40) // 4, True),  # ten ancestors
        (np.arange(40) // 20, False),  # two ancestors
        (np.zeros(40, int), False),
    ],
)
def test_a_share_rests_on_the_ancestors_of_its_group(ancestors, supported):
    """All of the other 300 chains are their own ancestors."""
    index = np.repeat([0, 1], [260, 40])
    of_all = np.concatenate([100 + np.arange(260), ancestors])
    found = few_in_group(index, Genealogy.from_ancestors(np.ones(300), of_all))
    assert (found is None) == supported
    if found is not None:
        assert found.group == 1
        np.testing.assert_allclose(found.share, 40 / 300)
        np.testing.assert_allclose(found.ancestors, len(np.unique(ancestors)))


@pytest.mark.parametrize(
    ("copies", "supported"),
    [
        ([3] * 32, True),  # as many modes as ancestors
        ([3] * 31 + [8], True),  # by chance
        ([3] * 32 + [64], False),
        ([24] * 4, False),  # too few in all
    ],
)
def test_each_of_many_modes_needs_the_ancestors_of_the_others(copies, supported):
    """Each mode has one ancestor, of which there are so many copies."""
    index = np.repeat(np.arange(len(copies)), copies)
    genealogy = Genealogy.from_ancestors(np.ones(len(index)), index)
    found = few_in_group(index, genealogy)
    assert (found is None) == supported


@pytest.mark.parametrize(("changed", "expected"), [(0, True), (1, True), (30, False)])
@pytest.mark.parametrize("n", [64, 1000])
def test_a_sign_of_thirty_that_changes_leaves_the_others_remembered(
    changed, expected, n
):
    rng = np.random.default_rng(0)
    start = rng.choice([-1.0, 1.0], (n, 30))
    end = start + 0.1 * rng.standard_normal((n, 30))
    columns = rng.permuted(np.tile(np.arange(30), (n, 1)), axis=1)[:, :changed]
    rows = np.arange(n)[:, None]
    end[rows, columns] *= rng.choice([-1.0, 1.0], columns.shape)
    assert remembered({"x": start}, {"x": end}) == expected
    assert remembered({"x": start}, {"x": -end}) == expected


def test_fewer_ancestors_do_where_errors_know_more():
    """Five ancestors of eight chains each."""
    index = np.repeat([0, 1], [260, 40])
    ancestors = np.concatenate([100 + np.arange(260), np.arange(40) // 8])
    genealogy = Genealogy.from_ancestors(np.ones(300), ancestors)
    assert few_in_group(index, genealogy) is not None
    assert few_in_group(index, genealogy, 3.0) is None
    assert few_in_group(index, genealogy, 5.1) is not None


@pytest.mark.parametrize("tracks", [True, False])
@pytest.mark.parametrize("repeated", [np.arange(3), None])
@pytest.mark.parametrize("arrival", [{"x": np.zeros(3)}, None])
def test_errors_know_more_where_log_f_is_tracked_and_the_run_was_repeated(
    tracks, repeated, arrival
):
    run = SimpleNamespace(
        arrival=arrival,
        density=SimpleNamespace(tracks=tracks),
        genealogy=SimpleNamespace(repeated=repeated),
    )
    known = tracks and repeated is not None and arrival is None
    assert (fewest_of_mode(run) < tuning.SHARES.fewest_ancestors) == known


def test_a_small_mode_of_chains_that_were_not_copied_is_supported():
    index = np.repeat([0, 1], [296, 4])
    genealogy = Genealogy.from_ancestors(np.ones(300), np.arange(300))
    assert few_in_group(index, genealogy) is None
