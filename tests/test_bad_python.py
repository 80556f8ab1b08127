"""Python that reads well and means nothing here: what JAX, NumPy, NumPyro or Python would say, in the user's terms.

Each is refused by an error of the library that names the user's line and what to write instead. Places are lines of
this file.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob import errors
from sampling_cases import SCHEDULE, normal, single

KEY = jax.random.key(0)
F, G = normal([0.0, 0.0]), normal([1.0, 1.0])
MIXTURE, WHERE, NUMPY = r"cp\.mixture\(\[f, g\]", r"jnp\.where", "jax.numpy"


def compiled(function):
    """Compile a program of one latent m and one noised site x, whose data are what ``function(x, m)`` predicts."""

    @cp.program
    def scene(f):
        x, m = cp.sample("x", f), cp.sample("m", dist.Normal(0.0, 1.0))
        cp.observe("y", dist.Normal(function(x, m), 1.0), 0.3)

    return lambda: cp.compile(scene, F)


def loop(x, m):
    while m < 0:
        m = m + 1
    return m


@cp.program
def numpyro_site(f):
    numpyro.sample("x", f)


@cp.program
def numpyro_likelihood(f):
    x = cp.sample("x", f)
    numpyro.sample("y", f, obs=x)


@cp.program
def of_the_level(f):
    x = cp.sample("x", f)
    cp.factor("w", lambda level: x[0] if level > 3 else -x[0], anneal="noised")


def diffusion(network, schedule=SCHEDULE):
    return cp.Diffusion(network, schedule, event_shape=(2,))


def with_numpy(x, t):
    return jnp.asarray(np.sin(x))


def with_numpy_norm(x, t):  # NumPy's own Python frames are not the user's line
    return x / np.linalg.norm(x)


def with_if(x, t):
    return x if t > 3 else -x


def energy(function):
    return lambda: cp.Energy(function, SCHEDULE, event_shape=(2,))


def infer(*args, **kwargs):
    options = {"num_chains": 4, "progress": False} | kwargs
    return lambda: cp.infer(cp.compile(single, F), KEY, *args, **options)


# what is written: (who is called, the class of the exception, words of its message, words of its way out)
LATENTS = {
    "if on a static latent": (compiled(lambda x, m: 1.0 if m > 0 else -1.0), "`if`.*site 'm'", WHERE),
    "if on a noised site": (compiled(lambda x, m: m if x[0] > 0 else -m), "`if`.*site 'x'", r"cp\.mixture"),
    "and on a latent": (compiled(lambda x, m: m * (m > 0 and m < 1)), "`and`.*site 'm'", WHERE),
    "while on a latent": (compiled(loop), "`while`.*site 'm'", WHERE),
    "float of a latent": (compiled(lambda x, m: float(m)), "float.*site 'm'", WHERE),
    "int of a latent": (compiled(lambda x, m: [1.0, 2.0][int(m)]), "int.*site 'm'", r"jnp\.stack"),
    "a list by a latent": (compiled(lambda x, m: [1.0, 2.0][m.astype(int)]), "index.*site 'm'", r"jnp\.stack"),
    "item of a latent": (compiled(lambda x, m: m.item()), r"\.item.*site 'm'", WHERE),
    "range of a latent": (compiled(lambda x, m: sum(range(m.astype(int)))), "size.*site 'm'", "sizes"),
    "a mask by a latent": (compiled(lambda x, m: x[x > 0].sum()), "entries.*site 'x'", r"jnp\.where\(mask"),
    "NumPy on a latent": (compiled(lambda x, m: np.sin(m)), "NumPy on.*site 'm'", NUMPY),
    "NumPy's norm of a site": (compiled(lambda x, m: np.linalg.norm(x)), "NumPy on.*site 'x'", NUMPY),
    "numpyro.sample of a factor": (lambda: cp.compile(numpyro_site, F), "'x'.*Analytic", r"cp\.sample\('x', factor\)"),
    "numpyro.sample of a factor as data": (lambda: cp.compile(numpyro_likelihood, F), "'y'.*Analytic", r"cp\.observe"),
    "if on the level": (
        lambda: cp.infer(cp.compile(of_the_level, F), KEY, num_chains=4, sampler=cp.SMC(), progress=False),
        "function of the level at 'w'.*`if`",
        WHERE,
    ),
    "a call of a program": (lambda: single(F), "'single' was called", r"cp\.compile\(single, …\)"),
    "a call without arguments": (lambda: single(), "'single' was called", r"cp\.compile\(single, …\)"),
}
NETWORKS = {
    "NumPy in a network": (lambda: diffusion(with_numpy), "factor 'with_numpy' calls NumPy", NUMPY),
    "NumPy's norm in a network": (lambda: diffusion(with_numpy_norm), "'with_numpy_norm' calls NumPy", NUMPY),
    "if in a network": (lambda: diffusion(with_if), "`if`", WHERE),
    "NumPy in an energy": (energy(lambda x, k: -np.sum(np.asarray(x) ** 2)), "calls NumPy", NUMPY),
    "a level as an index": (energy(lambda x, k: -jnp.sum(x**2) / SCHEDULE.sigma[k]), "calls NumPy", r"at\(level\)"),
    "NumPy in a classifier": (
        lambda: cp.Classifier(with_numpy, SCHEDULE, event_shape=(2,)),
        "classifier.*calls NumPy",
        NUMPY,
    ),
}
ALGEBRA = {
    "number * factor": (lambda: 2.0 * F, r"2\.0 \* Analytic", r"f \*\* 2"),
    "factor * number": (lambda: F * 2, r"Analytic \* 2", MIXTURE),
    "factor / number": (lambda: F / 2.0, r"Analytic / 2\.0", r"f \*\* 2"),
    "array * factor": (lambda: jnp.ones(2) * F, r"\* Analytic", MIXTURE),
    "NumPy's array * factor": (lambda: np.ones(2) * F, r"ndarray \* Analytic", MIXTURE),
    "NumPy's number * factor": (lambda: np.float32(2.0) * F, r"float32 \* Analytic", MIXTURE),
    "factor + factor": (lambda: F + G, r"Analytic \+ Analytic", MIXTURE),
    "product + factor": (lambda: F * G + G, r"Product \+ Analytic", MIXTURE),
    "sum of factors": (lambda: sum([F, G]), r"0 \+ Analytic", MIXTURE),
    "factor | factor": (lambda: F | G, r"Analytic \| Analytic", MIXTURE),
    "factor & factor": (lambda: F & G, r"Analytic & Analytic", r"f \* g"),
    "factor - factor": (lambda: F - G, r"Analytic - Analytic", r"f / g"),
    "number - factor": (lambda: 1 - F, r"1 - Analytic", r"f / g"),
    "- factor": (lambda: -F, r"-Analytic", r"f \*\* -1\.0"),
    "1 / factor": (lambda: 1 / F, r"1 / Analytic", r"f \*\* -1\.0"),
    "number ** factor": (lambda: 2**F, r"2 \*\* Analytic", r"f \*\* 2\.0"),
    "factor * distribution": (lambda: F * dist.Normal(0.0, 1.0), r"Analytic \* Normal", r"cp\.Analytic\(dist\.Normal"),
    "distribution * factor": (lambda: dist.Normal(0.0, 1.0) * F, r"Normal \* Analytic", r"cp\.Analytic\(dist\.Normal"),
    "factor * network": (lambda: F * with_numpy, r"Analytic \* function", r"cp\.Diffusion"),
    "factor ** text": (lambda: F ** "2", "got str", "float"),
    "mixture of arguments": (lambda: cp.mixture(F, G), "list of factors; got Analytic", MIXTURE),
    "mixture of one factor": (lambda: cp.mixture(F), "list of factors; got Analytic", MIXTURE),
    "product of a list": (lambda: cp.product([F, G]), "one by one; got one list", r"cp\.product\(\*factors\)"),
}
CALLS = {
    "a class as a sampler": (infer(sampler=cp.SMC), "the class SMC", r"cp\.SMC\(\)"),
    "a name as a sampler": (infer(sampler="smc"), "'smc'", r"cp\.SMC\(\)"),
    "a kernel's class as a sampler": (infer(sampler=cp.MALA), "the class MALA", r"cp\.AnnealedMCMC\(kernel"),
    "a class as a kernel": (lambda: cp.AnnealedMCMC(cp.MALA, 3), "the class MALA", r"cp\.MALA\(\)"),
    "a class as SMC's kernel": (lambda: cp.SMC(cp.HMC), "the class HMC", r"cp\.MALA\(\)"),
}
KINDS = {
    **dict.fromkeys(LATENTS, errors.ProgramError),
    **dict.fromkeys(NETWORKS, errors.NetworkError),
    **dict.fromkeys([*ALGEBRA, *CALLS, "numpyro.sample of a factor", "numpyro.sample of a factor as data"],
                    errors.WrongTypeError),
}  # fmt: skip
CASES = LATENTS | NETWORKS | ALGEBRA | CALLS


@pytest.mark.parametrize("what", CASES)
def test_says_what_to_write_instead(what):
    call, words, fix = CASES[what]
    with pytest.raises(errors.ComposeProbError) as caught:
        call()
    error = caught.value
    assert type(error) is KINDS[what], error
    assert re.search(words, error.found), error
    assert re.search(fix, error.fix), error
    assert re.fullmatch(r"test_bad_python\.py:\d+", error.where or ""), error


def test_the_place_is_the_line_that_asks():
    """Not the statement that uses the value, nor the line of the call of compile."""

    @cp.program
    def scene(f):
        x = cp.sample("x", f)
        shift = float(x[0])
        cp.observe("y", dist.Normal(shift, 1.0), 0.3)

    with pytest.raises(errors.ProgramError) as caught:
        cp.compile(scene, F)
    assert caught.value.where == f"test_bad_python.py:{scene.function.__code__.co_firstlineno + 3}"


def test_factors_keep_their_own_operators():
    product = cp.compile(single, F * G**2.0 / F)
    x = jnp.array([0.3, -0.2])
    expected = cp.compile(single, G**2).log_density({"x": x}, 0)
    np.testing.assert_allclose(product.log_density({"x": x}, 0), expected, rtol=1e-5)


def test_programs_still_call_programs_and_numpyro_still_runs_them():
    @cp.program
    def part():
        return cp.sample("m", dist.Normal(0.0, 1.0))

    @cp.program
    def whole(f):
        x = cp.sample("x", f)
        cp.observe("y", dist.Normal(part() + x[0], 1.0), 0.3)

    assert set(cp.compile(whole, F).sites) == {"x", "m"}
    assert np.isfinite(numpyro.handlers.seed(part, jax.random.key(0))())


def test_a_missing_site_is_a_missing_key():
    result = cp.infer(cp.compile(single, F), KEY, num_chains=4, sampler=cp.Ancestral(), progress=False)
    with pytest.raises(KeyError) as caught:
        result["nope"]
    error = caught.value
    assert isinstance(error, (errors.UnknownSiteError, errors.InvalidValueError))
    assert str(error).startswith("This result has no site 'nope'. (test_bad_python.py:")  # no KeyError's quotes
    assert "its sites are: 'x'" in error.fix


def test_a_model_of_many_levels_is_offered_some_of_them():
    """The schedule that the error names is one that compiles, with about as many levels as were asked for."""
    model = diffusion(lambda x, t: x * t, cp.Schedule.linear(1000))
    with pytest.raises(errors.AlignmentError) as caught:
        cp.compile(single, model, schedule=cp.Schedule.linear(50))
    assert "schedule=factor.schedule.every(20)): 51 of its 1000" in caught.value.fix
    density = cp.compile(single, model, schedule=model.schedule.every(20))
    assert density.num_levels == 51
    x = jnp.array([0.3, -0.2])
    own = cp.compile(single, model)
    for level, same in ((0, 0), (7, 140), (50, 999)):
        np.testing.assert_allclose(density.score({"x": x}, level)["x"], own.score({"x": x}, same)["x"], rtol=1e-6)


def test_a_model_of_few_levels_is_offered_them_all():
    model = diffusion(lambda x, t: x, cp.Schedule.cosine(10))
    with pytest.raises(errors.AlignmentError) as caught:
        cp.compile(single, model, schedule=cp.Schedule.linear(50))
    assert "schedule=factor.schedule." in caught.value.fix
    assert "every" not in caught.value.fix
