"""Refusals before anything is compiled: improper levels, signal left at the noisiest
one, wrong networks."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from flax import linen, nnx

import composeprob as cp
from composeprob.compiler.proper import bias, least, tail_of
from composeprob.errors import ImproperError, InvalidValueError, NetworkError
from composeprob.factors.gaussians import components
from messages import check_wording
from refusals import refused
from sampling_cases import measured, modes, single
from targets import network_outputs

SCHEDULE = cp.Schedule.log_snr(12)


def normal(scale, mean=0.0, schedule=SCHEDULE):
    return cp.Analytic(dist.Normal(mean, scale), schedule)


def mvn(*rows):
    return cp.Analytic(
        dist.MultivariateNormal(jnp.zeros(len(rows)), jnp.array(rows)), SCHEDULE
    )


def mixed(means, scales):
    return cp.Analytic(modes((0.5, 0.5), means, scales), SCHEDULE)


# whether a level can be normalised
# ----------------------------------------------------------------------

ALIKE = mvn([1.0, 0.9], [0.9, 1.0])
IMPROPER = {
    "a wide over a narrow one": lambda: normal(2.0) / normal(1.0) ** 0.5,
    "the widest component counts": lambda: (
        mixed([-1.0, 1.0], [0.5, 3.0]) / normal(1.0) ** 0.5
    ),
    "a part of a mixture": lambda: (
        cp.mixture([normal(1.0), normal(2.0)]) / normal(1.1) ** 0.5
    ),
    "one direction of two": lambda: ALIKE / mvn([1.0, -0.9], [-0.9, 1.0]) ** 0.3,
    "over a box": lambda: (
        normal(1.0) / cp.Analytic(dist.Uniform(-1.0, 1.0), SCHEDULE) ** 0.3
    ),
    "over points": lambda: normal(1.0) / cp.Analytic(jnp.zeros((2,)), SCHEDULE) ** 0.3,
    "a window": lambda: (
        normal(jnp.ones(4)) / cp.window(normal(0.5 * jnp.ones(2)), (4,), (2,)) ** 0.5
    ),
    "averages": lambda: (
        normal(2 * jnp.ones(4))
        / cp.window(normal(0.5 * jnp.ones(2)), (4,), (0,), scale=2) ** 0.9
    ),
}
PROPER = {
    "a narrow over a wide one": lambda: normal(2.0) / normal(1.0) ** 0.2,
    "a mixture over one as wide": lambda: (
        mixed([-1.0, 1.0], [0.5, 1.0]) / normal(1.0) ** 0.5
    ),
    "over the widest component": lambda: (
        normal(1.0) / mixed([-1.0, 1.0], [0.3, 2.5]) ** 0.9
    ),
    "every direction of two": lambda: ALIKE / mvn([2.5, 0.0], [0.0, 2.5]) ** 0.9,
    "posteriors over a prior": lambda: (
        cp.product(*[normal(0.5, m) for m in (-1.0, 0.0, 1.0)]) / normal(1.0) ** 2
    ),
    "a window": lambda: (
        normal(jnp.ones(4)) / cp.window(normal(1.5 * jnp.ones(2)), (4,), (2,)) ** 0.5
    ),
}


@pytest.mark.parametrize("name", IMPROPER)
def test_what_has_no_integral_at_level_0_is_refused(name):
    improper = IMPROPER[name]()
    refused(lambda: cp.compile(single, improper), ImproperError, "level 0 of 11")


@pytest.mark.parametrize("name", PROPER)
def test_what_has_one_is_not(name):
    cp.compile(single, PROPER[name]())


def test_what_is_as_good_as_improper_is_refused_too_and_data_may_make_a_site_proper():
    refused(
        lambda: cp.compile(single, normal(2.0) / normal(1.0) ** 0.25),
        ImproperError,
    )
    cp.compile(
        measured, normal(2.0) / normal(1.0) ** 0.5, lambda x: dist.Normal(x, 0.1), 0.3
    )


def test_the_least_precision_is_found():
    rng = np.random.default_rng(0)
    matrices = [a @ a.T + np.eye(3) for a in rng.standard_normal((3, 3, 3))]
    graph = cp.compile(
        single, mvn(*matrices[0]) * mvn(*matrices[1]) / mvn(*(30 * matrices[2])) ** 0.5
    ).graph
    root = graph.sites[0].root
    for level in (0, 6, 11):
        alpha, sigma = SCHEDULE.alpha[level], SCHEDULE.sigma[level]
        inverse = [
            np.linalg.inv(alpha**2 * m + sigma**2 * np.eye(3))
            for m in (*matrices[:2], 30 * matrices[2])
        ]
        expected = np.linalg.eigvalsh(inverse[0] + inverse[1] - 0.5 * inverse[2])[0]
        np.testing.assert_allclose(
            least(tail_of(root, (3,), SCHEDULE, level), 3), expected, rtol=1e-4
        )


# whether the noisiest level is noise
# ----------------------------------------------------------------------


def test_what_starting_from_noise_makes_of_a_law():
    """One Gaussian, where every number is known: x = σ·ε, x₀ = μ + α·v/(α²v + σ²)·(x −
    α·μ) + the rest."""
    part = components(dist.Normal(3.0, 0.5))[0]
    alpha, sigma = np.sqrt(0.2), np.sqrt(0.8)
    spread = 0.2 * 0.25 + 0.8
    error, what = bias(part, alpha, sigma)
    np.testing.assert_allclose(0.05 * error, 0.2 * 0.25 * 3.0 / spread / 0.5, rtol=1e-6)
    assert what == f"a mean of {3 - 0.2 * 0.25 * 3.0 / spread:.3g}, not 3"


def test_what_starting_from_noise_makes_of_shares():
    """The share of a component is the mean of its responsibility under N(0, σ²), here
    by quadrature."""
    law = modes((0.8, 0.2), [-3.0, 3.0], [3.0, 3.0])
    alpha = np.sqrt(0.1)
    sigma = np.sqrt(0.9)
    x = np.linspace(-8, 8, 4001)
    p = np.array([0.8, 0.2])[:, None] * np.exp(
        -0.5 * (x - alpha * np.array([[-3], [3]])) ** 2 / (0.9 + 0.1 * 9.0)
    )
    share = np.trapezoid(p[1] / p.sum(0) * np.exp(-0.5 * x**2 / sigma**2), x) / (
        sigma * np.sqrt(2 * np.pi)
    )
    assert share > 0.23
    error, _ = bias(components(law)[0], alpha, sigma)
    assert error > 0.9 * abs(share - 0.2) / 0.02


SEPARATED = modes((0.8, 0.2), [-3.0, 3.0], [0.3, 0.3])


@pytest.mark.parametrize(
    ("law", "top"),
    [(SEPARATED, -1.0), (dist.Normal(200.0, 50.0), -9.0), (SEPARATED, -4.0)],
)
def test_a_noisiest_level_with_signal_is_refused_and_the_one_that_is_named_is_not(
    law, top
):
    f = cp.Analytic(law, cp.Schedule.log_snr(12, min=top))
    raised = refused(lambda: cp.compile(single, f), ImproperError)
    lower = float(raised.fix.split("min=")[1].split(")")[0])
    cp.compile(single, f, schedule=cp.Schedule.log_snr(12, min=lower))


@pytest.mark.parametrize(
    ("law", "top"),
    [(SEPARATED, -9.0), (dist.Normal(1.0, 1.0), -4.0), (jnp.ones((5, 3)), -9.0)],
)
def test_a_noisiest_level_of_noise_is_not_refused(law, top):
    cp.compile(single, cp.Analytic(law, cp.Schedule.log_snr(12, min=top)))


def test_levels_that_never_reach_noise_are_refused():
    betas = np.linspace(1e-4, 0.02, 50)
    f = cp.Diffusion(
        lambda x, t: x, cp.Schedule.from_arrays(1 - betas, betas), event_shape=(2,)
    )
    refused(
        lambda: cp.compile(single, f),
        InvalidValueError,
    )


# networks
# ----------------------------------------------------------------------

MEAN = jnp.array([0.4, -0.7, 0.2])
VARIANCE = 0.3


def returning(what, sign=1.0, schedule=SCHEDULE):
    """A network that returns the noise, the data, the velocity or the score of N(MEAN,
    VARIANCE·I)."""

    def network(x, t):
        noise = schedule.at(t)
        return sign * network_outputs(x, noise.alpha, noise.sigma, MEAN, VARIANCE)[what]

    return network


def compiled(network, declared, schedule=SCHEDULE):
    return cp.compile(
        single,
        cp.Diffusion(network, schedule, event_shape=(3,), parameterization=declared),
    )


@pytest.mark.parametrize(
    ("right", "declared"),
    [
        ("x0", "epsilon"),
        ("v", "epsilon"),
        ("x0", "score"),
        ("epsilon", "x0"),
        ("epsilon", "v"),
        ("score", "x0"),
        ("score", "epsilon"),
        ("epsilon", "score"),
        ("x0", "energy_norm"),
    ],
)
def test_another_parameterization_is_named(right, declared):
    error = refused(lambda: compiled(returning(right), declared), NetworkError)
    assert f"parameterization='{declared}'" in error.found
    assert f"parameterization='{right}'" in error.fix


@pytest.mark.parametrize("declared", ["epsilon", "score", "energy"])
def test_the_wrong_sign_is_named(declared):
    refused(
        lambda: compiled(returning(declared, sign=-1.0), declared),
        NetworkError,
    )


def test_the_wrong_sign_of_a_flow_is_named():
    """At the noisiest level any output gives the score of noise, so the output itself
    is looked at: it is the noise."""
    refused(
        lambda: compiled(lambda x, t: -x / SCHEDULE.at(t).sigma, "flow"),
        NetworkError,
    )


def test_the_data_of_a_wide_law_are_not_taken_for_noise():
    """α·v/σ = 1 at the noisiest level: there E[x₀ | x] is as large as the noise."""
    sd = float((SCHEDULE.sigma[-1] / SCHEDULE.alpha[-1]) ** 0.5)

    def network(x, t):
        noise = SCHEDULE.at(t)
        return noise.alpha * sd**2 / (noise.alpha**2 * sd**2 + noise.sigma**2) * x

    assert compiled(network, "x0").graph.doubts == ()


def test_a_network_that_fits_nothing_is_doubted_in_the_status():
    density = compiled(lambda x, t: 1.6 * x, "epsilon")
    (doubt,) = density.graph.doubts
    assert "60%" in doubt
    check_wording(doubt)
    assert doubt in str(density)
    result = cp.infer(
        density, jax.random.key(0), num_chains=4, sampler=cp.Ancestral(), progress=False
    )
    assert result.status.has("network_doubted")
    assert doubt in result.status.message


def test_networks_with_unknown_weights_are_not_looked_at():
    class Net(eqx.Module):
        weight: jax.Array

        def __call__(self, x, t):
            return self.weight * x

    jax.eval_shape(
        lambda w: compiled(Net(w), "epsilon").score({"x": jnp.ones(3)}, 3),
        jnp.float32(-1.0),
    )


# networks that draw random numbers
# ----------------------------------------------------------------------


class Dropping(eqx.Module):
    dropout: eqx.nn.Dropout

    def __call__(self, x, t):
        return self.dropout(x, key=jax.random.key(0))


class DroppingNNX(nnx.Module):
    def __init__(self):
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(3, use_running_average=True, rngs=nnx.Rngs(1))

    def __call__(self, x, t):
        return self.dropout(x)


class DroppingLinen(linen.Module):
    @linen.compact
    def __call__(self, x, t, key=None):
        return linen.Dropout(0.5, deterministic=False)(x)


def with_key(x, t):
    return DroppingLinen().apply({}, x, t, rngs={"dropout": jax.random.key(0)})


def normed():
    network = DroppingNNX()
    network.eval()
    network.norm.use_running_average = False
    return network


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        pytest.param(
            lambda: Dropping(eqx.nn.Dropout(0.5)),
            cp.Diffusion,
            id="Dropout layer is in training...eqx.nn.inference_mode",
        ),
        pytest.param(
            DroppingNNX,
            cp.Diffusion,
            id="Dropout layer is in training mode...network.eval()",
        ),
        pytest.param(
            normed,
            cp.Diffusion,
            id="BatchNorm layer is in training mode...network.eval()",
        ),
        pytest.param(
            lambda: with_key,
            cp.Diffusion,
            id="factor 'with_key' draws random numbers...deterministic=True",
        ),
        pytest.param(
            lambda: lambda x, t: jax.checkpoint(lambda y: with_key(y, t))(x),
            cp.Diffusion,
            id="draws random numbers",
        ),
        pytest.param(lambda: with_key, cp.Classifier, id="draws random numbers 2"),
    ],
)
def test_a_dropout_that_was_left_on_is_refused(make, kind):
    refused(lambda: kind(make(), SCHEDULE, event_shape=(3,)), NetworkError)


def test_a_dropout_that_is_off_passes():
    network = DroppingNNX()
    network.eval()
    cp.Diffusion(network, SCHEDULE, event_shape=(3,))
    cp.Diffusion(
        eqx.nn.inference_mode(Dropping(eqx.nn.Dropout(0.5))), SCHEDULE, event_shape=(3,)
    )
    cp.Diffusion(Dropping(eqx.nn.Dropout(0.0)), SCHEDULE, event_shape=(3,))
