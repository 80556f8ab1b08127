"""What NumPyro's and the library's statements mean inside a program, and how a run of it leaves no trace."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.primitives import _PYRO_STACK

import composeprob as cp
from composeprob.errors import ComposeProbError, ProgramError
from composeprob.language.interpret import run
from refusals import refused
from sampling_cases import SCHEDULE, normal

F = normal()


def statements(program, *args):
    """Every statement of a program with zeros for its latents."""
    return run(program.function, args, {}, lambda kind, name, fn: jnp.zeros(fn.shape()))


def log_density(density, level=0, **position):
    return float(density.log_density({name: jnp.asarray(value, float) for name, value in position.items()}, level))


def test_kinds():
    @cp.program
    def every_kind(f):
        x = cp.sample("x", f)
        z = numpyro.sample("z", dist.Normal(0, 1))
        w = cp.sample("w", dist.Normal(z, 1))
        numpyro.deterministic("sum", x + w)
        cp.observe("y", dist.Normal(x, 1), 0.5)
        numpyro.sample("y2", dist.Normal(z, 1), obs=0.5)
        cp.factor("soft", -(x**2))
        numpyro.factor("soft2", -(z**2))

    kinds = {name: s.kind for name, s in statements(every_kind, F).items()}
    assert kinds == {
        "x": "noised",
        "z": "static",
        "w": "static",
        "sum": "deterministic",
        **dict.fromkeys(("y", "y2", "soft", "soft2"), "observed"),
    }
    density = cp.compile(every_kind, F)
    assert {name: site.kind for name, site in density.sites.items()} == {"x": "noised", "z": "static", "w": "static"}
    samples = density.to_samples({"x": jnp.array(1.0), "z": jnp.array(2.0), "w": jnp.array(3.0)})
    alpha = float(SCHEDULE.alpha[0])
    assert float(samples["sum"]) == pytest.approx(1 / alpha + 3)


def test_density_of_a_program_is_the_product_of_its_statements():
    @cp.program
    def model(f, y):
        x = cp.sample("x", f)
        m = cp.sample("m", dist.Normal(0.5, 2.0))
        cp.observe("y", dist.Normal(x + m, 0.3), y)
        cp.factor("soft", -0.1 * x**2)

    density = cp.compile(model, F, 0.7)
    alpha, sigma = float(SCHEDULE.alpha[0]), float(SCHEDULE.sigma[0])
    x, m = 0.4, -0.2
    clean = x / alpha
    expected = (
        dist.Normal(0, jnp.hypot(alpha, sigma)).log_prob(x)
        + dist.Normal(0.5, 2.0).log_prob(m)
        + dist.Normal(clean + m, 0.3).log_prob(0.7)
        - 0.1 * clean**2
    )
    assert log_density(density, x=x, m=m) == pytest.approx(float(expected), abs=1e-4)


def test_handlers_scale_and_mask_observations_and_priors():
    @cp.program
    def model(f, mask):
        x = cp.sample("x", f)
        with numpyro.handlers.scale(scale=3.0):
            m = cp.sample("m", dist.Normal(0, 1))
        with numpyro.handlers.mask(mask=mask):
            cp.observe("y", dist.Normal(x + m, 1), jnp.array([1.0, 100.0]))

    density = cp.compile(model, F, jnp.array([True, False]))
    a = log_density(density, x=0.0, m=0.5) - log_density(density, x=0.0, m=0.0)
    expected = 3 * -0.5 * 0.25 + (-0.5 * 0.25 + 0.5)
    assert a == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "handler",
    [
        numpyro.handlers.scale(scale=2.0),
        numpyro.handlers.mask(mask=False),
        numpyro.handlers.condition(data={"x": jnp.array(0.3)}),
        numpyro.handlers.substitute(data={"x": jnp.array(0.3)}),
    ],
    ids=["scale", "mask", "condition", "substitute"],
)
def test_handlers_that_a_factor_cannot_follow_are_refused_not_ignored(handler):
    @cp.program
    def model(f):
        with handler:
            return cp.sample("x", f)

    refused(lambda: cp.compile(model, F), ProgramError, r"factor at site 'x'.*handler[\s\S]*Fix: write f \*\* w")


def test_substitute_and_do_put_a_number_in_the_place_of_a_latent():
    @cp.program
    def model(f):
        x = cp.sample("x", f)
        with numpyro.handlers.substitute(data={"m": 2.0}):
            m = cp.sample("m", dist.Normal(0, 1))
        with numpyro.handlers.do(data={"k": 3.0}):
            k = cp.sample("k", dist.Normal(0, 1))
        numpyro.deterministic("seen", x + m + k)

    density = cp.compile(model, F)
    assert "m" not in density.sites
    samples = density.to_samples({"x": jnp.array(0.0), **_rest(density)})
    assert {name: float(samples[name]) for name in ("m", "seen")} == pytest.approx({"m": 2.0, "seen": 5.0})


def test_the_prior_of_a_substituted_latent_counts():
    """As in NumPyro's log-density: x is told of by m, although nothing else looks at m."""

    @cp.program
    def model(f):
        x = cp.sample("x", f)
        with numpyro.handlers.substitute(data={"m": 2.0}):
            cp.sample("m", dist.Normal(x, 0.5))

    density = cp.compile(model, F)
    alpha = float(SCHEDULE.alpha[0])
    moved = log_density(density, x=alpha) - log_density(density, x=0.0)
    expected = dist.Normal(1.0, 0.5).log_prob(2.0) - dist.Normal(0.0, 0.5).log_prob(2.0)
    expected += cp.compile(cp.program(lambda: cp.sample("x", F))).log_density({"x": jnp.array(alpha)}, 0)
    expected -= cp.compile(cp.program(lambda: cp.sample("x", F))).log_density({"x": jnp.array(0.0)}, 0)
    assert moved == pytest.approx(float(expected), abs=1e-3)


def _rest(density):
    return {name: jnp.zeros(site.shape) for name, site in density.sites.items() if name != "x"}


def test_reparameterised_latents():
    @cp.program
    def model(f):
        x = cp.sample("x", f)
        with numpyro.handlers.reparam(config={"m": numpyro.infer.reparam.LocScaleReparam(0)}):
            m = cp.sample("m", dist.Normal(3.0, 2.0))
        cp.observe("y", dist.Normal(x + m, 1.0), 0.0)

    density = cp.compile(model, F)
    assert set(density.sites) == {"x", "m_decentered"}
    samples = density.to_samples({"x": jnp.array(0.0), "m_decentered": jnp.array(0.5)})
    assert float(samples["m"]) == pytest.approx(4.0)


@pytest.mark.slow
def test_plates_make_independent_copies():
    @cp.program
    def model(f):
        with numpyro.plate("objects", 3):
            x = cp.sample("x", f)
            m = cp.sample("m", dist.Normal(0, 1))
            cp.observe("y", dist.Normal(x + m, 0.5), jnp.arange(3.0))

    density = cp.compile(model, F)
    assert density.sites["x"].shape == (3,)
    score = density.score({"x": jnp.array([0.1, 0.2, 0.3]), "m": jnp.zeros(3)}, 0)
    alpha = float(SCHEDULE.alpha[0])
    x = np.array([0.1, 0.2, 0.3])
    assert np.allclose(score["m"], (np.arange(3) - x / alpha) / 0.25, atol=1e-3)


def test_constrained_latents_are_moved_without_constraints():
    @cp.program
    def model(f):
        cp.sample("x", f)
        cp.sample("rate", dist.Gamma(2.0, 1.0))
        cp.sample("shares", dist.Dirichlet(jnp.ones(3)))

    density = cp.compile(model, F)
    assert density.sites["shares"].shape == (2,)
    samples = density.to_samples({"x": jnp.array(0.0), "rate": jnp.array(-1.0), "shares": jnp.zeros(2)})
    assert float(samples["rate"]) > 0
    assert float(samples["shares"].sum()) == pytest.approx(1.0)
    u = jnp.array(-1.0)  # the density in u carries the Jacobian of its bijection
    z = dist.biject_to(dist.constraints.positive)(u)
    jacobian = dist.biject_to(dist.constraints.positive).log_abs_det_jacobian(u, z)
    rest = {"x": 0.0, "shares": jnp.zeros(2)}
    difference = log_density(density, rate=-1.0, **rest) - log_density(density, rate=0.0, **rest)
    other = dist.Gamma(2.0, 1.0).log_prob(1.0) + 0.0
    assert difference == pytest.approx(float(dist.Gamma(2.0, 1.0).log_prob(z) + jacobian - other), abs=1e-4)


def test_programs_call_programs():
    @cp.program
    def part(f):
        return cp.sample("x", f)

    @cp.program
    def whole(f):
        with numpyro.handlers.scope(prefix="left"):
            a = part(f)
        with numpyro.handlers.scope(prefix="right"):
            b = part(f)
        cp.observe("y", dist.Normal(a + b, 1.0), 0.0)

    assert set(cp.compile(whole, F).sites) == {"left/x", "right/x"}

    @cp.program
    def clash(f):
        part(f)
        part(f)

    refused(lambda: cp.compile(clash, F), ProgramError, r"Two sites are called 'x'[\s\S]*scope")


def test_policies_nest_and_the_nearest_wins():
    @cp.program
    def model(f):
        x = cp.sample("x", f)
        with cp.annealed("denoised"):
            cp.observe("outer", dist.Normal(x, 1.0), 0.0)
            with cp.annealed("noised"):
                cp.observe("inner", dist.Normal(x, 1.0), 0.0)
                numpyro.factor("numpyro", -(x**2))
                cp.observe("own", dist.Normal(x, 1.0), 0.0, anneal="tempered")
                cp.factor("levelled", lambda level: -level * x**2)
            cp.factor("after", -(x**2))
        cp.observe("bare", dist.Normal(x, 1.0), 0.0)

    policies = {name: s.anneal and str(s.anneal) for name, s in statements(model, F).items() if s.kind == "observed"}
    assert policies == {
        "outer": "denoised",
        "inner": "noised",
        "numpyro": "noised",
        "own": "tempered",
        "levelled": "noised",
        "after": "denoised",
        "bare": None,  # left to the compiler
    }


def test_functions_of_the_level():
    @cp.program
    def model(f):
        x = cp.sample("x", f)
        cp.factor("soft", lambda level: -jnp.float32(level) * x, anneal="noised")

    density = cp.compile(model, F)
    slope = [float(density.score({"x": jnp.array(0.2)}, k)["x"]) for k in (0, 5)]
    bare = [float(cp.compile(_bare, F).score({"x": jnp.array(0.2)}, k)["x"]) for k in (0, 5)]
    assert np.allclose(np.subtract(slope, bare), [0.0, -5.0], atol=1e-4)


@cp.program
def _bare(f):
    return cp.sample("x", f)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, ComposeProbError])
def test_an_exception_leaves_nothing_behind(error):
    depth = len(_PYRO_STACK)

    @cp.program
    def broken(f):
        cp.sample("x", f)
        with cp.annealed("noised"), numpyro.plate("n", 2):
            raise error("on purpose")

    with pytest.raises(error, match="on purpose"):
        cp.compile(broken, F)
    assert len(_PYRO_STACK) == depth
    assert set(cp.compile(_bare, F).sites) == {"x"}


def test_places_are_the_users_lines():
    @cp.program
    def model(f):
        x = cp.sample("x", f)  # line 1 after the def
        cp.observe("y", dist.Normal(x, 1.0), 0.0)

    first = model.function.__code__.co_firstlineno
    where = {name: s.where for name, s in statements(model, F).items()}
    assert where == {"x": f"test_statements.py:{first + 2}", "y": f"test_statements.py:{first + 3}"}
    text = str(cp.compile(model, F))
    assert where["x"] in text
    assert where["y"] in text


def test_a_program_is_still_a_function():
    assert _bare.name == "_bare"
    assert "test_statements.py" in repr(_bare)
    with numpyro.handlers.seed(rng_seed=0), numpyro.handlers.trace() as trace:
        numpyro.sample("outside", dist.Normal(0, 1))
    assert set(trace) == {"outside"}


def test_observations_that_see_no_noised_site_rise_to_full_power():
    @cp.program
    def model(f):
        cp.sample("x", f)
        m = cp.sample("m", dist.Normal(0, 1))
        cp.observe("y", dist.Normal(m, 0.5), 1.0)

    density = cp.compile(model, F)
    scores = [float(density.score({"x": jnp.array(0.0), "m": jnp.array(0.0)}, k)["m"]) for k in (0, 8, 31)]
    assert np.allclose(scores, [4.0, 4.0, 0.0], atol=1e-4)


def test_scores_under_a_policy_are_gradients():
    @cp.program
    def model(f):
        x = cp.sample("x", f)
        cp.observe("y", dist.Normal(x, 0.5), 1.0, anneal="denoised")

    density = cp.compile(model, F)
    by_grad = jax.jit(jax.grad(density.log_density))
    for level in (0, 12, 31):
        position = {"x": jnp.array(0.3)}
        gradient = by_grad(position, level)
        assert float(density.score(position, level)["x"]) == pytest.approx(float(gradient["x"]), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("array", [np.zeros(2), jnp.zeros(2)], ids=["numpy", "jax"])
def test_an_array_in_the_place_of_a_distribution_is_called_an_array(array):
    for statement in (lambda: cp.sample("x", array), lambda: cp.observe("x", array, 1.0)):
        refused(statement, cp.errors.WrongTypeError, r"needs a .*; got an array")
