"""The cross-condition loss: least at the true log-densities of conditions, "no condition" included."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.errors import InvalidValueError
from composeprob.training import Conditions, CrossCondition, Denoising
from composeprob.training.loss import draw_batch, losses
from composeprob.training.optimise import initial, make_advance
from refusals import refused
from training.recipes import tiny
from zscores import assert_agrees, assert_disagrees, z_scores

KEY = jax.random.key(6)
SHARES = jnp.array([0.7, 0.3])
PARTS = dist.Normal(jnp.array([[-0.4, 0.0], [0.5, 0.3]]), jnp.array([[0.5, 0.5], [0.3, 0.8]])).to_event(1)
NONE = -1


def told_apart(shares=SHARES, others=1, vary=None, weight=1.0, denoising=True, **changes):
    def data(key, n):
        part_key, event_key = jax.random.split(key)
        part = dist.Categorical(shares).sample(part_key, (n,))
        return jnp.take_along_axis(PARTS.sample(event_key, (n,)), part[:, None, None], axis=1)[:, 0], {"part": part}

    settings = {"data": data, "conditions": Conditions({"part": NONE}, dropout=0.3), "parameterization": "energy"}
    crossed = (CrossCondition(weight, others, vary),) if weight else ()
    plain = (Denoising(denoising if callable(denoising) else None),) if denoising else ()
    return tiny(**(settings | {"losses": (*plain, *crossed)} | changes))


class Conditioned(eqx.Module):
    """A scalar energy that depends on the part."""

    layers: eqx.nn.MLP

    def __call__(self, x, t, part):
        return self.layers(jnp.array([*x, 0.1 * t, part]))


def energy_network(key):
    return Conditioned(eqx.nn.MLP(4, "scalar", 8, 1, jnp.tanh, key=key))


@functools.cache
def slope(shares=(0.7, 0.3), **changes):
    """Of the loss of every event in a constant a of one condition's log f, as a function of a; compiled once."""
    shares = jnp.array(shares)
    recipe = told_apart(shares, **changes)

    def slopes(a, tilted):
        def energy(x, log_snr, part):
            alpha, sigma = jnp.sqrt(jax.nn.sigmoid(log_snr)), jnp.sqrt(jax.nn.sigmoid(-log_snr))
            spread = jnp.sqrt((alpha * PARTS.base_dist.scale) ** 2 + sigma**2)
            each = dist.Normal(alpha * PARTS.base_dist.loc, spread).to_event(1).log_prob(x)
            any_part = jax.nn.logsumexp(each + jnp.log(shares))
            return -sigma * (jnp.where(part == NONE, any_part, each[jnp.maximum(part, 0)]) + a * (part == tilted))

        factor = cp.Diffusion(
            energy, recipe.schedule, event_shape=(2,), parameterization="energy", time="log_snr", conditions={"part": 0}
        )
        return losses(factor, draw_batch(recipe, KEY, 20_000)).cross_condition

    return jax.jit(jax.jacfwd(slopes))


def slope_scores(tilted, tilt, **case):
    """Whether the mean loss has a slope there, at the exact log f but for ``tilt``."""
    of_groups = slope(**case)(jnp.float32(tilt), tilted).reshape(1000, 20)  # neighbours share a condition
    return z_scores({"slope": of_groups}, {"slope": 0.0})


@pytest.mark.parametrize("tilt", [0.0, 0.2, -0.2])
@pytest.mark.parametrize(("tilted", "others"), [(NONE, 1), (1, 1), (1, 4)])
def test_the_loss_is_least_at_the_true_ratios(tilt, tilted, others):
    scores = slope_scores(tilted, tilt, others=others)
    if tilt:
        assert_disagrees(scores)
        assert np.sign(scores["slope"]) == np.sign(tilt)
    else:
        assert_agrees(scores)


def other_part(key, conditions):
    return {"part": jnp.where(conditions["part"] == NONE, NONE, 1 - conditions["part"])}


def test_close_conditions_keep_the_optimum_where_they_lead_to_one_another_equally_often():
    even = {"shares": (0.5, 0.5), "vary": other_part}
    assert_agrees(slope_scores(1, 0.0, **even))
    assert_disagrees(slope_scores(1, 0.2, **even))
    assert_disagrees(slope_scores(1, 0.0, vary=other_part))  # from 0 to 1 more often than back
    batch = draw_batch(told_apart(vary=other_part), KEY, 16)
    np.testing.assert_array_equal(batch.variant["part"][:, 0], other_part(KEY, batch.conditions)["part"])


def test_the_next_event_s_condition_is_the_foreign_one():
    batch = draw_batch(told_apart(), KEY, 16)
    np.testing.assert_array_equal(batch.foreign["part"][:, 0], np.roll(batch.conditions["part"], 1))
    assert NONE in np.asarray(batch.foreign["part"])
    assert draw_batch(told_apart(weight=0.0), KEY, 16).foreign is None


def test_without_denoising_the_other_loss_is_the_same_and_all_conditions_are_asked_for_at_once():
    recipe, network, calls = told_apart(vary=other_part), energy_network(KEY), []

    def counted(x, t, part):
        calls.append(jnp.ndim(part))
        return network(x, t, part)

    factor, batch = recipe.factor(counted), draw_batch(recipe, KEY, 16)
    calls.clear()
    both = losses(factor, batch)
    assert len(calls) == 2  # the event's own with its score, and the others
    calls.clear()
    alone = losses(factor, batch, denoising=False)
    assert len(calls) == 1
    np.testing.assert_allclose(both.cross_condition, alone.cross_condition, rtol=1e-5)
    assert np.all(np.asarray(both.denoising) > 0)
    assert not np.any(alone.denoising)


@pytest.mark.parametrize("denoising", [True, False])
def test_training_takes_the_losses_that_the_recipe_names(denoising):
    weigh = (lambda log_snr: 1 + log_snr**2) if denoising else None
    recipe = told_apart(weight=0.5, denoising=weigh, ema=0.0)
    network = jax.tree.map(lambda a: a + 0.1 if eqx.is_inexact_array(a) else a, energy_network(KEY))
    state = initial(recipe, network)
    after, record = make_advance(recipe, network, KEY)(state, jnp.int32(1))
    batch = draw_batch(recipe, jax.random.fold_in(jax.random.fold_in(KEY, 0), 0), recipe.batch.size)
    static = eqx.filter(network, eqx.is_inexact_array, inverse=True)

    def loss(parameters):
        each = losses(recipe.factor(eqx.combine(parameters, static)), batch)
        total = 0.5 * each.cross_condition
        return jnp.mean(total + (each.denoising * (1 + batch.noise.log_snr**2) if denoising else 0.0)), each

    gradient, each = jax.jit(jax.grad(loss, has_aux=True))(state.parameters)
    expected = each.denoising if denoising else 0.5 * each.cross_condition
    np.testing.assert_allclose(record.loss[0], jnp.mean(expected), rtol=1e-4)
    # Adam's first step goes by the sign of the gradient.
    moved = jax.tree.map(lambda a, b: jnp.sign(b - a), state.parameters, after.parameters)
    for step, slope in zip(jax.tree.leaves(moved), jax.tree.leaves(gradient), strict=True):
        clear = np.abs(slope) > 1e-3
        np.testing.assert_array_equal(np.asarray(step)[clear], -np.sign(slope)[clear])


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: told_apart(parameterization="epsilon"), "CrossCondition compares energies, and parameterization='eps"),
        (lambda: CrossCondition(-1.0), "weight is -1.0"),
        (lambda: told_apart(conditions={}), "CrossCondition is given without conditions"),
        (lambda: told_apart(weight=0.0, denoising=False), r"losses is \(\)"),
        (lambda: told_apart(size=1), "no 1 other conditions to compare"),
    ],
)
def test_what_cannot_work_is_refused(make, told):
    refused(lambda: make(), InvalidValueError, told)
