"""How often a program is run to be compiled, and what is said of one whose Python asks
for its data."""

import functools
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import composeprob as cp
from compiler.networks import Energy
from composeprob.compiler.once import once
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
    x, m = cp.sample("x", f), cp.sample("m", dist.Normal(0.0, 1.0))
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
    # Soft evidence is followed out along rays as well, once for each policy.
    assert program.runs <= (
        8 if name == "every policy" else 3
    )  # with numbers, with others for scales, with tracers
    position = jax.eval_shape(density.initial, jax.random.key(0))
    assert {name: site.shape for name, site in density.sites.items()} == {
        n: x.shape for n, x in position.items()
    }
    assert jax.eval_shape(lambda at: density.log_density(at, 0), position).shape == ()


def asking(mean, of_y=False):
    """Data y, or others, whose mean is a function of x and y."""
    return lambda f, y: cp.observe(
        "z", dist.Normal(mean(cp.sample("x", f), y), 0.1), y if of_y else 0.2
    )


ASKING = {
    "if": (asking(lambda x, y: x[0] if y > 0 else x[1], of_y=True), jnp.array(3.0)),
    "if of a mean": (
        asking(lambda x, y: x[0] + (0.1 if jnp.mean(y) > 0 else 0.2), of_y=True),
        np.array([1.0, 2.0]),
    ),
    "float": (asking(lambda x, y: x[0] + float(y)), jnp.array(3.0)),
    "numpy": (asking(lambda x, y: x[0] + np.asarray(y)), jnp.array(3.0)),
    "range": (
        asking(lambda x, y: sum(x[0] * i for i in range(int(y)))),
        jnp.array(3.0),
    ),
    "mask": (asking(lambda x, y: x[0] + y[y > 0].sum()), jnp.array([1.0, -1.0])),
    "if without observations": (
        lambda f, y: cp.sample("x", f if y > 0 else f**2),
        jnp.array(3.0),
    ),
}


@pytest.mark.parametrize("name", ASKING)
def test_data_that_become_constants_are_named_with_their_line(name):
    function, y = ASKING[name]
    program = counted(function)
    density = cp.compile(cp.program(program), NORMAL, y)
    assert program.runs <= 4
    (said,) = [text for text in str(density).splitlines() if "constant" in text]
    lines, row = Path(__file__).read_text(encoding="utf-8").splitlines(), f'"{name}": ('
    assert (
        f"test_trace.py:{1 + next(i for i, text in enumerate(lines) if row in text)}"
        in said
    )
    assert " y" in said


def settings(f, y, count, weight, flag, power):
    x = cp.sample("x", f ** (power if flag else 1.0))
    for i in range(count):
        mean = x[0] * weight if weight > 0.5 else x[1]
        cp.observe(
            f"y{i}",
            dist.Normal(
                mean + y[: len(y) // 2].sum() * y.shape[0] / max(y.ndim, 1), 0.1
            ),
            0.2,
        )


@pytest.mark.parametrize("power", [2.0, np.float32(2.0), jnp.array(2.0)])
def test_nothing_is_said_of_shapes_and_settings_and_powers(power):
    density = cp.compile(cp.program(settings), NORMAL, jnp.ones(4), 2, 0.7, True, power)
    assert "constant" not in str(density)


def test_only_what_is_asked_for_is_compiled_in():
    """New data reuse compiled code beside a number that the program has been asked for,
    and that code has."""
    traces, position = 0, {"x": jnp.array([0.3, -0.2])}

    def scene(f, w, y):
        x = cp.sample("x", f)
        cp.observe("y", dist.Normal(x[0] if w > 0 else x[1], 0.1), y)

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
    found = Influence().outputs(jaxpr, [frozenset(name) for name in "abc"])
    assert ["".join(sorted(names)) for names in found] == [
        "a",
        "b",
        "ab",
        "ab",
        "c",
        "",
        "b",
    ]


@pytest.mark.parametrize(
    "options", [None, {"xla_no_such_option": 1}], ids=["known", "unknown"]
)
def test_what_runs_once_runs_where_xla_does_not_know_an_option(options):
    assert once(lambda x: 2.0 * x, options)(jnp.ones(())) == 2.0
    with pytest.raises(TypeError):
        once(lambda x: x + "1", options)(jnp.ones(()))
