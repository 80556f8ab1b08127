"""The models of digits: labels that mean something, and samples that are what they were asked to be."""

import jax
import numpy as np
import pytest

import composeprob as cp
from composeprob.errors import ConditionError, InvalidValueError
from models.handwriting import ANY
from models.worlds import digits as world

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
        with pytest.raises(InvalidValueError, match=r"no digit .*\n.*label=10 for any"):
            digits.given(label=label)
    with pytest.raises(ConditionError, match="given twice"):
        digits.given(label=3).given(label=4)
    with pytest.raises(ConditionError, match="no condition 'class_'; its conditions are: 'label'"):
        cp.load("digits", class_=3)
    assert digits.given(label=ANY).fixed["label"] == ANY
    with pytest.raises(InvalidValueError, match="classes 0 to 9"):
        cp.condition(digits, cp.load("digits-classifier"), label=10)


@pytest.mark.slow
def test_guided_digits_are_recognised():
    digits, classifier = cp.load("digits"), cp.load("digits-classifier")
    assert accuracy(cp.guide(digits, 2.0, label=LABEL)) > 0.95
    assert accuracy(cp.condition(digits, classifier, LABEL, scale=8.0)) > 0.95
    assert accuracy(digits) < 0.25
