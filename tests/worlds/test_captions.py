"""Captions: true of the scenes that they were made for, read as they were written, and
words that are not known."""

import jax
import numpy as np
import pytest

from composeprob.models.worlds import captions, detector, shapes


def truth(scenes):
    """The true objects in the form of what a detector finds."""
    padded = lambda a: np.pad(a, [(0, 0), (0, 3), (0, 0)][: a.ndim])
    objects = map(padded, (scenes.centres, scenes.shapes, scenes.colours))
    return detector.Found(scenes.count, *objects, np.ones((len(scenes.count), 8)))


def test_captions_are_true_and_say_what_they_mean(scenes):
    tokens = np.asarray(
        jax.jit(captions.describe)(jax.random.key(3), shapes.Scenes(*scenes))
    )
    texts, objects = [captions.text(row) for row in tokens], truth(scenes)

    def holds(shift):
        of = lambda i: jax.tree.map(lambda a: a[[i - shift]], objects)
        return np.array(
            [captions.true_of(text, of(i))[0] for i, text in enumerate(texts)]
        )

    assert holds(0).all()
    assert np.mean(holds(1)) < 0.6  # of another scene most are not
    again = [captions.tokens(text) for text in texts]
    np.testing.assert_array_equal(again, tokens)
    said = np.array(
        [[part is not None for part in captions.meaning(text)] for text in texts]
    )
    np.testing.assert_allclose(
        said.mean(0), 0.75, atol=4 * (0.75 * 0.25 / len(texts)) ** 0.5
    )
    assert {"a red circle on the left", "an object"} & set(texts)


def test_meanings():
    known = (
        shapes.COLOURS.index("red"),
        shapes.SHAPES.index("circle"),
        captions.PLACES.index("on the left"),
    )
    assert captions.meaning("a red circle on the left") == known
    assert captions.meaning("An object.") == (None, None, None)
    assert captions.meaning("a cyan triangle at the bottom")[
        2
    ] == captions.PLACES.index("at the bottom")


def test_a_place_is_judged_by_the_object_that_is_named():
    one = np.zeros((1, 8), int)
    centres = np.zeros((1, 8, 2))
    centres[0, :2] = (0.2, 0.2), (0.8, 0.8)
    found = detector.Found(
        np.array([2]), centres, one, np.array([[0, 1] + [0] * 6]), one.astype(float)
    )
    assert captions.true_of("a red circle on the left", found)
    assert captions.true_of("a green circle on the right", found)
    assert not captions.true_of(
        "a red circle on the right", found
    )  # a green one is there
    assert not captions.true_of("a square", found)
    assert not captions.true_of("an object in the middle", found)


@pytest.mark.parametrize(
    ("caption", "told"),
    [
        (
            "a purple circle",
            r"word 'purple' is not in the vocabulary.*\n.*did you mean '\w+'\?",
        ),
        ("a rad circle", "did you mean 'red'"),
        (
            "a red circle on the left at the top",
            r"has 9 words; models read 6.*\n.*multiply",
        ),
        (3.5, "A caption is text; got float"),
        ([1, 2], "has 6 tokens"),
    ],
)
def test_captions_that_cannot_be_read(caption, told):
    with pytest.raises((ValueError, TypeError), match=told):
        captions.tokens(caption)


def test_another_shape_is_mostly_the_one_taken_for_it_as_often_there_as_back():
    given = np.stack(
        [captions.tokens(f"a red {shape} on the left") for shape in shapes.SHAPES]
        * 2000
    )
    drawn = np.asarray(jax.jit(captions.reshaped)(jax.random.key(1), given)).reshape(
        2000, 3, -1
    )
    texts = [[captions.text(row) for row in drawn[:, i]] for i in range(3)]
    counts = np.array(
        [
            [each.count(f"a red {shape} on the left") for shape in shapes.SHAPES]
            for each in texts
        ]
    )
    assert counts.sum() == 6000  # nothing else changes
    expected = 2000 * np.array([[0.0, 0.8, 0.2], [0.8, 0.0, 0.2], [0.2, 0.2, 0.6]])
    assert np.abs(counts - expected).max() < 5 * np.sqrt(2000 * 0.16)
    whole = np.stack([captions.tokens("an object in the middle")] * 50)
    np.testing.assert_array_equal(captions.reshaped(jax.random.key(2), whole), whole)
