"""Factors that depend on latents: analytic ones, normalised at each level; others in
ancestral order, or refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.errors import CapabilityError, DoublyIntractableError, ProgramError
from messages import check_wording
from refusals import refused
from sampling_cases import SCHEDULE, Calls, learned, normal, run
from zscores import assert_agrees, assert_disagrees, z_scores

WEIGHTS = (0.3, 0.7)
SHIFT = (-1.0, 0.6)
SDS = (0.4, 0.7)
SD = 0.5
Y = 1.4
PRIOR_SD = 0.8
SCALE = (0.3, 0.2)


@cp.program
def hierarchy(y, schedule):
    """A mixture whose place and width are unknown, with a datum of a draw from it, and
    two objects that share the place."""
    m = cp.sample("m", dist.Normal(0.2, PRIOR_SD))
    s = cp.sample("s", dist.LogNormal(*SCALE))
    left, right = (
        cp.Analytic(dist.Normal(m + b, s * sd), schedule)
        for b, sd in zip(SHIFT, SDS, strict=True)
    )
    x = cp.sample("x", cp.mixture([left, right], weights=WEIGHTS))
    with numpyro.plate("object", 2):
        cp.sample("z", cp.Analytic(dist.Normal(m * jnp.ones(2), 1.0), schedule))
    cp.observe("y", dist.Normal(x, SD), y)


@pytest.fixture(scope="module")
def density():
    return cp.compile(hierarchy, jnp.array(Y), SCHEDULE)


def exact(position, level, power):
    """log π_k by NumPyro's distributions alone: priors in unconstrained space, noised
    marginals, tempered data."""
    noise = SCHEDULE.at(level)
    x, z, m, log_s = (position[name] for name in ("x", "z", "m", "s"))
    s = jnp.exp(log_s)
    total = dist.Normal(0.2, PRIOR_SD).log_prob(m) + dist.Normal(*SCALE).log_prob(log_s)
    means = noise.alpha * (m + jnp.array(SHIFT))
    spread = jnp.sqrt((noise.alpha * s * jnp.array(SDS)) ** 2 + noise.sigma**2)
    of_modes = dist.Normal(means, spread).log_prob(x)
    total += jax.nn.logsumexp(jnp.log(jnp.array(WEIGHTS)) + of_modes)
    spread = jnp.hypot(noise.alpha, noise.sigma)
    total += dist.Normal(noise.alpha * m, spread).log_prob(z).sum()
    return total + power(level) * dist.Normal(x / noise.alpha, SD).log_prob(Y)


def tempering(level):
    """(1 + r_0²·H)/(1 + r_k²·H) with H = e⁴."""
    log_snr = jnp.asarray(SCHEDULE.log_snr)
    return jax.nn.sigmoid(log_snr[level] - 4) / jax.nn.sigmoid(log_snr[0] - 4)


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
        np.testing.assert_allclose(
            evaluation.score[name], score[name], rtol=1e-4, atol=1e-4
        )
    _, without_data = EXACT(position, level, lambda level: 0.0)
    drift = evaluation.terms.drift["x"]
    np.testing.assert_allclose(drift, without_data["x"], rtol=1e-4, atol=1e-4)
    # Conditional on m and s each factor is a noised marginal.
    assert evaluation.terms.rate == 0
    leaves = jax.eval_shape(density.leaf_scores, position, level)
    assert sorted(leaves) == ["Normal(x | m)", "Normal(x | m, s)"]
    assert "0.3·Normal(x | m, s) + 0.7·Normal(x | m, s)" in str(density)
    assert {"energy", "feynman_kac", "mode_depth"} <= density.capabilities


@cp.program
def powered(w, y):
    m = cp.sample("m", dist.Normal(0.0, 1.0))
    x = cp.sample("x", cp.Analytic(dist.Normal(m, 1.0), SCHEDULE) ** w)
    cp.observe("y", dist.Normal(x, 1.0), y)


@cp.program
def chained():
    m = cp.sample("m", cp.Analytic(dist.Normal(0.0, 1.0), SCHEDULE))
    cp.sample("x", cp.Analytic(dist.Normal(m, 1.0), SCHEDULE))


def test_what_is_not_normalised_whatever_the_latent_is_refused():
    refused(
        lambda: cp.compile(powered, 2.0, 0.3),
        DoublyIntractableError,
        "'x'.*'m'",
        "observe 'm'",
    )
    refused(lambda: cp.compile(chained), ProgramError)


ALPHA, SIGMA = float(SCHEDULE.alpha[0]), float(SCHEDULE.sigma[0])
KERNEL = cp.HMC(num_leapfrog=3)
KEY = jax.random.key(0)


@cp.program
def product(y=None, sd=1.0):
    """Z(c) of N(x; c, 1)·N(x; 0, 1) is N(c; 0, 2): not constant, and given by a
    formula."""
    c = cp.sample("c", dist.Normal(0.0, 1.0))
    factor = cp.Analytic(dist.Normal(c, sd), SCHEDULE) * normal()
    x = cp.sample("x", factor, conditional=True)
    if y is not None:
        cp.observe("y", dist.Normal(x, 1.0), y)


def test_c_keeps_its_prior_and_x_has_its_law_given_c():
    density = cp.compile(product)
    assert re.search(r"order: c\b.* x\b", str(density))
    check_wording(str(density))
    result = run(density, 0, 4096, sampler=cp.AnnealedMCMC(KERNEL, 4))
    assert result.status.ok
    c, x = np.asarray(result["c"], float), np.asarray(result["x"], float)
    # Of the product of two noised factors.
    away = x - ALPHA * c / 2
    variance = (ALPHA**2 + SIGMA**2) / 2
    values = {"c": c, "c²": c**2, "x": away, "x²": away**2, "cx": c * away}
    expected = {"c": 0.0, "c²": 1.0, "x": 0.0, "x²": variance, "cx": 0.0}
    assert_agrees(z_scores(values, expected))
    # The joint density without Z(c), which chains that moved c would sample.
    assert_disagrees(z_scores(values, {"c²": 1 / (1 + 1 / 2)}))


@pytest.mark.slow
def test_what_moves_beside_it_is_not_held():
    @cp.program
    def beside(f):
        c = cp.sample("c", dist.Normal(0.0, 1.0))
        cp.sample("x", cp.Analytic(dist.Normal(c, 1.0), SCHEDULE) * f, conditional=True)
        w = cp.sample("w", f)
        m = cp.sample("m", dist.Normal(0.0, 1.0))
        cp.observe("y", dist.Normal(w + m, 0.5), 1.0)

    density = cp.compile(beside, normal())
    kinds = {name: site.kind for name, site in density.sites.items()}
    assert kinds == {"x": "noised", "w": "noised", "c": "held", "m": "static"}
    result = run(density, 1, 2048, sampler=cp.AnnealedMCMC(KERNEL, 8))
    gain = 1 / (1 + 1 + 0.5**2)
    c, m = np.asarray(result["c"], float), np.asarray(result["m"], float)
    values = {"c": c, "c²": c**2, "m": m, "m²": (m - gain) ** 2, "cm": c * (m - gain)}
    expected = {"c": 0.0, "c²": 1.0, "m": gain, "m²": 1 - gain, "cm": 0.0}
    assert_agrees(z_scores(values, expected))


def conditional(counter, parameterization="energy"):
    """The noised N(c, 1) by a network, for this schedule (α² + σ² = 1)."""

    def network(x, log_snr, c):
        counter()
        alpha = jnp.sqrt(jax.nn.sigmoid(log_snr))
        sigma = jnp.sqrt(jax.nn.sigmoid(-log_snr))
        away = x - alpha * c
        if parameterization == "energy":
            return sigma * 0.5 * jnp.sum(away**2)
        return -away

    return learned(network, parameterization, SCHEDULE, conditions=("c",))


@cp.program
def in_a_plate(f):
    a = cp.sample("a", dist.Normal(0.0, 1.0))
    c = cp.sample("c", dist.Normal(jnp.array([a, -a]), 0.5).to_event(1))
    with numpyro.plate("copies", 3):
        cp.sample("x", f.given(c=c) * f.given(c=0.0 * c))


def test_networks_get_the_latent_of_the_position():
    counter = Calls()
    density = cp.compile(in_a_plate, conditional(counter))
    x = jax.random.normal(KEY, (3, 2))
    position = {"a": jnp.array(0.4), "c": jnp.array([1.5, -0.7]), "x": x}
    alpha = float(SCHEDULE.alpha[5])
    for c in (position["c"], jnp.array([-2.0, 0.3])):
        evaluation = density.evaluate({**position, "c": c}, 5)
        score = evaluation.score
        expected = alpha * c - 2 * x
        np.testing.assert_allclose(score["x"], expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(score["c"], 0.0)
        np.testing.assert_array_equal(score["a"], 0.0)
        log_marginal = -0.5 * (jnp.sum((x - alpha * c) ** 2) + jnp.sum(x**2))
        np.testing.assert_allclose(
            evaluation.terms.log_marginal, log_marginal, rtol=1e-4
        )
    counter.reset()
    density.evaluate(position, 6)
    assert counter.run == 2  # two leaves, each one batch of three copies


@pytest.mark.slow
def test_scores_alone_will_do_and_reverse_diffusion_is_ancestral_too():
    density = cp.compile(scores_alone, conditional(Calls(), "score"))
    result = run(density, 2, 4096, sampler=cp.Ancestral())
    c = result["c"]
    away = result["x"] - ALPHA * c
    values = {"c": c, "c²": c**2, "x": away, "cx": c * away}
    assert_agrees(z_scores(values, {"c": 0.0, "c²": 1.0, "x": 0.0, "cx": 0.0}))
    assert "AnnealedMCMC" in run(density, 2, 300, sampler=None).about.sampler


@cp.program
def scores_alone(f):
    c = cp.sample("c", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    cp.sample("x", f.given(c=c))


def test_chains_are_not_weighed_against_one_another():
    density = cp.compile(product)
    for weights in ("feynman_kac", "density"):
        sampler = cp.SMC(weights=weights)
        refused(
            lambda: cp.infer(density, KEY, num_chains=4, sampler=sampler),
            CapabilityError,
            "'c'",
            "cp.AnnealedMCMC",
        )
    refused(density.to_numpyro, DoublyIntractableError)


@cp.program
def with_datum_of(name):
    c = cp.sample("c", dist.Normal(0.0, 1.0))
    b = cp.sample("b", dist.Normal(c, 1.0))
    factor = cp.Analytic(dist.Normal(c, 1.0), SCHEDULE) * normal()
    cp.sample("x", factor, conditional=True)
    cp.observe("y", dist.Normal({"c": c, "b": b}[name], 1.0), 0.3)


@cp.program
def after_a_noised_one():
    w = cp.sample("w", normal())
    c = cp.sample("c", dist.Normal(w, 1.0))
    factor = cp.Analytic(dist.Normal(c, 1.0), SCHEDULE) * normal()
    cp.sample("x", factor, conditional=True)


def test_where_the_prior_draw_would_be_wrong_the_program_is_refused():
    refused(
        lambda: cp.compile(product, 0.3),
        DoublyIntractableError,
        "'x'.*'c'.*'y'.*'x'",
        "observe 'c'",
    )
    for name in ("c", "b"):
        refused(
            lambda: cp.compile(with_datum_of, name),
            DoublyIntractableError,
            "'y'.*'c'.*test_hierarchy",
        )
    refused(
        lambda: cp.compile(after_a_noised_one),
        ProgramError,
    )
