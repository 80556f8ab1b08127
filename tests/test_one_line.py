"""Everything of the algebra and every kernel and sampler prints as one short line,
without arrays.

tests/zoo/test_zoo.py tests the models of the zoo in the same way.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.factors.calibrated import CalibratedExpression
from composeprob.factors.factor import Around, Factor, LeafFactor
from composeprob.factors.nodes import Combination
from composeprob.factors.window import Window
from composeprob.ir.leaves import Leaf
from registry import FACTORS, KERNELS
from sampling_cases import SCHEDULE


def analytic(label, shape=(2,)):
    return cp.Analytic(dist.Normal(jnp.zeros(shape), 1.0), SCHEDULE, label=label)


def image(label, **options):
    options |= {"event_shape": (28, 28, 1), "conditions": {"digit": 0}, "label": label}
    return cp.Diffusion(lambda x, t, digit: digit * x, SCHEDULE, **options)


def line(thing):
    """The line that it prints as, by `str` and `repr` alike."""
    text = str(thing)
    assert repr(thing) == text
    assert "\n" not in text
    assert 0 < len(text) < 200
    assert "Array" not in text
    assert "f32[" not in text
    return text


@pytest.mark.parametrize("name", KERNELS)
def test_kernels(name):
    kernel = KERNELS[name]()
    assert line(kernel).startswith(type(kernel).__name__)
    line(cp.AnnealedMCMC(kernel, 3))
    line(cp.SMC(kernel))


@pytest.mark.parametrize("name", FACTORS)
def test_factors(name):
    factor = FACTORS[name](SCHEDULE)
    assert "(energy, 2" in line(factor).removeprefix(factor.label)
    line(factor * factor**2)


def algebra():
    """One expression of every kind, by the line that it prints as."""
    a, b, c = (analytic(label) for label in "abc")
    digits = image("digits")
    wide = analytic("wide", shape=(28, 28, 1))
    energy = image("energy", parameterization="energy_norm")
    three = {"digit": [1, 2, 3]}
    seven = cp.mixture([a] * 7, [1, 1, 1, 1, 1, 1, 1.0001])
    return {
        "a * b ** 2": a * b**2,
        "a * b / c": a * b / c,
        "a / b ** 2 / c": a / (b**2 * c),
        "a ** 2 * b ** 2": (a * b) ** 2,
        "a ** 0.5": a**0.5,
        "a ** -1": a**-1.0,
        "mixture(a, b; weights 0.3, 0.7)": cp.mixture([a, b], weights=[3, 7]),
        "mixture(a, b * c; log_weights 0, -1.5)": cp.mixture(
            [a, b * c], log_weights=[0.0, -1.5]
        ),
        "mixture(a, b; equal weights) ** 2 * c": cp.mixture([a, b]) ** 2 * c,
        "digits(digit=3) ** 4 / digits ** 3": cp.guide(digits, 4.0, digit=3),
        "cp.product(digits / wide, over={'digit': (3,)}) ** 2": cp.product(
            digits / wide, over=three
        )
        ** 2,
        "cp.product(digits, over={'digit': (3,)}, block=2)": cp.product(
            digits, over={"digit": jnp.arange(3)}, block=2
        ),
        "cp.mixture(energy, over={'digit': (2,)}, equal log_weights)": cp.mixture(
            energy, over={"digit": [1, 2]}, log_weights=[0.0, 0.0]
        ),
        "window(digits(digit=3); 28×56×1, offset (0, 28, 0))": cp.window(
            digits.given(digit=3), (28, 56, 1), (0, 28)
        ),
        "window(digits; 56×56×1, offset (0, 0, 0), scale 2)": cp.window(
            digits, (56, 56, 1), (0, 0), 2
        ),
        "window(a; 2×2, 2 sets of cells)": cp.window(a, (2, 2), over=[[0, 1], [2, 3]]),
        "a * a * a * a * a * a … (40 factors)": math.prod([a] * 39, start=a),
        "mixture(a, a, a, a, a, a … (7 parts); "
        "weights 0.143, 0.143, 0.143, 0.143, 0.143, 0.143, …)": seven,
    }


def test_words_of_the_algebra_which_holds_every_kind_of_factor():
    """A new subclass of the algebra must have a line here."""
    expressions = algebra()
    assert [line(factor) for factor in expressions.values()] == list(expressions)
    tested = {type(factor) for factor in expressions.values()}
    tested |= {CalibratedExpression, Window}
    kinds = set()
    for base in (Factor, Combination, Around):
        for kind in base.__subclasses__():
            if kind.__module__.startswith("composeprob."):
                kinds.add(kind)
    assert kinds - {LeafFactor, Combination, Around, Leaf} == tested


def test_labels_and_conditions_of_any_length():
    long = analytic("a long name\nof two lines " * 20)
    line(long)
    line(cp.mixture([long * long, long], log_weights=[0.0, 1.0]))
    line(long * long * long)
    given = image("digits").given(digit=jnp.ones(5000))
    assert line(given) == "digits(digit=array[5000]) (score, 28×28×1)"
    number = cp.Analytic(dist.Normal(0.0, 1.0), SCHEDULE)
    assert line(number) == "Normal (energy, a number)"


def test_a_calibrated_expression():
    zeros = np.zeros(SCHEDULE.num_levels)
    tables = dict.fromkeys(("log Z", "error", "offset"), zeros)
    tables["log-SNR"] = np.asarray(SCHEDULE.log_snr)[::-1]
    fixed = {f"calibration {name}": table for name, table in tables.items()}
    product = analytic("a") * analytic("b")
    calibrated = CalibratedExpression(
        factor=product, schedule=SCHEDULE, fixed=fixed, degree=4.0, event_shape=(2,)
    )
    assert line(calibrated).startswith("calibrated(a * b; log Z ")
    lines = []
    jax.eval_shape(lambda factor: lines.append(line(factor)), calibrated)
    assert lines == ["calibrated(a * b; log Z traced)"]


@pytest.mark.parametrize(
    "sampler", [cp.SMC(), cp.Ancestral(), cp.AnnealedMCMC(cp.MALA(), 2)]
)
def test_samplers(sampler):
    assert line(sampler).startswith(type(sampler).__name__)
