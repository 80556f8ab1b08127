"""Mistakes of a first day, bad input, and Python that reads well and means nothing
here.

Each raises an error of the library in seconds, before anything is compiled, in the
user's terms: what was found, the user's line, and what to write instead. Places are
lines of this file.
"""

import ast
import copy
import dataclasses
import inspect
import io
import pickle
import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray

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
from composeprob.factors.factor import LeafFactor, Traits
from composeprob.runtime import compiled as driver
from composeprob.text import spelled
from messages import check_finding
from refusals import refused, rows
from sampling_cases import SCHEDULE, both, learned, normal, single

KEY = jax.random.key(0)
Y = jnp.zeros(2)
NAN = jnp.array([1.0, jnp.nan])
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
    """Compile a program of one site x, and of statements that are functions of it."""

    @cp.program
    def written():
        x = cp.sample("x", F)
        for statement in statements:
            statement(x)

    return lambda: cp.compile(written)


def seen(law, value=Y):
    """Compile a program of one site x, with data whose distribution is a function of
    it."""
    return scene(lambda x: cp.observe("y", law(x), value))


def latent_of(law, *parameters):
    """Compile a program with a latent of this distribution."""
    return scene(lambda x: cp.sample("s", law(*parameters)))


def wide_as(scale):
    """Compile a program whose noise scale is a function of x."""
    return seen(lambda x: dist.Normal(0.0, scale(x)), 1.0)


def weighed(log_weight):
    """Compile a program with a log-weight that is a function of x."""
    return scene(lambda x: cp.factor("e", log_weight(x)))


def ran(factor=None, **options):
    density = DENSITY if factor is None else cp.compile(single, factor)
    defaults = {"key": KEY, "num_chains": 4, "progress": False}
    return cp.infer(density, **defaults | options)


def moved(kernel, factor=lambda: None):
    return lambda: ran(factor(), sampler=cp.AnnealedMCMC(kernel, 1))


def weighs(factor, **options):
    return lambda: ran(factor(), sampler=cp.SMC(**options))


@dataclasses.dataclass
class Table:
    """Data of a user's in one object."""

    y: object


def in_double():
    """Run in another precision than that of the compiled program."""
    density = cp.compile(single, F)
    jax.config.update("jax_enable_x64", True)
    try:
        return cp.infer(density, KEY, num_chains=4, progress=False)
    finally:
        jax.config.update("jax_enable_x64", False)


def plates_of_one_dim():
    with numpyro.plate("rows", 2, dim=-1), numpyro.plate("columns", 2, dim=-1):
        cp.sample("s", STANDARD)


def of_tokens(potential):
    return cp.Energy(potential, length=3, num_values=4)


TOKENS = cp.compile(single, of_tokens(lambda tokens, visible: 1.0 * tokens[0]))


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


def halved(x):
    """Halve a number three times, by a loop that has no gradient."""
    return jax.lax.while_loop(
        lambda carry: carry[0] < 3,
        lambda carry: (carry[0] + 1, carry[1] / 2),
        (0, x),
    )[1]


class Own(LeafFactor):
    """A normal density that returns its value and score in another form."""

    form: object = eqx.field(static=True)
    offers: object = eqx.field(static=True)

    def __init__(self, form, offers=Traits.ENERGY):
        self.schedule = SCHEDULE
        self.event_shape = (2,)
        self.fixed = {}
        self.label = "own"
        self.form = form
        self.offers = offers

    @property
    def traits(self):
        return Traits(self.offers)

    def evaluate(self, x, noise, conditions):
        return self.form(*jax.value_and_grad(lambda x: -0.5 * x @ x)(x))


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
    if likelihood is None:
        likelihood = dist.Normal(x, 1.0)
    cp.observe("y", likelihood, y, anneal=anneal)


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
    """A distribution without a known support."""

    support = dist.constraints.dependent

    def sample(self, key, sample_shape=()):
        return jnp.zeros(sample_shape)


def compiled(program, *args, **kwargs):
    return lambda: cp.compile(program, *args, **kwargs)


def random_of_numpy():
    return np.random.normal()  # noqa: NPY002


REAL = dist.constraints.real
# Calls by kind of error, and by the mistake. A call with a parameter takes a result.
MISTAKES = {
    UnknownNameError: {
        "a factor's log_prob": lambda: F.log_prob(Y),
        "a factor's score": lambda: F.score(Y, 0),
        "a factor's sample": lambda: F.sample(KEY),
        "a misspelled method": lambda: F.givn(c=1),
        "a misspelled name": lambda: cp.sampel("x", F),
        "another library's training": lambda: cp.training.fit(F),
        "a misspelled metric": lambda: cp.metrics.waserstein(Y, Y),
        "a distribution": lambda: cp.Normal(0.0, 1.0),
        "a density's log_prob": lambda: DENSITY.log_prob({"x": Y}),
        "a density's sample": lambda: DENSITY.sample(KEY),
        "a site by a point": lambda r: r.x,
        "another library's name": lambda r: r.get_samples(),
        "a misspelled diagnostic": lambda r: r.log_evidense,
    },
    WrongTypeError: {
        "an own factor that offers text": lambda: cp.compile(
            single, Own(lambda *pair: pair, "energy")
        ),
        "a status as a truth value": lambda result: 1 if result.status else 0,
        "a training run as a factor": latent_of(
            lambda: SimpleNamespace(factor=normal())
        ),
        "a status as text": lambda result: result.status == "ok",
        "a density as a model of NumPyro's": lambda: DENSITY.to_numpyro()(),
        "compiled code in no folder": lambda: cp.cache(3),
        "an estimate of two numbers as one": lambda result: float(
            result.mean(lambda s: s["x"])
        ),
        "a call of a factor": lambda: F(Y),
        "an entry of a factor": lambda: F[0],
        "a loop over a factor": lambda: list(F),
        "~ factor": lambda: ~F,
        "factor and factor": lambda: F and F,
        "a log-weight that is an event": weighed(lambda x: x[0] > 0),
        "factor @ factor": lambda: F @ F,
        "no numbers of a sample": lambda r: r.mean(lambda s: None),
        "a word of a sample": lambda r: r.mean(lambda s: "left"),
        "several things of a sample": lambda r: r.mean(lambda s: {"x": s["x"]}),
        "a rule of another name": moved(cp.MALA(lambda s: s.sigmas)),
        "a step-size rule of two": moved(cp.MALA(lambda s, k: s.sigma)),
        "data in jit": lambda: jax.jit(lambda y: cp.compile(observed, F, y))(Y),
        "a reverse step by its order": lambda: cp.AnnealedMCMC(
            cp.MALA(), reverse_step=2
        ),
        "part of the data": lambda: cp.product(
            CONDITIONAL, over={"c": Y}, batch_size=1
        ),
        "a condition by position": lambda: CONDITIONAL.given(3),
        "a condition that is text": lambda: CONDITIONAL.given(c="cat"),
        "guidance without a scale": lambda: cp.guide(CONDITIONAL, c=1),
        "no schedule": lambda: cp.Analytic(dist.Normal(0, 1)),
        "no event_shape": lambda: cp.Energy(lambda x, k: 0.0, SCHEDULE),
        "event_shap": lambda: network(event_shap=(2,)),
        "a network that is a factor": lambda: cp.Diffusion(
            F, SCHEDULE, event_shape=(2,)
        ),
        "an energy that is a factor": lambda: cp.Energy(F, SCHEDULE, event_shape=(2,)),
        "a network of PyTorch": lambda: cp.Diffusion(
            Torch(), SCHEDULE, event_shape=(2,)
        ),
        "a schedule's constructor": lambda: cp.Schedule(10),
        "a schedule of no levels": lambda: cp.Schedule.cosine(),
        "data for cp.sample": scene(
            lambda x: cp.sample("y", dist.Normal(x, 1.0), obs=Y)
        ),
        "data by another name": scene(
            lambda x: cp.observe("y", dist.Normal(x, 1.0), obs=Y)
        ),
        "no data": scene(lambda x: cp.observe("y", dist.Normal(x, 1.0))),
        "no name": scene(lambda x: cp.sample(F)),
        "the name second": scene(lambda x: cp.sample(F, "z")),
        "a number as a name": scene(lambda x: cp.sample(3, F)),
        "an empty name": scene(lambda x: cp.factor("", 0.0)),
        "a model's name": lambda: cp.compile(single, "ring2d"),
        "a model's number": lambda: cp.load(3),
        "a scale in per cent": seen(lambda x: dist.Normal(x, "10%")),
        "no scale": latent_of(lambda: dist.Normal(0.0, None)),
        "a location in words": latent_of(lambda: dist.Normal("wide", 1.0)),
        "a density in a pickle": lambda: pickle.dumps(DENSITY),
        "a result in a pickle": lambda result: pickle.dumps(result),
        "an array as a site": lambda: cp.compile(single, np.zeros(2)),
        "a class as a site": lambda: cp.compile(single, dist.Normal),
        "a factor's class as a site": lambda: cp.compile(single, cp.Analytic),
        "an object with data": lambda: cp.compile(observed, F, Table(Y)),
        "a namespace with data": lambda: cp.compile(observed, F, SimpleNamespace(y=Y)),
        "data by columns": lambda: cp.compile(observed, F, xarray.Dataset({"a": 1.0})),
        "an entry of a schedule": lambda: SCHEDULE[3],
        "a list of a schedule": lambda: list(SCHEDULE),
        "a schedule of texts": lambda: cp.Schedule.from_arrays(["a"], ["b"]),
        "a number as a key of a site of NumPyro": lambda: cp.as_distribution(F).sample(
            0
        ),
        "a number as a key of draws": lambda: cp.as_distribution(F * G).sample(0),
        "a code that is a number": lambda r: r.status.has(3),
        "a program as a site": lambda: cp.compile(single, single),
        "a factor as a likelihood": seen(lambda x: F),
        "a class as a likelihood": seen(lambda x: dist.Normal),
        "a factor as a weight": scene(lambda x: cp.factor("w", F)),
        "guidance of a number": lambda: cp.guide(3.0, CONDITIONAL, c=1.0),
        "the prior of a program": lambda: cp.prior(single),
        "a model's folder that is a number": lambda: cp.from_diffusers(3),
        "a number as a key of data": lambda: DENSITY.predict(0, {"x": Y[None]}),
        "a distribution as a weight": weighed(lambda x: STANDARD),
        "a program under jit": lambda: cp.program(jax.jit(observed.function)),
        "a program with a key": lambda: cp.program(numpyro.handlers.seed(yields, 0)),
        "a program that yields": lambda: cp.program(yields),
        "a program that waits": lambda: cp.program(waits),
        "a decorator with brackets": lambda: cp.program(),
        "num_chains by position": lambda: cp.infer(DENSITY, KEY, 100),
        "a missing argument": compiled(both, F),
        "no num_chains": lambda: cp.infer(DENSITY, KEY),
        "an unknown argument": lambda: ran(chains=8),
        "num_samples": lambda: ran(num_samples=8),
        "a device": lambda: ran(device="gpu"),
        "a number as a key": lambda: ran(key=7),
        "a path that is none": lambda: ran(checkpoint_dir=True),
        "stepsize": lambda: cp.MALA(stepsize=0.1),
        "a sampler without a kernel": lambda: cp.AnnealedMCMC(),
        "an algorithm's name": lambda: cp.BlackJAX("nuts"),
        "a metric without its bandwidth": lambda: cp.metrics.mmd(Y, Y),
        "a call of a density": lambda: DENSITY(Y),
        "an entry of a density": lambda: DENSITY["x"],
        "no level": lambda: DENSITY.score({"x": Y}),
        "a start of a number": lambda: DENSITY.initial(3),
        "a check of nothing": lambda: DENSITY.check(),
        "a mean of nothing": lambda r: r.mean(),
        "a file that is a number": lambda r: r.save(3),
        "a report that is a number": lambda r: r.report(3),
        "axes that are a number": lambda r: r.to_arviz(dims=3),
        "a factor for NumPyro": scene(lambda x: numpyro.sample("z", F)),
        "a factor as NumPyro's data": scene(lambda x: numpyro.sample("y", F, obs=x)),
        "number * factor": lambda: 2.0 * F,
        "factor * number": lambda: F * 2,
        "factor / number": lambda: F / 2.0,
        "array * factor": lambda: jnp.ones(2) * F,
        "NumPy's array * factor": lambda: np.ones(2) * F,
        "NumPy's number * factor": lambda: np.float32(2.0) * F,
        "factor + factor": lambda: F + G,
        "sum of factors": lambda: sum([F, G]),
        "factor | factor": lambda: F | G,
        "factor & factor": lambda: F & G,
        "factor - factor": lambda: F - G,
        "number - factor": lambda: 1 - F,
        "- factor": lambda: -F,
        "1 / factor": lambda: 1 / F,
        "number ** factor": lambda: 2**F,
        "factor * distribution": lambda: F * dist.Normal(0.0, 1.0),
        "distribution * factor": lambda: dist.Normal(0.0, 1.0) * F,
        "factor * network": lambda: F * with_numpy,
        "factor ** text": lambda: F ** "2",
        "mixture of arguments": lambda: cp.mixture(F, G),
        "product of a list": lambda: cp.product([F, G]),
        "a class as a sampler": lambda: ran(sampler=cp.SMC),
        "a name as a sampler": lambda: ran(sampler="smc"),
        "a kernel's class as a sampler": lambda: ran(sampler=cp.MALA),
        "a class as a kernel": lambda: cp.AnnealedMCMC(cp.MALA, 3),
        "a class as SMC's kernel": lambda: cp.SMC(cp.HMC),
        "a metric of other things": lambda: cp.MALA(metric=len),
        "no program": lambda: cp.compile(lambda f: f, F),
        "a network as a site": compiled(single, lambda x, t: x),
        "data that is text": compiled(observed, F, "one"),
        "data that is missing": compiled(observed, F, None),
        "data of unequal lengths": compiled(observed, F, [[1, 2], [3]]),
        "data that is missing in part": compiled(observed, F, [1.0, None]),
        "data that are days": compiled(observed, F, np.zeros(2, "datetime64[D]")),
        "a likelihood that is no distribution": compiled(observed, F, 1.0, 3),
        "complex data": compiled(observed, F, jnp.ones(2) * 1j),
        "text as NumPyro's data": compiled(numpyro_observed, F, "one"),
        "a block by number": lambda: cp.Gibbs({3: cp.MALA()}),
        "blocks without kernels": lambda: cp.Gibbs(["x"]),
        "a block without a kernel": lambda: cp.Gibbs({"x": 0.1}),
        "blocks in blocks": lambda: cp.Gibbs({"x": cp.Gibbs({"x": cp.MALA()})}),
        "half a chain": lambda: ran(num_chains=2.5),
        "a boolean of chains": lambda: ran(num_chains=True),
        "an old key": lambda: ran(key=jax.random.PRNGKey(0)),
        "many keys": lambda: ran(key=jax.random.split(KEY)),
        "a kernel as a sampler": lambda: ran(sampler=cp.MALA(0.1)),
        "no density": lambda: cp.infer(F, KEY, num_chains=4),
        "a program and what it takes": lambda: cp.infer(
            single, F, key=KEY, num_chains=4
        ),
        "no mesh": lambda: ran(mesh=8),
        "no kernel": lambda: cp.AnnealedMCMC("MALA", 3),
        "a site of NumPyro that is no factor": lambda: cp.as_distribution(STANDARD),
        "a kernel to draw sites of NumPyro": lambda: cp.as_distribution(
            F, sampler=cp.MALA()
        ),
        "a calibration of a name": lambda: cp.calibrate("ring", KEY),
        "a calibration by a number": lambda: cp.calibrate(F, 0),
        "a site for a function": lambda r: r.quantile("x", 0.5),
        "a threshold in words": lambda: cp.SMC(resample="half"),
        "a class for a meeting": lambda: cp.SMC(resample=cp.Resample),
        "a class for weights": lambda: cp.SMC(weights=cp.FeynmanKac),
        "a step in words": lambda: cp.SMC(step="first"),
        "eta in words": lambda: cp.Ancestral(eta="ddim"),
    },
    InvalidValueError: {
        "a misspelled code": lambda r: r.status.has("shares_frozn"),
        "levels that are no whole number": lambda: cp.Schedule.log_snr(10.0),
        "a token beyond the last": lambda: TOKENS.log_density(
            {"x": np.array([0, 0, 9])}, 0
        ),
        "a token below the first": lambda: TOKENS.log_density(
            {"x": np.array([0, 0, -1])}, 0
        ),
        "a report in no folder": lambda result: result.report("/proc/run.html"),
        "a plate without members": compiled(in_plate, 0, jnp.zeros(0)),
        "a count of 41 bits": seen(
            lambda x: dist.Poisson(jnp.exp(x)), np.array([2**40, 3])
        ),
        "bounds the wrong way": lambda: cp.Analytic(dist.Uniform(1.0, 0.0), SCHEDULE),
        "a prior's negative scale": latent_of(dist.Normal, 0.0, -1.0),
        "a negative scale of data": seen(lambda x: dist.Normal(x, -0.1)),
        "a scale of 0": wide_as(lambda x: jnp.arange(2.0)),
        "a latent as a scale": wide_as(lambda x: cp.sample("s", STANDARD)),
        "twice a latent": latent_of(
            lambda: dist.Normal(0.0, 2 * cp.sample("m", STANDARD))
        ),
        "a noised site as a scale": seen(lambda x: dist.Normal(0.0, x)),
        "a noised number that is above 0 where it is traced": wide_as(lambda x: x[0]),
        "an empty interval": latent_of(dist.Uniform, 1.0, 0.0),
        "an unknown metric": lambda: cp.MALA(metric="dense"),
        "a negative inverse mass": lambda: cp.HMC(metric={"x": -1.0}),
        "a metric that is no covariance": lambda: cp.MALA(metric=-np.eye(2)),
        "unknown policy": compiled(observed, F, jnp.zeros(2), anneal="cold"),
        "unknown policy of a block": lambda: cp.annealed("cold"),
        "no policy of a block": lambda: cp.annealed(None),
        "a count and a half": seen(lambda x: dist.Poisson(jnp.exp(x[0])), 1.5),
        "a negative count": seen(lambda x: dist.Poisson(jnp.exp(x[0])), -1),
        "no blocks": lambda: cp.Gibbs({}),
        "a block of no sites": lambda: cp.Gibbs({(): cp.MALA()}),
        "a site in two blocks": lambda: cp.Gibbs(
            {"x": cp.MALA(), ("mu", "x"): cp.MALA()}
        ),
        "a site in no block": gibbs({"x": cp.MALA(), "mu": cp.MALA()}),
        "a site in no block, by SMC": gibbs({"x": cp.MALA()}, cp.SMC),
        "a block of a site that is not there": gibbs(
            {"x": cp.MALA(), ("mu", "sigm"): cp.MALA()}
        ),
        "a quantile's arguments swapped": lambda r: r.quantile(0.5, lambda s: s["x"]),
        "a quantile above 1": lambda r: r.quantile(lambda s: s["x"], 1.5),
        "a probability of a number": lambda r: r.probability(lambda s: s["x"]),
        "an interval in percent": lambda r: r.mean(lambda s: s["x"]).interval(90),
        "no chains to draw a site of NumPyro": lambda: cp.as_distribution(
            F, num_chains=0
        ),
        "a calibration of NaN": lambda: cp.calibrate(
            energy(lambda x, k: jnp.where(x[0] > 0, jnp.nan, -x @ x)), KEY
        ),
        "a calibration once": lambda: cp.calibrate(F, KEY, repeats=1),
        "NaN in a log-weight": weighed(lambda x: x[0] + NAN[1]),
        "NaN in NumPyro's log-weight": scene(lambda x: numpyro.factor("e", x[0] + NAN)),
        "NaN in data": compiled(observed, F, NAN),
        "NaN in NumPyro's data": compiled(numpyro_observed, F, NAN),
        "no chains": lambda: ran(num_chains=0),
        "negative chains": lambda: ran(num_chains=-3),
        "no steps": lambda: cp.AnnealedMCMC(cp.MALA(0.1), 0),
        "no steps of a default kernel": lambda: cp.SMC(steps_per_level=0),
        "unknown weights": lambda: cp.SMC(weights="energy"),
        "a threshold of zero": lambda: cp.SMC(resample=0.0),
        "a step of density weights": lambda: cp.SMC(
            weights="density", step=cp.ReverseStep()
        ),
        "a step that is not DDPM's": lambda: cp.SMC(
            step=cp.ReverseStep(order=1, eta=0.5)
        ),
        "a twist without limit": lambda: cp.SMC(step=cp.ReverseStep(twist=None)),
        "a twist below zero": lambda: cp.ReverseStep(twist=-1.0),
        "an order of three": lambda: cp.ReverseStep(order=3),
        "a control that nothing weighs": lambda: cp.AnnealedMCMC(
            cp.MALA(), reverse_step=cp.ReverseStep()
        ),
        "unknown control": lambda: cp.ReverseStep(control="linear"),
        "eta above 1": lambda: cp.Ancestral(eta=1.5),
        "a step's eta above 1": lambda: cp.ReverseStep(eta=1.5),
    },
    ProgramError: {
        "another precision": in_double,
        "two plates of one dim": lambda: cp.compile(cp.program(plates_of_one_dim)),
        "a loop without a gradient in an energy": lambda: cp.compile(
            single, energy(lambda x, k: -halved(x @ x))
        ),
        "a loop without a gradient in a program": weighed(lambda x: -halved(x @ x)),
        "a site as a size": weighed(lambda x: len(range(x[0]))),
        "a site as a key": weighed(lambda x: {0.0: 1.0}[x[0]]),
        "random numbers of NumPy": scene(
            lambda x: cp.observe("y", dist.Normal(x[0], 1.0), random_of_numpy())
        ),
        "random numbers of Python": seen(
            lambda x: dist.Normal(random.random() * x[0], 1.0), 0.0
        ),
        "a site outside": lambda: cp.sample("y", dist.Normal(0, 1)),
        "data outside": lambda: cp.observe("y", dist.Normal(0, 1), 1),
        "a weight outside": lambda: cp.factor("w", 1.0),
        "a shape of samples": scene(
            lambda x: numpyro.sample("z", dist.Normal(0, 1), sample_shape=(3,))
        ),
        "if on a static latent": predicting(lambda x, m: 1.0 if m > 0 else -1.0),
        "if on a noised site": predicting(lambda x, m: m if x[0] > 0 else -m),
        "and on a latent": predicting(lambda x, m: m * (m > 0 and m < 1)),
        "while on a latent": predicting(loop),
        "float of a latent": predicting(lambda x, m: float(m)),
        "int of a latent": predicting(lambda x, m: [1.0, 2.0][int(m)]),
        "a list by a latent": predicting(lambda x, m: [1.0, 2.0][m.astype(int)]),
        "item of a latent": predicting(lambda x, m: m.item()),
        "range of a latent": predicting(lambda x, m: sum(range(m.astype(int)))),
        "a mask by a latent": predicting(lambda x, m: x[x > 0].sum()),
        "NumPy on a latent": predicting(lambda x, m: np.sin(m)),
        "NumPy's norm of a site": predicting(lambda x, m: np.linalg.norm(x)),
        "if on the level": lambda: scene(by_level)().score({"x": Y}, 0),
        "a call of a program": lambda: single(F),
        "data in scan": scene(
            lambda x: jax.lax.scan(
                lambda c, _: (c, cp.observe("y", dist.Normal(c, 1.0), 0.3)),
                x[0],
                None,
                3,
            )
        ),
        "a site in vmap": scene(
            lambda x: jax.vmap(lambda m: cp.sample("y", dist.Normal(m, 1.0)))(x)
        ),
        "a weight in cond": scene(
            lambda x: jax.lax.cond(x[0] > 0, lambda: cp.factor("w", x[0]), lambda: None)
        ),
        "a key in a program": scene(lambda x: numpyro.prng_key()),
        "a plate that draws some of its data": compiled(in_part, jnp.zeros(4)),
        "two sites with one name": compiled(twice, F),
        "no site": compiled(cp.program(lambda: None)),
        "an optimised parameter": compiled(cp.program(lambda: numpyro.param("p", 1.0))),
        "an observation of no site": seen(lambda x: dist.Normal(0.0, 1.0), 1.0),
        "a discrete latent": latent_of(dist.Poisson, 2.0),
        "a constant as a latent": latent_of(dist.Delta, 1.0),
        "a support without a bijection": latent_of(Circle),
    },
    CapabilityError: {
        "infer in jit": in_transformation(jax.jit, KEY),
        "infer in vmap": in_transformation(jax.vmap, jax.random.split(KEY, 2)),
        "infer in jit, of constants": jax.jit(lambda: ran(sampler=cp.Ancestral())),
        "infer in grad": lambda: jax.grad(
            lambda m: ran(normal([m, 0.0]), sampler=cp.Ancestral())["x"].mean()
        )(0.0),
        "HMC on a score": moved(cp.HMC(0.1), network),
        "MALA in SMC on a score": weighs(network, kernel=cp.MALA(0.1)),
        "density weights on a learned energy": weighs(squares, weights="density"),
        "Feynman-Kac weights without a rate": weighs(
            lambda: energy(lambda x, k: -jnp.sum(x**2))
        ),
        "Ancestral with a NumPyro latent": gibbs(
            {"x": cp.MALA()}, lambda _: cp.Ancestral()
        ),
        "a calibration of a score": lambda: cp.calibrate(network(label="cat"), KEY),
        "a calibration of terms of different numbers": lambda: cp.calibrate(
            cp.mixture([F * F, F], log_weights=[0.0, 0.0]), KEY
        ),
        "weights of what is not normalised": lambda: cp.mixture(
            [energy(lambda x, k: -x @ x)] * 2, weights=[1, 1]
        ),
        "a density of a score in NumPyro": lambda: cp.as_distribution(
            network()
        ).log_prob(Y),
        "log-density of a score": lambda: cp.compile(single, network()).log_density(
            {"x": Y}, 0
        ),
    },
    DoublyIntractableError: {
        "a condition of NumPyro's that is a latent": lambda: jax.jit(
            lambda c: cp.as_distribution(OPEN.given(c=c)).log_prob(Y)
        )(1.0),
    },
    LoadError: {
        "a misspelled model": lambda: cp.load("ring2"),
        "a folder that is not there": lambda: cp.load("out/ring"),
        "a file of another kind": lambda: cp.Result.load(__file__),
    },
    NetworkError: {
        "a truth value of tokens": lambda: of_tokens(lambda x, visible: x[0] == 1),
        "a network of complex numbers": lambda: learned(
            lambda x, t: 1j * x, "epsilon", SCHEDULE
        ),
        "a network of two arrays": lambda: learned(
            lambda x, t: (x, x), "epsilon", SCHEDULE
        ),
        "an own factor without a gradient": lambda: cp.compile(
            single, Own(lambda value, score: value)
        ),
        "an own factor's gradient first": lambda: cp.compile(
            single, Own(lambda value, score: (score, value))
        ),
        "an own factor that decides by the noise": lambda: cp.compile(
            single, Own(lambda value, score: (value, score) if value > 0 else None)
        ),
        "an energy that returns nothing": lambda: energy(lambda x, k: None),
        "an energy that returns text": lambda: energy(lambda x, k: "x"),
        "fewer conditions than members": compiled(
            in_plate_of_5,
            cp.Diffusion(
                lambda x, t, c: x - c, SCHEDULE, event_shape=(), conditions=("c",)
            ),
        ),
        "a missing condition in NumPyro": lambda: cp.as_distribution(OPEN),
        "NumPy in a network": lambda: diffusion(with_numpy),
        "NumPy's norm in a network": lambda: diffusion(with_numpy_norm),
        "if in a network": lambda: diffusion(with_if),
        "NumPy in an energy": lambda: energy(lambda x, k: -np.sum(np.asarray(x) ** 2)),
        "a level as an index": lambda: energy(lambda x, k: -x[0] / SCHEDULE.sigma[k]),
        "an energy of whole numbers": lambda: energy(lambda x, k: (x > 0).sum()),
        "an energy that is NaN": lambda: cp.compile(
            both, F, energy(lambda x, k: jnp.sqrt(-1 - x @ x), top_power=0.0)
        ),
        "NumPy in a classifier": lambda: cp.Classifier(
            with_numpy, SCHEDULE, event_shape=(2,)
        ),
    },
    ShapeError: {
        "a metric that is no matrix": lambda: cp.MALA(metric=np.ones(3)),
        "a calibration of no shape": lambda: cp.calibrate(
            cp.Classifier(loop, SCHEDULE), KEY
        ),
        "an event without entries": lambda: normal(jnp.zeros(0)),
        "a network's event without entries": lambda: network(event_shape=(3, 0)),
        "an event of less than nothing": lambda: energy(len, (-1,)),
        "data of the wrong shape": compiled(observed, F, jnp.zeros(5)),
        "NumPyro's data of the wrong shape": compiled(
            numpyro_observed, F, jnp.zeros(5)
        ),
        "a plate of another size than the data": compiled(in_plate, 3, jnp.zeros(5)),
        "a plate over one number": compiled(in_plate, 3, 0.0),
        "a plate of another size than the distribution": compiled(
            in_plate, 3, jnp.zeros(5), (5,)
        ),
        "a step size for other levels": moved(cp.MALA(jnp.ones(5))),
        "a site that is missing": lambda: cp.compile(single, F).score({}, 0),
        "a batch as a position": lambda: DENSITY.score({"x": jnp.zeros((7, 2))}, 0),
    },
    ImproperError: {
        "levels that end in noise": compiled(
            single, F, schedule=cp.Schedule.log_snr(12, min=-9.0, max=-2.0)
        ),
        "improper": latent_of(dist.ImproperUniform, REAL, (), ()),
        "a prior without end": latent_of(dist.Uniform, 0.0, jnp.inf),
        "a calibration of what rises": lambda: cp.calibrate(
            energy(lambda x, k: x @ x), KEY
        ),
        "a calibration of a classifier": lambda: cp.calibrate(
            CLASSIFIER.given(label=0), KEY
        ),
        "a log-weight that rises": weighed(lambda x: x[1] ** 2),
        "a flat energy": lambda: cp.compile(single, energy(lambda x, k: 0 * x.sum())),
        "an energy that rises": lambda: cp.compile(
            both, F, energy(lambda x, k: 100 * x @ x, top_power=0.0)
        ),
        "an energy that rises beside a score": lambda: cp.compile(
            both, network(), energy(lambda x, k: 1e4 * x @ x, top_power=0.0)
        ),
    },
    AlignmentError: {
        "factors that cannot be aligned": compiled(both, of_levels(10), of_levels(7)),
        "other levels than a model's few": compiled(
            single, of_levels(10), schedule=cp.Schedule.linear(50)
        ),
    },
    LevelError: {
        "level out of range": lambda: DENSITY.score({"x": Y}, 32),
        "level negative": lambda: DENSITY.log_density({"x": Y}, -1),
    },
}


def test_programs_are_pickled_by_name_and_densities_and_results_are_copied(result):
    assert pickle.loads(pickle.dumps(single)) is single
    x = {"x": jnp.ones(2)}
    for copied in (copy.copy, copy.deepcopy):
        np.testing.assert_array_equal(
            copied(DENSITY).score(x, 0)["x"], DENSITY.score(x, 0)["x"]
        )
        np.testing.assert_array_equal(copied(result)["x"], result["x"])


def test_the_fix_of_an_object_with_data_works():
    table = dataclasses.dataclass(type("Registered", (Table,), {}))
    with_table = cp.program(lambda f, t: cp.observe("y", both_of(f), t.y))
    refused(lambda: cp.compile(with_table, F, table(Y)), WrongTypeError)
    jax.tree_util.register_dataclass(table)
    density = cp.compile(with_table, F, table(Y))
    assert density.observed()["y"].shape == (2,)


def both_of(factor):
    """Return a unit Gaussian around a sample of the factor."""
    return dist.Normal(cp.sample("x", factor), 1.0)


@pytest.mark.parametrize("name", ["chain", "draw", "a/b"])
def test_names_that_arviz_uses_otherwise_are_refused_there(name):
    density = cp.compile(cp.program(lambda: cp.sample(name, F)))
    options = {"sampler": cp.Ancestral(), "progress": False}
    result = cp.infer(density, KEY, num_chains=4, **options)
    refused(lambda: result.to_arviz(), InvalidValueError, name)


def test_levels_and_evaluations_of_tokens_may_be_traced():
    tokens = np.array([2, 0, 3])
    value = jax.jit(lambda x: TOKENS.log_density({"x": x}, 0))(tokens)
    assert float(value) == float(TOKENS.log_density({"x": tokens}, 0)) == 2.0


def test_numbers_that_python_reads_as_such_are_no_mistake(result):
    """A position of whole numbers, an estimate of one number, a schedule's length."""
    whole = DENSITY.score({"x": jnp.ones(2, jnp.int32)}, 0)["x"]
    np.testing.assert_array_equal(whole, DENSITY.score({"x": jnp.ones(2)}, 0)["x"])
    assert len(SCHEDULE) == SCHEDULE.num_levels
    estimate = result.mean(lambda s: s["x"][0])
    assert float(estimate) == estimate.value


@pytest.mark.parametrize(("kind", "call"), rows(MISTAKES))
def test_is_answered_with_the_line_and_a_way_out(
    kind, call, result, nothing_is_compiled
):
    before = time.process_time()
    if inspect.signature(call).parameters:
        error = refused(lambda: call(result), kind)
    else:
        error = refused(call, kind)
    assert error.found
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

    @cp.program
    def program():
        s = cp.sample("s", dist.Normal(1.0, 0.5))
        cp.observe("y", dist.Normal(0.0, scale(s)), 0.1)

    sampler = cp.AnnealedMCMC(cp.MALA(0.3), 5)
    result = cp.infer(
        cp.compile(program), KEY, num_chains=64, sampler=sampler, progress=False
    )
    assert result.status.has("non_finite") == named
    assert ("'y'" in result.status.message) == named
    if named:
        check_finding(result.status, "non_finite")


def test_hasattr_and_getattr_with_a_default_still_work(result):
    """Python and JAX use them, also for names with underscores."""
    for value in (F, F * F, DENSITY, result):
        assert not hasattr(value, "nothing")
        assert not hasattr(value, "_nothing")
        assert not hasattr(value, "__jax_array__")
    assert getattr(cp, "nothing", 1) == 1
    assert eqx.tree_equal(jax.tree.map(lambda a: a, F), F)


def test_arguments_that_fit_reach_the_function_and_its_own_errors_pass():
    def raises(x, y=0):
        raise TypeError("mine")

    from composeprob.arguments import with_call_errors

    with pytest.raises(TypeError, match=r"^mine$"):
        with_call_errors(raises)(1)
    assert with_call_errors(lambda x, y=2: x + y)(1) == 3


# the time that a network takes
# ------------------------------------------------------------------------------------


LINEAR = cp.Schedule.linear(1000)
SHORT = cp.Schedule.linear(100)
COSINE = cp.Schedule.cosine(1000)
PARAMETERIZATIONS = ("epsilon", "score", "x0", "v")
TRAINED = "schedule of its training, of 1000 levels"
LEVEL = f"time='level' with the {TRAINED}"


def exact_network(parameterization, time, schedule):
    """The exact network of N(m, v), whose second argument is the ``time``."""
    mean = jnp.array([0.3, -0.2])
    variance = jnp.array([0.04, 0.3])

    def noise(t):
        if time == "log_snr":
            return jax.nn.sigmoid(1.0 * t) ** 0.5, jax.nn.sigmoid(-1.0 * t) ** 0.5
        levels = jnp.arange(schedule.num_levels)
        alpha = jnp.interp(1.0 * t, levels, jnp.asarray(schedule.alpha))
        return alpha, jnp.interp(1.0 * t, levels, jnp.asarray(schedule.sigma))

    def output(x, t):
        alpha, sigma = noise(t)
        gain = alpha * variance / (alpha**2 * variance + sigma**2)
        clean = mean + gain * (x - alpha * mean)
        epsilon = (x - alpha * clean) / sigma
        outputs = {
            "epsilon": epsilon,
            "x0": clean,
            "score": -epsilon / sigma,
            "v": alpha * epsilon - sigma * clean,
        }
        return outputs[parameterization]

    return output


@pytest.mark.parametrize(
    ("parameterization", "time", "schedule", "declared", "on", "fix"),
    [
        ("epsilon", "level", LINEAR, "log_snr", LINEAR, LEVEL),
        ("score", "level", LINEAR, "log_snr", LINEAR, LEVEL),
        ("x0", "level", LINEAR, "log_snr", LINEAR, LEVEL),
        ("epsilon", "log_snr", LINEAR, "level", LINEAR, "time='log_snr'"),
        ("v", "log_snr", LINEAR, "level", LINEAR, "time='log_snr'"),
        ("epsilon", "level", LINEAR, "level", SHORT, TRAINED),
        ("v", "level", LINEAR, "level", SHORT, TRAINED),
        ("x0", "level", LINEAR, "level", SHORT, TRAINED),
        ("epsilon", "level", COSINE, "level", SHORT, "of 1000 levels"),
    ],
)
def test_another_time_or_schedule_is_named_as_that(
    parameterization, time, schedule, declared, on, fix
):
    network = exact_network(parameterization, time, schedule)
    factor = learned(network, parameterization, on, time=declared)
    error = refused(lambda: cp.compile(single, factor), NetworkError, fix=fix)
    assert "parameterization=" not in error.fix


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("time", ["level", "log_snr"])
def test_the_right_time_passes(parameterization, time):
    schedule = LINEAR if time == "level" else cp.Schedule.log_snr(60)
    network = exact_network(parameterization, time, schedule)
    right = learned(network, parameterization, schedule, time=time)
    assert cp.compile(single, right).graph.doubts == ()


# terminals that lack characters
# ------------------------------------------------------------------------------------


def test_text_is_spelled_where_a_terminal_has_ascii_only(result, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    mean = result.mean(lambda s: s["x"][0])
    error = errors.LoadError("π", fix="σ")
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
    # Without a KeyError's quotes.
    assert str(error).startswith("This result has no site 'nope'. (test_mistakes.py:")
    assert "its sites are: 'x'" in error.fix


def test_a_model_of_many_levels_is_offered_some_of_them():
    """The schedule that the error names is one that compiles, with about as many levels
    as were asked for."""
    model = diffusion(lambda x, t: x * t / 7, cp.Schedule.linear(1000))
    caught = refused(
        lambda: cp.compile(single, model, schedule=cp.Schedule.linear(50)),
        AlignmentError,
    )
    assert "schedule=factor.schedule.every(20)): 51 of its 1000" in caught.fix
    density = cp.compile(single, model, schedule=model.schedule.every(20))
    assert density.num_levels == 51
    x = {"x": jnp.array([0.3, -0.2])}
    of_training = cp.compile(single, model)
    for level, same in ((0, 0), (7, 140), (50, 999)):
        expected = of_training.score(x, same)["x"]
        np.testing.assert_allclose(density.score(x, level)["x"], expected, rtol=1e-6)


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

    @cp.program
    def equal(f):
        cp.observe("difference", dist.Normal(0.0, 0.5), cp.sample("x", f))

    assert cp.compile(equal, normal()).graph.observations[0].depends_on == {"x"}
    for log_weight in (lambda x: 20 * x[0], lambda x: 0.4 * x @ x):
        assert weighed(log_weight)()
        bounded = energy(lambda x, k, of=log_weight: of(x), top_power=0.0)
        assert cp.compile(both, network(), bounded)


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
        # Not the statement that uses the value.
        (lambda: cp.compile(asks, F), ProgramError, asks, 3),
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
    first = code.co_firstlineno
    caught = refused(call, kind)
    assert caught.where == f"{Path(code.co_filename).name}:{first + line}"
    if program is twice:
        assert f"test_mistakes.py:{first + 2}" in caught.found


def test_every_error_is_also_a_builtin_one():
    for name in errors.__all__:
        kind = getattr(errors, name)
        if kind is not errors.ComposeProbError:
            assert issubclass(kind, errors.ComposeProbError)
            assert issubclass(kind, (ValueError, TypeError, ImportError)), name


def test_every_error_says_how_to_fix_it():
    count = 0
    without = []
    for path in Path(cp.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", None))
            if name not in errors.__all__:
                continue
            count += 1
            if "fix" not in {keyword.arg for keyword in node.keywords}:
                without.append(f"{path.name}:{node.lineno}")
    assert count > 200
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
