"""Laws of the algebra: expressions that mean the same have the same log-density and
score at every level."""

import functools

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import composeprob as cp
from compiler.networks import gaussian
from composeprob.factors.nodes import leaves
from sampling_cases import modes, single

pytestmark = pytest.mark.usefixtures("double_precision")

LEVELS = 8
laws = settings(max_examples=2, deadline=None, derandomize=True, database=None)
places = st.tuples(st.integers(0, LEVELS - 1), st.integers(0, 2**16))


@functools.cache
def schedule():
    return cp.Schedule.log_snr(LEVELS, min=-7.0, max=8.0)


@functools.cache
def f(i):
    """The i-th factor: three Gaussians, three different ones for each i."""
    rng = np.random.default_rng(i)
    means = rng.normal(size=(3, 2))
    sds = rng.uniform(0.2, 1.0, size=(3, 2))
    return cp.Analytic(modes(rng.dirichlet(np.ones(3)), means, sds), schedule())


@functools.cache
def conditional():
    """An energy model of the noised N(c, 0.5²) of both entries; no condition means c =
    0."""
    factor, *_ = gaussian(
        "energy", (1.0, 1.0), (0.25, 0.25), schedule(), conditions={"c": 0.0}
    )
    return factor


def evaluation(factor, place):
    level, seed = place
    x = 1.2 * np.random.default_rng(seed).normal(size=factor.event_shape)
    return cp.compile(single, factor).evaluate({"x": x}, level)


def assert_same(a, b, place):
    left = evaluation(a, place)
    right = evaluation(b, place)
    np.testing.assert_allclose(
        left.log_density, right.log_density, rtol=1e-10, atol=1e-10
    )
    np.testing.assert_allclose(left.score["x"], right.score["x"], rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(left.terms.rate, right.terms.rate, rtol=1e-7, atol=1e-8)


@laws
@given(places, st.floats(-2.0, 2.0))
def test_given_reaches_into_expressions(place, c):
    model = conditional()
    fixed = model.given(c=c)
    assert_same((model * f(0)).given(c=c), fixed * f(0), place)
    assert_same((model**0.5 * f(0)).given(c=c), fixed**0.5 * f(0), place)
    mixed = cp.mixture([model, f(0)], log_weights=[0.0, 1.0]).given(c=c)
    assert mixed.factors[0].fixed["c"] == fixed.fixed["c"]
    canvas = (3,)
    over_canvas = f3()
    assert_same(
        cp.window(model, canvas, (1,)).given(c=c) * over_canvas,
        cp.window(fixed, canvas, (1,)) * over_canvas,
        place,
    )


@functools.cache
def f3():
    return cp.Analytic(dist.Normal(jnp.zeros(3), 0.7), schedule())


@laws
@given(places)
def test_windows_of_windows(place):
    """Offsets and scales compose: a window at scale 2 in a window at scale 2 averages
    blocks of 4."""
    canvas = cp.Analytic(dist.Normal(jnp.zeros(12), 0.7), schedule())
    twice = cp.window(cp.window(f(0), (4,), (0,), scale=2), (12,), (2,), scale=2)
    assert_same(twice * canvas, cp.window(f(0), (12,), (2,), scale=4) * canvas, place)
    shifted = cp.window(cp.window(f(0), (5,), (3,)), (12,), (2,), scale=2)
    assert_same(shifted * canvas, cp.window(f(0), (12,), (8,), scale=2) * canvas, place)


@laws
@given(places)
def test_windows_on_disjoint_entries_are_independent(place):
    """Their product is the joint law: at each level a noised marginal, so the rate is
    0."""
    joint = cp.window(f(0), (4,), (0,)) * cp.window(f(1), (4,), (2,))
    level, seed = place
    x = 1.2 * np.random.default_rng(seed).normal(size=4)
    of_joint = cp.compile(single, joint).evaluate({"x": x}, level)
    left = cp.compile(single, f(0)).evaluate({"x": x[:2]}, level)
    right = cp.compile(single, f(1)).evaluate({"x": x[2:]}, level)
    np.testing.assert_allclose(
        of_joint.log_density, left.log_density + right.log_density, rtol=1e-10
    )
    scores = np.concatenate([left.score["x"], right.score["x"]])
    np.testing.assert_allclose(of_joint.score["x"], scores, rtol=1e-9)
    size = float(jnp.sum(of_joint.score["x"] ** 2))
    np.testing.assert_allclose(of_joint.terms.rate, 0.0, atol=1e-8 * size)


def test_leaves_keep_their_order():
    in_order = leaves(f(2) * f(0) ** 2 / f(1))
    assert all(a is b for a, b in zip(in_order, [f(2), f(0), f(1)], strict=True))
