"""Every parameterization, kind of network and time of `Diffusion`, against Gaussians whose score is known."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import composeprob as cp
from composeprob.errors import AlignmentError, ConditionError, InvalidValueError, NetworkError, WrongTypeError
from composeprob.factors.networks import as_network
from refusals import refused
from sampling_cases import single

MEAN, VARIANCE = np.array([0.4, -0.7, 0.2]), 0.3
SCHEDULES = {"VP": cp.Schedule.cosine(20), "VE": cp.Schedule.edm(20, sigma_min=0.05, sigma_max=20.0)}
# A schedule of neither family: v's convention must hold there too.
SCHEDULES["other"] = cp.Schedule.from_arrays(np.linspace(0.9, 0.1, 20), np.linspace(0.1, 2.0, 20))


def parts(x, alpha, sigma):
    """(log p, score, E[x_0|x], E[ε|x]) of X ~ N(MEAN, VARIANCE·I) noised to x = α·X + σ·ε."""
    total = alpha**2 * VARIANCE + sigma**2
    away = x - alpha * MEAN
    log_p = -0.5 * jnp.sum(away**2) / total - 0.5 * x.size * jnp.log(2 * jnp.pi * total)
    clean = MEAN + alpha * VARIANCE / total * away
    return log_p, -away / total, clean, (x - alpha * clean) / sigma


def network_of(parameterization, schedule):
    """A function network whose outputs make the factor exact."""
    alpha, sigma = jnp.asarray(schedule.alpha, float), jnp.asarray(schedule.sigma, float)

    def network(x, t):
        a, s = alpha[t], sigma[t]
        log_p, score, clean, noise = parts(x, a, s)
        total = a**2 * VARIANCE + s**2
        root = jnp.sqrt(s / total)
        return {
            "energy": -s * log_p,
            # ½‖x − out‖² = ½·σ·‖x − αμ‖²/total + const
            "energy_residual": x - root * (x - a * MEAN),
            "energy_norm": root * (x - a * MEAN),
            "energy_inner": s / total * (0.5 * x - a * MEAN),
            "epsilon": noise,
            "x0": clean,
            "v": (a * noise - s * clean) / jnp.sqrt(a**2 + s**2),
            "flow": noise - clean,
            "score": score,
        }[parameterization]

    return network


ENERGIES = ["energy", "energy_residual", "energy_norm", "energy_inner"]
SCORES = ["epsilon", "x0", "v", "flow", "score"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inputs", [3, "scalar"])
@pytest.mark.parametrize("outputs", [4, "scalar"])
def test_batched_layers_compute_what_they_did(inputs, outputs, bias):
    class Network(eqx.Module):
        layer: eqx.nn.Linear

        def __call__(self, x, t):
            return self.layer(x)

    network = Network(eqx.nn.Linear(inputs, outputs, use_bias=bias, key=jax.random.key(0)))
    x = jnp.float32(0.7) if inputs == "scalar" else jnp.array([0.3, -0.2, 0.9])
    assert as_network(network) is network  # nothing is rewritten behind anybody's back
    adapted = cp.batched_linear(network)
    np.testing.assert_allclose(adapted(x, 0), network(x, 0), rtol=1e-6)
    assert jax.tree.leaves(adapted) == jax.tree.leaves(network)  # the same arrays
    assert isinstance(adapted.layer, eqx.nn.Linear)
    assert jax.tree.structure(cp.batched_linear(adapted)) == jax.tree.structure(adapted)


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("parameterization", ENERGIES + SCORES)
def test_parameterizations(parameterization, kind):
    schedule = SCHEDULES[kind]
    network = network_of(parameterization, schedule)
    f = cp.Diffusion(network, schedule, event_shape=(3,), parameterization=parameterization)
    density = cp.compile(single, f)
    xs = [jnp.array([0.5, -1.0, 2.0]), jnp.array([0.0, 0.3, -0.2])]
    evaluate = jax.jit(density.evaluate)
    for level in (0, 7, 19):
        alpha, sigma = schedule.alpha[level], schedule.sigma[level]
        wanted = [parts(x, alpha, sigma) for x in xs]
        found = [evaluate({"x": x}, level) for x in xs]
        for w, got in zip(wanted, found, strict=True):
            np.testing.assert_allclose(got.score["x"], w[1], rtol=2e-4, atol=1e-4 / sigma)
        if parameterization in SCORES:
            assert all(got.log_density is None for got in found)
        else:  # up to a constant of the level
            difference = found[0].log_density - found[1].log_density
            np.testing.assert_allclose(difference, wanted[0][0] - wanted[1][0], rtol=1e-4, atol=1e-4)
    assert ("energy" in f.capabilities) == (parameterization in ENERGIES)
    assert "normalised" not in f.capabilities


class EquinoxNet(eqx.Module):
    weight: jax.Array

    def __call__(self, x, t):
        return self.weight @ x


class NNXNet(nnx.Module):
    def __init__(self, weight):
        self.linear = nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0))
        self.linear.kernel.value = weight.T
        self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=nnx.Rngs(1))

    def __call__(self, x, t):
        return self.dropout(self.linear(x))


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x, t):
        return linen.Dense(2, use_bias=False)(x)


WEIGHT = jnp.array([[1.0, 0.5], [-0.2, 0.8]])
NETWORKS = {
    "equinox": lambda w: EquinoxNet(w),
    "nnx": lambda w: NNXNet(w),
    "linen": lambda w: (LinenNet(), {"params": {"Dense_0": {"kernel": w.T}}}),
    "function": lambda w: lambda x, t: w @ x,
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_kinds_of_network(kind):
    schedule = cp.Schedule.cosine(10)
    f = cp.Diffusion(NETWORKS[kind](WEIGHT), schedule, event_shape=(2,))
    x = jnp.array([0.3, -0.4])
    density = cp.compile(single, f * f.given())
    np.testing.assert_allclose(density.score({"x": x}, 3)["x"], -2 * WEIGHT @ x / schedule.sigma[3], rtol=1e-5)
    arrays = [leaf for leaf in jax.tree.leaves(f.network) if eqx.is_inexact_array(leaf)]
    assert len(arrays) == (0 if kind == "function" else 1)


@pytest.mark.parametrize("kind", ["equinox", "nnx", "linen"])
def test_nan_weights(kind):
    with pytest.raises(InvalidValueError, match=r"network of factor .* holds NaN"):
        cp.Diffusion(NETWORKS[kind](WEIGHT.at[0, 1].set(jnp.nan)), cp.Schedule.cosine(10), event_shape=(2,))


@pytest.mark.parametrize("kind", SCHEDULES)
def test_what_the_network_is_told_of_time(kind):
    schedule = SCHEDULES[kind]
    expected = {
        "level": np.arange(20),
        "log_snr": np.asarray(schedule.log_snr),
        "sigma": np.asarray(schedule.sigma) / np.asarray(schedule.alpha),
        "real_level": np.arange(20.0),
    }
    for time, values in expected.items():
        told = lambda x, t: jnp.asarray(t, float) - 100 * x  # something of a score, or it would be refused
        f = cp.Diffusion(told, schedule, event_shape=(), parameterization="score", time=time)
        density = cp.compile(single, f)
        found = [density.score({"x": 0.0}, k)["x"] for k in (0, 5, 19)]
        np.testing.assert_allclose(found, values[[0, 5, 19]], rtol=1e-4, atol=1e-4)


def test_a_level_between_two():
    """It is where the log-SNR is: halfway between two levels, halfway between their log-SNR."""
    schedule = cp.Schedule.log_snr(11, min=-8.0, max=12.0)
    f = cp.Diffusion(lambda x, t: t - 100 * x, schedule, event_shape=(), parameterization="score", time="real_level")
    density = cp.compile(single, f, schedule=cp.Schedule.log_snr(4, min=-7.5, max=11.25))
    found = [density.score({"x": 0.0}, k)["x"] for k in range(4)]
    np.testing.assert_allclose(found, [0.375, 3.5, 6.625, 9.75], rtol=1e-6)
    with pytest.raises(AlignmentError, match="trained for log-SNR -8 to 12"):
        cp.compile(single, f, schedule=cp.Schedule.log_snr(4, min=-9.0, max=5.0))


def test_flow_matching_composes_with_other_schedules():
    """A flow model times a VP and a VE model of Gaussians: at each log-SNR, in α and σ of the program, the sum of the
    exact scores."""
    trained = {
        "flow": cp.Schedule.flow(50, shift=3.0),
        "x0": cp.Schedule.log_snr(60, min=-17.0, max=17.0),
        "epsilon": cp.Schedule.edm(50, sigma_min=1e-4, sigma_max=5000.0),
    }
    names = {"flow": "x", "x0": "y", "epsilon": "z"}

    def network_at(form):
        def network(x, ratio):  # σ/α, of which α follows in the family
            alpha = {"flow": 1 / (1 + ratio), "x0": 1 / jnp.sqrt(1 + ratio**2), "epsilon": 1.0}[form]
            _, _, clean, noise = parts(x, alpha, alpha * ratio)
            return {"flow": noise - clean, "x0": clean, "epsilon": noise}[form]

        return network

    factors = [
        cp.Diffusion(network_at(form), own, event_shape=(3,), parameterization=form, time="sigma", label=names[form])
        for form, own in trained.items()
    ]
    x = jnp.array([0.5, -1.0, 2.0])
    for schedule in (
        cp.Schedule.flow(20, shift=3.0),
        cp.Schedule.log_snr(20, min=-12.0, max=10.0),
        cp.Schedule.edm(20, 0.01, 80.0),
    ):
        density = cp.compile(single, cp.product(*factors), schedule=schedule)
        score = jax.jit(density.score)
        for k in (0, 9, 19):
            sigma = schedule.sigma[k]
            _, wanted, _, _ = parts(x, schedule.alpha[k], sigma)
            # x rounded in its seventh digit, over σ²
            np.testing.assert_allclose(score({"x": x}, k)["x"], 3 * wanted, rtol=1e-4, atol=1e-6 / sigma**2)


def test_the_level_is_an_integer():
    seen = []
    f = cp.Diffusion(lambda x, t: seen.append(t) or x, cp.Schedule.cosine(10), event_shape=(2,))
    cp.compile(single, f).score({"x": jnp.zeros(2)}, 3)
    assert all(jnp.issubdtype(t.dtype, jnp.integer) and t.shape == () for t in seen)
    assert f.traits.levels == "own"


# conditions --------------------------------------------------------------------------------------------------------


def conditional(**arguments):
    def network(x, t, c=0.0, style=0.0):
        return (x - c) + style

    return cp.Diffusion(network, cp.Schedule.cosine(10), event_shape=(2,), label="cat", **arguments)


def test_conditions_reach_the_network():
    f = conditional(conditions=("c", "style"))
    x = {"x": jnp.array([1.0, 2.0])}
    sigma = f.schedule.sigma[4]
    for factor, wanted in [
        (f, x["x"]),
        (f.given(c=0.5), x["x"] - 0.5),
        (f.given(c=0.5).given(style=2.0), x["x"] + 1.5),
        (f.given(style=2.0, c=0.5), x["x"] + 1.5),
        (conditional(conditions={"c": 3.0, "style": 1.0}), x["x"] - 2.0),
    ]:
        np.testing.assert_allclose(cp.compile(single, factor).score(x, 4)["x"], -wanted / sigma, rtol=1e-5)


@pytest.mark.parametrize("name", ["x", "t"])
def test_a_condition_may_be_called_as_the_networks_own_arguments_are(name):
    """As in p(θ | x), where what was observed is called x."""
    schedule = cp.Schedule.log_snr(12)
    network = {"x": lambda theta, level, x: x - theta, "t": lambda theta, level, t: t - theta}[name]
    factor = cp.Diffusion(network, schedule, event_shape=(2,), parameterization="score", conditions=(name,))
    noise = schedule.at(3)
    for one in (factor, cp.product(factor, over={name: jnp.ones((1, 2))})):
        given = one.given(**{name: jnp.ones(2)}) if one is factor else one
        _, score = given.evaluate(jnp.zeros(2), noise, given.call_conditions())
        np.testing.assert_allclose(score, 1.0)


def test_bad_conditions():
    f = conditional(conditions=("c",))
    with pytest.raises(ConditionError, match=r"Factor 'cat' has no condition 'colour'; its conditions are: 'c'"):
        f.given(colour=1)
    refused(lambda: f.given(c=1.0).given(c=2.0), ConditionError, "given twice")
    refused(lambda: f.given(c=jnp.nan), InvalidValueError, "Condition 'c' holds NaN")
    refused(lambda: f.given(c="red"), WrongTypeError, "Condition 'c' must be a number")
    refused(lambda: (f * f).given(colour=1), ConditionError, "no condition 'colour'")
    refused(lambda: cp.guide(f, 2.0), ConditionError, "needs a condition to be guided by")
    refused(lambda: cp.guide(f, 2.0, colour=1), ConditionError, "no condition 'colour'")
    with pytest.raises(ConditionError, match="build the factor with conditions"):
        cp.Diffusion(lambda x, t: x, f.schedule, event_shape=(2,)).given(c=1)


def test_a_condition_that_is_missing_or_has_the_wrong_shape():
    f = cp.Diffusion(lambda x, t, c: x * c, cp.Schedule.cosine(10), event_shape=(2,), conditions=("c",))
    refused(lambda: cp.compile(single, f), NetworkError, r"cannot be called as network\(x, t\)")
    with pytest.raises(NetworkError, match=r"network\(x, t, c=…\) with .* conditions of shapes c \(3,\): "):
        cp.compile(single, f.given(c=jnp.ones(3)))
    cp.compile(single, f.given(c=jnp.ones(2)))


# errors ------------------------------------------------------------------------------------------------------------


def diffusion(network=lambda x, t: x, schedule=None, event_shape=(2,), **arguments):
    return cp.Diffusion(network, schedule or cp.Schedule.cosine(10), event_shape=event_shape, **arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ({"parameterization": "noise"}, InvalidValueError, r"(?s)Unknown parameterization 'noise'.*Fix: .*epsilon"),
        ({"time": "hours"}, InvalidValueError, "Unknown time 'hours'"),
        ({"schedule": 10}, WrongTypeError, "schedule must be a cp.Schedule; got int"),
        ({"event_shape": 2}, WrongTypeError, "event_shape must be a tuple of whole numbers; got 2"),
        ({"event_shape": (2.5,)}, WrongTypeError, "event_shape must be a tuple of whole numbers"),
        ({"network": 3}, WrongTypeError, "got int, which cannot be called"),
        ({"network": linen.Dense(2)}, WrongTypeError, "Flax Linen module without its variables"),
        ({"network": lambda x, t: x[:1]}, NetworkError, r"returned shape \(1,\); .*needs \(2,\)"),
        ({"network": lambda x, t: x[None]}, NetworkError, r"returned shape \(1, 2\)"),
        ({"network": lambda x, t: (x, x)}, NetworkError, "returned shape tuple"),
        ({"network": lambda x: x}, NetworkError, "cannot be called as network"),
        ({"parameterization": "energy"}, NetworkError, r"needs \(\)"),
        ({"network": lambda x, t: x.reshape(1), "event_shape": ()}, NetworkError, r"returned shape \(1,\)"),
    ],
)
def test_bad_arguments(arguments, error, told):
    refused(lambda: diffusion(**arguments), error, told)


def test_a_scalar_head_may_keep_its_axis():
    f = diffusion(lambda x, t: jnp.sum(x**2, keepdims=True), parameterization="energy")
    assert cp.compile(single, f).log_density({"x": jnp.ones(2)}, 3).shape == ()


def test_a_number_beside_the_output_is_added_to_the_log_density():
    schedule = SCHEDULES["VP"]
    plain = network_of("energy_residual", schedule)

    def pair(x, t):
        return plain(x, t), jnp.sum(jnp.cos(x))

    without, with_one = (
        cp.Diffusion(n, schedule, event_shape=(3,), parameterization="energy_residual") for n in (plain, pair)
    )
    x, noise = jnp.array([0.3, -0.2, 0.9]), schedule.at(3)
    before, after = (factor.evaluate(x, noise, {}) for factor in (without, with_one))
    np.testing.assert_allclose(after[0] - before[0], jnp.sum(jnp.cos(x)), rtol=1e-4)
    np.testing.assert_allclose(after[1] - before[1], -jnp.sin(x), rtol=1e-3, atol=1e-4)
    with pytest.raises(NetworkError, match=r"a pair whose second part has shape \(3,\).*"):
        cp.Diffusion(lambda x, t: (x, x), schedule, event_shape=(3,), parameterization="energy_residual")
    with pytest.raises(NetworkError, match="returned shape tuple"):
        cp.Diffusion(pair, schedule, event_shape=(3,), parameterization="epsilon")
