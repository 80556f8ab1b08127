"""Digits: a fixed split, images to learn from, and a nearly perfect judge."""

import jax
import numpy as np
import pytest

from composeprob.models.worlds import digits


@pytest.fixture(scope="module")
def drawn():
    images, labels = jax.jit(lambda key: digits.draw(key, 1500))(jax.random.key(0))
    return np.asarray(images), np.asarray(labels)


def test_the_split_is_fixed_and_without_overlap():
    learned, other = digits.split()
    assert len(learned.labels) == digits.LEARNED
    assert len(learned.labels) + len(other.labels) == 1797
    learned_images = {image.tobytes() for image in learned.images}
    assert learned_images.isdisjoint(image.tobytes() for image in other.images)
    assert learned.labels[:10].tolist() == [6, 6, 6, 2, 5, 6, 6, 2, 2, 1]
    assert min(np.bincount(learned.labels).min(), np.bincount(other.labels).min()) > 60


def test_the_judge_knows_images_that_it_never_saw():
    learned, _ = digits.split()
    images = (learned.images / 8 - 1)[..., None]
    assert np.mean(digits.judge(images) == learned.labels) > 0.98
    assert np.mean(digits.judge(images[:, ::-1]) == learned.labels) < 0.5  # upside down


def test_images_to_learn_from_are_still_digits(drawn):
    images, labels = drawn
    assert images.shape == (1500, 8, 8, 1)
    assert np.abs(images).max() <= 1 + 0.5 / 8
    assert np.mean(digits.judge(images) == labels) > 0.97
    assert np.bincount(labels, minlength=10).min() > 90
    # Smoothed: the fraction of a count is uniform where nothing was moved, that is, on
    # bare paper.
    corner = 8 * (images[:, :, 0, 0] + 1)
    bare = corner[np.abs(corner) <= 0.5]
    np.testing.assert_allclose(bare.mean(), 0.0, atol=4 * 12**-0.5 / len(bare) ** 0.5)
    np.testing.assert_allclose(bare.std(), 12**-0.5, rtol=0.03)


def test_images_held_out_are_the_others(drawn):
    images, labels = jax.jit(lambda key: digits.held_out(key, 400))(jax.random.key(1))
    _, other = digits.split()
    counts = np.rint(digits.to_counts(images))
    pairs = zip(other.images, other.labels, strict=True)
    label_of = {image.tobytes(): label for image, label in pairs}
    expected = [label_of[image.astype(np.float32).tobytes()] for image in counts]
    assert expected == np.asarray(labels).tolist()
    moved = np.rint(digits.to_counts(drawn[0])).astype(np.float32)
    assert np.mean([image.tobytes() in label_of for image in moved]) < 0.01
