"""`result.compare`: a mode that one of two runs has missed is named with its share;
right runs raise no alarm."""

import dataclasses

import numpy as np
import pytest

from composeprob.errors import InvalidValueError, ShapeError, WrongTypeError
from composeprob.results.estimates import Genealogy
from refusals import refused
from test_result import make

CENTRES = np.array([[5.0, 0.0], [0.0, 5.0], [-5.0, 0.0], [0.0, 0.0]])
WEIGHTS = np.array([0.2, 0.3, 0.1, 0.4])
KEYS = 10


def drawn(rng, n=200, d=2, dropped=None):
    weights = np.where(np.arange(4) == dropped, 0.0, WEIGHTS)
    x = rng.normal(size=(n, d))
    x[:, :2] += CENTRES[rng.choice(4, n, p=weights / weights.sum())]
    return make({"x": x}, np.zeros(n))


@pytest.mark.parametrize("d", [2, 32])
def test_a_dropped_mode_of_a_fifth_is_named(d):
    rng = np.random.default_rng(0)
    found = [drawn(rng, d=d).compare(drawn(rng, d=d, dropped=0)) for _ in range(KEYS)]
    assert all(comparison.status.has("modes_missing") for comparison in found)
    np.testing.assert_allclose(
        np.mean([c.missing_there for c in found]), 0.2, atol=0.06
    )
    assert max(c.missing_here for c in found) < 0.05
    assert (
        "this run's samples lie where the other has next to none"
        in found[0].status.message
    )
    assert found[0].status.withholds
    turned = drawn(rng, d=d, dropped=0).compare(drawn(rng, d=d))
    assert turned.missing_here > 0.1
    assert "the other run's" in str(turned)


def test_right_runs_raise_no_alarm():
    rng = np.random.default_rng(1)
    assert (
        sum(
            drawn(rng).compare(drawn(rng)).status.has("modes_missing")
            for _ in range(3 * KEYS)
        )
        <= 1
    )


def test_copies_of_one_chain_are_no_mode():
    """Every chain stands five times in a row, in two runs of one law."""
    rng = np.random.default_rng(2)

    def copied():
        x = np.repeat(drawn(rng, n=60)["x"], 5, axis=0)
        families = Genealogy.from_ancestors(np.ones(300), np.repeat(np.arange(60), 5))
        return make({"x": x}, np.zeros(300), _genealogy=families)

    assert not any(
        copied().compare(copied()).status.has("modes_missing") for _ in range(KEYS)
    )
    alone = dataclasses.replace(
        copied(), _genealogy=Genealogy.from_ancestors(np.ones(300), np.arange(300))
    )
    assert alone.compare(alone).p_value > 0.5


def test_draws_and_weights():
    rng = np.random.default_rng(3)
    x = drawn(rng, n=400)["x"]
    chains = make({"x": x.reshape(100, 4, 2)}, np.zeros(100), draws=4)
    assert not chains.compare(chains).status.has("modes_missing")
    # weights that take the first mode away
    weights = np.where(np.linalg.norm(x - CENTRES[0], axis=1) < 3, -np.inf, 0.0)
    assert (
        make({"x": x}, np.zeros(400)).compare(make({"x": x}, weights)).missing_there
        > 0.1
    )


def test_what_is_refused():
    rng = np.random.default_rng(4)
    result = drawn(rng)
    refused(
        lambda: result.compare(result["x"]),
        WrongTypeError,
        "compare takes another result",
    )
    refused(
        lambda: result.compare(make({"y": result["x"]}, np.zeros(200))),
        ShapeError,
        "two runs of one program",
    )
    refused(
        lambda: result.compare(drawn(rng, n=8)), InvalidValueError, "16 samples or more"
    )
