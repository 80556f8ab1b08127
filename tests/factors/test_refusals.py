"""Refusals of factors and their algebra, each with a sentence that says how to go
on."""

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
    NetworkError,
    ShapeError,
    WrongTypeError,
)
from composeprob.factors.calibrated import CalibratedExpression
from refusals import refused
from sampling_cases import learned, single

SCHEDULE = cp.Schedule.cosine(12)
F = cp.Analytic(dist.Normal(jnp.zeros(2), 1.0), SCHEDULE, label="f")
G = cp.Analytic(dist.Normal(jnp.ones(2), 0.5), SCHEDULE, label="g")
WIDE = cp.Analytic(dist.Normal(jnp.zeros(3), 1.0), SCHEDULE, label="wide")
LEARNED = learned(
    lambda x, t: jnp.sum(x**2), "energy", SCHEDULE, time="level", label="learned"
)
SCORED = cp.Diffusion(lambda x, t: x, SCHEDULE, event_shape=(2,), label="scored")
CONDITIONAL = learned(
    lambda x, t, c, d: -c * d * x,
    "score",
    SCHEDULE,
    conditions={"c": 1.0, "d": 1.0},
    time="level",
)
LEVELLED = learned(
    lambda x, t, c: c * (x @ x),
    "energy",
    SCHEDULE,
    time="level",
    conditions={"c": 1.0},
    label="levelled",
)
CALIBRATED = CalibratedExpression(
    factor=F * LEVELLED, schedule=SCHEDULE, fixed={}, degree=4.0, event_shape=(2,)
)
THREE = np.ones(3)
KEY = jax.random.key(0)
CANVAS = (4, 3)
SQUARE = cp.Analytic(dist.Normal(jnp.zeros((2, 2)), 1.0), SCHEDULE)
SETS = np.array([[0, 1, 2], [3, 7, 11]])
SIXTEEN = np.arange(16).reshape(4, 4)


def cells(factor=WIDE, canvas=CANVAS, **arguments):
    return cp.window(factor, canvas, **arguments)


def traced(numbers):
    return cells(SQUARE, index=numbers)


def energy(fn, schedule=SCHEDULE, event_shape=(2,)):
    return cp.Energy(fn, schedule, event_shape=event_shape)


def logits(x, t):
    return np.eye(3, 2) @ x


def classifier(network=logits, schedule=SCHEDULE, **arguments):
    return cp.Classifier(network, schedule, **arguments)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: F * WIDE, ShapeError, r"'f' has \(2,\), 'wide' has \(3,\)"),
        (lambda: F / WIDE, ShapeError, "events of one shape"),
        (lambda: cp.mixture([F, WIDE]), ShapeError, "events of one shape"),
        (lambda: cp.product(), InvalidValueError, "at least one factor"),
        (lambda: cp.product(F, 3), WrongTypeError, "combines factors; got int"),
        (lambda: cp.power(3, 2), WrongTypeError, "combines factors; got int"),
        (lambda: F**np.inf, InvalidValueError, "must be finite; got inf"),
        (lambda: F ** float("nan"), InvalidValueError, "must be finite; got nan"),
        (
            lambda: F ** "two",
            WrongTypeError,
            "number known before compilation; got str",
        ),
        (
            lambda: jax.jit(lambda w: (F**w).powers)(2.0),
            WrongTypeError,
            "number known before compilation",
        ),
        (lambda: cp.mixture([]), InvalidValueError, "at least one factor"),
        (
            lambda: cp.mixture([F, G], weights=[1.0]),
            InvalidValueError,
            "2 non-negative finite numbers",
        ),
        (
            lambda: cp.mixture([F, G], weights=[2.0, -1.0]),
            InvalidValueError,
            "2 non-negative finite numbers",
        ),
        (
            lambda: cp.mixture([F, G], weights=[0.0, 0.0]),
            InvalidValueError,
            "positive sum",
        ),
        (
            lambda: cp.mixture([F, G], weights=[np.nan, 1.0]),
            InvalidValueError,
            "2 non-negative finite numbers",
        ),
        (
            lambda: cp.mixture([F, G], weights="ab"),
            WrongTypeError,
            "weights must be numbers",
        ),
        (
            lambda: cp.mixture([F, G], log_weights=[0.0]),
            InvalidValueError,
            "2 finite numbers",
        ),
        (
            lambda: cp.mixture([F, G], log_weights=[0.0, np.inf]),
            InvalidValueError,
            "2 finite numbers",
        ),
        (
            lambda: cp.mixture([F, G], [1, 1], log_weights=[0, 0]),
            InvalidValueError,
            "both weights and log_weights",
        ),
        (
            lambda: cp.mixture([F, LEARNED]),
            CapabilityError,
            "normaliser of 'learned' is unknown.*log_weights",
        ),
        (
            lambda: cp.mixture([F, F * G]),
            CapabilityError,
            "normaliser of the part f \\* g is unknown",
        ),
        (
            lambda: cp.mixture([F, F**2]),
            CapabilityError,
            "normaliser of the part f \\*\\* 2 is unknown",
        ),
        (
            lambda: cp.mixture([F, SCORED], log_weights=[0, 0]),
            CapabilityError,
            "'scored' offers only its score",
        ),
        (
            lambda: cp.mixture([WIDE, cp.window(F, (3,), (0,))]),
            CapabilityError,
            "normaliser of the part .* is unknown",
        ),
        (
            lambda: cp.window(F, (4, 4), (0,)),
            ShapeError,
            "as many axes as the factor's event",
        ),
        (
            lambda: cp.window(F, (4,), (3,)),
            ShapeError,
            r"leaves the canvas on axis 0: it covers 3 to 5 of 4",
        ),
        (lambda: cp.window(F, (4,), (-1,)), ShapeError, "leaves the canvas"),
        (
            lambda: cp.window(F, (4,), (1,), scale=2),
            ShapeError,
            r"between 0 and 0 there",
        ),
        (lambda: cp.window(F, (4,), (0, 0)), ShapeError, "more axes than the canvas"),
        (
            lambda: cp.window(F, (4,), (0,), scale=0),
            InvalidValueError,
            "must be at least 1; got 0",
        ),
        (
            lambda: cp.window(F, (4,), (0,), scale=1.5),
            WrongTypeError,
            "must be a whole number; got 1.5",
        ),
        (
            lambda: cp.window(F, (4,), (0.5,)),
            WrongTypeError,
            "offset must be a tuple of whole numbers",
        ),
        (
            lambda: cp.window(F, 4, (0,)),
            WrongTypeError,
            "canvas_shape must be a tuple of whole numbers; got 4",
        ),
        (lambda: cp.window(3, (4,), (0,)), WrongTypeError, "combines factors; got int"),
        (
            lambda: cells(index=[0, 1, 12]),
            InvalidValueError,
            "leaves the canvas: cell 12 of 12",
        ),
        (
            lambda: cells(index=[0, 1, -1]),
            InvalidValueError,
            "leaves the canvas: cell -1",
        ),
        (
            lambda: cells(over=[[0, 1, 2], [3, 4, 3]]),
            InvalidValueError,
            "Set 1 of a window names cell 3 2 times",
        ),
        (lambda: cells(index=[0, 1]), ShapeError, r"needs the shape \(3,\)"),
        (lambda: cells(index=[[0, 1, 2]]), ShapeError, "one cell for each entry"),
        (lambda: cells(over=[0, 1, 2]), ShapeError, r"needs the shape \(n, 3\)"),
        (lambda: cells(over=[[0, 1, 2], [3, 4]]), WrongTypeError, "is not an array"),
        (lambda: cells(over=np.zeros((0, 3), int)), InvalidValueError, "no cells"),
        (
            lambda: cells(index=[0.0, 1.0, 2.0]),
            WrongTypeError,
            "must hold whole numbers; got float64",
        ),
        (
            lambda: cells(index=[True, False, True]),
            WrongTypeError,
            "must hold whole numbers; got bool",
        ),
        (lambda: cells(index=SETS[0], scale=2), InvalidValueError, "averages nothing"),
        (
            lambda: cells(index=SETS[0], over=SETS),
            InvalidValueError,
            "one of offset, index and over",
        ),
        (lambda: cells(), InvalidValueError, "one of offset, index and over"),
        (
            lambda: cells(cp.window(SQUARE, (4, 4), (0, 0), 2), (5, 5), index=SIXTEEN),
            InvalidValueError,
            "neighbours",
        ),
        (
            lambda: cp.window(cells(canvas=(2, 2), index=SETS[0]), (4, 4), (0, 0), 2),
            InvalidValueError,
            "would average",
        ),
        (
            lambda: jax.jit(traced)(jnp.arange(4).reshape(2, 2)),
            WrongTypeError,
            "traced by JAX",
        ),
        (lambda: cp.tapestry(SCORED), WrongTypeError, "made of windows; got Diffusion"),
        (
            lambda: cp.tapestry(*[cp.window(SCORED, (n,), (0,)) for n in (4, 5)]),
            ShapeError,
            "events of one shape",
        ),
        (
            lambda: cp.tapestry(cp.window(LEARNED, (4,), (0,))),
            CapabilityError,
            "'learned' is not a sum over entries",
        ),
        (
            lambda: cp.tapestry(cp.window(F, (4,), (0,))),
            CapabilityError,
            "'f' is not a sum over entries",
        ),
        (
            lambda: cp.product(CONDITIONAL, over=THREE),
            WrongTypeError,
            "over must be a dict.*got ndarray.*Fix: write",
        ),
        (
            lambda: cp.product(CONDITIONAL, over={}),
            WrongTypeError,
            "over must be a dict.*got an empty dict",
        ),
        (
            lambda: cp.product(CONDITIONAL, over={"e": THREE}),
            ConditionError,
            "'e'.*their conditions are: 'c', 'd'",
        ),
        (
            lambda: cp.product(F, over={"c": THREE}),
            ConditionError,
            "their conditions are: none.*conditions=",
        ),
        (
            lambda: cp.product(CONDITIONAL, over={"c": 3.0}),
            ShapeError,
            "leading axis.*single number.*given",
        ),
        (
            lambda: cp.product(CONDITIONAL, over={"c": THREE, "d": [1.0]}),
            ShapeError,
            "'c' has 3, 'd' has 1",
        ),
        (
            lambda: cp.product(CONDITIONAL, over={"c": np.ones((0, 2))}),
            InvalidValueError,
            "n = 0.*at least one",
        ),
        (lambda: cp.product(CONDITIONAL, over={"c": []}), InvalidValueError, "n = 0"),
        (
            lambda: cp.product(CONDITIONAL, over={"c": THREE}, block=0),
            InvalidValueError,
            "block must be at least 1",
        ),
        (
            lambda: cp.product(CONDITIONAL, over={"c": THREE}, block=1.5),
            WrongTypeError,
            "block must be a whole",
        ),
        (
            lambda: cp.product(CONDITIONAL, block=2),
            InvalidValueError,
            "a block but no data",
        ),
        (
            lambda: cp.product(CONDITIONAL, over={"c": np.array([1, np.nan])}),
            InvalidValueError,
            "holds NaN",
        ),
        (
            lambda: cp.product(CONDITIONAL, over={"c": ["a", "b"]}),
            WrongTypeError,
            "must be a number or an array",
        ),
        (
            lambda: cp.product(CONDITIONAL, over={"c": [[1.0], [1.0, 2.0]]}),
            ShapeError,
            r"shapes \(1,\), \(2,\)",
        ),
        (
            lambda: cp.product(CONDITIONAL.given(c=1.0), over={"c": THREE}),
            ConditionError,
            "given twice",
        ),
        (
            lambda: cp.product(CALIBRATED, over={"c": THREE}),
            ConditionError,
            "give conditions first",
        ),
        (
            lambda: cp.product(CONDITIONAL, over={"c": THREE}).given(c=1.0),
            ConditionError,
            "given twice",
        ),
        (
            lambda: cp.product(CONDITIONAL, WIDE, over={"c": THREE}),
            ShapeError,
            "events of one shape",
        ),
        (
            lambda: cp.product(3, over={"c": THREE}),
            WrongTypeError,
            "combines factors; got int",
        ),
        (
            lambda: cp.mixture([LEVELLED], over={"c": THREE}),
            WrongTypeError,
            "takes one factor; got list",
        ),
        (
            lambda: cp.mixture(LEVELLED, over={"c": THREE}),
            CapabilityError,
            r"'levelled' is unknown.*f.given\(c=v\)",
        ),
        (
            lambda: cp.mixture(CONDITIONAL, over={"c": THREE}, log_weights=THREE),
            CapabilityError,
            "only its score",
        ),
        (
            lambda: cp.mixture(LEVELLED, over={"c": THREE}, log_weights=[0, 0]),
            InvalidValueError,
            "3 finite numbers",
        ),
        (
            lambda: cp.mixture(LEVELLED, [1, 1, 1], over={"c": 1.0}),
            ShapeError,
            "leading axis",
        ),
        (
            lambda: cp.calibrate(cp.product(LEVELLED, over={"c": THREE}), KEY),
            CapabilityError,
            "over data",
        ),
        (
            lambda: cp.Analytic(dist.Laplace(1.0, 1.0), SCHEDULE),
            WrongTypeError,
            "A noised Laplace has no .*use Normal",
        ),
        (
            lambda: cp.Analytic(dist.Normal(), 0.5),
            WrongTypeError,
            r"schedule must be a cp\.Schedule; got float",
        ),
        (
            lambda: cp.Analytic("a", SCHEDULE),
            WrongTypeError,
            "NumPyro distribution or an array of points; got str",
        ),
        (
            lambda: cp.Analytic(np.zeros((0, 2)), SCHEDULE),
            ShapeError,
            r"points of shape \(n, \*event\)",
        ),
        (
            lambda: cp.Analytic(np.array([[0.0, np.nan]]), SCHEDULE),
            InvalidValueError,
            "holds NaN",
        ),
        (
            lambda: cp.Analytic(
                dist.Normal(jnp.nan, 1.0, validate_args=False), SCHEDULE
            ),
            InvalidValueError,
            "holds NaN",
        ),
        (lambda: energy(3), WrongTypeError, "must be callable as fn"),
        (lambda: energy(lambda x: 0.0), NetworkError, "cannot be called as fn"),
        (lambda: energy(lambda x, k: x), NetworkError, "instead of a scalar"),
        (
            lambda: energy(lambda x, k: 0.0, 10),
            WrongTypeError,
            r"must be a cp\.Schedule; got int",
        ),
        (
            lambda: energy(lambda x, k: 0.0, event_shape="2"),
            WrongTypeError,
            "tuple of whole numbers",
        ),
        (lambda: classifier(3), WrongTypeError, "got int, which cannot be called"),
        (
            lambda: classifier(schedule=10),
            WrongTypeError,
            r"must be a cp\.Schedule; got int",
        ),
        (lambda: classifier(time="hours"), InvalidValueError, "Unknown time 'hours'"),
        (
            lambda: classifier(lambda x: x, event_shape=(2,)),
            NetworkError,
            "cannot be called as network",
        ),
        (
            lambda: classifier(lambda x, t: x[0], event_shape=(2,)),
            NetworkError,
            "logits have shape",
        ),
        (
            lambda: cp.condition(F, F, 0),
            WrongTypeError,
            "takes a cp.Classifier; got Analytic",
        ),
        (
            lambda: cp.condition(F, classifier(), 3),
            InvalidValueError,
            "Label 3 does not exist.*classes 0 to 2",
        ),
        (
            lambda: cp.condition(F, classifier(), -1),
            InvalidValueError,
            "Label -1 does not exist",
        ),
        (
            lambda: cp.condition(F, classifier(), 1.5),
            InvalidValueError,
            "Label 1.5 does not exist",
        ),
        (
            lambda: cp.condition(F, classifier(), "cat"),
            WrongTypeError,
            "Condition 'label' must be a number",
        ),
        (
            lambda: cp.condition(F, classifier(event_shape=(3,)), 1),
            NetworkError,
            "cannot be called",
        ),
        (
            lambda: cp.condition(WIDE, classifier(event_shape=(2,)), 0),
            ShapeError,
            r"is for events \(2,\), not \(3,\)",
        ),
        (lambda: classifier().given(label=1), ShapeError, "has no event shape"),
        (
            lambda: F * classifier(),
            ShapeError,
            "needs to know the event shape of 'function'",
        ),
        (
            lambda: cp.compile(single, F * classifier(event_shape=(2,))),
            ConditionError,
            "has no label",
        ),
    ],
)
def test_refused_when_written(make, error, words):
    refused(make, error, words)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: F / F, "total power is 0 and no density is left"),
        (lambda: F**0, "no density is left"),
        (lambda: F / G, "total power of its factors is 0,"),
        (lambda: F / G**2, "total power of its factors is -1,"),
        (lambda: cp.mixture([F / F, G], log_weights=[0, 0]), "cancels to a constant"),
        (
            lambda: cp.window(F, (3,), (0,)),
            r"not covered: no window reaches entry \(2,\)",
        ),
        (
            lambda: cp.window(F, (3,), (0,)) / cp.window(F, (3,), (1,)),
            r"power of its factors is -1 at entry \(2,\)",
        ),
        (lambda: cp.window(F, (4,), (0,), scale=2), "total power of its factors is 0,"),
        (
            lambda: cp.tapestry(cp.window(SCORED, (4,), (0,))),
            "not covered: no window reaches entry",
        ),
    ],
)
def test_refused_by_the_compiler(make, words):
    """The error names the statement or the factor as its place."""
    refused(lambda: cp.compile(single, make()), ImproperError, words)


def test_a_negative_power_is_fine_where_the_total_is_positive():
    density = cp.compile(single, F**1.3 * G**-0.3)
    np.testing.assert_allclose(density.top.power["x"], 1.0, rtol=1e-6)
    covered = cp.compile(single, cp.window(F, (3,), (0,)) * cp.window(G, (3,), (1,)))
    np.testing.assert_allclose(covered.top.power["x"], [1.0, 2.0, 1.0])
