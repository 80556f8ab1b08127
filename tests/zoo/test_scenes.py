"""The recipes of scenes: events carry the centre of one of their objects, or a caption that is true of one."""

import equinox as eqx
import jax
import numpy as np
import pytest
from flax import nnx

import composeprob as cp
from composeprob.errors import ConditionError, InvalidValueError, ShapeError
from composeprob.model_zoo import recipe
from composeprob.models.scenes import CaptionedScenes, from_positions
from composeprob.models.worlds import captions, detector
from refusals import refused


@pytest.fixture(scope="module")
def scenes_recipe():
    return recipe("shapes-position")


@pytest.mark.slow
def test_the_condition_is_the_centre_of_one_object(scenes_recipe):
    images, conditions = jax.jit(lambda key: scenes_recipe.data(key, 120))(jax.random.key(2))
    found = detector.detect(images)
    assert detector.placed(found, conditions["position"][:, None]).mean() > 0.98
    others = np.roll(np.asarray(conditions["position"]), 1, axis=0)
    assert detector.placed(found, others[:, None]).mean() < 0.4


def test_the_factor(scenes_recipe):
    shapes = eqx.filter_eval_shape(scenes_recipe.untrained, jax.random.key(0))
    factor = scenes_recipe.factor(jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes), "scenes")
    assert factor.capabilities == {"score", "energy", "conservative", "exact_marginals"}
    placed = factor.given(position=(0.3, 0.4))
    assert (placed / factor).event_shape == (32, 32, 3)
    with pytest.raises(
        InvalidValueError, match=r"Position \(1.2, 0.5\) lies outside of the image.*\n.*0.125 and 0.875"
    ):
        factor.given(position=(1.2, 0.5))
    with pytest.raises(ShapeError, match=r"a pair \(x, y\); got an array of shape \(2, 2\)"):
        factor.given(position=[(0.2, 0.5), (0.7, 0.7)])
    refused(lambda: placed.given(position=(0.5, 0.5)), ConditionError, "'position' of factor 'scenes' is given twice")


def test_the_factor_of_captions():
    made = recipe("shapes-caption")
    shapes = eqx.filter_eval_shape(made.untrained, jax.random.key(0))
    factor = made.factor(jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes), "scenes")
    red = factor.given(caption="a red circle on the left")
    np.testing.assert_array_equal(red.fixed["caption"], captions.tokens("a red circle on the left"))
    refused(lambda: factor.given(caption="a rad circle"), InvalidValueError, "'rad' is not in the vocabulary")
    np.testing.assert_array_equal(factor.call_conditions()["caption"], captions.EMPTY)


def test_without_a_caption_it_is_the_model_of_positions_without_one_and_a_caption_adds_a_number():
    made, positions = recipe("shapes-caption"), cp.load("shapes-position")
    network = from_positions(eqx.filter_jit(made.untrained)(jax.random.key(0)))
    factor = made.factor(network)
    x, noise = jax.random.normal(jax.random.key(1), (32, 32, 3)), positions.schedule.at(30)
    evaluate = eqx.filter_jit(lambda factor, conditions: factor.evaluate(x, noise, conditions))
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
