"""Fitted reverse steps and controls: exact for products of Gaussians, however stiff, on levels of any distance."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.kernels import KernelState
from composeprob.samplers import fit as fits
from composeprob.samplers.base import begin
from composeprob.samplers.fall import fall
from composeprob.samplers.fit import Fit
from composeprob.samplers.fitted import Fitted, Flow
from composeprob.samplers.visits import Visits

SCHEDULE = cp.Schedule.log_snr(9, min=-8.0, max=8.0)
CHAINS, FACTORS = 4000, 40.0
fit = jax.jit(fits.fit, static_argnames="control")
ROTATION = np.array([[0.8, -0.6], [0.6, 0.8]])
COVARIANCE = ROTATION @ np.diag([0.01, 4.0]) @ ROTATION.T


@pytest.fixture(scope="module", autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 90.0])
@pytest.mark.parametrize("width", [1e-6, 1.0])
def test_a_flow_takes_a_gaussian_product_from_level_to_level(power, width):
    """K²·V₁ + Q = V₀ for V = (c + s)/P, under the slope −(P + 1)/2(c + s) of score and control."""
    s1, s0 = jnp.asarray(3.0), jnp.asarray(0.02)
    slopes = [-0.5 * (power + 1) / (width + s) * jnp.ones(1) for s in (s1, s0)]
    flow = Flow.between(*slopes, s1, s0, power * jnp.ones(1))
    np.testing.assert_allclose(flow.decay**2 * (width + s1) / power + flow.noise**2, (width + s0) / power, rtol=1e-9)
    guessed = Flow.between(slopes[0], None, s1, s0, power * jnp.ones(1))  # of equal Gaussians the end follows
    np.testing.assert_allclose(guessed.decay, flow.decay, rtol=1e-6)
    assert flow.decay < flow.mean < 1


def test_one_point_has_ddpms_step():
    """n = s: K = s₀/s₁, Q = s₀·(s₁ − s₀)/s₁."""
    s1, s0 = jnp.asarray(3.0), jnp.asarray(0.5)
    flow = Flow.between(-1 / s1 * jnp.ones(2), -1 / s0 * jnp.ones(2), s1, s0, jnp.ones(2))
    np.testing.assert_allclose(flow.decay, s0 / s1, rtol=1e-12)
    np.testing.assert_allclose(flow.noise**2, s0 * (s1 - s0) / s1, rtol=1e-12)


def cloud(noise=0.0):
    """Rows of a Gaussian whose score is −P·(y − m), at points of ANOTHER law, with a quadratic potential."""
    rng = np.random.default_rng(0)
    precision = np.linalg.inv(COVARIANCE)
    y = rng.standard_normal((400, 2)) * [3.0, 0.5] + [1.0, 2.0]
    score = -(y - [0.3, -0.2]) @ precision
    potential = np.sum((y @ np.array([[2.0, 0.3], [0.3, -1.0]])) * y, axis=1) + y @ [1.0, -1.0]
    potential = (1 - bool(noise)) * potential + noise * rng.standard_normal(400)
    return jnp.asarray(np.column_stack([y, score, potential])), jnp.asarray(rng.standard_normal(400))


def controlled(rows, found: Fit):
    """The potential with ∇·u + ⟨u, S⟩ of the control that each chain takes."""
    half = (jnp.arange(len(rows)) >= len(rows) // 2).astype(jnp.int32)
    u, divergence = jax.vmap(found.control)(rows[:, :2], half)
    return rows[:, -1] + divergence + jnp.sum(u * rows[:, 2:4], axis=1)


def test_an_affine_score_is_found_wherever_the_chains_are():
    rows, log_weights = cloud()
    found = fit(rows, log_weights, 7.0 * jnp.ones(2), control=True)
    np.testing.assert_allclose(found.slope, -np.linalg.inv(COVARIANCE), rtol=1e-6)
    np.testing.assert_allclose(found.gain, jnp.swapaxes(found.gain, 1, 2), rtol=1e-9)
    assert np.std(controlled(rows, found)) < 1e-4 * np.std(rows[:, -1])


def test_chains_take_no_control_that_was_fitted_to_their_own_potentials():
    """Of a potential that is noise nothing may be taken: it belongs to the weights."""
    rows, log_weights = cloud(noise=1.0)
    weights = jax.nn.softmax(log_weights)
    spread = lambda values: float(weights @ (values - weights @ values) ** 2)
    left = controlled(rows, fit(rows, log_weights, jnp.ones(2), control=True))
    assert spread(left) > (1 - 1e-6) * spread(rows[:, -1])


def test_narrow_modes_far_apart_are_points_to_a_step():
    """Their score has a flat regression on y, which explains nothing: −P/s stands for it."""
    rng = np.random.default_rng(1)
    mode, base = rng.choice([-5.0, 5.0], 4000), 400.0 * jnp.ones(1)
    y = mode + 0.05 * rng.standard_normal(4000)
    rows = jnp.asarray(np.column_stack([y, -(y - mode) / 0.05**2, 0 * y]))
    assert float(fit(rows, jnp.zeros(4000), base, control=False).slope[0, 0]) < -390
    broken = fit(rows.at[:, 1].set(jnp.nan), jnp.zeros(4000), base, control=True)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(broken))


@cp.program
def stiff(f, g):
    cp.sample("x", f**FACTORS * g ** (1 - FACTORS))


def law(level):
    """(mean, covariance) of the product at a level."""
    noise = SCHEDULE.at(level)
    alpha, variance = float(noise.alpha), float(noise.sigma) ** 2
    own = np.linalg.inv(alpha**2 * COVARIANCE + variance * np.eye(2))
    precision = FACTORS * own + (1 - FACTORS) / (25 * alpha**2 + variance) * np.eye(2)
    return np.linalg.solve(precision, FACTORS * own @ (alpha * np.array([1.0, -2.0]))), np.linalg.inv(precision)


@pytest.fixture(scope="module")
def density():
    f = cp.Analytic(dist.MultivariateNormal(jnp.array([1.0, -2.0]), jnp.asarray(COVARIANCE)), SCHEDULE)
    g = cp.Analytic(dist.Normal(jnp.zeros(2), 5.0).to_event(1), SCHEDULE)
    return cp.compile(stiff, f, g)


def step(density):
    """(draws, gains) of the step to a level, from draws at the level above: compiled once for all levels."""
    sampler = eqx.tree_at(lambda s: s.moves, cp.SMC().prepare(density), None)
    run = begin(jax.random.key(3), CHAINS, Visits.every(SCHEDULE.num_levels - 1, SCHEDULE.num_levels))

    @jax.jit
    def stepped(x, level):
        states = jax.vmap(lambda x: KernelState({"x": x}, density.evaluator({"x": x}, level + 1)))(x)
        there = dataclasses.replace(run, chains=states)
        states, gains, _ = fall(sampler, there, run.keys, density, level, level + 1)
        return states.position["x"], gains

    return stepped


@pytest.fixture(scope="module")
def stepped(density):
    return step(density)


def misfit(stepped, level):
    """From exact draws above: how far draws are from the law, in standard errors; the spread of what weights gained."""
    drawn = np.random.default_rng(level).multivariate_normal(*law(level + 1), CHAINS)
    x, gains = map(np.asarray, stepped(jnp.asarray(drawn), jnp.asarray(level)))
    mean, covariance = law(level)
    white = np.linalg.solve(np.linalg.cholesky(covariance), (x - mean).T)
    second = np.array([white[0] ** 2 - 1, white[1] ** 2 - 1, white[0] * white[1]]) / np.sqrt([[2], [2], [1]])
    return np.abs(np.concatenate([white, second]).mean(axis=1)).max() * np.sqrt(CHAINS), gains.std()


@pytest.mark.parametrize("level", [5, 3, 0])
def test_one_level_is_exact_for_gaussians(stepped, level):
    """Δλ = 2 and 40 factors, n·Δλ = 80, from exact draws: exact draws, all of one weight."""
    far, spread = misfit(stepped, level)
    assert far < 4.5
    assert spread < 2e-3


def test_the_rate_gains_the_divergence_of_what_the_drift_gains():
    """∇·u + ⟨u, S⟩, with u the difference of the drifts and its divergence by differentiation."""
    f = cp.Analytic(dist.MultivariateNormal(jnp.array([1.0, -2.0]), jnp.asarray(COVARIANCE)), SCHEDULE)
    density = cp.compile(stiff, f, cp.Analytic(dist.Normal(jnp.zeros(2), 5.0).to_event(1), SCHEDULE))
    gain = jnp.array([[[0.7, 0.2], [0.2, -0.1]], [[0.3, -0.4], [-0.4, 0.9]]])
    seen = Fit(jnp.array([0.1, 0.4]), -jnp.eye(2), gain, jnp.array([[0.5, -1.0], [0.2, 0.3]]))

    @jax.jit
    def one(x):
        plain = density.evaluator({"x": x}, 3)
        there = Fitted(True).steered(plain, {"x": x}, jnp.asarray(1), seen, density, jnp.asarray(3))
        return (
            there.parts.drift["x"] - plain.parts.drift["x"],
            plain.parts.drift["x"],
            there.parts.rate - plain.parts.rate,
        )

    x = jnp.array([0.4, -0.8])
    u, score, gained = one(x)
    np.testing.assert_allclose(gained, jnp.trace(jax.jacfwd(lambda x: one(x)[0])(x)) + u @ score, rtol=1e-9)


def wrong_sign(old):
    def steered(self, evaluation, position, half, seen, density, level):
        there = dataclasses.replace(seen, push=-seen.push, gain=-seen.gain)
        return old(self, evaluation, position, half, there, density, level)

    return steered


def stale(old):
    def settle(self, departure, ended, position, began, seen, density, *levels):
        return old(self, departure, ended, position, began, (seen[0], seen[0]), density, *levels)

    return settle


@pytest.mark.parametrize(("method", "mutant"), [("steered", wrong_sign), ("settle", stale)])
def test_a_wrong_control_or_slope_is_seen(density, monkeypatch, method, mutant):
    """Negative controls: u of the other sign, and the slope of the level above in the place of this one's."""
    monkeypatch.setattr(Fitted, method, mutant(getattr(Fitted, method)))
    far, spread = misfit(step(density), 3)
    assert far > 6 or spread > 0.05


def test_an_integrator_of_another_name_is_refused():
    with pytest.raises(cp.errors.InvalidValueError, match="Unknown integrator 'heun'"):
        cp.SMC(integrator="heun")
    with pytest.raises(cp.errors.InvalidValueError, match="makes no reverse step"):
        cp.SMC(weights="density", integrator="fitted")
    assert "integrator='explicit'" in cp.SMC(integrator="explicit").describe()
    assert "integrator" not in cp.SMC(second_order=False).describe()


def test_a_fit_is_made_over_no_more_chains_than_it_needs():
    """Beyond, it would grow with the chains though it tells no more: every third of 3,000, in the plane; all in 64."""
    y = np.random.default_rng(0).normal(size=(3000, 2))
    rows = np.column_stack([y, -y, 0.3 * (y * y).sum(1)])
    unseen = np.where((np.arange(3000) % 3 == 0)[:, None], rows, np.nan)
    one, other = (fit(jnp.asarray(table), jnp.zeros(3000), jnp.ones(2), control=True) for table in (rows, unseen))
    for of, by in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(of, by)
    assert fits._some(jnp.arange(3000), 64).tolist() == list(range(3000))


@pytest.mark.parametrize("count", [400, 401, 4002, 4003, 6005])
def test_each_half_of_the_chains_takes_the_control_of_the_other(count):
    """What a chain's own potential says must not come back in its weight; a row more or less changes nothing."""
    rng = np.random.default_rng(0)
    y = rng.normal(size=(count, 2))
    score = -1.3 * y + 0.1 * rng.normal(size=(count, 2))
    potential = 0.4 * (y * score).sum(1) + 0.1 * rng.normal(size=count)
    first = np.arange(count) < count // 2

    def fitted(potential):
        rows = jnp.asarray(np.column_stack([y, score, potential]))
        return fit(rows, jnp.zeros(count), jnp.ones(2), control=True)

    one, other = fitted(potential), fitted(np.where(first, 1.2, 1.0) * potential)
    assert float(jnp.abs(one.gain[0]).max()) > 0.3
    np.testing.assert_allclose(one.gain[0], other.gain[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(1.2 * one.gain[1], other.gain[1], rtol=1e-4, atol=1e-5)
