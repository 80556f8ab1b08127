"""Metrics: the same chain in other coordinates, and what is estimated of a cloud of
chains."""

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
    return sum(
        jnp.sum(jax.scipy.stats.norm.logpdf(position[name], scale=sd))
        for name, sd in SDS.items()
    )


def statistics(position):
    units = {name: position[name] / sd for name, sd in SDS.items()}
    values = {name: jnp.mean(u) for name, u in units.items()} | {
        f"{n}²": jnp.mean(u**2) for n, u in units.items()
    }
    return values | {"both": jnp.mean(units["thin"] * units["wide"])}


EXPECTED = {"thin": 0.0, "wide": 0.0, "thin²": 1.0, "wide²": 1.0, "both": 0.0}
LAW = Law(
    "two widths",
    log_density,
    lambda key, n: {
        name: sd * jax.random.normal(k, (n, 3))
        for k, (name, sd) in zip(jax.random.split(key), SDS.items(), strict=True)
    },
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
    for h, check in (
        (0.5 * 0.01**2, lambda run: run.moved < 1e-4),
        (0.5, lambda run: run.acceptance < 1e-3),
    ):
        assert check(
            from_exact_draws(
                MALA(h), LAW, num_chains=500, num_transitions=20, num_draws=2
            )
        )


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
    """Number for number: acceptance, moves, and how likely they are reversed."""
    plain = kernel
    kernel = dataclasses.replace(kernel, metric=metric)
    names = {"a": jnp.zeros(2), "b": jnp.zeros(())}
    units = [
        {"a": jnp.asarray(e[:2]), "b": jnp.asarray(e[2])}
        for e in np.eye(3, dtype=np.float32)
    ]
    root = np.stack(
        [
            np.concatenate([e["a"], e["b"][None]])
            for e in map(kernel.metric.forth, units)
        ],
        axis=1,
    )
    found = kernel.metric.inverse_mass_matrix(names)
    assert (found if found.ndim == 2 else jnp.diag(found)) == pytest.approx(
        root @ root.T, rel=1e-5, abs=1e-6
    )
    law = two_modes(3, sds=(0.8, 0.7))

    def of_x(position):
        return law.log_density(
            jnp.asarray(np.linalg.inv(root)) @ jnp.append(position["a"], position["b"])
        )

    u = law.draw(jax.random.key(0), 500)
    x = u @ root.T
    ends = []
    for k, log_density, positions in (
        (plain, law.log_density, u),
        (kernel, of_x, {"a": x[:, :2], "b": x[:, 2]}),
    ):
        target = evaluate(log_density)
        states = start(k, target, jax.random.key(1), positions)
        ends.append(transitions(k, target, jax.random.key(2), states, steps_of(k), 10))
    (states, info), (others, other_info) = ends
    found = np.concatenate(
        [others.position["a"], others.position["b"][:, None]], axis=1
    )
    close = np.isclose(found, states.position @ root.T, rtol=1e-3, atol=1e-3).all(1)
    assert close.mean() > 0.99  # rounding turns an accept test now and then
    np.testing.assert_allclose(other_info.acceptance[0], info.acceptance[0], atol=2e-3)
    np.testing.assert_allclose(
        other_info.log_reversal[0][close], info.log_reversal[0][close], atol=5e-3
    )
    assert kernel.evaluations_per_step == plain.evaluations_per_step


def test_a_kernel_shows_its_metric_and_only_that():
    assert (
        repr(MALA(0.5, metric={"a": jnp.array([0.01, 100.0])}))
        == "MALA(step_size=0.5, metric={'a': array(2,)})"
    )
    assert repr(MALA(0.5)) == "MALA(step_size=0.5)"


# ── measured ──────────────────────────────────────────────────────────────────────────

AXES = np.linalg.qr(np.random.default_rng(0).normal(size=(10, 10)))[0]
COVARIANCE = AXES @ np.diag(np.logspace(-4, 0, 10)) @ AXES.T
LIKE = {"a": jnp.zeros(4), "b": jnp.zeros((2, 3))}
PRECISION = jnp.asarray(np.linalg.inv(COVARIANCE))


@jax.jit
def measured_again(metric, noise, slope):
    """The metric after moves along ``noise``, which had the scores x·``slope``."""
    scale = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.1), LIKE)
    unflatten = jax.flatten_util.ravel_pytree(LIKE)[1]
    moved = jax.vmap(
        lambda row: jax.flatten_util.ravel_pytree(metric.forth(unflatten(row)))[0]
    )(noise)
    return measured(metric, scale, moved, moved @ slope)


def widths_found(kind, noise, slope, covariance, times=1):
    """Eigenvalues of s²·C·Σ⁻¹, all 1 where C is the covariance, after so many moves of
    all chains."""
    metric = Estimated(kind).unmeasured(LIKE, 200)
    for _ in range(times):
        metric = measured_again(metric, noise, slope)
    matrix = 0.1**2 * np.asarray(metric.inverse_mass_matrix(LIKE), float)
    whiten = np.linalg.inv(np.linalg.cholesky(covariance))
    return np.linalg.eigvalsh(
        whiten @ (matrix if matrix.ndim == 2 else np.diag(matrix)) @ whiten.T
    )


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_moves_tell_the_covariance_of_a_gaussian_wherever_they_start(kind):
    """Moves of any length, some of them not made and one not finite."""
    moved = 0.01 * jax.random.normal(jax.random.key(0), (200, 10))
    moved = jnp.where(jnp.arange(200)[:, None] % 3 == 0, 0.0, moved).at[1].set(jnp.nan)
    found = widths_found(kind, moved, -PRECISION, COVARIANCE, times=5)
    if kind == "diagonal":  # does not see how coordinates hang together
        assert found[-1] / found[0] > 300
    else:
        np.testing.assert_allclose(found, 1.0, atol=0.35)


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_few_moves_and_none_give_a_metric_all_the_same(kind):
    moved = 0.01 * jax.random.normal(jax.random.key(0), (200, 10))
    of_three = moved[jnp.arange(200) % 3] * (jnp.arange(200) < 3)[:, None]
    one_still = moved.at[:, 0].set(0.0)
    for steps in (of_three, one_still, 0 * moved):
        for slope in (-PRECISION, 0 * PRECISION, PRECISION):
            values = widths_found(kind, steps, slope, COVARIANCE)
            assert np.all(np.isfinite(values))
            assert np.all(values > 0)
    known = widths_found(kind, 0 * moved, jnp.eye(10), 0.01 * np.eye(10))
    np.testing.assert_allclose(known, 1.0, rtol=1e-5)


def test_what_auto_is_and_shares_of_weights_add_up_to_one():
    def kind_of(word, size, num_chains):
        metric = Estimated(word).unmeasured({"x": jnp.zeros(size)}, num_chains)
        return (
            "none" if metric is None else "diagonal" if metric.dense is None else "full"
        )

    assert [kind_of("auto", *case) for case in ((10, 100), (10, 99), (10, 49), (65, 10**4), (10**6, 100))] == [
        "full", "diagonal", "none", "diagonal", "none",
    ]  # fmt: skip
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
    gain = law.sum(1) / (law.sum() + 0.25)
    mean, covariance = gain * 1.0, law - np.outer(gain, law.sum(0))
    values = last | {f"{name}²": v**2 for name, v in last.items()}
    expected = {"x0": mean[0] / 0.05, "x1": 0.0, "w": mean[1], "x0²": (covariance[0, 0] + mean[0] ** 2) / 0.05**2,
                "x1²": 1.0, "w²": covariance[1, 1] + mean[1] ** 2}  # fmt: skip
    assert_agrees(
        z_scores({name: np.asarray(v) for name, v in values.items()}, expected)
    )
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
    samplers = (
        cp.SMC(cp.MALA(metric=name), check_levels=False) for name in ("auto", "none")
    )
    np.testing.assert_array_equal(
        *(run(density, chains=16, sampler=sampler)["x"] for sampler in samplers)
    )
