"""The depth of a barrier against closed forms."""

import numpy as np
import pytest

import composeprob as cp
from composeprob.density.points import barrier_depth, barriers, log_densities
from sampling_cases import modes, single


def mixture(position: dict[str, np.ndarray]) -> np.ndarray:
    """log of ½ N(−m, I) + ½ N(m, I) with m = (5, 0, 0), up to a constant."""
    x = position["x"]
    mode = np.array([5.0, 0, 0])
    left = -0.5 * ((x + mode) ** 2).sum(-1)
    right = -0.5 * ((x - mode) ** 2).sum(-1)
    return np.logaddexp(left, right)


def test_the_depth_between_two_modes_is_that_at_the_middle():
    ends = np.array([[5.0, 0, 0], [5.0, 0, 0]])
    depth = barrier_depth(mixture, {"x": -ends}, {"x": ends})
    (at_end,) = mixture({"x": np.array([[5.0, 0.0, 0.0]])})
    (at_middle,) = mixture({"x": np.zeros((1, 3))})
    assert depth == pytest.approx([at_end - at_middle] * 2)


def test_points_of_one_mode_have_none():
    a, b = np.random.default_rng(0).normal(size=(2, 500, 3)) + np.array([5.0, 0, 0])
    assert barrier_depth(lambda x: -0.5 * (x**2).sum(-1), a, b).max() <= 1e-9
    assert np.mean(barrier_depth(mixture, {"x": a}, {"x": b}) > 1) == 0
    in_the_other_mode = {"x": b - np.array([10.0, 0, 0])}
    assert np.mean(barrier_depth(mixture, {"x": a}, in_the_other_mode) > 1) > 0.5


def test_an_end_without_density_has_no_depth():
    inside = barrier_depth(
        lambda x: np.where(np.abs(x) < 1, 0.0, -np.inf),
        np.array([0.0, -0.5]),
        np.array([2.0, 0.5]),
    )
    assert np.isnan(inside[0])
    assert inside[1] == 0


def test_barriers_from_a_score_alone():
    """Two modes at ±2 in two entries: barriers from a score beside those of
    log-densities at 201 points of the segment. On the 11 points that log-densities take
    by default, the score's integral loses the kink of log π between modes."""
    law = cp.Analytic(
        modes([0.5, 0.5], [[-2.0, -2.0], [2.0, 2.0]], 0.5), cp.Schedule.log_snr(20)
    )

    def score(x, level):
        return law.evaluate(x, law.schedule.at(level), {})[1]

    def exact_depth(a, b, steps=201):
        segment = np.linspace(a, b, steps)
        values = log_densities(cp.compile(single, law), {"x": segment.reshape(-1, 2)})
        values = values.reshape(steps, -1)
        before = np.maximum.accumulate(values)
        after = np.maximum.accumulate(values[::-1])[::-1]
        return (np.minimum(before, after) - values).max(0)

    scored = cp.Diffusion(
        score, law.schedule, event_shape=(2,), parameterization="score", time="level"
    )
    a, b = np.random.default_rng(0).normal(size=(2, 200, 2)).astype(np.float32) / 2
    for shift, depth in ((0.0, 0.0), (4.0, 14.5)):
        found = barriers(cp.compile(single, scored))({"x": a - 2}, {"x": b - 2 + shift})
        assert abs(np.median(found) - depth) < 1
        np.testing.assert_allclose(found, exact_depth(a - 2, b - 2 + shift), atol=0.6)
