"""The detector finds the objects of true, blurred and noisy scenes, and no others."""

import jax
import numpy as np
import pytest
from scipy import ndimage

from composeprob.models.worlds import detector, shapes


@pytest.fixture(scope="module")
def some(scenes):
    """The first 150 scenes."""
    return jax.tree.map(lambda a: a[:150], scenes)


def rates(images, scenes):
    """Recall and precision of the detector."""
    found = detector.detect(images)
    present = np.arange(shapes.MOST) < scenes.count[:, None]
    matched = detector.matched(
        found, scenes.centres, scenes.shapes, scenes.colours, present
    )
    right = matched.sum()
    return right / scenes.count.sum(), right / found.count.sum()


@pytest.mark.parametrize("spoil", ["nothing", "noise", "blur", "dim"])
def test_recall_and_precision(some, spoil):
    images = some.images
    if spoil == "noise":
        images = images + 0.1 * np.random.default_rng(0).normal(size=images.shape)
    elif spoil == "blur":
        images = ndimage.gaussian_filter(images, (0, 0.6, 0.6, 0))
    elif spoil == "dim":
        images = 0.85 * images
    recall, precision = rates(images, some)
    assert recall >= 0.98
    assert precision >= 0.98


def test_another_scene_is_not_recognised(some):
    recall, _ = rates(np.roll(some.images, 1, axis=0), some)
    assert recall < 0.05
    # Red for blue, yellow for cyan: green and magenta stay.
    recall, _ = rates(some.images[..., ::-1], some)
    assert 0.2 < recall < 0.5


def test_what_is_placed(some):
    found = detector.detect(some.images)
    present = np.arange(shapes.MOST) < some.count[:, None]
    near = detector.placed(found, some.centres)
    assert near[present].all()
    moved = some.centres + 3.0 / shapes.SIZE
    assert detector.placed(found, moved)[present].mean() < 0.05


def test_nothing_is_found_where_nothing_is():
    noise = 0.4 * np.random.default_rng(1).normal(size=(5, 32, 32, 3))
    images = np.concatenate([np.zeros((3, 32, 32, 3)), noise])
    assert detector.detect(images).count.sum() == 0
