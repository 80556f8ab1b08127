"""Factors of unknown normaliser that depend on latents: ancestral order where that is right, else a refusal."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.errors import CapabilityError, DoublyIntractableError, ProgramError
from refusals import refused
from sampling_cases import SCHEDULE, Calls, normal
from zscores import assert_agrees, assert_disagrees, z_scores

ALPHA, SIGMA = float(SCHEDULE.alpha[0]), float(SCHEDULE.sigma[0])
KERNEL = cp.HMC(num_leapfrog=3)


@cp.program
def product(y=None, sd=1.0):
    """Z(c) of N(x; c, 1)·N(x; 0, 1) is N(c; 0, 2): not constant, and here known."""
    c = cp.sample("c", dist.Normal(0.0, 1.0))
    x = cp.sample("x", cp.Analytic(dist.Normal(c, sd), SCHEDULE) * normal(), conditional=True)
    if y is not None:
        cp.observe("y", dist.Normal(x, 1.0), y)


def test_c_keeps_its_prior_and_x_has_its_law_given_c():
    density = cp.compile(product)
    assert "ancestral order: c by the prior, then x given that" in str(density)
    sampler = cp.AnnealedMCMC(KERNEL, 4)
    result = cp.infer(density, jax.random.key(0), num_chains=4096, sampler=sampler, progress=False)
    assert result.status.ok
    c, x = np.asarray(result["c"], float), np.asarray(result["x"], float)
    away, variance = x - ALPHA * c / 2, (ALPHA**2 + SIGMA**2) / 2  # of the product of two noised factors
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
    assert {name: site.kind for name, site in density.sites.items()} == {
        "x": "noised", "w": "noised", "c": "held", "m": "static"
    }  # fmt: skip
    result = cp.infer(density, jax.random.key(1), num_chains=2048, sampler=cp.AnnealedMCMC(KERNEL, 8), progress=False)
    gain = 1 / (1 + 1 + 0.5**2)
    c, m = np.asarray(result["c"], float), np.asarray(result["m"], float)
    values = {"c": c, "c²": c**2, "m": m, "m²": (m - gain) ** 2, "cm": c * (m - gain)}
    assert_agrees(z_scores(values, {"c": 0.0, "c²": 1.0, "m": gain, "m²": 1 - gain, "cm": 0.0}))


def conditional(counter, parameterization="energy"):
    """The noised N(c, 1) by a network, for this schedule (α² + σ² = 1)."""

    def network(x, log_snr, c):
        counter()
        alpha, sigma = jnp.sqrt(jax.nn.sigmoid(log_snr)), jnp.sqrt(jax.nn.sigmoid(-log_snr))
        away = x - alpha * c
        return sigma * 0.5 * jnp.sum(away**2) if parameterization == "energy" else -away

    return cp.Diffusion(
        network, SCHEDULE, event_shape=(2,), parameterization=parameterization, time="log_snr", conditions=("c",)
    )


@cp.program
def in_a_plate(f):
    a = cp.sample("a", dist.Normal(0.0, 1.0))
    c = cp.sample("c", dist.Normal(jnp.array([a, -a]), 0.5).to_event(1))
    with numpyro.plate("copies", 3):
        cp.sample("x", f.given(c=c) * f.given(c=0.0 * c))


def test_networks_get_the_latent_of_the_position():
    counter = Calls()
    density = cp.compile(in_a_plate, conditional(counter))
    x = jax.random.normal(jax.random.key(0), (3, 2))
    position = {"a": jnp.array(0.4), "c": jnp.array([1.5, -0.7]), "x": x}
    evaluate = eqx.filter_jit(lambda d, p, k: d.evaluate(p, k))
    alpha = float(SCHEDULE.alpha[5])
    for c in (position["c"], jnp.array([-2.0, 0.3])):
        found = evaluate(density, {**position, "c": c}, 5)
        np.testing.assert_allclose(found.score["x"], alpha * c - 2 * position["x"], rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(found.score["c"], 0.0)
        np.testing.assert_array_equal(found.score["a"], 0.0)
        away = jnp.sum((position["x"] - alpha * c) ** 2) + jnp.sum(position["x"] ** 2)
        np.testing.assert_allclose(found.parts.log_marginal, -0.5 * away, rtol=1e-4)
    counter.reset()
    evaluate(density, position, 6)
    jax.effects_barrier()
    assert counter.run == 2  # two leaves, each one batch of three copies


@pytest.mark.slow
def test_scores_alone_will_do_and_reverse_diffusion_is_ancestral_too():
    density = cp.compile(scores_alone, conditional(Calls(), "score"))
    result = cp.infer(density, jax.random.key(2), num_chains=4096, sampler=cp.Ancestral(), progress=False)
    c, away = result["c"], result["x"] - ALPHA * result["c"]
    values = {"c": c, "c²": c**2, "x": away, "cx": c * away}
    assert_agrees(z_scores(values, {"c": 0.0, "c²": 1.0, "x": 0.0, "cx": 0.0}))
    chosen = cp.infer(density, jax.random.key(2), num_chains=300, progress=False)
    assert "AnnealedMCMC" in chosen.about.sampler


@cp.program
def scores_alone(f):
    c = cp.sample("c", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    cp.sample("x", f.given(c=c))


def test_chains_are_not_weighed_against_one_another():
    density = cp.compile(product)
    for weights in ("feynman_kac", "density"):
        with pytest.raises(CapabilityError, match=r"weighs chains[\s\S]*depends on 'c'[\s\S]*Fix: use cp.AnnealedMCMC"):
            cp.infer(density, jax.random.key(0), num_chains=4, sampler=cp.SMC(weights=weights), progress=False)
    refused(density.to_numpyro, DoublyIntractableError, "would move 'c'")


@cp.program
def told_of(where):
    c = cp.sample("c", dist.Normal(0.0, 1.0))
    b = cp.sample("b", dist.Normal(c, 1.0))
    cp.sample("x", cp.Analytic(dist.Normal(c, 1.0), SCHEDULE) * normal(), conditional=True)
    cp.observe("y", dist.Normal({"c": c, "b": b}[where], 1.0), 0.3)


@cp.program
def after_a_noised_one():
    w = cp.sample("w", normal())
    c = cp.sample("c", dist.Normal(w, 1.0))
    cp.sample("x", cp.Analytic(dist.Normal(c, 1.0), SCHEDULE) * normal(), conditional=True)


def test_where_the_prior_draw_would_be_wrong_the_program_is_refused():
    with pytest.raises(DoublyIntractableError, match=r"'x' depends on the unobserved latent 'c'.*'y' depends on 'x'"):
        cp.compile(product, 0.3)
    refused(lambda: cp.compile(product, 0.3), DoublyIntractableError, r"observe 'c'; or calibrate[\s\S]*classifier")
    for where in ("c", "b"):
        with pytest.raises(
            DoublyIntractableError, match=r"'y' depends on 'c'[\s\S]*test_ancestral[\s\S]*ancestral order"
        ):
            cp.compile(told_of, where)
    refused(lambda: cp.compile(after_a_noised_one), ProgramError, "depends on the noised site 'w'")
