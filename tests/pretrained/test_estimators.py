"""Other packages' posterior estimators as factors, compared with closed forms in the
packages' conventions.

The stand-ins have the attributes of GenSBI's pipelines and of sbijax's networks, and
models whose output is exactly the optimum of their training.
"""

import importlib.metadata
import json
import types
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from flax import nnx

import composeprob as cp
from composeprob.errors import InvalidValueError, LoadError, ShapeError, WrongTypeError
from refusals import refused
from sampling_cases import single

NOISE = 0.8
X = jnp.array([[1.0, -0.5], [0.2, 0.4]])
VARIANCE = NOISE**2 / (1 + NOISE**2)


def clean(y, s, x):
    """E[u | u + s·ε = y] under the posterior of u ~ N(0, 1) and x ~ N(u, NOISE²)."""
    mean = x / (1 + NOISE**2)
    return mean + VARIANCE / (VARIANCE + s**2) * (y - mean)


class Model(nnx.Module):
    """A network that has learned the optimum, ``output`` in its package's
    convention."""

    def __init__(self, output):
        self.output = output
        self.one = nnx.Param(jnp.ones(()))

    def __call__(self, t, obs, obs_ids, cond, cond_ids):
        return self.one[...] * self.output(obs, t, cond)


def flow(u, t, x):
    return (clean(u / t, (1 - t) / t, x) - u) / (1 - t)


def score(scheduler):
    def output(u, t, x):
        m = scheduler.marginal_mean_coeff(t)
        sd = scheduler.marginal_std(t)
        return (m * clean(u / m, sd / m, x) - u) / sd**2

    return output


def preconditioned(u, t, x):
    s = jnp.exp(4 * t)
    y = u / EDM.c_in(s)
    return (clean(y, s, x) - EDM.c_skip(s) * y) / EDM.c_out(s)


EDM = types.SimpleNamespace(
    name="EDM",
    sigma=lambda t: t,
    time_schedule=lambda u: 80.0 ** (1 - u) * 0.002**u,
    c_skip=lambda s: 0.25 / (s**2 + 0.25),
    c_out=lambda s: 0.5 * s / jnp.sqrt(s**2 + 0.25),
    c_in=lambda s: 1 / jnp.sqrt(s**2 + 0.25),
    c_noise=lambda s: 0.25 * jnp.log(s),
)


def variance_preserving(low, added, **named):
    """The scheduler whose ∫β from 0 to t is low·t + added·t²/2."""

    def integral(t):
        return low * t + 0.5 * added * t**2

    return types.SimpleNamespace(
        marginal_mean_coeff=lambda t: jnp.exp(-0.5 * integral(t)),
        marginal_std=lambda t: jnp.sqrt(-jnp.expm1(-integral(t))),
        **named,
    )


def variance_exploding(low, ratio, **named):
    return types.SimpleNamespace(
        marginal_mean_coeff=jnp.ones_like,
        marginal_std=lambda t: low * ratio**t,
        **named,
    )


VP = variance_preserving(
    0.1, 19.9, name="SM-VP", T=1.0, e_s=1e-3, beta_min=0.1, beta_d=19.9
)
VE = variance_exploding(
    1e-3, 90_000.0, name="SM-VE", T=1.0, e_s=0.0, sigma_min=1e-3, sigma_max=90.0
)
SOURCE = dist.Normal(jnp.zeros((2, 1)), 1.0).to_event(2)


def pipeline(method, output, scheduler=None, package="gensbi", source=SOURCE):
    made = type("ConditionalPipeline", (), {"__module__": f"{package}.recipes"})()
    made.method = type(method, (), {})()
    made.method.prior = source
    made.path = types.SimpleNamespace(scheduler=scheduler)
    made.ema_model_wrapped = Model(output)
    made.dim_obs = made.dim_cond = 2
    made.ch_obs = made.ch_cond = 1
    made.obs_ids = made.cond_ids = jnp.zeros((1, 2, 1))
    return made


class Network:
    """A network of sbijax as Haiku transforms it: run anew each time, by a method's
    name."""

    def __init__(self, output, **about):
        self.output = output
        self.about = about | {"_n_dimension": 2}

    def apply(self, params, rng, method, **given):
        root = type("Root", (), {})()
        vars(root).update(self.about)
        root._score_net = lambda inputs, time, context, is_training: (
            params["one"] * self.output(inputs[0], time[0], context[0])[None]
        )
        return getattr(root, method)(**given)


class ObjectiveFns(typing.NamedTuple):
    train: object
    sample_fn: object
    extra: object = None


ObjectiveFns.__module__ = "sbijax._src.train._types"


def fmpe(network):
    def sample_fn():
        return network

    return ObjectiveFns(None, sample_fn)


def cmpe(network):
    def sample_fn():
        return network

    return ObjectiveFns(None, sample_fn)


def summarized_estimator(estimator, summary_net, summary_params):
    def sample_fn():
        return estimator, summary_net, summary_params

    return ObjectiveFns(None, sample_fn)


PARAMS = {"one": jnp.ones(())}


def flow_from(least):
    """The mean of θ − (1 − least)·ε given t·θ + (1 − (1 − least)·t)·ε."""

    def output(u, t, x):
        sd = 1 - (1 - least) * t
        mean = clean(u / t, sd / t, x)
        return mean - (1 - least) * (u - t * mean) / sd

    return output


def equation(sde, low, high):
    return {
        "_sde": sde,
        "_beta_min": low,
        "_beta_max": high,
        "_time_eps": 0.001,
        "_time_max": 1.0,
    }


JAXED = {
    "sbijax, FMPE": Network(flow_from(0.001), _sigma_min=0.001),
    "sbijax, FMPE of much noise": Network(flow_from(0.2), _sigma_min=0.2),
    "sbijax, NPSE, VP": Network(
        score(variance_preserving(0.1, 9.9)), **equation("vp", 0.1, 10.0)
    ),
    "sbijax, NPSE, VE": Network(
        score(variance_exploding(0.01, 1000.0)), **equation("ve", 0.01, 10.0)
    ),
}

KINDS = {
    "flow matching": ("FlowMatchingMethod", flow, None),
    "score matching, VP": ("ScoreMatchingMethod", score(VP), VP),
    "score matching, VE": ("ScoreMatchingMethod", score(VE), VE),
    "EDM": ("DiffusionEDMMethod", preconditioned, EDM),
}


@pytest.fixture(autouse=True)
def _versions(monkeypatch):
    known = {"gensbi": "0.5.1", "bayesflow": "2.1.0", "sbijax": "0.4.2.post1"}
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: known.get(name) or real(name)
    )


score_of = jax.jit(lambda density, position, level: density.score(position, level))


def made(kind):
    return (fmpe(JAXED[kind]), PARAMS) if kind in JAXED else pipeline(*KINDS[kind])


@pytest.mark.parametrize("kind", [*KINDS, *JAXED])
def test_the_score_is_that_of_the_noised_posterior(kind):
    posterior = cp.from_estimator(made(kind))
    if kind in ("flow matching", "sbijax, FMPE"):
        # The weight, 1, is an argument of compiled code.
        scalars = [x for x in jax.tree.leaves(posterior) if jnp.shape(x) == ()]
        assert 1 in scalars
    (x,) = posterior.adapt(X[:1])
    density = cp.compile(single, posterior.given(x=x))
    closed_form = cp.Analytic(
        dist.Normal(X[0] / (1 + NOISE**2), VARIANCE**0.5), posterior.schedule
    )
    exact = cp.compile(single, closed_form)
    position = {"x": jnp.array([0.4, -0.9])}
    for level in (0, 20, 40, posterior.schedule.num_levels - 1):
        actual = score_of(density, position, level)["x"]
        expected = score_of(exact, position, level)["x"]
        np.testing.assert_allclose(actual, expected, rtol=2e-3, atol=2e-3)


def test_many_observations_have_the_posterior_of_all():
    posterior = cp.from_estimator(pipeline(*KINDS["flow matching"]))
    prior = cp.Analytic(dist.Normal(jnp.zeros(2), 1.0).to_event(1), posterior.schedule)

    @cp.program
    def tall(posterior, xs):
        cp.sample("u", prior * cp.product(posterior / prior, over={"x": xs}))

    density = cp.compile(tall, posterior, posterior.adapt(X))
    u = jnp.array([0.3, 0.1])
    actual = score_of(density, {"u": u}, 0)["u"]
    precision = 1 + 2 / NOISE**2
    expected = X.sum(0) / NOISE**2 - precision * u
    np.testing.assert_allclose(actual, expected, rtol=0.02, atol=0.02)


def test_a_network_of_noise_in_the_place_of_a_score_is_found():
    def noise(u, t, x):
        return -VP.marginal_std(t) * score(VP)(u, t, x)

    posterior = cp.from_estimator(pipeline("ScoreMatchingMethod", noise, VP))
    density = cp.compile(single, posterior.given(x=posterior.adapt(X)[0]))
    result = cp.infer(
        density,
        jax.random.key(0),
        num_chains=64,
        sampler=cp.Ancestral(),
        progress=False,
    )
    assert "NETWORK_DOUBTED" in str(result.status)


def test_a_range_of_levels_is_that_of_the_training():
    # ∫β at both ends: e to its power is 1 + (σ/α)².
    ends = [0.1 * 0.001 + 0.5 * 9.9 * 0.001**2, 0.1 + 0.5 * 9.9]
    low, high = cp.from_estimator(made("sbijax, NPSE, VP")).log_snr_range
    assert [high, low] == pytest.approx([-np.log(np.expm1(end)) for end in ends])
    low, high = cp.from_estimator(made("sbijax, FMPE of much noise")).log_snr_range
    assert high == pytest.approx(-2 * np.log(0.2))


def test_observations_go_through_the_summary_network():
    network = types.SimpleNamespace(summarize_fn=lambda params, y: params * y[:, :2])
    estimator = summarized_estimator(fmpe(JAXED["sbijax, FMPE"]), network, 2.0)
    posterior = cp.from_estimator((estimator, PARAMS))
    data = np.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(posterior.adapt(data), 2 * data[:, :2])
    refused(
        lambda: posterior.adapt(np.arange(3.0)),
        ShapeError,
        r"rows, \(n, size\); got an array \(3,\)",
    )


FLOW = JAXED["sbijax, FMPE"]
OTHER_SOURCE = dist.Normal(jnp.ones((2, 1)), 1.0).to_event(2)


def untrained():
    pipe = pipeline(*KINDS["EDM"])
    pipe.ema_model_wrapped = None
    return pipe


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: pipeline(*KINDS["EDM"], package="elsewhere"),
            WrongTypeError,
            r"reads estimators of gensbi, bayesflow, sbi, sbijax; "
            r"got elsewhere\.recipes",
        ),
        (
            lambda: (Network(flow), PARAMS),
            WrongTypeError,
            r"got [\w.]*test_estimators\.Network",
        ),
        (lambda: (), WrongTypeError, r"got builtins\.tuple"),
        (
            lambda: fmpe(FLOW),
            InvalidValueError,
            r"without its parameters[\s\S]*cp.from_estimator\(\(estimator, params\)\)",
        ),
        (
            lambda: (cmpe(FLOW), PARAMS),
            InvalidValueError,
            "but cmpe, which learns no score",
        ),
        (
            lambda: (summarized_estimator(cmpe(None), None, None), PARAMS),
            InvalidValueError,
            "but cmpe, which",
        ),
        (
            lambda: (fmpe(Network(flow, _t_max=200.0)), PARAMS),
            InvalidValueError,
            "neither a CNF nor a ScoreModel",
        ),
        (
            lambda: pipeline("NormalizingFlowMethod", flow),
            InvalidValueError,
            "is trained by NormalizingFlowMethod",
        ),
        (
            lambda: pipeline("FlowMatchingMethod", flow, source=OTHER_SOURCE),
            InvalidValueError,
            "source that is not N",
        ),
        (
            lambda: type("Flow", (), {"__module__": "gensbi.x"})(),
            InvalidValueError,
            "not a pipeline with conditions",
        ),
        (untrained, InvalidValueError, "no averaged model yet"),
        (
            lambda: type(
                "VPScoreEstimator",
                (),
                {"__module__": "sbi.neural_nets.estimators.score_estimator"},
            )(),
            WrongTypeError,
            r"PyTorch network[\s\S]*export_sbi.py",
        ),
    ],
)
def test_what_cannot_be_read_is_named(make, error, message):
    refused(lambda: cp.from_estimator(make()), error, message)


def test_another_version_is_named(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.6.0")
    refused(
        lambda: cp.from_estimator(made("EDM")),
        LoadError,
        r"gensbi 0\.6\.0; .* for 0\.5",
    )
    refused(
        lambda: cp.from_estimator(made("sbijax, FMPE")),
        LoadError,
        r"sbijax 0\.6\.0; .* for 0\.4",
    )


def test_parameters_are_in_the_units_of_theta():
    posterior = cp.from_estimator(made("EDM"))
    np.testing.assert_array_equal(
        posterior.parameters(jnp.ones((5, 2))), np.ones((5, 2))
    )
    refused(
        lambda: posterior.parameters(jnp.ones((5, 3))),
        ShapeError,
        r"shape \(2,\); got an array \(5, 3\)",
    )


SBI = Path(__file__).parent / "data" / "sbi"
"""Files of small networks by tools/export_sbi.py, and the outputs of sbi 0.27 itself
(told.npz)."""


@pytest.mark.parametrize("kind", ["fmpe", "ve", "vp", "subvp"])
def test_sbi_networks_give_the_scores_that_sbi_computes(kind):
    """Flow matching with a Gaussian baseline; VE after an embedding net; VP with random
    Fourier features of time; sub-VP in standardised units."""
    golden = {}
    for name, array in np.load(SBI / "told.npz").items():
        prefix, _, field = name.partition(".")
        if prefix == kind:
            golden[field] = array
    posterior = cp.from_estimator(SBI / f"{kind}.npz")
    noise = golden["sd"] / golden["m"]
    lowest, highest = posterior.log_snr_range
    assert np.exp(-0.5 * highest) < noise[0]
    assert noise[-1] < np.exp(-0.5 * lowest)
    alpha = 1 / np.sqrt(1 + noise**2)
    schedule = cp.Schedule.from_arrays(alpha, alpha * noise)
    posterior = cp.from_estimator(SBI / f"{kind}.npz", schedule)
    for level, x in enumerate(posterior.adapt(golden["x"])):
        # sbi's noised θ has the signal m, this schedule's α.
        ratio = alpha[level] / golden["m"][level]
        theta = jnp.asarray(golden["theta"][level] * ratio)
        density = cp.compile(single, posterior.given(x=x))
        actual = score_of(density, {"x": theta}, level)["x"] * ratio
        # sbi leaves out a factor 1 + .001 of its scores under flow matching.
        np.testing.assert_allclose(actual, golden["score"][level], rtol=3e-3, atol=3e-3)
    assert posterior.parameters(np.zeros(2)).tolist() == pytest.approx(
        posterior.units.location.tolist()
    )
    assert (kind == "subvp") == bool(np.any(posterior.units.location))


NOT_READ = {
    "another version": (
        {"version": "0.28.1"},
        {},
        LoadError,
        r"This is sbi 0\.28\.1; .* for 0\.27",
    ),
    "another kind": (
        {"kind": "MixedDensityEstimator"},
        {},
        InvalidValueError,
        "holds a MixedDensityEstimator",
    ),
    "an activation": (
        {"activation": "Softplus"},
        {},
        InvalidValueError,
        "activation of the network is Softplus",
    ),
    "a weight less": (
        {},
        {"net.input_layer.weight": None},
        LoadError,
        "lacks 'net.input_layer.weight' for a VPScoreEstimator",
    ),
}


def test_sbi_files_that_cannot_be_read_are_named(tmp_path):
    with np.load(SBI / "vp.npz") as file:
        arrays = dict(file)

    def read(described, changed):
        """Change the description and the arrays; None removes an array."""
        described = json.loads(str(arrays["described"])) | described
        kept = {n: a for n, a in (arrays | changed).items() if a is not None}
        kept["described"] = np.array(json.dumps(described))
        np.savez(tmp_path / "posterior.npz", **kept)
        return cp.from_estimator(tmp_path / "posterior.npz")

    posterior = read({}, {})
    assert posterior.event_shape == (2,)
    data = np.zeros((5, 3))
    refused(
        lambda: posterior.adapt(data),
        ShapeError,
        r"have shape \(2,\); got an array \(5, 3\)",
    )
    for described, changed, kind, words in NOT_READ.values():
        refused(lambda: read(described, changed), kind, words)
    (tmp_path / "pickled.npz").write_bytes(b"\x80\x04]\x94.")
    for name in ("nowhere.npz", "pickled.npz"):
        refused(
            lambda: cp.from_estimator(tmp_path / name),
            LoadError,
            "not an exported estimator.*export_sbi.py",
        )
