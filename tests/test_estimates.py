"""Means, probabilities and quantiles of a result: their errors and intervals, against
many made-up results."""

import numpy as np
import pytest
from scipy import stats

from composeprob.findings import Code, Finding
from composeprob.results import estimates
from composeprob.results.estimates import Genealogy, quantiles_of_runs
from composeprob.results.record import About, Record
from composeprob.results.status import Status

LEVEL = 0.9
REPEATS = 200
NARROWEST = 0.85
"""Least share of intervals that cover: fewer of 200 intervals of 90 % do in one case of
60."""


class Made(Record):
    """Samples without a run."""

    def __init__(self, values, ancestors=None, draws=None, status=None, weights=None):
        n = len(values)
        if weights is None:
            weights = np.ones(n)
        if ancestors is None:
            ancestors = np.arange(n)
        if status is None:
            status = Status()
        # A record is frozen.
        vars(self).update(
            samples={"x": values},
            about=About(draws=draws),
            status=status,
            _genealogy=Genealogy.from_ancestors(weights, ancestors),
        )


def x(sample):
    return sample["x"]


def beyond(threshold):
    return lambda sample: sample["x"] > threshold


def independent(rng):
    return Made(rng.normal(size=200))


def copied(rng):
    """200 chains that descend from 60, half of what they are from there: of four copies
    each one is worth 1.6."""
    ancestors = np.sort(rng.integers(0, 60, 200))
    own = rng.normal(size=60)[ancestors]
    return Made(np.sqrt(0.5) * own + np.sqrt(0.5) * rng.normal(size=200), ancestors)


def few_chains(rng):
    """Four chains of 400 draws, whose autocorrelation is 0.8 from one to the next."""
    values = np.empty((4, 400))
    values[:, 0] = rng.normal(size=4)
    for i in range(1, 400):
        values[:, i] = 0.8 * values[:, i - 1] + 0.6 * rng.normal(size=4)
    return Made(values, draws=400)


def many_chains(rng):
    of_chain = rng.normal(size=(100, 1)) * 0.7
    return Made(of_chain + rng.normal(size=(100, 5)) * np.sqrt(0.51), draws=5)


@pytest.mark.parametrize("make", [independent, copied, few_chains, many_chains])
def test_intervals_cover(make, monkeypatch):
    # Compiles nothing.
    monkeypatch.setattr(
        "composeprob.results.estimates._over_all", lambda fn, whole: fn(whole)
    )
    rng = np.random.default_rng(5)
    covered = []
    truths = (0.0, 0.5, 0.0668, 0.6745)
    for _ in range(REPEATS):
        made = make(rng)
        estimates = (
            made.mean(x),
            made.probability(beyond(0)),
            made.probability(beyond(1.5)),
            made.quantile(x, 0.75),
        )
        intervals = [estimate.interval(LEVEL) for estimate in estimates]
        pairs = zip(truths, intervals, strict=True)
        covered.append([low <= truth <= high for truth, (low, high) in pairs])
        assert all(0 <= end <= 1 for end in intervals[2])
    shares = np.mean(covered, axis=0)
    assert (shares >= NARROWEST).all(), shares
    assert (shares[[0, 1, 3]] <= 0.96).all(), shares  # and they are not all of the line
    assert shares[2] <= 0.99


def test_an_event_that_was_never_seen_has_an_interval():
    never = Made(np.zeros(100)).probability(beyond(0))
    assert never.value == 0
    assert 0 < never.error < 0.02
    low, high = never.interval(0.9)
    assert type(low) is float  # not NumPy's, which would print itself
    assert low == 0
    # Wilson: t²/(n + t²)
    assert high == pytest.approx(1.66**2 / (100 + 1.66**2), rel=0.01)


def test_arrays_of_quantiles_and_probabilities():
    made = Made(np.random.default_rng(2).normal(size=(300, 3)))
    median = made.quantile(x, 0.5)
    assert median.value.shape == median.error.shape == (3,)
    low, high = median.interval(0.9)
    assert (low < median.value).all()
    assert (median.value < high).all()
    np.testing.assert_allclose(
        median.value, np.sort(made.samples["x"], 0)[149], rtol=1e-6
    )
    assert made.probability(beyond(0)).interval()[0].shape == (3,)


@pytest.mark.parametrize("n", [64, 300])
def test_shares_of_rare_events_are_seldom_off_by_four_errors(n):
    """The binomial law tells how often so many samples are inside."""
    inside = np.arange(n // 4)
    made = [Made(np.arange(n) < k).probability(beyond(0.5)) for k in inside]
    shares = np.array([estimate.value for estimate in made])
    errors = np.array([estimate.error for estimate in made])
    spread = np.sqrt(shares * (1 - shares) / n)
    for p in np.geomspace(0.5 / n, 0.1, 50):
        chance = stats.binom.pmf(inside, n, p)
        assert chance[np.abs(shares - p) > 4 * errors].sum() < 0.005
    crowded = inside >= 16
    np.testing.assert_allclose(errors[crowded], spread[crowded], rtol=0.05)
    # As 5 samples are expected, the spread alone is misleading.
    alone = np.abs(shares - 5 / n) > 4 * spread
    assert stats.binom.pmf(inside, n, 5 / n)[alone & (inside > 0)].sum() > 0.02


@pytest.mark.parametrize("inside", [True, False])
def test_where_all_samples_agree_the_error_is_that_of_two_more_on_either_side(inside):
    """Weights add up to 1 but for rounding, which is not an error of theirs."""
    weights = np.random.default_rng(3).uniform(0.5, 1.5, 300)
    made = Made(np.full(300, float(inside)), weights=weights)
    estimate = made.probability(beyond(0.5))
    assert estimate.value == inside
    size = made._genealogy.effective
    error = np.sqrt(2 * (size + 2) / (size + 4) ** 3)
    assert estimate.error == pytest.approx(error)


def test_quantiles_are_weighted_and_one_that_too_few_samples_reach_has_no_end():
    values = np.repeat([0.0, 1.0], 50)
    made = Made(values, weights=np.where(values == 1, 3.0, 1.0))
    assert (made.quantile(x, 0.2).value, made.quantile(x, 0.3).value) == (0, 1)
    low, high = Made(np.arange(50.0)).quantile(x, 0.99).interval(0.9)
    assert high == np.inf
    assert 40 < low < 49


def test_errors_are_withheld_with_their_intervals():
    status = Status((Finding(Code.UNSETTLED, "It drifts.", True),))
    made = Made(np.arange(100.0), status=status)
    for estimate in (made.mean(x), made.probability(beyond(5)), made.quantile(x, 0.5)):
        assert np.isnan(estimate.error)
        assert np.isnan(estimate.interval(0.9)).all()
        assert np.isfinite(estimate.value)
    assert np.isnan(Made(np.arange(3.0)).mean(x).error)
    assert np.isnan(Made(np.ones((3, 2)), draws=2).mean(x).error)


def test_pareto_k_tells_heavy_weights():
    rng = np.random.default_rng(3)
    light = rng.exponential(size=1000)
    heavy = rng.pareto(1.0, 1000)
    assert Genealogy.from_ancestors(light, np.arange(1000)).pareto_k < 0.5
    assert Genealogy.from_ancestors(heavy, np.arange(1000)).pareto_k > 0.7
    assert np.isnan(Genealogy.from_ancestors(np.ones(100), np.arange(100)).pareto_k)


@pytest.mark.parametrize("size", [1, 4, 24, 25])
def test_arviz_is_asked_for_pareto_k_of_enough_weights_alone(size, monkeypatch):
    """Its versions end otherwise in different errors, or in infinity."""
    monkeypatch.setattr(estimates, "_pareto_k", lambda log_weights: 0.5)
    weights = np.arange(1.0, 1 + size)
    k = Genealogy.from_ancestors(weights, np.arange(size)).pareto_k
    assert np.isnan(k) == (size < 25)


@pytest.mark.parametrize("size", range(1, 31))
def test_pareto_k_of_few_weights_raises_nothing(size):
    weights = np.random.default_rng(3).pareto(1.0, size)
    k = Genealogy.from_ancestors(weights, np.arange(size)).pareto_k
    assert np.isnan(k) or size >= 25


@pytest.mark.parametrize("share", [0.24, 0.21, 0.8])
def test_the_error_of_a_quantile_near_the_share_of_a_mode_spans_the_gap(
    share, monkeypatch
):
    """Two modes, four apart: where the left one has nearly a quarter, the quantile of
    some runs is in it and that of others in the right one. The mean square of errors is
    their variance, which an interval of 90 % that ends before the gap would hide."""
    monkeypatch.setattr(
        "composeprob.results.estimates._over_all", lambda fn, whole: fn(whole)
    )
    rng = np.random.default_rng(7)
    values = []
    squares = []
    for _ in range(300):
        left = rng.uniform(size=200) < share
        made = Made(np.where(left, -2.0, 2.0) + 0.1 * rng.normal(size=200))
        estimate = made.quantile(x, 0.25)
        values.append(estimate.value)
        squares.append(estimate.error**2)
    ratio = np.var(values) / np.mean(squares)
    assert 0.4 < ratio < 1.6


def test_quantiles_of_other_runs_are_those_of_the_shares_of_samples():
    values = np.linspace(0.0, 1.0, 1001)
    cumulative = np.arange(1, 1002) / 1001
    found = quantiles_of_runs(values, cumulative, 0.3, 400.0, np.inf)
    assert found.mean() == pytest.approx(0.3, abs=0.003)
    assert found.std() == pytest.approx(np.sqrt(0.3 * 0.7 / 400), rel=0.05)
    few = quantiles_of_runs(values, cumulative, 0.3, 400.0, 4.0)
    assert few.std() > 1.2 * found.std()
