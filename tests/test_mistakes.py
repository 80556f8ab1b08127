"""Mistakes of a first day: each is answered in seconds, before anything is compiled, with the line and a way out."""

import os
import re
import subprocess
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob import errors
from composeprob.text import spelled
from sampling_cases import SCHEDULE, normal, single

KEY, Y = jax.random.key(0), jnp.zeros(2)
F = normal([0.0, 0.0])
CONDITIONAL = cp.Diffusion(lambda x, t, c: c * x, SCHEDULE, event_shape=(2,), conditions={"c": 1.0})
DENSITY = cp.compile(single, F)


@pytest.fixture(scope="module")
def result():
    return cp.infer(DENSITY, KEY, num_chains=8, sampler=cp.Ancestral(), progress=False)


def scene(*statements):
    """A program of one site x, and of what the functions make of it."""

    @cp.program
    def written():
        x = cp.sample("x", F)
        for statement in statements:
            statement(x)

    return lambda: cp.compile(written)


def infer(*args, **options):
    return lambda: cp.infer(DENSITY, *args, **{"key": KEY, "num_chains": 4, "progress": False} | options)


def in_transformation(transformation, *args):
    options = {"num_chains": 4, "sampler": cp.Ancestral(), "progress": False}
    return lambda: transformation(lambda key: cp.infer(DENSITY, key, **options).samples)(*args)


class Torch:
    """Stands for a module of PyTorch, which is not installed here."""

    __module__ = "torch.nn"

    def __call__(self, x, t):
        return x


# what is written: (who is called, the class of the exception, words of its message, words of its way out)
EVALUATED, NAMES = r"density\.log_density\(\{'x': point\}, 0\)", errors.UnknownNameError
FACTORS = {
    "a factor's log_prob": (lambda: F.log_prob(Y), NAMES, "Factor has no 'log_prob'", EVALUATED),
    "a factor's score": (lambda: F.score(Y, 0), NAMES, "no 'score'", EVALUATED),
    "a factor's sample": (lambda: F.sample(KEY), NAMES, "no 'sample'", r"cp\.infer\(density, key"),
    "a misspelled method": (lambda: F.givn(c=1), NAMES, "no 'givn'", "did you mean 'given'"),
    "a call of a factor": (lambda: F(Y), errors.WrongTypeError, r"Analytic\(…\)", EVALUATED),
    "an entry of a factor": (lambda: F[0], errors.WrongTypeError, r"Analytic\[…\]", r"x\[0\]"),
    "a loop over a factor": (lambda: list(F), errors.WrongTypeError, r"Analytic\[…\]", r"x\[0\]"),
    "~ factor": (lambda: ~F, errors.WrongTypeError, "~Analytic", r"f \*\* -1\.0"),
    "factor @ factor": (lambda: F @ F, errors.WrongTypeError, "Analytic @ Analytic", r"f \* g"),
    "a condition by position": (lambda: CONDITIONAL.given(3), errors.WrongTypeError, "too many", r"given\(\*\*cond"),
    "a condition that is text": (lambda: CONDITIONAL.given(c="cat"), errors.WrongTypeError, "'c'.*str", "encode"),
    "guidance without a scale": (lambda: cp.guide(CONDITIONAL, c=1), errors.WrongTypeError, "'scale'", "scale"),
    "no schedule": (lambda: cp.Analytic(dist.Normal(0, 1)), errors.WrongTypeError, "'schedule'", "schedule"),
    "no event_shape": (lambda: cp.Energy(lambda x, k: 0.0, SCHEDULE), errors.WrongTypeError, "event_shape", "=…"),
    "event_shap": (
        lambda: cp.Diffusion(lambda x, t: x, SCHEDULE, event_shap=(2,)),
        errors.WrongTypeError,
        "event_shap",
        r"did you mean event_shape=\?",
    ),
    "a network that is a factor": (
        lambda: cp.Diffusion(F, SCHEDULE, event_shape=(2,)),
        errors.WrongTypeError,
        "got Analytic",
        "Equinox",
    ),
    "an energy that is a factor": (
        lambda: cp.Energy(F, SCHEDULE, event_shape=(2,)),
        errors.WrongTypeError,
        "got Analytic",
        "log-density",
    ),
    "a network of PyTorch": (
        lambda: cp.Diffusion(Torch(), SCHEDULE, event_shape=(2,)),
        errors.WrongTypeError,
        "PyTorch",
        "Equinox",
    ),
    "a schedule's constructor": (
        lambda: cp.Schedule(10),
        errors.WrongTypeError,
        "Schedule",
        r"Schedule\.cosine\(100\)",
    ),
    "a schedule of no levels": (lambda: cp.Schedule.cosine(), errors.WrongTypeError, "num_levels", "num_levels"),
    "bounds in the wrong order": (
        lambda: cp.Analytic(dist.Uniform(1.0, 0.0), SCHEDULE),
        errors.InvalidValueError,
        "from 1.0 to 0.0",
        "lower bound comes first",
    ),
}
STATEMENTS = {
    "data for cp.sample": (
        scene(lambda x: cp.sample("y", dist.Normal(x, 1.0), obs=Y)),
        errors.WrongTypeError,
        "'obs'",
        r"cp\.observe\(name, distribution, value\)",
    ),
    "data by another name": (
        scene(lambda x: cp.observe("y", dist.Normal(x, 1.0), obs=Y)),
        errors.WrongTypeError,
        "'value'",
        r"cp\.observe\(name, distribution, value\)",
    ),
    "no data": (scene(lambda x: cp.observe("y", dist.Normal(x, 1.0))), errors.WrongTypeError, "'value'", "value"),
    "no name": (scene(lambda x: cp.sample(F)), errors.WrongTypeError, "missing", r"sample\(name, factor"),
    "the name second": (scene(lambda x: cp.sample(F, "z")), errors.WrongTypeError, "got Analytic", r"cp\.sample\('z'"),
    "a number as a name": (scene(lambda x: cp.sample(3, F)), errors.WrongTypeError, "got int", "a string"),
    "an empty name": (scene(lambda x: cp.factor("", 0.0)), errors.WrongTypeError, "got ''", "a string"),
    "a model's name": (lambda: cp.compile(single, "ring2d"), errors.WrongTypeError, "got str", r"cp\.load\('ring2d'\)"),
    "an array as a site": (lambda: cp.compile(single, np.zeros(2)), errors.WrongTypeError, "array", r"cp\.Analytic"),
    "a class as a site": (lambda: cp.compile(single, dist.Normal), errors.WrongTypeError, "'x'", r"Normal\(…\)"),
    "a program as a site": (
        lambda: cp.compile(single, single),
        errors.WrongTypeError,
        "got Program",
        "call the program",
    ),
    "a factor as a likelihood": (
        scene(lambda x: cp.observe("y", F, Y)),
        errors.WrongTypeError,
        "'y'.*Analytic",
        r"dist\.Normal\(prediction",
    ),
    "a class as a likelihood": (
        scene(lambda x: cp.observe("y", dist.Normal, Y)),
        errors.WrongTypeError,
        "needs a NumPyro distribution",
        "for example",
    ),
    "a factor as a weight": (
        scene(lambda x: cp.factor("w", F)),
        errors.WrongTypeError,
        "'w' is a factor",
        r"cp\.factor\('w', f, at=x\)",
    ),
    "a site outside": (lambda: cp.sample("y", dist.Normal(0, 1)), errors.ProgramError, "outside", r"@cp\.program"),
    "data outside": (lambda: cp.observe("y", dist.Normal(0, 1), 1), errors.ProgramError, "outside", r"@cp\.program"),
    "a weight outside": (lambda: cp.factor("w", 1.0), errors.ProgramError, "outside", r"@cp\.program"),
    "a decorator with brackets": (lambda: cp.program(), errors.WrongTypeError, "'function'", r"program\(function\)"),
}
POSITIVE = "which must be positive"
SCALES = {
    "a negative scale of a prior": (
        scene(lambda x: cp.sample("s", dist.Normal(0.0, -1.0))),
        errors.InvalidValueError,
        f"the scale -1, {POSITIVE}",
        "passed as scale",
    ),
    "a negative scale of data": (
        scene(lambda x: cp.observe("y", dist.Normal(x, -0.1), Y)),
        errors.InvalidValueError,
        f"the scale -0.1, {POSITIVE}",
        r"jnp\.exp",
    ),
    "a scale of 0": (
        scene(lambda x: cp.observe("y", dist.Normal(x, jnp.array([1.0, 0.0])), Y)),
        errors.InvalidValueError,
        rf"a scale of shape \(2,\) and numbers from 0 on, {POSITIVE}",
        r"jnp\.exp",
    ),
    "a latent as a scale": (
        scene(lambda x: cp.observe("y", dist.Normal(0.0, cp.sample("s", dist.Normal(0.0, 1.0))), 1.0)),
        errors.InvalidValueError,
        f"the site 's', {POSITIVE}",
        "HalfNormal",
    ),
    "twice a latent as a scale": (
        scene(lambda x: cp.sample("m", dist.Normal(0.0, 2 * cp.sample("s", dist.Normal(0.0, 1.0))))),
        errors.InvalidValueError,
        f"the scale -.*, {POSITIVE}",
        "HalfNormal",
    ),
    "a noised site as a scale": (
        scene(lambda x: cp.observe("y", dist.Normal(0.0, x), Y)),
        errors.InvalidValueError,
        f"the site 'x', {POSITIVE}",
        r"jnp\.exp",
    ),
    "an empty interval": (
        scene(lambda x: cp.sample("u", dist.Uniform(1.0, 0.0))),
        errors.InvalidValueError,
        "'u' is Uniform from 1.0 to 0.0",
        "lower bound comes first",
    ),
}
RUNS = {
    "num_chains by position": (
        lambda: cp.infer(DENSITY, KEY, 100),
        errors.WrongTypeError,
        "too many positional",
        r"infer\(density, key, num_chains=…",
    ),
    "no num_chains": (lambda: cp.infer(DENSITY, KEY), errors.WrongTypeError, "missing.*num_chains", "num_chains=…"),
    "an unknown argument": (infer(chains=8), errors.WrongTypeError, "'chains'", "did you mean num_chains="),
    "num_samples": (infer(num_samples=8), errors.WrongTypeError, "'num_samples'", "draws="),
    "a device": (infer(device="gpu"), errors.WrongTypeError, "'device'", "mesh="),
    "a number as a key": (infer(key=7), errors.WrongTypeError, "got int", r"jax\.random\.key\(7\)"),
    "a path that is none": (infer(checkpoint_dir=True), errors.WrongTypeError, "got bool", "checkpoints"),
    "infer in jit": (in_transformation(jax.jit, KEY), errors.CapabilityError, r"jax\.jit", "call it outside"),
    "infer in vmap": (
        in_transformation(jax.vmap, jax.random.split(KEY, 2)),
        errors.CapabilityError,
        r"jax\.vmap",
        "num_chains",
    ),
    "infer in jit, of constants": (
        lambda: jax.jit(infer(sampler=cp.Ancestral()))(),
        errors.CapabilityError,
        r"jax\.jit",
        "call it outside",
    ),
    "infer in grad": (
        lambda: jax.grad(
            lambda m: cp.infer(
                cp.compile(single, normal([m, 0.0])), KEY, num_chains=4, sampler=cp.Ancestral(), progress=False
            )["x"].mean()
        )(0.0),
        errors.CapabilityError,
        r"jax\.grad",
        "call it outside",
    ),
    "stepsize": (lambda: cp.MALA(stepsize=0.1), errors.WrongTypeError, "stepsize", r"did you mean step_size=\?"),
    "a sampler without a kernel": (lambda: cp.AnnealedMCMC(), errors.WrongTypeError, "kernel", "steps_per_level=10"),
    "an algorithm's name": (lambda: cp.BlackJAX("nuts"), errors.WrongTypeError, "'nuts'", r"blackjax\.nuts"),
    "a metric without its bandwidth": (lambda: cp.metrics.mmd(Y, Y), errors.WrongTypeError, "bandwidth", "bandwidth"),
    "a misspelled name": (lambda: cp.sampel("x", F), NAMES, "no 'sampel'", "did you mean 'sample'"),
    "a distribution": (lambda: cp.Normal(0.0, 1.0), NAMES, "no 'Normal'", r"dist\.Normal\(…\)"),
    "a misspelled model": (lambda: cp.load("ring2"), errors.LoadError, "'ring2'", "did you mean 'ring2d'"),
    "a density's log_prob": (
        lambda: DENSITY.log_prob({"x": Y}),
        NAMES,
        "'log_prob'",
        r"log_density\(\{'x': point\}, 0",
    ),
    "a density's sample": (lambda: DENSITY.sample(KEY), NAMES, "'sample'", r"cp\.infer\(density"),
    "a call of a density": (lambda: DENSITY(Y), errors.WrongTypeError, "not called", "log_density"),
    "an entry of a density": (lambda: DENSITY["x"], errors.WrongTypeError, "no samples", r"result\['x'\]"),
    "no level": (lambda: DENSITY.score({"x": Y}), errors.WrongTypeError, "'level'", r"score\(position, level\)"),
    "a start of a number": (lambda: DENSITY.initial(3), errors.WrongTypeError, "got int", r"key\(3\)"),
    "a check of nothing": (lambda: DENSITY.check(), errors.WrongTypeError, "'key'", r"check\(key"),
}
OF_A_RESULT = {
    "a site by a point": (lambda r: r.x, NAMES, "Result has no 'x'", r"result\['x'\]"),
    "another library's name": (lambda r: r.get_samples(), NAMES, "'get_samples'", r"result\['x'\]"),
    "a misspelled diagnostic": (lambda r: r.log_evidense, NAMES, "'log_evidense'", "did you mean 'log_evidence'"),
    "a mean of nothing": (lambda r: r.mean(), errors.WrongTypeError, "'fn'", r"mean\(fn\)"),
    "a file that is a number": (lambda r: r.save(3), errors.WrongTypeError, "got int", "run.safetensors"),
    "a report that is a number": (lambda r: r.report(3), errors.WrongTypeError, "got int", "run.html"),
    "axes that are a number": (lambda r: r.to_arviz(dims=3), errors.WrongTypeError, "dims", r"\{'x': "),
}
CASES = FACTORS | STATEMENTS | SCALES | RUNS | OF_A_RESULT


@pytest.mark.parametrize("what", CASES)
def test_is_answered_with_the_line_and_a_way_out(what, result):
    call, kind, words, fix = CASES[what]
    before = time.process_time()
    with pytest.raises(errors.ComposeProbError) as caught:
        call(result) if what in OF_A_RESULT else call()
    error = caught.value
    assert type(error) is kind, error
    assert re.search(words, error.found), error
    assert re.search(fix, error.fix), error
    assert re.fullmatch(r"(test_mistakes|sampling_cases)\.py:\d+", error.where or ""), error
    assert time.process_time() - before < 5


@pytest.mark.parametrize("scale", [lambda s: jnp.exp(s), lambda s: 5.0 + 0.1 * jnp.tanh(s)], ids=["exp", "away from 0"])
def test_a_latent_that_a_positive_scale_depends_on_is_no_mistake(scale):
    assert scene(lambda x: cp.observe("y", dist.Normal(0.0, scale(cp.sample("s", dist.Normal(1.0, 1.0)))), 1.0))()


def test_a_latent_far_from_0_may_be_a_scale():
    assert scene(lambda x: cp.observe("y", dist.Normal(0.0, cp.sample("s", dist.Normal(5.0, 0.1))), 1.0))()


@pytest.mark.parametrize(("scale", "named"), [(lambda s: s, True), (jnp.exp, False)], ids=["s", "exp(s)"])
def test_a_scale_that_becomes_negative_in_a_run_is_named(scale, named):
    """Normal(1, 0.5) is above 0 where the program is compiled, and below it where chains go."""
    program = cp.program(lambda: cp.observe("y", dist.Normal(0.0, scale(cp.sample("s", dist.Normal(1.0, 0.5)))), 0.1))
    sampler = cp.AnnealedMCMC(cp.MALA(0.3), 5)
    result = cp.infer(cp.compile(program), KEY, num_chains=64, sampler=sampler, progress=False)
    assert result.status.has("non_finite") == named
    assert ("The likelihood of 'y' is no number near the chains" in result.status.message) == named


def test_steps_per_level_has_a_default():
    assert cp.AnnealedMCMC(cp.MALA()).steps_per_level == 10


def test_what_asks_for_attributes_still_gets_its_answer(result):
    """`hasattr` of Python and JAX, and a property that fails by itself."""
    for value in (F, F * F, DENSITY, result):
        assert not hasattr(value, "nothing")
        assert not hasattr(value, "_nothing")
        assert not hasattr(value, "__jax_array__")
    assert getattr(cp, "nothing", 1) == 1
    assert eqx.tree_equal(jax.tree.map(lambda a: a, F), F)


def test_arguments_that_fit_reach_the_function_and_its_own_errors_pass():
    def raises(x, y=0):
        raise TypeError("mine")

    from composeprob.arguments import answered

    with pytest.raises(TypeError, match=r"^mine$"):
        answered(raises)(1)
    assert answered(lambda x, y=2: x + y)(1) == 3


# what a network is told of time ------------------------------------------------------------------------------------

LINEAR = cp.Schedule.linear(1000)


def network(what, time, schedule):
    """The exact network of N(m, v), whose level is what ``time`` says."""
    mean, variance = jnp.array([0.3, -0.2]), jnp.array([0.04, 0.3])

    def output(x, t):
        if time == "level":
            at = lambda numbers: jnp.interp(1.0 * t, jnp.arange(schedule.num_levels), numbers)
            a, s = at(jnp.asarray(schedule.alpha)), at(jnp.asarray(schedule.sigma))
        else:
            a, s = jax.nn.sigmoid(1.0 * t) ** 0.5, jax.nn.sigmoid(-1.0 * t) ** 0.5
        clean = mean + a * variance / (a**2 * variance + s**2) * (x - a * mean)
        epsilon = (x - a * clean) / s
        return {"epsilon": epsilon, "x0": clean, "score": -epsilon / s, "v": a * epsilon - s * clean}[what]

    return output


@pytest.mark.parametrize(
    ("what", "time", "schedule", "declared", "on", "fix"),
    [
        ("epsilon", "level", LINEAR, "log_snr", LINEAR, r"time='level' with the schedule of its training, of 1000 lev"),
        ("score", "level", LINEAR, "log_snr", LINEAR, r"time='level' with the schedule of its training, of 1000 lev"),
        ("x0", "level", LINEAR, "log_snr", LINEAR, r"time='level' with the schedule of its training, of 1000 lev"),
        ("epsilon", "log_snr", LINEAR, "level", LINEAR, r"time='log_snr'"),
        ("v", "log_snr", LINEAR, "level", LINEAR, r"time='log_snr'"),
        ("epsilon", "level", LINEAR, "level", cp.Schedule.linear(100), "schedule of its training, of 1000 levels"),
        ("v", "level", LINEAR, "level", cp.Schedule.linear(100), "schedule of its training, of 1000 levels"),
        ("x0", "level", LINEAR, "level", cp.Schedule.linear(100), "schedule of its training, of 1000 levels"),
        ("epsilon", "level", cp.Schedule.cosine(1000), "level", cp.Schedule.linear(100), "of 1000 levels"),
    ],
)
def test_another_time_or_schedule_is_named_as_that(what, time, schedule, declared, on, fix):
    factor = cp.Diffusion(network(what, time, schedule), on, event_shape=(2,), parameterization=what, time=declared)
    with pytest.raises(errors.NetworkError, match=f"does not do what parameterization='{what}' declares") as caught:
        cp.compile(single, factor)
    assert re.search(fix, caught.value.fix), caught.value
    assert "parameterization=" not in caught.value.fix


@pytest.mark.parametrize("what", ["epsilon", "score", "x0", "v"])
@pytest.mark.parametrize("time", ["level", "log_snr"])
def test_the_right_time_passes(what, time):
    schedule = LINEAR if time == "level" else cp.Schedule.log_snr(60)
    right = cp.Diffusion(network(what, time, schedule), schedule, event_shape=(2,), parameterization=what, time=time)
    assert cp.compile(single, right).graph.doubts == ()


# terminals that lack characters ------------------------------------------------------------------------------------


def test_text_is_spelled_where_a_terminal_has_ascii_only():
    code = (
        "import composeprob as cp, jax, numpyro.distributions as dist\n"
        "f = cp.Analytic(dist.Normal(0.0, 1.0), cp.Schedule.log_snr(20))\n"
        "density = cp.compile(cp.program(lambda f: cp.sample('x', f ** 2)), f)\n"
        "result = cp.infer(density, jax.random.key(0), num_chains=32, sampler=cp.Ancestral(), progress=False)\n"
        "for value in (density, density.schedule, result, result.status, result.summary(), cp.zoo(),\n"
        "              result.mean(lambda s: s['x']), cp.errors.LoadError('π', fix='σ')):\n"
        "    print(value)\n    print(repr(value))\n"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    shown = done.stdout.decode("ascii")
    assert "pi_k(x) ~ f(x)" in shown
    assert "+-" in shown
    assert "sigma" in shown


@pytest.mark.parametrize(
    ("text", "ascii_text"),
    [("π ∝ σ²·‖x‖ ± ½ … é", "pi ~ sigma2*||x|| +- 1/2 ... e"), ("λ → −∞", "lambda -> -inf"), ("漢", "?")],
)
def test_characters_are_spelled(text, ascii_text):
    assert spelled(text, "ascii") == ascii_text
    assert spelled(text, "utf-8") == text
