"""Eight schools, a program without noised sites: every way to sample it gives the posterior, which is known.

Given τ everything is Gaussian, so that expectations are integrals over τ alone (Gelman et al., *Bayesian Data
Analysis*, section 5.5). Non-centred: θ_j = μ + τ·η_j.
"""

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC, NUTS

import composeprob as cp
from zscores import LIMIT, assert_agrees, assert_disagrees, z_scores

EFFECTS = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def schools(y, error):
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("school", len(EFFECTS)):
        eta = numpyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = numpyro.deterministic("theta", mu + tau * eta)
        numpyro.sample("y", dist.Normal(theta, error), obs=y)


@pytest.fixture(scope="module")
def density():
    return cp.compile(cp.program(schools), jnp.asarray(EFFECTS), jnp.asarray(ERRORS))


def by_quadrature(errors=ERRORS):
    """Means of μ, log τ and θ, and their variances."""
    log_tau = np.linspace(-14.0, 8.0, 8001)
    tau, v = np.exp(log_tau), errors**2 + np.exp(2 * log_tau)[:, None]
    precision = 1 / 25 + (1 / v).sum(1)
    mean = (EFFECTS / v).sum(1) / precision
    log_weight = -0.5 * (np.log(v).sum(1) + np.log(precision) + (EFFECTS**2 / v).sum(1) - precision * mean**2)
    weight = np.exp(log_weight - log_weight.max()) / (1 + (tau / 5) ** 2) * tau
    weight /= weight.sum()
    pull = tau[:, None] ** 2 / v  # θ | μ, τ has mean pull·y + (1 − pull)·μ and variance pull·error²
    theta = pull * EFFECTS + (1 - pull) * mean[:, None]
    theta_variance = pull * errors**2 + (1 - pull) ** 2 / precision[:, None]

    def moments(mean, variance):
        first = weight @ mean
        return first, weight @ (variance + mean**2) - first**2

    found = {"mu": moments(mean, 1 / precision), "log tau": moments(log_tau, 0.0)}
    means, variances = moments(theta, theta_variance)
    return found | {f"theta{j}": (means[j], variances[j]) for j in range(len(EFFECTS))}


EXACT = by_quadrature()
EXPECTED = {name: mean for name, (mean, _) in EXACT.items()} | {f"{n}²": variance for n, (_, variance) in EXACT.items()}


def statistics(samples):
    """Every number and its squared distance from the exact mean: their averages are means and variances."""
    values = {"mu": samples["mu"], "log tau": np.log(samples["tau"])}
    values |= {f"theta{j}": samples["theta"][..., j] for j in range(len(EFFECTS))}
    return values | {f"{name}²": (value - EXACT[name][0]) ** 2 for name, value in values.items()}


def infer(density, sampler=None, num_chains=1024):
    return cp.infer(density, jax.random.key(0), num_chains=num_chains, sampler=sampler, progress=False)


@pytest.mark.slow
def test_the_sampler_that_is_chosen(density):
    """Of keys 0 … 7 each passes; with the code of quick tests, which rounds otherwise, key 0 alone is at |z| = 6."""
    result = infer(density)
    assert result.status.ok
    assert_agrees(z_scores(statistics(result.samples), EXPECTED))
    wrong = by_quadrature(0.7 * ERRORS)
    assert_disagrees(z_scores(statistics(result.samples), {name: mean for name, (mean, _) in wrong.items()}))


@pytest.mark.slow
@pytest.mark.parametrize(
    "hyper",
    [cp.HMC(cp.Adaptive(warmup=100), num_leapfrog=4), cp.BlackJAX(blackjax.nuts, cp.Adaptive(warmup=50))],
    ids=["HMC", "NUTS"],
)
def test_blocks(density, hyper):
    kernel = cp.Gibbs({("mu", "tau"): hyper, "eta": cp.HMC(cp.Adaptive(warmup=100), num_leapfrog=4)})
    result = infer(density, cp.AnnealedMCMC(kernel, 100))
    assert_agrees(z_scores(statistics(result.samples), EXPECTED))
    assert result.about.blocks == ("mu, tau", "eta")
    goals = [0.8 if isinstance(hyper, cp.BlackJAX) else 0.75, 0.75]
    np.testing.assert_allclose(result.acceptance[0], goals, atol=0.08)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["NumPyro's own", "the program's potential"])
def test_nuts_of_numpyro(density, model):
    """Its own model and the compiled program give one posterior: means and standard deviations within their errors."""
    options = {"num_warmup": 500, "num_samples": 2000, "num_chains": 4, "chain_method": "vectorized"}
    if model == "NumPyro's own":
        mcmc = MCMC(NUTS(schools), progress_bar=False, **options)
        mcmc.run(jax.random.key(0), jnp.asarray(EFFECTS), jnp.asarray(ERRORS))
    else:
        target = density.to_numpyro()
        kernel = NUTS(potential_fn=target.potential_fn)
        mcmc = MCMC(kernel, postprocess_fn=target.postprocess_fn, progress_bar=False, **options)
        mcmc.run(jax.random.key(0), init_params=target.init_params(jax.random.key(1), 4))
    samples = {name: np.asarray(value, float) for name, value in mcmc.get_samples(group_by_chain=True).items()}
    for name, value in statistics(samples).items():
        error = value.std() / np.sqrt(effective_sample_size(value))
        assert abs(value.mean() - EXPECTED[name]) < LIMIT * error, name
