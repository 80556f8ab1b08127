"""Parameterizations, kinds of network, times and conditions of `Diffusion`, against
Gaussians with their score in closed form."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import composeprob as cp
from composeprob.errors import (
    AlignmentError,
    ConditionError,
    InvalidValueError,
    NetworkError,
    WrongTypeError,
)
from composeprob.factors.networks import as_network
from refusals import refused, rows
from sampling_cases import single
from targets import network_outputs

MEAN = np.array([0.4, -0.7, 0.2])
VARIANCE = 0.3
SCHEDULES = {
    "VP": cp.Schedule.cosine(20),
    "VE": cp.Schedule.edm(20, sigma_min=0.05, sigma_max=20.0),
}
# A schedule of neither family: v's convention must hold there too.
SCHEDULES["other"] = cp.Schedule.from_arrays(
    np.linspace(0.9, 0.1, 20), np.linspace(0.1, 2.0, 20)
)
COSINE = cp.Schedule.cosine(10)


def diffusion(network=lambda x, t: x, schedule=COSINE, event_shape=(2,), **arguments):
    return cp.Diffusion(network, schedule, event_shape=event_shape, **arguments)


def outputs(x, alpha, sigma):
    """Outputs of networks that make a factor exact."""
    return network_outputs(x, alpha, sigma, MEAN, VARIANCE)


def network_of(parameterization, schedule):
    alpha = jnp.asarray(schedule.alpha, float)
    sigma = jnp.asarray(schedule.sigma, float)
    return lambda x, t: outputs(x, alpha[t], sigma[t])[parameterization]


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

    network = Network(
        eqx.nn.Linear(inputs, outputs, use_bias=bias, key=jax.random.key(0))
    )
    x = jnp.float32(0.7) if inputs == "scalar" else jnp.array([0.3, -0.2, 0.9])
    assert as_network(network) is network  # nothing is rewritten behind anybody's back
    adapted = cp.batched_linear(network)
    np.testing.assert_allclose(adapted(x, 0), network(x, 0), rtol=1e-6)
    assert jax.tree.leaves(adapted) == jax.tree.leaves(network)  # the same arrays
    assert isinstance(adapted.layer, eqx.nn.Linear)
    assert jax.tree.structure(cp.batched_linear(adapted)) == jax.tree.structure(adapted)


@cp.program
def every_form(factors):
    for form, f in factors.items():
        cp.sample(form, f)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_parameterizations(kind):
    """Exact networks are not flagged; every form has the exact score, and energies the
    exact difference of the log-density between points."""
    schedule = SCHEDULES[kind]
    networks = {form: network_of(form, schedule) for form in ENERGIES + SCORES}
    factors = {
        form: diffusion(network, schedule, (3,), parameterization=form)
        for form, network in networks.items()
    }
    density = cp.compile(every_form, factors)
    energies = cp.compile(every_form, {form: factors[form] for form in ENERGIES})
    assert density.graph.doubts == ()
    assert "energy" not in density.capabilities
    first = jnp.array([0.5, -1.0, 2.0])
    second = jnp.array([0.0, 0.3, -0.2])
    for level in (0, 7, 19):
        alpha = schedule.alpha[level]
        sigma = schedule.sigma[level]
        wanted = [outputs(x, alpha, sigma) for x in (first, second)]
        for x, exact in zip((first, second), wanted, strict=True):
            for form, score in density.score(dict.fromkeys(factors, x), level).items():
                np.testing.assert_allclose(
                    score, exact["score"], rtol=2e-4, atol=1e-4 / sigma, err_msg=form
                )
        exact_change = wanted[1]["log_density"] - wanted[0]["log_density"]
        start = dict.fromkeys(ENERGIES, first)
        for form in ENERGIES:
            moved = {**start, form: second}
            change = energies.log_density(moved, level) - energies.log_density(
                start, level
            )
            np.testing.assert_allclose(
                change, exact_change, rtol=1e-4, atol=1e-4, err_msg=form
            )
    for form, f in factors.items():
        assert ("energy" in f.capabilities) == (form in ENERGIES)
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
    f = diffusion(NETWORKS[kind](WEIGHT))
    x = jnp.array([0.3, -0.4])
    density = cp.compile(single, f * f.given()).untracked()
    np.testing.assert_allclose(
        density.score({"x": x}, 3)["x"], -2 * WEIGHT @ x / COSINE.sigma[3], rtol=1e-5
    )
    arrays = [leaf for leaf in jax.tree.leaves(f.network) if eqx.is_inexact_array(leaf)]
    assert len(arrays) == (0 if kind == "function" else 1)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_network_receives_the_time(kind):
    schedule = SCHEDULES[kind]
    expected = {
        "level": np.arange(20),
        "log_snr": np.asarray(schedule.log_snr),
        "sigma": np.asarray(schedule.sigma) / np.asarray(schedule.alpha),
        "real_level": np.arange(20.0),
    }
    for time, values in expected.items():

        def network(x, t, is_integer=time == "level"):
            assert jnp.issubdtype(t.dtype, jnp.integer) == is_integer
            assert t.shape == ()
            # It leads back to 0 as a score does, or it would be refused.
            return jnp.asarray(t, float) - 100 * x

        f = diffusion(network, schedule, (), parameterization="score", time=time)
        assert (f.traits.levels == "own") == (time == "level")
        density = cp.compile(single, f)
        found = [density.score({"x": 0.0}, k)["x"] for k in (0, 5, 19)]
        np.testing.assert_allclose(found, values[[0, 5, 19]], rtol=1e-4, atol=1e-4)


def test_a_level_between_two():
    """It is where the log-SNR is: halfway between two levels, halfway between their
    log-SNR."""
    schedule = cp.Schedule.log_snr(11, min=-8.0, max=12.0)
    f = diffusion(
        lambda x, t: t - 100 * x,
        schedule,
        (),
        parameterization="score",
        time="real_level",
    )
    density = cp.compile(
        single, f, schedule=cp.Schedule.log_snr(4, min=-7.5, max=11.25)
    )
    found = [density.score({"x": 0.0}, k)["x"] for k in range(4)]
    np.testing.assert_allclose(found, [0.375, 3.5, 6.625, 9.75], rtol=1e-6)
    beyond = cp.Schedule.log_snr(4, min=-9.0, max=5.0)
    refused(
        lambda: cp.compile(single, f, schedule=beyond),
        AlignmentError,
    )


def test_flow_matching_composes_with_other_schedules():
    """A flow model times a VP and a VE model of Gaussians: at each log-SNR, in α and σ
    of the program, the sum of the exact scores."""
    # The schedule, and α of σ/α, as it is in the schedule's family.
    trained = {
        "flow": (
            cp.Schedule.flow(50, shift=3.0),
            lambda ratio: 1 / (1 + ratio),
        ),
        "x0": (
            cp.Schedule.log_snr(60, min=-17.0, max=17.0),
            lambda ratio: 1 / jnp.sqrt(1 + ratio**2),
        ),
        "epsilon": (
            cp.Schedule.edm(50, sigma_min=1e-4, sigma_max=5000.0),
            lambda ratio: 1.0,
        ),
    }

    def factor(form):
        schedule, alpha = trained[form]

        def network(x, ratio):
            return outputs(x, alpha(ratio), alpha(ratio) * ratio)[form]

        return diffusion(
            network, schedule, (3,), parameterization=form, time="sigma", label=form
        )

    factors = [factor(form) for form in trained]
    x = jnp.array([0.5, -1.0, 2.0])
    others = (
        cp.Schedule.log_snr(20, min=-12.0, max=10.0),
        cp.Schedule.edm(20, 0.01, 80.0),
    )
    for schedule in (cp.Schedule.flow(20, shift=3.0), *others):
        density = cp.compile(single, cp.product(*factors), schedule=schedule)
        score = jax.jit(density.score)
        for k in (0, 9, 19):
            sigma = schedule.sigma[k]
            wanted = 3 * outputs(x, schedule.alpha[k], sigma)["score"]
            # x rounded in its seventh digit, over σ²
            np.testing.assert_allclose(
                score({"x": x}, k)["x"], wanted, rtol=1e-4, atol=1e-6 / sigma**2
            )


# ── conditions ────────────────────────────────────────────────────────────────────────


def conditional(conditions=("c",)):
    return diffusion(
        lambda x, t, c=0.0, style=0.0: (x - c) + style,
        conditions=conditions,
        label="cat",
    )


def test_conditions_reach_the_network():
    f = conditional(("c", "style"))
    x = {"x": jnp.array([1.0, 2.0])}
    sigma = f.schedule.sigma[4]
    for factor, wanted in [
        (f, x["x"]),
        (f.given(c=0.5), x["x"] - 0.5),
        (f.given(c=0.5).given(style=2.0), x["x"] + 1.5),
        (f.given(style=2.0, c=0.5), x["x"] + 1.5),
        (conditional({"c": 3.0, "style": 1.0}), x["x"] - 2.0),
    ]:
        np.testing.assert_allclose(
            cp.compile(single, factor).score(x, 4)["x"], -wanted / sigma, rtol=1e-5
        )


@pytest.mark.parametrize("name", ["x", "t"])
def test_a_condition_may_be_called_as_the_networks_own_arguments_are(name):
    """As in p(θ | x), where the observation is called x."""
    network = {
        "x": lambda theta, level, x: x - theta,
        "t": lambda theta, level, t: t - theta,
    }[name]
    factor = diffusion(network, parameterization="score", conditions=(name,))
    noise = COSINE.at(3)
    given = factor.given(**{name: jnp.ones(2)})
    over_data = cp.product(factor, over={name: jnp.ones((1, 2))})
    for leaf in (given, over_data):
        _, score = leaf.evaluate(jnp.zeros(2), noise, leaf.call_conditions())
        np.testing.assert_allclose(score, 1.0)


TIMES_C = diffusion(lambda x, t, c: x * c, conditions=("c",))
CAT = conditional()
NAN = WEIGHT.at[0, 1].set(jnp.nan)
REFUSED = {
    InvalidValueError: {
        "parameterization": lambda: diffusion(parameterization="noise"),
        "time": lambda: diffusion(time="hours"),
        **{
            f"NaN in {kind}": lambda kind=kind: diffusion(NETWORKS[kind](NAN))
            for kind in ("equinox", "nnx", "linen")
        },
        "a condition of NaN": lambda: CAT.given(c=jnp.nan),
    },
    WrongTypeError: {
        "schedule": lambda: diffusion(schedule=10),
        "a number as shape": lambda: diffusion(event_shape=2),
        "half of an axis": lambda: diffusion(event_shape=(2.5,)),
        "a number as network": lambda: diffusion(3),
        "no variables": lambda: diffusion(linen.Dense(2)),
        "a word as condition": lambda: CAT.given(c="red"),
    },
    NetworkError: {
        "a part": lambda: diffusion(lambda x, t: x[:1]),
        "another axis": lambda: diffusion(lambda x, t: x[None]),
        "a pair": lambda: diffusion(lambda x, t: (x, x)),
        "no time": lambda: diffusion(lambda x: x),
        "an energy of many": lambda: diffusion(parameterization="energy"),
        "an axis of a number": lambda: diffusion(
            lambda x, t: x.reshape(1), event_shape=()
        ),
        "a pair of vectors": lambda: diffusion(
            lambda x, t: (x, x), parameterization="energy_residual"
        ),
        "an open condition": lambda: cp.compile(single, TIMES_C),
        "a condition of another shape": lambda: cp.compile(
            single, TIMES_C.given(c=jnp.ones(3))
        ),
    },
    ConditionError: {
        "unknown": lambda: CAT.given(colour=1),
        "twice": lambda: CAT.given(c=1.0).given(c=2.0),
        "unknown to a product": lambda: (CAT * CAT).given(colour=1),
        "guided by none": lambda: cp.guide(CAT, 2.0),
        "guided by what is unknown": lambda: cp.guide(CAT, 2.0, colour=1),
        "of a network without": lambda: diffusion().given(c=1),
    },
}


@pytest.mark.parametrize(("kind", "call"), rows(REFUSED))
def test_refusals(kind, call):
    refused(call, kind)


def test_a_condition_of_the_right_shape_compiles_and_a_scalar_head_may_keep_its_axis():
    cp.compile(single, TIMES_C.given(c=jnp.ones(2)))
    f = diffusion(lambda x, t: jnp.sum(x**2, keepdims=True), parameterization="energy")
    assert cp.compile(single, f).log_density({"x": jnp.ones(2)}, 3).shape == ()


def test_a_number_beside_the_output_is_added_to_the_log_density():
    schedule = SCHEDULES["VP"]
    without_number = network_of("energy_residual", schedule)

    def pair(x, t):
        return without_number(x, t), jnp.sum(jnp.cos(x))

    x = jnp.array([0.3, -0.2, 0.9])
    before, after = (
        diffusion(network, schedule, (3,), parameterization="energy_residual").evaluate(
            x, schedule.at(3), {}
        )
        for network in (without_number, pair)
    )
    np.testing.assert_allclose(after[0] - before[0], jnp.sum(jnp.cos(x)), rtol=1e-4)
    np.testing.assert_allclose(after[1] - before[1], -jnp.sin(x), rtol=1e-3, atol=1e-4)
    refused(lambda: diffusion(pair, schedule, (3,)), NetworkError)


NONE = (-9.0, -9.0)
PLACES = {"left": (0.2, 0.5), "right": (0.8, 0.5)}


def test_encoders_receive_the_given_values():
    received = []

    def to_place(value):
        received.append(value)
        if isinstance(value, str):
            return np.float32(PLACES[value])
        if max(value) > 1:
            raise InvalidValueError(f"{value} is too large.")
        return np.float32(value)

    def network(x, t, place=NONE):
        return -x

    factor = diffusion(
        network, conditions={"place": NONE}, encoders={"place": to_place}
    )
    np.testing.assert_allclose(
        factor.given(place="left").fixed["place"], PLACES["left"]
    )
    assert factor.given(place=NONE).fixed["place"].tolist() == list(NONE)
    jax.jit(lambda x, y: factor.given(place=(x, y)).fixed["place"][0])(7.0, 7.0)
    assert received == ["left"]
    twice = factor * factor
    # The error of the encoder itself, without a fix.
    words = r"too large. \(test_diffusion.py:\d+\)"
    with pytest.raises(InvalidValueError, match=words):
        twice.given(place=(2.0, 0.0))


def test_data_are_encoded_one_by_one():
    encoders = {"place": lambda name: np.float32(PLACES[name])}
    factor = diffusion(
        lambda x, t, place: -x * place, conditions=("place",), encoders=encoders
    )
    over = cp.product(factor, over={"place": ["left", "right", "left"]})
    np.testing.assert_array_equal(
        over.factors[0].fixed["place"], np.float32([(0.2, 0.5), (0.8, 0.5), (0.2, 0.5)])
    )
    alone = cp.product(factor, over={"place": ("right",)})
    np.testing.assert_array_equal(alone.fixed["place"], np.float32(PLACES["right"]))
