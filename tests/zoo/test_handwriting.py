"""The models of digits: labels that mean something, and samples that are what they were asked to be."""

import jax
import numpy as np
import pytest

import composeprob as cp
from composeprob.errors import ConditionError, InvalidValueError
from composeprob.models.handwriting import ANY
from composeprob.models.making import calibrate_model
from composeprob.models.worlds import digits as world
from refusals import refused

CHAINS = 400
LABEL = 8


@cp.program
def digit(factor):
    return cp.sample("x", factor)


def accuracy(factor, sampler=None):
    density = cp.compile(digit, factor)
    result = cp.infer(density, jax.random.key(0), num_chains=CHAINS, sampler=sampler or cp.Ancestral(), progress=False)
    return np.mean(world.judge(result.unweighted()["x"]) == LABEL)


def test_labels_that_mean_nothing():
    digits = cp.load("digits")
    for label in (11, -1, 2.0, [3]):
        refused(lambda: digits.given(label=label), InvalidValueError, r"no digit .*\n.*label=10 for any")
    refused(lambda: digits.given(label=3).given(label=4), ConditionError, "given twice")
    refused(lambda: cp.load("digits", class_=3), ConditionError, "no condition 'class_'; its conditions are: 'label'")
    assert digits.given(label=ANY).fixed["label"] == ANY
    refused(lambda: cp.condition(digits, cp.load("digits-classifier"), label=10), InvalidValueError, "classes 0 to 9")


@pytest.mark.slow
def test_guided_digits_are_recognised():
    digits, classifier = cp.load("digits"), cp.load("digits-classifier")
    assert accuracy(cp.guide(digits, 2.0, label=LABEL)) > 0.95
    assert accuracy(cp.condition(digits, classifier, LABEL, scale=8.0)) > 0.95
    assert accuracy(digits) < 0.25


@cp.program
def either(three, eight, share):
    return cp.sample("x", cp.mixture([three, eight], weights=[share, 1 - share]))


def test_every_label_has_its_calibration():
    factors = [cp.load("digits", label=label) for label in range(world.CLASSES)]
    assert all("normalised" in factor.capabilities for factor in factors)
    assert "normalised" not in cp.load("digits").capabilities
    density = cp.compile(either, factors[3], factors[8], 0.2)
    assert "2 evaluations in 1 batches" in str(density)  # one network, whatever its calibrations
    with pytest.raises(InvalidValueError, match=r"one normaliser for each .*\n.*calibrate.py digits --given label=…"):
        calibrate_model("digits")


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.2, 0.6])
def test_shares_of_a_mixture_of_classes(share):
    density = cp.compile(either, cp.load("digits", label=3), cp.load("digits", label=8), share)
    result = cp.infer(density, jax.random.key(1), num_chains=1000, progress=False)
    found = world.judge(result.unweighted()["x"])
    assert np.mean(found == 3) / np.mean(np.isin(found, (3, 8))) == pytest.approx(share, abs=0.05)
