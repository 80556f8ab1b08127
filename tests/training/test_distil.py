"""A conditional flow with a density at level 0 only.

It is distilled into a factor of all levels, or used as it is by weights at level 0.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.errors import InvalidValueError, WrongTypeError
from composeprob.training import Batches, distil
from messages import check_wording
from refusals import refused
from sampling_cases import run
from training.recipes import cosine

LEVELS = cp.Schedule.log_snr(40, min=-7.0, max=6.0)
BROAD, NOISE = 2.0, 0.6
CLEAR = 1 / (BROAD**-2 + NOISE**-2)
"""Standard deviations of the prior and of the noise, and the posterior variance."""


class Affine(NamedTuple):
    """The posterior of u ~ N(0, 2²·I) given x ~ N(u, 0.6²·I), as a flow of flowjax."""

    scale: float = CLEAR**0.5

    def law(self, condition):
        return dist.Normal(CLEAR / NOISE**2 * condition, self.scale).to_event(1)

    def sample(self, key, *, condition):
        return self.law(condition).sample(key)

    def log_prob(self, u, *, condition):
        return self.law(condition).log_prob(u)


class Net(eqx.Module):
    """Network of ε̂, in addition to that of a broad Gaussian."""

    mlp: eqx.nn.MLP

    def __init__(self, key):
        self.mlp = eqx.nn.MLP(5, 2, 48, 2, jax.nn.silu, key=key)

    def __call__(self, u, log_snr, x):
        inputs = jnp.concatenate([u, x, jnp.array([log_snr / 5])])
        gaussian = jnp.sqrt(jax.nn.sigmoid(-log_snr)) * u
        return self.mlp(inputs) + gaussian


def simulated(number):
    """Simulations x, (number, 2)."""
    u, x = np.random.default_rng(0).normal(size=(2, number, 2))
    return (BROAD * u + NOISE * x).astype(np.float32)


def distilled(flow=None, xs=None, iterations=1500, **settings):
    xs = simulated(500) if xs is None else xs
    settings = {"network": Net, "schedule": LEVELS, "log_snr": (-7.0, 6.0)} | settings
    flow = Affine() if flow is None else flow
    return distil(
        flow,
        xs,
        jax.random.key(0),
        iterations=iterations,
        batches=Batches(256, antithetic=True),
        learning_rate=cosine(4e-3),
        ema=0.98,
        progress=False,
        **settings,
    )


def test_a_distilled_flow_says_what_it_lost():
    result = distilled(draws=400, held_out=6)
    assert result.log_density_gap.shape == (6,)
    assert result.mean_off.shape == result.spread.shape == (6, 2)
    assert abs(result.log_density_gap.mean()) < 0.15
    assert np.abs(result.mean_off).max() < 0.35
    assert np.all((result.spread > 0.8) & (result.spread < 1.2))
    assert "6 conditions" in str(result)
    check_wording(str(result), estimated=True)
    noise = LEVELS.at(15)
    x = jnp.array([1.0, -0.5])
    u = jnp.array([0.4, 0.1])
    mean = noise.alpha * CLEAR / NOISE**2 * x
    exact = -(u - mean) / (noise.alpha**2 * CLEAR + noise.sigma**2)
    _, score = result.factor.evaluate(u, noise, {"x": x})
    np.testing.assert_allclose(score, exact, atol=0.25)


def test_what_was_not_learned_is_measured():
    """Untrained, it draws N(0, 1) for any x: 50 nats from a flow a tenth as wide."""
    result = distilled(Affine(0.1), iterations=1, draws=100, held_out=4)
    assert result.log_density_gap.min() > 20
    assert np.all(result.spread > 3)


def test_refusals():
    refused(
        lambda: distilled(dist.Normal(0.0, 1.0).log_prob),
        WrongTypeError,
    )
    refused(
        lambda: distilled(xs=simulated(16)),
        InvalidValueError,
    )
    refused(
        lambda: distilled(xs=simulated(40) * np.nan),
        InvalidValueError,
    )


class TestWithoutDistillation:
    """A flow's log-density is a log-weight of level 0."""

    XS = jnp.asarray([[0.9, -0.4], [1.4, 0.3], [0.2, 0.6], [1.1, -0.2]])
    FLOW = Affine()

    def log_ratio(self, u, x):
        """log q(u | x) − log p(u), which is log p(x | u) up to a constant."""
        log_prior = dist.Normal(0.0, BROAD).log_prob(u).sum()
        return self.FLOW.log_prob(u, condition=x) - log_prior

    def test_in_a_hierarchy(self):
        """Members are NumPyro's latents there, and nothing is noised."""

        @cp.program
        def study(xs):
            mu = cp.sample("mu", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            with numpyro.plate("subjects", len(xs)):
                u = cp.sample("u", dist.Normal(mu, 0.5).to_event(1))
            cp.factor("x", jnp.sum(jax.vmap(self.log_ratio)(u, xs)))

        result = run(cp.compile(study, self.XS), 0, 400, sampler=None)
        assert result.status.ok
        self.assert_is_normal(result["mu"], 0.5**2 + NOISE**2)

    @pytest.mark.parametrize(
        "sampler",
        [pytest.param(None, marks=pytest.mark.slow), cp.SMC(weights="density")],
    )
    def test_beside_a_diffusion_factor(self, sampler):
        """One u under a factor of all levels and several flows."""

        @cp.program
        def tall(prior, xs):
            u = cp.sample("u", prior)
            cp.factor("x", jnp.sum(jax.vmap(lambda x: self.log_ratio(u, x))(xs)))

        prior = cp.Analytic(dist.Normal(jnp.zeros(2), 1.0).to_event(1), LEVELS)
        density = cp.compile(tall, prior, self.XS)
        result = run(density, 1, 500, sampler=sampler)
        assert result.status.ok
        self.assert_is_normal(result.unweighted()["u"], NOISE**2)

    def assert_is_normal(self, draws, variance):
        """The posterior of the mean of N(·, variance) under N(0, 1), given `XS`."""
        number = len(self.XS)
        posterior_variance = 1 / (1 + number / variance)
        mean = posterior_variance * number / variance * self.XS.mean(0)
        deviation = posterior_variance**0.5
        draws = np.asarray(draws, float)
        assert np.abs((draws.mean(0) - mean) / deviation).max() < 0.25
        np.testing.assert_allclose(draws.std(0), deviation, rtol=0.15)
