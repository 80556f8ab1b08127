"""How often a program is run to be compiled, and what is said of one whose Python asks for its data."""

import functools
import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import composeprob as cp
from compiler.networks import Counter, Energy
from composeprob.compiler.once import once
from composeprob.factors.equations import Influence

SCHEDULE = cp.Schedule.log_snr(10)
NORMAL = cp.Analytic(dist.Normal(jnp.zeros(2), 1.0), SCHEDULE)
MODEL = cp.Diffusion(
    Energy(jnp.eye(2), Counter()), SCHEDULE, event_shape=(2,), parameterization="energy", conditions={"c": 0.0}
)


def plain(f):
    cp.sample("x", f * f.given(c=1.0) if f.traits.conditions else f)


def exact(f, y):
    x, m = cp.sample("x", f), cp.sample("m", dist.Normal(0.0, 1.0))
    cp.observe("y", dist.Normal(x[0] + m, 0.1), y)


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


def held(f):
    cp.sample("x", f.given(c=cp.sample("c", dist.Normal(0.0, 1.0))))


class Constant(dist.Normal):
    def sample(self, key, sample_shape=()):
        return jnp.asarray(0.5)


def keyless(f, y):
    m = cp.sample("m", Constant(0.0, 1.0))
    cp.observe("y", dist.StudentT(3.0, cp.sample("x", f)[0] + m, 1.0), y)


Y = np.array([0.1, -0.2, 0.3])
PROGRAMS = {
    "a product": (plain, MODEL),
    "annealed exactly": (exact, NORMAL, jnp.array(0.4)),
    "a closed form that fails": (exact, MODEL, jnp.array(0.4)),
    "every policy": (policies, MODEL, jnp.array(0.4)),
    "a hierarchy": (hierarchy, NORMAL, Y),
    "plates": (plates, NORMAL, Y),
    "a factor of a latent": (moved, NORMAL, jnp.array(0.4)),
    "held latents": (held, MODEL),
    "a draw that takes no key": (keyless, NORMAL, jnp.array(0.4)),
    "a Python number as data": (exact, NORMAL, 0.4),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_run_three_times(name):
    function, *arguments = PROGRAMS[name]
    runs = 0

    @functools.wraps(function)
    def counted(*args):
        nonlocal runs
        runs += 1
        function(*args)

    density = cp.compile(cp.program(counted), *arguments)
    # Soft evidence is followed out along rays as well, once for each policy.
    assert runs <= (8 if name == "every policy" else 3)  # with numbers, with others for scales, with tracers
    position = jax.eval_shape(density.initial, jax.random.key(0))
    assert {name: site.shape for name, site in density.sites.items()} == {n: x.shape for n, x in position.items()}
    assert jax.eval_shape(lambda at: density.log_density(at, 0), position).shape == ()


def line(function, words):
    """``file:line`` of the line of a function that holds these words."""
    lines, start = inspect.getsourcelines(function)
    return f"test_trace.py:{start + next(i for i, text in enumerate(lines) if words in text)}"


def by_if(f, y):
    x = cp.sample("x", f)
    cp.observe("z", dist.Normal(x[0] if y > 0 else x[1], 0.1), y)


def by_mean(f, y):
    x = cp.sample("x", f)
    cp.observe("z", dist.Normal(x[0], 0.1 if jnp.mean(y) > 0 else 0.2), y)


def by_float(f, y):
    x = cp.sample("x", f)
    cp.observe("z", dist.Normal(x[0] + float(y), 0.1), 0.2)


def by_asarray(f, y):
    x = cp.sample("x", f)
    cp.observe("z", dist.Normal(x[0] + np.asarray(y), 0.1), 0.2)


def by_range(f, y):
    x = cp.sample("x", f)
    cp.observe("z", dist.Normal(sum(x[0] * i for i in range(int(y))), 0.1), 0.2)


def by_mask(f, y):
    x = cp.sample("x", f)
    cp.observe("z", dist.Normal(x[0] + y[y > 0].sum(), 0.1), 0.2)


def by_if_alone(f, y):
    cp.sample("x", f if y > 0 else f**2)


ASKING = {
    "if": (by_if, "if y > 0", jnp.array(3.0)),
    "if of a mean": (by_mean, "jnp.mean", np.array([1.0, 2.0])),
    "float": (by_float, "float(y)", jnp.array(3.0)),
    "numpy": (by_asarray, "np.asarray", jnp.array(3.0)),
    "range": (by_range, "range(int", jnp.array(3.0)),
    "mask": (by_mask, "y[y > 0]", jnp.array([1.0, -1.0])),
    "if without observations": (by_if_alone, "if y > 0", jnp.array(3.0)),
}


@pytest.mark.parametrize("name", ASKING)
def test_data_that_become_constants_are_named_with_their_line(name):
    function, words, y = ASKING[name]
    runs = 0

    @functools.wraps(function)
    def counted(*args):
        nonlocal runs
        runs += 1
        function(*args)

    density = cp.compile(cp.program(counted), NORMAL, y)
    assert runs <= 4
    (said,) = [text for text in str(density).splitlines() if "constant" in text]
    assert line(function, words) in said
    assert " y" in said


def test_compiled_code_has_the_numbers_that_a_program_has_asked_for():
    score, position = eqx.filter_jit(lambda density, x: density.score(x, 2)["x"]), {"x": jnp.array([0.3, -0.2])}
    for y in (3.0, 4.0):
        density = cp.compile(cp.program(by_float), NORMAL, jnp.array(y))
        of_its_own = jax.jit(lambda x, density=density: density.score(x, 2)["x"])
        np.testing.assert_allclose(score(density, position), of_its_own(position), rtol=1e-5)


def settings(f, y, count, weight, flag, power):
    x = cp.sample("x", f ** (power if flag else 1.0))
    for i in range(count):
        mean = x[0] * weight if weight > 0.5 else x[1]
        cp.observe(f"y{i}", dist.Normal(mean + y[: len(y) // 2].sum() * y.shape[0] / max(y.ndim, 1), 0.1), 0.2)


@pytest.mark.parametrize("power", [2.0, np.float32(2.0), jnp.array(2.0)])
def test_nothing_is_said_of_shapes_and_settings_and_powers(power):
    density = cp.compile(cp.program(settings), NORMAL, jnp.ones(4), 2, 0.7, True, power)
    assert "constant" not in str(density)


def test_only_what_is_asked_for_is_compiled_in():
    """New data reuse compiled code beside a number that the program has been asked for."""
    traces = 0

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
        score(density, {"x": jnp.ones(2)})
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
    assert ["".join(sorted(names)) for names in found] == ["a", "b", "ab", "ab", "c", "", "b"]


@pytest.mark.parametrize("options", [None, {"xla_no_such_option": 1}], ids=["known", "unknown"])
def test_what_runs_once_runs_where_xla_does_not_know_an_option(options):
    assert once(lambda x: 2.0 * x, options)(jnp.ones(())) == 2.0
    with pytest.raises(TypeError):
        once(lambda x: x + "1", options)(jnp.ones(()))
