"""Scenes of shapes: images of their ground truth, and the law of the docstring."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zscores
from composeprob.models.worlds import shapes

FINE = 16


def supersampled(centre, shape):
    """The share of each pixel that a shape covers, from 256 points a pixel."""
    point = (np.arange(shapes.SIZE * FINE) + 0.5) / FINE
    x, y = np.meshgrid(point - shapes.SIZE * centre[0], point - shapes.SIZE * centre[1])
    side = shapes.CIRCUMRADIUS / 2
    inside = (
        x**2 + y**2 <= shapes.RADIUS**2,
        np.maximum(abs(x), abs(y)) <= shapes.HALF_SIDE,
        (y <= side) & (np.sqrt(0.75) * abs(x) - 0.5 * y <= side),
    )[shape]
    return inside.reshape(shapes.SIZE, FINE, shapes.SIZE, FINE).mean((1, 3))


@pytest.mark.parametrize(
    ("shape", "worst"), [(0, 0.06), (1, 0.065), (2, 0.2)], ids=shapes.SHAPES
)
def test_pixels_are_covered_as_supersampling_says(shape, worst):
    @jax.jit
    def draw(centre):
        red = jnp.array([0])
        present = jnp.array([True])
        image = shapes.render(centre[None], jnp.array([shape]), red, present)
        return image[..., 0]

    centres = np.random.default_rng(shape).uniform(0.3, 0.7, (20, 2))
    for centre in centres.astype(np.float32):
        drawn = np.asarray(draw(centre))
        truth = supersampled(centre, shape)
        assert np.abs(drawn - truth).max() < worst
        assert abs(drawn.sum() - truth.sum()) < 0.6
    other = supersampled(centre, (shape + 1) % 3)
    assert np.abs(np.asarray(draw(centre)) - other).max() > 0.3


def test_nothing_overlaps_or_is_cut_off(scenes):
    assert scenes.images.min() >= 0
    assert scenes.images.max() <= 1 + 1e-6
    present = np.arange(shapes.MOST) < scenes.count[:, None]
    offsets = scenes.centres[:, :, None] - scenes.centres[:, None]
    distance = np.linalg.norm(offsets, axis=-1)
    pairs = present[:, :, None] & present[:, None] & ~np.eye(shapes.MOST, dtype=bool)
    assert distance[pairs].min() >= shapes.SEPARATION - 1e-6
    inside = scenes.centres[present]
    assert inside.min() >= shapes.MARGIN
    assert inside.max() <= 1 - shapes.MARGIN
    area = np.array(
        [
            np.pi * shapes.RADIUS**2,
            (2 * shapes.HALF_SIDE) ** 2,
            0.75 * 3**0.5 * shapes.CIRCUMRADIUS**2,
        ]
    )
    brightness = shapes.CHANNELS.sum(1)[scenes.colours]
    expected = (area[scenes.shapes] * brightness * present).sum(1)
    # Sums agree only if no pixel is shared.
    np.testing.assert_allclose(scenes.images.sum((1, 2, 3)), expected, rtol=0.03)


def test_images_are_their_ground_truth(scenes):
    present = np.arange(shapes.MOST) < scenes.count[:, None]
    render = jax.jit(jax.vmap(shapes.render))
    again = render(scenes.centres, scenes.shapes, scenes.colours, present)
    np.testing.assert_allclose(again, scenes.images, atol=1e-5)


def test_the_law_of_a_scene(scenes):
    first = scenes.centres[:, 0]
    values = {
        "count": scenes.count,
        "red": scenes.colours[:, 0] == 0,
        "circle": scenes.shapes[:, 0] == 0,
    }
    values |= {"x": first[:, 0], "y": first[:, 1]}
    expected = {"count": 3.0, "red": 1 / 6, "circle": 1 / 3, "x": 0.5, "y": 0.5}
    zscores.assert_agrees(zscores.z_scores(values, expected))
    # A lone centre is uniform, as no other one excludes a place.
    lone = first[scenes.count == 1]
    values = {"square": (lone[:, 0] - 0.5) ** 2}
    zscores.assert_agrees(zscores.z_scores(values, {"square": 0.75**2 / 12}))


def test_equal_keys_draw_equal_scenes(draw_scenes, scenes):
    np.testing.assert_array_equal(draw_scenes(jax.random.key(1)).images, scenes.images)
    assert np.abs(draw_scenes(jax.random.key(2)).images - scenes.images).max() > 0.5


@pytest.mark.slow
def test_the_number_of_objects_can_be_chosen():
    two = jax.jit(lambda key: shapes.draw(key, 20, fewest=2, most=2))(jax.random.key(3))
    np.testing.assert_array_equal(two.count, 2)
