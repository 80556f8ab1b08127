"""Recipes of masked diffusion: what a batch shows, the loss, and what is refused."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import composeprob as cp
from composeprob.errors import (
    ConditionError,
    InvalidValueError,
    LoadError,
    NetworkError,
)
from composeprob.training.masked import cross_entropies, draw_masked
from refusals import refused, rows
from zscores import assert_agrees, assert_disagrees, z_scores

KEY = jax.random.key(0)
LENGTH = 4
SHARES = jnp.array([0.5, 0.3, 0.2])


class Table(eqx.Module):
    """The same logits at every position, whatever is visible."""

    logits: jax.Array

    def __call__(self, tokens, visible):
        return jnp.broadcast_to(self.logits, (LENGTH, 3))


class Copying(eqx.Module):
    """Repeats the visible tokens, and says nothing of the others."""

    def __call__(self, tokens, visible):
        sure = 50.0 * jax.nn.one_hot(tokens, 3)
        return jnp.where(visible[:, None], sure, 0.0)


class Cheating(eqx.Module):
    """Looks at hidden tokens."""

    def __call__(self, tokens, visible):
        return 50.0 * jax.nn.one_hot(tokens, 3)


def independent(key, n):
    return jax.random.choice(key, 3, (n, LENGTH), p=SHARES)


RECIPE = cp.training.MaskedRecipe(
    network=lambda key: Table(jnp.zeros(3)),
    data=independent,
    length=LENGTH,
    num_values=3,
    iterations=300,
    batches=64,
    learning_rate=0.05,
    ema=0.95,
)


def losses_of(network, n=4000):
    return np.asarray(
        cross_entropies(RECIPE.factor(network), draw_masked(RECIPE, KEY, n))
    )


def test_a_batch_shows_random_positions_as_many_as_any_other_number():
    batch = draw_masked(RECIPE, KEY, 4000)
    count = np.asarray(batch.visible.sum(1))
    # Strata: of 4,000 events each number is visible in 1,000, but for one.
    assert np.all(np.abs(np.bincount(count, minlength=LENGTH) - 1000) <= 1)
    assert count.max() == LENGTH - 1
    positions = {str(i): np.asarray(batch.visible[:, i], float) for i in range(LENGTH)}
    assert_agrees(z_scores(positions, dict.fromkeys(positions, 1.5 / LENGTH)))
    # Of pairs, too: P(both) = Σ_k k(k − 1)/(L(L − 1))/L.
    pair = np.asarray(batch.visible[:, 0] & batch.visible[:, 2], float)
    assert_agrees(z_scores({"pair": pair}, {"pair": (0 + 0 + 2 + 6) / 12 / 4}))


def test_the_loss_of_the_right_shares_is_their_entropy():
    entropy = float(-jnp.sum(SHARES * jnp.log(SHARES)))
    right = losses_of(Table(jnp.log(SHARES)))
    assert_agrees(z_scores({"loss": right}, {"loss": entropy}))
    wrong = losses_of(Table(jnp.log(SHARES[::-1])))
    assert_disagrees(z_scores({"loss": wrong}, {"loss": entropy}))


def test_visible_tokens_have_no_loss():
    np.testing.assert_allclose(losses_of(Copying(), 64), np.log(3), rtol=1e-6)
    assert losses_of(Cheating(), 64).max() < 1e-6


def test_training_finds_the_shares_and_resumes(tmp_path):
    run = cp.training.train(RECIPE, KEY, progress=False)
    shares = jax.nn.softmax(run.factor.network.logits)
    np.testing.assert_allclose(shares, SHARES, atol=0.03)
    assert run.factor.event_shape == (LENGTH,)
    assert run.factor.mask == "boolean"
    assert run.finished
    assert run.loss.shape == (300,)
    # Losses by the share of visible tokens: 0, 1/4, 1/2 and 3/4.
    assert np.isfinite(run.loss_by_log_snr).sum() == LENGTH

    folder = tmp_path / "checkpoints"
    half = dataclasses.replace(RECIPE, iterations=10)
    cp.training.train(half, KEY, progress=False, checkpoint_dir=folder)
    again = cp.training.train(half, KEY, progress=False, checkpoint_dir=folder)
    assert again.finished
    other = dataclasses.replace(half, num_values=4)
    with pytest.raises(LoadError):
        cp.training.train(other, KEY, progress=False, checkpoint_dir=folder)


def changed(**settings):
    return lambda: dataclasses.replace(RECIPE, **settings)


def shaped(data, **settings):
    return lambda: dataclasses.replace(RECIPE, data=data, **settings).event_shape


def with_labels(key, n):
    return jnp.zeros((n, LENGTH), int), {"label": jnp.zeros(n, int)}


REFUSALS = {
    InvalidValueError: {
        "antithetic masks": changed(batches=cp.training.Batches(64, antithetic=True)),
        "one position": changed(length=1),
        "one value": changed(num_values=1),
        "no steps": changed(iterations=0),
    },
    NetworkError: {
        "events of another length": shaped(lambda key, n: jnp.zeros((n, 5), int)),
        "tokens that are floats": shaped(lambda key, n: jnp.zeros((n, LENGTH))),
    },
    ConditionError: {
        "an undeclared condition": shaped(with_labels),
        "a condition without data": shaped(
            lambda key, n: jnp.zeros((n, LENGTH), int), conditions=("label",)
        ),
    },
}


@pytest.mark.parametrize(("kind", "call"), rows(REFUSALS))
def test_refusals_of_masked_recipes(kind, call):
    refused(call, kind)
