"""A conditional flow, of known density without noise only: distilled, and as it is by
level-0 weights."""

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
from refusals import refused
from sampling_cases import run
from training.recipes import cosine

LEVELS = cp.Schedule.log_snr(40, min=-7.0, max=6.0)
BROAD, NOISE = 2.0, 0.6
CLEAR = 1 / (BROAD**-2 + NOISE**-2)


class Affine(NamedTuple):
    """The posterior of u ~ N(0, 2²·I) given x ~ N(u, 0.6²·I) as an affine flow, in
    flowjax's form."""

    scale: float = CLEAR**0.5

    def law(self, condition):
        return dist.Normal(CLEAR / NOISE**2 * condition, self.scale).to_event(1)

    def sample(self, key, *, condition):
        return self.law(condition).sample(key)

    def log_prob(self, u, *, condition):
        return self.law(condition).log_prob(u)


class Net(eqx.Module):
    """ε̂, beside what a broad Gaussian has."""

    mlp: eqx.nn.MLP

    def __init__(self, key):
        self.mlp = eqx.nn.MLP(5, 2, 48, 2, jax.nn.silu, key=key)

    def __call__(self, u, log_snr, x):
        return (
            self.mlp(jnp.concatenate([u, x, jnp.array([log_snr / 5])]))
            + jnp.sqrt(jax.nn.sigmoid(-log_snr)) * u
        )


def simulated(number):
    u, x = np.random.default_rng(0).normal(size=(2, number, 2))
    return (BROAD * u + NOISE * x).astype(np.float32)


def distilled(flow=None, xs=None, iterations=1500, **settings):
    xs = simulated(500) if xs is None else xs
    settings = {"network": Net, "schedule": LEVELS, "log_snr": (-7.0, 6.0)} | settings
    flow = Affine() if flow is None else flow
    return distil(flow, xs, jax.random.key(0), iterations=iterations, batches=Batches(256, antithetic=True),
                  learning_rate=cosine(4e-3), ema=0.98, progress=False, **settings)  # fmt: skip


def test_a_distilled_flow_says_what_it_lost():
    found = distilled(draws=400, held_out=6)
    assert found.log_density_gap.shape == (6,)
    assert found.mean_off.shape == found.spread.shape == (6, 2)
    assert abs(found.log_density_gap.mean()) < 0.15
    assert np.abs(found.mean_off).max() < 0.35
    assert np.all((found.spread > 0.8) & (found.spread < 1.2))
    assert "6 conditions held out" in str(found)
    factor, x = found.factor, jnp.array([1.0, -0.5])
    noise, at = LEVELS.at(15), jnp.array([0.4, 0.1])
    exact = -(at - noise.alpha * CLEAR / NOISE**2 * x) / (
        noise.alpha**2 * CLEAR + noise.sigma**2
    )
    np.testing.assert_allclose(
        factor.evaluate(at, noise, {"x": x})[1], exact, atol=0.25
    )


def test_what_was_not_learned_is_measured():
    """A network that says nothing but noise draws N(0, 1) whatever x; of a flow a tenth
    as wide that is 50 nats."""
    found = distilled(Affine(0.1), iterations=1, draws=100, held_out=4)
    assert found.log_density_gap.min() > 20
    assert np.all(found.spread > 3)


def test_refusals():
    refused(
        lambda: distilled(dist.Normal(0.0, 1.0).log_prob),
        WrongTypeError,
        "no sample and no log_prob",
    )
    refused(
        lambda: distilled(xs=simulated(16)),
        InvalidValueError,
        r"\(16, 2\), of which 16 are held out",
    )
    refused(
        lambda: distilled(xs=simulated(40) * np.nan),
        InvalidValueError,
        "not all finite",
    )


class TestWithoutDistillation:
    """A flow's log-density is a log-weight of level 0."""

    XS = jnp.asarray([[0.9, -0.4], [1.4, 0.3], [0.2, 0.6], [1.1, -0.2]])
    FLOW = Affine()

    def log_ratio(self, u, x):
        return (
            self.FLOW.log_prob(u, condition=x)
            - dist.Normal(0.0, BROAD).log_prob(u).sum()
        )

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
        clear = 1 / (1 + len(self.XS) / variance)
        mean, found = (
            clear * len(self.XS) / variance * self.XS.mean(0),
            np.asarray(draws, float),
        )
        assert np.abs((found.mean(0) - mean) / clear**0.5).max() < 0.25
        np.testing.assert_allclose(found.std(0), clear**0.5, rtol=0.15)
