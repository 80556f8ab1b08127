"""A classifier of noised events: its loss, what it learns, and recipes that cannot be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import composeprob as cp
from composeprob.errors import InvalidValueError
from composeprob.models.networks.residual_mlp_eqx import ResidualMLP
from composeprob.training import CrossLevel, train
from composeprob.training.loss import draw_batch, losses
from composeprob.training.quality import losses_by_log_snr
from refusals import refused
from training.recipes import tiny

KEY = jax.random.key(3)
CENTRES, WIDTH = jnp.array([[-1.0, 0.0], [1.0, 0.0], [0.0, 1.5]]), 0.5


def classes(key, n):
    label_key, place_key = jax.random.split(key)
    label = jax.random.randint(label_key, (n,), 0, 3)
    return CENTRES[label] + WIDTH * jax.random.normal(place_key, (n, 2)), {"label": label}


def classifier(**changes):
    def network(key):
        return ResidualMLP(2, hidden=16, blocks=1, embedding=8, outputs=3, key=key)

    return tiny(network=network, parameterization="classifier", data=classes, **changes)


def exact_logits(x, log_snr):
    """log p(x | label) of the noised classes."""
    alpha, variance = jnp.sqrt(jax.nn.sigmoid(log_snr)), jax.nn.sigmoid(-log_snr) + jax.nn.sigmoid(log_snr) * WIDTH**2
    return -0.5 * jnp.sum((x - alpha * CENTRES) ** 2, -1) / variance


def test_the_loss_is_the_cross_entropy():
    recipe = classifier()
    factor = recipe.factor(exact_logits, "classes")
    assert isinstance(factor, cp.Classifier)
    assert factor.label == "classes"
    batch = draw_batch(recipe, KEY, 64)
    loss, *cross = jax.jit(losses)(factor, batch)
    alpha, sigma = (np.asarray(a, np.float64)[:, None] for a in (batch.noise.alpha, batch.noise.sigma))
    x = alpha * np.asarray(batch.events) + sigma * np.asarray(batch.epsilon)
    away = ((x[:, None] - alpha[:, None] * np.asarray(CENTRES)) ** 2).sum(-1) / (sigma**2 + alpha**2 * WIDTH**2)
    log_p = -0.5 * away - np.log(np.exp(-0.5 * away).sum(1, keepdims=True))
    np.testing.assert_allclose(loss, -log_p[np.arange(64), np.asarray(batch.conditions["label"])], rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(cross, 0)


@pytest.mark.slow
def test_it_learns_bayes_rule():
    recipe = classifier(iterations=600, size=256, ema=0.99)
    run = train(recipe, KEY, progress=False)
    learned = losses_by_log_snr(recipe, run.factor, classes, KEY)
    best = losses_by_log_snr(recipe, recipe.factor(exact_logits), classes, KEY)
    for row, exact in zip(learned, best, strict=True):
        assert row["held_out"] == pytest.approx(exact["held_out"], abs=0.02)
        assert row["accuracy"] == pytest.approx(exact["accuracy"], abs=0.03)
    assert best[0]["accuracy"] < 0.45 < 0.95 < best[-1]["accuracy"]
    assert best[0]["loss"] > 1.0 > 0.2 > best[-1]["loss"]


def test_a_classifier_has_no_other_conditions():
    refused(lambda: classifier(conditions=("style",)), InvalidValueError, "a classifier has conditions")
    refused(lambda: classifier(losses=(CrossLevel(),)), InvalidValueError, "'classifier' has none")
