"""Losses across levels and conditions, and of classifiers.

Tests of pairs, of optima, and of networks that learn from these losses.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.errors import InvalidValueError
from composeprob.models.making import losses_by_log_snr
from composeprob.models.networks.offset_energy import OffsetEnergy
from composeprob.models.networks.residual_mlp_eqx import ResidualMLP
from composeprob.schedule import Noise
from composeprob.training import (
    Conditions,
    CrossCondition,
    CrossLevel,
    Denoising,
    train,
)
from composeprob.training.loop import draw_batch, initial, losses, make_advance
from refusals import refused
from sampling_cases import learned, modes, single
from training.recipes import NORMAL, batch_of, cosine, tiny, untrained
from zscores import assert_agrees, assert_disagrees, z_scores

KEY = jax.random.key(5)
OTHER_KEY = jax.random.key(6)
MODES = modes([0.8, 0.2], [[-1.0, 0.0], [1.0, 0.0]], 0.15)


def crossed(**changes):
    """A tiny recipe with the cross-level loss."""
    settings = {
        "losses": (Denoising(), CrossLevel()),
        "parameterization": "energy_norm",
    }
    return tiny(**(settings | changes))


def test_events_of_a_pair_exchange_their_levels():
    recipe = crossed()
    noise, other = recipe.noise_pairs(KEY, 4000, 2.5)
    np.testing.assert_array_equal(noise.log_snr[:2000], other.log_snr[2000:])
    np.testing.assert_array_equal(noise.log_snr[2000:], other.log_snr[:2000])
    assert np.abs(noise.log_snr - other.log_snr).max() < 2.5 + 1e-4
    assert -6 - 1e-4 < noise.log_snr.min() < -5.9 < 3.9 < noise.log_snr.max() < 4 + 1e-4
    # Antithetic events share their pair.
    batch = batch_of(crossed(antithetic=True), KEY, 16)
    np.testing.assert_array_equal(batch.other.log_snr[:8], batch.other.log_snr[8:])
    # Without a range, the other noise is that of the nearest level.
    recipe = crossed(log_snr=None)
    noise, other = recipe.noise_pairs(KEY, 64, 4.0)
    levels = np.asarray(recipe.schedule.levels.log_snr)
    assert np.isin(np.asarray(other.log_snr), levels).all()
    np.testing.assert_array_equal(noise.index[:32], other.index[32:])


def assert_least(scores, tilt):
    """The mean loss has no slope at the exact log f; elsewhere its slope leads back."""
    if tilt:
        assert_disagrees(scores)
        assert np.sign(scores["slope"]) == np.sign(tilt)
    else:
        assert_agrees(scores)


@functools.cache
def slope():
    """Derivative of every event's loss in a, for a tilt a·λ of log f; compiled once."""
    exact = cp.Analytic(NORMAL, crossed().schedule)

    def slopes(a):
        def energy(x, log_snr):
            alpha = jnp.sqrt(jax.nn.sigmoid(log_snr))
            sigma = jnp.sqrt(jax.nn.sigmoid(-log_snr))
            noise = Noise(jnp.zeros((), int), alpha, sigma)
            log_f, _ = exact.evaluate(x, noise, {})
            return -sigma * (log_f + a * log_snr)

        factor = learned(energy, "energy", crossed().schedule)
        return losses(factor, draw_batch(crossed(), KEY, 20_000)).cross_level

    return jax.jit(jax.jacfwd(slopes))


@pytest.mark.parametrize("tilt", [0.0, 0.2, -0.2])
def test_the_loss_is_least_at_the_true_normalisers(tilt):
    """The slope of the mean loss is zero at a = 0, and nowhere else."""
    by_pairs = slope()(jnp.float32(tilt)).reshape(2, -1).T  # of levels
    assert_least(z_scores({"slope": by_pairs}, {"slope": 0.0}), tilt)


@pytest.mark.slow
def test_it_teaches_normaliser_and_depth():
    """Two modes with 0.8 and 0.2 of the mass, far apart at the cleaner levels."""

    def network(key):
        return OffsetEnergy(
            2,
            deviation=0.6,
            finest=0.15,
            log_snr_min=-6.0,
            hidden=32,
            blocks=2,
            embedding=16,
            key=key,
        )

    def trained(*losses):
        recipe = tiny(
            network=network,
            data=lambda key, n: MODES.sample(key, (n,)),
            parameterization="energy",
            iterations=1500,
            size=128,
            learning_rate=cosine(3e-3),
            ema=0.99,
            antithetic=True,
            losses=(Denoising(), *losses),
        )
        factor = train(recipe, KEY, progress=False).factor
        grid = jnp.linspace(-2.0, 2.0, 161)
        points = jnp.stack(jnp.meshgrid(grid, grid, indexing="ij"), -1).reshape(-1, 2)
        clean = factor.schedule.at(0)
        log_f = jax.vmap(lambda x: factor.evaluate(x, clean, {})[0])(points)
        cell = float(grid[1] - grid[0]) ** 2
        mass = np.exp(np.asarray(log_f, np.float64)) * cell
        return np.log(mass.sum()), mass[points[:, 0] < 0].sum() / mass.sum()

    log_z, share = trained(CrossLevel(gap=5.0))
    assert abs(log_z) < 0.25
    assert abs(share - 0.8) < 0.06
    # Denoising alone leaves the constant of each level free.
    log_z, share = trained()
    assert abs(log_z) > 0.3 or abs(share - 0.8) > 0.1


def test_such_a_factor_offers_mode_depth():
    network = untrained(tiny(), KEY)
    without = tiny(parameterization="energy_norm").factor(network)
    assert "mode_depth" not in without.capabilities
    factor = crossed().factor(network)
    assert "mode_depth" in factor.capabilities
    assert "mode_depth" in cp.compile(single, factor).capabilities


# ── conditions ────────────────────────────────────────────────────────────────────────

SHARES = jnp.array([0.7, 0.3])
MEANS = jnp.array([[-0.4, 0.0], [0.5, 0.3]])
DEVIATIONS = jnp.array([[0.5, 0.5], [0.3, 0.8]])
PARTS = dist.Normal(MEANS, DEVIATIONS).to_event(1)
NONE = -1


def mixture_recipe(
    shares=SHARES, others=1, vary=None, weight=1.0, denoising=True, **changes
):
    """A tiny recipe of a mixture, whose component is the condition ``part``.

    ``denoising`` is the weight of the denoising loss, or False without this loss.
    """

    def data(key, n):
        part_key, event_key = jax.random.split(key)
        part = dist.Categorical(shares).sample(part_key, (n,))
        events = PARTS.sample(event_key, (n,))
        chosen = jnp.take_along_axis(events, part[:, None, None], axis=1)
        return chosen[:, 0], {"part": part}

    settings = {
        "data": data,
        "conditions": Conditions({"part": NONE}, dropout=0.3),
        "parameterization": "energy",
    }
    chosen = []
    if callable(denoising):
        chosen.append(Denoising(denoising))
    elif denoising:
        chosen.append(Denoising())
    if weight:
        chosen.append(CrossCondition(weight, others, vary))
    return tiny(**(settings | {"losses": tuple(chosen)} | changes))


class Conditioned(eqx.Module):
    """A scalar energy that depends on the part."""

    layers: eqx.nn.MLP

    def __call__(self, x, t, part):
        return self.layers(jnp.array([*x, 0.1 * t, part]))


@eqx.filter_jit
def energy_network(key):
    return Conditioned(eqx.nn.MLP(4, "scalar", 8, 1, jnp.tanh, key=key))


@functools.cache
def condition_slope(shares=(0.7, 0.3), **changes):
    """Derivative of every event's loss in a constant a of one condition's log f.

    It is a function of a and the condition, and compiled once.
    """
    shares = jnp.array(shares)
    recipe = mixture_recipe(shares, **changes)

    def slopes(a, tilted):
        def energy(x, log_snr, part):
            alpha = jnp.sqrt(jax.nn.sigmoid(log_snr))
            sigma = jnp.sqrt(jax.nn.sigmoid(-log_snr))
            spread = jnp.sqrt((alpha * DEVIATIONS) ** 2 + sigma**2)
            noised = dist.Normal(alpha * MEANS, spread).to_event(1)
            each = noised.log_prob(x)
            any_part = jax.nn.logsumexp(each + jnp.log(shares))
            one_part = each[jnp.maximum(part, 0)]
            log_f = jnp.where(part == NONE, any_part, one_part)
            return -sigma * (log_f + a * (part == tilted))

        factor = learned(energy, "energy", recipe.schedule, conditions={"part": 0})
        return losses(factor, draw_batch(recipe, OTHER_KEY, 20_000)).cross_condition

    return jax.jit(jax.jacfwd(slopes))


def slope_scores(tilted, tilt, **case):
    """z-scores of the mean loss's slope, at the exact log f but for ``tilt``."""
    slopes = condition_slope(**case)(jnp.float32(tilt), tilted)
    # Neighbours share a condition, and are not independent: groups of 20 are.
    groups = slopes.reshape(1000, 20)
    return z_scores({"slope": groups}, {"slope": 0.0})


@pytest.mark.parametrize("tilt", [0.0, 0.2, -0.2])
@pytest.mark.parametrize(("tilted", "others"), [(NONE, 1), (1, 1), (1, 4)])
def test_the_loss_is_least_at_the_true_ratios_of_conditions(tilt, tilted, others):
    assert_least(slope_scores(tilted, tilt, others=others), tilt)


def other_part(key, conditions):
    return {"part": jnp.where(conditions["part"] == NONE, NONE, 1 - conditions["part"])}


def test_symmetric_similar_conditions_keep_the_optimum():
    even = {"shares": (0.5, 0.5), "vary": other_part}
    assert_agrees(slope_scores(1, 0.0, **even))
    assert_disagrees(slope_scores(1, 0.2, **even))
    # With these shares 0 becomes 1 more often than 1 becomes 0.
    assert_disagrees(slope_scores(1, 0.0, vary=other_part))
    batch = batch_of(mixture_recipe(vary=other_part), OTHER_KEY, 16)
    np.testing.assert_array_equal(
        batch.variant["part"][:, 0], other_part(OTHER_KEY, batch.conditions)["part"]
    )


def test_the_next_event_s_condition_is_the_foreign_one():
    batch = batch_of(mixture_recipe(), OTHER_KEY, 16)
    np.testing.assert_array_equal(
        batch.foreign["part"][:, 0], np.roll(batch.conditions["part"], 1)
    )
    assert NONE in np.asarray(batch.foreign["part"])
    assert batch_of(mixture_recipe(weight=0.0), OTHER_KEY, 16).foreign is None


def test_without_denoising_all_conditions_are_evaluated_at_once():
    """The other loss stays the same."""
    recipe = mixture_recipe(vary=other_part)
    network = energy_network(OTHER_KEY)
    calls = []

    def counted(x, t, part):
        calls.append(jnp.ndim(part))
        return network(x, t, part)

    factor = recipe.factor(counted)
    batch = batch_of(recipe, OTHER_KEY, 16)
    calls.clear()
    both = jax.jit(lambda batch: losses(factor, batch))(batch)
    assert len(calls) == 2  # the event's own with its score, and all others
    calls.clear()
    alone = jax.jit(lambda batch: losses(factor, batch, denoising=False))(batch)
    assert len(calls) == 1
    np.testing.assert_allclose(both.cross_condition, alone.cross_condition, rtol=1e-5)
    assert np.all(np.asarray(both.denoising) > 0)
    assert not np.any(alone.denoising)


@pytest.mark.parametrize("denoising", [True, False])
def test_training_takes_the_losses_that_the_recipe_names(denoising):
    weight = None
    if denoising:

        def weight(log_snr):
            return 1 + log_snr**2

    recipe = mixture_recipe(weight=0.5, denoising=weight, ema=0.0)

    def shifted(leaf):
        return leaf + 0.1 if eqx.is_inexact_array(leaf) else leaf

    network = jax.tree.map(shifted, energy_network(OTHER_KEY))
    state = initial(recipe, network)
    after = make_advance(recipe, network, OTHER_KEY)(state, jnp.int32(1))
    # The key of chunk 0 of step 0.
    key = jax.random.fold_in(jax.random.fold_in(OTHER_KEY, 0), 0)
    batch = batch_of(recipe, key, recipe.batch.size)
    static = eqx.filter(network, eqx.is_inexact_array, inverse=True)

    def loss(parameters):
        each = losses(recipe.factor(eqx.combine(parameters, static)), batch)
        total = 0.5 * each.cross_condition
        if denoising:
            total = total + each.denoising * (1 + batch.noise.log_snr**2)
        return jnp.mean(total), each

    gradient, each = jax.jit(jax.grad(loss, has_aux=True))(state.parameters)
    expected = each.denoising if denoising else 0.5 * each.cross_condition
    np.testing.assert_allclose(after.loss[0], jnp.mean(expected), rtol=1e-4)
    # Adam's first step goes by the sign of the gradient.
    signs = jax.tree.map(
        lambda a, b: jnp.sign(b - a), state.parameters, after.parameters
    )
    leaves = zip(jax.tree.leaves(signs), jax.tree.leaves(gradient), strict=True)
    for step, slope in leaves:
        clear = np.abs(slope) > 1e-3
        np.testing.assert_array_equal(np.asarray(step)[clear], -np.sign(slope)[clear])


SCORE = {
    "network": lambda x, t: -x,
    "schedule": tiny().schedule,
    "event_shape": (2,),
    "parameterization": "score",
}


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(
            lambda: crossed(parameterization="epsilon"),
            id="CrossLevel compares energies, and parameterization='eps",
        ),
        pytest.param(lambda: CrossLevel(-1.0), id="weight is -1.0"),
        pytest.param(lambda: crossed(losses=(CrossLevel(gap=11.0),)), id="gap is 11.0"),
        pytest.param(
            lambda: crossed(size=15), id="does not split into pairs of levels"
        ),
        pytest.param(lambda: crossed(size=18, antithetic=True), id="multiples of 4"),
        pytest.param(
            lambda: mixture_recipe(parameterization="epsilon"),
            id="CrossCondition compares energies, and parameterization='eps",
        ),
        pytest.param(lambda: CrossCondition(-1.0), id="weight is -1.0 2"),
        pytest.param(
            lambda: mixture_recipe(conditions={}),
            id="CrossCondition is given without conditions",
        ),
        pytest.param(
            lambda: mixture_recipe(weight=0.0, denoising=False), id="losses is ()"
        ),
        pytest.param(
            lambda: mixture_recipe(size=1), id="no 1 other conditions to compare"
        ),
        pytest.param(
            lambda: cp.Diffusion(**SCORE, mode_depth=True),
            id="mode_depth=True was given with parameterization 'score'",
        ),
        pytest.param(
            lambda: classifier(conditions=("style",)), id="a classifier has conditions"
        ),
        pytest.param(
            lambda: classifier(losses=(CrossLevel(),)), id="'classifier' has none"
        ),
    ],
)
def test_what_cannot_work_is_refused(make):
    refused(make, InvalidValueError)


CLASSES_KEY = jax.random.key(3)
CENTRES = jnp.array([[-1.0, 0.0], [1.0, 0.0], [0.0, 1.5]])
WIDTH = 0.5


def classes(key, n):
    label_key, place_key = jax.random.split(key)
    label = jax.random.randint(label_key, (n,), 0, 3)
    events = CENTRES[label] + WIDTH * jax.random.normal(place_key, (n, 2))
    return events, {"label": label}


def classifier(**changes):
    def network(key):
        return ResidualMLP(2, hidden=16, blocks=1, embedding=8, outputs=3, key=key)

    return tiny(network=network, parameterization="classifier", data=classes, **changes)


def exact_logits(x, log_snr):
    """log p(x | label) of the noised classes."""
    alpha = jnp.sqrt(jax.nn.sigmoid(log_snr))
    variance = jax.nn.sigmoid(-log_snr) + jax.nn.sigmoid(log_snr) * WIDTH**2
    return -0.5 * jnp.sum((x - alpha * CENTRES) ** 2, -1) / variance


def test_the_loss_is_the_cross_entropy():
    recipe = classifier()
    factor = recipe.factor(exact_logits, "classes")
    assert isinstance(factor, cp.Classifier)
    assert factor.label == "classes"
    batch = batch_of(recipe, CLASSES_KEY, 64)
    loss, *cross = jax.jit(losses)(factor, batch)
    alpha = np.asarray(batch.noise.alpha, np.float64)[:, None]
    sigma = np.asarray(batch.noise.sigma, np.float64)[:, None]
    x = alpha * np.asarray(batch.events) + sigma * np.asarray(batch.epsilon)
    distance = x[:, None] - alpha[:, None] * np.asarray(CENTRES)
    variance = sigma**2 + alpha**2 * WIDTH**2
    away = (distance**2).sum(-1) / variance
    log_p = -0.5 * away - np.log(np.exp(-0.5 * away).sum(1, keepdims=True))
    expected = -log_p[np.arange(64), np.asarray(batch.conditions["label"])]
    np.testing.assert_allclose(loss, expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(cross, 0)


@pytest.mark.slow
def test_it_learns_bayes_rule():
    recipe = classifier(iterations=600, size=256, ema=0.99)
    run = train(recipe, CLASSES_KEY, progress=False)
    trained = losses_by_log_snr(recipe, run.factor, classes, CLASSES_KEY)
    best = losses_by_log_snr(recipe, recipe.factor(exact_logits), classes, CLASSES_KEY)
    for row, exact in zip(trained, best, strict=True):
        assert row["held_out"] == pytest.approx(exact["held_out"], abs=0.02)
        assert row["accuracy"] == pytest.approx(exact["accuracy"], abs=0.03)
    assert best[0]["accuracy"] < 0.45 < 0.95 < best[-1]["accuracy"]
    assert best[0]["loss"] > 1.0 > 0.2 > best[-1]["loss"]
