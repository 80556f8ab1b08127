"""Analytic factors whose parameters are latents: hierarchical models, their normaliser known at each level."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.errors import DoublyIntractableError, ProgramError
from refusals import refused
from sampling_cases import SCHEDULE
from zscores import assert_agrees, z_scores

WEIGHTS, SHIFT, SDS, SD, Y = (0.3, 0.7), (-1.0, 0.6), (0.4, 0.7), 0.5, 1.4
PRIOR_SD, SCALE = 0.8, (0.3, 0.2)


@cp.program
def hierarchy(y, schedule):
    """Objects share a mixture whose place and width are unknown; the data are of the first and of their plain one."""
    m = cp.sample("m", dist.Normal(0.2, PRIOR_SD))
    s = cp.sample("s", dist.LogNormal(*SCALE))
    left, right = (cp.Analytic(dist.Normal(m + b, s * sd), schedule) for b, sd in zip(SHIFT, SDS, strict=True))
    x = cp.sample("x", cp.mixture([left, right], weights=WEIGHTS))
    with numpyro.plate("object", 2):
        cp.sample("z", cp.Analytic(dist.Normal(m * jnp.ones(2), 1.0), schedule))
    cp.observe("y", dist.Normal(x, SD), y)


@pytest.fixture(scope="module")
def density():
    return cp.compile(hierarchy, jnp.array(Y), SCHEDULE)


def exact(position, level, power):
    """log π_k by NumPyro's distributions alone: priors in unconstrained space, noised marginals, tempered data."""
    noise = SCHEDULE.at(level)
    x, z, m, log_s = (position[name] for name in ("x", "z", "m", "s"))
    s = jnp.exp(log_s)
    total = dist.Normal(0.2, PRIOR_SD).log_prob(m) + dist.Normal(*SCALE).log_prob(log_s)
    means = noise.alpha * (m + jnp.array(SHIFT))
    spread = jnp.sqrt((noise.alpha * s * jnp.array(SDS)) ** 2 + noise.sigma**2)
    total += jax.nn.logsumexp(jnp.log(jnp.array(WEIGHTS)) + dist.Normal(means, spread).log_prob(x))
    total += dist.Normal(noise.alpha * m, jnp.hypot(noise.alpha, noise.sigma)).log_prob(z).sum()
    return total + power(level) * dist.Normal(x / noise.alpha, SD).log_prob(Y)


def tempering(level):
    return jax.nn.sigmoid(jnp.asarray(SCHEDULE.log_snr)[level] - 4) / jax.nn.sigmoid(SCHEDULE.log_snr[0] - 4)


def untold(level):
    return 0.0


EXACT = jax.jit(jax.value_and_grad(exact), static_argnums=2)


@pytest.mark.parametrize("level", [0, 13, 31])
def test_density_and_scores_are_the_models(density, level):
    position = {
        "x": jnp.array(0.7),
        "z": jnp.array([[0.4, -1.2], [2.0, 0.1]]),
        "m": jnp.array(-0.6),
        "s": jnp.array(0.5),
    }
    evaluation = density.evaluate(position, level)
    value, score = EXACT(position, level, tempering)
    np.testing.assert_allclose(evaluation.log_density, value, rtol=2e-5)
    for name in position:
        np.testing.assert_allclose(evaluation.score[name], score[name], rtol=1e-4, atol=1e-4)
    alone = EXACT(position, level, untold)[1]["x"]
    np.testing.assert_allclose(evaluation.parts.drift["x"], alone, rtol=1e-4, atol=1e-4)
    assert evaluation.parts.rate == 0  # conditional on m and s each is a noised marginal
    leaves = jax.eval_shape(density.leaf_scores, position, level)
    assert sorted(leaves) == ["Normal(x | m)", "Normal(x | m, s)"]


def test_what_the_program_says_of_itself(density):
    assert "0.3·Normal(x | m, s) + 0.7·Normal(x | m, s)" in str(density)
    assert {"energy", "feynman_kac", "mode_depth"} <= density.capabilities


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "levels"), [("density", 32), ("feynman_kac", 128)])
def test_smc_gives_the_evidence_and_the_posterior(weights, levels):
    """Likelihood ratios are in the weights: p(y), and moments of m and x, are those of quadrature over m and s.

    Density weights are exact with any number of levels. Feynman–Kac weights find 5 % too much evidence with 32 of them,
    1.5 % with 64.
    """
    density = cp.compile(hierarchy, jnp.array(Y), cp.Schedule.log_snr(levels))
    sampler = cp.SMC(cp.MALA(), 3, weights=weights)
    runs = [
        cp.infer(density, jax.random.key(seed), num_chains=1024, sampler=sampler, progress=False) for seed in range(20)
    ]
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    m, s = np.meshgrid(0.2 + PRIOR_SD * nodes, np.exp(SCALE[0] + SCALE[1] * nodes), indexing="ij")
    weight = weights[:, None] * weights / weights.sum() ** 2
    noise = SCHEDULE.at(0)
    extra = float(noise.sigma / noise.alpha) ** 2
    evidence, of_m, of_x = 0.0, 0.0, 0.0
    for share, shift, sd in zip(WEIGHTS, SHIFT, SDS, strict=True):
        prior = (s * sd) ** 2 + extra  # of x/α
        joint = share * weight * np.exp(-0.5 * (Y - m - shift) ** 2 / (prior + SD**2)) / np.sqrt(prior + SD**2)
        evidence += joint.sum() / np.sqrt(2 * np.pi)
        of_m += (joint * m).sum() / np.sqrt(2 * np.pi)
        gain = prior / (prior + SD**2)
        of_x += (joint * float(noise.alpha) * (m + shift + gain * (Y - m - shift))).sum() / np.sqrt(2 * np.pi)
    values = {"Z": np.exp([run.log_evidence for run in runs])}
    values |= {name: np.array([run[name].mean() for run in runs]) for name in ("m", "x")}
    assert_agrees(z_scores(values, {"Z": evidence, "m": of_m / evidence, "x": of_x / evidence}))


@cp.program
def powered(w, y=None):
    m = cp.sample("m", dist.Normal(0.0, 1.0))
    x = cp.sample("x", cp.Analytic(dist.Normal(m, 1.0), SCHEDULE) ** w)
    if y is not None:
        cp.observe("y", dist.Normal(x, 1.0), y)


@cp.program
def chained():
    m = cp.sample("m", cp.Analytic(dist.Normal(0.0, 1.0), SCHEDULE))
    cp.sample("x", cp.Analytic(dist.Normal(m, 1.0), SCHEDULE))


def test_what_is_not_normalised_whatever_the_latent_is_refused():
    with pytest.raises(DoublyIntractableError, match=r"'x' depends on the unobserved latent 'm'.*\n.*observe 'm'"):
        cp.compile(powered, 2.0, 0.3)
    refused(lambda: cp.compile(chained), ProgramError, "'x' depends on the noised site 'm'")
