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
    ("make", "error"),
    [
        pytest.param(lambda: F * WIDE, ShapeError, id="'f' has (2,), 'wide' has (3,)"),
        pytest.param(lambda: F / WIDE, ShapeError, id="events of one shape"),
        pytest.param(
            lambda: cp.mixture([F, WIDE]), ShapeError, id="events of one shape 2"
        ),
        pytest.param(lambda: cp.product(), InvalidValueError, id="at least one factor"),
        pytest.param(
            lambda: cp.product(F, 3), WrongTypeError, id="combines factors; got int"
        ),
        pytest.param(
            lambda: cp.power(3, 2), WrongTypeError, id="combines factors; got int 2"
        ),
        pytest.param(
            lambda: F**np.inf, InvalidValueError, id="must be finite; got inf"
        ),
        pytest.param(
            lambda: F ** float("nan"), InvalidValueError, id="must be finite; got nan"
        ),
        pytest.param(
            lambda: F ** "two",
            WrongTypeError,
            id="number known before compilation; got str",
        ),
        pytest.param(
            lambda: jax.jit(lambda w: (F**w).powers)(2.0),
            WrongTypeError,
            id="number known before compilation",
        ),
        pytest.param(
            lambda: cp.mixture([]), InvalidValueError, id="at least one factor 2"
        ),
        pytest.param(
            lambda: cp.mixture([F, G], weights=[1.0]),
            InvalidValueError,
            id="2 non-negative finite numbers",
        ),
        pytest.param(
            lambda: cp.mixture([F, G], weights=[2.0, -1.0]),
            InvalidValueError,
            id="2 non-negative finite numbers 2",
        ),
        pytest.param(
            lambda: cp.mixture([F, G], weights=[0.0, 0.0]),
            InvalidValueError,
            id="positive sum",
        ),
        pytest.param(
            lambda: cp.mixture([F, G], weights=[np.nan, 1.0]),
            InvalidValueError,
            id="2 non-negative finite numbers 3",
        ),
        pytest.param(
            lambda: cp.mixture([F, G], weights="ab"),
            WrongTypeError,
            id="weights must be numbers",
        ),
        pytest.param(
            lambda: cp.mixture([F, G], log_weights=[0.0]),
            InvalidValueError,
            id="2 finite numbers",
        ),
        pytest.param(
            lambda: cp.mixture([F, G], log_weights=[0.0, np.inf]),
            InvalidValueError,
            id="2 finite numbers 2",
        ),
        pytest.param(
            lambda: cp.mixture([F, G], [1, 1], log_weights=[0, 0]),
            InvalidValueError,
            id="both weights and log_weights",
        ),
        pytest.param(
            lambda: cp.mixture([F, LEARNED]),
            CapabilityError,
            id="normaliser of 'learned' is unknown...log_weights",
        ),
        pytest.param(
            lambda: cp.mixture([F, F * G]),
            CapabilityError,
            id="normaliser of the part f * g is unknown",
        ),
        pytest.param(
            lambda: cp.mixture([F, F**2]),
            CapabilityError,
            id="normaliser of the part f ** 2 is unknown",
        ),
        pytest.param(
            lambda: cp.mixture([F, SCORED], log_weights=[0, 0]),
            CapabilityError,
            id="'scored' offers only its score",
        ),
        pytest.param(
            lambda: cp.mixture([WIDE, cp.window(F, (3,), (0,))]),
            CapabilityError,
            id="normaliser of the part...is unknown",
        ),
        pytest.param(
            lambda: cp.window(F, (4, 4), (0,)),
            ShapeError,
            id="as many axes as the factor's event",
        ),
        pytest.param(
            lambda: cp.window(F, (4,), (3,)),
            ShapeError,
            id="leaves the canvas on axis 0: it covers 3 to 5 of 4",
        ),
        pytest.param(
            lambda: cp.window(F, (4,), (-1,)), ShapeError, id="leaves the canvas"
        ),
        pytest.param(
            lambda: cp.window(F, (4,), (1,), scale=2),
            ShapeError,
            id="between 0 and 0 there",
        ),
        pytest.param(
            lambda: cp.window(F, (4,), (0, 0)),
            ShapeError,
            id="more axes than the canvas",
        ),
        pytest.param(
            lambda: cp.window(F, (4,), (0,), scale=0),
            InvalidValueError,
            id="must be at least 1; got 0",
        ),
        pytest.param(
            lambda: cp.window(F, (4,), (0,), scale=1.5),
            WrongTypeError,
            id="must be a whole number; got 1.5",
        ),
        pytest.param(
            lambda: cp.window(F, (4,), (0.5,)),
            WrongTypeError,
            id="offset must be a tuple of whole numbers",
        ),
        pytest.param(
            lambda: cp.window(F, 4, (0,)),
            WrongTypeError,
            id="canvas_shape must be a tuple of whole numbers; got 4",
        ),
        pytest.param(
            lambda: cp.window(3, (4,), (0,)),
            WrongTypeError,
            id="combines factors; got int 3",
        ),
        pytest.param(
            lambda: cells(index=[0, 1, 12]),
            InvalidValueError,
            id="leaves the canvas: cell 12 of 12",
        ),
        pytest.param(
            lambda: cells(index=[0, 1, -1]),
            InvalidValueError,
            id="leaves the canvas: cell -1",
        ),
        pytest.param(
            lambda: cells(over=[[0, 1, 2], [3, 4, 3]]),
            InvalidValueError,
            id="Set 1 of a window names cell 3 2 times",
        ),
        pytest.param(
            lambda: cells(index=[0, 1]), ShapeError, id="needs the shape (3,)"
        ),
        pytest.param(
            lambda: cells(index=[[0, 1, 2]]), ShapeError, id="one cell for each entry"
        ),
        pytest.param(
            lambda: cells(over=[0, 1, 2]), ShapeError, id="needs the shape (n, 3)"
        ),
        pytest.param(
            lambda: cells(over=[[0, 1, 2], [3, 4]]),
            WrongTypeError,
            id="is not an array",
        ),
        pytest.param(
            lambda: cells(over=np.zeros((0, 3), int)), InvalidValueError, id="no cells"
        ),
        pytest.param(
            lambda: cells(index=[0.0, 1.0, 2.0]),
            WrongTypeError,
            id="must hold whole numbers; got float64",
        ),
        pytest.param(
            lambda: cells(index=[True, False, True]),
            WrongTypeError,
            id="must hold whole numbers; got bool",
        ),
        pytest.param(
            lambda: cells(index=SETS[0], scale=2),
            InvalidValueError,
            id="averages nothing",
        ),
        pytest.param(
            lambda: cells(index=SETS[0], over=SETS),
            InvalidValueError,
            id="one of offset, index and over",
        ),
        pytest.param(
            lambda: cells(), InvalidValueError, id="one of offset, index and over 2"
        ),
        pytest.param(
            lambda: cells(cp.window(SQUARE, (4, 4), (0, 0), 2), (5, 5), index=SIXTEEN),
            InvalidValueError,
            id="neighbours",
        ),
        pytest.param(
            lambda: cp.window(cells(canvas=(2, 2), index=SETS[0]), (4, 4), (0, 0), 2),
            InvalidValueError,
            id="would average",
        ),
        pytest.param(
            lambda: jax.jit(traced)(jnp.arange(4).reshape(2, 2)),
            WrongTypeError,
            id="traced by JAX",
        ),
        pytest.param(
            lambda: cp.tapestry(SCORED),
            WrongTypeError,
            id="made of windows; got Diffusion",
        ),
        pytest.param(
            lambda: cp.tapestry(*[cp.window(SCORED, (n,), (0,)) for n in (4, 5)]),
            ShapeError,
            id="events of one shape 3",
        ),
        pytest.param(
            lambda: cp.tapestry(cp.window(LEARNED, (4,), (0,))),
            CapabilityError,
            id="'learned' is not a sum over entries",
        ),
        pytest.param(
            lambda: cp.tapestry(cp.window(F, (4,), (0,))),
            CapabilityError,
            id="'f' is not a sum over entries",
        ),
        pytest.param(
            lambda: cp.product(CONDITIONAL, over=THREE),
            WrongTypeError,
            id="over must be a dict...got ndarray...Fix: write",
        ),
        pytest.param(
            lambda: cp.product(CONDITIONAL, over={}),
            WrongTypeError,
            id="over must be a dict...got an empty dict",
        ),
        pytest.param(
            lambda: cp.product(CONDITIONAL, over={"e": THREE}),
            ConditionError,
            id="'e'...their conditions are: 'c', 'd'",
        ),
        pytest.param(
            lambda: cp.product(F, over={"c": THREE}),
            ConditionError,
            id="their conditions are: none...conditions=",
        ),
        pytest.param(
            lambda: cp.product(CONDITIONAL, over={"c": 3.0}),
            ShapeError,
            id="leading axis...single number...given",
        ),
        pytest.param(
            lambda: cp.product(CONDITIONAL, over={"c": THREE, "d": [1.0]}),
            ShapeError,
            id="'c' has 3, 'd' has 1",
        ),
        pytest.param(
            lambda: cp.product(CONDITIONAL, over={"c": np.ones((0, 2))}),
            InvalidValueError,
            id="n = 0...at least one",
        ),
        pytest.param(
            lambda: cp.product(CONDITIONAL, over={"c": []}),
            InvalidValueError,
            id="n = 0",
        ),
        pytest.param(
            lambda: cp.product(CONDITIONAL, over={"c": THREE}, block=0),
            InvalidValueError,
            id="block must be at least 1",
        ),
        pytest.param(
            lambda: cp.product(CONDITIONAL, over={"c": THREE}, block=1.5),
            WrongTypeError,
            id="block must be a whole",
        ),
        pytest.param(
            lambda: cp.product(CONDITIONAL, block=2),
            InvalidValueError,
            id="a block but no data",
        ),
        pytest.param(
            lambda: cp.product(CONDITIONAL, over={"c": np.array([1, np.nan])}),
            InvalidValueError,
            id="holds NaN",
        ),
        pytest.param(
            lambda: cp.product(CONDITIONAL, over={"c": ["a", "b"]}),
            WrongTypeError,
            id="must be a number or an array",
        ),
        pytest.param(
            lambda: cp.product(CONDITIONAL, over={"c": [[1.0], [1.0, 2.0]]}),
            ShapeError,
            id="shapes (1,), (2,)",
        ),
        pytest.param(
            lambda: cp.product(CONDITIONAL.given(c=1.0), over={"c": THREE}),
            ConditionError,
            id="given twice",
        ),
        pytest.param(
            lambda: cp.product(CALIBRATED, over={"c": THREE}),
            ConditionError,
            id="give conditions first",
        ),
        pytest.param(
            lambda: cp.product(CONDITIONAL, over={"c": THREE}).given(c=1.0),
            ConditionError,
            id="given twice 2",
        ),
        pytest.param(
            lambda: cp.product(CONDITIONAL, WIDE, over={"c": THREE}),
            ShapeError,
            id="events of one shape 4",
        ),
        pytest.param(
            lambda: cp.product(3, over={"c": THREE}),
            WrongTypeError,
            id="combines factors; got int 4",
        ),
        pytest.param(
            lambda: cp.mixture([LEVELLED], over={"c": THREE}),
            WrongTypeError,
            id="takes one factor; got list",
        ),
        pytest.param(
            lambda: cp.mixture(LEVELLED, over={"c": THREE}),
            CapabilityError,
            id="'levelled' is unknown...f.given(c=v)",
        ),
        pytest.param(
            lambda: cp.mixture(CONDITIONAL, over={"c": THREE}, log_weights=THREE),
            CapabilityError,
            id="only its score",
        ),
        pytest.param(
            lambda: cp.mixture(LEVELLED, over={"c": THREE}, log_weights=[0, 0]),
            InvalidValueError,
            id="3 finite numbers",
        ),
        pytest.param(
            lambda: cp.mixture(LEVELLED, [1, 1, 1], over={"c": 1.0}),
            ShapeError,
            id="leading axis",
        ),
        pytest.param(
            lambda: cp.calibrate(cp.product(LEVELLED, over={"c": THREE}), KEY),
            CapabilityError,
            id="over data",
        ),
        pytest.param(
            lambda: cp.Analytic(dist.Laplace(1.0, 1.0), SCHEDULE),
            WrongTypeError,
            id="A noised Laplace has no ...use Normal",
        ),
        pytest.param(
            lambda: cp.Analytic(dist.Normal(), 0.5),
            WrongTypeError,
            id="schedule must be a cp.Schedule; got float",
        ),
        pytest.param(
            lambda: cp.Analytic("a", SCHEDULE),
            WrongTypeError,
            id="NumPyro distribution or an array of points; got str",
        ),
        pytest.param(
            lambda: cp.Analytic(np.zeros((0, 2)), SCHEDULE),
            ShapeError,
            id="points of shape (n, *event)",
        ),
        pytest.param(
            lambda: cp.Analytic(np.array([[0.0, np.nan]]), SCHEDULE),
            InvalidValueError,
            id="holds NaN 2",
        ),
        pytest.param(
            lambda: cp.Analytic(
                dist.Normal(jnp.nan, 1.0, validate_args=False), SCHEDULE
            ),
            InvalidValueError,
            id="holds NaN 3",
        ),
        pytest.param(lambda: energy(3), WrongTypeError, id="must be callable as fn"),
        pytest.param(
            lambda: energy(lambda x: 0.0), NetworkError, id="cannot be called as fn"
        ),
        pytest.param(
            lambda: energy(lambda x, k: x), NetworkError, id="instead of a scalar"
        ),
        pytest.param(
            lambda: energy(lambda x, k: 0.0, 10),
            WrongTypeError,
            id="must be a cp.Schedule; got int",
        ),
        pytest.param(
            lambda: energy(lambda x, k: 0.0, event_shape="2"),
            WrongTypeError,
            id="tuple of whole numbers",
        ),
        pytest.param(
            lambda: classifier(3), WrongTypeError, id="got int, which cannot be called"
        ),
        pytest.param(
            lambda: classifier(schedule=10),
            WrongTypeError,
            id="must be a cp.Schedule; got int 2",
        ),
        pytest.param(
            lambda: classifier(time="hours"),
            InvalidValueError,
            id="Unknown time 'hours'",
        ),
        pytest.param(
            lambda: classifier(lambda x: x, event_shape=(2,)),
            NetworkError,
            id="cannot be called as network",
        ),
        pytest.param(
            lambda: classifier(lambda x, t: x[0], event_shape=(2,)),
            NetworkError,
            id="logits have shape",
        ),
        pytest.param(
            lambda: cp.condition(F, F, 0),
            WrongTypeError,
            id="takes a cp.Classifier; got Analytic",
        ),
        pytest.param(
            lambda: cp.condition(F, classifier(), 3),
            InvalidValueError,
            id="Label 3 does not exist...classes 0 to 2",
        ),
        pytest.param(
            lambda: cp.condition(F, classifier(), -1),
            InvalidValueError,
            id="Label -1 does not exist",
        ),
        pytest.param(
            lambda: cp.condition(F, classifier(), 1.5),
            InvalidValueError,
            id="Label 1.5 does not exist",
        ),
        pytest.param(
            lambda: cp.condition(F, classifier(), "cat"),
            WrongTypeError,
            id="Condition 'label' must be a number",
        ),
        pytest.param(
            lambda: cp.condition(F, classifier(event_shape=(3,)), 1),
            NetworkError,
            id="cannot be called",
        ),
        pytest.param(
            lambda: cp.condition(WIDE, classifier(event_shape=(2,)), 0),
            ShapeError,
            id="is for events (2,), not (3,)",
        ),
        pytest.param(
            lambda: classifier().given(label=1), ShapeError, id="has no event shape"
        ),
        pytest.param(
            lambda: F * classifier(),
            ShapeError,
            id="needs to know the event shape of 'function'",
        ),
        pytest.param(
            lambda: cp.compile(single, F * classifier(event_shape=(2,))),
            ConditionError,
            id="has no label",
        ),
    ],
)
def test_refused_when_written(make, error):
    refused(make, error)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: F / F, id="total power is 0 and no density is left"),
        pytest.param(lambda: F**0, id="no density is left"),
        pytest.param(lambda: F / G, id="total power of its factors is 0,"),
        pytest.param(lambda: F / G**2, id="total power of its factors is -1,"),
        pytest.param(
            lambda: cp.mixture([F / F, G], log_weights=[0, 0]),
            id="cancels to a constant",
        ),
        pytest.param(
            lambda: cp.window(F, (3,), (0,)),
            id="not covered: no window reaches entry (2,)",
        ),
        pytest.param(
            lambda: cp.window(F, (3,), (0,)) / cp.window(F, (3,), (1,)),
            id="power of its factors is -1 at entry (2,)",
        ),
        pytest.param(
            lambda: cp.window(F, (4,), (0,), scale=2),
            id="total power of its factors is 0, 2",
        ),
        pytest.param(
            lambda: cp.tapestry(cp.window(SCORED, (4,), (0,))),
            id="not covered: no window reaches entry",
        ),
    ],
)
def test_refused_by_the_compiler(make):
    """The error names the statement or the factor as its place."""
    refused(lambda: cp.compile(single, make()), ImproperError)


def test_a_negative_power_is_fine_where_the_total_is_positive():
    density = cp.compile(single, F**1.3 * G**-0.3)
    np.testing.assert_allclose(density.top.power["x"], 1.0, rtol=1e-6)
    covered = cp.compile(single, cp.window(F, (3,), (0,)) * cp.window(G, (3,), (1,)))
    np.testing.assert_allclose(covered.top.power["x"], [1.0, 2.0, 1.0])
