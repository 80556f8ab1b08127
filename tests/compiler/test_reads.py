"""Values that programs and functions read besides their arguments: they count as they
are at `cp.compile`, and are never stale."""

import types

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from compiler.networks import score_by_one_trace
from composeprob.errors import DoublyIntractableError, ProgramError
from composeprob.factors.equations import fingerprint
from composeprob.factors.networks import closures
from refusals import refused
from sampling_cases import both, learned

LEVELS = cp.Schedule.log_snr(10)
NORMAL = cp.Analytic(dist.Normal(0.0, 1.0), LEVELS)
ALPHA = float(LEVELS.alpha[0])
X = {"x": jnp.float32(0.5)}
at_once = eqx.filter_jit(lambda density, x: density.score(x, 0)["x"])
"""The score at level 0; one cache of compiled code for all tests."""

number = 0.0
holder = types.SimpleNamespace(value=0.0)
table = {"y": np.zeros(1)}


def by_helper():
    return number


def reads(f):
    """Data of each site from elsewhere, as they are when it runs."""
    elsewhere = {
        "global": number,
        "helper": by_helper(),
        "attribute": holder.value,
        "in place": table["y"].sum(),
    }
    for name, value in elsewhere.items():
        cp.observe(f"y {name}", dist.Normal(cp.sample(name, f), 0.5), value)
    cp.observe("mean", dist.Normal(cp.sample("in a mean", f) - by_helper(), 0.5), 0.0)
    cp.factor("soft", -2.0 * (cp.sample("in soft evidence", f) - number) ** 2)


def reads_global(f):
    cp.observe("y", dist.Normal(cp.sample("x", f), 0.5), number)


class Tilted(dist.Normal):
    def log_prob(self, value):
        return super().log_prob(value) + number * value / 0.3**2


def reads_in_priors(f):
    for name, prior in {
        "of a number": dist.Normal(number, 0.3),
        "by its density": Tilted(0.0, 0.3),
    }.items():
        m = cp.sample(name, prior)
        cp.observe(f"y {name}", dist.Normal(cp.sample(f"x {name}", f), 0.4), m)


def put(value):
    """Every way in which a value outside of a program becomes another."""
    global number
    number = holder.value = value
    table["y"][:] = np.asarray(value)


@pytest.mark.parametrize("kind", [float, np.array, jnp.float32])
def test_a_program_compiled_again_reads_what_is_there_now(kind):
    """x ~ N(0, 1), y | x ~ N(x, 0.5²): the score at x is −x − 4·(x − y)."""
    score = eqx.filter_jit(lambda density, position: density.score(position, 0))
    for value in (1.0, -1.5):
        put(kind(value))
        density = cp.compile(cp.program(reads), NORMAL)
        position = {name: jnp.float32(0.5) for name in density.sites}
        wanted = -0.5 - 4 * (0.5 / ALPHA - value) / ALPHA
        for found in (score(density, position), density.score(position, 0)):
            assert len(found) == 6
            for name in found:
                np.testing.assert_allclose(found[name], wanted, rtol=1e-4, err_msg=name)


def test_priors_read_what_is_there_now():
    score = eqx.filter_jit(lambda density, position: density.score(position, 0))
    for value in (0.0, 2.0):
        put(value)
        density = cp.compile(cp.program(reads_in_priors), NORMAL)
        position = dict.fromkeys(density.sites, jnp.float32(0.2))
        position |= {name: jnp.float32(0.5) for name in position if name[0] == "x"}
        wanted = -(0.2 - value) / 0.3**2 - (0.2 - 0.5 / ALPHA) / 0.4**2
        found = score(density, position)
        np.testing.assert_allclose(
            [found["of a number"], found["by its density"]], wanted, rtol=1e-4
        )


def test_a_table_that_a_function_of_the_level_reads():
    weights = np.zeros(10, np.float32)

    def leveled(f):
        x = cp.sample("x", f)
        cp.factor(
            "w",
            lambda level: jnp.where(level == 4, float(weights[4]), 0.0) * x,
            anneal="noised",
        )

    slope = eqx.filter_jit(lambda density: density.score(X, 4)["x"] + 0.5)
    for value in (1.0, 3.0):
        weights[4] = value
        np.testing.assert_allclose(
            slope(cp.compile(cp.program(leveled), NORMAL)), value, rtol=1e-5
        )


def test_a_program_that_reads_something_else_by_now_is_refused():
    put(1.0)
    density = cp.compile(cp.program(reads_global), NORMAL)
    before = at_once(density, X)
    put(2.0)
    assert at_once(density, X) == before  # compiled code has the values of then
    for run in (
        lambda: jax.jit(density.score)(X, 0),
        lambda: density.on(cp.Schedule.log_snr(12)),
        density.observed,
        lambda: cp.infer(density, jax.random.key(0), num_chains=4, progress=False),
    ):
        refused(run, ProgramError)
    put(1.0)
    np.testing.assert_allclose(jax.jit(density.score)(X, 0)["x"], before, rtol=1e-5)


def test_a_program_reads_the_same_on_a_mesh():
    """Traced there, its own arrays are sharded over no axis of the mesh, which is no
    other program."""

    @cp.program
    def scene(f):
        scale = cp.sample("scale", dist.HalfNormal(1.0))
        cp.observe(
            "y",
            dist.Normal(jnp.array([1.0, 2.0]) * cp.sample("x", f), scale),
            jnp.zeros(2),
        )

    density = cp.compile(scene, NORMAL)
    at = jax.shard_map(
        lambda x: density.evaluator({"x": x, "scale": x}, 0).log_density,
        mesh=jax.make_mesh((1,), ("i",)),
        in_specs=jax.sharding.PartitionSpec(),
        out_specs=jax.sharding.PartitionSpec(),
        check_vma=False,
    )
    assert np.isfinite(jax.jit(at)(X["x"]))


def test_a_program_of_random_numbers_is_refused():
    rng = np.random.default_rng(0)

    def noisy(f):
        cp.observe("y", dist.Normal(cp.sample("x", f), 0.5), rng.normal())

    refused(
        lambda: cp.compile(cp.program(noisy), NORMAL).score(X, 0),
        ProgramError,
    )


def energy(x, level):
    return -2.0 * (x - number) ** 2


def score(x, t):
    return -4.0 * (x - number)


def logits(x, t):
    return jnp.stack([-2.0 * (x - number) ** 2, 0.0 * x])


def of_energy():
    return cp.Energy(energy, LEVELS, event_shape=(), top_power=0.0)


def of_score():
    return cp.Diffusion(score, LEVELS, event_shape=(), parameterization="score")


def of_conditioned_score():
    def network(x, t, c):
        return score(x, t) - c

    f = learned(network, "score", LEVELS, (), "level", conditions=("c",))
    return f.given(c=0.0)


def of_classifier():
    return cp.Classifier(logits, LEVELS, event_shape=()).given(label=0)


FUNCTIONS = {
    "energy": (of_energy, lambda v: -4 * (0.5 - v)),
    "score": (of_score, lambda v: -4 * (0.5 - v)),
    "score with a condition": (of_conditioned_score, lambda v: -4 * (0.5 - v)),
    "classifier": (
        of_classifier,
        lambda v: -4 * (0.5 - v) / (1 + np.exp(-2 * (0.5 - v) ** 2)),
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_factor_reads_what_is_there_when_the_program_is_compiled(name):
    """Arrays that its function reads are leaves: others of that shape reuse compiled
    code."""
    make, of_x = FUNCTIONS[name]
    scored = score_by_one_trace()
    put(jnp.float32(1.0))
    factor = make()
    for value in (1.0, -1.0, 1.0):
        put(jnp.float32(value))
        density = cp.compile(both, NORMAL, factor)
        put(jnp.float32(7.0))  # not read any more
        shared = scored(density, X, 0)
        np.testing.assert_allclose(shared, -0.5 + of_x(value), rtol=1e-5)
        np.testing.assert_allclose(density.score(X, 0)["x"], shared, rtol=1e-5)


def test_the_code_of_a_function_holds_no_array_that_it_reads():
    """It is static, so compiled code would keep the arrays for ever."""
    put(jnp.float32(1.0))
    (function,) = closures(cp.compile(both, NORMAL, of_energy()).evaluator)
    assert [float(constant) for constant in function.constants] == [1.0]
    assert not getattr(function.code.jaxpr, "consts", [])


def test_levels_of_a_density_whose_functions_read_something_else_by_now():
    put(jnp.float32(1.0))
    density = cp.compile(both, NORMAL, of_energy())
    fewer = LEVELS.every(2)
    np.testing.assert_allclose(
        density.on(fewer).score(X, 0)["x"], density.score(X, 0)["x"]
    )
    put(jnp.float32(2.0))
    refused(lambda: density.on(fewer), ProgramError)


def closing_over(make):
    def closes(f, y):
        c = cp.sample("c", dist.Normal(0.0, 1.0))
        cp.observe("y", dist.Normal(cp.sample("x", f * make(c)), 0.3), y)

    return cp.program(closes)


def energy_of(c):
    return cp.Energy(
        lambda x, level: -2.0 * (x - c) ** 2,
        LEVELS,
        event_shape=(),
        top_power=0.0,
        label="e",
    )


CLOSING = {
    "energy": energy_of,
    "score": lambda c: cp.Diffusion(
        lambda x, t: c - x, LEVELS, event_shape=(), parameterization="score"
    ),
    "score under conditions": lambda c: cp.product(
        cp.Diffusion(
            lambda x, t, *, d: c - x - d,
            LEVELS,
            event_shape=(),
            parameterization="score",
            conditions=("d",),
        ),
        over={"d": jnp.zeros(3)},
    ),
    "classifier": lambda c: cp.Classifier(
        lambda x, t: jnp.stack([x, c]), LEVELS, event_shape=()
    ).given(label=0),
    "in a mixture": lambda c: cp.mixture(
        [NORMAL, energy_of(c)], log_weights=[0.0, 0.0]
    ),
}


@pytest.mark.parametrize("name", CLOSING)
def test_a_function_that_closes_over_a_latent_is_refused(name):
    program = closing_over(CLOSING[name])
    refused(lambda: cp.compile(program, NORMAL, 2.0), DoublyIntractableError, "'c'")


def test_a_function_that_closes_over_data_is_not():
    """New data reuse compiled code there too."""
    scored = score_by_one_trace()
    program = cp.program(lambda f, y: cp.sample("x", f * energy_of(y)))
    for y in (1.0, 2.0):
        density = cp.compile(program, NORMAL, jnp.float32(y))
        np.testing.assert_allclose(
            scored(density, X, 0), -0.5 - 4 * (0.5 - y), rtol=1e-5
        )


def test_ancestral_order_follows_what_a_function_closes_over():
    """Nothing looks at x: c keeps its draw of the prior, and x is drawn given that
    c."""

    def closes(f):
        c = cp.sample("c", dist.Normal(0.0, 1.0))
        cp.sample("x", f * energy_of(c), conditional=True)

    density = cp.compile(cp.program(closes), NORMAL)
    assert density.sites["c"].kind == "held"
    for c in (0.0, 2.0):
        found = density.score({**X, "c": jnp.float32(c)}, 0)
        np.testing.assert_allclose(
            [found["x"], found["c"]], [-0.5 - 4 * (0.5 - c), 0.0], rtol=1e-5
        )


def test_functions_that_are_called_back_are_those_of_the_density():
    """Two energies of the same equations: compiled code holds the function that it
    calls back."""

    def calling_back(append):
        def energy(x, level):
            jax.debug.callback(append, x)
            return -2.0 * x**2

        return cp.compile(
            both, NORMAL, cp.Energy(energy, LEVELS, event_shape=(), top_power=0.0)
        )

    for found in [], []:
        density = calling_back(found.append)
        jax.effects_barrier()
        found.clear()  # what was called as the energy was followed out along rays
        jax.block_until_ready(at_once(density, X))
        jax.effects_barrier()
        assert found == [0.5]


def test_a_program_that_makes_its_callback_anew_is_no_other_program():
    def calls_back(f):
        x = cp.sample("x", f)
        jax.debug.callback(lambda x: None, x)
        cp.observe("y", dist.Normal(x, 0.5), 0.0)

    density = cp.compile(cp.program(calls_back), NORMAL)
    np.testing.assert_allclose(
        density.score(X, 0)["x"], -0.5 - 2.0 / ALPHA**2, rtol=1e-4
    )


def test_fingerprints_tell_numbers_and_not_objects():
    def told(a, b=0.1):
        def step(x):
            return jax.nn.relu(x) * a + jax.jit(lambda y: y + b)(x)

        return fingerprint(jax.make_jaxpr(jax.checkpoint(step))(jnp.ones(2)))

    assert told(jnp.arange(2.0)) == told(np.arange(2.0, dtype=np.float32))
    others = [
        told(jnp.arange(2.0)),
        told(jnp.arange(1.0, 3.0)),
        told(jnp.arange(2.0), 0.2),
        told(2.0),
        told(3.0),
    ]
    assert len(set(others)) == len(others)
