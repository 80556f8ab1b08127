"""Mistakes of a first day, bad input, and Python that reads well and means nothing
here.

Each is answered in seconds, before anything is compiled, by an error of the library in
the user's terms: what was found, the user's line, and what to write instead. Places are
lines of this file.
"""

import ast
import copy
import inspect
import io
import pickle
import random
import re
import sys
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob import errors
from composeprob.compiler import proper
from composeprob.errors import (
    AlignmentError,
    CapabilityError,
    DoublyIntractableError,
    ImproperError,
    InvalidValueError,
    LevelError,
    LoadError,
    NetworkError,
    ProgramError,
    ShapeError,
    UnknownNameError,
    WrongTypeError,
)
from composeprob.runtime import compiled as driver
from composeprob.text import spelled
from refusals import refused, rows
from sampling_cases import SCHEDULE, both, learned, normal, single

KEY, Y, NAN = jax.random.key(0), jnp.zeros(2), jnp.array([1.0, jnp.nan])
STANDARD = dist.Normal(0.0, 1.0)
F, G = normal([0.0, 0.0]), normal([1.0, 1.0])
CONDITIONAL = cp.Diffusion(
    lambda x, t, c: c * x, SCHEDULE, event_shape=(2,), conditions={"c": 1.0}
)
DENSITY = cp.compile(single, F)


@pytest.fixture(scope="module")
def result():
    return ran(sampler=cp.Ancestral())


def scene(*statements):
    """A program of one site x, and of what the functions make of it."""

    @cp.program
    def written():
        x = cp.sample("x", F)
        for statement in statements:
            statement(x)

    return lambda: cp.compile(written)


def seen(law, value=Y):
    """Compile a program of one site x, with data of the law that the function makes of
    it."""
    return scene(lambda x: cp.observe("y", law(x), value))


def latent_of(law, *parameters):
    """Compile a program with a latent of this law."""
    return scene(lambda x: cp.sample("s", law(*parameters)))


def wide_as(scale):
    """Compile a program whose noise is as wide as the function makes of x."""
    return seen(lambda x: dist.Normal(0.0, scale(x)), 1.0)


def weighed(log_weight):
    """Compile a program with the log-weight that the function makes of x."""
    return scene(lambda x: cp.factor("e", log_weight(x)))


def ran(factor=None, **options):
    density = DENSITY if factor is None else cp.compile(single, factor)
    return cp.infer(
        density, **{"key": KEY, "num_chains": 4, "progress": False} | options
    )


def moved(kernel, factor=lambda: None):
    return lambda: ran(factor(), sampler=cp.AnnealedMCMC(kernel, 1))


def weighs(factor, **options):
    return lambda: ran(factor(), sampler=cp.SMC(**options))


def in_transformation(transformation, *args):
    return lambda: transformation(
        lambda key: ran(key=key, sampler=cp.Ancestral()).samples
    )(*args)


class Torch:
    """Stands for a module of PyTorch, which is not installed here."""

    __module__ = "torch.nn"

    def __call__(self, x, t):
        return x


def predicting(function):
    """Compile a program of one latent m and one noised site x, whose data are what
    ``function(x, m)`` predicts."""
    return seen(
        lambda x: dist.Normal(function(x, cp.sample("m", dist.Normal(0.0, 1.0))), 1.0),
        0.3,
    )


def loop(x, m):
    while m < 0:
        m = m + 1
    return m


def by_level(x):
    cp.factor("w", lambda level: x[0] if level > 3 else -x[0], anneal="noised")


def diffusion(network, schedule=SCHEDULE, **options):
    return cp.Diffusion(network, schedule, **{"event_shape": (2,)} | options)


def with_numpy(x, t):
    return jnp.asarray(np.sin(x))


def with_numpy_norm(x, t):  # NumPy's own Python frames are not the user's line
    return x / np.linalg.norm(x)


def with_if(x, t):
    return x if t > 3 else -x


def energy(function, event_shape=(2,), **options):
    return cp.Energy(function, SCHEDULE, event_shape=event_shape, **options)


@pytest.fixture
def nothing_is_compiled(monkeypatch):
    def compiled(*_):
        raise AssertionError("the driver was compiled")

    for name in ("start", "advance", "read"):
        monkeypatch.setattr(driver, name, compiled)


def network(**options):
    return diffusion(lambda x, t: x, parameterization="epsilon", **options)


def of_levels(number):
    return diffusion(lambda x, t: x, cp.Schedule.cosine(number), label=f"of{number}")


CLASSIFIER = cp.Classifier(lambda x, t: x, SCHEDULE, event_shape=(2,))
OPEN = diffusion(
    lambda x, t, c: jnp.sum((x - c) ** 2), parameterization="energy", conditions=("c",)
)
"""With a condition that has no value."""


def squares():
    return learned(lambda x, t: jnp.sum(x**2), "energy", SCHEDULE, time="level")


@cp.program
def twice(f):
    cp.sample("x", f)
    cp.sample("x", f)


@cp.program
def observed(f, y, likelihood=None, anneal=None):
    x = cp.sample("x", f)
    cp.observe(
        "y", dist.Normal(x, 1.0) if likelihood is None else likelihood, y, anneal=anneal
    )


@cp.program
def numpyro_observed(f, y):
    x = cp.sample("x", f)
    numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


@cp.program
def in_plate(size, y, batch=()):
    m = cp.sample("m", dist.Normal(0.0, 1.0))
    with numpyro.plate("i", size):
        numpyro.sample("y", dist.Normal(m * jnp.ones(batch), 1.0), obs=y)


@cp.program
def in_plate_of_5(posterior):
    with numpyro.plate("i", 5):
        cp.factor(
            "e",
            posterior.given(c=jnp.zeros(4)),
            at=cp.sample("x", dist.Normal(0.0, 1.0)),
        )


def yields(f):
    yield cp.sample("x", f)


async def waits(f):
    cp.sample("x", f)


@cp.program
def in_part(y):
    m = cp.sample("m", dist.Normal(0.0, 1.0))
    with numpyro.plate("i", 100, subsample_size=4):
        numpyro.sample("y", dist.Normal(m, 1.0), obs=y)


@cp.program
def three_sites(f):
    cp.sample("x", f)
    cp.sample("mu", dist.Normal(0.0, 1.0))
    cp.sample("sigma", dist.HalfNormal(1.0))


def gibbs(blocks, sampler=lambda kernel: cp.AnnealedMCMC(kernel, 1)):
    density = cp.compile(three_sites, F)
    return lambda: cp.infer(
        density, KEY, num_chains=4, sampler=sampler(cp.Gibbs(blocks)), progress=False
    )


class Circle(dist.Distribution):
    """A law on a support that nobody knows."""

    support = dist.constraints.dependent

    def sample(self, key, sample_shape=()):
        return jnp.zeros(sample_shape)


def compiled(program, *args, **kwargs):
    return lambda: cp.compile(program, *args, **kwargs)


OBSERVE, LOWER = r"cp\.observe\(name, distribution, value\)", "lower bound comes first"
EVALUATED, POSITIVE = (
    r"density\.log_density\(\{'x': point\}, 0\)",
    "which must be positive",
)
RANDOM = "random numbers of NumPy or Python"
MIXTURE, ANALYTIC = r"cp\.mixture\(\[f, g\]", r"cp\.Analytic\(dist\.Normal"
WHERE, EXP, NUMPY, REAL = r"jnp\.where", r"jnp\.exp", "jax.numpy", dist.constraints.real
# by kind, what is written: (who is called, with a result if it asks for one; words of
# the message, words of its fix)
MISTAKES = {
    UnknownNameError: {
        "a factor's log_prob": (lambda: F.log_prob(Y), "Factor has no 'log_prob'", EVALUATED),
        "a factor's score": (lambda: F.score(Y, 0), "no 'score'", EVALUATED),
        "a factor's sample": (lambda: F.sample(KEY), "no 'sample'", r"cp\.infer\(density, key"),
        "a misspelled method": (lambda: F.givn(c=1), "no 'givn'", "did you mean 'given'"),
        "a misspelled name": (lambda: cp.sampel("x", F), "no 'sampel'", "did you mean 'sample'"),
        "a distribution": (lambda: cp.Normal(0.0, 1.0), "no 'Normal'", r"dist\.Normal\(…\)"),
        "a density's log_prob": (lambda: DENSITY.log_prob({"x": Y}), "'log_prob'", r"log_density\(\{'x': point\}, 0"),
        "a density's sample": (lambda: DENSITY.sample(KEY), "'sample'", r"cp\.infer\(density"),
        "a site by a point": (lambda r: r.x, "Result has no 'x'", r"result\['x'\]"),
        "another library's name": (lambda r: r.get_samples(), "'get_samples'", r"result\['x'\]"),
        "a misspelled diagnostic": (lambda r: r.log_evidense, "'log_evidense'", "did you mean 'log_evidence'"),
    },
    WrongTypeError: {
        "a call of a factor": (lambda: F(Y), r"Analytic\(…\)", EVALUATED),
        "an entry of a factor": (lambda: F[0], r"Analytic\[…\]", r"x\[0\]"),
        "a loop over a factor": (lambda: list(F), r"Analytic\[…\]", r"x\[0\]"),
        "~ factor": (lambda: ~F, "~Analytic", r"f \*\* -1\.0"),
        "factor and factor": (lambda: F and F, "The truth of Analytic", r"f \* g"),
        "a log-weight that is an event": (weighed(lambda x: x[0] > 0), "'e' is true or false", WHERE),
        "factor @ factor": (lambda: F @ F, "Analytic @ Analytic", r"f \* g"),
        "no numbers of a sample": (lambda r: r.mean(lambda s: None), "it returned NoneType", r"s\['x'\]"),
        "a word of a sample": (lambda r: r.mean(lambda s: "left"), "it returned str"),
        "several things of a sample": (lambda r: r.mean(lambda s: {"x": s["x"]}), "it returned dict"),
        "a rule of another name": (moved(cp.MALA(lambda s: s.sigmas)), "MALA failed.*'sigmas'", r"s\.sigma\*\*2"),
        "a step-size rule of two": (moved(cp.MALA(lambda s, k: s.sigma)), "rule of MALA failed.*'k'"),
        "data in jit": (lambda: jax.jit(lambda y: cp.compile(observed, F, y))(Y), "inside of jax.jit", "outside"),
        "a reverse step by its order": (lambda: cp.AnnealedMCMC(cp.MALA(), reverse_step=2), "cp.ReverseStep; got 2"),
        "part of the data": (
            lambda: cp.product(CONDITIONAL, over={"c": Y}, batch_size=1),
            "'batch_size'", "all data count at every step.*Batches"
        ),
        "a condition by position": (lambda: CONDITIONAL.given(3), "too many", r"given\(\*\*cond"),
        "a condition that is text": (lambda: CONDITIONAL.given(c="cat"), "'c'.*str", "encode"),
        "guidance without a scale": (lambda: cp.guide(CONDITIONAL, c=1), "'scale'", "scale"),
        "no schedule": (lambda: cp.Analytic(dist.Normal(0, 1)), "'schedule'", "schedule"),
        "no event_shape": (lambda: cp.Energy(lambda x, k: 0.0, SCHEDULE), "event_shape", "=…"),
        "event_shap": (lambda: network(event_shap=(2,)), "event_shap", r"did you mean event_shape=\?"),
        "a network that is a factor": (lambda: cp.Diffusion(F, SCHEDULE, event_shape=(2,)), "got Analytic", "Equinox"),
        "an energy that is a factor": (lambda: cp.Energy(F, SCHEDULE, event_shape=(2,)), "got Analytic", "log-density"),
        "a network of PyTorch": (lambda: cp.Diffusion(Torch(), SCHEDULE, event_shape=(2,)), "PyTorch", "Equinox"),
        "a schedule's constructor": (lambda: cp.Schedule(10), "Schedule", r"Schedule\.cosine\(100\)"),
        "a schedule of no levels": (lambda: cp.Schedule.cosine(), "num_levels", "num_levels"),
        "data for cp.sample": (scene(lambda x: cp.sample("y", dist.Normal(x, 1.0), obs=Y)), "'obs'", OBSERVE),
        "data by another name": (scene(lambda x: cp.observe("y", dist.Normal(x, 1.0), obs=Y)), "'value'", OBSERVE),
        "no data": (scene(lambda x: cp.observe("y", dist.Normal(x, 1.0))), "'value'", "value"),
        "no name": (scene(lambda x: cp.sample(F)), "missing", r"sample\(name, factor"),
        "the name second": (scene(lambda x: cp.sample(F, "z")), "got Analytic", r"cp\.sample\('z'"),
        "a number as a name": (scene(lambda x: cp.sample(3, F)), "got int", "a string"),
        "an empty name": (scene(lambda x: cp.factor("", 0.0)), "got ''", "a string"),
        "a model's name": (lambda: cp.compile(single, "ring2d"), "got str", r"cp\.load\('ring2d'\)"),
        "a density in a pickle": (lambda: pickle.dumps(DENSITY), "cannot be pickled", r"cp\.compile"),
        "a result in a pickle": (lambda result: pickle.dumps(result), "cannot be pickled", r"result\.save"),
        "an array as a site": (lambda: cp.compile(single, np.zeros(2)), "array", r"cp\.Analytic"),
        "a class as a site": (lambda: cp.compile(single, dist.Normal), "'x'", r"Normal\(…\)"),
        "a program as a site": (lambda: cp.compile(single, single), "got Program", "call the program"),
        "a factor as a likelihood": (seen(lambda x: F), "'y'.*Analytic", r"dist\.Normal\(prediction"),
        "a class as a likelihood": (seen(lambda x: dist.Normal), "needs a NumPyro distribution", "for example"),
        "a factor as a weight": (scene(lambda x: cp.factor("w", F)), "'w' is a factor", r"cp\.factor\('w', f, at=x\)"),
        "guidance of a number": (lambda: cp.guide(3.0, CONDITIONAL, c=1.0), "Guidance combines factors; got float"),
        "the prior of a program": (lambda: cp.prior(single), "got Program", "compile the program first"),
        "a model's folder that is a number": (lambda: cp.from_diffusers(3), "folder must be a path; got int"),
        "a number as a key of data": (lambda: DENSITY.predict(0, {"x": Y[None]}), "got int", r"key\(0\)"),
        "a distribution as a weight": (weighed(lambda x: STANDARD), "'e' is a distribution", r"cp\.observe\('e'"),
        "a program under jit": (lambda: cp.program(jax.jit(observed.function)), "got PjitFunction", "nothing between"),
        "a program with a key": (lambda: cp.program(numpyro.handlers.seed(yields, 0)), "got seed", "nothing between"),
        "a program that yields": (lambda: cp.program(yields), "got one with yield or async", "nothing between"),
        "a program that waits": (lambda: cp.program(waits), "got one with yield or async", "nothing between"),
        "a decorator with brackets": (lambda: cp.program(), "'function'", r"program\(function\)"),
        "num_chains by position": (lambda: cp.infer(DENSITY, KEY, 100), "too many positional", r"key, num_chains=…"),
        "a missing argument": (compiled(both, F), "missing a required argument: 'g'", r"takes \(f: Any, g: Any\)"),
        "no num_chains": (lambda: cp.infer(DENSITY, KEY), "missing.*num_chains", "num_chains=…"),
        "an unknown argument": (lambda: ran(chains=8), "'chains'", "did you mean num_chains="),
        "num_samples": (lambda: ran(num_samples=8), "'num_samples'", "draws="),
        "a device": (lambda: ran(device="gpu"), "'device'", "mesh="),
        "a number as a key": (lambda: ran(key=7), "got int", r"jax\.random\.key\(7\)"),
        "a path that is none": (lambda: ran(checkpoint_dir=True), "got bool", "checkpoints"),
        "stepsize": (lambda: cp.MALA(stepsize=0.1), "stepsize", r"did you mean step_size=\?"),
        "a sampler without a kernel": (lambda: cp.AnnealedMCMC(), "kernel", "steps_per_level=10"),
        "an algorithm's name": (lambda: cp.BlackJAX("nuts"), "'nuts'", r"blackjax\.nuts"),
        "a metric without its bandwidth": (lambda: cp.metrics.mmd(Y, Y), "bandwidth", "bandwidth"),
        "a call of a density": (lambda: DENSITY(Y), "not called", "log_density"),
        "an entry of a density": (lambda: DENSITY["x"], "no samples", r"result\['x'\]"),
        "no level": (lambda: DENSITY.score({"x": Y}), "'level'", r"score\(position, level\)"),
        "a start of a number": (lambda: DENSITY.initial(3), "got int", r"key\(3\)"),
        "a check of nothing": (lambda: DENSITY.check(), "'key'", r"check\(key"),
        "a mean of nothing": (lambda r: r.mean(), "'fn'", r"mean\(fn\)"),
        "a file that is a number": (lambda r: r.save(3), "got int", "run.safetensors"),
        "a report that is a number": (lambda r: r.report(3), "got int", "run.html"),
        "axes that are a number": (lambda r: r.to_arviz(dims=3), "dims", r"\{'x': "),
        "a factor for NumPyro": (scene(lambda x: numpyro.sample("z", F)), "'z'.*Analytic", r"cp\.sample\('z', fac"),
        "a factor as NumPyro's data": (scene(lambda x: numpyro.sample("y", F, obs=x)), "'y'.*Analytic", r"cp\.observe"),
        "number * factor": (lambda: 2.0 * F, r"2\.0 \* Analytic", r"f \*\* 2"),
        "factor * number": (lambda: F * 2, r"Analytic \* 2", MIXTURE),
        "factor / number": (lambda: F / 2.0, r"Analytic / 2\.0", r"f \*\* 2"),
        "array * factor": (lambda: jnp.ones(2) * F, r"\* Analytic", MIXTURE),
        "NumPy's array * factor": (lambda: np.ones(2) * F, r"ndarray \* Analytic", MIXTURE),
        "NumPy's number * factor": (lambda: np.float32(2.0) * F, r"float32 \* Analytic", MIXTURE),
        "factor + factor": (lambda: F + G, r"Analytic \+ Analytic", MIXTURE),
        "sum of factors": (lambda: sum([F, G]), r"0 \+ Analytic", MIXTURE),
        "factor | factor": (lambda: F | G, r"Analytic \| Analytic", MIXTURE),
        "factor & factor": (lambda: F & G, r"Analytic & Analytic", r"f \* g"),
        "factor - factor": (lambda: F - G, r"Analytic - Analytic", r"f / g"),
        "number - factor": (lambda: 1 - F, r"1 - Analytic", r"f / g"),
        "- factor": (lambda: -F, r"-Analytic", r"f \*\* -1\.0"),
        "1 / factor": (lambda: 1 / F, r"1 / Analytic", r"f \*\* -1\.0"),
        "number ** factor": (lambda: 2**F, r"2 \*\* Analytic", r"f \*\* 2\.0"),
        "factor * distribution": (lambda: F * dist.Normal(0.0, 1.0), r"Analytic \* Normal", ANALYTIC),
        "distribution * factor": (lambda: dist.Normal(0.0, 1.0) * F, r"Normal \* Analytic", ANALYTIC),
        "factor * network": (lambda: F * with_numpy, r"Analytic \* function", r"cp\.Diffusion"),
        "factor ** text": (lambda: F ** "2", "got str", "float"),
        "mixture of arguments": (lambda: cp.mixture(F, G), "list of factors; got Analytic", MIXTURE),
        "product of a list": (lambda: cp.product([F, G]), "one by one; got one list", r"cp\.product\(\*factors\)"),
        "a class as a sampler": (lambda: ran(sampler=cp.SMC), "the class SMC", r"cp\.SMC\(\)"),
        "a name as a sampler": (lambda: ran(sampler="smc"), "'smc'", r"cp\.SMC\(\)"),
        "a kernel's class as a sampler": (lambda: ran(sampler=cp.MALA), "the class MALA", r"cp\.AnnealedMCMC\(kernel"),
        "a class as a kernel": (lambda: cp.AnnealedMCMC(cp.MALA, 3), "the class MALA", r"cp\.MALA\(\)"),
        "a class as SMC's kernel": (lambda: cp.SMC(cp.HMC), "the class HMC", r"cp\.MALA\(\)"),
        "a metric of other things": (lambda: cp.MALA(metric=len), "inverse mass matrix"),
        "no program": (lambda: cp.compile(lambda f: f, F), "takes a program"),
        "a network as a site": (compiled(single, lambda x, t: x), "factor or a NumPyro"),
        "data that is text": (compiled(observed, F, "one"), "got str"),
        "data that is missing": (compiled(observed, F, None), "got NoneType"),
        "data of unequal lengths": (compiled(observed, F, [[1, 2], [3]]), "got list: .*inhomogeneous"),
        "data that is missing in part": (compiled(observed, F, [1.0, None]), "got list: None is not"),
        "data that are days": (compiled(observed, F, np.zeros(2, "datetime64[D]")), r"got ndarray of datetime64\[D\]"),
        "a likelihood that is no distribution": (compiled(observed, F, 1.0, 3), "got int"),
        "complex data": (compiled(observed, F, jnp.ones(2) * 1j), "numbers of type complex64"),
        "text as NumPyro's data": (compiled(numpyro_observed, F, "one"), "got str"),
        "a block by number": (lambda: cp.Gibbs({3: cp.MALA()}), "called 3"),
        "blocks without kernels": (lambda: cp.Gibbs(["x"]), "got list"),
        "a block without a kernel": (lambda: cp.Gibbs({"x": 0.1}), "'x' has no kernel but 0.1"),
        "blocks in blocks": (lambda: cp.Gibbs({"x": cp.Gibbs({"x": cp.MALA()})}), "'x' is itself moved by a Gibbs"),
        "half a chain": (lambda: ran(num_chains=2.5), "got 2.5"),
        "a boolean of chains": (lambda: ran(num_chains=True), "got True"),
        "an old key": (lambda: ran(key=jax.random.PRNGKey(0)), "typed random key"),
        "many keys": (lambda: ran(key=jax.random.split(KEY)), "one typed random key"),
        "a kernel as a sampler": (lambda: ran(sampler=cp.MALA(0.1)), "got MALA"),
        "no density": (lambda: cp.infer(F, KEY, num_chains=4), "compiled density"),
        "a program and what it takes": (lambda: cp.infer(single, F, key=KEY, num_chains=4), "density; got Program"),
        "no mesh": (lambda: ran(mesh=8), "got int"),
        "no kernel": (lambda: cp.AnnealedMCMC("MALA", 3), "needs a kernel"),
        "a site of NumPyro that is no factor": (lambda: cp.as_distribution(STANDARD), "takes a factor; got Normal"),
        "a kernel to draw sites of NumPyro": (lambda: cp.as_distribution(F, sampler=cp.MALA()), "", "AnnealedMCMC"),
        "a calibration of a name": (lambda: cp.calibrate("ring", KEY), "takes a factor"),
        "a calibration by a number": (lambda: cp.calibrate(F, 0), "typed random key"),
        "a site for a function": (lambda r: r.quantile("x", 0.5), "a function of one sample", r"lambda s: s\['x'\]"),
        "a threshold in words": (lambda: cp.SMC(resample="half"), "threshold"),
        "a class for a meeting": (lambda: cp.SMC(resample=cp.Resample), "the class Resample"),
        "a step in words": (lambda: cp.SMC(step="first"), "step must be a cp.ReverseStep; got 'first'"),
        "eta in words": (lambda: cp.Ancestral(eta="ddim"), "eta"),
    },
    InvalidValueError: {
        "a count of 41 bits": (
            seen(lambda x: dist.Poisson(jnp.exp(x)), np.array([2**40, 3])),
            "'y' holds whole numbers that int32", "pass floats"
        ),
        "bounds the wrong way": (lambda: cp.Analytic(dist.Uniform(1.0, 0.0), SCHEDULE), "from 1.0 to 0.0", LOWER),
        "a prior's negative scale": (latent_of(dist.Normal, 0.0, -1.0), f"the scale -1, {POSITIVE}", "passed as scale"),
        "a negative scale of data": (seen(lambda x: dist.Normal(x, -0.1)), f"the scale -0.1, {POSITIVE}", EXP),
        "a scale of 0": (wide_as(lambda x: jnp.arange(2.0)), rf"shape \(2,\) and numbers from 0 on, {POSITIVE}", EXP),
        "a latent as a scale": (wide_as(lambda x: cp.sample("s", STANDARD)), f"the site 's', {POSITIVE}", "HalfNormal"),
        "twice a latent": (
            latent_of(lambda: dist.Normal(0.0, 2 * cp.sample("m", STANDARD))), f"scale -.*, {POSITIVE}", "HalfNormal"
        ),
        "a noised site as a scale": (seen(lambda x: dist.Normal(0.0, x)), f"the site 'x', {POSITIVE}", EXP),
        "a noised number that is above 0 where it is traced": (wide_as(lambda x: x[0]), f"-0.126, {POSITIVE}", EXP),
        "an empty interval": (latent_of(dist.Uniform, 1.0, 0.0), "'s' is Uniform from 1.0 to 0.0", LOWER),
        "an unknown metric": (lambda: cp.MALA(metric="dense"), "'dense'"),
        "a negative inverse mass": (lambda: cp.HMC(metric={"x": -1.0}), "metric of 'x' is -1"),
        "a metric that is no covariance": (lambda: cp.MALA(metric=-np.eye(2)), "positive"),
        "unknown policy": (compiled(observed, F, jnp.zeros(2), anneal="cold"), "policy 'cold'"),
        "unknown policy of a block": (lambda: cp.annealed("cold"), "policy 'cold'"),
        "no policy of a block": (lambda: cp.annealed(None), "needs a policy"),
        "a count and a half": (seen(lambda x: dist.Poisson(jnp.exp(x[0])), 1.5), "holds 1.5, which Poisson.* never is"),
        "a negative count": (seen(lambda x: dist.Poisson(jnp.exp(x[0])), -1), "holds -1"),
        "no blocks": (lambda: cp.Gibbs({}), "no blocks"),
        "a block of no sites": (lambda: cp.Gibbs({(): cp.MALA()}), "no site"),
        "a site in two blocks": (lambda: cp.Gibbs({"x": cp.MALA(), ("mu", "x"): cp.MALA()}), "'x' is in more than one"),
        "a site in no block": (gibbs({"x": cp.MALA(), "mu": cp.MALA()}), "no block of Gibbs moves 'sigma'"),
        "a site in no block, by SMC": (gibbs({"x": cp.MALA()}, cp.SMC), "no block of Gibbs moves 'mu', 'sigma'"),
        "a block of a site that is not there": (
            gibbs({"x": cp.MALA(), ("mu", "sigm"): cp.MALA()}),
            "site 'sigm', which the program does not have", r"did you mean 'sigma'\? Its sites are 'mu', 'sigma', 'x'"
        ),
        "a quantile's arguments swapped": (
            lambda r: r.quantile(0.5, lambda s: s["x"]), "between 0 and 1; got <function", r"quantile\(fn, 0\.5\)"
        ),
        "a quantile above 1": (lambda r: r.quantile(lambda s: s["x"], 1.5), r"between 0 and 1; got 1\.5"),
        "a probability of a number": (lambda r: r.probability(lambda s: s["x"]), "An event is true or false"),
        "an interval in percent": (lambda r: r.mean(lambda s: s["x"]).interval(90), "", r"pass 0\.9"),
        "no chains to draw a site of NumPyro": (lambda: cp.as_distribution(F, num_chains=0), "num_chains"),
        "a calibration of NaN": (
            lambda: cp.calibrate(energy(lambda x, k: jnp.where(x[0] > 0, jnp.nan, -x @ x)), KEY),
            "not finite at level 31"
        ),
        "a calibration once": (lambda: cp.calibrate(F, KEY, repeats=1), "repeats"),
        "NaN in a log-weight": (weighed(lambda x: x[0] + NAN), "log-weight of 'e' is NaN", "jnp.where"),
        "NaN in NumPyro's log-weight": (scene(lambda x: numpyro.factor("e", x[0] + NAN)), "log-weight of 'e' is NaN"),
        "NaN in data": (compiled(observed, F, NAN), "value of 'y' holds NaN"),
        "NaN in NumPyro's data": (compiled(numpyro_observed, F, NAN), "value of 'y' holds NaN"),
        "no chains": (lambda: ran(num_chains=0), "num_chains must be at least 1; got 0"),
        "negative chains": (lambda: ran(num_chains=-3), "got -3"),
        "no steps": (lambda: cp.AnnealedMCMC(cp.MALA(0.1), 0), "steps_per_level"),
        "no steps of a default kernel": (lambda: cp.SMC(steps_per_level=0), "steps_per_level"),
        "unknown weights": (lambda: cp.SMC(weights="energy"), "'energy'"),
        "a threshold of zero": (lambda: cp.SMC(resample=0.0), "threshold"),
        "a step of density weights": (lambda: cp.SMC(weights="density", step=cp.ReverseStep()), "no reverse step"),
        "a step that is not DDPM's": (lambda: cp.SMC(step=cp.ReverseStep(order=1, eta=0.5)), "eta=1"),
        "a twist without limit": (lambda: cp.SMC(step=cp.ReverseStep(twist=None)), "a twist"),
        "a twist below zero": (lambda: cp.ReverseStep(twist=-1.0), "twist"),
        "an order of three": (lambda: cp.ReverseStep(order=3), "1 or 2; got 3"),
        "a control that nothing weighs": (
            lambda: cp.AnnealedMCMC(cp.MALA(), reverse_step=cp.ReverseStep()), "only weights could", 'control="none"'
        ),
        "unknown control": (lambda: cp.ReverseStep(control="linear"), "'linear'"),
        "eta above 1": (lambda: cp.Ancestral(eta=1.5), "1.5"),
        "a step's eta above 1": (lambda: cp.ReverseStep(eta=1.5), r"ReverseStep\(eta=\)"),
    },
    ProgramError: {
        "random numbers of NumPy": (
            scene(lambda x: cp.observe("y", dist.Normal(x[0], 1.0), np.random.normal())),  # noqa: NPY002
            RANDOM,
            "a site",
        ),
        "random numbers of Python": (seen(lambda x: dist.Normal(random.random() * x[0], 1.0), 0.0), RANDOM),
        "a site outside": (lambda: cp.sample("y", dist.Normal(0, 1)), "outside", r"@cp\.program"),
        "data outside": (lambda: cp.observe("y", dist.Normal(0, 1), 1), "outside", r"@cp\.program"),
        "a weight outside": (lambda: cp.factor("w", 1.0), "outside", r"@cp\.program"),
        "a shape of samples": (
            scene(lambda x: numpyro.sample("z", dist.Normal(0, 1), sample_shape=(3,))),
            r"sample_shape=\(3,\)", r"expand\(\[3\]\)"
        ),
        "if on a static latent": (predicting(lambda x, m: 1.0 if m > 0 else -1.0), "`if`.*site 'm'", WHERE),
        "if on a noised site": (predicting(lambda x, m: m if x[0] > 0 else -m), "`if`.*site 'x'", r"cp\.mixture"),
        "and on a latent": (predicting(lambda x, m: m * (m > 0 and m < 1)), "`and`.*site 'm'", WHERE),
        "while on a latent": (predicting(loop), "`while`.*site 'm'", WHERE),
        "float of a latent": (predicting(lambda x, m: float(m)), "float.*site 'm'", WHERE),
        "int of a latent": (predicting(lambda x, m: [1.0, 2.0][int(m)]), "int.*site 'm'", r"jnp\.stack"),
        "a list by a latent": (predicting(lambda x, m: [1.0, 2.0][m.astype(int)]), "index.*site 'm'", r"jnp\.stack"),
        "item of a latent": (predicting(lambda x, m: m.item()), r"\.item.*site 'm'", WHERE),
        "range of a latent": (predicting(lambda x, m: sum(range(m.astype(int)))), "size.*site 'm'", "sizes"),
        "a mask by a latent": (predicting(lambda x, m: x[x > 0].sum()), "entries.*site 'x'", r"jnp\.where\(mask"),
        "NumPy on a latent": (predicting(lambda x, m: np.sin(m)), "NumPy on.*site 'm'", NUMPY),
        "NumPy's norm of a site": (predicting(lambda x, m: np.linalg.norm(x)), "NumPy on.*site 'x'", NUMPY),
        "if on the level": (lambda: scene(by_level)().score({"x": Y}, 0), "function of the level at 'w'.*`if`", WHERE),
        "a call of a program": (lambda: single(F), "'single' was called", r"cp\.compile\(single, …\)"),
        "data in scan": (
            scene(lambda x: jax.lax.scan(lambda c, _: (c, cp.observe("y", dist.Normal(c, 1.0), 0.3)), x[0], None, 3)),
            "'y' stands inside of .*lax.scan", "Python loop"
        ),
        "a site in vmap": (scene(lambda x: jax.vmap(lambda m: cp.sample("y", dist.Normal(m, 1.0)))(x)), "'y' stands"),
        "a weight in cond": (
            scene(lambda x: jax.lax.cond(x[0] > 0, lambda: cp.factor("w", x[0]), lambda: None)),
            "'w' stands inside of .*lax.cond", r"jnp\.where"
        ),
        "a key in a program": (scene(lambda x: numpyro.prng_key()), "asks for a random key", r"cp\.sample\(name"),
        "a plate that draws some of its data": (compiled(in_part, jnp.zeros(4)), "takes 4 of 100"),
        "two sites with one name": (compiled(twice, F), "Two sites are called 'x'"),
        "no site": (compiled(cp.program(lambda: None)), "no site"),
        "an optimised parameter": (compiled(cp.program(lambda: numpyro.param("p", 1.0))), "numpyro.param"),
        "an observation of no site": (seen(lambda x: dist.Normal(0.0, 1.0), 1.0), "'y' depends on no site"),
        "a discrete latent": (latent_of(dist.Poisson, 2.0), "'s' is discrete"),
        "a constant as a latent": (latent_of(dist.Delta, 1.0), "'s' is a Delta"),
        "a support without a bijection": (latent_of(Circle), "no bijection"),
    },
    CapabilityError: {
        "infer in jit": (in_transformation(jax.jit, KEY), r"jax\.jit", "call it outside"),
        "infer in vmap": (in_transformation(jax.vmap, jax.random.split(KEY, 2)), r"jax\.vmap", "num_chains"),
        "infer in jit, of constants": (jax.jit(lambda: ran(sampler=cp.Ancestral())), r"jax\.jit", "call it outside"),
        "infer in grad": (
            lambda: jax.grad(lambda m: ran(normal([m, 0.0]), sampler=cp.Ancestral())["x"].mean())(0.0),
            r"jax\.grad", "call it outside"
        ),
        "HMC on a score": (moved(cp.HMC(0.1), network), r"HMC needs `energy`, but factor '.*' offers only `score`"),
        "MALA in SMC on a score": (weighs(network, kernel=cp.MALA(0.1)), "MALA needs `energy`"),
        "density weights on a learned energy": (weighs(squares, weights="density"), "needs `mode_depth`"),
        "Feynman-Kac weights without a rate": (weighs(lambda: energy(lambda x, k: -jnp.sum(x**2))), "Feynman–Kac rate"),
        "Ancestral with a NumPyro latent": (gibbs({"x": cp.MALA()}, lambda _: cp.Ancestral()), "'mu'"),
        "a calibration of a score": (lambda: cp.calibrate(network(label="cat"), KEY), "'cat' offers only its score"),
        "a calibration of terms of different numbers": (
            lambda: cp.calibrate(cp.mixture([F * F, F], log_weights=[0.0, 0.0]), KEY), "products of different numbers"
        ),
        "weights of what is not normalised": (
            lambda: cp.mixture([energy(lambda x, k: -x @ x)] * 2, weights=[1, 1]), "", r"cp\.calibrate\(factor, key\)"
        ),
        "a density of a score in NumPyro": (lambda: cp.as_distribution(network()).log_prob(Y), "offers only its score"),
        "log-density of a score": (lambda: cp.compile(single, network()).log_density({"x": Y}, 0), "only its score"),
    },
    DoublyIntractableError: {
        "a condition of NumPyro's that is a latent": (
            lambda: jax.jit(lambda c: cp.as_distribution(OPEN.given(c=c)).log_prob(Y))(1.0), "normaliser"
        ),
    },
    LoadError: {"a misspelled model": (lambda: cp.load("ring2"), "'ring2'", "did you mean 'ring2d'")},
    NetworkError: {
        "fewer conditions than members": (
            compiled(in_plate_of_5, cp.Diffusion(lambda x, t, c: x - c, SCHEDULE, event_shape=(), conditions=("c",))),
            r"returned shape \(4,\)", r"plate of 5 members condition 'c' of shape \(4,\) is one value for all"
        ),
        "a missing condition in NumPyro": (lambda: cp.as_distribution(OPEN), "", r"given\(c=…\)"),
        "NumPy in a network": (lambda: diffusion(with_numpy), "factor 'with_numpy' calls NumPy", NUMPY),
        "NumPy's norm in a network": (lambda: diffusion(with_numpy_norm), "'with_numpy_norm' calls NumPy", NUMPY),
        "if in a network": (lambda: diffusion(with_if), "`if`", WHERE),
        "NumPy in an energy": (lambda: energy(lambda x, k: -np.sum(np.asarray(x) ** 2)), "calls NumPy", NUMPY),
        "a level as an index": (lambda: energy(lambda x, k: -x[0] / SCHEDULE.sigma[k]), "calls NumPy", r"at\(level\)"),
        "an energy of whole numbers": (lambda: energy(lambda x, k: (x > 0).sum()), "int32 numbers"),
        "an energy that is NaN": (
            lambda: cp.compile(both, F, energy(lambda x, k: jnp.sqrt(-1 - x @ x), top_power=0.0)), "NaN at all of"
        ),
        "NumPy in a classifier": (
            lambda: cp.Classifier(with_numpy, SCHEDULE, event_shape=(2,)), "classifier.*calls NumPy", NUMPY
        ),
    },
    ShapeError: {
        "a metric that is no matrix": (lambda: cp.MALA(metric=np.ones(3)), r"shape \(3,\)"),
        "a calibration of no shape": (lambda: cp.calibrate(cp.Classifier(loop, SCHEDULE), KEY), "has no event shape"),
        "an event without entries": (lambda: normal(jnp.zeros(0)), "no entries"),
        "a network's event without entries": (lambda: network(event_shape=(3, 0)), "no entries"),
        "an event of less than nothing": (lambda: energy(len, (-1,)), r"shape \(-1,\)"),
        "data of the wrong shape": (compiled(observed, F, jnp.zeros(5)), r"shape \(5,\)"),
        "NumPyro's data of the wrong shape": (
            compiled(numpyro_observed, F, jnp.zeros(5)), r"'y' has shape \(5,\), but its distribution has shape \(2,\)"
        ),
        "a plate of another size than the data": (
            compiled(in_plate, 3, jnp.zeros(5)),
            r"Plate 'i' has size 3, but the value of 'y', of shape \(5,\), has 5 entries",
        ),
        "a plate over one number": (compiled(in_plate, 3, 0.0), "has no axis for it"),
        "a plate of another size than the distribution": (
            compiled(in_plate, 3, jnp.zeros(5), (5,)),
            r"Plate 'i' has size 3, but the distribution of 'y' in it has the batch shape \(5,\)",
        ),
        "a step size for other levels": (moved(cp.MALA(jnp.ones(5))), "5 step sizes"),
        "a site that is missing": (lambda: cp.compile(single, F).score({}, 0), "'x'"),
        "a batch as a position": (lambda: DENSITY.score({"x": jnp.zeros((7, 2))}, 0), r"shape \(2,\); got \(7, 2\)"),
    },
    ImproperError: {
        "levels that end in noise": (
            compiled(single, F, schedule=cp.Schedule.log_snr(12, min=-9.0, max=-2.0)),
            "log-SNR is -2, and samples would be as noisy", "end at a clean level"
        ),
        "improper": (latent_of(dist.ImproperUniform, REAL, (), ()), "'s' has the prior ImproperUniform"),
        "a prior without end": (latent_of(dist.Uniform, 0.0, jnp.inf), "'s' is not finite"),
        "a calibration of what rises": (lambda: cp.calibrate(energy(lambda x, k: x @ x), KEY), "rises without bound"),
        "a calibration of a classifier": (lambda: cp.calibrate(CLASSIFIER.given(label=0), KEY), "improper"),
        "a log-weight that rises": (weighed(lambda x: x[1] ** 2), "rises without bound"),
        "a flat energy": (lambda: cp.compile(single, energy(lambda x, k: 0 * x.sum())), "rises without bound"),
        "an energy that rises": (
            lambda: cp.compile(both, F, energy(lambda x, k: 100 * x @ x, top_power=0.0)), "rises without bound"
        ),
    },
    AlignmentError: {
        "factors that cannot be aligned": (compiled(both, of_levels(10), of_levels(7)), "its nearest"),
        "other levels than a model's few": (
            compiled(single, of_levels(10), schedule=cp.Schedule.linear(50)), "its nearest", r"factor\.schedule\.(?!ev)"
        ),
    },
    LevelError: {
        "level out of range": (lambda: DENSITY.score({"x": Y}, 32), "32"),
        "level negative": (lambda: DENSITY.log_density({"x": Y}, -1), "-1"),
    },
}  # fmt: skip


def test_programs_are_pickled_by_name_and_densities_and_results_are_copied(result):
    assert pickle.loads(pickle.dumps(single)) is single
    x = {"x": jnp.ones(2)}
    for copied in (copy.copy, copy.deepcopy):
        np.testing.assert_array_equal(
            copied(DENSITY).score(x, 0)["x"], DENSITY.score(x, 0)["x"]
        )
        np.testing.assert_array_equal(copied(result)["x"], result["x"])


@pytest.mark.parametrize(("kind", "call", "words", "fix"), rows(MISTAKES))
def test_is_answered_with_the_line_and_a_way_out(
    kind, call, words, fix, result, nothing_is_compiled
):
    before = time.process_time()
    error = refused(
        (lambda: call(result)) if inspect.signature(call).parameters else call,
        kind,
        words,
        fix,
    )
    assert re.search(words, error.found), error
    assert time.process_time() - before < 5


@pytest.mark.parametrize(
    ("scale", "prior"),
    [
        (jnp.exp, STANDARD),
        (lambda s: 5.0 + 0.1 * jnp.tanh(s), STANDARD),
        (lambda s: s, dist.Normal(5.0, 0.1)),
    ],
    ids=["exp", "away from 0", "a latent far from 0"],
)
def test_a_scale_that_is_positive_is_no_mistake(scale, prior):
    assert seen(lambda x: dist.Normal(0.0, scale(cp.sample("s", prior))), 1.0)()


@pytest.mark.parametrize(
    ("scale", "named"), [(lambda s: s, True), (jnp.exp, False)], ids=["s", "exp(s)"]
)
def test_a_scale_that_becomes_negative_in_a_run_is_named(scale, named):
    """Normal(1, 0.5) is above 0 where the program is compiled, and below it where
    chains go."""
    program = cp.program(
        lambda: cp.observe(
            "y", dist.Normal(0.0, scale(cp.sample("s", dist.Normal(1.0, 0.5)))), 0.1
        )
    )
    sampler = cp.AnnealedMCMC(cp.MALA(0.3), 5)
    result = cp.infer(
        cp.compile(program), KEY, num_chains=64, sampler=sampler, progress=False
    )
    assert result.status.has("non_finite") == named
    assert (
        "The likelihood of 'y' is NaN near the chains" in result.status.message
    ) == named


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


# what a network is told of time
# ------------------------------------------------------------------------------------


LINEAR, SHORT = cp.Schedule.linear(1000), cp.Schedule.linear(100)
WHATS, TRAINED = (
    ("epsilon", "score", "x0", "v"),
    "schedule of its training, of 1000 levels",
)


def told_of_time(what, time, schedule):
    """The exact network of N(m, v), whose level is what ``time`` says."""
    mean, variance = jnp.array([0.3, -0.2]), jnp.array([0.04, 0.3])

    def output(x, t):
        if time == "level":
            at = lambda numbers: jnp.interp(
                1.0 * t, jnp.arange(schedule.num_levels), numbers
            )
            a, s = at(jnp.asarray(schedule.alpha)), at(jnp.asarray(schedule.sigma))
        else:
            a, s = jax.nn.sigmoid(1.0 * t) ** 0.5, jax.nn.sigmoid(-1.0 * t) ** 0.5
        clean = mean + a * variance / (a**2 * variance + s**2) * (x - a * mean)
        epsilon = (x - a * clean) / s
        return {
            "epsilon": epsilon,
            "x0": clean,
            "score": -epsilon / s,
            "v": a * epsilon - s * clean,
        }[what]

    return output


@pytest.mark.parametrize(
    ("what", "time", "schedule", "declared", "on", "fix"),
    [
        *(
            (
                what,
                "level",
                LINEAR,
                "log_snr",
                LINEAR,
                f"time='level' with the {TRAINED}",
            )
            for what in WHATS[:3]
        ),
        *(
            (what, "log_snr", LINEAR, "level", LINEAR, "time='log_snr'")
            for what in ("epsilon", "v")
        ),
        *(
            (what, "level", LINEAR, "level", SHORT, TRAINED)
            for what in ("epsilon", "v", "x0")
        ),
        (
            "epsilon",
            "level",
            cp.Schedule.cosine(1000),
            "level",
            SHORT,
            "of 1000 levels",
        ),
    ],
)
def test_another_time_or_schedule_is_named_as_that(
    what, time, schedule, declared, on, fix
):
    factor = learned(told_of_time(what, time, schedule), what, on, time=declared)
    words = f"does not do what parameterization='{what}' declares"
    assert (
        "parameterization="
        not in refused(lambda: cp.compile(single, factor), NetworkError, words, fix).fix
    )


@pytest.mark.parametrize("what", WHATS)
@pytest.mark.parametrize("time", ["level", "log_snr"])
def test_the_right_time_passes(what, time):
    schedule = LINEAR if time == "level" else cp.Schedule.log_snr(60)
    right = learned(told_of_time(what, time, schedule), what, schedule, time=time)
    assert cp.compile(single, right).graph.doubts == ()


# terminals that lack characters
# ------------------------------------------------------------------------------------


def test_text_is_spelled_where_a_terminal_has_ascii_only(result, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    mean, error = result.mean(lambda s: s["x"][0]), errors.LoadError("π", fix="σ")
    for value in (
        DENSITY,
        DENSITY.schedule,
        result,
        result.status,
        result.summary(),
        cp.zoo(),
        mean,
        error,
    ):
        print(value, repr(value), sep="\n", flush=True)
    shown = terminal.buffer.getvalue().decode("ascii")
    assert all(words in shown for words in ("pi_k(x) ~ f(x)", "+-", "sigma"))


@pytest.mark.parametrize(
    ("text", "ascii_text"),
    [
        ("π ∝ σ²·‖x‖ ± ½ … é", "pi ~ sigma2*||x|| +- 1/2 ... e"),
        ("λ → −∞", "lambda -> -inf"),
        ("漢", "?"),
    ],
)
def test_characters_are_spelled(text, ascii_text):
    assert spelled(text, "ascii") == ascii_text
    assert spelled(text, "utf-8") == text


def test_a_missing_site_is_a_missing_key(result):
    with pytest.raises(KeyError) as caught:
        result["nope"]
    error = caught.value
    assert isinstance(error, (errors.UnknownSiteError, InvalidValueError))
    assert str(error).startswith(
        "This result has no site 'nope'. (test_mistakes.py:"
    )  # no KeyError's quotes
    assert "its sites are: 'x'" in error.fix


def test_a_model_of_many_levels_is_offered_some_of_them():
    """The schedule that the error names is one that compiles, with about as many levels
    as were asked for."""
    model = diffusion(lambda x, t: x * t, cp.Schedule.linear(1000))
    caught = refused(
        lambda: cp.compile(single, model, schedule=cp.Schedule.linear(50)),
        AlignmentError,
        "",
    )
    assert "schedule=factor.schedule.every(20)): 51 of its 1000" in caught.fix
    density = cp.compile(single, model, schedule=model.schedule.every(20))
    assert density.num_levels == 51
    x = jnp.array([0.3, -0.2])
    own = cp.compile(single, model)
    for level, same in ((0, 0), (7, 140), (50, 999)):
        np.testing.assert_allclose(
            density.score({"x": x}, level)["x"],
            own.score({"x": x}, same)["x"],
            rtol=1e-6,
        )


def test_what_resembles_a_mistake_and_is_none():
    """A support that depends on a latent, soft evidence in a plate, data masked where
    they are NaN, whole floats, an observation that depends on a site through its value,
    and log-weights that rise and fall in the end."""

    @cp.program
    def fine(y):
        top = cp.sample("top", dist.HalfNormal(1.0))
        cp.observe("below", dist.Uniform(0.0, top), 50.0)
        with numpyro.plate("i", 3):
            numpyro.factor("soft", -top)
            with numpyro.handlers.mask(mask=jnp.isfinite(y)):
                numpyro.sample("y", dist.Normal(top, 1.0), obs=y)
        cp.observe("count", dist.Poisson(top), 2.0)

    assert set(cp.compile(fine, jnp.array([1.0, jnp.nan, 0.0])).sites) == {"top"}
    equal = cp.program(
        lambda f: cp.observe("difference", dist.Normal(0.0, 0.5), cp.sample("x", f))
    )
    assert cp.compile(equal, normal()).graph.observations[0].depends_on == {"x"}
    for log_weight in (lambda x: 20 * x[0], lambda x: 0.4 * x @ x):
        assert weighed(log_weight)()


def test_where_functions_do_not_rise_nothing_else_is_evaluated(monkeypatch):
    """Along the second entry this one is flat, and the factor falls."""
    monkeypatch.setattr(proper, "log_densities", None)
    assert weighed(lambda x: -(x[0] ** 2))()


@cp.program
def asks(f):
    x = cp.sample("x", f)
    shift = float(x[0])
    cp.observe("y", dist.Normal(shift, 1.0), 0.3)


@pytest.mark.parametrize(
    ("call", "kind", "program", "line"),
    [
        (
            lambda: cp.compile(asks, F),
            ProgramError,
            asks,
            3,
        ),  # not the statement that uses the value
        (lambda: cp.compile(twice, F), ProgramError, twice, 3),
        (
            lambda: ran(network(), sampler=cp.AnnealedMCMC(cp.HMC(0.1), 1)),
            CapabilityError,
            single,
            3,
        ),
    ],
    ids=["the line that asks", "the statement", "the factor's site"],
)
def test_the_place_is_a_line_of_the_program(call, kind, program, line):
    code = program.function.__code__
    caught = refused(call, kind, "")
    assert caught.where == f"{Path(code.co_filename).name}:{code.co_firstlineno + line}"
    assert (
        program is not twice
        or f"test_mistakes.py:{code.co_firstlineno + 2}" in caught.found
    )


def test_every_error_is_also_a_builtin_one():
    for name in errors.__all__:
        kind = getattr(errors, name)
        if kind is not errors.ComposeProbError:
            assert issubclass(kind, errors.ComposeProbError)
            assert issubclass(kind, (ValueError, TypeError)), name


def test_every_error_says_how_to_fix_it():
    calls = [
        (path, node)
        for path in Path(cp.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", getattr(node.func, "attr", None)) in errors.__all__
    ]
    assert len(calls) > 200
    without = [
        f"{path.name}:{n.lineno}"
        for path, n in calls
        if "fix" not in {k.arg for k in n.keywords}
    ]
    assert without == []


def test_the_command_line_has_no_place_in_a_program():
    namespace = {"__name__": "composeprob.cli.somewhere", "errors": errors}
    exec("error = errors.LoadError('No such file.', fix='look.')", namespace)
    assert namespace["error"].where is None
    assert str(namespace["error"]) == "No such file.\n  Fix: look."


def test_numpy_integers_are_numbers_of_chains_and_steps_which_have_a_default():
    result = ran(
        num_chains=np.int64(4), sampler=cp.AnnealedMCMC(cp.MALA(0.1), np.int64(1))
    )
    assert result["x"].shape == (4, 2)
    assert cp.AnnealedMCMC(cp.MALA()).steps_per_level == 10
