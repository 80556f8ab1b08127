"""Compilation runs a program a few times, and the density notes that its Python asked
for the numbers of its data."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import composeprob as cp
from compiler.networks import Energy
from composeprob.density.once import once
from composeprob.factors.equations import Influence
from sampling_cases import Calls

SCHEDULE = cp.Schedule.log_snr(12)
NORMAL = cp.Analytic(dist.Normal(jnp.zeros(2), 1.0), SCHEDULE)
MODEL = cp.Diffusion(
    Energy(jnp.eye(2), Calls()),
    SCHEDULE,
    event_shape=(2,),
    parameterization="energy",
    conditions={"c": 0.0},
)


def exact(f, y):
    x = cp.sample("x", f)
    m = cp.sample("m", dist.Normal(0.0, 1.0))
    cp.observe("y", dist.Normal(x[0] + m, 0.1), y)


def counted(function):
    """A function that counts how often it runs."""

    @functools.wraps(function)
    def count(*args):
        count.runs += 1
        function(*args)

    count.runs = 0
    return count


def policies(f, y):
    x = cp.sample("x", f)
    for policy in ("tempered", "denoised", "noised"):
        cp.observe(policy, dist.Normal(jnp.sin(x[0]), 0.1), y, anneal=policy)
    cp.factor("w", lambda level: level * x[0], anneal="noised")


def hierarchy(f, y):
    scale = cp.sample("scale", dist.HalfNormal(1.0))
    mean = cp.sample("mean", dist.Normal(jnp.zeros(2), scale).to_event(1))
    x = cp.sample("x", f)
    with numpyro.plate("i", 3):
        z = cp.sample("z", dist.Normal(mean[0], scale))
        cp.observe("y", dist.StudentT(3.0, z + x[0], 1.0), y)


def plates(f, y):
    with numpyro.plate("i", 3):
        x = cp.sample("x", f)
        cp.observe("y", dist.Normal(x.sum(-1), 0.1), y)


def moved(f, y):
    m = cp.sample("m", dist.Normal(0.0, 1.0))
    x = cp.sample("x", cp.Analytic(dist.Normal(m * jnp.ones(2), 0.5), SCHEDULE))
    cp.observe("y", dist.Normal(x[0], 1.0), y)


class Constant(dist.Normal):
    def sample(self, key, sample_shape=()):
        return jnp.asarray(0.5)


def keyless(f, y):
    m = cp.sample("m", Constant(0.0, 1.0))
    cp.observe("y", dist.StudentT(3.0, cp.sample("x", f)[0] + m, 1.0), y)


Y = np.array([0.1, -0.2, 0.3])
PROGRAMS = {
    "a product": (lambda f: cp.sample("x", f * f.given(c=1.0)), MODEL),
    "annealed exactly": (exact, NORMAL, jnp.array(0.4)),
    "a closed form that fails": (exact, MODEL, jnp.array(0.4)),
    "every policy": (policies, MODEL, jnp.array(0.4)),
    "a hierarchy": (hierarchy, NORMAL, Y),
    "plates": (plates, NORMAL, Y),
    "a factor of a latent": (moved, NORMAL, jnp.array(0.4)),
    "held latents": (
        lambda f: cp.sample("x", f.given(c=cp.sample("c", dist.Normal(0.0, 1.0)))),
        MODEL,
    ),
    "a draw that takes no key": (keyless, NORMAL, jnp.array(0.4)),
    "a Python number as data": (exact, NORMAL, 0.4),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_run_three_times(name):
    function, *arguments = PROGRAMS[name]
    program = counted(function)
    density = cp.compile(cp.program(program), *arguments)
    # Once with numbers, once with others for scales, once with tracers.
    most = 3
    if name == "every policy":
        # Soft evidence is followed along rays as well, once for each policy.
        most = 8
    assert program.runs <= most
    position = jax.eval_shape(density.initial, jax.random.key(0))
    of_sites = {name: site.shape for name, site in density.sites.items()}
    assert of_sites == {name: x.shape for name, x in position.items()}
    assert jax.eval_shape(lambda at: density.log_density(at, 0), position).shape == ()


class Request(NamedTuple):
    """A program whose Python asks for the numbers of its data y.

    Attributes:
        function: the function that asks; its line is named.
        program: the program's function.
        y: the data.
    """

    function: Callable
    program: Callable
    y: jax.Array | np.ndarray


def asking(mean, y):
    """An observation whose mean is a function of x and y."""

    def program(f, y):
        cp.observe("z", dist.Normal(mean(cp.sample("x", f), y), 0.1), 0.2)

    return Request(mean, program, y)


def asking_beside_data(mean, y):
    """The same, with y as the observed value too."""

    def program(f, y):
        cp.observe("z", dist.Normal(mean(cp.sample("x", f), y), 0.1), y)

    return Request(mean, program, y)


def of_the_site(f, y):
    factor = f if y > 0 else f**2
    cp.sample("x", factor)


THREE = jnp.array(3.0)
ASKING = {
    "if": asking_beside_data(lambda x, y: x[0] if y > 0 else x[1], THREE),
    "if of a mean": asking_beside_data(
        lambda x, y: x[0] + (0.1 if jnp.mean(y) > 0 else 0.2), np.array([1.0, 2.0])
    ),
    "float": asking(lambda x, y: x[0] + float(y), THREE),
    "numpy": asking(lambda x, y: x[0] + np.asarray(y), THREE),
    "range": asking(lambda x, y: sum(x[0] * i for i in range(int(y))), THREE),
    "mask": asking(lambda x, y: x[0] + y[y > 0].sum(), jnp.array([1.0, -1.0])),
    "if without observations": Request(of_the_site, of_the_site, THREE),
}


@pytest.mark.parametrize("name", ASKING)
def test_data_that_become_constants_are_named_with_their_line(name):
    request = ASKING[name]
    program = counted(request.program)
    density = cp.compile(cp.program(program), NORMAL, request.y)
    assert program.runs <= 4
    (note,) = [text for text in str(density).splitlines() if "constant" in text]
    line = request.function.__code__.co_firstlineno
    if request.function is of_the_site:
        line += 1  # below its `def`
    assert f"test_trace.py:{line}" in note
    assert " y" in note


def settings(f, y, count, weight, flag, power):
    if flag:
        f = f**power
    x = cp.sample("x", f)
    for i in range(count):
        mean = x[0] * weight if weight > 0.5 else x[1]
        of_shapes = y[: len(y) // 2].sum() * y.shape[0] / max(y.ndim, 1)
        cp.observe(f"y{i}", dist.Normal(mean + of_shapes, 0.1), 0.2)


@pytest.mark.parametrize("power", [2.0, np.float32(2.0), jnp.array(2.0)])
def test_nothing_is_said_of_shapes_and_settings_and_powers(power):
    density = cp.compile(cp.program(settings), NORMAL, jnp.ones(4), 2, 0.7, True, power)
    assert "constant" not in str(density)


def test_only_what_is_asked_for_is_compiled_in():
    """New data reuse compiled code, beside a number that the program asks for, which is
    compiled in."""
    traces = 0
    position = {"x": jnp.array([0.3, -0.2])}

    def scene(f, w, y):
        x = cp.sample("x", f)
        mean = x[0] if w > 0 else x[1]
        cp.observe("y", dist.Normal(mean, 0.1), y)

    @eqx.filter_jit
    def score(density, x):
        nonlocal traces
        traces += 1
        return density.score(x, 2)["x"]

    for w, y in [(1.0, 0.1), (1.0, 0.7), (-1.0, 0.7)]:
        density = cp.compile(cp.program(scene), NORMAL, jnp.array(w), jnp.array(y))
        np.testing.assert_allclose(
            score(density, position),
            jax.jit(density.score)(position, 2)["x"],
            rtol=1e-5,
        )
    assert traces == 2


def test_numbers_that_depend_on_nothing_may_be_asked_for():
    def scene(f, y):
        x = cp.sample("x", f)
        cp.observe("y", dist.Normal(x[0] * float(jnp.log(2.0)), 0.1), y)

    density = cp.compile(cp.program(scene), NORMAL, jnp.array(0.2))
    assert "constant" not in str(density)
    position = {"x": jnp.ones(2)}
    compiled = jax.jit(density.score)(position, 2)["x"]
    np.testing.assert_allclose(compiled, density.score(position, 2)["x"], rtol=1e-5)


def test_influences_of_calls_and_loops():
    def function(a, b, c):
        first, second = jax.jit(lambda a, b: (a + 1.0, b * 2.0))(a, b)

        def step(carry, row):
            one, two = carry
            return (two, one + row), two

        (last, _), rows = jax.lax.scan(step, (a, jnp.zeros(())), jnp.stack([b, b]))
        chosen = jax.lax.cond(c > 0, lambda: 1.0, lambda: 2.0)
        return first, second, last, rows, chosen, jnp.zeros_like(a), jax.nn.relu(b)

    jaxpr = jax.make_jaxpr(function)(1.0, 2.0, 3.0).jaxpr
    influences = Influence().outputs(jaxpr, [frozenset(name) for name in "abc"])
    names = ["".join(sorted(inputs)) for inputs in influences]
    assert names == ["a", "b", "ab", "ab", "c", "", "b"]


@pytest.mark.parametrize(
    "options", [None, {"xla_no_such_option": 1}], ids=["known", "unknown"]
)
def test_what_runs_once_runs_where_xla_does_not_know_an_option(options):
    assert once(lambda x: 2.0 * x, options)(jnp.ones(())) == 2.0
    with pytest.raises(TypeError):
        once(lambda x: x + "1", options)(jnp.ones(()))
