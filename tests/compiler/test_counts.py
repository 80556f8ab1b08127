"""The cost of a compiled density: evaluations of each network, traces, and constants
of the executable."""

import dataclasses

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import composeprob as cp
from compiler.networks import Energy, score_by_one_trace
from sampling_cases import Calls, equations, measured, single

SCHEDULE = cp.Schedule.cosine(12)
X = {"x": jnp.array([0.3, -0.6])}


def first_entry(x):
    return dist.Normal(x[0], 0.1)


def model(schedule=SCHEDULE, size=2, time="level"):
    network = Energy(jnp.eye(size) + 0.1, Calls())
    options = {
        "event_shape": (size,),
        "parameterization": "energy",
        "time": time,
        "conditions": {"c": 0.0},
    }
    return cp.Diffusion(network, schedule, **options), network.counter


@cp.program
def plates(f):
    with numpyro.plate("i", 3):
        cp.sample("x", f)
    cp.sample("z", f)


EXPRESSIONS = {
    "leaf": lambda f: f,
    "equal leaves": lambda f: f * f / f**0.5,
    "five conditions": lambda f: cp.product(*[f.given(c=float(i)) for i in range(5)]),
    "guidance": lambda f: cp.guide(f, 3.0, c=1.0),
    "conditions in products and mixtures": lambda f: (
        f.given(c=1.0)
        * cp.mixture([f.given(c=2.0), f.given(c=1.0) * f], log_weights=[0.0, 1.0])
    ),
    "windows of one size": lambda f: (
        cp.window(f, (3,), (0,)) * cp.window(f, (3,), (1,)) * cp.window(f, (3,), (1,))
    ),
}
DENSITIES = {
    **{
        name: lambda f, make=make: cp.compile(single, make(f))
        for name, make in EXPRESSIONS.items()
    },
    "plates": lambda f: cp.compile(plates, f),
    "tempered": lambda f: cp.compile(
        measured, f, first_entry, jnp.array(0.2), "tempered"
    ),
    "the Tweedie mean": lambda f: cp.compile(
        measured, f, first_entry, jnp.array(0.2), "denoised"
    ),
    "noised": lambda f: cp.compile(measured, f, first_entry, jnp.array(0.2), "noised"),
}


@pytest.mark.parametrize("name", DENSITIES)
def test_one_network_is_evaluated_once(name):
    """Log-density, score and rate of any number of conditions come from ONE batched
    evaluation."""
    f, counter = model()
    density = DENSITIES[name](f)
    position = {name: jnp.ones(site.shape) for name, site in density.sites.items()}
    density.evaluate(position, 2)
    assert counter.runs_of(lambda: density.evaluate(position, 3)) == 1


def transposed(jaxpr):
    """Shapes of the arrays that a traced function transposes, but for weights, which
    have two axes."""
    shapes = [
        e.invars[0].aval.shape
        for e, _ in equations(jaxpr)
        if e.primitive.name == "transpose"
    ]
    return [shape for shape in shapes if len(shape) > 2]


def test_batched_layers_move_no_numbers_between_conditions_and_chains():
    """XLA carries such transposes out; where they are left in, half of a shared
    evaluation is spent on them."""
    network = eqx.nn.MLP(3, 2, 16, 2, key=jax.random.key(0))

    def conditioned(call):
        f = cp.Diffusion(
            call,
            SCHEDULE,
            event_shape=(2,),
            parameterization="energy_residual",
            conditions=("c",),
        )
        density = cp.compile(
            single, cp.product(*[f.given(c=float(i)) for i in range(5)])
        )
        chains = jax.vmap(lambda x: density.value_and_score({"x": x}, 3))
        xs = jnp.ones((7, 2))
        return jax.make_jaxpr(chains)(xs).jaxpr, jax.jit(chains)(xs)

    class Conditioned(eqx.Module):
        mlp: eqx.Module

        def __call__(self, x, t, c):
            return self.mlp(jnp.append(x, c))

    batched, values = conditioned(Conditioned(cp.batched_linear(network)))
    unbatched, expected = conditioned(Conditioned(network))
    assert transposed(batched) == []
    assert len(transposed(unbatched)) >= 3
    chex.assert_trees_all_close(values, expected, rtol=1e-5)


def test_networks_of_their_own_are_evaluated_each():
    f, one = model()
    g, other = model()
    density = cp.compile(single, f * g.given(c=1.0))
    assert len(density.graph.groups) == 2
    density.evaluate(X, 0)
    assert [
        calls.runs_of(lambda: density.evaluate(X, 3)) for calls in (one, other)
    ] == [1, 1]


def test_new_numbers_reuse_compiled_code():
    """Weights, conditions, observations, levels, powers, shares: arrays, none of them
    compiled in."""
    f, _ = model()
    score = score_by_one_trace()

    def density(weight, c, y):
        g = eqx.tree_at(lambda f: f.network.weight, f, weight)
        return cp.compile(
            measured, cp.guide(g, 2.0, c=c), first_entry, jnp.asarray(y), "denoised"
        )

    numbers = [(1.0, 1.0, 0.2), (3.0, 1.0, 0.2), (1.0, 2.0, 0.2), (1.0, 1.0, 0.7)]
    densities = [density(weight * jnp.eye(2), c, y) for weight, c, y in numbers]
    values = [score(d, X, jnp.asarray(level)) for d in densities for level in (0, 3)]
    np.testing.assert_allclose(values[0], densities[0].score(X, 0)["x"], rtol=1e-5)
    assert len({tuple(np.asarray(v).tolist()) for v in values}) == len(values)
    score = score_by_one_trace()
    for w, share in [(0.5, 0.1), (1.5, 0.1), (0.5, 0.7)]:
        mixed = cp.mixture([f.given(c=1.0), f], log_weights=[share, 0.0])
        score(cp.compile(single, mixed**w * f), X, 3)


def test_what_is_evaluated_by_hand_is_compiled_once():
    f, counter = model()
    density = cp.compile(measured, f, first_entry, jnp.array(0.2), "denoised")
    first = density.score(X, 2)["x"]
    traced = counter.traced
    again = density.score({"x": 2 * X["x"]}, 3)["x"]
    density.log_density(X, 4)
    assert counter.traced == traced
    np.testing.assert_allclose(first, jax.jit(density.score)(X, 2)["x"], rtol=1e-5)
    np.testing.assert_allclose(
        again, jax.jit(density.score)({"x": 2 * X["x"]}, 3)["x"], rtol=1e-5
    )


@pytest.mark.parametrize(
    ("program", "precision"),
    [("prior", None), ("posterior", None), ("prior", "bfloat16")],
)
def test_no_parameter_is_a_constant_of_the_executable(program, precision):
    size = 300
    f, _ = model(size=size)
    factor = f.given(c=1.0) * f
    if program == "prior":
        density = cp.compile(single, factor, precision=precision)
    else:
        data = (first_entry, jnp.array(0.2), "denoised")
        density = cp.compile(measured, factor, *data, precision=precision)
    position = {"x": jnp.ones(size)}
    dynamic, static = eqx.partition(density, eqx.is_array)

    def score(dynamic, position, level):
        return eqx.combine(dynamic, static).score(position, level)

    jaxpr = jax.make_jaxpr(score)(dynamic, position, 3)
    assert sum(np.size(c) for c in jaxpr.consts) < size
    executable = jax.jit(score).lower(dynamic, position, 3).compile()
    lines = executable.as_text().splitlines()
    of_weights = [line for line in lines if f"[{size},{size}]" in line]
    assert not [line for line in of_weights if " constant(" in line]
    assert [line for line in of_weights if " parameter(" in line]


def test_arguments_that_shape_the_program_stay_numbers():
    """A power and mixture weights given as arrays: with an observation the program is
    run again inside jit."""
    f, _ = model()

    @cp.program
    def shaped(f, w, shares, y):
        x = cp.sample(
            "x", cp.mixture([f, f.given(c=1.0)], log_weights=np.log(shares)) ** w
        )
        cp.observe("y", dist.Normal(x[0], 0.1), y)

    def score(w, shares, y):
        density = cp.compile(shaped, f, w, shares, y)
        return density, eqx.filter_jit(lambda d, x: d.score(x, 2)["x"])(density, X)

    y = jnp.array(0.4)
    shares = np.array([0.3, 0.7])
    density, value = score(jnp.array(1.5), shares, y)
    np.testing.assert_allclose(value, density.score(X, 2)["x"], rtol=1e-4)
    others = [
        (0.5, shares, y),
        (1.5, np.array([0.9, 0.1]), y),
        (1.5, shares, jnp.array(0.9)),
    ]
    for w, *rest in others:
        _, other = score(jnp.array(w), *rest)
        assert not np.allclose(value, other)


def test_a_density_equals_itself_alone_and_hashes_so():
    f, _ = model()
    one = cp.compile(single, f)
    other = cp.compile(single, f)
    assert one == one
    assert one != other
    assert len({one, other, one}) == 2
    assert eqx.tree_equal(one, other)


def test_what_traces_depend_on_is_no_part_of_the_description():
    """Densities that differ only in whether their factors are normalised do not share
    an executable."""
    density = cp.compile(
        single, cp.Analytic(dist.Normal(jnp.zeros(2), 1.0), SCHEDULE) ** 2
    )
    other = dataclasses.replace(
        density, top=dataclasses.replace(density.top, normalised=False)
    )
    traced = eqx.filter_jit(lambda density: jnp.asarray(density.top.normalised))
    assert (bool(traced(density)), bool(traced(other))) == (True, False)
