"""Every leaf factor and schedule constructor has a row in tests/registry.py, and every
row keeps its promises."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import composeprob as cp
import composeprob.factors
from composeprob.errors import ConditionError
from composeprob.factors.categorical import CategoricalFactor, TokenFactor
from composeprob.factors.factor import LeafFactor
from refusals import refused
from registry import CATEGORICAL, FACTORS, SCHEDULES, UNIFORM, concrete

ROWS = pytest.mark.parametrize("name", FACTORS)
SCHEDULE = cp.Schedule.cosine(12)
RESULTS = {"Calibrated", "Formula", "Weighted"}  # returned by functions
CAPABILITIES = {
    "score",
    "energy",
    "conservative",
    "normalised",
    "exact_marginals",
    "mode_depth",
}
X = jnp.array([0.4, -0.9])


def test_every_leaf_factor_has_a_row_and_is_public_unless_a_function_returns_it():
    kinds = {name: type(make(SCHEDULE)).__name__ for name, make in FACTORS.items()}
    revealed = set(concrete(composeprob.factors, CategoricalFactor))
    assert {name.partition(",")[0] for name in CATEGORICAL} == revealed
    of_tokens = concrete(composeprob.factors, TokenFactor)
    noised = {
        name for name, kind in of_tokens.items() if kind.noised != TokenFactor.noised
    }
    assert {name.partition(",")[0] for name in UNIFORM} == noised
    leaves = set(concrete(composeprob.factors, LeafFactor))
    assert set(kinds.values()) == leaves - set(of_tokens)
    assert {name for name, kind in kinds.items() if name == kind} == set(kinds) - {
        "Weighted"
    }
    assert set(FACTORS) - set(cp.__all__) == RESULTS


def test_every_schedule_constructor_has_a_row():
    constructors = {
        name
        for name, v in vars(cp.Schedule).items()
        if isinstance(v, classmethod) and name[0] != "_"
    }
    # `log_snr` is a constructor on the class, and an array on instances.
    assert set(SCHEDULES) == constructors | {"log_snr"}
    assert all(isinstance(make(), cp.Schedule) for make in SCHEDULES.values())


def evaluate(factor, x, level):
    return factor.evaluate(x, SCHEDULE.at(level), factor.call_conditions())


@ROWS
def test_what_a_leaf_offers_it_has(name):
    factor = FACTORS[name](SCHEDULE)
    assert factor.capabilities <= CAPABILITIES
    assert "score" in factor.capabilities
    value, score = jax.jit(lambda x: evaluate(factor, x, 3))(X)
    assert score.shape == factor.event_shape
    assert (value is not None) == ("energy" in factor.capabilities)
    assert value.shape == ()

    def log_density(x):
        return evaluate(factor, x, 3)[0]

    # conservative
    np.testing.assert_allclose(score, jax.jit(jax.grad(log_density))(X), rtol=1e-4)
    if "normalised" in factor.capabilities:
        grid = jnp.linspace(-5.0, 5.0, 121)
        points = jnp.stack(jnp.meshgrid(grid, grid), axis=-1).reshape(-1, 2)
        heights = jnp.exp(jax.jit(jax.vmap(log_density))(points))
        mass = jnp.sum(heights) * (grid[1] - grid[0]) ** 2
        np.testing.assert_allclose(mass, 1.0, rtol=1e-4)


@ROWS
def test_a_leaf_is_a_pytree_that_maps_and_jits(name):
    factor = FACTORS[name](SCHEDULE)
    xs = jnp.stack([X, -X, 2 * X])
    levels = jnp.array([0, 4, 9])

    @eqx.filter_jit
    def mapped_score(factor, xs, levels):
        return jax.vmap(lambda x, k: evaluate(factor, x, k)[1])(xs, levels)

    @eqx.filter_jit
    def single_score(factor, x, level):
        return evaluate(factor, x, level)[1]

    expected = [single_score(factor, x, k) for x, k in zip(xs, levels, strict=True)]
    np.testing.assert_allclose(
        mapped_score(factor, xs, levels), jnp.stack(expected), rtol=1e-4, atol=1e-5
    )
    copy = jax.tree.map(lambda a: a, factor)
    assert jax.tree.structure(copy) == jax.tree.structure(factor)


@ROWS
def test_a_leaf_refuses_conditions_that_it_does_not_have(name):
    refused(
        lambda: FACTORS[name](SCHEDULE).given(colour=1),
        ConditionError,
    )
    assert FACTORS[name](SCHEDULE).label
