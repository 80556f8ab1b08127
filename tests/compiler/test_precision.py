"""`compile(precision="bfloat16")`: every product of a network, forwards and backwards,
and nothing else."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import linen, nnx

import composeprob as cp
from compiler.networks import Energy
from composeprob.density.rounding import unrounded
from composeprob.errors import CapabilityError
from composeprob.results.checks.rounded_networks import RoundedNetworks, rounding
from refusals import refused
from sampling_cases import Calls, equations, single

SCHEDULE = cp.Schedule.cosine(12)
SIZE = 16
X = {"x": jnp.linspace(-1.0, 0.7, SIZE)}
BFLOAT16, FLOAT32 = jnp.dtype("bfloat16"), jnp.dtype("float32")


def factor(network, parameterization="x0", **options):
    return cp.Diffusion(
        network,
        SCHEDULE,
        event_shape=(SIZE,),
        parameterization=parameterization,
        **options,
    )


def product_types(jaxpr: Any) -> list[Any]:
    """The dtypes of the operands of every matrix product in a traced function, loops
    and calls included."""
    types = []
    for equation, _ in equations(jaxpr):
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            types.append({operand.aval.dtype for operand in equation.invars})
    return types


def of_value_and_score(density: Any, position: Any = X) -> list[Any]:
    return product_types(
        jax.make_jaxpr(lambda x: density.evaluate(x, 3).score)(position)
    )


class Dense(eqx.Module):
    """An MLP by Equinox."""

    layers: eqx.nn.MLP

    def __call__(self, x, t):
        return self.layers(x)


class Loops(eqx.Module):
    """Products in a loop, in a branch, in a call and under rematerialisation."""

    weight: jax.Array

    def __call__(self, x, t):
        def times(x):
            return jnp.tanh(self.weight @ x)

        x, _ = jax.lax.scan(lambda x, _: (times(x), None), x, length=2)
        x = jax.lax.cond(t > 2, times, lambda x: x, x)
        return jax.checkpoint(times)(jax.jit(times)(x))


class Convolved(nnx.Module):
    def __init__(self):
        self.layer = nnx.Conv(1, 1, (3,), rngs=nnx.Rngs(0))

    def __call__(self, x, t):
        return self.layer(x[:, None])[:, 0]


class Attending(linen.Module):
    @linen.compact
    def __call__(self, x, t):
        return linen.SelfAttention(num_heads=1)(x[None] * jnp.ones((SIZE, 1)))[0]


def linen_pair():
    module = Attending()
    return module, module.init(jax.random.key(0), X["x"], 0)


NETWORKS = {
    "Equinox": lambda: Dense(
        eqx.nn.MLP(SIZE, SIZE, 32, 2, activation=jax.nn.silu, key=jax.random.key(0))
    ),
    "loops": lambda: Loops(jnp.eye(SIZE) + 0.3),
    "NNX convolution": Convolved,
    "Linen attention": linen_pair,
    "function": lambda: lambda x, t: jnp.outer(x, x) @ x,
}


@pytest.mark.parametrize("parameterization", ["x0", "energy_residual"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_product_is_of_bfloat16(name, parameterization):
    f = factor(NETWORKS[name](), parameterization)
    exact = of_value_and_score(cp.compile(single, f))
    rounded = of_value_and_score(cp.compile(single, f, precision="bfloat16"))
    # An energy's score needs a product backwards for each one forwards.
    fewest = 2 if parameterization == "energy_residual" else 1
    assert len(rounded) == len(exact) >= fewest
    assert all(types == {FLOAT32} for types in exact)
    assert all(types == {BFLOAT16} for types in rounded)


def test_it_computes_what_rounding_by_hand_computes():
    weight = jax.random.normal(jax.random.key(0), (SIZE, SIZE)) / 4
    f = factor(lambda x, t: jnp.sum(jnp.exp(weight @ x)), "energy")
    sigma = SCHEDULE.sigma[4]

    def rounded(a):
        return np.asarray(jnp.asarray(a, BFLOAT16), np.float64)

    h = rounded(weight) @ rounded(X["x"])
    density = cp.compile(single, f, precision="bfloat16")
    for compile_ in (jax.jit, lambda f: f):  # a compiler may not drop the rounding
        value, score = compile_(density.value_and_score)(X, 4)
        np.testing.assert_allclose(value, -np.sum(np.exp(h)) / sigma, rtol=1e-5)
        back = rounded(-np.exp(h) / sigma) @ rounded(weight)
        np.testing.assert_allclose(
            score["x"], back, rtol=2**-8, atol=2**-8 * np.abs(back).max()
        )
    exact = cp.compile(single, f)
    assert not np.allclose(value, exact.log_density(X, 4), rtol=1e-5)
    assert "bfloat16" in str(density)
    assert "bfloat16" not in str(exact)


def test_sums_too_short_for_a_matrix_unit_stay_as_they_are():
    # Sums of 16 terms and more are rounded.
    wide = jnp.linspace(0.1, 1.0, 2 * 16).reshape(16, 2)
    f = cp.Diffusion(lambda x, t: wide.T @ (wide @ x), SCHEDULE, event_shape=(2,))
    density = cp.compile(single, f, precision="bfloat16")
    types = of_value_and_score(density, {"x": jnp.ones(2)})
    assert types == [{FLOAT32}, {BFLOAT16}]


def test_positions_energies_and_weights_keep_their_type():
    f = factor(NETWORKS["Equinox"](), "energy_residual")
    density = cp.compile(single, f, precision="bfloat16")
    kernel = cp.MALA(0.1)

    def target(x):
        return density.evaluator(x, 3)

    def step(key, x):
        state = kernel.init(key, x, target)
        return kernel.step(key, state, target, kernel.step_size)

    evaluation = jax.eval_shape(lambda x: density.evaluate(x, 3), X)
    moved = jax.eval_shape(step, jax.random.key(0), X)
    arrays = eqx.filter(density, eqx.is_inexact_array)
    for array in jax.tree.leaves((evaluation, moved, arrays)):
        assert array.dtype != BFLOAT16
    assert evaluation.log_density.dtype == FLOAT32


@cp.program
def held(f):
    c = numpyro.sample("c", dist.Normal(0.0, 1.0))
    cp.sample("x", f.given(c=c))


def inside_of_others():
    """Programs, factors in others, under a latent and under conditions, and positions;
    with the counter of the energy's calls."""
    f = factor(NETWORKS["Equinox"](), "energy_residual")
    counter = Calls()
    classifier = cp.Classifier(
        lambda x, t: jnp.eye(SIZE) @ x, SCHEDULE, event_shape=(SIZE,)
    )
    windows = [cp.window(f, (SIZE + 1,), (i,)) for i in (0, 1)]
    canvas = {"x": jnp.ones(SIZE + 1)}
    energy = factor(
        Energy(jnp.eye(SIZE) + 0.1, counter), "energy", conditions={"c": 0.0}
    )
    conditioned = [energy.given(c=float(i)) for i in range(5)]
    cases = {
        "a classifier": (single, cp.condition(f, classifier, 1), X),
        "a tapestry": (single, cp.tapestry(*windows), canvas),
        "under a latent": (held, energy, {**X, "c": jnp.array(0.3)}),
        "under conditions": (single, cp.product(*conditioned), X),
    }
    return cases, counter


@pytest.mark.parametrize(
    "name", ["a classifier", "a tapestry", "under a latent", "under conditions"]
)
def test_factors_inside_of_others_are_rounded_too(name):
    cases, counter = inside_of_others()
    program, f, position = cases[name]
    exact = cp.compile(program, f)
    density = cp.compile(program, f, precision="bfloat16")
    types = of_value_and_score(density, position)
    assert len(types) == len(of_value_and_score(exact, position)) > 0
    assert all(each == {BFLOAT16} for each in types)
    if name == "under conditions":  # which are still one batch
        assert len(density.graph.groups) == 1
        density.evaluate(X, 3)
        assert counter.runs_of(lambda: density.evaluate(X, 3)) == 1


def test_what_has_a_derivative_of_its_own_stays_as_it_is():
    """With rounded products the function would no longer be that of its derivative."""
    weight = jax.random.normal(jax.random.key(0), (SIZE, SIZE))

    @jax.custom_jvp
    def times(x):
        return weight @ x

    times.defjvp(lambda primals, tangents: (times(*primals), weight @ tangents[0]))
    f = factor(lambda x, t: times(x), "energy_residual")
    exact = cp.compile(single, f).value_and_score(X, 3)
    rounded = cp.compile(single, f, precision="bfloat16").value_and_score(X, 3)
    jax.tree.map(np.testing.assert_array_equal, exact, rounded)


@pytest.mark.parametrize("precision", ["float16", "bf16", 16])
def test_an_unknown_precision_is_refused(precision):
    f = factor(NETWORKS["Equinox"]())
    refused(
        lambda: cp.compile(single, f, precision=precision),
        cp.errors.InvalidValueError,
    )


class Offset(eqx.Module):
    """E = σ·½‖(x − c)/w‖², whose product rounds x − c where c is far from 0."""

    matrix: jax.Array
    shift: jax.Array

    def __call__(self, x, t):
        noise = SCHEDULE.at(t)
        variance = noise.alpha**2 * WIDTH**2 + noise.sigma**2
        # (x − α·c) as a difference of products, each of which is rounded.
        rest = self.matrix @ x - noise.alpha * (self.matrix @ self.shift)
        return 0.5 * noise.sigma * jnp.sum(rest**2) / variance


WIDTH = 0.05


@pytest.mark.parametrize("centre", [0.0, 12.03])
def test_rounding_that_changes_estimates_is_found(centre):
    """12.03 is rounded to 12, a fifth of the width at level 0 away; a number near 0 by
    no more than 1/256 of itself."""
    network = Offset(jnp.eye(SIZE), jnp.full(SIZE, centre))
    energy = factor(network, "energy")
    density = cp.compile(single, energy, precision="bfloat16")
    result = cp.infer(density, jax.random.key(0), num_chains=256, progress=False)
    check = RoundedNetworks()
    found = [f for f in result.status.findings if "bfloat16" in f.message]
    assert bool(found) == (centre != 0)
    assert all(f.code == check.code and f.withholds for f in found)
    # A density that is not rounded has nothing to compare.
    assert unrounded(cp.compile(single, energy)) is None


def test_rounding_moves_means_and_the_evidence_as_reweighting_does():
    """The mean of N(0, 1) moves by a under log π₀ + a·x + b, and log Z by a²/2 + b."""
    x = jax.random.normal(jax.random.key(0), (20_000, 1))
    x = np.asarray(x, float)
    weights = np.full(len(x), 1 / len(x))
    found = rounding(0.3 * x[:, 0] + 0.5, x, weights)
    assert found.shift == pytest.approx(0.3, abs=0.02)
    assert found.log_evidence == pytest.approx(0.545, abs=0.02)


def test_rounding_without_direction_moves_no_mean():
    """The largest covariance with noise of 128 samples of 64 numbers is 0.2."""
    x_key, noise_key = jax.random.split(jax.random.key(1))
    x = np.asarray(jax.random.normal(x_key, (128, 64)), float)
    change = np.asarray(jax.random.normal(noise_key, (128,)), float)
    weights = np.full(128, 1 / 128)
    assert rounding(change, x, weights).shift == 0
    moved = rounding(change + 0.15 * x.sum(1), x, weights)
    assert moved.shift == pytest.approx(1.2, abs=0.5)


def test_tokens_are_not_rounded_in_silence():
    tokens = cp.Analytic(dist.Categorical(jnp.ones(3) / 3).expand([2]).to_event(1))
    refused(
        lambda: cp.compile(single, tokens, precision="bfloat16"),
        CapabilityError,
        fix="precision",
    )
