"""Mistakes and questions of new users, seen in use: each is answered in words."""

import os

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.errors import (
    CapabilityError,
    InvalidValueError,
    LoadError,
    NetworkError,
    ProgramError,
    WrongTypeError,
)
from composeprob.pretrained.estimators import Units
from composeprob.runtime import infer as infer_module
from refusals import refused, rows

SCHEDULE = cp.Schedule.log_snr(6)
NORMAL = cp.Analytic(dist.Normal(1.0, 0.5), SCHEDULE)
KEY = jax.random.key(0)


@cp.program
def single(f):
    return cp.sample("x", f)


@cp.program
def square(f):
    return cp.sample("x", f**2)


@cp.program
def measured(f, y):
    x = cp.sample("x", f)
    cp.observe("y", dist.Normal(x, 0.5), y)
    return x


@cp.program
def formatted(f):
    x = cp.sample("x", f)
    return f"{x:.2f}"


RUNS = [0]


@cp.program
def counting(f):
    RUNS[0] += 1
    return cp.sample(f"x{RUNS[0]}", f)


def sampled(program, seed=0):
    density = cp.compile(program, NORMAL)
    return cp.infer(
        density,
        jax.random.key(seed),
        num_chains=32,
        sampler=cp.Ancestral(),
        progress=False,
    )


@pytest.fixture(scope="module")
def result():
    return sampled(single)


def at_levels(levels):
    density = cp.compile(single, NORMAL)
    return cp.infer(density, KEY, num_chains=4, levels=levels, progress=False)


def random_energy(x, level):
    return -(x**2) / 2 + np.random.normal()  # noqa: NPY002 - the mistake


def swapped(t, x):
    return -x * t


MISTAKES = {
    InvalidValueError: {
        "no data": lambda: cp.compile(measured, NORMAL, np.zeros(0)),
        "betas as a number of levels": lambda: cp.Schedule.linear(
            np.linspace(1e-4, 0.02, 1000)
        ),
        "levels beyond single precision": lambda: at_levels([50.0, -50.0]),
    },
    ProgramError: {
        "an f-string": lambda: cp.compile(formatted, NORMAL),
        "a counter": lambda: cp.compile(counting, NORMAL),
    },
    NetworkError: {
        "NumPy's random numbers in an energy": lambda: cp.compile(
            single, cp.Energy(random_energy, SCHEDULE, event_shape=())
        ),
        "a network of (t, x)": lambda: cp.Diffusion(
            swapped, SCHEDULE, event_shape=(2,)
        ),
    },
}


@pytest.mark.parametrize(("kind", "call"), rows(MISTAKES))
def test_mistakes_are_refused_in_words(kind, call):
    refused(call, kind)


OF_RESULTS = {
    WrongTypeError: {
        "length": len,
        "array": np.asarray,
        "two quantiles": lambda r: r.mean(lambda s: s["x"]).interval(0.05, 0.95),
    },
    InvalidValueError: {
        "compared with itself": lambda r: r.compare(r),
        "compared with another program": lambda r: r.compare(sampled(square, 1)),
    },
}


@pytest.mark.parametrize(("kind", "call"), rows(OF_RESULTS))
def test_what_a_result_is_not_asked(kind, call, result):
    refused(lambda: call(result), kind)


def test_a_result_is_iterated_by_its_sites(result):
    assert list(result) == ["x"]
    assert "x" in result
    assert "y" not in result
    assert result


def test_a_saved_result_is_no_model(result, tmp_path):
    path = result.save(tmp_path / "run")
    for name in (path, tmp_path / "run"):
        refused(lambda name=name: cp.load(name), LoadError, fix="Result.load")


@pytest.mark.parametrize("library", ["pandas", "xarray"])
def test_labelled_data_are_data(library):
    module = pytest.importorskip(library)
    labelled = {"pandas": "Series", "xarray": "DataArray"}[library]
    y = np.array([0.3])
    density = cp.compile(measured, NORMAL, getattr(module, labelled)(y))
    same = cp.compile(measured, NORMAL, y)
    x = {"x": jnp.array(0.2)}
    assert float(density.log_density(x, 0)) == float(same.log_density(x, 0))


def test_a_fork_is_refused(monkeypatch):
    """In a fork JAX's threads are missing, so that the call would wait for ever."""
    monkeypatch.setattr(infer_module, "_first_process", [os.getpid() + 1])
    refused(lambda: sampled(single), CapabilityError, fix="spawn")


def test_units_print():
    assert repr(Units(0.0, 2.0, (2,))) == "Units(location=[0. 0.], scale=[2. 2.])"


class Net(eqx.Module):
    """ε of N(label, 1), whose conditions have a null value."""

    weight: jax.Array

    def __call__(self, x, t, label=0.0):
        return self.weight * (x - label)


@cp.program
def guided(three, eight, model):
    return cp.sample("x", three * eight / model)


@cp.program
def both(three, eight):
    return cp.sample("x", three * eight)


def test_a_model_names_its_uses_and_is_named_by_itself():
    model = cp.Diffusion(
        Net(jnp.ones(())), SCHEDULE, event_shape=(2,), conditions=("label",)
    )
    three = model.given(label=3.0)
    eight = model.given(label=8.0)
    printed = str(cp.compile(guided, three, eight, model))
    assert "model(x | label=3)·model(x | label=8)·model(x)⁻¹" in printed
    printed = str(cp.compile(both, three, eight))
    assert "three(x | label=3)·eight(x | label=8)" in printed
