"""Bad input: a clear exception, with the user's place and a way out, before anything is compiled.

Places are lines of this file. The compiled driver is replaced by one that fails, so that nothing here can get to it.
"""

import ast
import re
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import linen, nnx

import composeprob as cp
from composeprob import errors
from composeprob.runtime import compiled as driver
from sampling_cases import SCHEDULE, both, normal, single

KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch):
    def compiled(*_):
        raise AssertionError("the driver was compiled")

    for name in ("start", "advance", "read"):
        monkeypatch.setattr(driver, name, compiled)


def network(parameterization="epsilon", **options):
    return cp.Diffusion(lambda x, t: x, SCHEDULE, event_shape=(2,), parameterization=parameterization, **options)


def energy():
    return cp.Diffusion(lambda x, t: jnp.sum(x**2), SCHEDULE, event_shape=(2,), parameterization="energy")


def infer(program_or_factor=None, **options):
    density = cp.compile(single, normal([0.0, 0.0]) if program_or_factor is None else program_or_factor)
    return cp.infer(density, **{"key": KEY, "num_chains": 4, "progress": False} | options)


class Weights(eqx.Module):
    w: jax.Array

    def __call__(self, x, t):
        return self.w * x


class NNXWeights(nnx.Module):
    def __init__(self, w):
        self.w = nnx.Param(w)

    def __call__(self, x, t):
        return self.w[...] * x


class LinenWeights(linen.Module):
    @linen.compact
    def __call__(self, x, t):
        return self.param("w", linen.initializers.ones, (2,)) * x


NAN = jnp.array([1.0, jnp.nan])


@cp.program
def twice(f):
    cp.sample("x", f)
    cp.sample("x", f)


@cp.program
def observed(f, y, likelihood=None, anneal=None):
    x = cp.sample("x", f)
    cp.observe("y", dist.Normal(x, 1.0) if likelihood is None else likelihood, y, anneal=anneal)


@cp.program
def numpyro_observed(f, y):
    x = cp.sample("x", f)
    numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


@cp.program
def unseen(f, y):
    cp.sample("x", f)
    cp.observe("y", dist.Normal(0.0, 1.0), y)


@cp.program
def latent(prior):
    m = cp.sample("m", prior)
    cp.observe("y", dist.Normal(m, 1.0), 0.0)


@cp.program
def in_plate(size, y, batch=()):
    m = cp.sample("m", dist.Normal(0.0, 1.0))
    with numpyro.plate("i", size):
        numpyro.sample("y", dist.Normal(m * jnp.ones(batch), 1.0), obs=y)


@cp.program
def in_part(y):
    m = cp.sample("m", dist.Normal(0.0, 1.0))
    with numpyro.plate("i", 100, subsample_size=4):
        numpyro.sample("y", dist.Normal(m, 1.0), obs=y)


@cp.program
def counts(y):
    rate = cp.sample("rate", dist.Gamma(1.0, 1.0))
    numpyro.sample("y", dist.Poisson(rate), obs=y)


@cp.program
def scene(f):
    cp.sample("x", f)
    cp.sample("mu", dist.Normal(0.0, 1.0))
    cp.sample("sigma", dist.HalfNormal(1.0))


def gibbs(blocks, sampler=lambda kernel: cp.AnnealedMCMC(kernel, 1)):
    density = cp.compile(scene, F)
    return lambda: cp.infer(density, KEY, num_chains=4, sampler=sampler(cp.Gibbs(blocks)), progress=False)


class Circle(dist.Distribution):
    """A law on a support that nobody knows."""

    support = dist.constraints.dependent

    def sample(self, key, sample_shape=()):
        return jnp.zeros(sample_shape)


def discrete(num_levels=10):
    return cp.Diffusion(lambda x, t: x, cp.Schedule.cosine(num_levels), event_shape=(2,), label=f"of{num_levels}")


def smc(**options):
    return lambda: cp.SMC(**options)


def compiled(program, *args, **kwargs):
    return lambda: cp.compile(program, *args, **kwargs)


F, BAR = normal([0.0, 0.0]), normal(jnp.zeros(3))
# what is wrong: (who is called, the class of the exception, words of its message)
CASES = {
    # the kernel or sampler needs what a factor lacks
    "HMC on a score-only factor": (
        lambda: infer(network(label="cat"), sampler=cp.AnnealedMCMC(cp.HMC(0.1), 2)),
        errors.CapabilityError,
        r"HMC needs `energy`, but factor '.*' offers only `score`",
    ),
    "MALA in SMC on a score-only factor": (
        lambda: infer(network(), sampler=cp.SMC(cp.MALA(0.1))),
        errors.CapabilityError,
        "MALA needs `energy`",
    ),
    "density weights on a learned energy": (
        lambda: infer(energy(), sampler=cp.SMC(cp.MALA(0.1), weights="density")),
        errors.CapabilityError,
        "needs `mode_depth`",
    ),
    "Feynman-Kac weights without a rate": (
        lambda: infer(cp.Energy(lambda x, k: -jnp.sum(x**2), SCHEDULE, event_shape=(2,)), sampler=cp.SMC()),
        errors.CapabilityError,
        "Feynman–Kac rate",
    ),
    "an unknown metric": (lambda: cp.MALA(metric="dense"), errors.InvalidValueError, "'dense'"),
    "a negative inverse mass": (lambda: cp.HMC(metric={"x": -1.0}), errors.InvalidValueError, "metric of 'x' is -1"),
    "a metric that is no matrix": (lambda: cp.MALA(metric=np.ones(3)), errors.ShapeError, r"shape \(3,\)"),
    "a metric that is no covariance": (lambda: cp.MALA(metric=-np.eye(2)), errors.InvalidValueError, "positive"),
    "a metric of other things": (lambda: cp.MALA(metric=len), errors.WrongTypeError, "inverse mass matrix"),
    "Adaptive on an unadjusted kernel": (lambda: cp.ULA(cp.Adaptive()), errors.CapabilityError, "unadjusted"),
    # algebra
    "mixture of uncalibrated factors": (
        lambda: cp.mixture([energy(), energy()], weights=[0.5, 0.5]),
        errors.CapabilityError,
        "normaliser of .* is unknown",
    ),
    "mixture of score-only factors": (lambda: cp.mixture([network(), F]), errors.CapabilityError, "only its score"),
    "total power zero": (compiled(single, F / normal([1.0, 0.0])), errors.ImproperError, "total power"),
    "total power negative": (compiled(single, F**-0.3), errors.ImproperError, "total power"),
    "a factor over itself": (compiled(single, F / F), errors.ImproperError, "cancels"),
    "a plate that draws some of its data": (compiled(in_part, jnp.zeros(4)), errors.ProgramError, "takes 4 of 100"),
    "an event without entries": (
        lambda: cp.Analytic(dist.Normal(jnp.zeros(0), 1.0).to_event(1), SCHEDULE),
        errors.ShapeError,
        "no entries",
    ),
    "a network's event without entries": (
        lambda: cp.Diffusion(lambda x, t: x, SCHEDULE, event_shape=(3, 0), parameterization="epsilon"),
        errors.ShapeError,
        "no entries",
    ),
    "events of different shape": (lambda: F * BAR, errors.ShapeError, "one shape"),
    "power NaN": (lambda: F ** float("nan"), errors.InvalidValueError, "finite"),
    "weights of the wrong number": (lambda: cp.mixture([F, F], weights=[1.0]), errors.InvalidValueError, "weights"),
    "negative weights": (lambda: cp.mixture([F, F], weights=[1.0, -1.0]), errors.InvalidValueError, "weights"),
    "product with a number": (lambda: cp.product(F, 2.0), errors.WrongTypeError, "got float"),
    "window outside its canvas": (lambda: cp.window(F, (3,), (2,)), errors.ShapeError, "leaves the canvas"),
    # programs
    "two sites with one name": (compiled(twice, F), errors.ProgramError, "Two sites are called 'x'"),
    "no site": (compiled(cp.program(lambda: None)), errors.ProgramError, "no site"),
    "no program": (lambda: cp.compile(lambda f: f, F), errors.WrongTypeError, "takes a program"),
    "a network as a site": (compiled(single, lambda x, t: x), errors.WrongTypeError, "factor or a NumPyro"),
    "unknown policy": (compiled(observed, F, jnp.zeros(2), anneal="cold"), errors.InvalidValueError, "policy 'cold'"),
    "unknown policy of a block": (lambda: cp.annealed("cold"), errors.InvalidValueError, "policy 'cold'"),
    "no policy of a block": (lambda: cp.annealed(None), errors.InvalidValueError, "needs a policy"),
    "data of the wrong shape": (compiled(observed, F, jnp.zeros(5)), errors.ShapeError, r"shape \(5,\)"),
    "data that is text": (compiled(observed, F, "one"), errors.WrongTypeError, "got str"),
    "data that is missing": (compiled(observed, F, None), errors.WrongTypeError, "got NoneType"),
    "a likelihood that is no distribution": (compiled(observed, F, 1.0, 3), errors.WrongTypeError, "got int"),
    "a site outside of a program": (lambda: cp.sample("x", F), errors.ProgramError, "outside"),
    "an optimised parameter": (
        compiled(cp.program(lambda: numpyro.param("p", 1.0))),
        errors.ProgramError,
        "numpyro.param",
    ),
    "an observation of no site": (compiled(unseen, F, 1.0), errors.ProgramError, "'y' depends on no site"),
    "an improper prior": (
        compiled(latent, dist.ImproperUniform(dist.constraints.real, (), ())),
        errors.ImproperError,
        "'m' has the prior ImproperUniform",
    ),
    "a prior without end": (
        compiled(latent, dist.Uniform(0.0, jnp.inf, validate_args=False)),
        errors.ImproperError,
        "prior of 'm' is not finite",
    ),
    "a discrete latent": (compiled(latent, dist.Poisson(2.0)), errors.ProgramError, "'m' is discrete"),
    "a constant as a latent": (compiled(latent, dist.Delta(1.0)), errors.ProgramError, "'m' is a Delta"),
    "a support without a bijection": (compiled(latent, Circle()), errors.ProgramError, "no bijection"),
    "NumPyro's data of the wrong shape": (
        compiled(numpyro_observed, F, jnp.zeros(5)),
        errors.ShapeError,
        r"'y' has shape \(5,\), but its distribution has shape \(2,\)",
    ),
    "complex data": (compiled(observed, F, jnp.ones(2) * 1j), errors.WrongTypeError, "numbers of type complex64"),
    "text as NumPyro's data": (compiled(numpyro_observed, F, "one"), errors.WrongTypeError, "got str"),
    "a count and a half": (compiled(counts, 1.5), errors.InvalidValueError, "holds 1.5, which Poisson.* never is"),
    "a negative count": (compiled(counts, -1), errors.InvalidValueError, "holds -1"),
    "a plate of another size than the data": (
        compiled(in_plate, 3, jnp.zeros(5)),
        errors.ShapeError,
        r"Plate 'i' has size 3, but the value of 'y', of shape \(5,\), has 5 entries",
    ),
    "a plate over one number": (compiled(in_plate, 3, 0.0), errors.ShapeError, "has no axis for it"),
    "a plate of another size than the distribution": (
        compiled(in_plate, 3, jnp.zeros(5), (5,)),
        errors.ShapeError,
        r"Plate 'i' has size 3, but the distribution of 'y' in it has the batch shape \(5,\)",
    ),
    # blocks
    "no blocks": (lambda: cp.Gibbs({}), errors.InvalidValueError, "no blocks"),
    "a block of no sites": (lambda: cp.Gibbs({(): cp.MALA()}), errors.InvalidValueError, "no site"),
    "a block by number": (lambda: cp.Gibbs({3: cp.MALA()}), errors.WrongTypeError, "called 3"),
    "blocks without kernels": (lambda: cp.Gibbs(["x"]), errors.WrongTypeError, "got list"),
    "a block without a kernel": (lambda: cp.Gibbs({"x": 0.1}), errors.WrongTypeError, "'x' has no kernel but 0.1"),
    "blocks in blocks": (
        lambda: cp.Gibbs({"x": cp.Gibbs({"x": cp.MALA()})}),
        errors.WrongTypeError,
        "'x' is itself moved by a Gibbs",
    ),
    "a site in two blocks": (
        lambda: cp.Gibbs({"x": cp.MALA(), ("mu", "x"): cp.MALA()}),
        errors.InvalidValueError,
        "'x' is in more than one place",
    ),
    "a site in no block": (
        gibbs({"x": cp.MALA(), "mu": cp.MALA()}),
        errors.InvalidValueError,
        "no block of Gibbs moves 'sigma'",
    ),
    "a site in no block, by SMC": (
        gibbs({"x": cp.MALA()}, cp.SMC),
        errors.InvalidValueError,
        "no block of Gibbs moves 'mu', 'sigma'",
    ),
    "a block of a site that is not there": (
        gibbs({"x": cp.MALA(), ("mu", "sigm"): cp.MALA()}),
        errors.InvalidValueError,
        "site 'sigm', which the program does not have",
    ),
    # schedules
    "factors that cannot be aligned": (compiled(both, discrete(10), discrete(7)), errors.AlignmentError, "its nearest"),
    "levels outside of the training range": (
        compiled(single, network(time="log_snr"), schedule=cp.Schedule.log_snr(10, max=15.0)),
        errors.AlignmentError,
        "was trained for",
    ),
    "level out of range": (lambda: cp.compile(single, F).score({"x": jnp.zeros(2)}, 32), errors.LevelError, "32"),
    "level negative": (lambda: cp.compile(single, F).log_density({"x": jnp.zeros(2)}, -1), errors.LevelError, "-1"),
    "level fractional": (lambda: SCHEDULE.at(0.5), errors.LevelError, "one integer"),
    "levels in the wrong order": (
        lambda: cp.Schedule.from_arrays([0.5, 0.9], [0.9, 0.5]),
        errors.InvalidValueError,
        "clean to noisy",
    ),
    "no levels": (lambda: cp.Schedule.cosine(0), errors.InvalidValueError, "at least 2"),
    "no schedule": (lambda: cp.Analytic(dist.Normal(0, 1), 100), errors.WrongTypeError, "cp.Schedule"),
    # networks, weights, data
    "unknown condition": (lambda: network().given(colour=1), errors.ConditionError, "no condition 'colour'"),
    "network of the wrong output": (
        lambda: cp.Diffusion(lambda x, t: x[:1], SCHEDULE, event_shape=(2,), parameterization="epsilon"),
        errors.NetworkError,
        r"returned shape \(1,\)",
    ),
    "network that cannot be called": (
        lambda: cp.Diffusion(lambda x: x, SCHEDULE, event_shape=(2,)),
        errors.NetworkError,
        "cannot be called",
    ),
    "energy that is no scalar": (
        lambda: cp.Energy(lambda x, k: x, SCHEDULE, event_shape=(2,)),
        errors.NetworkError,
        "scalar",
    ),
    "unknown parameterization": (lambda: network("eps"), errors.InvalidValueError, "'eps'"),
    "NaN in Equinox weights": (
        lambda: cp.Diffusion(Weights(NAN), SCHEDULE, event_shape=(2,)),
        errors.InvalidValueError,
        r"NaN.*\.w",
    ),
    "NaN in Flax NNX weights": (
        lambda: cp.Diffusion(NNXWeights(NAN), SCHEDULE, event_shape=(2,)),
        errors.InvalidValueError,
        "NaN",
    ),
    "NaN in Flax Linen weights": (
        lambda: cp.Diffusion((LinenWeights(), {"params": {"w": NAN}}), SCHEDULE, event_shape=(2,)),
        errors.InvalidValueError,
        "NaN",
    ),
    "NaN in points": (lambda: cp.Analytic(NAN[:, None], SCHEDULE), errors.InvalidValueError, "NaN"),
    "NaN in data": (compiled(observed, F, NAN), errors.InvalidValueError, "value of 'y' holds NaN"),
    "NaN in NumPyro's data": (compiled(numpyro_observed, F, NAN), errors.InvalidValueError, "value of 'y' holds NaN"),
    "NaN in a condition": (
        lambda: _conditioned().given(c=jnp.nan),
        errors.InvalidValueError,
        "NaN",
    ),
    "unknown model of the zoo": (lambda: cp.load("ring3d"), errors.LoadError, "ring3d"),
    # infer and its samplers
    "no chains": (lambda: infer(num_chains=0), errors.InvalidValueError, "num_chains must be at least 1; got 0"),
    "negative chains": (lambda: infer(num_chains=-3), errors.InvalidValueError, "got -3"),
    "half a chain": (lambda: infer(num_chains=2.5), errors.WrongTypeError, "got 2.5"),
    "a boolean of chains": (lambda: infer(num_chains=True), errors.WrongTypeError, "got True"),
    "an old key": (lambda: infer(key=jax.random.PRNGKey(0)), errors.WrongTypeError, "typed random key"),
    "many keys": (lambda: infer(key=jax.random.split(KEY)), errors.WrongTypeError, "one typed random key"),
    "a kernel as a sampler": (lambda: infer(sampler=cp.MALA(0.1)), errors.WrongTypeError, "got MALA"),
    "no density": (lambda: cp.infer(F, KEY, num_chains=4), errors.WrongTypeError, "compiled density"),
    "a program and what it takes": (
        lambda: cp.infer(single, F, key=KEY, num_chains=4),
        errors.WrongTypeError,
        "compiled density; got Program",
    ),
    "no mesh": (lambda: infer(mesh=8), errors.WrongTypeError, "got int"),
    "no kernel": (lambda: cp.AnnealedMCMC("MALA", 3), errors.WrongTypeError, "needs a kernel"),
    "no steps": (lambda: cp.AnnealedMCMC(cp.MALA(0.1), 0), errors.InvalidValueError, "steps_per_level"),
    "no steps of a default kernel": (smc(steps_per_level=0), errors.InvalidValueError, "steps_per_level"),
    "unknown weights": (smc(weights="energy"), errors.InvalidValueError, "'energy'"),
    "a threshold of zero": (smc(resample=0.0), errors.InvalidValueError, "threshold"),
    "a threshold in words": (smc(resample="half"), errors.WrongTypeError, "threshold"),
    "a step in words": (smc(step="first"), errors.WrongTypeError, "step must be a cp.ReverseStep; got 'first'"),
    "a step that density weights do not make": (
        smc(weights="density", step=cp.ReverseStep()),
        errors.InvalidValueError,
        "makes no reverse step",
    ),
    "a step that is not DDPM's": (smc(step=cp.ReverseStep(order=1, eta=0.5)), errors.InvalidValueError, "eta=1"),
    "a twist without limit": (smc(step=cp.ReverseStep(twist=None)), errors.InvalidValueError, "a twist"),
    "a twist below zero": (lambda: cp.ReverseStep(twist=-1.0), errors.InvalidValueError, "twist"),
    "an order of three": (lambda: cp.ReverseStep(order=3), errors.InvalidValueError, "1 or 2; got 3"),
    "unknown control": (lambda: cp.ReverseStep(control="linear"), errors.InvalidValueError, "'linear'"),
    "no closing": (smc(then="warm-up"), errors.WrongTypeError, "then= takes what closes a run"),
    "eta above 1": (lambda: cp.Ancestral(eta=1.5), errors.InvalidValueError, "1.5"),
    "eta in words": (lambda: cp.Ancestral(eta="ddim"), errors.WrongTypeError, "eta"),
    "a step size of zero": (lambda: cp.MALA(0.0), errors.InvalidValueError, "step_size"),
    "a step size for other levels": (
        lambda: infer(sampler=cp.AnnealedMCMC(cp.MALA(jnp.ones(5)), 1)),
        errors.ShapeError,
        "5 step sizes",
    ),
    "a rule for other levels": (
        lambda: infer(sampler=cp.AnnealedMCMC(cp.MALA(lambda s: jnp.ones(5)), 1)),
        errors.ShapeError,
        "rule",
    ),
    "Ancestral with a NumPyro latent": (
        lambda: cp.infer(cp.compile(_latent, F), KEY, num_chains=4, sampler=cp.Ancestral()),
        errors.CapabilityError,
        "'m'",
    ),
    # positions and results
    "a site that is missing": (lambda: cp.compile(single, F).score({}, 0), errors.ShapeError, "'x'"),
    "a batch as a position": (
        lambda: cp.compile(single, F).score({"x": jnp.zeros((7, 2))}, 0),
        errors.ShapeError,
        r"shape \(2,\); got \(7, 2\)",
    ),
    "log-density of a score": (
        lambda: cp.compile(single, network()).log_density({"x": jnp.zeros(2)}, 0),
        errors.CapabilityError,
        "only its score",
    ),
    "no saved result": (lambda: cp.Result.load("nowhere"), errors.LoadError, "nowhere"),
}


def _conditioned():
    return cp.Diffusion(lambda x, t, c: c * x, SCHEDULE, event_shape=(2,), conditions={"c": 0.0})


@cp.program
def _latent(f):
    cp.sample("x", f)
    cp.sample("m", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize("what", CASES)
def test_is_refused_with_place_and_way_out(what):
    call, kind, words = CASES[what]
    with pytest.raises(errors.ComposeProbError) as caught:
        call()
    error, text = caught.value, str(caught.value)
    assert type(error) is kind, text
    assert isinstance(error, (ValueError, TypeError))
    assert re.search(words, error.found), text
    assert re.fullmatch(r"(test_bad_input|sampling_cases)\.py:\d+", error.where or ""), text
    assert error.fix, text
    assert error.where in text
    assert error.fix in text


def test_a_block_of_an_unknown_site_says_which_was_meant():
    with pytest.raises(errors.InvalidValueError, match=r"did you mean 'sigma'\? Its sites are 'mu', 'sigma', 'x'"):
        gibbs({"x": cp.MALA(), ("mu", "sigm"): cp.MALA()})()


def test_what_resembles_a_mistake_and_is_none():
    """A support that depends on a latent, soft evidence in a plate, data masked where they are NaN, whole floats."""

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


def test_places_are_the_lines_of_the_statement():
    with pytest.raises(errors.ProgramError) as caught:
        cp.compile(twice, F)
    first = twice.function.__code__.co_firstlineno
    assert caught.value.where == f"test_bad_input.py:{first + 3}"
    assert f"test_bad_input.py:{first + 2}" in caught.value.found


def test_the_place_of_a_missing_capability_is_the_factors_site():
    with pytest.raises(errors.CapabilityError) as caught:
        infer(network(), sampler=cp.AnnealedMCMC(cp.HMC(0.1), 1))
    assert caught.value.where == f"sampling_cases.py:{single.function.__code__.co_firstlineno + 3}"


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
        if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", None)) in errors.__all__
    ]
    assert len(calls) > 200
    without = [f"{path.name}:{n.lineno}" for path, n in calls if "fix" not in {k.arg for k in n.keywords}]
    assert without == []


def test_the_command_line_has_no_place_in_a_program():
    namespace = {"__name__": "composeprob.cli.somewhere", "errors": errors}
    exec("error = errors.LoadError('No such file.', fix='look.')", namespace)
    assert namespace["error"].where is None
    assert str(namespace["error"]) == "No such file.\n  Fix: look."


def test_numpy_integers_are_numbers_of_chains_and_steps(monkeypatch):
    monkeypatch.undo()
    result = infer(num_chains=np.int64(4), sampler=cp.AnnealedMCMC(cp.MALA(0.1), np.int64(1)))
    assert result["x"].shape == (4, 2)


def test_a_missing_argument_of_the_program():
    @cp.program
    def needs_two(f, g):
        cp.sample("x", f * g)

    with pytest.raises(cp.errors.WrongTypeError, match=r"missing a required argument: 'g'.*\n.*it takes \(f, g\)"):
        cp.compile(needs_two, cp.Analytic(dist.Normal(0.0, 1.0), cp.Schedule.log_snr(5)))


def test_an_observation_may_depend_on_a_site_through_its_value():
    @cp.program
    def equal(f):
        cp.observe("difference", dist.Normal(0.0, 0.5), cp.sample("x", f))

    density = cp.compile(equal, cp.Analytic(dist.Normal(0.0, 1.0), cp.Schedule.log_snr(5)))
    assert density.graph.observations[0].depends_on == {"x"}
