"""The cross-level loss: pairs of levels, its optimum, and what a network learns from it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.errors import InvalidValueError
from composeprob.models.networks.offset_energy import OffsetEnergy
from composeprob.schedule import Noise
from composeprob.training import CrossLevel, Denoising, train
from composeprob.training.loss import draw_batch, losses
from refusals import refused
from training.recipes import NORMAL, cosine, tiny
from zscores import assert_agrees, assert_disagrees, z_scores

KEY = jax.random.key(5)
MODES = dist.MixtureSameFamily(
    dist.Categorical(probs=jnp.array([0.8, 0.2])), dist.Normal(jnp.array([[-1.0, 0.0], [1.0, 0.0]]), 0.15).to_event(1)
)


def crossed(**changes):
    return tiny(**({"losses": (Denoising(), CrossLevel()), "parameterization": "energy_norm"} | changes))


def test_events_of_a_pair_exchange_their_levels():
    recipe = crossed()
    noise, other = recipe.noise_pairs(KEY, 4000, 2.5)
    np.testing.assert_array_equal(noise.log_snr[:2000], other.log_snr[2000:])
    np.testing.assert_array_equal(noise.log_snr[2000:], other.log_snr[:2000])
    assert np.abs(noise.log_snr - other.log_snr).max() < 2.5 + 1e-4
    assert -6 - 1e-4 < noise.log_snr.min() < -5.9 < 3.9 < noise.log_snr.max() < 4 + 1e-4
    # Antithetic events share their pair; levels alone are matched to the nearest.
    batch = draw_batch(crossed(antithetic=True), KEY, 16)
    np.testing.assert_array_equal(batch.other.log_snr[:8], batch.other.log_snr[8:])
    levels = crossed(log_snr=None)
    noise, other = levels.noise_pairs(KEY, 64, 4.0)
    own = np.asarray(levels.schedule.levels.log_snr)
    assert np.isin(np.asarray(other.log_snr), own).all()
    np.testing.assert_array_equal(noise.index[:32], other.index[32:])


@functools.cache
def slope():
    """Of the loss of every event in a tilt a·λ of log f, as a function of a; compiled once."""
    exact = cp.Analytic(NORMAL, crossed().schedule)

    def slopes(a):
        def energy(x, log_snr):
            alpha, sigma = jnp.sqrt(jax.nn.sigmoid(log_snr)), jnp.sqrt(jax.nn.sigmoid(-log_snr))
            noise = Noise(jnp.zeros((), int), alpha, sigma)
            return -sigma * (exact.evaluate(x, noise, {})[0] + a * log_snr)

        factor = cp.Diffusion(energy, crossed().schedule, event_shape=(2,), parameterization="energy", time="log_snr")
        return losses(factor, draw_batch(crossed(), KEY, 20_000)).cross_level

    return jax.jit(jax.jacfwd(slopes))


@pytest.mark.parametrize("tilt", [0.0, 0.2, -0.2])
def test_the_loss_is_least_at_the_true_normalisers(tilt):
    """The slope of the mean loss is zero at a = 0, and nowhere else."""
    by_pairs = slope()(jnp.float32(tilt)).reshape(2, -1).T  # of levels
    scores = z_scores({"slope": by_pairs}, {"slope": 0.0})
    if tilt:
        assert_disagrees(scores)
        assert np.sign(scores["slope"]) == np.sign(tilt)
    else:
        assert_agrees(scores)


@pytest.mark.slow
def test_it_teaches_normaliser_and_depth():
    """Two modes with 0.8 and 0.2 of the mass, far apart at the cleaner levels."""

    def network(key):
        return OffsetEnergy(2, deviation=0.6, finest=0.15, log_snr_min=-6.0, hidden=32, blocks=2, embedding=16, key=key)

    def learned(*losses):
        recipe = tiny(
            network=network, data=lambda key, n: MODES.sample(key, (n,)), parameterization="energy", iterations=1500,
            size=128, learning_rate=cosine(3e-3), ema=0.99, antithetic=True, losses=(Denoising(), *losses),
        )  # fmt: skip
        factor = train(recipe, KEY, progress=False).factor
        grid = jnp.linspace(-2.0, 2.0, 161)
        points = jnp.stack(jnp.meshgrid(grid, grid, indexing="ij"), -1).reshape(-1, 2)
        log_f = jax.vmap(lambda x: factor.evaluate(x, factor.schedule.at(0), {})[0])(points)
        mass = np.exp(np.asarray(log_f, np.float64)) * float(grid[1] - grid[0]) ** 2
        return np.log(mass.sum()), mass[points[:, 0] < 0].sum() / mass.sum()

    log_z, share = learned(CrossLevel(gap=5.0))
    assert abs(log_z) < 0.25
    assert abs(share - 0.8) < 0.06
    log_z, share = learned()  # denoising alone: the constant of each level stays free
    assert abs(log_z) > 0.3 or abs(share - 0.8) > 0.1


def test_such_a_factor_offers_mode_depth():
    network = tiny().untrained(KEY)
    assert "mode_depth" not in tiny(parameterization="energy_norm").factor(network).capabilities
    factor = crossed().factor(network)
    assert "mode_depth" in factor.capabilities

    @cp.program
    def alone():
        cp.sample("x", factor)

    assert "mode_depth" in cp.compile(alone).capabilities


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (
            lambda: crossed(parameterization="epsilon"),
            "CrossLevel compares energies, and parameterization='eps",
        ),
        (lambda: CrossLevel(-1.0), "weight is -1.0"),
        (lambda: crossed(losses=(CrossLevel(gap=11.0),)), "gap is 11.0"),
        (lambda: crossed(size=15), "does not split into pairs of levels"),
        (lambda: crossed(size=18, antithetic=True), "multiples of 4"),
    ],
)
def test_what_cannot_work_is_refused(make, told):
    refused(lambda: make(), InvalidValueError, told)


def test_a_score_cannot_claim_mode_depth():
    with pytest.raises(InvalidValueError, match="mode_depth=True was given with parameterization 'score'"):
        cp.Diffusion(
            lambda x, t: -x, cp.Schedule.cosine(5), event_shape=(2,), parameterization="score", mode_depth=True
        )
