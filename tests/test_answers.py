"""Mistakes and questions of new users, seen in use: each is answered in words."""

import inspect
import os
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.density.learned_scores import OwnScore
from composeprob.errors import (
    CapabilityError,
    InvalidValueError,
    LoadError,
    NetworkError,
    ProgramError,
    ShapeError,
    WrongTypeError,
)
from composeprob.findings import Code
from composeprob.pretrained.estimators import Units
from composeprob.results.checks.own_scores import OwnScores
from composeprob.runtime import infer as infer_module
from messages import check_wording
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


def of_table(index, event):
    """ε of N(0, 1), by a level that comes first and is an index."""
    return jnp.asarray(SCHEDULE.sigma)[index] * event


class OfFirstNumber(eqx.Module):
    """ε of N(0, I), by a log-SNR that comes first."""

    scale: jax.Array

    def __call__(self, number, event):
        return self.scale * event * jax.nn.sigmoid(-number) ** 0.5


def by_sigma(x, t):
    """The score of N(1, ½²) under variance-exploding noise."""
    return -(x - 1.0) / (0.25 + t**2)


def by_share(x, t):
    """ε of N(1, ½²), by a time from 0 to 1 of a schedule of 60 levels."""
    levels = jnp.arange(60.0)
    at = 59 * t
    alpha = jnp.interp(at, levels, COSINE.alpha)
    sigma = jnp.interp(at, levels, COSINE.sigma)
    # A time beyond 1 is one of no noise.
    return jnp.where(t <= 1, sigma * (x - alpha) / (0.25 * alpha**2 + sigma**2), 0 * x)


def plugged_in(network, schedule, **options):
    return lambda: cp.compile(
        single, cp.Diffusion(network, schedule, event_shape=(2,), **options)
    )


COSINE = cp.Schedule.cosine(60)
EXPLODING = cp.Schedule.from_arrays(np.ones(60), np.geomspace(0.01, 50, 60))
SCORE = {"parameterization": "score"}


@cp.program
def weighed(f):
    x = cp.sample("x", f)
    cp.factor("w", jnp.stack([x, x]))


MISTAKES = {
    InvalidValueError: {
        "no data": lambda: cp.compile(measured, NORMAL, np.zeros(0)),
        "betas as a number of levels": lambda: cp.Schedule.linear(
            np.linspace(1e-4, 0.02, 1000)
        ),
        "levels beyond single precision": lambda: at_levels([50.0, -50.0]),
    },
    ShapeError: {"a vector as a log-weight": lambda: cp.compile(weighed, NORMAL)},
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
        "a level that comes first": plugged_in(of_table, SCHEDULE),
        "a time that comes first": plugged_in(
            OfFirstNumber(jnp.ones(())), SCHEDULE, time="log_snr"
        ),
        "a score of sigma given a level": plugged_in(by_sigma, EXPLODING, **SCORE),
        "a score of sigma given a log-SNR": plugged_in(
            by_sigma, EXPLODING, time="log_snr", **SCORE
        ),
        "a time from 0 to 1": plugged_in(by_share, COSINE),
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


def test_the_advice_about_a_time_from_0_to_1_is_right():
    right = cp.Diffusion(
        lambda x, t: by_share(x, t / 59), COSINE, event_shape=(2,), time="real_level"
    )
    assert cp.compile(single, right).graph.doubts == ()


@pytest.mark.parametrize("right_from", [None, 5])
def test_a_network_that_is_wrong_at_all_levels_is_no_network_of_too_little_noise(
    right_from,
):
    """Levels of noise alone, at which any network is right, are no levels to end at."""
    density = cp.compile(single, NORMAL)
    wrong = {"f(x)": OwnScore(shift=1.6, steepness=1.0, right_from=right_from)}
    (finding,) = OwnScores().findings(wrong, density)
    assert finding.code == Code.NETWORK_DOUBTED
    assert "time=" in finding.message
    assert "levels=" not in finding.message
    check_wording(finding.message)


def test_public_names_are_listed_and_nothing_else():
    shown = {name for name in dir(cp) if not name.startswith("__")}
    assert shown == set(cp.api.__all__)
    assert dir(cp.metrics) == sorted(cp.metrics.__all__)
    assert dir(cp.training) == sorted(cp.training.__all__)


def test_help_and_signature_of_infer_rank_arguments_alike():
    described = inspect.getdoc(cp.infer).partition("Args:")[2].partition("Returns:")[0]
    names = re.findall(r"^    (\w+):", described, re.MULTILINE)
    assert names == list(inspect.signature(cp.infer).parameters)


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
