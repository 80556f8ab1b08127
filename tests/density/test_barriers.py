"""The depth of a barrier against closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from composeprob.density.barriers import barrier_depth


def mixture(position: dict[str, np.ndarray]) -> np.ndarray:
    """log of ½ N(−m, I) + ½ N(m, I) with m = (5, 0, 0), up to a constant."""
    x = position["x"]
    return np.logaddexp(*(-0.5 * ((x - sign * np.array([5.0, 0, 0])) ** 2).sum(-1) for sign in (-1, 1)))


def test_the_depth_between_two_modes_is_that_at_the_middle():
    ends = np.array([[5.0, 0, 0], [5.0, 0, 0]])
    depth = barrier_depth(mixture, {"x": -ends}, {"x": ends})
    at_end, at_middle = (float(mixture({"x": np.array([[t, 0.0, 0.0]])})[0]) for t in (5.0, 0.0))
    assert depth == pytest.approx([at_end - at_middle] * 2)


def test_points_of_one_mode_have_none():
    a, b = np.random.default_rng(0).normal(size=(2, 500, 3)) + np.array([5.0, 0, 0])
    assert barrier_depth(lambda x: -0.5 * (x**2).sum(-1), a, b).max() <= 1e-9
    assert np.mean(barrier_depth(mixture, {"x": a}, {"x": b}) > 1) == 0
    assert np.mean(barrier_depth(mixture, {"x": a}, {"x": b - np.array([10.0, 0, 0])}) > 1) > 0.5


def test_an_end_without_density_has_no_depth():
    inside = barrier_depth(lambda x: np.where(np.abs(x) < 1, 0.0, -np.inf), np.array([0.0, -0.5]), np.array([2.0, 0.5]))
    assert np.isnan(inside[0])
    assert inside[1] == 0
