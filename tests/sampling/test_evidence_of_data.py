"""SMC's evidence of data: likelihood ratios between levels are in the weights, under
each policy.

One program holds a conjugate model for each policy, so its evidence is the product of
theirs.

The sum of Feynman–Kac weights is also tested with every expectation integrated on a
grid instead of drawn. d log ∫F_τ/dτ is the expectation of g²·r under F_τ. Weights are
an affine function of the rates, so that their expectation is the weight of the expected
rates; summed over the levels it is log ∫F_0 − log ∫F_{K−1}, up to the error of the
trapezoid rule, which falls to a quarter on twice the levels. That of a wrong term or
another rule does not.
"""

import dataclasses
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.samplers.layout import Layout
from composeprob.samplers.weights import incremental_log_weight
from sampling_cases import measured, normal, run, single
from zscores import assert_agrees, assert_disagrees, z_scores

POLICIES = ("exact", "tempered", "denoised", "noised")
SD, Y, RUNS = 0.5, 1.2, 20


def likelihood(policy, x, m, schedule):
    """N(y; x₀ + m, SD²), or under "noised" the distribution of y given x_k: its spread
    grows by that of x_k/α_k."""
    if policy != "noised":
        return dist.Normal(x + m, SD)
    alpha = jnp.asarray(schedule.alpha)
    variance = jnp.asarray(schedule.sigma / schedule.alpha) ** 2

    def of_level(k):
        spread = jnp.sqrt(SD**2 + jnp.where(k == 0, 0.0, variance[k]))
        return dist.Normal(x / alpha[k] + m, spread)

    return of_level


@cp.program
def data(f, y, latent):
    for policy in POLICIES:
        with numpyro.handlers.scope(prefix=policy, divider="_"), cp.annealed(policy):
            x = cp.sample("x", f)
            m = cp.sample("m", dist.Normal(0.5, 0.8)) if latent else 0.5
            cp.observe("y", likelihood(policy, x, m, f.schedule), y)


def evidence(latent, schedule, sd=SD):
    """Π N(y; 0.5, Var x/α + Var m + sd²)."""
    of_x = 1 + float(schedule.sigma[0] / schedule.alpha[0]) ** 2
    variance = of_x + latent * 0.8**2 + sd**2
    density = np.exp(-0.5 * (Y - 0.5) ** 2 / variance) / np.sqrt(2 * np.pi * variance)
    return density ** len(POLICIES)


def estimates(sampler, latent, schedule):
    density = cp.compile(data, normal(schedule=schedule), jnp.array(Y), latent)
    runs = [run(density, seed, 1024, sampler=sampler) for seed in range(RUNS)]
    return {"Z": np.exp([result.log_evidence for result in runs])}


@pytest.mark.slow
@pytest.mark.parametrize(
    "latent", [False, True], ids=["without latents", "with latents"]
)
@pytest.mark.parametrize(("weights", "levels"), [("density", 32), ("feynman_kac", 128)])
def test_the_evidence_is_that_of_the_data(weights, levels, latent):
    schedule = cp.Schedule.log_snr(levels)
    values = estimates(cp.SMC(cp.MALA(), 2, weights=weights), latent, schedule)
    assert_agrees(z_scores(values, {"Z": evidence(latent, schedule)}))
    assert_disagrees(z_scores(values, {"Z": evidence(latent, schedule, sd=2 * SD)}))


# ── every expectation integrated on a grid ────────────────────────────────────────────

FINE = cp.Schedule.log_snr(33, min=-5.0, max=5.0)
GRID = np.linspace(-8.0, 8.0, 801)


def on_the_grid(*measurement):
    """log ∫ of F·E over x at every level, and its terms in y with the rate and excess
    that are their means under F·E, and neither potential nor prior."""
    f = normal(-0.6, 0.8, FINE)
    g = normal(0.7, 0.5, FINE)
    program = measured if measurement else single
    density = cp.compile(program, f * g, *measurement)
    layout = Layout.of_density(density)
    points = jnp.asarray(GRID)

    def at_level(k):
        def at_point(x):
            return layout.evaluate(density, x[None] / FINE.at(k).alpha, k)

        return jax.vmap(at_point)(points)

    terms = jax.jit(jax.vmap(at_level))(jnp.arange(FINE.num_levels)).terms
    log_density = np.asarray(terms.log_marginal + terms.log_exact, np.float64)
    spacing = GRID[1] - GRID[0]
    total = np.log(np.exp(log_density).sum(1) * spacing)
    weights = jnp.asarray(np.exp(log_density - total[:, None]) * spacing)
    zero = jnp.zeros(FINE.num_levels)
    means = {
        "rate": jnp.sum(weights * terms.rate, 1),
        "excess": jnp.sum(weights * terms.excess, 1),
        "log_potential": zero,
        "log_prior": zero,
    }
    return total, dataclasses.replace(terms, **means)


def gained(means, step):
    """Σ of the expected log-weight increments over every ``step``-th level."""
    names = ("rate", "excess", "log_potential", "log_prior")

    def at(k):
        of_level = {name: getattr(means, name)[k] for name in names}
        return dataclasses.replace(means, **of_level)

    levels = range(0, FINE.num_levels, step)
    total = 0.0
    for end, start in pairwise(levels):
        increment = incremental_log_weight(
            at(start), at(end), FINE.at(start), FINE.at(end)
        )
        total += float(increment)
    return total


@pytest.mark.parametrize(
    "measurement",
    [(), (lambda x: dist.Normal(x, 0.4), 0.9, "exact")],
    ids=["product", "measured"],
)
def test_weights_add_up_to_the_evidence_by_a_rule_of_second_order(measurement):
    """A product, without and with a measurement that is annealed exactly: its rate has
    a term of both together."""
    total, means = on_the_grid(*measurement)
    exact = total[0] - total[-1]
    fine = gained(means, 1) - exact
    coarse = gained(means, 2) - exact
    assert abs(fine) < 5e-4
    assert 3.2 < coarse / fine < 4.8
