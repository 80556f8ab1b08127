"""The default recipe of estimators: Gaussians, walls, sets, units, and refusals."""

import signal

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.errors import InvalidValueError, ShapeError, WrongTypeError
from composeprob.training import estimator, tuning
from composeprob.training import loop as loop_module
from composeprob.training.estimator import PosteriorDenoiser
from refusals import refused, rows
from sampling_cases import run as sampled
from sampling_cases import single

SCALE = np.array([0.02, 30.0])
NOISE = 0.5
"""Scales of the prior, a thousand times apart; the noise of data in units of them."""


@pytest.fixture(scope="module", autouse=True)
def small():
    settings = tuning.ESTIMATOR._replace(
        width=16, blocks=1, batch=64, held_out=100, levels=40
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "ESTIMATOR", settings)
        yield


def pairs(number=2000, seed=0):
    """θ ~ N(1, SCALE²), x = θ/SCALE + NOISE·ε in units of 100."""
    rng = np.random.default_rng(seed)
    unit, noise = rng.normal(size=(2, number, 2))
    return 1 + SCALE * unit, 100 * (unit + NOISE * noise)


def score(factor, theta, level, x):
    conditions = {"x": jnp.asarray(x)}
    noise = factor.schedule.at(level)
    return factor.evaluate(jnp.asarray(theta), noise, conditions)[1]


@pytest.fixture(scope="module")
def run(small):
    return estimator(
        *pairs(), jax.random.key(0), iterations=20, progress=False, label="mine"
    )


def test_the_posterior_of_a_gaussian_is_exact_in_the_units_of_theta(run):
    assert run.factor.label == "mine"
    assert run.finished
    assert run.loss.shape == (20,)
    assert run.held_out.shape == (2,)
    x = np.array([80.0, -40.0])
    mean = 1 + SCALE * (x / 100) / (1 + NOISE**2)
    variance = SCALE**2 * NOISE**2 / (1 + NOISE**2)
    for level in (0, 20, 39):
        noise = run.factor.schedule.at(level)
        total = noise.alpha**2 * variance + noise.sigma**2
        point = noise.alpha * mean + np.sqrt(total)
        scaled = score(run.factor, point, level, x) * np.sqrt(total)
        np.testing.assert_allclose(scaled, -1.0, atol=0.15)


def test_weights_that_do_worse_on_pairs_held_out_are_not_taken(monkeypatch):
    """Too long steps lead away from the regression, which is exact here.

    The factor gets the regression's weights.
    """
    monkeypatch.setattr(tuning, "ESTIMATOR", tuning.ESTIMATOR._replace(rate=1.0))
    run = estimator(*pairs(), jax.random.key(0), iterations=20, progress=False)
    assert not run.held_out[1] <= run.held_out[0]  # it may also be NaN
    assert not np.any(run.factor.network.last.weight)  # as before training


def test_an_interrupted_training_gives_the_weights_that_are_best_so_far(monkeypatch):
    def interrupted(*args, **values):
        signal.raise_signal(signal.SIGINT)  # Ctrl-C after the first call

    monkeypatch.setattr(loop_module.Progress, "update", interrupted)
    run = estimator(*pairs(200), jax.random.key(0), iterations=600, progress=False)
    assert not run.finished
    assert len(run.loss) == tuning.TRAINING_STEPS
    assert len(run.held_out) == 2
    assert np.all(np.isfinite(score(run.factor, np.ones(2), 0, np.zeros(2))))


def test_draws_stay_within_the_walls_of_a_uniform_prior_before_anything_is_learned():
    """θ ~ U(−1, 1), x = θ + 0.5·ε: a Gaussian cut at walls that no regression has."""
    rng = np.random.default_rng(0)
    theta = rng.uniform(-1, 1, (2000, 1)).astype(np.float32)
    x = theta + 0.5 * rng.normal(size=theta.shape).astype(np.float32)
    box = (jnp.full(1, -1.0), jnp.full(1, 1.0))
    network = PosteriorDenoiser(theta, x, box, jax.random.key(0))
    noise_of = jax.jit(lambda event, log_snr: network(event, log_snr, jnp.full(1, 0.9)))
    for log_snr in (-6.0, 0.0, 8.0):
        alpha = np.sqrt(1 / (1 + np.exp(-log_snr)))
        sigma = np.sqrt(1 / (1 + np.exp(log_snr)))
        for event in (-3.0, 0.2, 1.5):
            denoised = (event - sigma * noise_of(jnp.full(1, event), log_snr)) / alpha
            assert np.all(np.abs(denoised) < 1 + 1e-4 + 1e-6 / alpha)


def test_a_set_of_observations_has_no_order():
    rng = np.random.default_rng(0)
    theta = rng.normal(size=(500, 2))
    x = theta[:, None] + rng.normal(size=(500, 4, 2))
    run = estimator(theta, x, jax.random.key(0), iterations=300, progress=False)
    factor = run.factor
    point = np.array([0.3, -0.2])
    in_order = score(factor, point, 10, x[0])
    reversed_order = score(factor, point, 10, x[0][::-1])
    np.testing.assert_allclose(in_order, reversed_order, rtol=1e-4, atol=1e-4)
    exact = x[0].sum(0) / 5  # 1/(1 + 4) of the sum, at little noise
    last = score(factor, factor.schedule.at(0).alpha * exact, 0, x[0])
    np.testing.assert_allclose(last, 0.0, atol=1.0)


def test_a_factor_of_it_is_drawn_from(run):
    density = cp.compile(single, run.factor.given(x=jnp.zeros(2)))
    result = sampled(density, 1, 100, sampler=cp.Ancestral())
    deviation = (NOISE**2 / (1 + NOISE**2)) ** 0.5
    np.testing.assert_allclose(result["x"].std(0) / SCALE, deviation, rtol=0.3)


def test_all_steps_share_one_compilation(monkeypatch):
    traced = []
    call_network = PosteriorDenoiser.__call__

    def counted(self, event, t, x):
        traced.append(event.shape)
        return call_network(self, event, t, x)

    monkeypatch.setattr(PosteriorDenoiser, "__call__", counted)
    estimator(*pairs(200), jax.random.key(0), iterations=600, progress=False)
    # In the compiled step, and in the loss on pairs held out.
    assert 0 < len(traced) <= 2


def _spoilt(value):
    """Pairs of which one has this value in x."""
    theta, x = pairs(200)
    x[3, 0] = value
    return theta, x


THETA, X = pairs(200)
REFUSED = {
    ShapeError: {
        "one number for each": lambda: call(THETA[:, 0], X),
        "different lengths": lambda: call(THETA, X[:-1]),
        "images": lambda: call(THETA, np.zeros((200, 2, 2, 2))),
    },
    InvalidValueError: {
        "few pairs": lambda: call(THETA[:50], X[:50]),
        "NaN": lambda: call(*_spoilt(np.nan)),
        "infinite": lambda: call(*_spoilt(np.inf)),
        "a constant": lambda: call(np.ones_like(THETA), X),
        "outside of the box": lambda: call(
            THETA, X, dist.Uniform(0, 1).expand([2]).to_event(1)
        ),
        "positive": lambda: call(np.exp(X / 100), X, dist.LogNormal(0, 1)),
    },
    WrongTypeError: {"no prior": lambda: call(THETA, X, (0, 1))},
}


def call(theta, x, prior=None):
    return estimator(
        theta, x, jax.random.key(0), prior=prior, iterations=1, progress=False
    )


@pytest.mark.parametrize(("kind", "wrong"), rows(REFUSED))
def test_what_is_no_set_of_pairs_is_refused(kind, wrong):
    refused(wrong, kind)
