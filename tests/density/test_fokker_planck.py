"""The Fokker–Planck residual of scores: 0 for a noised law, and its closed form for a
score that does not belong to one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import composeprob as cp
from composeprob.density.overlap import noised
from sampling_cases import both, modes, single

SCHEDULE = cp.Schedule.log_snr(60)
LEVELS = (2, 30, 45, 59)


def scaled(x, t, scale):
    """c times the noise of N(0, 1) in x, for t = σ/α of variance-preserving levels."""
    return scale * x * t / jnp.sqrt(1 + t**2)


def network(scale, shape=(2,), schedule=SCHEDULE):
    options = {
        "parameterization": "epsilon",
        "time": "sigma",
        "conditions": ("scale",),
        "label": "net",
    }
    return cp.Diffusion(scaled, schedule, event_shape=shape, **options).given(
        scale=jnp.float32(scale)
    )


def residual(density, clean, level, **options):
    at = noised(density, {"x": clean}, level, jax.random.key(1))
    return cp.metrics.fokker_planck(density, at, level, jax.random.key(2), **options)


def drawn(shape):
    return jax.random.normal(jax.random.key(0), (64, *shape))


@pytest.mark.parametrize("level", LEVELS)
def test_a_scaled_score_has_the_residual_that_it_must_have(level):
    """ρ = 2c(c − 1)·τ³y/(1 + τ²)² beside e = c·τy/(1 + τ²): the share 2|c − 1|·σ²; the
    exact score has none."""
    variance = float(SCHEDULE.sigma[level]) ** 2
    for c in (1.0, 0.5, 1.2):
        (found,) = residual(cp.compile(single, network(c)), drawn((2,)), level).values()
        # Predicted noise counts as a tenth of a standard deviation at least.
        predicted = c * np.sqrt(variance) * np.sqrt(2 * np.log(2) / 2)
        expected = 2 * abs(c - 1) * variance / max(1.0, 0.1 / predicted)
        assert found == pytest.approx(expected, rel=0.2, abs=2e-3)


def test_a_divergence_of_many_entries_is_estimated_without_bias():
    """Its gradient is 0 here; two directions of random signs in 20 entries leave noise,
    but not on average."""
    density = cp.compile(single, network(0.5, (20,)))
    (found,) = residual(density, drawn((20,)), 30).values()
    assert found == pytest.approx(float(SCHEDULE.sigma[30]) ** 2, rel=0.02)


def test_each_factor_of_a_product_is_named_by_itself():
    two = cp.Analytic(
        modes([0.3, 0.7], [[-0.5, 0.0], [0.5, 0.2]], 0.1), SCHEDULE, label="two"
    )
    clean = jax.random.uniform(jax.random.key(0), (64, 2), minval=-1.0)
    for c, low, high in ((1.0, 0.0, 0.01), (0.5, 0.25, 0.35)):
        density = cp.compile(both, two, network(c))
        exact, other = residual(density, clean, 30).values()
        assert exact < 0.01
        assert low <= other < high


def test_a_law_that_changes_with_the_level_is_not_a_noised_law():
    """N(0, 1 + λ²/100): the exact score of each level, but not of one noised law."""

    def moving(x, t):
        return x * t * jnp.sqrt(1 + t**2) / (t**2 + 1 + (2 * jnp.log(t)) ** 2 / 100)

    f = cp.Diffusion(
        moving, SCHEDULE, event_shape=(2,), parameterization="epsilon", time="sigma"
    )
    (found,) = residual(cp.compile(single, f), drawn((2,)), 20).values()
    assert found > 0.05


def test_levels_that_are_too_far_apart_give_nan():
    for schedule in (cp.Schedule.log_snr(12), cp.Schedule.log_snr(4)):
        density = cp.compile(single, network(1.0, schedule=schedule))
        (found,) = residual(density, drawn((2,)), 2).values()
        assert np.isnan(found)
