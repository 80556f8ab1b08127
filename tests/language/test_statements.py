"""Statements inside a program, runs that leave no trace, and annealing policies as
objects."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.compiler.denoised import Denoised
from composeprob.errors import (
    CapabilityError,
    ComposeProbError,
    InvalidValueError,
    ProgramError,
    WrongTypeError,
)
from composeprob.language.interpret import run
from composeprob.language.policies import POLICIES, Policy
from composeprob.language.statements import active_handlers
from refusals import refused
from sampling_cases import SCHEDULE, measured, normal, single

F = normal()
ALPHA, SIGMA = float(SCHEDULE.alpha[0]), float(SCHEDULE.sigma[0])


def statements(program, *args):
    """Every statement of a program with zeros for its latents."""
    return run(program.function, args, {}, lambda kind, name, fn: jnp.zeros(fn.shape()))


@cp.program
def every_kind(f, y, mask):
    x = cp.sample("x", f)
    z = numpyro.sample("z", dist.Normal(0.5, 2.0))
    w = cp.sample("w", dist.Normal(z, 1))
    with numpyro.handlers.scale(scale=3.0):
        m = cp.sample("m", dist.Normal(0, 1))
    with numpyro.handlers.substitute(data={"s": 2.0}):
        s = cp.sample("s", dist.Normal(x, 0.5))
    with numpyro.handlers.do(data={"k": 3.0}):
        k = cp.sample("k", dist.Normal(0, 1))
    with numpyro.handlers.reparam(
        config={"r": numpyro.infer.reparam.LocScaleReparam(0)}
    ):
        r = cp.sample("r", dist.Normal(3.0, 2.0))
    cp.sample("rate", dist.Gamma(2.0, 1.0))
    cp.sample("shares", dist.Dirichlet(jnp.ones(3)))
    numpyro.deterministic("sum", x + w + s + k)
    cp.observe("y", dist.Normal(x + z, 0.3), y)
    numpyro.sample("y2", dist.Normal(r, 1), obs=0.5)
    with numpyro.handlers.mask(mask=mask):
        cp.observe("masked", dist.Normal(x + m, 1), jnp.array([1.0, 100.0]))
    cp.factor("soft", -0.1 * x**2)
    numpyro.factor("soft2", -(w**2))


LATENTS = ("z", "w", "m", "r_decentered", "rate", "shares")
MASK = jnp.array([True, False])


def test_kinds():
    kinds = {
        name: s.kind
        for name, s in statements(every_kind, F, 0.7, MASK).items()
        if name not in ("s", "k", "r")
    }
    of_data = dict.fromkeys(("y", "y2", "masked", "soft", "soft2"), "observed")
    assert kinds == {
        "x": "noised",
        **dict.fromkeys(LATENTS, "static"),
        "sum": "deterministic",
        **of_data,
    }


def test_deterministics_are_read_where_every_site_is_noised():
    @cp.program
    def doubled(f):
        numpyro.deterministic("twice", 2 * cp.sample("x", f))

    read = cp.compile(doubled, F).evaluator.read({"x": jnp.ones(F.event_shape)})
    np.testing.assert_allclose(read["twice"], 2 / ALPHA, rtol=1e-6)


def test_the_density_of_a_program_is_the_product_of_its_statements():
    """The product has the priors of latents that handlers replace, as in NumPyro's
    log-density. The density of an unconstrained coordinate has the Jacobian of its
    bijection."""
    density = cp.compile(every_kind, F, 0.7, MASK)
    kinds = {name: site.kind for name, site in density.sites.items()}
    assert kinds == {"x": "noised", "k": "static"} | dict.fromkeys(LATENTS, "static")
    x, z, w, m, v, u = (jnp.array(a) for a in (0.4, -0.2, 0.3, 0.5, 0.6, -1.0))
    simplex = dist.biject_to(dist.constraints.simplex)
    assert density.sites["shares"].shape == (2,)
    values = (x, z, w, m, v, u, jnp.zeros(2))
    position = dict(zip(("x", *LATENTS), values, strict=True))
    position["k"] = jnp.array(0.9)
    clean = x / ALPHA
    shares = simplex(jnp.zeros(2))
    expected = (
        dist.Normal(0, jnp.hypot(ALPHA, SIGMA)).log_prob(x)
        + dist.Normal(0.5, 2.0).log_prob(z)
        + dist.Normal(z, 1.0).log_prob(w)
        + 3 * dist.Normal(0.0, 1.0).log_prob(m)
        + dist.Normal(clean, 0.5).log_prob(2.0)
        + dist.Normal(0.0, 1.0).log_prob(v)
        # of k, which is moved although 3 stands in its place
        + dist.Normal(0.0, 1.0).log_prob(0.9)
        + dist.Gamma(2.0, 1.0).log_prob(jnp.exp(u))
        + u
        + dist.Dirichlet(jnp.ones(3)).log_prob(shares)
        + simplex.log_abs_det_jacobian(jnp.zeros(2), shares)
        + dist.Normal(clean + z, 0.3).log_prob(0.7)
        + dist.Normal(3 + 2 * v, 1.0).log_prob(0.5)
        + dist.Normal(clean + m, 1.0).log_prob(1.0)
        - 0.1 * clean**2
        - w**2
    )
    log_density = float(density.log_density(position, 0))
    assert log_density == pytest.approx(float(expected), abs=1e-4)
    samples = density.to_samples(position)
    named = {"sum": clean + w + 5.0, "s": 2.0, "r": 3 + 2 * v, "rate": jnp.exp(u)}
    for name, value in named.items():
        assert float(samples[name]) == pytest.approx(float(value))
    np.testing.assert_allclose(samples["shares"], shares, rtol=1e-6)


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

    refused(
        lambda: cp.compile(model, F),
        ProgramError,
    )


def test_programs_call_programs():
    @cp.program
    def whole(f):
        with numpyro.handlers.scope(prefix="left"):
            a = single(f)
        with numpyro.handlers.scope(prefix="right"):
            b = single(f)
        cp.observe("y", dist.Normal(a + b, 1.0), 0.0)

    assert set(cp.compile(whole, F).sites) == {"left/x", "right/x"}

    @cp.program
    def clash(f):
        single(f)
        single(f)

    refused(
        lambda: cp.compile(clash, F),
        ProgramError,
    )


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
        with cp.annealed(Between(0.25)):
            cp.observe("object", dist.Normal(x, 1.0), 0.0)
        cp.observe("bare", dist.Normal(x, 1.0), 0.0)

    policies = {
        name: s.anneal and str(s.anneal)
        for name, s in statements(model, F).items()
        if s.kind == "observed"
    }
    assert policies == {
        "outer": "denoised",
        "inner": "noised",
        "numpyro": "noised",
        "own": "tempered",
        "levelled": "noised",
        "after": "denoised",
        "object": "between(share=0.25)",
        "bare": None,  # left to the compiler
    }


def test_functions_of_the_level_and_the_rising_power_of_data_without_a_noised_site():
    @cp.program
    def model(f):
        x = cp.sample("x", f)
        cp.factor("soft", lambda level: -jnp.float32(level) * x, anneal="noised")
        m = cp.sample("m", dist.Normal(0, 1))
        cp.observe("y", dist.Normal(m, 0.5), 1.0)

    density = cp.compile(model, F)
    prior = cp.compile(single, F)
    for level, slope, of_m in ((0, 0.0, 4.0), (5, -5.0, 4.0), (31, -31.0, 0.0)):
        score = density.score({"x": jnp.array(0.2), "m": jnp.array(0.0)}, level)
        of_prior = prior.score({"x": jnp.array(0.2)}, level)["x"]
        np.testing.assert_allclose(score["x"] - of_prior, slope, atol=1e-4)
        np.testing.assert_allclose(score["m"], of_m, atol=1e-4)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, ComposeProbError])
def test_an_exception_leaves_nothing_behind(error):
    assert not active_handlers()

    @cp.program
    def broken(f):
        cp.sample("x", f)
        with cp.annealed("noised"), numpyro.plate("n", 2):
            raise error("on purpose")

    with pytest.raises(error, match="on purpose"):
        cp.compile(broken, F)
    assert not active_handlers()
    assert set(cp.compile(single, F).sites) == {"x"}


def test_places_are_the_users_lines():
    @cp.program
    def model(f):
        x = cp.sample("x", f)  # line 1 after the def
        cp.observe("y", dist.Normal(x, 1.0), 0.0)

    first = model.function.__code__.co_firstlineno
    where = {name: s.where for name, s in statements(model, F).items()}
    assert where == {
        "x": f"test_statements.py:{first + 2}",
        "y": f"test_statements.py:{first + 3}",
    }
    assert all(place in str(cp.compile(model, F)) for place in where.values())


def test_a_program_is_still_a_function():
    assert single.name == "single"
    assert "sampling_cases.py" in repr(single)
    with numpyro.handlers.seed(rng_seed=0), numpyro.handlers.trace() as trace:
        numpyro.sample("outside", dist.Normal(0, 1))
    assert set(trace) == {"outside"}


@pytest.mark.parametrize("array", [np.zeros(2), jnp.zeros(2)], ids=["numpy", "jax"])
def test_an_array_in_the_place_of_a_distribution_is_called_an_array(array):
    for statement in (
        lambda: cp.sample("x", array),
        lambda: cp.observe("x", array, 1.0),
    ):
        refused(statement, cp.errors.WrongTypeError)


SCHEDULE = cp.Schedule.log_snr(20)
PRIOR = cp.Analytic(dist.Normal(jnp.array([0.3, -0.4]), 0.5), SCHEDULE)
X = {"x": jnp.array([0.4, -0.2])}


def sine(x):
    return dist.Normal(jnp.sin(x), 0.3)


@dataclasses.dataclass(frozen=True)
class Between(Policy):
    """A point between x/α and the Tweedie mean, with the power α². Its values at level
    0, where a policy is not called, are wrong."""

    share: float

    def seen(self, x, mean, noise):
        between = (1 - self.share) * x / noise.alpha + self.share * mean
        return jnp.where(noise.index == 0, jnp.nan, between)

    def power(self, schedule, noise):
        return jnp.where(noise.index == 0, 7.0, noise.alpha**2)


def log_likelihood(anneal, level):
    density = cp.compile(measured, PRIOR, sine, jnp.zeros(2), anneal)
    return density.evaluate(X, level).terms.log_potential


@pytest.mark.parametrize("level", [1, 9, 19])
def test_a_policy_of_the_users_is_what_it_says_above_level_0(level):
    noise = SCHEDULE.at(level)
    density = cp.compile(single, PRIOR)
    mean = (X["x"] + noise.sigma**2 * density.score(X, level)["x"]) / noise.alpha
    seen = 0.75 * X["x"] / noise.alpha + 0.25 * mean
    expected = noise.alpha**2 * dist.Normal(jnp.sin(seen), 0.3).log_prob(0.0).sum()
    value = log_likelihood(Between(0.25), level)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "anneal", ["tempered", "denoised", Between(0.25), Between(1.0), Denoised()], ids=str
)
def test_level_0_is_the_posterior_whatever_a_policy_says(anneal):
    expected = dist.Normal(jnp.sin(X["x"] / SCHEDULE.alpha[0]), 0.3).log_prob(0.0).sum()
    np.testing.assert_allclose(log_likelihood(anneal, 0), expected, rtol=1e-6)
    density = cp.compile(measured, PRIOR, sine, jnp.zeros(2), anneal)
    by_grad = jax.jit(jax.grad(lambda x, level: density.log_density({"x": x}, level)))
    for level in (0, 7):
        score = density.score(X, level)["x"]
        np.testing.assert_allclose(score, by_grad(X["x"], level), rtol=1e-4)


def test_policies_are_printed_with_their_settings_and_equal_ones_reuse_compiled_code():
    """An object and its short name are equal ones, too."""

    def compiled(policy):
        return cp.compile(measured, PRIOR, sine, jnp.zeros(2), policy)

    def structure(policy):
        return jax.tree.structure(compiled(policy))

    assert "'between(share=0.25)'" in str(compiled(Between(0.25)))
    assert structure(Between(0.25)) == structure(Between(0.25))
    assert structure(Between(0.25)) != structure(Between(0.5))
    for name in ("tempered", "denoised"):
        assert f"'{name}'" in str(compiled(name))
        assert structure(name) == structure(POLICIES[name])


class Never(Policy):
    """Binds nothing."""

    def bind(self, observation, facts):
        return f"it never binds, not even {observation.name}"


class Linear(Policy):
    """The closed form where there is one, else moments."""

    def bind(self, observation, facts):
        bound = POLICIES["exact"].bind(observation, facts)
        if isinstance(bound, str):
            return POLICIES["moments"].bind(observation, facts)
        return bound


def test_a_policy_that_does_not_bind_is_refused_with_its_reason():
    refused(
        lambda: cp.compile(measured, PRIOR, sine, jnp.zeros(2), Never()),
        CapabilityError,
        "by never: it never binds, not even y",
    )


@pytest.mark.parametrize("policy", [None, Linear()])
def test_a_policy_may_bind_by_the_law_of_another(policy):
    """One that is open and one by its own policy: one closed form of both."""

    @cp.program
    def seen_twice(f):
        x = cp.sample("x", f)
        cp.observe("a", dist.Normal(x[0], 0.5), 0.3, anneal=policy)
        cp.observe("b", dist.Normal(x[0] + x[1], 0.5), 0.1)

    density = cp.compile(seen_twice, PRIOR)
    assert [str(o.anneal) for o in density.graph.observations] == ["exact", "exact"]
    assert density.evaluator.likelihood.exact.names == ("a", "b")
    assert not density.evaluator.likelihood.evaluated


def test_what_is_no_policy_is_refused():
    refused(
        lambda: cp.compile(measured, PRIOR, sine, jnp.zeros(2), 3),
        InvalidValueError,
    )
    array = Between(jnp.ones(2))
    refused(
        lambda: cp.compile(measured, PRIOR, sine, jnp.zeros(2), array),
        WrongTypeError,
    )


def test_threads_compile_one_program_each():
    """NumPyro has one stack of handlers for all threads."""

    @cp.program
    def seen(y):
        x = cp.sample("x", dist.Normal(0.0, 1.0))
        cp.observe("y", dist.Normal(x, 1.0), y)

    with ThreadPoolExecutor(4) as pool:
        densities = list(pool.map(lambda y: cp.compile(seen, y), [0.0, 1.0, 2.0, 3.0]))
    for y, density in enumerate(densities):
        assert density.observed()["y"] == y
