"""Captions: true of their scenes, read as they were written, and unknown words."""

import jax
import numpy as np
import pytest

from composeprob.models.worlds import captions, detector, shapes
from messages import check_wording


def truth(scenes):
    """The true objects in the form of a detector's."""

    def padded(a):
        return np.pad(a, [(0, 0), (0, 3), (0, 0)][: a.ndim])

    objects = map(padded, (scenes.centres, scenes.shapes, scenes.colours))
    return detector.Found(scenes.count, *objects, np.ones((len(scenes.count), 8)))


def test_captions_are_true_and_say_what_they_mean(scenes):
    describe = jax.jit(captions.describe)
    tokens = np.asarray(describe(jax.random.key(3), shapes.Scenes(*scenes)))
    texts = [captions.text(row) for row in tokens]
    objects = truth(scenes)

    def holds(shift):
        """Truth of each caption in the scene ``shift`` before its own."""
        values = []
        for i, text in enumerate(texts):
            one = jax.tree.map(lambda a, i=i: a[[i - shift]], objects)
            values.append(captions.true_of(text, one)[0])
        return np.array(values)

    assert holds(0).all()
    assert np.mean(holds(1)) < 0.6  # most are false of another scene
    again = [captions.tokens(text) for text in texts]
    np.testing.assert_array_equal(again, tokens)
    mentioned = np.array(
        [[value is not None for value in captions.meaning(text)] for text in texts]
    )
    error = (0.75 * 0.25 / len(texts)) ** 0.5
    np.testing.assert_allclose(mentioned.mean(0), 0.75, atol=4 * error)
    assert {"a red circle on the left", "an object"} & set(texts)


def test_meanings():
    expected = (
        shapes.COLOURS.index("red"),
        shapes.SHAPES.index("circle"),
        captions.PLACES.index("on the left"),
    )
    assert captions.meaning("a red circle on the left") == expected
    assert captions.meaning("An object.") == (None, None, None)
    bottom = captions.PLACES.index("at the bottom")
    assert captions.meaning("a cyan triangle at the bottom").place == bottom


def test_a_place_is_judged_by_the_object_that_is_named():
    one = np.zeros((1, 8), int)
    centres = np.zeros((1, 8, 2))
    centres[0, :2] = (0.2, 0.2), (0.8, 0.8)
    colours = np.array([[0, 1] + [0] * 6])
    found = detector.Found(np.array([2]), centres, one, colours, one.astype(float))
    assert captions.true_of("a red circle on the left", found)
    assert captions.true_of("a green circle on the right", found)
    # The circle on the right is green.
    assert not captions.true_of("a red circle on the right", found)
    assert not captions.true_of("a square", found)
    assert not captions.true_of("an object in the middle", found)


@pytest.mark.parametrize(
    ("caption", "facts"),
    [
        (
            "a purple circle",
            "'purple'",
        ),
        ("a rad circle", "'red'"),
        (
            "a red circle on the left at the top",
            " 9 words.* 6",
        ),
        (3.5, "float"),
        ([1, 2], "6"),
    ],
)
def test_captions_that_cannot_be_read(caption, facts):
    with pytest.raises((ValueError, TypeError), match=facts) as caught:
        captions.tokens(caption)
    check_wording(str(caught.value))


def test_another_shape_is_mostly_a_similar_one_and_symmetric():
    phrases = [f"a red {shape} on the left" for shape in shapes.SHAPES]
    given = np.stack([captions.tokens(phrase) for phrase in phrases] * 2000)
    drawn = jax.jit(captions.reshaped)(jax.random.key(1), given)
    drawn = np.asarray(drawn).reshape(2000, 3, -1)
    counts = np.zeros((3, 3), int)
    for i in range(3):
        texts = [captions.text(row) for row in drawn[:, i]]
        counts[i] = [texts.count(phrase) for phrase in phrases]
    assert counts.sum() == 6000  # nothing else changes
    expected = 2000 * np.array([[0.0, 0.8, 0.2], [0.8, 0.0, 0.2], [0.2, 0.2, 0.6]])
    assert np.abs(counts - expected).max() < 5 * np.sqrt(2000 * 0.16)
    whole = np.stack([captions.tokens("an object in the middle")] * 50)
    np.testing.assert_array_equal(captions.reshaped(jax.random.key(2), whole), whole)
