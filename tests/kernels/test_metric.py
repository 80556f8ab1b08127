"""Metrics: the same chain in other coordinates, and metrics measured from the moves of
many chains."""

import dataclasses

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.kernels import HMC, MALA, UHMC, ULA, LineIntegral
from composeprob.kernels.metric import Estimated, measured
from composeprob.samplers.resampling import normalised_weights
from kernel_chains import from_exact_draws, start, steps_of, transitions
from sampling_cases import normal, run, single
from targets import Law, evaluate, two_modes
from zscores import assert_agrees, z_scores

SDS = {"thin": 0.01, "wide": 100.0}
VARIANCES = {name: sd**2 for name, sd in SDS.items()}


def log_density(position):
    logs = {
        name: jax.scipy.stats.norm.logpdf(position[name], scale=sd)
        for name, sd in SDS.items()
    }
    return jnp.sum(logs["thin"]) + jnp.sum(logs["wide"])


def draws(key, n):
    thin, wide = jax.random.split(key)
    return {
        "thin": SDS["thin"] * jax.random.normal(thin, (n, 3)),
        "wide": SDS["wide"] * jax.random.normal(wide, (n, 3)),
    }


def statistics(position):
    thin = position["thin"] / SDS["thin"]
    wide = position["wide"] / SDS["wide"]
    return {
        "thin": jnp.mean(thin),
        "wide": jnp.mean(wide),
        "thin²": jnp.mean(thin**2),
        "wide²": jnp.mean(wide**2),
        "both": jnp.mean(thin * wide),
    }


EXPECTED = {"thin": 0.0, "wide": 0.0, "thin²": 1.0, "wide²": 1.0, "both": 0.0}
LAW = Law(
    "two widths",
    log_density,
    draws,
    statistics,
    EXPECTED,
    3 * sum(sd**2 for sd in SDS.values()),
)


@pytest.mark.parametrize("kernel", [MALA, pytest.param(HMC, marks=pytest.mark.slow)])
def test_widths_of_a_hundredth_and_a_hundred(kernel):
    run = from_exact_draws(
        kernel(0.7, metric=VARIANCES),
        LAW,
        num_chains=5_000,
        num_transitions=40,
        num_draws=10,
    )
    assert_agrees(run.scores)
    assert run.moved > 0.4  # the wide site; the thin one:
    assert 0.3 < run.acceptance < 0.98


@pytest.mark.slow
def test_without_a_metric_the_thin_site_holds_up_the_wide_one():
    """The negative control: one step for both either hardly moves the wide site or is
    always rejected."""
    quick = {"num_chains": 500, "num_transitions": 20, "num_draws": 2}
    assert from_exact_draws(MALA(0.5 * 0.01**2), LAW, **quick).moved < 1e-4
    assert from_exact_draws(MALA(0.5), LAW, **quick).acceptance < 1e-3


MIXED = np.array([[1.0, 0.7, 0.2], [0.7, 0.8, -0.1], [0.2, -0.1, 0.5]])
KERNELS = [
    ULA(0.1),
    UHMC(0.4),
    HMC(0.9),
    MALA(0.5, log_ratio=LineIntegral(3)),
    HMC(0.9, log_ratio=LineIntegral(None)),
]
BY_SITE = {"a": jnp.array([0.25, 4.0]), "b": 9.0}


@pytest.mark.parametrize(
    "kernel",
    [MALA(0.5), *(pytest.param(k, marks=pytest.mark.slow) for k in KERNELS)],
    ids=repr,
)
@pytest.mark.parametrize("metric", [MIXED, BY_SITE], ids=["matrix", "by site"])
def test_it_is_the_kernel_on_the_density_of_other_coordinates(kernel, metric):
    """Number for number: acceptance, moves, and log-ratios of their reversals."""
    euclidean = kernel
    kernel = dataclasses.replace(kernel, metric=metric)
    root = root_of(kernel.metric)
    matrix = kernel.metric.inverse_mass_matrix({"a": jnp.zeros(2), "b": jnp.zeros(())})
    if matrix.ndim == 1:
        matrix = jnp.diag(matrix)
    assert matrix == pytest.approx(root @ root.T, rel=1e-5, abs=1e-6)

    # The density of u = L⁻¹x, and that of x.
    law = two_modes(3, sds=(0.8, 0.7))
    inverse = jnp.asarray(np.linalg.inv(root))

    def of_x(position):
        return law.log_density(inverse @ jnp.append(position["a"], position["b"]))

    u = law.draw(jax.random.key(0), 500)
    x = u @ root.T
    states, info = ten_transitions(euclidean, law.log_density, u)
    others, other_info = ten_transitions(kernel, of_x, {"a": x[:, :2], "b": x[:, 2]})
    moved = np.concatenate([others.position["a"], others.position["b"][:, None]], 1)
    close = np.isclose(moved, states.position @ root.T, rtol=1e-3, atol=1e-3).all(1)
    assert close.mean() > 0.99  # rounding turns an accept test now and then
    np.testing.assert_allclose(other_info.acceptance[0], info.acceptance[0], atol=2e-3)
    np.testing.assert_allclose(
        other_info.log_reversal[0][close], info.log_reversal[0][close], atol=5e-3
    )
    assert kernel.evaluations_per_step == euclidean.evaluations_per_step


def root_of(metric):
    """Return L of a metric over the sites a, (2,), and b, (), as a matrix."""
    columns = []
    for unit in np.eye(3, dtype=np.float32):
        image = metric.forth({"a": jnp.asarray(unit[:2]), "b": jnp.asarray(unit[2])})
        columns.append(np.append(image["a"], image["b"]))
    return np.stack(columns, axis=1)


def ten_transitions(kernel, log_density, positions):
    target = evaluate(log_density)
    states = start(kernel, target, jax.random.key(1), positions)
    return transitions(kernel, target, jax.random.key(2), states, steps_of(kernel), 10)


def test_a_kernel_shows_its_metric_and_only_that():
    shown = repr(MALA(0.5, metric={"a": jnp.array([0.01, 100.0])}))
    assert shown == "MALA(step_size=0.5, metric={'a': array(2,)})"
    assert repr(MALA(0.5)) == "MALA(step_size=0.5)"


# ── measured ──────────────────────────────────────────────────────────────────────────

AXES = np.linalg.qr(np.random.default_rng(0).normal(size=(10, 10)))[0]
COVARIANCE = AXES @ np.diag(np.logspace(-4, 0, 10)) @ AXES.T
LIKE = {"a": jnp.zeros(4), "b": jnp.zeros((2, 3))}
PRECISION = jnp.asarray(np.linalg.inv(COVARIANCE))


@jax.jit
def measured_again(metric, noise, slope):
    """Return the metric after moves along ``noise`` with the scores x·``slope``."""
    scale = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.1), LIKE)
    _, unflatten = jax.flatten_util.ravel_pytree(LIKE)

    def move(row):
        return jax.flatten_util.ravel_pytree(metric.forth(unflatten(row)))[0]

    moved = jax.vmap(move)(noise)
    return measured(metric, scale, moved, moved @ slope)


def relative_widths(kind, noise, slope, covariance, times=1):
    """Return the eigenvalues of s²·C·Σ⁻¹, all 1 where C is the covariance, after so
    many moves of all chains."""
    metric = Estimated(kind).unmeasured(LIKE, 200)
    for _ in range(times):
        metric = measured_again(metric, noise, slope)
    matrix = 0.1**2 * np.asarray(metric.inverse_mass_matrix(LIKE), float)
    if matrix.ndim == 1:
        matrix = np.diag(matrix)
    whiten = np.linalg.inv(np.linalg.cholesky(covariance))
    return np.linalg.eigvalsh(whiten @ matrix @ whiten.T)


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_moves_tell_the_covariance_of_a_gaussian_wherever_they_start(kind):
    """Moves of any length, some of them not made and one not finite."""
    moved = 0.01 * jax.random.normal(jax.random.key(0), (200, 10))
    moved = jnp.where(jnp.arange(200)[:, None] % 3 == 0, 0.0, moved).at[1].set(jnp.nan)
    widths = relative_widths(kind, moved, -PRECISION, COVARIANCE, times=5)
    if kind == "diagonal":  # does not see correlations
        assert widths[-1] / widths[0] > 300
    else:
        np.testing.assert_allclose(widths, 1.0, atol=0.35)


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_few_moves_and_none_give_a_metric_all_the_same(kind):
    moved = 0.01 * jax.random.normal(jax.random.key(0), (200, 10))
    of_three = moved[jnp.arange(200) % 3] * (jnp.arange(200) < 3)[:, None]
    one_still = moved.at[:, 0].set(0.0)
    for steps in (of_three, one_still, 0 * moved):
        for slope in (-PRECISION, 0 * PRECISION, PRECISION):
            widths = relative_widths(kind, steps, slope, COVARIANCE)
            assert np.all(np.isfinite(widths))
            assert np.all(widths > 0)
    widths = relative_widths(kind, 0 * moved, jnp.eye(10), 0.01 * np.eye(10))
    np.testing.assert_allclose(widths, 1.0, rtol=1e-5)


def kind_of(word, size, num_chains):
    """Return the kind of metric that is measured of so many numbers and chains."""
    metric = Estimated(word).unmeasured({"x": jnp.zeros(size)}, num_chains)
    if metric is None:
        return "none"
    return "diagonal" if metric.dense is None else "full"


def test_the_automatic_kind_and_shares_of_weights_add_up_to_one():
    assert kind_of("auto", 10, 100) == "full"
    assert kind_of("auto", 10, 99) == "diagonal"
    assert kind_of("auto", 10, 49) == "none"
    assert kind_of("auto", 65, 10**4) == "diagonal"
    assert kind_of("auto", 10**6, 100) == "none"
    assert kind_of("full", 10, 2) == "full"
    found = normalised_weights(jnp.log(jnp.array([1.0, 3.0, 0.0])))
    np.testing.assert_allclose(found, [0.25, 0.75, 0.0], rtol=1e-6)
    assert normalised_weights(jnp.full(4, -jnp.inf)) == pytest.approx(0.25)


# ── in a run ──────────────────────────────────────────────────────────────────────────

SHORT = cp.Schedule.log_snr(12)


@cp.program
def three_widths(f):
    x = cp.sample("x", f)
    wide = cp.sample("wide", dist.Normal(0.0, 30.0))
    cp.observe("y", dist.Normal(x[0] + wide, 0.5), 1.0)


@pytest.mark.parametrize(
    "kernel", [MALA(metric="full"), HMC(metric={"wide": 0.25})], ids=repr
)
def test_one_kernel_moves_latents_and_noised_sites_of_other_widths(kernel):
    """x ~ N(0, (0.05², 1)), wide ~ N(0, 30²), and their sum is measured to 0.5."""
    density = cp.compile(three_widths, normal([0.0, 0.0], [0.05, 1.0], SHORT))
    result = run(density, chains=1000, sampler=cp.AnnealedMCMC(kernel, 3), draws=20)
    last = {
        "x0": result["x"][:, -1, 0] / 0.05,
        "x1": result["x"][:, -1, 1],
        "w": result["wide"][:, -1],
    }
    law = np.array([[0.05**2, 0.0], [0.0, 900.0]])
    # Kalman's update by the sum, measured as 1.
    mean = law.sum(1) / (law.sum() + 0.25)
    covariance = law - np.outer(mean, law.sum(0))
    values = {name: np.asarray(v) for name, v in last.items()}
    values |= {f"{name}²": v**2 for name, v in values.items()}
    expected = {
        "x0": mean[0] / 0.05,
        "x1": 0.0,
        "w": mean[1],
        "x0²": (covariance[0, 0] + mean[0] ** 2) / 0.05**2,
        "x1²": 1.0,
        "w²": covariance[1, 1] + mean[1] ** 2,
    }
    assert_agrees(z_scores(values, expected))
    assert abs(result.acceptance[0] - kernel.optimal_acceptance) < 0.1


def test_smc_measures_its_metric():
    density = cp.compile(single, normal(jnp.zeros(2), jnp.array([1.0, 0.02]), SHORT))
    result = run(
        density, chains=512, sampler=cp.SMC(steps_per_level=2, check_levels=False)
    )
    assert "metric='auto'), 2 steps a level" in result.about.sampler
    np.testing.assert_allclose(result["x"].std(0), [1.0, 0.02], rtol=0.1)
    c = np.asarray(result.step_size / SHORT.sigma**2)
    assert np.ptp(np.log(c[2:-3])) < 0.7  # one c suits all levels


@pytest.mark.slow
def test_smc_measures_no_metric_where_chains_are_few():
    density = cp.compile(single, normal(jnp.zeros(2), jnp.array([1.0, 0.02]), SHORT))

    def samples(metric):
        sampler = cp.SMC(cp.MALA(metric=metric), check_levels=False)
        return run(density, chains=16, sampler=sampler)["x"]

    np.testing.assert_array_equal(samples("auto"), samples("none"))
