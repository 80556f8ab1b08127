"""Output of a failing statistical test: the program, the exact value, the estimate and
its error."""

import numpy as np
import pytest

import composeprob as cp
from failures import programs
from sampling_cases import normal, single
from zscores import assert_agrees, assert_disagrees, z_scores

VALUES = {"mean": np.array([1.0, 3.0]), "spread": np.array([4.0, 4.2])}


def test_every_average_is_shown_with_its_exact_value_and_error():
    scores = z_scores(VALUES, {"mean": 2.5, "spread": 1.0})
    with pytest.raises(AssertionError) as failed:
        assert_agrees(scores)
    first, worst, other, *_ = str(failed.value).splitlines()
    assert "|z| = 4" in first
    assert worst == "  spread: z +31.0, exact 1, estimate 4.1 ± 0.1"
    assert other == "  mean: z -0.5, exact 2.5, estimate 2 ± 1"
    with pytest.raises(AssertionError, match="estimate 2 ± 1"):
        assert_disagrees(z_scores(VALUES, {"mean": 2.5}))


def test_scores_without_averages_are_shown_alone():
    with pytest.raises(AssertionError, match=r"  x: z \+5\.0"):
        assert_agrees({"x": 5.0})


def test_the_program_is_shown():
    def fail():
        density = cp.compile(single, normal([0.0, 0.0]))
        assert density is None

    with pytest.raises(AssertionError) as failed:
        fail()
    (shown,) = programs(failed.traceback)
    assert "AnnealedDensity of program 'single'" in shown
