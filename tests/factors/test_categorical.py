"""Every factor of tokens keeps its promises: rises that add up to log f, models that
are normalised, and only what is visible counts."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.errors import (
    ConditionError,
    InvalidValueError,
    NetworkError,
    ShapeError,
    WrongTypeError,
)
from composeprob.factors.categorical import JointFactor, Query
from composeprob.factors.uniform_noise import NoisedEvent, UniformNoise
from refusals import refused, rows
from registry import CATEGORICAL, UNIFORM

ROWS = pytest.mark.parametrize("name", CATEGORICAL)
TOKENS = jnp.array([2, 0, 1, 1])
ORDER = (2, 0, 3, 1)
RANK = jnp.array([1, 3, 0, 2])


def extended(factor, tokens, rank, time, position):
    query = Query(tokens, rank, jnp.int32(time), jnp.array([position]))
    return factor.extend(query, factor.call_conditions(), paths=True)


@ROWS
def test_rises_along_a_path_add_up(name):
    factor = CATEGORICAL[name]()
    extend = jax.jit(
        lambda time, position: extended(factor, TOKENS, RANK, time, position)
    )
    first = extend(0, ORDER[0])
    total = first.base
    for time, position in enumerate(ORDER):
        rises, base = extend(time, position)
        np.testing.assert_allclose(base, total, atol=1e-5)
        total = total + rises[0, TOKENS[position]]
    if isinstance(factor, JointFactor):
        everything = jnp.ones(4, bool)
        whole = factor.log_potential(TOKENS, everything, factor.call_conditions())
        np.testing.assert_allclose(total, whole, atol=1e-5)


@ROWS
def test_hidden_tokens_do_not_count(name):
    factor = CATEGORICAL[name]()
    other = TOKENS.at[jnp.array([1, 3])].set(2)
    a = extended(factor, TOKENS, RANK, 2, 3)
    b = extended(factor, other, RANK, 2, 3)
    np.testing.assert_array_equal(a.rises, b.rises)
    np.testing.assert_array_equal(a.base, b.base)


@ROWS
def test_models_are_normalised(name):
    factor = CATEGORICAL[name]()
    rises = extended(factor, TOKENS, RANK, 2, 3).rises[0]
    total = float(jax.nn.logsumexp(rises))
    if "normalised" in factor.capabilities:
        assert total == pytest.approx(0.0, abs=1e-5)
    else:
        assert abs(total) > 1e-3
    unasked = extended(factor, TOKENS, RANK, 2, -1).rises
    np.testing.assert_array_equal(unasked, 0.0)


def test_closed_forms_agree_with_their_tables():
    initial = np.array([0.5, 0.2, 0.3])
    steps = np.array([[0.5, 0.2, 0.3], [0.1, 0.6, 0.3], [0.2, 0.2, 0.6]])
    states = np.array(list(itertools.product(range(3), repeat=3)))
    probs = initial[states[:, 0]]
    for i in range(2):
        probs = probs * steps[states[:, i], states[:, i + 1]]
    chain = cp.Analytic.chain(initial, steps, length=3)
    table = cp.Analytic.table(probs.reshape(3, 3, 3))
    tokens = jnp.array([1, 0, 2])
    for seen in itertools.product((False, True), repeat=3):
        visible = jnp.array(seen)
        match = (states[:, seen] == np.array(tokens)[list(seen)]).all(1)
        exact = np.log(probs[match].sum())
        for factor in (chain, table):
            value = factor.log_potential(tokens, visible, {})
            assert float(value) == pytest.approx(exact, abs=1e-5)


def test_bernoulli_and_plain_categoricals_are_tokens():
    coins = cp.Analytic(dist.Bernoulli(0.3).expand([2]).to_event(1))
    assert (coins.num_values, coins.event_shape) == (2, (2,))
    value = coins.log_potential(jnp.array([1, 0]), jnp.ones(2, bool), {})
    assert float(value) == pytest.approx(np.log(0.3 * 0.7), abs=1e-5)
    assert cp.Analytic(dist.Categorical(jnp.ones(3) / 3)).event_shape == ()


@pytest.mark.parametrize("name", UNIFORM)
def test_what_is_said_of_noised_tokens_fits_together(name):
    factor = UNIFORM[name]()
    levels = cp.Schedule.log_snr(9)
    between = jax.jit(
        lambda tokens, level, below: factor.noised(
            NoisedEvent(tokens, UniformNoise.between(levels, level, below)),
            factor.call_conditions(),
        )
    )
    here = between(TOKENS, 4, 3)
    own = jnp.arange(4), TOKENS
    # The token itself is no change, and at one noise nor is the level below.
    np.testing.assert_allclose(here.rises[own], 0.0, atol=1e-6)
    still = between(TOKENS, 4, 4)
    np.testing.assert_allclose(still.onward, still.rises, atol=1e-5)
    if here.base is None:
        return
    there = between(TOKENS.at[2].set(0), 4, 3)
    np.testing.assert_allclose(there.base - here.base, here.rises[2, 0], atol=1e-5)
    np.testing.assert_allclose(here.at_top, here.base)


def zeros(tokens, second):
    return jnp.zeros((4, 3))


REFUSED = {
    WrongTypeError: {
        "energy": lambda: cp.Energy(zeros, cp.Schedule.log_snr(9), length=4),
        "not callable": lambda: cp.Energy(3.0, length=4, num_values=3),
        "schedule": lambda: cp.Analytic(
            dist.Categorical(jnp.ones(3) / 3), cp.Schedule.log_snr(9)
        ),
    },
    NetworkError: {
        "vector": lambda: cp.Energy(zeros, length=4, num_values=3),
        "classes": lambda: cp.Classifier(zeros, length=4, num_values=3),
        "ratios": lambda: cp.UniformDiffusion(
            zeros, cp.Schedule.log_snr(9), length=5, num_values=3
        ).check_network(),
        "logits": lambda: cp.MaskedDiffusion(
            zeros, length=5, num_values=3
        ).check_network(),
    },
    ShapeError: {
        "table": lambda: cp.Analytic.table(jnp.ones((2, 3))),
        "chain": lambda: cp.Analytic.chain(jnp.ones(2), jnp.ones((3, 3)), length=4),
    },
    InvalidValueError: {
        "output": lambda: cp.UniformDiffusion(
            zeros, cp.Schedule.log_snr(9), length=4, num_values=3, output="x"
        ),
        "mask": lambda: cp.MaskedDiffusion(zeros, length=4, num_values=3, mask="no"),
        "values": lambda: cp.MaskedDiffusion(zeros, length=4, num_values=1),
        "probabilities": lambda: cp.Analytic.chain(
            -jnp.ones(2), jnp.ones((2, 2)), length=4
        ),
    },
    ConditionError: {
        "label": lambda: cp.Classifier(
            lambda tokens, visible: jnp.zeros(2), length=4, num_values=3
        ).check_network()
    },
}


@pytest.mark.parametrize(("kind", "call"), rows(REFUSED))
def test_refusals(kind, call):
    refused(call, kind)
