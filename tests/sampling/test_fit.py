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
    potential = np.sum((y @ np.array([[2.0, 0.3], [0.3, -1.0]])) * y, axis=1) + y @ [
        1.0,
        -1.0,
    ]
    return jnp.asarray(np.column_stack([y, score, potential])), jnp.asarray(
        rng.standard_normal(400)
    )


@jax.jit
def under_control(rows, found: Fit):
    """The potential with ∇·u + ⟨u, S⟩ of the control that each chain takes."""
    half = (jnp.arange(len(rows)) >= len(rows) // 2).astype(jnp.int32)
    take = lambda row, half: found.controlled(row[:2], row[2:4], row[-1], half)[2]
    return jax.vmap(take)(rows, half)


def test_an_affine_score_is_found_wherever_the_chains_are():
    rows, log_weights = cloud()
    found = fit(rows, log_weights, 7.0 * jnp.ones(2), control=True)
    np.testing.assert_allclose(found.slope, -np.linalg.inv(COVARIANCE), rtol=1e-6)
    np.testing.assert_allclose(found.gain, jnp.swapaxes(found.gain, 1, 2), rtol=1e-9)
    assert np.std(under_control(rows, found)) < 1e-4 * np.std(rows[:, -1])


def test_three_chains_a_dimension_find_a_whole_slope():
    """Of sixteen numbers whose score is linear in all of them; fewer chains find its
    diagonal at most."""
    rng = np.random.default_rng(1)
    y, root = rng.standard_normal((64, 16)), rng.standard_normal((16, 16)) / 4
    slope = -root @ root.T - np.eye(16)
    rows = jnp.asarray(np.column_stack([y, y @ slope, np.zeros(64)]))
    found = fit(rows[:48], jnp.zeros(48), jnp.ones(16), control=False)
    np.testing.assert_allclose(found.slope, slope, atol=1e-6)
    assert fit(rows[:47], jnp.zeros(47), jnp.ones(16), control=False).slope.ndim == 1


def test_a_diagonal_control_has_axes_that_its_own_chains_had_no_part_in():
    """Twelve dimensions, 128 chains: too few for a matrix. What the first half takes
    stays when it lies elsewhere."""
    rng = np.random.default_rng(2)
    widths = np.linspace(0.7, 1.5, 12)

    def cloud():
        y = rng.standard_normal((64, 12)) * widths
        score = -y / widths**2 + 0.1 * rng.standard_normal(y.shape)
        return np.column_stack([y, score, np.sum((y / widths) ** 2, axis=1)])

    halves = cloud(), cloud(), cloud()
    tables = (jnp.asarray(np.concatenate([first, halves[2]])) for first in halves[:2])
    found, again = (
        fit(table, jnp.zeros(128), jnp.ones(12), control=True) for table in tables
    )
    assert np.abs(found.gain[0]).max() > 0.1
    np.testing.assert_allclose(found.gain[0], again.gain[0], atol=1e-6)
    assert np.abs(found.gain[1] - again.gain[1]).max() > 0.01


def test_narrow_modes_far_apart_are_points_to_a_step():
    """Their score has a flat regression on y, which explains nothing: −P/s stands for
    it."""
    rng = np.random.default_rng(1)
    mode, base = rng.choice([-5.0, 5.0], 4000), 400.0 * jnp.ones(1)
    y = mode + 0.05 * rng.standard_normal(4000)
    rows = jnp.asarray(np.column_stack([y, -(y - mode) / 0.05**2, 0 * y]))
    assert float(fit(rows, jnp.zeros(4000), base, control=False).slope[0, 0]) < -390
    broken = fit(rows.at[:, 1].set(jnp.nan), jnp.zeros(4000), base, control=True)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(broken))


@cp.program
def stiff(f, g, power):
    cp.sample("x", f**FACTORS * g**power)


def law(level, power):
    """(mean, covariance) of the product at a level, in y."""
    s = float(SCHEDULE.at(level).variance)
    precision = FACTORS * np.linalg.inv(COVARIANCE + s * np.eye(2)) + power / (
        25 + s
    ) * np.eye(2)
    pull = FACTORS * np.linalg.solve(COVARIANCE + s * np.eye(2), np.array([1.0, -2.0]))
    return np.linalg.solve(precision, pull), np.linalg.inv(precision)


F = cp.Analytic(
    dist.MultivariateNormal(jnp.array([1.0, -2.0]), jnp.asarray(COVARIANCE)), SCHEDULE
)
G = cp.Analytic(dist.Normal(jnp.zeros(2), 5.0).to_event(1), SCHEDULE)


def with_constant_exponents(power):
    """As where only scores are known: the step must stand them."""
    return lowered(stiff, (F, G, power), {}, growing=False)


@pytest.fixture(scope="module")
def density():
    return with_constant_exponents(1 - FACTORS)


def stepping(density):
    """(points, gains) after the step to a level, from points at the level above:
    compiled once for all levels."""

    @jax.jit
    def stepped(points, level):
        run = visited(cp.SMC(resample=Never()), density, points, level, seed=3)
        return run.chains.position, run.log_weights

    return stepped


@pytest.fixture(
    scope="module", params=[1 - FACTORS, 2.0], ids=["all powers 1", "all powers 42"]
)
def stepped(request):
    """With and without a control that needs no fit."""
    return stepping(with_constant_exponents(request.param)), request.param


def misfit(stepped, level, power):
    """From exact draws above: how far draws are from the law, in standard errors; the
    spread of what weights gained."""
    drawn = np.random.default_rng(level).multivariate_normal(
        *law(level + 1, power), CHAINS
    )
    y, gains = map(np.asarray, stepped(jnp.asarray(drawn), jnp.asarray(level)))
    return far_from(y, *law(level, power)), gains.std()


def far_from(y, mean, covariance):
    """How far first and second moments of draws are from those of a Gaussian, in
    standard errors."""
    white = np.linalg.solve(np.linalg.cholesky(covariance), (np.asarray(y) - mean).T)
    second = np.array(
        [white[0] ** 2 - 1, white[1] ** 2 - 1, white[0] * white[1]]
    ) / np.sqrt([[2], [2], [1]])
    return np.abs(np.concatenate([white, second]).mean(axis=1)).max() * np.sqrt(CHAINS)


@pytest.mark.parametrize("level", [5, 3, 0])
def test_one_level_is_exact_for_gaussians(stepped, level):
    """Δλ = 2 and 40 factors, n·Δλ = 80, from exact draws: exact draws, all of one
    weight."""
    far, spread = misfit(*stepped[:1], level, stepped[1])
    assert far < 4.5
    assert spread < 1e-9


# ── bent towards data ─────────────────────────────────────────────────────────────────

FINE = cp.Schedule.log_snr(40, min=-8.0, max=8.0)
MEAN, ERRORS, MEASURED = (
    np.array([0.3, -0.2]),
    np.array([0.2, 0.3]),
    np.array([0.4, -1.1]),
)
LOADINGS = {
    "axes of the prior": ROTATION.T,
    "other axes": np.array([[0.5, -1.5], [1.0, 0.3]]),
}


@cp.program
def measured(prior, loading):
    x = cp.sample("x", prior)
    cp.observe(
        "y", dist.Normal(loading @ x, ERRORS).to_event(1), MEASURED, anneal="moments"
    )


def score_alone(x, log_snr):
    alpha, covariance = (
        jnp.sqrt(jax.nn.sigmoid(log_snr)),
        COVARIANCE + jnp.exp(-log_snr) * jnp.eye(2),
    )
    return -jnp.linalg.solve(covariance, x / alpha - MEAN) / alpha


def posterior(level, loading):
    """Mean and covariance of y at a level given what is measured of level 0."""
    last, variance = (float(FINE.at(k).variance) * np.eye(2) for k in (0, level))
    joint = (COVARIANCE + last) @ loading.T
    gain = joint @ np.linalg.inv(loading @ joint + np.diag(ERRORS**2))
    return MEAN + gain @ (
        MEASURED - loading @ MEAN
    ), COVARIANCE + variance - gain @ joint.T


@pytest.mark.parametrize(
    ("axes", "bent", "least", "most"),
    [
        ("axes of the prior", True, 0, 1e-9),
        ("other axes", True, 0, 0.005),
        ("other axes", False, 0.2, 1),
    ],
)
def test_steps_towards_gaussian_data_of_a_gaussian_weigh_chains_alike(
    monkeypatch, axes, bent, least, most
):
    """Seen by its score alone, from exact draws of the posterior: exact draws, of one
    weight where the data's axes are the prior's. Negative control: steps as wide as
    without data."""
    monkeypatch.setattr(
        tuning, "MOMENTS", tuning.MOMENTS._replace(error=0.0, least=0.0)
    )
    if not bent:
        monkeypatch.setattr(descent.Step, "bent", lambda step, *_: step)
    prior = cp.Diffusion(
        score_alone, FINE, event_shape=(2,), parameterization="score", time="log_snr"
    )
    above, here = (posterior(level, LOADINGS[axes]) for level in (13, 12))
    drawn = jnp.asarray(np.random.default_rng(0).multivariate_normal(*above, CHAINS))
    sampler = cp.SMC(resample=Never(), step=cp.ReverseStep(twist=20.0))
    run = visited(
        sampler,
        cp.compile(measured, prior, LOADINGS[axes]),
        drawn,
        jnp.asarray(12),
        seed=3,
    )
    gained = np.asarray(run.log_weights)
    assert least <= gained.std() <= most
    assert abs(np.log(np.mean(np.exp(gained)))) < max(
        most, 5 * gained.std() / np.sqrt(CHAINS)
    )
    assert not bent or far_from(run.chains.position, *here) < 4.5


def test_the_rate_gains_the_divergence_of_what_the_drift_gains(density):
    """∇·u + ⟨u, S⟩, with u the difference of the drifts and its divergence by
    differentiation."""
    gain = jnp.array([[[0.7, 0.2], [0.2, -0.1]], [[0.3, -0.4], [-0.4, 0.9]]])
    push, fixed = jnp.array([[0.5, -1.0], [0.2, 0.3]]), jnp.array([0.3, 0.7])
    known = Fit(jnp.array([0.1, 0.4]), -jnp.eye(2), gain, push, fixed=fixed)
    layout = descent.Layout.of_density(density)

    def one(y):
        parts = layout.evaluate(density, y, 3).terms
        u, drift, rate = known.controlled(y, parts.drift, parts.rate, jnp.asarray(1))
        return drift - parts.drift, u, parts.drift, rate - parts.rate

    y = jnp.array([0.4, -0.8])
    (gained, u, score, rate), slopes = jax.jit(
        lambda y: (one(y), jax.jacfwd(lambda y: one(y)[1])(y))
    )(y)
    np.testing.assert_allclose(gained, u, rtol=1e-9)
    np.testing.assert_allclose(rate, jnp.trace(slopes) + u @ score, rtol=1e-9)


def wrong_sign(old):
    def controlled(fit, *chain):
        return old(dataclasses.replace(fit, push=-fit.push, gain=-fit.gain), *chain)

    return controlled


def stale(old):
    return lambda way, now, above, here, both: old(way, now, above, above, both)


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
    """Beyond, it would grow with the chains though it tells no more: every third of
    3,000, in the plane; all in 64."""
    y = np.random.default_rng(0).normal(size=(3000, 2))
    rows = np.column_stack([y, -y, 0.3 * (y * y).sum(1)])
    unseen = np.where((np.arange(3000) % 3 == 0)[:, None], rows, np.nan)
    one, other = (
        fit(jnp.asarray(table), jnp.zeros(3000), jnp.ones(2), control=True)
        for table in (rows, unseen)
    )
    for found, by_fewer in zip(
        jax.tree.leaves(one), jax.tree.leaves(other), strict=True
    ):
        np.testing.assert_array_equal(found, by_fewer)
    assert fits._thinned(jnp.arange(3000), 64).tolist() == list(range(3000))


@pytest.mark.parametrize("count", [400, 4003, 6005])
def test_each_half_of_the_chains_takes_the_control_of_the_other(count):
    """What a chain's own potential says must not come back in its weight; a row more or
    less changes nothing."""
    rng = np.random.default_rng(0)
    y = rng.normal(size=(count, 2))
    score = -1.3 * y + 0.1 * rng.normal(size=(count, 2))
    potential = 0.4 * (y * score).sum(1) + 0.1 * rng.normal(size=count)
    first = np.arange(count) < count // 2

    def fitted(potential):
        rows = jnp.asarray(np.column_stack([y, score, potential]))
        found = fit(rows, jnp.zeros(count), jnp.ones(2), control=True)
        return [
            np.hstack(
                found.controlled(jnp.array([2.0, -1.0]), jnp.zeros(2), 0.0, half)[::2]
            )
            for half in (0, 1)
        ]

    one, other = fitted(potential), fitted(np.where(first, 1.2, 1.0) * potential)
    assert np.abs(one[0]).max() > 0.3
    np.testing.assert_allclose(one[0], other[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(1.2 * one[1], other[1], rtol=1e-4, atol=1e-5)


def test_a_bent_step_has_the_precision_of_noise_and_data():
    """Q⁻¹ − H along axes that are not those of the step: J·Jᵀ·(Q⁻¹ − H) = I for the
    Jacobian J of y' in z."""
    slope, zero = -jnp.linalg.inv(COVARIANCE + 0.5 * jnp.eye(2)), jnp.zeros(2)
    s1, s0 = jnp.asarray(0.5), jnp.asarray(0.4)
    found = Fit(
        zero,
        slope,
        jnp.zeros((2, 2, 2)),
        zero,
        jnp.array([-1.5, -0.2]),
        jnp.eye(2),
        zero,
    )
    bent = Step.fitted(slope, slope, s1, s0, jnp.ones(2), False).bent(found, s1, s0)
    root = jax.jacfwd(lambda z: bent.predict(zero, zero, zero, z, 0.5)[0])(zero)
    excess = jnp.linalg.inv(root @ root.T) - jnp.linalg.inv(
        bent.basis @ jnp.diag(bent.noise**2) @ bent.basis.T
    )
    np.testing.assert_allclose(excess, jnp.diag(jnp.diag(excess)), atol=1e-9)
    assert np.all(np.diag(excess) > 0.1)
