"""`result.compare`: a finding states the share of a mode that one of two runs has
missed; right runs raise no alarm."""

import dataclasses

import jax
import numpy as np
import pytest

from composeprob import tuning
from composeprob.errors import InvalidValueError, ShapeError, WrongTypeError
from composeprob.results.estimates import Genealogy
from messages import check_finding, check_wording
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
def test_a_dropped_mode_of_a_fifth_has_the_finding(d):
    rng = np.random.default_rng(0)
    comparisons = [
        drawn(rng, d=d).compare(drawn(rng, d=d, dropped=0)) for _ in range(KEYS)
    ]
    assert all(each.status.has("modes_missing") for each in comparisons)
    missing_there = np.mean([each.missing_there for each in comparisons])
    np.testing.assert_allclose(missing_there, 0.2, atol=0.06)
    assert max(each.missing_here for each in comparisons) < 0.05
    status = comparisons[0].status
    check_finding(status, "modes_missing")
    assert status.withholds
    turned = drawn(rng, d=d, dropped=0).compare(drawn(rng, d=d))
    assert turned.missing_here > 0.1
    check_wording(str(turned), "turned", estimated=True)


def test_right_runs_raise_no_alarm():
    rng = np.random.default_rng(1)
    alarms = 0
    for _ in range(3 * KEYS):
        comparison = drawn(rng).compare(drawn(rng))
        alarms += comparison.status.has("modes_missing")
    assert alarms <= 1


def test_copies_of_one_chain_are_not_a_mode():
    """Every chain stands five times in a row, in two runs of one distribution."""
    rng = np.random.default_rng(2)

    def copied():
        x = np.repeat(drawn(rng, n=60)["x"], 5, axis=0)
        ancestors = np.repeat(np.arange(60), 5)
        genealogy = Genealogy.from_ancestors(np.ones(300), ancestors)
        return make({"x": x}, np.zeros(300), _genealogy=genealogy)

    for _ in range(KEYS):
        comparison = copied().compare(copied())
        assert not comparison.status.has("modes_missing")
    independent = Genealogy.from_ancestors(np.ones(300), np.arange(300))
    alone = dataclasses.replace(copied(), _genealogy=independent)
    backwards = dataclasses.replace(alone, samples={"x": alone["x"][::-1]})
    assert alone.compare(backwards).p_value > 0.5


def test_draws_and_weights():
    rng = np.random.default_rng(3)
    x = drawn(rng, n=400)["x"]
    chains = make({"x": x.reshape(100, 4, 2)}, np.zeros(100), draws=4)
    backwards = make({"x": x[::-1].reshape(100, 4, 2)}, np.zeros(100), draws=4)
    assert not chains.compare(backwards).status.has("modes_missing")
    # Weights that take the first mode away.
    weights = np.where(np.linalg.norm(x - CENTRES[0], axis=1) < 3, -np.inf, 0.0)
    whole = make({"x": x}, np.zeros(400))
    assert whole.compare(make({"x": x}, weights)).missing_there > 0.1


def test_a_key_chooses_samples_and_labels(monkeypatch):
    """Without one a comparison is the same at each call."""
    fewer = tuning.COMPARISON._replace(most=50)
    monkeypatch.setattr(tuning, "COMPARISON", fewer)
    rng = np.random.default_rng(3)
    one = drawn(rng)
    other = drawn(rng, dropped=0)
    keys = [jax.random.key(i) for i in range(4)]
    shares = [one.compare(other, key).missing_there for key in keys]
    assert len(set(shares)) > 1
    assert one.compare(other, keys[0]).missing_there == shares[0]
    assert one.compare(other) == one.compare(other)
    refused(lambda: one.compare(other, 0), WrongTypeError, fix="jax.random.key")


def test_comparisons_that_are_refused():
    rng = np.random.default_rng(4)
    result = drawn(rng)
    refused(
        lambda: result.compare(result["x"]),
        WrongTypeError,
    )
    refused(
        lambda: result.compare(make({"y": result["x"]}, np.zeros(200))),
        ShapeError,
    )
    refused(lambda: result.compare(drawn(rng, n=8)), InvalidValueError)
