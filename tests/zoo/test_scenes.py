"""The recipes of scenes and of digits: their conditions, and samples given these."""

import re

import equinox as eqx
import jax
import numpy as np
import pytest
from flax import nnx

import composeprob as cp
from composeprob.errors import ConditionError, InvalidValueError, ShapeError
from composeprob.model_zoo import recipe
from composeprob.models.handwriting import ANY
from composeprob.models.making import calibrate_model
from composeprob.models.scenes import CaptionedScenes, from_positions
from composeprob.models.worlds import captions, detector
from composeprob.models.worlds import digits as world
from refusals import refused
from sampling_cases import run, single


@pytest.mark.slow
def test_the_condition_is_the_centre_of_one_object():
    @jax.jit
    def data(key):
        return recipe("shapes-position").data(key, 120)

    images, conditions = data(jax.random.key(2))
    found = detector.detect(images)
    assert detector.placed(found, conditions["position"][:, None]).mean() > 0.98
    others = np.roll(np.asarray(conditions["position"]), 1, axis=0)
    assert detector.placed(found, others[:, None]).mean() < 0.4


def zeros(name):
    """A factor of this recipe whose weights are zeros."""
    shapes = eqx.filter_eval_shape(recipe(name).untrained, jax.random.key(0))
    network = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)
    return recipe(name).factor(network, "scenes")


def test_the_factor():
    factor = zeros("shapes-position")
    assert factor.capabilities == {"score", "energy", "conservative", "exact_marginals"}
    placed = factor.given(position=(0.3, 0.4))
    assert (placed / factor).event_shape == (32, 32, 3)
    facts = r"\(1.2, 0.5\).*0.125.*0.875"
    refused(lambda: factor.given(position=(1.2, 0.5)), InvalidValueError, facts)
    pairs = [(0.2, 0.5), (0.7, 0.7)]
    refused(lambda: factor.given(position=pairs), ShapeError, r"\(2, 2\)")
    refused(
        lambda: placed.given(position=(0.5, 0.5)),
        ConditionError,
    )


def test_the_factor_of_captions():
    factor = zeros("shapes-caption")
    caption = "a red circle on the left"
    red = factor.given(caption=caption)
    np.testing.assert_array_equal(red.fixed["caption"], captions.tokens(caption))
    refused(
        lambda: factor.given(caption="a rad circle"),
        InvalidValueError,
    )
    np.testing.assert_array_equal(factor.call_conditions()["caption"], captions.EMPTY)


def test_a_caption_adds_a_number_to_the_model_of_positions():
    """Without a caption it is that model without a position."""
    of_captions = recipe("shapes-caption")
    positions = cp.load("shapes-position")
    network = from_positions(eqx.filter_jit(of_captions.untrained)(jax.random.key(0)))
    factor = of_captions.factor(network)
    x = jax.random.normal(jax.random.key(1), (32, 32, 3))
    noise = positions.schedule.at(30)

    @eqx.filter_jit
    def evaluate(factor, conditions):
        return factor.evaluate(x, noise, conditions)

    ours = evaluate(factor, factor.call_conditions())
    theirs = evaluate(positions, positions.call_conditions())
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-4)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-3, atol=1e-3)
    red = factor.given(caption="a red circle on the left").call_conditions()
    s, fit = eqx.filter_jit(network)(x, noise.log_snr, **red)
    assert s.shape == (32, 32, 3)
    np.testing.assert_allclose(evaluate(factor, red)[0] - ours[0], fit, atol=2e-3)


def test_captions_can_be_embeddings_made_elsewhere():
    def build(embedding):
        network = CaptionedScenes(lambda vector: vector, 24, rngs=nnx.Rngs(0))
        return network(jax.numpy.zeros((32, 32, 3)), jax.numpy.float32(0.0), embedding)

    s, fit = jax.eval_shape(build, jax.ShapeDtypeStruct((24,), np.float32))
    assert s.shape == (32, 32, 3)
    assert fit.shape == ()


CHAINS = 400
LABEL = 8


def accuracy(factor, sampler=None):
    density = cp.compile(single, factor)
    result = run(density, 0, CHAINS, sampler=sampler or cp.Ancestral())
    return np.mean(world.judge(result.unweighted()["x"]) == LABEL)


def test_labels_that_mean_nothing():
    digits = cp.load("digits")
    for label in (11, -1, 2.0, [3]):
        refused(
            lambda: digits.given(label=label),
            InvalidValueError,
        )
    refused(lambda: digits.given(label=3).given(label=4), ConditionError)
    refused(
        lambda: cp.load("digits", class_=3),
        ConditionError,
    )
    assert digits.given(label=ANY).fixed["label"] == ANY
    refused(
        lambda: cp.condition(digits, cp.load("digits-classifier"), label=10),
        InvalidValueError,
    )


@pytest.mark.slow
def test_guided_digits_are_recognised():
    digits, classifier = cp.load("digits"), cp.load("digits-classifier")
    assert accuracy(cp.guide(digits, 2.0, label=LABEL)) > 0.95
    assert accuracy(cp.condition(digits, classifier, LABEL, scale=8.0)) > 0.95
    assert accuracy(digits) < 0.25


@cp.program
def either(three, eight, share):
    return cp.sample("x", cp.mixture([three, eight], weights=[share, 1 - share]))


def test_every_label_has_its_calibration():
    factors = [cp.load("digits", label=label) for label in range(world.CLASSES)]
    assert all("normalised" in factor.capabilities for factor in factors)
    assert "normalised" not in cp.load("digits").capabilities
    density = cp.compile(either, factors[3], factors[8], 0.2)
    # One network with several calibrations stays one batch.
    assert re.search("share: 2 .* 1 ", str(density))
    fix = "calibrate.py digits --given label="
    refused(lambda: calibrate_model("digits"), InvalidValueError, fix=fix)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.2, 0.6])
def test_shares_of_a_mixture_of_classes(share):
    three = cp.load("digits", label=3)
    eight = cp.load("digits", label=8)
    density = cp.compile(either, three, eight, share)
    result = run(density, 1, 1000, sampler=None)
    labels = world.judge(result.unweighted()["x"])
    found = np.mean(labels == 3) / np.mean(np.isin(labels, (3, 8)))
    assert found == pytest.approx(share, abs=0.05)
