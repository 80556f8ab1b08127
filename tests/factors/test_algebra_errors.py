"""What the algebra refuses, each with a sentence that says how to go on."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.errors import (
    CapabilityError,
    ConditionError,
    ImproperError,
    InvalidValueError,
    ShapeError,
    WrongTypeError,
)
from composeprob.factors.calibrated import CalibratedExpression
from refusals import refused
from sampling_cases import learned, single

SCHEDULE = cp.Schedule.cosine(10)
F = cp.Analytic(dist.Normal(jnp.zeros(2), 1.0), SCHEDULE, label="f")
G = cp.Analytic(dist.Normal(jnp.ones(2), 0.5), SCHEDULE, label="g")
WIDE = cp.Analytic(dist.Normal(jnp.zeros(3), 1.0), SCHEDULE, label="wide")
LEARNED = learned(lambda x, t: jnp.sum(x**2), "energy", SCHEDULE, time="level", label="learned")
SCORED = cp.Diffusion(lambda x, t: x, SCHEDULE, event_shape=(2,), label="scored")
CONDITIONAL = learned(lambda x, t, c, d: -c * d * x, "score", SCHEDULE, conditions={"c": 1.0, "d": 1.0}, time="level")
LEVELLED = learned(
    lambda x, t, c: c * (x @ x), "energy", SCHEDULE, time="level", conditions={"c": 1.0}, label="levelled"
)
CALIBRATED = CalibratedExpression(factor=F * LEVELLED, schedule=SCHEDULE, fixed={}, degree=4.0, event_shape=(2,))
THREE, KEY = np.ones(3), jax.random.key(0)


@pytest.mark.parametrize(
    ("make", "error", "told"),
    [
        (lambda: F * WIDE, ShapeError, r"'f' has \(2,\), 'wide' has \(3,\)"),
        (lambda: F / WIDE, ShapeError, "events of one shape"),
        (lambda: cp.mixture([F, WIDE]), ShapeError, "events of one shape"),
        (lambda: cp.product(), InvalidValueError, "at least one factor"),
        (lambda: cp.product(F, 3), WrongTypeError, "combines factors; got int"),
        (lambda: cp.power(3, 2), WrongTypeError, "combines factors; got int"),
        (lambda: F**np.inf, InvalidValueError, "must be finite; got inf"),
        (lambda: F ** float("nan"), InvalidValueError, "must be finite; got nan"),
        (lambda: F ** "two", WrongTypeError, "number known before compilation; got str"),
        (lambda: jax.jit(lambda w: (F**w).powers)(2.0), WrongTypeError, "number known before compilation"),
        (lambda: cp.mixture([]), InvalidValueError, "at least one factor"),
        (lambda: cp.mixture([F, G], weights=[1.0]), InvalidValueError, "2 non-negative finite numbers"),
        (lambda: cp.mixture([F, G], weights=[2.0, -1.0]), InvalidValueError, "2 non-negative finite numbers"),
        (lambda: cp.mixture([F, G], weights=[0.0, 0.0]), InvalidValueError, "positive sum"),
        (lambda: cp.mixture([F, G], weights=[np.nan, 1.0]), InvalidValueError, "2 non-negative finite numbers"),
        (lambda: cp.mixture([F, G], weights="ab"), WrongTypeError, "weights must be numbers"),
        (lambda: cp.mixture([F, G], log_weights=[0.0]), InvalidValueError, "2 finite numbers"),
        (lambda: cp.mixture([F, G], log_weights=[0.0, np.inf]), InvalidValueError, "2 finite numbers"),
        (lambda: cp.mixture([F, G], [1, 1], log_weights=[0, 0]), InvalidValueError, "both weights and log_weights"),
        (lambda: cp.mixture([F, LEARNED]), CapabilityError, "normaliser of 'learned' is unknown.*log_weights"),
        (lambda: cp.mixture([F, F * G]), CapabilityError, "normaliser of the part f \\* g is unknown"),
        (lambda: cp.mixture([F, F**2]), CapabilityError, "normaliser of the part f \\*\\* 2 is unknown"),
        (lambda: cp.mixture([F, SCORED], log_weights=[0, 0]), CapabilityError, "'scored' offers only its score"),
        (lambda: cp.mixture([WIDE, cp.window(F, (3,), (0,))]), CapabilityError, "normaliser of the part .* is unknown"),
        (lambda: cp.window(F, (4, 4), (0,)), ShapeError, "as many axes as the factor's event"),
        (lambda: cp.window(F, (4,), (3,)), ShapeError, r"leaves the canvas on axis 0: it covers 3 to 5 of 4"),
        (lambda: cp.window(F, (4,), (-1,)), ShapeError, "leaves the canvas"),
        (lambda: cp.window(F, (4,), (1,), scale=2), ShapeError, r"between 0 and 0 there"),
        (lambda: cp.window(F, (4,), (0, 0)), ShapeError, "more axes than the canvas"),
        (lambda: cp.window(F, (4,), (0,), scale=0), InvalidValueError, "must be at least 1; got 0"),
        (lambda: cp.window(F, (4,), (0,), scale=1.5), WrongTypeError, "must be a whole number; got 1.5"),
        (lambda: cp.window(F, (4,), (0.5,)), WrongTypeError, "offset must be a tuple of whole numbers"),
        (lambda: cp.window(F, 4, (0,)), WrongTypeError, "canvas_shape must be a tuple of whole numbers; got 4"),
        (lambda: cp.window(3, (4,), (0,)), WrongTypeError, "combines factors; got int"),
        (lambda: cp.product(CONDITIONAL, over=THREE), WrongTypeError, "over must be a dict.*got ndarray.*Fix: write"),
        (lambda: cp.product(CONDITIONAL, over={}), WrongTypeError, "over must be a dict.*got an empty dict"),
        (lambda: cp.product(CONDITIONAL, over={"e": THREE}), ConditionError, "'e'.*their conditions are: 'c', 'd'"),
        (lambda: cp.product(F, over={"c": THREE}), ConditionError, "their conditions are: none.*conditions="),
        (lambda: cp.product(CONDITIONAL, over={"c": 3.0}), ShapeError, "leading axis.*single number.*given"),
        (lambda: cp.product(CONDITIONAL, over={"c": THREE, "d": [1.0]}), ShapeError, "'c' has 3, 'd' has 1"),
        (lambda: cp.product(CONDITIONAL, over={"c": np.ones((0, 2))}), InvalidValueError, "n = 0.*at least one"),
        (lambda: cp.product(CONDITIONAL, over={"c": []}), InvalidValueError, "n = 0"),
        (lambda: cp.product(CONDITIONAL, over={"c": THREE}, block=0), InvalidValueError, "block must be at least 1"),
        (lambda: cp.product(CONDITIONAL, over={"c": THREE}, block=1.5), WrongTypeError, "block must be a whole"),
        (lambda: cp.product(CONDITIONAL, block=2), InvalidValueError, "a block but no data"),
        (lambda: cp.product(CONDITIONAL, over={"c": np.array([1, np.nan])}), InvalidValueError, "holds NaN"),
        (lambda: cp.product(CONDITIONAL, over={"c": ["a", "b"]}), WrongTypeError, "must be a number or an array"),
        (lambda: cp.product(CONDITIONAL, over={"c": [[1.0], [1.0, 2.0]]}), ShapeError, r"shapes \(1,\), \(2,\)"),
        (lambda: cp.product(CONDITIONAL.given(c=1.0), over={"c": THREE}), ConditionError, "given twice"),
        (lambda: cp.product(CALIBRATED, over={"c": THREE}), ConditionError, "give conditions first"),
        (lambda: cp.product(CONDITIONAL, over={"c": THREE}).given(c=1.0), ConditionError, "given twice"),
        (lambda: cp.product(CONDITIONAL, WIDE, over={"c": THREE}), ShapeError, "events of one shape"),
        (lambda: cp.product(3, over={"c": THREE}), WrongTypeError, "combines factors; got int"),
        (lambda: cp.mixture([LEVELLED], over={"c": THREE}), WrongTypeError, "takes one factor; got list"),
        (lambda: cp.mixture(LEVELLED, over={"c": THREE}), CapabilityError, r"'levelled' is unknown.*f.given\(c=v\)"),
        (lambda: cp.mixture(CONDITIONAL, over={"c": THREE}, log_weights=THREE), CapabilityError, "only its score"),
        (lambda: cp.mixture(LEVELLED, over={"c": THREE}, log_weights=[0, 0]), InvalidValueError, "3 finite numbers"),
        (lambda: cp.mixture(LEVELLED, [1, 1, 1], over={"c": 1.0}), ShapeError, "leading axis"),
        (lambda: cp.calibrate(cp.product(LEVELLED, over={"c": THREE}), KEY), CapabilityError, "over data"),
    ],
)  # fmt: skip
def test_refused_when_written(make, error, told):
    refused(make, error, told)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: F / F, "total power is 0 and no density is left"),
        (lambda: F**0, "no density is left"),
        (lambda: F / G, "total power of its factors is 0,"),
        (lambda: F / G**2, "total power of its factors is -1,"),
        (lambda: cp.mixture([F / F, G], log_weights=[0, 0]), "cancels to a constant"),
        (lambda: cp.window(F, (3,), (0,)), r"not covered: no window reaches entry \(2,\)"),
        (lambda: cp.window(F, (3,), (0,)) / cp.window(F, (3,), (1,)), r"power of its factors is -1 at entry \(2,\)"),
        (lambda: cp.window(F, (4,), (0,), scale=2), "total power of its factors is 0,"),
    ],
)
def test_refused_by_the_compiler(make, told):
    """Its place is the statement's or the factor's."""
    refused(lambda: cp.compile(single, make()), ImproperError, told)


def test_a_negative_power_is_fine_where_the_total_is_positive():
    density = cp.compile(single, F**1.3 * G**-0.3)
    np.testing.assert_allclose(density.top.power["x"], 1.0, rtol=1e-6)
    covered = cp.compile(single, cp.window(F, (3,), (0,)) * cp.window(G, (3,), (1,)))
    np.testing.assert_allclose(covered.top.power["x"], [1.0, 2.0, 1.0])
