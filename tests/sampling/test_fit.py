"""Fitted slopes and controls: exact for products of Gaussians, however stiff, on levels
of any distance."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob import tuning
from composeprob.compiler.pipeline import lowered
from composeprob.samplers import descent
from composeprob.samplers import step as fits
from composeprob.samplers.step import Fit, Step
from sampling_cases import Never, visited

pytestmark = pytest.mark.usefixtures("double_precision")

SCHEDULE = cp.Schedule.log_snr(9, min=-8.0, max=8.0)
CHAINS, FACTORS = 4000, 40.0
fit = jax.jit(fits.fit, static_argnames="control")
ROTATION = np.array([[0.8, -0.6], [0.6, 0.8]])
COVARIANCE = ROTATION @ np.diag([0.01, 4.0]) @ ROTATION.T


def cloud():
    """Rows of a Gaussian whose score is −P·(y − m), at points of ANOTHER law, with a
    quadratic potential."""
    rng = np.random.default_rng(0)
    precision = np.linalg.inv(COVARIANCE)
    y = rng.standard_normal((400, 2)) * [3.0, 0.5] + [1.0, 2.0]
    score = -(y - [0.3, -0.2]) @ precision
    quadratic = np.array([[2.0, 0.3], [0.3, -1.0]])
    potential = np.sum((y @ quadratic) * y, axis=1) + y @ [1.0, -1.0]
    rows = jnp.asarray(np.column_stack([y, score, potential]))
    return rows, jnp.asarray(rng.standard_normal(400))


@jax.jit
def under_control(rows, fitted: Fit):
    """The potential with ∇·u + ⟨u, S⟩ of the control that each chain takes."""
    half = (jnp.arange(len(rows)) >= len(rows) // 2).astype(jnp.int32)

    def potential(row, half):
        _, _, rate = fitted.controlled(row[:2], row[2:4], row[-1], half)
        return rate

    return jax.vmap(potential)(rows, half)


def test_an_affine_score_is_found_wherever_the_chains_are():
    rows, log_weights = cloud()
    fitted = fit(rows, log_weights, 7.0 * jnp.ones(2), control=True)
    np.testing.assert_allclose(fitted.slope, -np.linalg.inv(COVARIANCE), rtol=1e-6)
    np.testing.assert_allclose(fitted.gain, jnp.swapaxes(fitted.gain, 1, 2), rtol=1e-9)
    assert np.std(under_control(rows, fitted)) < 1e-4 * np.std(rows[:, -1])


def test_three_chains_a_dimension_find_a_whole_slope():
    """Sixteen numbers whose score is linear in all of them; fewer chains find the
    diagonal of the slope at most."""
    rng = np.random.default_rng(1)
    y = rng.standard_normal((64, 16))
    root = rng.standard_normal((16, 16)) / 4
    slope = -root @ root.T - np.eye(16)
    rows = jnp.asarray(np.column_stack([y, y @ slope, np.zeros(64)]))
    of_48 = fit(rows[:48], jnp.zeros(48), jnp.ones(16), control=False)
    np.testing.assert_allclose(of_48.slope, slope, atol=1e-6)
    of_47 = fit(rows[:47], jnp.zeros(47), jnp.ones(16), control=False)
    assert of_47.slope.ndim == 1


def test_a_diagonal_control_has_axes_that_its_own_chains_had_no_part_in():
    """Twelve dimensions, 128 chains: too few for a matrix. The control that the first
    half takes stays when that half lies elsewhere."""
    rng = np.random.default_rng(2)
    widths = np.linspace(0.7, 1.5, 12)

    def cloud():
        y = rng.standard_normal((64, 12)) * widths
        score = -y / widths**2 + 0.1 * rng.standard_normal(y.shape)
        return np.column_stack([y, score, np.sum((y / widths) ** 2, axis=1)])

    first = cloud()
    elsewhere = cloud()
    second = cloud()

    def fitted(half):
        table = jnp.asarray(np.concatenate([half, second]))
        return fit(table, jnp.zeros(128), jnp.ones(12), control=True)

    before = fitted(first)
    after = fitted(elsewhere)
    assert np.abs(before.gain[0]).max() > 0.1
    np.testing.assert_allclose(before.gain[0], after.gain[0], atol=1e-6)
    assert np.abs(before.gain[1] - after.gain[1]).max() > 0.01


def test_narrow_modes_far_apart_are_points_to_a_step():
    """Their score has a flat regression on y, which explains nothing: −P/s stands for
    it."""
    rng = np.random.default_rng(1)
    mode = rng.choice([-5.0, 5.0], 4000)
    base = 400.0 * jnp.ones(1)
    y = mode + 0.05 * rng.standard_normal(4000)
    rows = jnp.asarray(np.column_stack([y, -(y - mode) / 0.05**2, 0 * y]))
    fitted = fit(rows, jnp.zeros(4000), base, control=False)
    assert float(fitted.slope[0, 0]) < -390
    broken = fit(rows.at[:, 1].set(jnp.nan), jnp.zeros(4000), base, control=True)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(broken))


@cp.program
def stiff(f, g, power):
    cp.sample("x", f**FACTORS * g**power)


def law(level, power):
    """(mean, covariance) of the product at a level, in y."""
    s = float(SCHEDULE.at(level).variance)
    noised = COVARIANCE + s * np.eye(2)
    precision = FACTORS * np.linalg.inv(noised) + power / (25 + s) * np.eye(2)
    pull = FACTORS * np.linalg.solve(noised, np.array([1.0, -2.0]))
    return np.linalg.solve(precision, pull), np.linalg.inv(precision)


F = cp.Analytic(
    dist.MultivariateNormal(jnp.array([1.0, -2.0]), jnp.asarray(COVARIANCE)), SCHEDULE
)
G = cp.Analytic(dist.Normal(jnp.zeros(2), 5.0).to_event(1), SCHEDULE)


def with_constant_exponents(power):
    """The density whose exponents do not grow, as where only scores are known: the step
    must be stable there."""
    return lowered(stiff, (F, G, power), {}, growing=False)


@pytest.fixture(scope="module")
def density():
    return with_constant_exponents(1 - FACTORS)


def stepping(density):
    """A function to points and increments after the step to a level, from points at the
    level above: compiled once for all levels."""

    @jax.jit
    def stepped(points, level):
        run = visited(cp.SMC(resample=Never()), density, points, level, seed=3)
        return run.chains.position, run.log_weights

    return stepped


@pytest.fixture(
    scope="module", params=[1 - FACTORS, 2.0], ids=["all powers 1", "all powers 42"]
)
def stepped(request):
    """Steps with and without a control that needs no fit."""
    return stepping(with_constant_exponents(request.param)), request.param


def misfit(stepped, level, power):
    """Distance of draws from the law, in standard errors, and spread of the log-weight
    increments, after a step from exact draws above."""
    rng = np.random.default_rng(level)
    drawn = rng.multivariate_normal(*law(level + 1, power), CHAINS)
    y, gains = map(np.asarray, stepped(jnp.asarray(drawn), jnp.asarray(level)))
    return far_from(y, *law(level, power)), gains.std()


def far_from(y, mean, covariance):
    """Distance of first and second moments of draws from those of a Gaussian, in
    standard errors."""
    white = np.linalg.solve(np.linalg.cholesky(covariance), (np.asarray(y) - mean).T)
    second = np.array([white[0] ** 2 - 1, white[1] ** 2 - 1, white[0] * white[1]])
    second = second / np.sqrt([[2], [2], [1]])  # of variance 1, as the first moments
    moments = np.concatenate([white, second]).mean(axis=1)
    return np.abs(moments).max() * np.sqrt(CHAINS)


@pytest.mark.parametrize("level", [5, 3, 0])
def test_one_level_is_exact_for_gaussians(stepped, level):
    """Δλ = 2 and 40 factors, n·Δλ = 80, from exact draws: exact draws, all of one
    weight."""
    step, power = stepped
    far, spread = misfit(step, level, power)
    assert far < 4.5
    assert spread < 1e-9


# ── bent towards data ─────────────────────────────────────────────────────────────────

FINE = cp.Schedule.log_snr(40, min=-8.0, max=8.0)
MEAN = np.array([0.3, -0.2])
ERRORS = np.array([0.2, 0.3])
MEASURED = np.array([0.4, -1.1])
LOADINGS = {
    "axes of the prior": ROTATION.T,
    "other axes": np.array([[0.5, -1.5], [1.0, 0.3]]),
}


@cp.program
def measured(prior, loading):
    x = cp.sample("x", prior)
    law = dist.Normal(loading @ x, ERRORS).to_event(1)
    cp.observe("y", law, MEASURED, anneal="moments")


def score_alone(x, log_snr):
    alpha = jnp.sqrt(jax.nn.sigmoid(log_snr))
    covariance = COVARIANCE + jnp.exp(-log_snr) * jnp.eye(2)
    return -jnp.linalg.solve(covariance, x / alpha - MEAN) / alpha


def posterior(level, loading):
    """Mean and covariance of y at a level given measurements of level 0."""
    last = float(FINE.at(0).variance) * np.eye(2)
    noise = float(FINE.at(level).variance) * np.eye(2)
    joint = (COVARIANCE + last) @ loading.T
    gain = joint @ np.linalg.inv(loading @ joint + np.diag(ERRORS**2))
    mean = MEAN + gain @ (MEASURED - loading @ MEAN)
    return mean, COVARIANCE + noise - gain @ joint.T


@pytest.mark.parametrize(
    ("axes", "bent", "least", "most"),
    [
        ("axes of the prior", True, 0, 1e-9),
        ("other axes", True, 0, 0.005),
        ("other axes", False, 0.2, 1),
    ],
)
def test_steps_towards_gaussian_data_of_a_gaussian_leave_weights_equal(
    monkeypatch, axes, bent, least, most
):
    """A prior by its score alone, and exact draws of the posterior: exact draws, of one
    weight where the data's axes are the prior's. Negative control: steps as wide as
    without data."""
    exact = tuning.MOMENTS._replace(error=0.0, least=0.0)
    monkeypatch.setattr(tuning, "MOMENTS", exact)
    if not bent:
        monkeypatch.setattr(descent.Step, "bent", lambda step, *_: step)
    prior = cp.Diffusion(
        score_alone, FINE, event_shape=(2,), parameterization="score", time="log_snr"
    )
    above = posterior(13, LOADINGS[axes])
    here = posterior(12, LOADINGS[axes])
    drawn = jnp.asarray(np.random.default_rng(0).multivariate_normal(*above, CHAINS))
    sampler = cp.SMC(resample=Never(), step=cp.ReverseStep(twist=20.0))
    density = cp.compile(measured, prior, LOADINGS[axes])
    run = visited(sampler, density, drawn, jnp.asarray(12), seed=3)
    gains = np.asarray(run.log_weights)
    assert least <= gains.std() <= most
    log_mean = np.log(np.mean(np.exp(gains)))
    assert abs(log_mean) < max(most, 5 * gains.std() / np.sqrt(CHAINS))
    assert not bent or far_from(run.chains.position, *here) < 4.5


def test_the_rate_gains_the_divergence_of_what_the_drift_gains(density):
    """∇·u + ⟨u, S⟩, with u the difference of the drifts and its divergence by
    differentiation."""
    gain = jnp.array([[[0.7, 0.2], [0.2, -0.1]], [[0.3, -0.4], [-0.4, 0.9]]])
    push = jnp.array([[0.5, -1.0], [0.2, 0.3]])
    fixed = jnp.array([0.3, 0.7])
    fitted = Fit(jnp.array([0.1, 0.4]), -jnp.eye(2), gain, push, fixed=fixed)
    layout = descent.Layout.of_density(density)

    def control(y):
        terms = layout.evaluate(density, y, 3).terms
        u, drift, rate = fitted.controlled(y, terms.drift, terms.rate, jnp.asarray(1))
        return u, drift - terms.drift, terms.drift, rate - terms.rate

    @jax.jit
    def with_slopes(y):
        slopes = jax.jacfwd(lambda y: control(y)[0])(y)
        return control(y), slopes

    (u, of_drift, score, of_rate), slopes = with_slopes(jnp.array([0.4, -0.8]))
    np.testing.assert_allclose(of_drift, u, rtol=1e-9)
    np.testing.assert_allclose(of_rate, jnp.trace(slopes) + u @ score, rtol=1e-9)


def wrong_sign(old):
    def controlled(fit, *chain):
        return old(dataclasses.replace(fit, push=-fit.push, gain=-fit.gain), *chain)

    return controlled


def stale(old):
    def law(descent, context, above, here, both):
        return old(descent, context, above, above, both)

    return law


@pytest.mark.parametrize(
    ("owner", "name", "mutant"),
    [(Fit, "controlled", wrong_sign), (descent.Descent, "law", stale)],
)
def test_a_wrong_control_or_slope_is_seen(density, monkeypatch, owner, name, mutant):
    """Negative controls: u of the other sign, and the slope of the level above in the
    place of this one's."""
    monkeypatch.setattr(owner, name, mutant(getattr(owner, name)))
    far, spread = misfit(stepping(density), 3, 1 - FACTORS)
    assert far > 6 or spread > 0.05


def test_a_fit_is_made_over_no_more_chains_than_it_needs():
    """Every third of 3,000 in the plane, all in 64 dimensions: over more the cost would
    grow, and the fit would be no better."""
    y = np.random.default_rng(0).normal(size=(3000, 2))
    rows = np.column_stack([y, -y, 0.3 * (y * y).sum(1)])
    every_third = np.where((np.arange(3000) % 3 == 0)[:, None], rows, np.nan)

    def leaves(table):
        fitted = fit(jnp.asarray(table), jnp.zeros(3000), jnp.ones(2), control=True)
        return jax.tree.leaves(fitted)

    for of_all, of_fewer in zip(leaves(rows), leaves(every_third), strict=True):
        np.testing.assert_array_equal(of_all, of_fewer)
    assert fits.thinned(jnp.arange(3000), 64).tolist() == list(range(3000))


@pytest.mark.parametrize("count", [400, 4003, 6005])
def test_each_half_of_the_chains_takes_the_control_of_the_other(count):
    """A chain's own potential must not come back in its weight; a row more or less
    changes nothing."""
    rng = np.random.default_rng(0)
    y = rng.normal(size=(count, 2))
    score = -1.3 * y + 0.1 * rng.normal(size=(count, 2))
    potential = 0.4 * (y * score).sum(1) + 0.1 * rng.normal(size=count)
    first = np.arange(count) < count // 2

    def fitted(potential):
        rows = jnp.asarray(np.column_stack([y, score, potential]))
        found = fit(rows, jnp.zeros(count), jnp.ones(2), control=True)
        point = jnp.array([2.0, -1.0])
        controls = []
        for half in (0, 1):
            u, _, rate = found.controlled(point, jnp.zeros(2), 0.0, half)
            controls.append(np.hstack([u, rate]))
        return controls

    before = fitted(potential)
    after = fitted(np.where(first, 1.2, 1.0) * potential)
    assert np.abs(before[0]).max() > 0.3
    np.testing.assert_allclose(before[0], after[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(1.2 * before[1], after[1], rtol=1e-4, atol=1e-5)


def test_a_bent_step_has_the_precision_of_noise_and_data():
    """Q⁻¹ − H along axes that are not those of the step: J·Jᵀ·(Q⁻¹ − H) = I for the
    Jacobian J of y' in z."""
    slope = -jnp.linalg.inv(COVARIANCE + 0.5 * jnp.eye(2))
    zero = jnp.zeros(2)
    s1, s0 = jnp.asarray(0.5), jnp.asarray(0.4)
    fitted = Fit(
        centre=zero,
        slope=slope,
        gain=jnp.zeros((2, 2, 2)),
        push=zero,
        bend=jnp.array([-1.5, -0.2]),
        axes=jnp.eye(2),
        fixed=zero,
    )
    bent = Step.fitted(slope, slope, s1, s0, jnp.ones(2), False).bent(fitted, s1, s0)
    root = jax.jacfwd(lambda z: bent.predict(zero, zero, zero, z, 0.5)[0])(zero)
    without_data = bent.basis @ jnp.diag(bent.noise**2) @ bent.basis.T
    excess = jnp.linalg.inv(root @ root.T) - jnp.linalg.inv(without_data)
    np.testing.assert_allclose(excess, jnp.diag(jnp.diag(excess)), atol=1e-9)
    assert np.all(np.diag(excess) > 0.1)
