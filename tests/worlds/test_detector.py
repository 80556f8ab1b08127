"""The detector finds what is there, on true scenes and on blurred and noisy ones, and nothing else."""

import jax
import numpy as np
import pytest
from scipy import ndimage

from models.worlds import detector, shapes

N = 150


@pytest.fixture(scope="module")
def scenes():
    return jax.tree.map(np.asarray, jax.jit(lambda key: shapes.draw(key, N))(jax.random.key(5)))


def rates(images, scenes):
    found = detector.detect(images)
    present = np.arange(shapes.MOST) < scenes.count[:, None]
    right = detector.matched(found, scenes.centres, scenes.shapes, scenes.colours, present).sum()
    return right / scenes.count.sum(), right / found.count.sum()


@pytest.mark.parametrize("spoil", ["nothing", "noise", "blur", "dim"])
def test_recall_and_precision(scenes, spoil):
    images = {
        "nothing": lambda: scenes.images,
        "noise": lambda: scenes.images + 0.1 * np.random.default_rng(0).normal(size=scenes.images.shape),
        "blur": lambda: ndimage.gaussian_filter(scenes.images, (0, 0.6, 0.6, 0)),
        "dim": lambda: 0.85 * scenes.images,
    }[spoil]()
    recall, precision = rates(images, scenes)
    assert recall >= 0.98
    assert precision >= 0.98


def test_another_scene_is_not_recognised(scenes):
    recall, _ = rates(np.roll(scenes.images, 1, axis=0), scenes)
    assert recall < 0.05
    recall, _ = rates(scenes.images[..., ::-1], scenes)  # red for blue, yellow for cyan: green and magenta stay
    assert 0.2 < recall < 0.5


def test_what_is_placed(scenes):
    found = detector.detect(scenes.images)
    present = np.arange(shapes.MOST) < scenes.count[:, None]
    near = detector.placed(found, scenes.centres)
    assert near[present].all()
    moved = scenes.centres + 3.0 / shapes.SIZE
    assert detector.placed(found, moved)[present].mean() < 0.05


def test_nothing_is_found_where_nothing_is():
    noise = 0.4 * np.random.default_rng(1).normal(size=(5, 32, 32, 3))
    assert detector.detect(np.concatenate([np.zeros((3, 32, 32, 3)), noise])).count.sum() == 0
